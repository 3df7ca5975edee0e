"""How a server does under load: requests and tokens a second, and how long clients wait for each.

    python -m benchmarks.serve --checkpoint=MODEL --gates=smollm2_135m_dms
    python -m benchmarks.serve --against=other=http://127.0.0.1:9000/v1
    python -m benchmarks.serve --checkpoint=MODEL --gates=... --prefix=4000 --requests=64
    python -m benchmarks.serve --checkpoint=MODEL --gates=... --long=25000

Starts `python -m dmc_jax.serve` for a checkpoint, dense and with its gates at 4x, and asks each as
32 and as 128 clients, every one of which sends its next request when it has the last one's answer.
`--against` asks a server that runs already, of any make. All get the same prompts, pieces of
Python's library, whose lengths are log-uniform, as streams of greedy text. Every server is asked
as many at once before it is measured, so that nothing is left to compile; for other pieces, so that
nobody has read before what is measured.

With `--prefix` all prompts begin with as many characters alike, and our servers come with and
without a prefix cache. With `--long` it is about those whose text runs while a prompt of so many
characters is read: how long they wait for each part then, and before, in chunks of two sizes.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import numpy as np

from dmc_jax.evaluation.machine import machine

CLIENTS, RATIO = (32, 128), 4
CHUNKS = (512, 64)  # tokens of a prompt that are read between two of others
PROMPTS, NEW = (64, 2000), (16, 64)  # characters and tokens, least and most
PATIENCE = 600.0  # seconds that an answer may take
QUIET, TALKERS = 20.0, 4  # seconds before the long prompt comes, and who talks meanwhile
TALK = (1000, 256)  # characters of what they ask, and tokens of the answer


class Answer(NamedTuple):
    """When the parts of one came, in seconds from the request, and what they were."""

    parts: list[float]
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0  # of the prompt


def workload(requests: int, prefix: int = 0, seed: int = 0) -> list[dict]:
    """Bodies of requests, but for the model.

    Args:
        requests: their number.
        prefix: characters that all prompts begin with alike.
        seed: of the choice of pieces.
    """
    text = _library()
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(*np.log(PROMPTS), requests)).astype(int)
    begins = rng.integers(prefix, len(text) - PROMPTS[1], requests)
    return [
        {
            "prompt": text[:prefix] + text[begin : begin + length],
            "max_tokens": int(new),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for begin, length, new in zip(
            begins, lengths, rng.integers(NEW[0], NEW[1] + 1, requests), strict=True
        )
    ]


def _library() -> str:
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "datetime", "inspect", "pathlib", "typing", "subprocess")
    return "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)


async def ask(client: httpx.AsyncClient, url: str, body: dict) -> Answer:
    """Sends a request and reads its stream to the end."""
    start, parts, usage = time.perf_counter(), [], {}
    async with client.stream("POST", f"{url}/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{url}: {answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                raise SystemExit(f"{url}: {part['error']}")
            usage = part.get("usage") or usage
            if any(choice.get("text") for choice in part["choices"]):
                parts.append(time.perf_counter() - start)
    # A server that counts no tokens sends one in each part.
    new = usage.get("completion_tokens", len(parts))
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Answer(parts, usage.get("prompt_tokens", 0), new, cached)


async def ask_all(url: str, model: str, bodies: list[dict], clients: int, key: str | None):
    """All answers, and how long they took together, where so many clients take turns."""
    waiting, answers = list(reversed(bodies)), []
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)

    async def work(client):
        while waiting:
            answers.append(await ask(client, url, {"model": model, **waiting.pop()}))

    async with httpx.AsyncClient(timeout=PATIENCE, limits=limits, headers=headers) as client:
        start = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        return answers, time.perf_counter() - start


def measure(url: str, model: str, bodies: list[dict], clients: int, key: str | None = None) -> dict:
    """Asks a server and sums up."""
    answers, seconds = asyncio.run(ask_all(url, model, bodies, clients, key))
    gaps = [b - a for one in answers for a, b in zip(one.parts, one.parts[1:], strict=False)]
    new = sum(one.new_tokens for one in answers)
    return {
        "clients": clients,
        "requests": len(answers),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(answers) / seconds, 3),
        "prompt_tokens": sum(one.prompt_tokens for one in answers),
        "cached_tokens": sum(one.cached_tokens for one in answers),
        "new_tokens": new,
        "new_tokens_per_second": round(new / seconds, 2),
        "first_token_seconds": _spread([one.parts[0] for one in answers if one.parts]),
        "between_parts_seconds": _spread(gaps),
    }


async def ask_beside(url: str, model: str, characters: int, clients: int, key: str | None) -> dict:
    """Times of some clients' parts before and while a long prompt of another is read."""
    [body] = workload(1)
    body |= {"model": model, "ignore_eos": True}
    text, parts, done = _library(), [], False
    headers = {"authorization": f"Bearer {key}"} if key else {}

    async def talk(client, number):
        while not done:
            prompt = text[number * TALK[0] :][: TALK[0]]
            asked, start = body | {"prompt": prompt, "max_tokens": TALK[1]}, time.perf_counter()
            answer = await ask(client, url, asked)
            times = [start + part for part in answer.parts]
            parts.extend(itertools.pairwise(times))

    async with httpx.AsyncClient(timeout=PATIENCE, headers=headers) as client:
        talks = [asyncio.create_task(talk(client, number)) for number in range(clients)]
        await asyncio.sleep(QUIET)
        begin = time.perf_counter()
        long = await ask(client, url, body | {"prompt": text[-characters:], "max_tokens": 1})
        end, done = time.perf_counter(), True
        await asyncio.gather(*talks)
    gaps = {
        "before": [b - a for a, b in parts if b < begin],
        "while_it_is_read": [b - a for a, b in parts if begin < b < end],
    }
    return {
        "clients": clients,
        "long_prompt_tokens": long.prompt_tokens,
        "its_first_token_seconds": round(end - begin, 3),
        "between_parts_seconds": {name: _spread(each) for name, each in gaps.items()},
        "parts": {name: len(each) for name, each in gaps.items()},
    }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {name: round(float(np.quantile(seconds, q)), 4) for name, q in _QUANTILES}


_QUANTILES = (("p50", 0.5), ("p99", 0.99))


@contextlib.contextmanager
def started(flags: list[str]) -> Iterator[tuple[str, str]]:
    """Our server with some flags: its address and its model's name."""
    command = [sys.executable, "-m", "dmc_jax.serve", "--port=0"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as server:
        try:
            words = server.stdout.readline().split()
            if not words:
                raise SystemExit(f"the server did not start with {' '.join(flags)}")
            yield words[-1], words[1]
        finally:
            server.terminate()


def model_of(url: str) -> str:
    """The name of the first model that a server lists."""
    return httpx.get(f"{url}/models", timeout=PATIENCE).json()["data"][0]["id"]


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="to serve, dense and with its gates")
    parser.add_argument("--gates", help="of the checkpoint")
    parser.add_argument("--against", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prefix", type=int, default=0, help="characters that prompts share")
    parser.add_argument(
        "--long", type=int, default=0, help="characters of one prompt beside others"
    )
    parser.add_argument("--kv_bytes", default="1GiB", help="of our servers")
    parser.add_argument("--output", type=pathlib.Path, default=None)
    options = parser.parse_args()
    results = {}

    def run(name, url, model):
        if options.long:
            for _ in range(2):  # the first one compiles
                asked = ask_beside(url, model, options.long, TALKERS, None)
                results[name] = asyncio.run(asked)
        else:
            results[name] = []
            for seed, count in enumerate(options.clients):
                warm = workload(max(count, options.requests // 4), options.prefix, seed + 1000)
                measure(url, model, warm, count)
                bodies = workload(options.requests, options.prefix, seed)
                results[name].append(measure(url, model, bodies, count))
        print(name, json.dumps(results[name], indent=1), flush=True)

    for name, flags in _sides(options).items():
        with started(flags) as (url, model):
            run(name, url, model)
    for name, url in (one.split("=", 1) for one in options.against):
        run(name, url, model_of(url))
    output = options.output or pathlib.Path(__file__).with_name("serve_cpu.json")
    about = {
        "measures": "a server under load: each client sends its next request with the last answer",
        "machine": machine("python -m benchmarks.serve"),
        "model": pathlib.Path(options.checkpoint).name if options.checkpoint else None,
        "prompt_characters": PROMPTS,
        "shared_characters": options.prefix,
        "long_prompt_characters": options.long,
        "new_tokens_at_most": NEW,
    }
    output.write_text(json.dumps(about | {"servers": results}, indent=2) + "\n")
    print(f"wrote {output}")


def _sides(options: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of each of our servers."""
    if not options.checkpoint:
        return {}
    ours = [f"--checkpoint={options.checkpoint}", f"--kv_bytes={options.kv_bytes}"]
    ours += [f"--queue={max(options.clients)}"]
    sides = {"dense": [*ours, "--policy=dense"]}
    if options.gates:
        sides[f"{RATIO}x"] = [*ours, f"--gates={options.gates}", f"--ratio={RATIO}"]
    more = {}
    if options.prefix:
        more = {", without a prefix cache": "--noprefix_cache"}
    if options.long:
        more = {f", chunks of {chunk}": f"--chunk={chunk}" for chunk in CHUNKS}
    several = {
        name + how: [*flags, flag] for name, flags in sides.items() for how, flag in more.items()
    }
    return several if options.long else sides | several


if __name__ == "__main__":
    main()
