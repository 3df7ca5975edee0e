"""Sizes of well-known models, with their source. Parameter counts are tested."""

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import Llama3Scaling


def _llama2(width: int, layers: int, heads: int, kv_heads: int, mlp_width: int) -> ModelConfig:
    """Touvron et al. 2023, arXiv 2307.09288, table 1; sizes from the published config.json."""
    return ModelConfig(
        vocab_size=32_000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        mlp_width=mlp_width,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=4096,
        tied_embeddings=False,
    )


PRESETS = {
    # The demo's model, about a million parameters: made for this project.
    "tiny": ModelConfig(
        vocab_size=1024,
        width=128,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=32,
        mlp_width=384,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=256,
        tied_embeddings=True,
    ),
    "7b": _llama2(width=4096, layers=32, heads=32, kv_heads=32, mlp_width=11_008),
    "13b": _llama2(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13_824),
    "70b": _llama2(width=8192, layers=80, heads=64, kv_heads=8, mlp_width=28_672),
    # SmolLM2 135M, Allal et al. 2025, arXiv 2502.02737; the published config.json.
    "smollm2_135m": ModelConfig(
        vocab_size=49_152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        max_length=8192,
        tied_embeddings=True,
    ),
    # Llama 3.1 8B, Dubey et al. 2024, arXiv 2407.21783, table 3 and the published config.json.
    "llama3_8b": ModelConfig(
        vocab_size=128_256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_width=14_336,
        rope_theta=500_000.0,
        norm_eps=1e-5,
        max_length=131_072,
        tied_embeddings=False,
        rope_scaling=Llama3Scaling(),
    ),
    # DeciLM 6B, published config.json (num_key_value_heads_per_layer). Its dynamic rotary scaling
    # starts beyond 4,096 tokens and is not implemented here.
    "deci_6b": ModelConfig(
        vocab_size=32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=(4, *(2,) * 9, *(1,) * 20, 4, 4),
        head_dim=128,
        mlp_width=11_008,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=4096,
        tied_embeddings=False,
    ),
}
