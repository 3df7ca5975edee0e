"""A server of a tiny model on loopback, in a thread of the tests."""

import contextlib
import threading
import time
from typing import NamedTuple

import httpx

from dmc_jax.checkpoints.metadata import Metadata
from dmc_jax.checkpoints.states import open_for_saving
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.chat import load_chat_template
from dmc_jax.data.tokenizer import fingerprint, load_tokenizer, train_sentencepiece
from dmc_jax.inference.engine import Engine
from dmc_jax.policies.dmc import DMC
from dmc_jax.serving.app import Service, make_app
from dmc_jax.serving.engine_thread import EngineThread
from dmc_jax.serving.metrics import Metrics
from dmc_jax.serving.protocol import Limits
from dmc_jax.serving.server import Server, listen
from tests.tiny_llama import build, some_gates

PAGES = 40  # of an engine, room for 80 tokens where all take slots
PATIENCE = 60  # seconds that anything may take
MODEL = "tiny"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'][0] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a {% endif %}"
)
LIMITS = Limits(length=128, prompt_tokens=100, new_tokens=40, choices=8, body=10_000)


class Tiny(NamedTuple):
    """What engines are made of."""

    params: dict
    config: object
    tokenizer: object
    render: object


def make_tiny(folder):
    """A random model, a tokenizer of bytes, a chat template."""
    train_sentencepiece(["ab é€ " * 50], 266, folder / "t.model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(folder / "t.model")
    render = load_chat_template(folder / "t.model", answer_next=True)
    return Tiny(*build(vocab_size=266), tokenizer, render)


def save_checkpoint(folder):
    """The model as one that merges, on disk; its name is `MODEL`."""
    tiny = make_tiny(folder)
    metadata = Metadata(
        stage="finetune",
        step=5,
        model=tiny.config,
        policy=DMC(DMCSettings(window=3, offset=0.0), 0.0),
        compute_dtype="float32",
        tokenizer=str(folder / "t.model"),
        tokenizer_sha256=fingerprint(folder / "t.model"),
    )
    with open_for_saving(folder / MODEL, "finetune", keep=1) as saver:
        saver.save(5, {"params": tiny.params}, {}, metadata)
    return folder / MODEL


def make_engine(tiny, **changes):
    """An engine of one shape, whose programs compile once; four long sequences do not fit."""
    gates = some_gates()
    sizes = {"max_sequences": 4, "pages": PAGES, "page_size": 8, "policy": gates.policy}
    options = sizes | {"gates": gates} | changes
    return Engine(tiny.params, tiny.config, tiny.tokenizer, **options)


class Live(NamedTuple):
    url: str
    port: int
    server: Server
    thread: EngineThread
    engine: Engine
    pages: int  # of an idle engine
    ended: list  # what `serve_on` said

    def end(self):
        """As SIGTERM does it."""
        self.server.should_exit = True

    def wait_until_idle(self):
        """Until nobody is in the cache, and all pages are free."""
        until, free = time.monotonic() + PATIENCE, f"dmc_pages_free {float(self.pages)}\n"
        idle = ("dmc_sequences_running 0.0\n", "dmc_sequences_waiting 0.0\n", free)
        while time.monotonic() < until:
            text = httpx.get(self.url.replace("/v1", "/metrics"), timeout=PATIENCE).text
            if all(line in text for line in idle):
                return text
            time.sleep(0.02)
        raise AssertionError(f"not idle: {text}")


@contextlib.contextmanager
def serving(tiny, engine, *, queue_size=16, limits=LIMITS, head=PATIENCE, drain=PATIENCE, **rest):
    """Serves an engine until the end of the block."""
    pages, metrics = engine.free_pages, Metrics()
    thread = EngineThread(engine, metrics, queue_size=queue_size)
    service = Service(
        engine=thread,
        metrics=metrics,
        tokenizer=tiny.tokenizer,
        render=tiny.render,
        model=MODEL,
        limits=limits,
        **rest,
    )
    server = Server(make_app(service), thread, head_seconds=head, drain_seconds=drain)
    listener, ended = listen("127.0.0.1", 0), []
    port = listener.getsockname()[1]
    runs = threading.Thread(target=lambda: ended.append(server.serve_on(listener)))
    runs.start()
    try:
        until = time.monotonic() + PATIENCE
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        yield Live(f"http://127.0.0.1:{port}/v1", port, server, thread, engine, pages, ended)
    finally:
        server.should_exit = True
        runs.join(2 * PATIENCE)
        listener.close()
        assert not runs.is_alive()
