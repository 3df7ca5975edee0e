"""What a Prometheus server is shown of the engine."""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dmc_jax.inference.requests import Event

_WINDOW = 10.0  # seconds that tokens are counted over, for a rate
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)  # seconds


class _State(Protocol):
    running: int
    waiting: int
    free_pages: int


class Metrics:
    """Counters that the engine's thread keeps, read by any other."""

    def __init__(self):
        self._registry = CollectorRegistry()
        own = {"registry": self._registry}
        self._accepted = Counter("dmc_sequences_accepted", "That were queued.", **own)
        self._prompt_tokens = Counter("dmc_prompt_tokens", "Tokens of accepted prompts.", **own)
        self._generated = Counter("dmc_generated_tokens", "New tokens.", **own)
        self._drafted = Counter("dmc_drafted_tokens", "That --prompt_lookup tried.", **own)
        self._right = Counter("dmc_accepted_draft_tokens", "New tokens among these.", **own)
        self._ended = Counter("dmc_sequences_ended", "By what ended them.", ["reason"], **own)
        self._first = Histogram(
            "dmc_time_to_first_token_seconds",
            "From a request's acceptance, with its time in the queue.",
            buckets=_BUCKETS,
            **own,
        )
        self._ratio = Gauge(
            "dmc_compression_ratio", "Tokens per slot, over all sequences that ended.", **own
        )
        self._gauges = {
            "running": Gauge("dmc_sequences_running", "In the cache.", **own),
            "waiting": Gauge("dmc_sequences_waiting", "For a place in the cache.", **own),
            "free_pages": Gauge("dmc_pages_free", "That no sequence holds.", **own),
        }
        rate = Gauge("dmc_tokens_per_second", f"New, over {_WINDOW:g} seconds.", **own)
        rate.set_function(self._rate)
        self._lock, self._recent = threading.Lock(), collections.deque()
        self._tokens = self._slots = 0.0

    def watch(self, state: Callable[[], _State]) -> None:
        """Show how the engine stands whenever metrics are read."""
        for name, gauge in self._gauges.items():
            gauge.set_function(lambda name=name: getattr(state(), name))

    def accepted(self, prompts: Sequence[Sequence[int]]) -> None:
        """Count sequences that were queued."""
        self._accepted.inc(len(prompts))
        self._prompt_tokens.inc(sum(map(len, prompts)))

    def heard(self, event: Event, first: float | None) -> None:
        """Count an event.

        Args:
            event: of a sequence.
            first: seconds from its request's acceptance to it, if it is the first with a token.
        """
        if first is not None:
            self._first.observe(first)
        if event.tokens:
            self._generated.inc(len(event.tokens))
            with self._lock:
                self._recent.append((time.monotonic(), len(event.tokens)))
                self._forget()
        if event.finish_reason:
            self.ended(event.finish_reason)
            self._drafted.inc(event.result.drafted_tokens)
            self._right.inc(event.result.accepted_tokens)
            if event.result.ratio is not None:
                read = event.result.prompt_tokens + event.result.new_tokens
                self._tokens += read
                self._slots += read / event.result.ratio
                self._ratio.set(self._tokens / self._slots)

    def ended(self, reason: str) -> None:
        """Count a sequence that ended."""
        self._ended.labels(reason).inc()

    def text(self) -> bytes:
        """Write all in Prometheus' text format."""
        return generate_latest(self._registry)

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - _WINDOW:
            self._recent.popleft()

    def _rate(self) -> float:
        with self._lock:
            self._forget()
            return sum(count for _, count in self._recent) / _WINDOW
