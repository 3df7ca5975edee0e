"""Clients that send nonsense, too much, too slowly or nothing, and ends at bad moments."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dmc_jax.inference.engine import Engine
from dmc_jax.serving.app import Service, _EventStream, make_app
from dmc_jax.serving.metrics import Metrics
from dmc_jax.serving.protocol import ApiError
from tests.serving.live import LIMITS, MODEL, PATIENCE, make_engine, serving

SMALL = dataclasses.replace(LIMITS, new_tokens=4, choices=3)


@pytest.fixture(scope="module")
def live(tiny):
    with serving(tiny, make_engine(tiny), limits=SMALL) as live:
        yield live


# ---- nonsense ---------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=[]), max_size=8)
    | st.sampled_from([-1, 0, 1, 2**31, 2**64, 1e-300, 1e300, "", "\ud83d", "x" * 300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
FIELDS = {
    "model": st.just(MODEL),
    "prompt": st.sampled_from(["ab", "", ["ab", "b"], [1, 5], [[1, 5], [1]], [], [[]], [1, 10**9]]),
    "messages": st.just([{"role": "user", "content": "ab"}]),
    "max_tokens": st.integers(-1, 5),
    "n": st.integers(0, 4),
    "temperature": st.floats(0, 2) | st.sampled_from([1e-300, 1e-40, 1e-5]),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 2**31),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 200),
    "threshold": st.floats(-1e5, 1e5),
    "ratio": st.floats(0, 4),
    "seed": st.integers(),
    "stop": st.sampled_from(["a", ["a", "b"], [], "", ["\ud83d"]]),
    "logprobs": st.integers(-1, 6) | st.booleans(),
    "top_logprobs": st.integers(-1, 21),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "echo": st.booleans(),
    "user": st.text(max_size=3),
    "magic": st.none() | st.integers(),
}


@st.composite
def bodies(draw):
    """Requests, most of them nearly right."""
    chat = draw(st.booleans())
    wanted = {"model", "messages" if chat else "prompt"}
    names = draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=5)) | wanted
    if draw(st.booleans()):
        names -= {draw(st.sampled_from(sorted(FIELDS)))}
    body = {name: draw(FIELDS[name]) for name in sorted(names)}
    if draw(st.booleans()) and body:
        body[draw(st.sampled_from(sorted(body)))] = draw(JUNK)
    return chat, json.dumps(body).encode()


# Annotations, which the server's threads run meanwhile, look at random items of lists.
@pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning"
)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.tuples(st.booleans(), st.binary(max_size=20)) | bodies())
@example((False, b"[" * 9000))
@example((False, b'{"model": "tiny", "prompt": "\\ud83d"}'))
@example((True, b'{"model": "\\ud83d", "messages": [{"role": "a", "content": "b"}]}'))
@example((True, b'{"model": "tiny", "messages": [{"role": "\\ud83d", "content": "b"}]}'))
@example((False, b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}"))
@example((False, b'{"model": "tiny", "prompt": "a", "temperature": NaN}'))
@example((False, b'{"model": "tiny", "prompt": "a", "threshold": -1e999}'))
def whatever_is_sent_is_answered_or_refused_with_a_reason_test(live, request):
    chat, body = request
    url = f"{live.url}/chat/completions" if chat else f"{live.url}/completions"
    answer = httpx.post(url, content=body, timeout=PATIENCE)
    if answer.status_code == 200:
        assert "error" not in answer.text.split("data: ")[-1] or "[DONE]" in answer.text
        return
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"]


def after_all_that_the_engine_is_well_test(live):
    live.wait_until_idle()
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 2, "ignore_eos": True}
    answer = httpx.post(f"{live.url}/completions", json=body, timeout=PATIENCE)
    assert answer.json()["usage"]["completion_tokens"] == 2


# ---- too much, too slowly ---------------------------------------------------------------------


def exchange(port, *parts, pause=0.0):
    """Sends bytes and reads until the server closes, which it must."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(65536):
                received += more
    return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def a_body_that_is_too_long_is_cut_test(live):
    answer = httpx.post(f"{live.url}/completions", content=b" " * 20_000, timeout=PATIENCE)
    assert answer.status_code == 413 and "10,000 bytes" in answer.json()["error"]["message"]
    assert b" 413 " in exchange(live.port, HEAD + b"Content-Length: 99999999999\r\n\r\n")
    # In chunks, whose sum nobody has told.
    chunk = b"800\r\n" + b" " * 2048 + b"\r\n"
    answer = exchange(live.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 8)
    assert b" 413 " in answer


@pytest.fixture(scope="module")
def hasty(tiny):
    with serving(tiny, make_engine(tiny), head=0.3, body_seconds=0.3) as live:
        yield live


def who_takes_its_time_is_cut_test(hasty):
    assert exchange(hasty.port) == b""  # says nothing
    assert exchange(hasty.port, HEAD) == b""  # and no more than this
    drops = [bytes([letter]) for letter in HEAD * 2]
    assert exchange(hasty.port, *drops, pause=0.05) == b""
    answer = exchange(hasty.port, HEAD + b"Content-Length: 100\r\n\r\n{", b" ", b" ", pause=0.2)
    assert b" 408 " in answer and b"body took longer" in answer


def a_head_without_end_is_refused_test(live):
    assert b" 400 " in exchange(live.port, HEAD + b"A: " + b"a" * 100_000)


def a_stream_that_nobody_reads_is_cut_test():
    closed = []

    class Job:
        def close(self):
            closed.append(True)

    async def parts():
        yield b"data: {}"

    async def never(message=None):
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await never()

    async def run():
        stream = _EventStream(parts(), Job(), 0.05)
        await asyncio.wait_for(stream({"type": "http"}, never, send), PATIENCE)

    asyncio.run(run())
    assert closed == [True]


# ---- who may ask ------------------------------------------------------------------------------


def without_the_key_nothing_but_health_is_told_test(tiny):
    class Idle:
        refusal = None

    service = Service(
        engine=Idle(),
        metrics=Metrics(),
        tokenizer=tiny.tokenizer,
        render=None,
        model=MODEL,
        limits=LIMITS,
        key="s3cret",
    )
    transport = httpx.ASGITransport(make_app(service))

    async def run():
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            assert (await client.get("/health")).status_code == 200
            for key in (None, "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "é"):
                headers = {} if key is None else {"authorization": key.encode()}
                for path in ("/v1/models", "/metrics", "/nothing"):
                    refused = await client.get(path, headers=headers)
                    assert refused.status_code == 401
                    assert "s3cret" not in refused.text
                    assert refused.json()["error"]["type"] == "authentication_error"
            headers = {"authorization": "Bearer s3cret"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
            refused = await client.post("/v1/chat/completions", json=chat, headers=headers)
            assert refused.status_code == 400 and "chat template" in refused.text
            refused = await client.get("/v1/completions", headers=headers)
            assert refused.status_code == 405 and "Method" in refused.json()["error"]["message"]

    asyncio.run(run())


# ---- ends -------------------------------------------------------------------------------------


def posted(url, body, answers):
    def post():
        with contextlib.suppress(httpx.ConnectError):
            answers.append(httpx.post(f"{url}/completions", json=body, timeout=2 * PATIENCE))

    thread = threading.Thread(target=post)
    thread.start()
    return thread


LONG = {"model": MODEL, "prompt": "ab", "max_tokens": 40, "ignore_eos": True, "n": 4}


def three_answers_at_the_end(live):
    """Of requests that share four seats, of a server that was told to end once all were taken."""
    answers = []
    threads = [posted(live.url, LONG | {"stream": bool(x)}, answers) for x in (0, 0, 1)]
    until = time.monotonic() + PATIENCE
    while sum(live.thread.state[:2]) < 12 and time.monotonic() < until:
        time.sleep(0.001)
    live.end()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(answers) == 3
    return answers


def requests_that_were_taken_finish_at_the_end_test(tiny, hold_steps):
    with serving(tiny, make_engine(tiny)) as live:
        hold_steps(lambda: not live.server.should_exit)
        answers = three_answers_at_the_end(live)
    assert live.ended == [True]
    for answer in answers:
        ends = answer.text.endswith("data: [DONE]\n\n") if "data: " in answer.text else None
        assert ends or answer.json()["usage"]["completion_tokens"] == 4 * 40


def requests_that_cannot_finish_in_time_are_told_test(tiny, hold_steps):
    hold_steps(lambda: True)
    with serving(tiny, make_engine(tiny), drain=0.0) as live:
        answers = three_answers_at_the_end(live)
    assert live.ended == [True]
    assert all("shutting down" in answer.text for answer in answers)
    streams = [answer for answer in answers if "data: " in answer.text]
    assert len(streams) == 1 and "[DONE]" not in streams[0].text
    assert {answer.status_code for answer in answers if answer not in streams} == {503}


def a_sequence_whose_logits_are_no_numbers_costs_its_own_request_test(tiny):
    broken = {**tiny.params, "embedding": np.array(tiny.params["embedding"])}
    poison = 77
    broken["embedding"][poison] = np.nan
    engine = make_engine(tiny._replace(params=broken))
    answers = []
    with serving(tiny, engine) as live:
        bodies = [{"prompt": [1, 70]}, {"prompt": [1, poison]}, {"prompt": [1, poison, 7]}]
        common = {"model": MODEL, "max_tokens": 8, "temperature": 0, "stop_token_ids": [poison]}
        threads = [posted(live.url, common | body, answers) for body in bodies]
        for thread in threads:
            thread.join(PATIENCE)
        live.wait_until_idle()
    assert sorted(answer.status_code for answer in answers) == [200, 500, 500]
    assert all("no numbers" in x.text for x in answers if x.status_code == 500)
    assert live.ended == [True]


def an_engine_that_fails_ends_the_server_and_its_clients_are_told_test(tiny, monkeypatch, caplog):
    engine, answers = make_engine(tiny), []

    secret = "".join(["XYZ", "ZY"])  # a log shows lines of code

    def fail(self):
        raise ZeroDivisionError(secret)

    with serving(tiny, engine) as live:
        monkeypatch.setattr(Engine, "step", fail)
        threads = [posted(live.url, LONG | {"stream": bool(x)}, answers) for x in (0, 1)]
        for thread in threads:
            thread.join(PATIENCE)
    assert live.ended == [False]
    assert all("the engine failed" in answer.text for answer in answers)
    messages = [x.getMessage() for x in caplog.records if x.levelno >= logging.ERROR]
    assert len(messages) == 1 and "ZeroDivisionError" in messages[0] and secret not in messages[0]


def the_error_of_a_client_is_of_its_own_type_test():
    kinds = {400: "invalid_request_error", 422: "invalid_request_error", 500: "server_error"}
    kinds |= {404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}
    for status, kind in kinds.items():
        assert ApiError(status, "x").body()["error"]["type"] == kind
