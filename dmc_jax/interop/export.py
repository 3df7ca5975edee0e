"""Checkpoints for Hugging Face's transformers: dense models, with gates or without, and DMC models.

Any Llama of ours loads in `LlamaForCausalLM.from_pretrained`. A DMC model's weights do so too, but
the merging is not in them, nor are gates in those of the model that they serve: such an export says
so and carries `modeling_llama_dmc.py`, which computes it, for
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmc_jax.checkpoints.gates import FILE, StoredGates
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.interop.gates import gates_json
from dmc_jax.interop.huggingface import DMC_CONFIG, dmc_config_json
from dmc_jax.interop.huggingface_config import config_json
from dmc_jax.interop.output import copy_tokenizer
from dmc_jax.interop.parameters import cast
from dmc_jax.interop.safetensors_files import shard_names, split_into_shards, write_safetensors
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.interop.tokenizer_export import ids_of, write_tokenizer_files
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dmc import DMC

SHARD_BYTES = 5_000_000_000

# Copied, never imported: it needs torch and transformers.
_REMOTE_CODE = Path(__file__).with_name("modeling_llama_dmc.py")

_WARNING = (
    "Attention of any other implementation ignores the merging of this DMC model: it computes a "
    "dense model that this one is not. Load it with AutoModelForCausalLM.from_pretrained(PATH, "
    "trust_remote_code=True), or with dmc_jax."
)

_GATES_WARNING = (
    "Any other implementation runs the model without its gates: dense, with all tokens in its "
    "cache. Load it with AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True), or "
    "with dmc_jax."
)

_USE = """
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
logits = model(input_ids).logits
```
"""


def write_huggingface(
    source: Source,
    folder: Path,
    dtype: np.dtype | None,
    progress: Callable[[int], object],
    shard_bytes: int = SHARD_BYTES,
    dialect: str | None = None,
) -> None:
    """Write any checkpoint as a Hugging Face one, tensor by tensor.

    Args:
        source: what to write.
        folder: an existing, empty folder.
        dtype: of the file; None: as in the source.
        progress: called with the bytes of every tensor written.
        shard_bytes: of a weights file at most; larger models get several and an index.
        dialect: of the config, as in `config_json`.

    Raises:
        OSError: the disk is full.
        UserError: the source is damaged, or the dialect has no words for its sizes.
    """
    tensors = {name: _converted(name, tensor, dtype) for name, tensor in source.tensors.items()}
    written = str(tensors["model.embed_tokens.weight"].dtype)
    tokenizer = copy_tokenizer(source.tokenizer, folder)
    ids = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        length = source.config.max_length
        special = write_tokenizer_files(folder, tokenizer, source.special, length)
        if special is not None:
            bos = special.bos_id if special.bos_id >= 0 else None
            ids = {"bos_token_id": bos, "eos_token_id": ids_of(special)}
    gated = source.gates is not None
    config = config_json(source.config, written, source.policy, ids, gated=gated, dialect=dialect)
    if isinstance(source.policy, DMC):
        config["dmc"] = {"warning": _WARNING} | dmc_config_json(source.policy)
        _write_json(folder / DMC_CONFIG, dmc_config_json(source.policy))
    if gated:
        config["gates"] = {"warning": _GATES_WARNING} | gates_json(source.gates)
        shutil.copyfile(source.gates.path, folder / FILE)
    if "auto_map" in config:
        shutil.copyfile(_REMOTE_CODE, folder / _REMOTE_CODE.name)
    _write_json(folder / "config.json", config)
    (folder / "README.md").write_text(model_card(source))

    shards = split_into_shards(tensors, shard_bytes)
    names = shard_names(len(shards))
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, progress)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            },
        }
        _write_json(folder / "model.safetensors.index.json", index)


def model_card(source: Source) -> str:
    """README.md of an export."""
    c = source.config
    kv_heads = c.kv_heads if isinstance(c.kv_heads, int) else "/".join(map(str, c.kv_heads))
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"A Llama of {c.layers} layers, width {c.width}, {c.heads} query heads and {kv_heads} KV "
        f"heads of {c.head_dim}, written by dmc_jax.",
        "",
    ]
    if source.gates is not None:
        return "\n".join([*lines, *_about_gates(source.gates)])
    if not isinstance(source.policy, DMC):
        return "\n".join(lines)
    s = source.policy.settings
    return "\n".join(
        [
            *lines,
            "## A model with Dynamic Memory Compression",
            "",
            f"**{_WARNING}**",
            _USE,
            "Every KV head merges a token into its newest slot where the last channel of the key, "
            f"less {s.offset:g}, exceeds {source.policy.threshold:g}, within {_window(s)} "
            "(Nawrot et al. 2024, arXiv 2403.09636). The remote code computes whole sequences "
            "without a cache: it is for evaluation. "
            f"`{DMC_CONFIG}` holds the settings, with which dmc_jax reads this folder back as the "
            "same DMC model.",
            "",
        ]
    )


def _about_gates(gates: StoredGates) -> list[str]:
    policy = gates.policy
    table = [f"| {entry.ratio:.2f} | {entry.threshold:g} |" for entry in gates.table]
    title, does, more = "drop tokens from the cache", "drops a token", ""
    by = "Lancucki et al. 2025, arXiv 2506.05345"
    if isinstance(policy, DelayedDMC):
        title, does = "merge tokens in the cache", "merges a token into the slot of the one before"
        more, by = f", within {_window(policy.settings)}", "Nawrot et al. 2024, arXiv 2403.09636"
        if policy.margin is not None:
            more += f", and with next to no weight where by more than {policy.margin:g}"
    when = f"{policy.delay} tokens later" if policy.delay else "at once"
    return [
        f"## With gates that {title}",
        "",
        f"**{_GATES_WARNING}**",
        _USE,
        f"Every KV head reads from the input of its attention whether it {does}, {when}: where the "
        f"logit of its gate exceeds {policy.threshold:g}{more} ({by}). The remote code "
        "computes whole sequences without a cache: it is for evaluation. The weights are those of "
        f"the model that `{FILE}` was made for. Another threshold in `config.json` gives another "
        "number of tokens per slot; on held-out text",
        "",
        "| tokens per slot | threshold |",
        "|---|---|",
        *table,
        "",
    ]


def _window(settings: DMCSettings) -> str:
    return f"a window of {settings.window} tokens" if settings.window else "an unlimited window"


def _converted(name: str, tensor: Tensor, dtype: np.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor

    def read() -> np.ndarray:
        return cast(tensor.read(), dtype, name)

    return dataclasses.replace(tensor, dtype=dtype, read=read)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
