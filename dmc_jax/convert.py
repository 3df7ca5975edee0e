"""Other people's checkpoints: `python -m dmc_jax.convert --input=PATH --output=DIR`.

Reads checkpoints of Hugging Face, Meta and Megatron(-DMC), GGUF files and our own, which it
recognises, and writes one of ours (`--to=dmc_jax`) or a Hugging Face one, which takes gates along
(`--gates=FILE`). `--kv_heads=N` averages KV heads into fewer on the way, for a model to be trained
on. DIR appears only when it is complete.
`--verify --input=A --against=B --prompt=TEXT` compares the logits of two checkpoints instead.

Exit codes: 0 done; 1 a failure such as a full disk, or logits further apart than `--tolerance`;
2 bad input or flags; 130 interrupted.
"""

import functools
from pathlib import Path

import numpy as np
from absl import flags, logging

from dmc_jax import commands
from dmc_jax.checkpoints.metadata import FORMAT
from dmc_jax.checkpoints.states import quiet_orbax
from dmc_jax.data.tokenizer import encode_prompt, load_tokenizer
from dmc_jax.errors import UserError
from dmc_jax.interop.compare import Comparison, compare, logits_of
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import FORMATS, describe, open_source, with_tokenizer
from dmc_jax.interop.gates import with_gates
from dmc_jax.interop.huggingface_config import DIALECTS
from dmc_jax.interop.kv_heads import with_kv_heads
from dmc_jax.interop.output import new_folder, progress_of
from dmc_jax.interop.source import Source

_INPUT = flags.DEFINE(
    commands.PATH, "input", None, "Folder of the checkpoint to read, or a GGUF file.", required=True
)
_OUTPUT = flags.DEFINE(commands.PATH, "output", None, "Folder to write; must not exist.")
_FROM = flags.DEFINE_enum("from", "auto", ["auto", *FORMATS], "Format of the input.")
_TO = flags.DEFINE_enum(
    "to",
    None,
    [FORMAT, "huggingface"],
    f"Format to write; default: {FORMAT}, which is ours, and huggingface for a checkpoint of ours.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of the weights written; default: as in the input. Training takes float32 from any of them.",
)
_TOKENIZER = flags.DEFINE(
    commands.PATH, "tokenizer", None, "Tokenizer file to go along, in place of the input's own."
)
_ADD_BOS = flags.DEFINE_boolean(
    "add_bos", None, "Whether texts begin with BOS; default: as the tokenizer's files say."
)
_GATES = flags.DEFINE(
    commands.PATH,
    "gates",
    None,
    "File of gates, or the name of some that come along, for a Hugging Face export to carry.",
)
_RATIO = flags.DEFINE_float(
    "ratio", None, "Tokens per slot that the gates shall come to; default: as they are stored."
)
_KV_HEADS = flags.DEFINE_list(
    "kv_heads",
    None,
    "KV heads to average those of each layer into, a divisor of the query heads: one number for "
    "all layers, or one for each, 4,2,2,1; default: they stay.",
)
_DIALECT = flags.DEFINE_enum(
    "dialect",
    None,
    list(DIALECTS),
    "How a Hugging Face config says KV heads that differ by layer: as DeciLM's does "
    "(num_key_value_heads_per_layer), which is the default, or Llama-Nemotron's (block_configs).",
)
_VERIFY = flags.DEFINE_boolean("verify", False, "Compare --input with --against; write nothing.")
_AGAINST = flags.DEFINE(commands.PATH, "against", None, "With --verify: the other checkpoint.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "With --verify: text to read; may be repeated.")
_TOLERANCE = flags.DEFINE_float(
    "tolerance",
    1e-4,
    "With --verify: largest difference of two logits, in float32. The same weights stay below "
    "1e-5; weights rounded to bfloat16 do not.",
)


def main() -> int:
    """Convert or verify."""
    logging.set_verbosity(logging.WARNING)  # saving a checkpoint is talkative
    quiet_orbax()
    return _verify() if _VERIFY.value else _convert()


# ---- converting -------------------------------------------------------------------------------


def _convert() -> int:
    if not _OUTPUT.value:
        raise UserError("--output is missing: name a folder to write, or give --verify")
    _refuse("only with --verify", against=_AGAINST.value, prompt=_PROMPT.value)
    source = _open(_INPUT.value, _FROM.value)
    if _KV_HEADS.value is not None:
        source = with_kv_heads(source, _kv_heads(_KV_HEADS.value))
    source = with_gates(source, _GATES.value, _RATIO.value)
    print(describe(source), flush=True)
    hub = source.format == FORMAT or _GATES.value
    to = _TO.value or ("huggingface" if hub else FORMAT)
    if to == FORMAT and source.gates is not None:
        apart = (
            f"{FORMAT} has no place for gates; where the model runs, --gates={source.gates.path}"
        )
        if _GATES.value:
            raise UserError(f"--gates: {apart}")
        commands.show_notes([apart])
    if to == FORMAT and _DIALECT.value:
        raise UserError("--dialect is of a Hugging Face config: give --to=huggingface")
    dtype = np.dtype(_DTYPE.value) if _DTYPE.value else None
    output = Path(_OUTPUT.value)
    # What becomes ours is counted as it comes in, a Hugging Face file as it goes out.
    read = sum(tensor.nbytes for tensor in source.tensors.values())
    written = sum(
        tensor.nbytes // tensor.dtype.itemsize * (dtype or tensor.dtype).itemsize
        for tensor in source.tensors.values()
    )
    write, counted = write_dmc_jax, read
    if to != FORMAT:
        write = functools.partial(write_huggingface, dialect=_DIALECT.value)
        counted = written
    with (
        new_folder(output, written) as folder,
        progress_of(f"writing {output}", counted) as progress,
    ):
        write(source, folder, dtype, progress)
    print(f"wrote {output} ({to}, {_DTYPE.value or 'dtypes of the input'})")
    return 0


def _open(path: str, form: str) -> Source:
    """Open a checkpoint, with the tokenizer that the flag names if any."""
    return with_tokenizer(open_source(path, form), _TOKENIZER.value, _ADD_BOS.value)


def _kv_heads(given: list[str]) -> int | tuple[int, ...]:
    try:
        counts = tuple(map(int, given))
    except ValueError:
        raise UserError(
            f"--kv_heads={','.join(given)}: expected one whole number for all layers, or one for "
            "each, such as 4,2,2,1"
        ) from None
    return counts[0] if len(counts) == 1 else counts


def _refuse(why: str, **given: object) -> None:
    for name, value in given.items():
        if value:
            raise UserError(f"--{name} is {why}")


# ---- verifying --------------------------------------------------------------------------------


def _verify() -> int:
    if not _AGAINST.value or not _PROMPT.value:
        raise UserError("--verify needs --against=PATH and --prompt=TEXT")
    _refuse("not for --verify", output=_OUTPUT.value, to=_TO.value, dtype=_DTYPE.value)
    _refuse("not for --verify", gates=_GATES.value, ratio=_RATIO.value)
    _refuse("not for --verify", kv_heads=_KV_HEADS.value, dialect=_DIALECT.value)
    ours, other = _open(_INPUT.value, _FROM.value), open_source(_AGAINST.value)
    for source in (ours, other):
        print(describe(source), flush=True)
    if ours.config.vocab_size != other.config.vocab_size:
        raise UserError(
            f"{ours.path} has {ours.config.vocab_size} ids and {other.path} "
            f"{other.config.vocab_size}: their logits cannot be compared"
        )
    files = ours.tokenizer or other.tokenizer
    if not files:
        raise UserError("neither checkpoint has a tokenizer: name one with --tokenizer=FILE")
    tokenizer = load_tokenizer(files[0], ours.special if ours.tokenizer else other.special)
    prompts = [encode_prompt(tokenizer, text) for text in _PROMPT.value]
    found = compare(logits_of(ours, prompts), logits_of(other, prompts))
    for text, comparison in zip(_PROMPT.value, found, strict=True):
        print(_as_text(text, comparison))
    largest = float(np.max([comparison.largest for comparison in found]))
    same = largest <= _TOLERANCE.value  # not so where a logit is NaN
    print(
        f"\n{'same' if same else 'DIFFERENT'}: largest difference {largest:.3g}, tolerance "
        f"{_TOLERANCE.value:g}"
    )
    return 0 if same else 1


def _as_text(text: str, found: Comparison) -> str:
    divergence = " ".join(f"{value:.2g}" for value in found.divergence)
    return (
        f"\n{text[:60]!r}: {len(found.divergence)} positions\n"
        f"  logits apart      max {found.largest:.3g}, mean {found.mean:.3g}\n"
        f"  same top token    {100 * found.agreement:.1f} %\n"
        f"  KL by position    {divergence} nats"
    )


if __name__ == "__main__":
    commands.run(main)
