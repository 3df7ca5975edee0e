"""`python -m dmc_jax.serve`: a process that clients find, and that ends well."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.doors import runs_of
from tests.serving.live import PATIENCE, save_checkpoint

ROOT = Path(__file__).parents[1]
KEY, SECRET = "s3cret-key", "abba XYZZY"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def under_load_sigterm_lets_what_was_accepted_finish_test(checkpoint):
    command = [sys.executable, "-W", "error", "-m", "dmc_jax.serve", f"--checkpoint={checkpoint}"]
    with subprocess.Popen(
        [*command, "--port=0", "--max_sequences=2", f"--drain_seconds={PATIENCE}"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "DMC_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        watchdog = threading.Timer(3 * PATIENCE, server.kill)
        watchdog.start()
        try:
            line = server.stdout.readline()
            assert line.startswith("serving tiny at http://127.0.0.1:"), server.stderr.read()
            answers = asked_until_sigterm(line.split()[-1], server)
            _, log = server.communicate()
        finally:
            watchdog.cancel()
            server.kill()
    assert server.returncode == 0, log
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [40] * 4
    assert "POST /v1/completions 200" in log and "Traceback" not in log
    assert SECRET not in log and KEY not in log


def asked_until_sigterm(url, server):
    """What four clients hear, where the server is told to end once the first has a token."""
    body = {"model": "tiny", "prompt": SECRET, "max_tokens": 40, "ignore_eos": True}
    headers, answers = {"authorization": f"Bearer {KEY}"}, []

    def post():
        options = {"headers": headers, "timeout": 2 * PATIENCE}
        answers.append(httpx.post(f"{url}/completions", json=body, **options).json())

    threads = [threading.Thread(target=post) for _ in range(3)]
    with httpx.stream(
        "POST",
        f"{url}/completions",
        json=body | {"stream": True, "stream_options": {"include_usage": True}},
        headers=headers,
        timeout=2 * PATIENCE,
    ) as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        for thread in threads:
            thread.start()
        wait_for_clients(4, url.replace("/v1", "/metrics"), headers)
        server.send_signal(signal.SIGTERM)
        *_, usage, done = lines
    assert done == "data: [DONE]"
    for thread in threads:
        thread.join(2 * PATIENCE)
    return [*answers, json.loads(usage.removeprefix("data: "))]


def wait_for_clients(count, metrics, headers):
    """Until the server has taken all of them."""
    until, taken = time.monotonic() + PATIENCE, f"dmc_sequences_accepted_total {float(count)}\n"
    while taken not in httpx.get(metrics, headers=headers, timeout=PATIENCE).text:
        assert time.monotonic() < until


def what_it_cannot_serve_with_is_said_in_a_line_test(checkpoint, tmp_path):
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        common = f"--checkpoint={checkpoint}"
        missing, empty, busy, strange = runs_of(
            "serve",
            [common, f"--api_key_file={tmp_path / 'none'}"],
            [common, f"--api_key_file={tmp_path / 'empty'}"],
            [common, f"--port={port}"],
            [common, "--port=99999"],
        )
    assert [run.returncode for run in (missing, empty, busy, strange)] == [2, 2, 1, 2]
    assert "none cannot be read: FileNotFoundError" in missing.stderr
    assert "has no key" in empty.stderr
    assert f"cannot listen on 127.0.0.1, port {port}" in busy.stderr
    for run in (missing, empty, busy, strange):
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
