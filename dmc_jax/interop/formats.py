"""Which format a checkpoint has, and what is in it."""

import dataclasses
import os
from pathlib import Path

from dmc_jax.checkpoints.metadata import FORMAT
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import TOKENIZER_NAMES, load_tokenizer
from dmc_jax.data.tokenizer_files import COMPANIONS
from dmc_jax.data.tokenizer_formats import LibraryMissing
from dmc_jax.errors import UserError
from dmc_jax.interop.dmc_jax import open_dmc_jax
from dmc_jax.interop.gguf import is_gguf, open_gguf
from dmc_jax.interop.huggingface import is_huggingface, open_huggingface, tokenizer_files
from dmc_jax.interop.megatron import is_megatron, open_megatron
from dmc_jax.interop.meta import is_meta, open_meta
from dmc_jax.interop.source import Source
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dmc import DMC

_READERS = {
    FORMAT: (lambda path: latest(path) is not None, open_dmc_jax),
    "huggingface": (is_huggingface, open_huggingface),
    "meta": (is_meta, open_meta),
    "megatron": (is_megatron, open_megatron),
    "gguf": (is_gguf, open_gguf),
}
FORMATS = tuple(_READERS)


def open_source(path: str | os.PathLike, form: str = "auto") -> Source:
    """Open a checkpoint of any format.

    Args:
        path: its folder; for one of ours, a run directory, a stage of it or a step; the file of a
            GGUF model.
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
            "consolidated.*.pth) or of Megatron's (mp_rank_*/model_optim_rng.pt), or a GGUF "
            f"file{hint}"
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
        above = source.policy.threshold
        kind = f"DMC, {_window(s)}, offset {s.offset:g}, merging above {above:.4g}"
    elif source.gates is not None:
        gated, does = source.gates.policy, "dropping"
        if isinstance(gated, DelayedDMC):
            does = f"{_window(gated.settings)}, merging"
        kind = f"with gates, {does} above {gated.threshold:.4g} after {gated.delay} tokens"
    alike = [name for name, preset in PRESETS.items() if preset == c]
    kv_heads = c.kv_heads if isinstance(c.kv_heads, int) else "/".join(map(str, c.kv_heads))
    lines = [
        f"{source.path}: {source.format}, Llama{f' (preset {alike[0]})' if alike else ''}, {kind}",
        f"  {parameters:,} parameters in {' and '.join(sizes)}"
        + (", embedding tied" if c.tied_embeddings else ""),
        f"  {c.layers} layers, width {c.width}, {c.heads} heads of {c.head_dim}, {kv_heads} KV "
        f"heads, MLP {c.mlp_width}, vocabulary {c.vocab_size}, {c.max_length} tokens",
        f"  rope theta {c.rope_theta:g}{', scaled' if c.rope_scaling else ''}, eps {c.norm_eps:g}",
        f"  tokenizer: {source.tokenizer[0].name if source.tokenizer else 'none'}{_marks(source)}",
    ]
    return "\n".join(lines + [f"  note: {note}" for note in source.notes])


def with_tokenizer(
    source: Source, tokenizer: str | os.PathLike | None = None, add_bos: bool | None = None
) -> Source:
    """Read a checkpoint's tokenizer, and what its files say of how texts are marked.

    Args:
        source: the checkpoint.
        tokenizer: another file to take for it.
        add_bos: whether texts begin with BOS, whatever the files say.

    Returns:
        The same with `special`, and notes where the tokenizer and the model have different ids.

    Raises:
        UserError: the tokenizer cannot be read, or has ids that the model does not know.
    """
    if tokenizer is not None:
        path = Path(tokenizer)
        beside = [file for file in tokenizer_files(path.parent) if file.name in COMPANIONS]
        source = dataclasses.replace(source, tokenizer=(path, *beside), special=None)
    rows, notes = source.config.vocab_size, list(source.notes)
    if not source.tokenizer:
        names = " or ".join(TOKENIZER_NAMES)
        notes.append(f"{source.path} has no tokenizer ({names}): name one with --tokenizer=FILE")
        return dataclasses.replace(source, notes=tuple(notes))
    file = source.tokenizer[0]
    try:
        found = load_tokenizer(file, source.special, add_bos)
    except LibraryMissing as missing:
        notes.append(f"{missing}; until then it goes along unread")
        return dataclasses.replace(source, notes=tuple(notes))
    if found.own_size > rows:
        raise UserError(
            f"{file} has {found.own_size} ids, the model {rows}: it is another model's tokenizer"
        )
    beyond = {token: added.content for token, added in found.added.items() if token >= rows}
    beyond |= {token: "EOS" for token in found.eos_ids if token >= rows}
    for token, content in sorted(beyond.items()):
        notes.append(f"the files of {file} name {content!r}, id {token}: the model has {rows} ids")
    if found.vocab_size < rows:
        notes.append(
            f"the model has {rows} ids, its tokenizer {found.vocab_size}: the others stand for "
            "nothing in text"
        )
    return dataclasses.replace(source, special=found.special, notes=tuple(notes))


def _window(settings: DMCSettings) -> str:
    return f"window {settings.window}" if settings.window else "unlimited window"


def _marks(source: Source) -> str:
    """How texts are marked, in words."""
    special = source.special
    if special is None:
        return ""
    try:
        name_of = load_tokenizer(source.tokenizer[0], special).name_of
    except UserError:
        return ""
    ends = ", ".join(f"{name_of(token) or 'unnamed'} ({token})" for token in special.eos_ids)
    bos = f"{name_of(special.bos_id)} ({special.bos_id})" if special.bos_id >= 0 else "none"
    added = "before every text" if special.add_bos else "not added"
    return f"; BOS {bos}, {added}; a text ends at {ends}"
