"""Record tiny checkpoints with their logits from transformers, for tests that run without it.

    python tests/interop/record_huggingface.py 4     # with transformers 4 and torch installed
    python tests/interop/record_huggingface.py 5     # with transformers 5 and torch installed

Each version writes the checkpoints in its own spelling of config.json. tests/data/huggingface then
holds, for each: config.json, the weights as transformers saved them, and logits.npz with `tokens`
[T] and `logits` [T, V], computed in float32.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

DATA = Path(__file__).parents[1] / "data" / "huggingface"
COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama2() -> LlamaForCausalLM:
    """Every query head has a KV head of its own."""
    return LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=4, rms_norm_eps=1e-5))


def llama3() -> LlamaForCausalLM:
    """Grouped heads of their own width, scaled rotary frequencies, embedding used twice."""
    return LlamaForCausalLM(
        LlamaConfig(
            **COMMON,
            num_key_value_heads=2,
            head_dim=8,
            rope_theta=500_000.0,
            rope_scaling=SCALING,
            tie_word_embeddings=True,
        )
    )


def mistral() -> MistralForCausalLM:
    """One KV head."""
    return MistralForCausalLM(MistralConfig(**COMMON, num_key_value_heads=1, sliding_window=None))


def record(name: str, model: torch.nn.Module, dtype: torch.dtype, **options: object) -> None:
    """Save a model as transformers does, and its logits."""
    folder = DATA / name
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:  # initialised to 1, which would hide that they are read
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model = model.to(dtype)
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, COMMON["vocab_size"], (30,))
    # Loaded anew: `to` has narrowed the rotary frequencies of the model that was saved, too.
    loaded = type(model).from_pretrained(folder).float()
    with torch.no_grad():
        logits = loaded(tokens[None]).logits[0]
    np.savez_compressed(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())


def main(version: str) -> None:
    """Record what this version of transformers is to record."""
    if transformers.__version__.split(".")[0] != version:
        raise SystemExit(f"expected transformers {version}, found {transformers.__version__}")
    torch.manual_seed(int(version))
    if version == "4":
        record("llama2", llama2(), torch.float32)
        record("mistral_sharded", mistral(), torch.bfloat16, max_shard_size="3KB")
        record("llama2_bin", llama2(), torch.bfloat16, safe_serialization=False)
        record("llama3_old_config", llama3(), torch.bfloat16)
    else:
        record("llama3", llama3(), torch.bfloat16)


if __name__ == "__main__":
    main(sys.argv[1])
