"""Talk with a model in a terminal: `python -m dmc_jax.chat --checkpoint=MODEL --gates=F --ratio=4`.

What was said stays in the cache, compressed, and is not read again. /bytes shows its size beside a
dense one, /reset begins anew, /quit or Ctrl-D leaves; Ctrl-C stops a reply. Exit codes: 0 left so,
2 bad input or flags, 1 a failure.
"""

import sys

from absl import flags, logging

from dmc_jax import commands
from dmc_jax.data.chat import load_chat_template
from dmc_jax.errors import UserError
from dmc_jax.inference import compiling
from dmc_jax.inference.engine_flags import EngineFlags
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.serving.conversation import Conversation
from dmc_jax.serving.terminal import HELP, converse

_ENGINE = EngineFlags()
_SYSTEM = flags.DEFINE_string("system", None, "What the system says before all else.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Of a reply, at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from that many likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likely tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")


def main() -> None:
    """Talk."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    params = SamplingParams(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    compiling.keep_programs()
    compiling.show_compiling()
    model = _ENGINE.find()
    engine = _ENGINE.engine(model, 1)
    tokenizer = _ENGINE.tokenizer(model)
    render = load_chat_template(tokenizer, answer_next=True)
    if render is None:
        raise UserError(
            f"{model.path} came without a chat template: expected chat_template.jinja, or "
            f"chat_template in tokenizer_config.json, in {tokenizer.parent}"
        )
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 - lets `input` edit lines

        print(HELP)
    converse(
        Conversation(engine, render, params, _SYSTEM.value),
        lambda: input("> " if at_terminal else ""),
        lambda text: print(text, end="", flush=True),
    )


if __name__ == "__main__":
    commands.run(main)
