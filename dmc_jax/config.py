"""Everything that a run needs, as frozen dataclasses; the one place that validates and rejects.

Field comments are the reference documentation of `--config.FIELD`; `train --help` prints them. A
file in `configs/` builds a `RunConfig`; `to_config_dict` turns it into what the command line can
override, `fields.from_dict` turns that back, checked. `load_config` runs such a file, by its path
or name.
"""

import dataclasses
import importlib.util
import inspect
import json
import os
import typing
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.guard import GuardSettings
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.errors import UserError
from dmc_jax.fields import from_dict

# The named configs: in an installed package they lie in it, in a checkout beside it.
_PLACES = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")

# In the order in which a model passes them.
STAGES = ("pretrain", "zero_out", "retrofit", "finetune", "closed_form", "distill")
MERGING = ("retrofit", "finetune")  # those whose model merges
GATED = ("closed_form", "distill")  # those that make gates for a model, which stays as it is


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _require_numbers(config: Any, prefix: str, *names: str) -> None:
    """Refuse what is negative, infinite or not a number."""
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < float("inf"), f"{prefix}.{name} must be 0 or more, got {value}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama; named sets are in `dmc_jax.model.presets`."""

    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # N, query heads
    kv_heads: int | tuple[int, ...]  # K; a tuple gives every layer its own
    head_dim: int  # H
    mlp_width: int  # F
    rope_theta: float
    norm_eps: float
    max_length: int  # tokens the model was trained on
    tied_embeddings: bool
    rope_scaling: Llama3Scaling | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "width", "layers", "heads", "head_dim", "mlp_width", "max_length")
        for name in sizes:
            value = getattr(self, name)
            _require(value >= 1, f"model.{name} must be at least 1, got {value}")
        _require_numbers(self, "model", "rope_theta", "norm_eps")
        _require(
            self.head_dim % 2 == 0,
            f"model.head_dim must be even (rotary embedding pairs channels), got {self.head_dim}",
        )
        _require(
            len(self.kv_heads_by_layer) == self.layers,
            f"model.kv_heads names {len(self.kv_heads_by_layer)} layers, the model has "
            f"{self.layers}; give one number per layer, or one for all",
        )
        for layer, kv_heads in enumerate(self.kv_heads_by_layer):
            _require(
                kv_heads >= 1 and self.heads % kv_heads == 0,
                f"model.kv_heads: {self.heads} query heads cannot share {kv_heads} KV heads in "
                f"layer {layer}; choose a divisor of {self.heads}",
            )

    @property
    def kv_heads_by_layer(self) -> tuple[int, ...]:
        """K of every layer."""
        if isinstance(self.kv_heads, int):
            return (self.kv_heads,) * self.layers
        return tuple(self.kv_heads)

    @property
    def kv_rows(self) -> int:
        """R: all (layer, KV head) pairs; each has a cache length of its own."""
        return sum(self.kv_heads_by_layer)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    path: str = "data/stdlib"  # folder(s) made by prepare_data, comma-separated
    weights: str = ""  # mixing weights of the folders, comma-separated; empty: by their tokens
    length: int = 4096  # tokens per window
    batch: int = 1024  # windows per step, over all devices

    def __post_init__(self):
        _require(self.length >= 2, f"data.length must be at least 2 tokens, got {self.length}")
        _require(self.batch >= 1, f"data.batch must be at least 1, got {self.batch}")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run."""

    steps: int
    learning_rate: float  # peak
    final_learning_rate: float = 0.0  # at the end of a cosine or linear stage
    shape: str = "constant"  # constant | cosine | linear
    warmup: int = 0  # steps

    def __post_init__(self):
        _require(self.steps >= 1, f"stage.steps must be at least 1, got {self.steps}")
        _require_numbers(self, "stage", "learning_rate", "final_learning_rate")
        _require(self.warmup >= 0, f"stage.warmup must not be negative, got {self.warmup}")
        _require(
            self.shape in ("constant", "cosine", "linear"),
            f"stage.shape is {self.shape!r}; expected constant, cosine or linear",
        )


_SOLVED = StageConfig(steps=1, learning_rate=0.0)


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """How hard and by what means the model is made to compress."""

    ratio: float = 4.0  # wanted tokens per slot
    weight: float = 1.0  # of the compression loss beside the language-modelling loss
    per_layer: bool = False  # a hinge per layer instead of one over the whole model (the paper's)
    decision_multiplier: float = 1.0  # on the update of the decision rows of W_q and W_k
    distillation: float = 0.0  # weight of KL(teacher || model) in nats a token
    teacher: str = ""  # checkpoint of the teacher; empty: the model that the run starts from
    calibration_windows: int = 0  # training windows that set the inference threshold; 0: off

    def __post_init__(self):
        _require(
            1.0 <= self.ratio < float("inf"),
            f"compression.ratio must be at least 1 (tokens per slot), got {self.ratio}",
        )
        names = "weight", "distillation", "decision_multiplier", "calibration_windows"
        _require_numbers(self, "compression", *names)


@dataclasses.dataclass(frozen=True)
class GatesConfig:
    """Gates that read decisions beside a model."""

    method: str = "dms"  # dms: tokens are dropped; dmc: they are merged, as `dmc` says
    delay: int = 16  # tokens for which every token stays; 0, of dmc alone: it merges at once
    margin: float | None = None  # of dmc: logit above the threshold that drops a token after all
    importance: bool = False  # of dmc: whether gates weigh tokens in the average of their slot
    ratios: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0)  # of one file; a step draws one
    windows: int = 24  # of training text that the closed form reads
    vocabulary: int = 4096  # ids that predictions are compared on, beside those of the text
    temperature: float = 0.1  # of relaxed decisions
    bias_multiplier: float = 10.0  # on the update of the biases and of gamma
    distillation: float = 1.0  # weight of the divergence from the dense model
    next_token: float = 0.0  # weight of the loss on the next token
    model: str = "frozen"  # frozen | lora | all: what of the model is trained beside the gates
    rank: int = 8  # of the factors of lora, on the projections of attention
    model_multiplier: float = 0.3  # on the update of what is trained of the model

    def __post_init__(self):
        for name, known in (("method", ("dms", "dmc")), ("model", ("frozen", "lora", "all"))):
            value = getattr(self, name)
            _require(value in known, f"gates.{name} is {value!r}; expected {' or '.join(known)}")
        _require(
            self.margin is None or (self.method == "dmc" and self.margin >= 0),
            "gates.margin must be 0 or more, for gates.method=dmc alone, which merges where it "
            f"does not drop; got {self.margin} for {self.method}",
        )
        _require(
            self.delay >= (self.method == "dms"),
            f"gates.delay must be at least 1, or 0 for gates.method=dmc; got {self.delay}",
        )
        for name in ("windows", "vocabulary", "rank"):
            value = getattr(self, name)
            _require(value >= 1, f"gates.{name} must be at least 1, got {value}")
        _require(self.temperature > 0, f"gates.temperature must be > 0, got {self.temperature}")
        weights = "distillation", "next_token"
        _require_numbers(
            self, "gates", "temperature", "bias_multiplier", "model_multiplier", *weights
        )
        _require(self.distillation + self.next_token > 0, "gates: both weights of the loss are 0")
        _require(
            len(self.ratios) > 0 and list(self.ratios) == sorted({*self.ratios, 1.0})[1:],
            f"gates.ratios must be tokens per slot above 1 that rise, got {self.ratios}",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # global norm of the gradient; 0: off

    def __post_init__(self):
        _require_numbers(self, "optimizer", "eps", "weight_decay", "clip")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} must be from 0 to below 1, got {value}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices, -1 takes what is left."""

    data: int = -1  # batch
    fsdp: int = 1  # batch and parameters
    tensor: int = 1  # heads and MLP width


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run: `python -m dmc_jax.train --config=FILE`."""

    name: str
    model: ModelConfig
    dmc: DMCSettings = dataclasses.field(default_factory=DMCSettings)
    compression: CompressionConfig = CompressionConfig()
    zero_out: StageConfig | None = None
    retrofit: StageConfig | None = None
    finetune: StageConfig | None = None
    pretrain: StageConfig | None = None  # where a run starts from nothing
    distill: StageConfig | None = None  # of gates, after their closed form
    gates: GatesConfig = GatesConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardSettings = dataclasses.field(default_factory=GuardSettings)
    mesh: MeshConfig = MeshConfig()
    stages: str = "zero_out,retrofit,finetune"  # comma-separated, in order
    init_from: str = ""  # checkpoint to start from; empty: fresh weights or this run's own
    output: str = "runs"  # the run is written to OUTPUT/NAME
    seed: int = 0  # 0 or more
    initializer_range: float = 0.02  # deviation of fresh weights; small models learn by width**-0.5
    draws: int = 3  # how the seed is drawn from; a run that began with fewer keeps those
    compute_dtype: str = "bfloat16"  # float32 | bfloat16; parameters are always float32
    products: str = ""  # dtype of what products and attention multiply; empty: compute_dtype
    remat: str = "full"  # none | full | dots: what the backward pass recomputes
    attention: str = "auto"  # auto | xla | triton: what computes it; auto: the fastest here
    attention_block: int = 256  # tokens per block of xla's
    accumulation: int = 1  # gradient accumulation: parts of a batch; the result is that of one
    log_every: int = 10  # steps
    eval_every: int = 0  # steps between validation losses; 0: at the end of each stage only
    eval_windows: int = 64  # validation windows
    save_every: int = 500  # steps
    save_minutes: float = 20.0  # at the next log line, so many after the last save; 0: never
    keep: int = 2  # checkpoints kept per stage
    keep_total: int = 0  # in all stages, whose newest always stay; the oldest go first; 0: no limit
    keep_gb: float = 0.0  # 10^9 bytes of checkpoints in all stages, as keep_total; 0: no limit
    tensorboard: bool = False
    wandb: bool = False
    profile: str = ""  # STEP:COUNT: a trace of so many steps, from that log line's, in RUN/profile
    dry_run: bool = False  # check everything, take one step, say what it needs, leave nothing

    def __post_init__(self):
        object.__setattr__(self, "output", os.path.expanduser(self.output))
        names = self.stage_names
        for stage in names:
            _require(
                stage in STAGES, f"stages: {stage!r} is not one of {', '.join(STAGES)} ({names})"
            )
        _require(
            len(names) > 0 and list(names) == sorted(set(names), key=STAGES.index),
            f"stages must be some of {','.join(STAGES)}, each once and in this order; got "
            f"{self.stages!r}",
        )
        gated = [stage for stage in names if stage in GATED]
        _require(
            len(gated) in (0, len(names)),
            f"stages: {', '.join(gated)} leaves the model as it is, and has no other stage beside "
            f"it; got {self.stages!r}",
        )
        for stage in names:
            _require(
                self.stage(stage) is not None,
                f"stages names {stage}, and the config has no settings of that stage: leave it out "
                f"of --config.stages, or set --config.{stage}=\"{{'steps': 100, 'learning_rate': "
                '3e-4}"',
            )
        for name, known in (
            ("compute_dtype", ("float32", "bfloat16")),
            ("products", ("float32", "bfloat16", "")),
            ("remat", ("none", "full", "dots")),
            ("attention", ("auto", "xla", "triton")),
        ):
            value, told = getattr(self, name), ", ".join(each or "nothing" for each in known)
            _require(value in known, f"{name} is {value!r}; expected one of {told}")
        _require(self.draws in (1, 2, 3), f"draws is {self.draws}; expected 3, or 1, 2 of old runs")
        _require(self.initializer_range > 0, "initializer_range must be above 0")
        numbers = "seed", "initializer_range", "eval_every", "save_minutes", "keep_total", "keep_gb"
        _require_numbers(self, "config", *numbers)
        for name in ("accumulation", "log_every", "save_every", "keep", "attention_block"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.data.batch % self.accumulation == 0,
            f"data.batch ({self.data.batch}) must be a multiple of accumulation "
            f"({self.accumulation})",
        )

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages to run, in order."""
        return tuple(s.strip() for s in self.stages.split(",") if s.strip())

    def stage(self, name: str) -> StageConfig | None:
        """Settings of one stage, if the config has them."""
        return _SOLVED if name == "closed_form" else getattr(self, name)

    @classmethod
    def named(cls, name: str) -> "RunConfig":
        """Build the run that `--config=NAME` names; see `load_config`."""
        return from_dict(cls, load_config(name).to_dict())


def to_dict(config: Any) -> dict:
    """A config dataclass as plain JSON-able dictionaries."""
    return dataclasses.asdict(config)


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """What `get_config()` of a config file returns: every field can be overridden by a flag."""

    def convert(value: Any, annotation: Any) -> Any:
        if dataclasses.is_dataclass(value):
            hints = typing.get_type_hints(type(value))
            fields = {n: convert(getattr(value, n), hint) for n, hint in hints.items()}
            return config_dict.ConfigDict(fields)
        if value is None:  # to be given as a number, or as a dictionary of fields
            option = typing.get_args(annotation)[0]
            return config_dict.placeholder(
                config_dict.ConfigDict if dataclasses.is_dataclass(option) else option
            )
        return value

    return convert(config, type(config))


def load_config(name: str) -> config_dict.ConfigDict:
    """Run a config file and return what `--config=NAME` stands for.

    Args:
        name: the path of a Python file, which ends in `.py`, or the name of one in `configs/`,
            found from any folder: `configs/7b_8x.py` or `7b_8x`. What follows a colon is given to
            the file's `get_config`: `paper:7b,ratio=8`. Or the path of a run's `config.json`.

    Returns:
        What the file's `get_config()` returns, of `to_config_dict`'s form.

    Raises:
        UserError: there is no such file, it has no `get_config`, that refuses its arguments, or it
            is no run's.
    """
    if name.endswith(".json"):
        return to_config_dict(read_config(Path(name).expanduser()))
    file, *arguments = name.split(":", 1)
    path = Path(file).expanduser() if file.endswith(".py") else named_configs().get(file)
    if path is None or not path.is_file():
        raise UserError(
            f"config: there is no {'file' if path else 'config named'} {file!r}; name a Python "
            f"file, or one of {', '.join(named_configs())}"
        )
    spec = importlib.util.spec_from_file_location(f"dmc_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    _require(callable(get_config), f"config: {path} has no function get_config()")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        takes = "needs arguments, NAME:ARGUMENTS" if not arguments else "takes no arguments"
        raise UserError(f"config: {path} {takes}; got {name!r}") from None
    return get_config(*arguments)


def read_config(file: Path) -> RunConfig:
    """Read the `config.json` of a run.

    Args:
        file: the file.

    Raises:
        UserError: it cannot be read, or is not of this form.
    """
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"config: cannot read {file}: {error}") from None
    _require(isinstance(values, dict), f"config: {file} is no run's config.json")
    return from_dict(RunConfig, values)


def named_configs() -> dict[str, Path]:
    """Find the files of `configs/`, by name; `--config` takes them from any folder."""
    for place in _PLACES:
        if place.is_dir():
            return {file.stem: file for file in sorted(place.glob("*.py"))}
    return {}


jax.tree_util.register_static(ModelConfig)
