"""Where the time of a run goes, and a trace of some of its steps."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from dmc_jax.errors import UserError
from dmc_jax.evaluation.times import MARK, PARTS, PROGRESS


class Spent:
    """Seconds by what they went into; what nothing else claims is a step's."""

    def __init__(self):
        self._since = time.perf_counter()
        self._recent = dict.fromkeys(PARTS, 0.0)
        self._all = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Claim the time of a block.

        Args:
            part: one of `PARTS`.
        """
        begun = time.perf_counter()
        yield
        self._recent[part] += time.perf_counter() - begun

    def began(self, lost: float = 0.0) -> None:
        """Claim for "start" all that nothing else has, where a stage's first step is next.

        Args:
            lost: seconds of steps that must be taken again.
        """
        self._recent["start"] += self._rest()
        self._recent["lost"] += lost
        self._since -= lost  # as if it had been spent here

    def fetch(self, batches: Iterator[Any], running: Any) -> Any:
        """Take the next batch; the wait is "data" where the devices had nothing to do at its end.

        Args:
            batches: to take it from.
            running: arrays that the newest step computes; None: there is none.
        """
        begun = time.perf_counter()
        batch = next(batches)
        if all(x.is_ready() for x in jax.tree.leaves(running)):
            self._recent["data"] += time.perf_counter() - begun
        return batch

    def take(self) -> dict[str, float]:
        """Give the seconds since the last call, as metrics, and the goodput of the process."""
        self._recent[PROGRESS] += self._rest()
        recent, self._recent = self._recent, dict.fromkeys(PARTS, 0.0)
        self._since = time.perf_counter()
        self._all = {part: self._all[part] + recent[part] for part in PARTS}
        told = {MARK + part: round(seconds, 4) for part, seconds in recent.items()}
        return told | {"goodput": self._all[PROGRESS] / max(sum(self._all.values()), 1e-9)}

    def _rest(self) -> float:
        return max(0.0, time.perf_counter() - self._since - sum(self._recent.values()))


def profiled_steps(text: str) -> range:
    """Read `STEP:COUNT`, steps as log lines count them; empty text is none.

    Raises:
        UserError: it is of another form.
    """
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if text and not found:
        raise UserError(
            f"profile is {text!r}; expected STEP:COUNT, the first step and how many, such as 100:3"
        )
    return range(int(found[1]), int(found[1]) + int(found[2])) if found else range(0)


@contextlib.contextmanager
def profiler(steps: range, directory: Path) -> Iterator[Callable[[int, Any], None]]:
    """Trace some steps with `jax.profiler`, for xprof and TensorBoard.

    Args:
        steps: to trace; those that are not taken here are left out.
        directory: the trace is written below it.

    Yields:
        What to call before each step, with its number and arrays that the one before computes.
    """
    with contextlib.ExitStack() as trace:

        def before(step: int, running: Any) -> None:
            if step == steps.stop:
                jax.block_until_ready(running)
                trace.close()
            if steps and step == steps.start:
                trace.enter_context(jax.profiler.trace(directory))

        yield before
