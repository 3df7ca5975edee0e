"""The socket, and how serving ends: with all that was accepted, or with a word to who waits."""

import asyncio
import signal
import socket

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmc_jax.errors import RunFailure
from dmc_jax.serving.engine_thread import EngineThread
from dmc_jax.serving.protocol import ApiError

_HEAD_BYTES = 16384
_TO_BE_TOLD = 5  # seconds that clients have to hear that their time is up


def listen(host: str, port: int) -> socket.socket:
    """Open a socket for clients.

    Args:
        host: address or name.
        port: 0: any that is free.

    Raises:
        RunFailure: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        raise RunFailure(f"cannot listen on {host}, port {port}: {error}") from error


class Server(uvicorn.Server):
    """Serves an application until it is told to end."""

    def __init__(
        self, app: ASGIApp, engine: EngineThread, *, head_seconds: float, drain_seconds: float
    ):
        """Get ready.

        Args:
            app: from `make_app`.
            engine: that it asks.
            head_seconds: that the head of a request may take to arrive.
            drain_seconds: that requests have to finish once the server is told to end.
        """

        class Protocol(_TimedProtocol):
            seconds = head_seconds

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                loop="asyncio",  # whatever else is installed
                ws="none",
                log_config=None,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=int(drain_seconds) + _TO_BE_TOLD + 1,
                h11_max_incomplete_event_size=_HEAD_BYTES,
            )
        )
        self._engine, self._drain_seconds = engine, drain_seconds

    def serve_on(self, listener: socket.socket) -> bool:
        """Serve until a signal asks to end (SIGINT, SIGTERM), or the engine fails.

        Returns:
            Whether all went well.
        """
        self._engine.on_broken = lambda: setattr(self, "should_exit", True)
        try:
            self.run(sockets=[listener])
        finally:
            self._engine.stop()
        return not self._engine.broken.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and let those that are there finish while there is time."""
        ending = ApiError(503, "this server is shutting down", code="shutting_down")
        self._engine.refuse(self._engine.refusal or ending)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain_seconds, self._engine.give_up, ending)
        await super().shutdown(sockets)
        timer.cancel()


def end_with_zero() -> None:
    """Let SIGINT and SIGTERM be an ordinary end, in the main thread.

    Uvicorn raises those that it has obeyed again, for whoever was there before it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


class _TimedProtocol(H11Protocol):
    """Cuts connections that take their time to say what they want, or say nothing."""

    seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.access_log = False  # which has addresses as clients spell them
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.seconds, self._cut)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
