"""Many clients at once, who come, go and vanish: each gets what it would get alone."""

import asyncio
import json
import random

import httpx
import pytest

from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.scheduler import Scheduler
from tests.serving.live import MODEL, PAGES, PATIENCE, make_engine, serving

PREFIXES = ("ab", "ab é", "bbb")


def some_requests(count):
    """Bodies, a third of them alike in their beginnings, and when their client vanishes."""
    rng = random.Random(count)
    for number in range(count):
        prompt = rng.choice(PREFIXES) + "".join(rng.choices("ab ", k=rng.randint(0, 2)))
        body = {"model": MODEL, "prompt": prompt, "max_tokens": rng.randint(20, 24)}
        # Of 23 tokens or more, four fill more pages than there are, though four short prompts fit.
        body |= {"ignore_eos": True, "seed": number}
        body |= {"temperature": rng.choice([0, 1]), "stream": rng.random() < 0.6}
        yield body, rng.choice([None, None, None, "at once", "later"])


async def ask(client, url, body, leaves):
    """What a client has read, or None where it left before the end."""
    if not body["stream"]:
        request = client.post(url, json=body)
        if leaves is None:
            answer = await request
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]
        task = asyncio.ensure_future(request)
        await asyncio.sleep(0.01 if leaves == "at once" else 0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    text, parts = "", 0
    async with client.stream("POST", url, json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if leaves == "at once" or (leaves == "later" and parts == 3):
                return None
            if line == "data: [DONE]":
                return text
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                parts += 1
    raise AssertionError("a stream without an end")


async def ask_all(url, requests):
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=2 * PATIENCE, limits=limits) as client:
        every = (ask(client, url, *request) for request in requests)
        return await asyncio.wait_for(asyncio.gather(*every), 4 * PATIENCE)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def every_client_gets_what_it_would_get_alone_and_no_page_is_lost_test(
    tiny, count, monkeypatch, hold_steps
):
    departures, requeue = [], Scheduler._requeue
    monkeypatch.setattr(
        Scheduler,
        "_requeue",
        lambda scheduler, request: (departures.append(request.id), requeue(scheduler, request)),
    )
    requests, crowded = list(some_requests(count)), []
    with serving(tiny, make_engine(tiny), queue_size=count) as live:

        def few_are_there():
            if len(live.engine.unfinished) > 5:
                crowded.append(True)
            return not crowded

        hold_steps(few_are_there)
        texts = asyncio.run(ask_all(f"{live.url}/completions", requests))
        metrics = live.wait_until_idle()
        assert live.pages == PAGES
    assert departures  # the pool was too small for all
    stayed = [
        (body, text) for (body, leaves), text in zip(requests, texts, strict=True) if leaves is None
    ]
    assert len(stayed) > count / 3 and all(isinstance(text, str) for _, text in stayed)
    alone = make_engine(tiny)
    for body, text in stayed:
        params = SamplingParams(
            body["max_tokens"],
            temperature=float(body["temperature"]),
            seed=body["seed"],
            ignore_eos=True,
        )
        [expected] = alone.generate([body["prompt"]], params)
        assert text == expected.text, body
    if count == 200:
        assert 'dmc_sequences_ended_total{reason="cancelled"}' in metrics


def who_finds_the_queue_full_is_told_to_come_again_test(tiny, hold_steps):
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 2, "seed": 1, "n": 3}
    refused = []
    hold_steps(lambda: len(refused) < 5)

    async def crowd(url):
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            for answer in asyncio.as_completed([client.post(url, json=body) for _ in range(6)]):
                refused.append(await answer)
        return refused.pop()

    with serving(tiny, make_engine(tiny), queue_size=1) as live:
        answer = asyncio.run(crowd(f"{live.url}/completions"))
        live.wait_until_idle()
    assert answer.status_code == 200
    for one in refused:
        assert one.status_code == 429 and one.headers["retry-after"] == "1"
        assert "try again later" in one.json()["error"]["message"]
