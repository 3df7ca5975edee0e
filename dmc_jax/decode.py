"""Let a model write: `python -m dmc_jax.decode --checkpoint=DIR --prompt="def main("`.

Prints the prompt and what follows as it comes, then what it took. Exit codes: 0 done, 2 bad input
or flags, 1 a failure.
"""

import itertools

from absl import flags, logging

from dmc_jax.data.tokenizer import encode_prompt, stream_decode
from dmc_jax.errors import run_door
from dmc_jax.inference.generate import stream
from dmc_jax.interop.native import load_model, load_own_tokenizer

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's directory, a stage of it, or a step.", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; may be empty.", required=True)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to write at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from that many likely tokens; 0: from all.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "SentencePiece model, if the training data is no longer where it was."
)


def main() -> None:
    """Write what the flags ask for."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    model = load_model(_CHECKPOINT.value)
    tokenizer = load_own_tokenizer(model, _TOKENIZER.value)
    prompt = encode_prompt(tokenizer, _PROMPT.value)
    new_tokens = stream(
        model.params,
        model.config,
        prompt,
        settings=model.settings,
        threshold=model.threshold,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        seed=_SEED.value,
        eos_id=tokenizer.eos_id,
        dtype=model.metadata["run"]["compute_dtype"],
    )
    result = None

    def keep_result():
        nonlocal result
        result = yield from new_tokens

    for text in stream_decode(tokenizer, itertools.chain(prompt, keep_result())):
        print(text, end="", flush=True)
    print(
        f"\n\n{len(prompt)} prompt tokens, {len(result.tokens)} new, "
        f"{result.tokens_per_second:.1f} tokens/s; {result.ratio:.2f} tokens per slot: "
        f"{result.cache_bytes:,} bytes of cache in use, dense {result.dense_cache_bytes:,}"
    )


if __name__ == "__main__":
    run_door(main)
