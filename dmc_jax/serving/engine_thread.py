"""The engine in a thread of its own, which alone touches it; clients wait for its events.

Between two steps the thread does what it was asked to: queue sequences, cancel some. It never waits
for a client: events go to each one's own queue, in the event loop that the clients live in.
"""

import asyncio
import contextlib
import functools
import logging
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from dmc_jax.errors import RunFailure, UserError
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.requests import Event
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.serving.metrics import Metrics
from dmc_jax.serving.protocol import ApiError

log = logging.getLogger(__name__)


class State(NamedTuple):
    """How the engine stands after a step."""

    running: int  # sequences in the cache
    waiting: int
    free_pages: int


class Job:
    """The sequences of one request, and what is heard of them. Lives in the event loop."""

    def __init__(self, size: int, close: Callable[["Job"], None]):
        """Begin without news.

        Args:
            size: sequences.
            close: is called once, when nobody waits for them any more.
        """
        self.size, self.began = size, time.perf_counter()
        self.accepted = asyncio.get_running_loop().create_future()
        self.ended: set[int] = set()  # places of sequences
        self.spoke: set[int] = set()  # likewise, of those with a token; the thread's
        self._news: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self._close, self._closed = close, False

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield a sequence's place in the request and its event, until all have ended.

        Raises:
            ApiError: they could not be finished.
        """
        left = self.size
        while left:
            news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            left -= news[1].finish_reason is not None
            yield news

    def hear(self, news: tuple[int, Event] | ApiError) -> None:
        """Take an event in, or the reason why there will be none."""
        self._news.put_nowait(news)

    def close(self) -> None:
        """Cancel what has not ended."""
        if not self._closed:
            self._closed = True
            self._close(self)


class EngineThread:
    """An engine that many clients ask at once."""

    def __init__(self, engine: Engine, metrics: Metrics, *, queue_size: int):
        """Take an engine over.

        Args:
            engine: idle; nobody else may use it from now on.
            metrics: that are kept.
            queue_size: sequences that may wait beside those that run.
        """
        self._engine, self._metrics = engine, metrics
        self._most = engine.max_sequences + queue_size
        self._open: set[Job] = set()  # of the loop
        self._jobs: dict[int, tuple[Job, int]] = {}  # of the thread: by sequence
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._refusal: ApiError | None = None  # of all that comes
        self.broken = threading.Event()
        self.on_broken: Callable[[], None] = lambda: None
        self.state = State(0, 0, engine.free_pages)
        metrics.watch(lambda: self.state)

    # ---- in the event loop --------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve the clients of the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """End the thread after its present step, and wait so long for it."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def refuse(self, error: ApiError) -> None:
        """Take no more requests."""
        self._refusal = error

    @property
    def refusal(self) -> ApiError | None:
        """What every request is told; None: they are welcome."""
        return self._refusal

    def give_up(self, error: ApiError) -> None:
        """End all requests that are open, and tell their clients why."""
        self.refuse(error)
        for job in list(self._open):
            self._fail(job, error)

    async def submit(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Job:
        """Queue the sequences of a request, all or none.

        Args:
            prompts: token ids.
            params: one each.

        Returns:
            What will be heard of them; to be closed.

        Raises:
            ApiError: too many wait, the engine refuses them, or it is about to end.
        """
        if self._refusal is not None:
            raise self._refusal
        if sum(job.size - len(job.ended) for job in self._open) + len(prompts) > self._most:
            raise ApiError(429, "too many requests wait: try again later", code="queue_full")
        job = Job(len(prompts), self._closed)
        self._open.add(job)
        self._inbox.put(functools.partial(self._submit, job, prompts, params))
        try:
            await job.accepted
        except BaseException:
            job.close()
            raise
        return job

    def _closed(self, job: Job) -> None:
        self._open.discard(job)
        if len(job.ended) < job.size:
            self._inbox.put(functools.partial(self._cancel, job))

    def _fail(self, job: Job, error: ApiError) -> None:
        if not job.accepted.done():
            job.accepted.set_exception(error)
        job.hear(error)
        job.close()

    def _hand_out(self, news: list[tuple[Job, int, Event]]) -> None:
        for job, place, event in news:
            if event.finish_reason:
                job.ended.add(place)
            job.hear((place, event))

    # ---- in the thread ------------------------------------------------------------------------

    def _tell(self, function: Callable[..., None], *args) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        except BaseException as error:
            # What an error says may hold a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("the engine failed with %s:\n%s", type(error).__name__, frames)
            self.broken.set()
            self._tell(self.give_up, ApiError(500, "the engine failed and is shutting down"))
            self._tell(self.on_broken)

    def _serve(self) -> bool:
        """Do what was asked, then a step; False: to end."""
        commands = [] if self._engine.unfinished else [self._inbox.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._inbox.get_nowait())
        for command in commands:
            if command is None:
                return False
            command()
        news = self._step() if self._engine.unfinished else []
        if news:
            self._tell(self._hand_out, news)
        running, unfinished = len(self._engine.running), len(self._engine.unfinished)
        self.state = State(running, unfinished - running, self._engine.free_pages)
        return True

    def _submit(self, job: Job, prompts: Sequence[list[int]], params) -> None:
        ids = []
        try:
            for pair in zip(prompts, params, strict=True):
                ids.append(self._engine.submit(*pair))
        except UserError as error:
            for sequence in ids:
                self._engine.cancel(sequence)
            self._tell(self._fail, job, ApiError(400, str(error), code="invalid_value"))
            return
        self._jobs |= {sequence: (job, place) for place, sequence in enumerate(ids)}
        self._metrics.accepted(prompts)
        self._tell(lambda: job.accepted.done() or job.accepted.set_result(None))

    def _cancel(self, job: Job) -> None:
        for sequence in [one for one, (of, _) in self._jobs.items() if of is job]:
            del self._jobs[sequence]
            self._engine.cancel(sequence)
            self._metrics.ended("cancelled")

    def _step(self) -> list[tuple[Job, int, Event]]:
        events, lost = [], False
        while True:
            left = len(self._engine.unfinished)
            try:
                events += self._engine.step()
                break
            except RunFailure:  # of one sequence, which has left; the others go on
                if len(self._engine.unfinished) >= left:
                    raise
                lost = True
        news = []
        for event in events:
            if event.sequence not in self._jobs:  # cancelled
                continue
            job, place = self._jobs[event.sequence]
            first = bool(event.tokens) and place not in job.spoke
            job.spoke |= {place} if first else set()
            self._metrics.heard(event, time.perf_counter() - job.began if first else None)
            news.append((job, place, event))
            if event.finish_reason:
                del self._jobs[event.sequence]
        if lost:
            self._tell_of_lost()
        return news

    def _tell_of_lost(self) -> None:
        """Fail the requests whose sequences have left without an end: their logits were NaN."""
        error = ApiError(500, "the model's logits are no numbers after this prompt")
        gone = set(self._jobs) - set(self._engine.unfinished)
        for job in {self._jobs[sequence][0] for sequence in gone}:
            self._tell(self._fail, job, error)
        for sequence in gone:
            del self._jobs[sequence]
            self._metrics.ended("failed")
