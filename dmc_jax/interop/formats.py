"""Which format a checkpoint has, and what is in it."""

import os
from pathlib import Path

from dmc_jax.checkpoints.metadata import FORMAT
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.data.tokenizer import load_tokenizer
from dmc_jax.errors import UserError
from dmc_jax.interop.dmc_jax import open_dmc_jax
from dmc_jax.interop.huggingface import is_huggingface, open_huggingface
from dmc_jax.interop.megatron import is_megatron, open_megatron
from dmc_jax.interop.meta import is_meta, open_meta
from dmc_jax.interop.source import Source
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.dmc import DMC

_READERS = {
    FORMAT: (lambda path: latest(path) is not None, open_dmc_jax),
    "huggingface": (is_huggingface, open_huggingface),
    "meta": (is_meta, open_meta),
    "megatron": (is_megatron, open_megatron),
}
FORMATS = tuple(_READERS)


def open_source(path: str | os.PathLike, form: str = "auto") -> Source:
    """Open a checkpoint of any format.

    Args:
        path: its folder; for one of ours, a run directory, a stage of it or a step.
        form: one of `FORMATS`, or "auto" to recognise it.

    Raises:
        UserError: nothing there, of no known format, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if form == "auto":
        form = recognise(path)
    if form is None:
        hint = f"; name the folder, {path.parent}" if path.is_file() else ""
        raise UserError(
            f"{path} is no checkpoint of a known format: expected a run of ours, a Hugging Face "
            "folder (config.json and model.safetensors), one of Meta's (params.json and "
            f"consolidated.*.pth) or of Megatron's (mp_rank_*/model_optim_rng.pt){hint}"
        )
    return _READERS[form][1](path)


def recognise(path: str | os.PathLike) -> str | None:
    """Tell a checkpoint's format by the names of its files: one of `FORMATS`, or None."""
    path = Path(path)
    return next((form for form, (is_it, _) in _READERS.items() if is_it(path)), None)


def describe(source: Source) -> str:
    """What a checkpoint holds, a few lines for people."""
    c = source.config
    sizes = dict.fromkeys(f"{tensor.dtype}" for tensor in source.tensors.values())
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in source.tensors.values())
    kind = "dense"
    if isinstance(source.policy, DMC):
        s = source.policy.settings
        window = f"window {s.window}" if s.window else "unlimited window"
        kind = f"DMC, {window}, offset {s.offset:g}, merging above {source.policy.threshold:.4g}"
    alike = [name for name, preset in PRESETS.items() if preset == c]
    kv_heads = c.kv_heads if isinstance(c.kv_heads, int) else "/".join(map(str, c.kv_heads))
    lines = [
        f"{source.path}: {source.format}, Llama{f' (preset {alike[0]})' if alike else ''}, {kind}",
        f"  {parameters:,} parameters in {' and '.join(sizes)}"
        + (", embedding tied" if c.tied_embeddings else ""),
        f"  {c.layers} layers, width {c.width}, {c.heads} heads of {c.head_dim}, {kv_heads} KV "
        f"heads, MLP {c.mlp_width}, vocabulary {c.vocab_size}, {c.max_length} tokens",
        f"  tokenizer: {source.tokenizer[0].name if source.tokenizer else 'none'}",
    ]
    return "\n".join(lines + [f"  note: {note}" for note in source.notes])


def check_tokenizer(source: Source) -> None:
    """Refuse a tokenizer that has ids which the model does not know.

    Raises:
        UserError: it has, or it cannot be read.
    """
    size = load_tokenizer(source.tokenizer[0]).vocab_size
    if size > source.config.vocab_size:
        raise UserError(
            f"{source.tokenizer[0]} has {size} ids, the model {source.config.vocab_size}: it is "
            "another model's tokenizer"
        )
