"""Where a run's numbers go, and the arithmetic of model FLOP/s utilisation (MFU).

Always `RUN/metrics.jsonl`, one JSON object a line; TensorBoard and Weights & Biases on request.
On screen: a progress bar in a terminal, one line through absl logging elsewhere.
"""

import importlib
import json
import math
import os
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from absl import logging
from tqdm import tqdm

from dmc_jax.errors import UserError
from dmc_jax.evaluation.times import MARK
from dmc_jax.files import FULL, write_text

# Peak dense bfloat16 FLOP/s of one device, by the start of JAX's `device_kind`; the first match
# counts. NVIDIA's data sheets print twice this for Hopper, "with sparsity".
#   A100: 312e12, NVIDIA A100 Tensor Core GPU data sheet (2020).
#   H100: 989.4e12 SXM5 and 756e12 PCIe, NVIDIA H100 Tensor Core GPU architecture paper (2022).
#   H200: 989.4e12 SXM, NVIDIA H200 data sheet: the H100's processor with more memory. The NVL
#   boards differ from both, so they are left out rather than guessed.
_PEAK_BF16_FLOPS = (
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200 NVL", None),
    ("NVIDIA H200", 989.4e12),
)

LAYER_MARK = "_layer_"  # between a name and the number of a layer

Sink = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class MetricsLogger:
    """A run's open sinks; made by `open_metrics`."""

    sinks: tuple[Sink, ...]
    lost: float = 0.0  # seconds of the steps that an earlier process took, and whose lines were cut

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record one step's numbers everywhere.

        Args:
            step: The step they belong to, counted over the run; greater than the last one logged.
            values: Numbers, or scalar arrays (which are fetched from the device here).
        """
        numbers = {name: _number(value) for name, value in values.items()}
        for sink in self.sinks:
            sink(step, numbers)


@contextmanager
def open_metrics(
    run_dir: str | os.PathLike,
    *,
    total_steps: int,
    first_step: int = 0,
    quiet: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
) -> Iterator[MetricsLogger]:
    """Open a run's metrics; to be used in a `with` statement, in one process of the run only.

    Args:
        run_dir: The run's directory; made if missing.
        total_steps: Where the progress bar ends.
        first_step: The first step that will be taken now. Lines from it on, left by a run that
            had come further, are cut: the file has each step once, and so have TensorBoard's.
        quiet: Nothing on screen.
        tensorboard: Also write `RUN/tensorboard`; needs tensorboardX.
        wandb: Also log to Weights & Biases, as its variables say (`WANDB_MODE`); needs wandb.

    Yields:
        The logger.

    Raises:
        UserError: A package that was asked for is missing, or the directory cannot be written.
        OSError: The disk is full.
    """
    run_dir = Path(run_dir).absolute()
    # Looked up before anything is written: a missing package is known at once.
    tensorboardx = _required("tensorboardX", "tensorboard") if tensorboard else None
    wandb_module = _required("wandb", "wandb") if wandb else None
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lost = _cut_lines_from(run_dir / "metrics.jsonl", first_step)
            file = stack.enter_context(open(run_dir / "metrics.jsonl", "a"))
        except OSError as error:
            if error.errno in FULL:
                raise OSError(
                    f"cannot write {run_dir / 'metrics.jsonl'}: {error.strerror}. Make room, then "
                    "resume the run."
                ) from error
            raise UserError(
                f"cannot write {run_dir / 'metrics.jsonl'}: {error.strerror or error}. Choose a "
                "run directory that this user may write to."
            ) from error
        sinks = [_jsonl_sink(file)]
        if tensorboardx:
            sinks.append(_tensorboard_sink(stack, tensorboardx, run_dir, first_step))
        if wandb_module:
            sinks.append(_wandb_sink(stack, wandb_module, run_dir))
        if not quiet:
            sinks.append(_screen_sink(stack, total_steps, first_step))
        yield MetricsLogger(tuple(sinks), lost)


def check_packages(*, tensorboard: bool, wandb: bool) -> None:
    """Raise a `UserError` where a package that is asked for is not installed."""
    if tensorboard:
        _required("tensorboardX", "tensorboard")
    if wandb:
        _required("wandb", "wandb")


def flops_per_token(
    *,
    params_without_embedding: int,
    layers: int,
    heads: int,
    head_dim: int,
    length: int,
    learns: str = "all",
) -> float:
    """Floating-point operations that a model needs for one token of a training step.

    Forward, a multiplication and an addition for each parameter, `2 N`, and `2 Q` of each for
    every head and visible key (scores; values by weights), `4 L H Q (T / 2)`. Backward, twice as
    much: the gradients of activations and, where they learn, of parameters. Attention is causal, so
    T / 2 keys are visible on average. Recomputation (remat) is not counted: it is not progress.
    From PaLM (Chowdhery et al. 2022, arXiv 2204.02311), appendix B, which takes all T keys as
    visible.

    Args:
        params_without_embedding: N, the parameters but for the input table; a table that is also
            the output projection does count.
        layers: L.
        heads: H, query heads.
        head_dim: Q.
        length: T, tokens in a window.
        learns: "all" of it; "beside": what stands beside its parameters; "nothing", as a teacher
            that runs forward alone.

    Returns:
        Operations a token.
    """
    of_parameters = {"all": 6.0, "beside": 4.0, "nothing": 2.0}[learns] * params_without_embedding
    attention = 4.0 * layers * heads * head_dim * (length / 2)
    return of_parameters + attention * (1 if learns == "nothing" else 3)


def mfu(
    tokens_per_second: float,
    flops_per_token: float,
    devices: int,
    peak_flops_per_device: float | None,
) -> float | None:
    """Model FLOP/s utilisation: the share of the hardware's peak that went into the model.

    Args:
        tokens_per_second: Over all devices.
        flops_per_token: From `flops_per_token`, of the model and its teacher.
        devices: How many devices took part.
        peak_flops_per_device: From `peak_flops`.

    Returns:
        A number between 0 and 1; None where the peak is unknown.
    """
    if peak_flops_per_device is None:
        return None
    return tokens_per_second * flops_per_token / (devices * peak_flops_per_device)


def peak_flops(device_kind: str) -> float | None:
    """Look up a device's peak rate in dense bfloat16 products.

    Args:
        device_kind: As in `jax.devices()[0].device_kind`.

    Returns:
        FLOP/s of one device; None where it is not known, so that no MFU is invented.
    """
    for prefix, peak in _PEAK_BF16_FLOPS:
        if device_kind.startswith(prefix):
            return peak
    return None


def _number(value: Any) -> float | int:
    return value if isinstance(value, int) else float(value)


def _jsonl_sink(file: TextIO) -> Sink:
    def write(step: int, numbers: dict[str, float]) -> None:
        # JSON has no NaN: as null the line stays readable to every parser.
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        file.flush()

    return write


def _tensorboard_sink(
    stack: ExitStack, tensorboardx: ModuleType, run_dir: Path, first_step: int
) -> Sink:
    folder = run_dir / "tensorboard"
    # Tells TensorBoard to hide the later steps of a run that had come further.
    resumed = {"purge_step": first_step} if folder.exists() else {}
    writer = tensorboardx.SummaryWriter(str(folder), **resumed)
    stack.callback(writer.close)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, x in numbers.items():
            writer.add_scalar(name, x, step)

    return write


def _wandb_sink(stack: ExitStack, wandb: ModuleType, run_dir: Path) -> Sink:
    # The directory identifies the run, so that a resumed run continues its curves.
    run_id = f"{run_dir.name}-{zlib.crc32(str(run_dir).encode()):08x}"
    run = wandb.init(dir=str(run_dir), name=run_dir.name, id=run_id, resume="allow")
    stack.callback(run.finish)
    return lambda step, numbers: run.log(numbers, step=step)


def _screen_sink(stack: ExitStack, total_steps: int, first_step: int) -> Sink:
    if not sys.stderr.isatty():
        return lambda step, numbers: logging.info(
            "step %d/%d  %s", step, total_steps, _compact(numbers)
        )
    bar = stack.enter_context(tqdm(total=total_steps, initial=max(0, first_step - 1), unit="step"))

    def show(step: int, numbers: dict[str, float]) -> None:
        bar.set_postfix_str(_compact(numbers), refresh=False)
        bar.update(step - bar.n)

    return show


def _compact(numbers: dict[str, float]) -> str:
    """One line: of what there is one of a layer, only least, median and most; times are last."""
    single = {n: x for n, x in numbers.items() if LAYER_MARK not in n and not n.startswith(MARK)}
    parts = [f"{name} {x:.4g}" for name, x in single.items()]
    for name in dict.fromkeys(n.split(LAYER_MARK)[0] for n in numbers if LAYER_MARK in n):
        layers = [x for n, x in numbers.items() if n.startswith(name + LAYER_MARK)]
        spread = "/".join(f"{f(layers):.4g}" for f in (min, statistics.median, max))
        parts.append(f"{name} of layers {spread} (min/median/max)")
    times = [
        f"{n.removeprefix(MARK)} {x:.3g}" for n, x in numbers.items() if n.startswith(MARK) and x
    ]
    parts += [f"seconds: {', '.join(times)}"] if times else []
    return "  ".join(parts)


def _cut_lines_from(file: Path, step: int) -> float:
    """Keep the lines of earlier steps; drop the rest and the half line that a kill may leave.

    Returns:
        The seconds of the steps that are dropped.
    """
    if not file.exists():
        return 0.0
    kept, lost = [], 0.0
    for line in file.read_text().splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and values["step"] < step:
            kept.append(line)
        else:
            lost += values.get(f"{MARK}step", 0.0) + values.get(f"{MARK}lost", 0.0)
    write_text(file, "".join(kept))
    return lost


def _required(package: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{setting} is switched on, but the package {package} is not installed: "
            f"`pip install {package}`, or switch {setting} off."
        ) from error
