"""How long compiling took, which no rate should count, and a word while it happens."""

import os
import sys
import time

import jax

from dmc_jax.files import user_cache

_DURATIONS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_BEGINS = "/jax/compilation_cache/compile_requests_use_cache"
_NOTICE = "compiling ..."

# What JAX reports is the process's, and it knows no end of listening.
_spans: list[tuple[float, float]] = []  # (begin, end) in seconds, none within another


def _ended(event: str, seconds: float, **_) -> None:
    if event in _DURATIONS:
        now = time.perf_counter()
        while _spans and _spans[-1][0] >= now - seconds:  # programs within the one that ended
            _spans.pop()
        _spans.append((now - seconds, now))


jax.monitoring.register_event_duration_secs_listener(_ended)


def compile_seconds() -> float:
    """Sum the seconds that this process has compiled for, tracing included."""
    return sum(end - begin for begin, end in _spans)


def working_seconds() -> float:
    """Read a clock, in seconds, that stands still while programs are compiled."""
    return time.perf_counter() - compile_seconds()


def show_compiling() -> None:
    """Say on a terminal's standard error that a program is compiled, for as long as it is."""
    if not sys.stderr.isatty():
        return

    def begun(event: str, **_) -> None:
        if event == _BEGINS:
            print(_NOTICE, end="", file=sys.stderr, flush=True)

    def done(event: str, seconds: float, **_) -> None:
        if event == _DURATIONS[-1]:
            gone = "\b" * len(_NOTICE)
            print(gone, " " * len(_NOTICE), gone, sep="", end="", file=sys.stderr, flush=True)

    jax.monitoring.register_event_listener(begun)
    jax.monitoring.register_event_duration_secs_listener(done)


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start finds them.

    What JAX was told (in JAX_COMPILATION_CACHE_DIR and its like) stays.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = user_cache("programs")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: it works without
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


_WORTH_KEEPING = 0.1  # seconds that a program took to compile
