"""Several processes that are one run: how they come together, agree, and part.

Process 0 asks and writes what only one may, `of_first`; what each must do, all do or none,
`together`. What all have been told ends all; a process that dies ends the others.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import pickle
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmc_jax.errors import LostPeer, RunFailure, UserError

T = TypeVar("T")

# Of a launcher that has started several: how many, and one that Kubernetes sets in an indexed job.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_INDEXED = "JOB_COMPLETION_INDEX"

_PARTING = 20  # seconds for all to have come to the end that all were told of
_LOST = re.compile(
    "gloo|remote process exited|barrier|heartbeat|coordination|unavailable|"
    "connection (closed|reset|refused)",
    re.IGNORECASE,
)
_GONE = (
    "another process of this run has died or cannot be reached. Its own log says why. Start all "
    "processes again with the same command: the run goes on from its newest checkpoint; those that "
    "are there are whole"
)


def first() -> bool:
    """Whether this is process 0, which writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    start_timeout: int = 300,
    peer_timeout: int = 100,
) -> Iterator[None]:
    """Be one process of several, if there are; before anything else is asked of JAX.

    Without arguments the cluster's environment decides, as JAX reads it: SLURM's, Open MPI's or
    Kubernetes', where that has started more than one process. CPUs talk by Gloo.

    Args:
        coordinator: HOST:PORT, the address of process 0 and a free port there; None: the cluster's.
        processes: how many; None: the cluster's.
        process: which this is, from 0; None: the cluster's.
        start_timeout: seconds to wait until all are there.
        peer_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
        UserError: arguments that do not fit, or no coordinator at that address.
        LostPeer: another process died.
    """
    given = (coordinator, processes, process)
    if processes == 1 or (given == (None, None, None) and not _launched()):
        yield
        return
    _check_given(*given)
    if coordinator is not None:
        _check_coordinator(coordinator, process, start_timeout)
    _say_on_abort(
        f"not all processes of this run came together within {start_timeout} seconds: see that all "
        "are started, with one --coordinator that each can reach, and the same --processes"
    )
    # Its handler would keep SIGTERM from `commands.stop_requests`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            *given,
            cluster_detection_method=None if None in given else "deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=peer_timeout,
            shutdown_timeout_seconds=_PARTING,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {error}") from error
    _say_on_abort(_GONE)
    try:
        with lost_peers_named():
            yield
    except (LostPeer, OSError):
        raise
    except (UserError, RunFailure, KeyboardInterrupt):  # all were told, or have agreed
        _part()
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # Python's own end would wait for the others, and they for this one
    _part()


def _part() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one has gone before: all is done here
        jax.distributed.shutdown()


def _launched() -> bool:
    return _INDEXED in os.environ or any(int(os.environ.get(name, 1)) > 1 for name in _COUNTS)


def _check_given(coordinator: str | None, processes: int | None, process: int | None) -> None:
    given = (coordinator, processes, process)
    if given == (None, None, None):
        return
    if None in given:
        raise UserError("coordinator, processes and process: give all three, or none in a cluster")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"coordinator: expected HOST:PORT, got {coordinator!r}")
    if not 0 <= process < processes:
        raise UserError(
            f"process: expected 0 to {processes - 1} of {processes} processes, got {process}"
        )


def _check_coordinator(coordinator: str, process: int, timeout: int) -> None:
    """Wait for it, or see that it can be: where it cannot, JAX would abort."""
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if process == 0:
        try:
            with socket.socket(socket.AF_INET) as place:
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                place.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"coordinator: port {port} of this machine cannot be used: "
                f"{error.strerror or error}; choose another"
            ) from error
        return
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"no coordinator at {coordinator} within {timeout} seconds "
                    f"({error.strerror or error}): it is process 0 that listens there; see that it "
                    "is started, and that this machine can reach that address"
                ) from error
            time.sleep(0.2)


_on_abort: list = []  # what C calls must not be collected


def _say_on_abort(message: str) -> None:
    """End with a line where JAX's runtime aborts the process, from a thread of its own in C++.

    So it does where a peer is lost, and offers no other way; Python's handlers would never run.
    """

    def say(number: int) -> None:
        os.write(2, f"error: JAX has aborted this process; most likely {message}\n".encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    _on_abort.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def meet(mesh: Mesh) -> None:
    """Connect the devices along every axis and axes of a mesh. All processes come here together.

    Gloo gives 30 seconds to that, when a program first needs it: less than programs take to
    compile, or not, where one process finds them compiled.
    """
    if jax.process_count() == 1:
        return
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            add = jax.shard_map(
                functools.partial(jax.lax.psum, axis_name=axes),
                mesh=mesh,
                in_specs=PartitionSpec(axes),
                out_specs=PartitionSpec(),
            )
            ones = np.ones(math.prod(mesh.shape[name] for name in axes), np.float32)
            jax.block_until_ready(jax.jit(add)(ones))


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, tells of another process and not of this one."""
    while error is not None:
        if isinstance(error, LostPeer):
            return True
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return bool(_LOST.search(str(error)))
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def lost_peers_named() -> Iterator[None]:
    """Have errors that tell of another process's end say so.

    Raises:
        LostPeer: in place of them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LostPeer) or not is_lost_peer(error):
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        raise LostPeer(f"{_GONE}. What was heard of it: {reason}") from error


def of_first(question: Callable[[], T]) -> T:
    """Ask process 0 alone and tell all: what it answers or, where it fails, that.

    Args:
        question: has an answer that can be pickled. All processes come here together.

    Raises:
        UserError, RunFailure: as in `together`.
    """
    return _all(question if first() else lambda: None)[0]


def together(work: Callable[[], T]) -> T:
    """Do something in every process; where it fails in one, it fails in all.

    Args:
        work: what each does. All come here together.

    Returns:
        What it came to in this one.

    Raises:
        UserError, RunFailure: it failed, here or elsewhere.
    """
    done: list[T] = []
    _all(lambda: done.append(work()))
    return done[0]


def _all(work: Callable[[], T]) -> list[T]:
    """Do as `together`; give what it came to in each process."""
    if jax.process_count() == 1:
        return [work()]
    value = failure = None
    try:
        value = work()
    except Exception as error:
        if is_lost_peer(error):
            raise
        failure = RunFailure(str(error)) if isinstance(error, OSError) else error
    faults, values = zip(*_exchange((failure and _told(failure), value)), strict=True)
    if failure is not None:
        raise failure
    for fault in faults:
        if fault is not None:
            raise fault
    return list(values)


def _told(failure: Exception) -> Exception:
    who = f"process {jax.process_index()}: "
    if isinstance(failure, UserError | RunFailure):
        return type(failure)(f"{who}{failure}")
    return RunFailure(f"{who}{type(failure).__name__}: {failure}")


def require_equal(value: T, say: Callable[[T, T], str]) -> None:
    """Refuse what processes were given differently.

    Args:
        value: of this process.
        say: what is told of that of process 0 and that of the first that differs.

    Raises:
        UserError: one differs.
    """
    if jax.process_count() > 1:
        values = _exchange(value)
        for number, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"process {number}: {say(values[0], other)}")


def _exchange(value: Any) -> list[Any]:
    """Tell all processes something, and hear what each tells, in their order."""
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size)).reshape(-1)
    room = np.zeros(2 ** int(sizes.max()).bit_length(), np.uint8)  # few sizes: few programs
    room[: data.size] = data
    rows = multihost_utils.process_allgather(room)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def fetch(tree: Any) -> Any:
    """Copy arrays to this host, whoever's devices hold their parts. All come here together.

    Args:
        tree: of arrays, each of the same shape in every process.
    """

    def whole(leaf):
        parts = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if parts and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return leaf

    return jax.device_get(jax.tree.map(whole, tree))


def stop_agreement() -> Callable[[Sequence[int]], int]:
    """Make what all processes ask after each step, that they may stop after the same one.

    Returns:
        A function of the signals that this process has had, which gives the one to stop for, or 0.
        With several processes that is known a call later: what the others say comes while the
        devices work on the next step.
    """
    pending = []

    def ask(asked: Sequence[int]) -> int:
        pending.append(_largest(asked[0] if asked else 0))
        if jax.process_count() == 1:
            return int(pending.pop())
        return int(pending.pop(0)) if len(pending) > 1 else 0

    return ask


def agreed_signal(asked: Sequence[int]) -> int:
    """Give a signal that any process has had, or 0: the process's own if it has had one.

    Args:
        asked: signals that this one has had. All come here together.
    """
    any_asked = int(_largest(asked[0] if asked else 0))
    return asked[0] if asked else any_asked


def _largest(number: int) -> Any:
    if jax.process_count() == 1:
        return number
    devices = Mesh(np.asarray(jax.devices()), ("device",))
    numbers = jax.make_array_from_process_local_data(
        NamedSharding(devices, PartitionSpec("device")),
        np.full(jax.local_device_count(), number, np.int32),
    )
    return jax.jit(jnp.max, out_shardings=NamedSharding(devices, PartitionSpec()))(numbers)
