"""Serve a model to clients of OpenAI's API: `python -m dmc_jax.serve --port=8000`.

/v1/completions and /v1/chat/completions, streamed or whole, /v1/models, /health and /metrics. Many
clients share one cache, as many at a time as `--kv_bytes` holds; others wait. Nobody but this
machine is served unless --host says so. SIGTERM or Ctrl-C: no more requests are taken, and those
that are there have --drain_seconds to finish. Exit codes: 0 ended so, 2 bad input or flags, 1 a
failure.
"""

import logging as log
import os
from pathlib import Path

from absl import flags, logging

from dmc_jax import commands
from dmc_jax.data.chat import load_chat_template
from dmc_jax.errors import UserError
from dmc_jax.inference import compiling
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.engine_flags import EngineFlags
from dmc_jax.inference.prompts import parse_bytes
from dmc_jax.inference.sampling import SamplingParams

_KEY = "DMC_API_KEY"  # in the environment
_MOST_CHOICES = 128  # of a request, as OpenAI has it
_HERE = ("127.0.0.1", "localhost", "::1")

_ENGINE = EngineFlags()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all there are.")
_PORT = flags.DEFINE_integer("port", 8000, "To listen on; 0: any that is free.", 0, 65535)
_MODEL_NAME = flags.DEFINE_string("model_name", None, "For clients; default: the checkpoint's.")
_KEY_FILE = flags.DEFINE(
    commands.PATH,
    "api_key_file",
    None,
    f"File with the bearer key that clients must have; default: {_KEY} in the environment, or none "
    "is needed.",
)
_MAX_SEQUENCES = flags.DEFINE_integer("max_sequences", 16, "That run at a time, at most.", 1)
_PREFIX_CACHE = flags.DEFINE_bool(
    "prefix_cache",
    None,
    "Whether prompts go on from what was read of others that begin alike; default: where the "
    "policy's caches branch.",
)
_QUEUE = flags.DEFINE_integer("queue", 128, "Sequences that may wait beside them.", 0)
_MAX_PROMPT = flags.DEFINE_integer(
    "max_prompt_tokens", None, "Of a request; default: what the model has room for.", 1
)
_MAX_NEW = flags.DEFINE_integer(
    "max_new_tokens", None, "Of each of its texts; default: what the model has room for.", 1
)
_MAX_BODY = flags.DEFINE_string("max_body", "2MiB", "Of a request.")
_RECEIVE_SECONDS = flags.DEFINE_float(
    "receive_seconds", 30.0, "That the head of a request may take to arrive, and its body.", 0.1
)
_SEND_SECONDS = flags.DEFINE_float(
    "send_seconds", 30.0, "That a client may leave its stream unread.", 0.1
)
_DRAIN_SECONDS = flags.DEFINE_float(
    "drain_seconds", 30.0, "That requests have to finish at the end.", 0.0
)


def main() -> int:
    """Serve until it is time to end."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    try:
        from dmc_jax.serving import app, engine_thread, metrics, protocol, server
    except ImportError as error:
        raise UserError(
            f"serving needs {error.name}: run `pip install -r requirements-serve.txt`, or `pip "
            "install 'dmc-jax[serve]'`"
        ) from None
    key, listener = _key(), server.listen(_HOST.value, _PORT.value)
    with listener:
        compiling.keep_programs()
        compiling.show_compiling()
        model = _ENGINE.find()
        engine = _ENGINE.engine(model, _MAX_SEQUENCES.value, prefix_cache=_PREFIX_CACHE.value)
        limits = _limits(engine, protocol.Limits)
        kept = metrics.Metrics()
        thread = engine_thread.EngineThread(_warm(engine), kept, queue_size=_QUEUE.value)
        name = _MODEL_NAME.value or _ENGINE.checkpoint.resolve().name
        service = app.Service(
            engine=thread,
            metrics=kept,
            tokenizer=engine.tokenizer,
            render=load_chat_template(_ENGINE.tokenizer(model), answer_next=True),
            model=name,
            limits=limits,
            key=key,
            body_seconds=_RECEIVE_SECONDS.value,
            write_seconds=_SEND_SECONDS.value,
        )
        host, port = listener.getsockname()[:2]
        log.getLogger("dmc_jax.serving").setLevel(log.INFO)
        server.end_with_zero()
        at = f"[{host}]" if ":" in host else host
        print(f"serving {name} at http://{at}:{port}/v1", flush=True)
        well = server.Server(
            app.make_app(service),
            thread,
            head_seconds=_RECEIVE_SECONDS.value,
            drain_seconds=_DRAIN_SECONDS.value,
        ).serve_on(listener)
    return 0 if well else 1


def _limits(engine: Engine, limits: type):
    length = engine.max_length
    return limits(
        length=length,
        prompt_tokens=min(_MAX_PROMPT.value or length, length),
        new_tokens=min(_MAX_NEW.value or length, length),
        choices=min(_MOST_CHOICES, _MAX_SEQUENCES.value + _QUEUE.value),
        body=parse_bytes(_MAX_BODY.value),
    )


def _warm(engine: Engine) -> Engine:
    """Let it say two tokens, likely and drawn: so what most requests need is compiled by now."""
    first = engine.tokenizer.bos_id if engine.tokenizer.bos_id >= 0 else engine.tokenizer.eos_id
    for temperature in (0.0, 1.0):
        engine.generate([[first]], SamplingParams(2, temperature=temperature, ignore_eos=True))
    return engine


def _key() -> str | None:
    key, where = os.environ.get(_KEY), f"{_KEY} in the environment"
    if _KEY_FILE.value is not None:
        where = f"--api_key_file={_KEY_FILE.value}"
        try:
            key = Path(_KEY_FILE.value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read: {type(error).__name__}") from None
    if key is None:
        if _HOST.value not in _HERE:
            commands.show_notes([f"who can reach {_HOST.value} is served: there is no key"])
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where} has no key: expected one line of letters, digits and signs")
    return key


if __name__ == "__main__":
    commands.run(main)
