"""The addresses that clients ask: /v1/models, /v1/completions, /v1/chat/completions and health."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dmc_jax.data.chat import Render
from dmc_jax.data.tokenizer import Tokenizer, encode_prompt
from dmc_jax.errors import UserError
from dmc_jax.inference.requests import check_text
from dmc_jax.serving.engine_thread import EngineThread
from dmc_jax.serving.metrics import Metrics
from dmc_jax.serving.protocol import ApiError, Asked, Limits, read_request
from dmc_jax.serving.replies import Reply, as_json

log = logging.getLogger(__name__)

_OPEN = ("/health",)  # without a key
_CLOSE = (b"connection", b"close")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """What the addresses need."""

    engine: EngineThread
    metrics: Metrics
    tokenizer: Tokenizer
    render: Render | None  # a conversation, to where the model's answer begins; None: no chats
    model: str  # its name
    limits: Limits
    key: str | None = None  # that clients must have
    body_seconds: float = 30.0  # that a body may take to arrive
    write_seconds: float = 30.0  # that a part of a stream may take to be read


def make_app(service: Service) -> ASGIApp:
    """Make an ASGI application, which starts the engine's thread with its event loop."""
    # Alone with the tokenizer, which is not for several threads; the engine only decodes.
    encoder = concurrent.futures.ThreadPoolExecutor(1, "encoder")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        service.engine.start()
        yield
        encoder.shutdown(wait=False, cancel_futures=True)

    async def health(request: Request) -> Response:
        refusal = service.engine.refusal
        if refusal is not None:
            raise refusal
        return _json({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    made = int(time.time())

    async def models(request: Request) -> Response:
        about = {"id": service.model, "object": "model", "created": made, "owned_by": "dmc_jax"}
        about["max_model_len"] = service.limits.length
        name = request.path_params.get("name")
        if name is None:
            return _json({"object": "list", "data": [about]})
        if name != service.model:
            raise ApiError(404, "there is no such model here", code="model_not_found")
        return _json(about)

    async def generate(request: Request) -> Response:
        return await _generate(service, encoder, request)

    generating = ("/v1/completions", "/v1/chat/completions")
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            *(Route(path, generate, methods=["POST"]) for path in generating),
        ],
        exception_handlers={
            ApiError: _refused,
            HTTPException: _no_such_address,
            Exception: _failed,
        },
        lifespan=lifespan,
    )
    return _Front(app, service.key)


async def _generate(
    service: Service, encoder: concurrent.futures.Executor, request: Request
) -> Response:
    body = await _body_of(request, service.limits.body, service.body_seconds)
    chat = request.url.path.endswith("/chat/completions")
    loop = asyncio.get_running_loop()

    def prepare():
        asked = read_request(body, chat=chat, model=service.model, limits=service.limits)
        prompts = _encoded(service, asked)
        params = [asked.params_for(prompt, service.limits) for prompt in prompts]
        return asked, prompts, params

    asked, prompts, params = await loop.run_in_executor(encoder, prepare)
    job = await service.engine.submit(
        [prompt for prompt in prompts for _ in range(asked.choices)],
        [one for choices in params for one in choices],
    )
    reply = Reply(asked, job, service.model, service.tokenizer)
    if asked.stream:
        return _EventStream(reply.stream(), job, service.write_seconds)
    try:
        return _json(await _unless_gone(request, reply.whole()))
    finally:
        job.close()


def _encoded(service: Service, asked: Asked) -> list[list[int]]:
    """The ids of what a request asks to go on from."""
    try:
        if not asked.chat:
            for prompt in asked.prompts:
                check_text(prompt)
            return [
                encode_prompt(service.tokenizer, prompt) if isinstance(prompt, str) else prompt
                for prompt in asked.prompts
            ]
        if service.render is None:
            raise UserError("this model came without a chat template: use /v1/completions")
        text = service.render(asked.messages)
        check_text(text)
        return [service.tokenizer.encode_special(text)]
    except (UserError, ValueError) as error:  # ValueError: the template has no text for it
        raise ApiError(400, str(error), param=asked.source, code="invalid_value") from None


async def _body_of(request: Request, most: int, seconds: float) -> bytes:
    """Read a body, or as much as shows that it is too long."""
    parts, size = [], int(request.headers.get("content-length", 0))
    too_long = ApiError(413, f"a body may have {most:,} bytes", code="body_too_long")
    try:
        async with asyncio.timeout(seconds):
            if size > most:
                raise too_long
            size = 0
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {seconds:g} seconds") from None
    return b"".join(parts)


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Wait for something while the client does."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events, whose job ends with whoever reads them."""

    def __init__(self, content: AsyncIterator[bytes], job: Any, write_seconds: float):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._job, self._write_seconds = job, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_time(message):
            async with asyncio.timeout(self._write_seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, in_time)
        except TimeoutError:
            log.warning("a client did not read its stream, which is cut")
        finally:
            self._job.close()


class _Front:
    """What happens to every request: its key is looked at, its end is logged, none of its text."""

    def __init__(self, app: ASGIApp, key: str | None):
        self._app, self._digest = app, None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, headers = time.perf_counter(), None, dict(scope["headers"])
        # Who answers before a body has arrived whole must not wait for the rest of it.
        arrived = headers.get(b"content-length", b"0") == b"0"
        arrived &= b"transfer-encoding" not in headers

        async def receiving():
            nonlocal arrived
            message = await receive()
            arrived |= message["type"] == "http.request" and not message.get("more_body", False)
            return message

        async def sending(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not arrived:
                    message["headers"] = [*message["headers"], _CLOSE]
            await send(message)

        try:
            if self._may(scope["path"], headers):
                await self._app(scope, receiving, sending)
            else:
                told = ApiError(401, "a bearer key is needed, and this is none that is known")
                headers = {"www-authenticate": "Bearer"}
                await _json(told.body(), 401, headers)(scope, receiving, sending)
        except ClientDisconnect:
            status = "gone"
        except Exception as error:  # the client has been told; what it says may hold a prompt
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed with %s:\n%s", type(error).__name__, frames)
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            seconds = time.perf_counter() - began
            log.info("%s %s %s in %.3f s", scope["method"], path, status, seconds)

    def _may(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        if self._digest is None or path in _OPEN:
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Digests are of one length, so nothing is learnt of the key's.
        return hmac.compare_digest(_digest(key.strip()), self._digest) and kind.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(value), status, headers, "application/json")


async def _refused(request: Request, error: Exception) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return _json(error.body(), error.status, headers)


async def _no_such_address(request: Request, error: Exception) -> Response:
    told = ApiError(error.status_code, f"{error.detail}: see /v1/models, /v1/completions")
    return _json(told.body(), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return _json(ApiError(500, "this server failed; its log says where").body(), 500)
