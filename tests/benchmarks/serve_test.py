"""The load generator counts what a server has said."""

import asyncio
import json
import sys

import pytest

from benchmarks import serve
from tests.serving.live import MODEL, make_engine, make_tiny, serving


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"))
    with serving(tiny, make_engine(tiny), queue_size=16) as live:
        yield live


@pytest.fixture
def short(monkeypatch):
    """Prompts and texts that a tiny model has room for."""
    monkeypatch.setattr(serve, "PROMPTS", (4, 12))
    monkeypatch.setattr(serve, "NEW", (2, 4))


def every_request_is_answered_and_counted_test(live, short):
    bodies = serve.workload(7, prefix=3)
    assert serve.workload(7, prefix=3) == bodies
    assert len({body["prompt"][:3] for body in bodies}) == 1
    assert len({body["prompt"] for body in bodies}) == 7
    found = serve.measure(live.url, MODEL, bodies, clients=3)
    assert (found["requests"], found["clients"]) == (7, 3)
    assert 7 <= found["new_tokens"] <= sum(body["max_tokens"] for body in bodies)
    assert found["prompt_tokens"] > 7 * 4
    assert found["first_token_seconds"]["p99"] >= found["first_token_seconds"]["p50"] > 0
    assert found["between_parts_seconds"]["p99"] >= found["between_parts_seconds"]["p50"] >= 0
    with pytest.raises(SystemExit, match="there is no model 'other'"):
        serve.measure(live.url, "other", bodies, clients=1)


def a_server_of_any_make_is_measured_by_its_address_test(live, short, monkeypatch, tmp_path):
    output = tmp_path / "serve.json"
    flags = [f"--against=any={live.url}", "--clients", "1", "2", "--requests=4"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags, f"--output={output}"])
    serve.main()
    written = json.loads(output.read_text())
    assert [one["clients"] for one in written["servers"]["any"]] == [1, 2]
    assert [one["requests"] for one in written["servers"]["any"]] == [4, 4]
    assert written["prompt_characters"] == [4, 12]


def those_who_talk_while_a_long_prompt_is_read_are_timed_test(live, monkeypatch):
    monkeypatch.setattr(serve, "QUIET", 0.5)
    monkeypatch.setattr(serve, "TALK", (12, 20))
    found = asyncio.run(serve.ask_beside(live.url, MODEL, 40, clients=2, key=None))
    assert found["clients"] == 2 and found["long_prompt_tokens"] >= 40
    assert found["parts"]["before"] > 4
    spread = found["between_parts_seconds"]["before"]
    assert spread["p99"] >= spread["p50"] > 0
    assert found["its_first_token_seconds"] > 0
