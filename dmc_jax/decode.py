"""Let a model write: `python -m dmc_jax.decode --prompt="def main("`.

Prints the prompt and what follows as it comes, then what it took. `--prompts=F.jsonl` continues
many at a time, as many as `--kv_bytes` holds. Ctrl-C ends with what there is after the present
step, a second one at once. Exit codes: 0 done, 2 bad input or flags, 1 a failure, 130 Ctrl-C.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging

from dmc_jax import commands
from dmc_jax.checkpoints.models import find_model
from dmc_jax.errors import UserError
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.prompts import PromptLine, parse_bytes, read_prompts
from dmc_jax.inference.requests import Event, Result
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.policies.choice import POLICIES

_DEMO_RUN = Path("runs/tiny_4x")  # what `make demo` makes
_MOST_SEQUENCES = 64  # at a time; the bytes of the cache are the limit that counts

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A run's directory, a stage of it, a step, or the folder of a Hugging Face, Meta or Megatron "
    "checkpoint; default: the run of `make demo`.",
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; may be empty.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File whose text is the prompt.")
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    'JSON Lines, - for standard input: strings, or objects with a "prompt" and sampling fields.',
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to write at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from that many likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likely tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the output; may be given again.")
_STREAM = flags.DEFINE_bool("stream", True, "Show a single prompt's text as it is made.")
_KV_BYTES = flags.DEFINE_string("kv_bytes", "2GiB", "Keys and values in the cache, at most.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Slots per page: 8, 16, 32, ...")
_WINDOW = flags.DEFINE_integer(
    "window", None, "Merge window in tokens, 0: unlimited; default: that of training."
)
_POLICY = flags.DEFINE_enum(
    "policy", None, list(POLICIES), "What the cache keeps; default: what the model was trained for."
)
_BUDGET = flags.DEFINE_integer("budget", None, "Slots of a row, with --policy=tova.")
_JSON = flags.DEFINE_bool("json", False, "Print a JSON object per prompt, and nothing else.")
_OUTPUT = flags.DEFINE_string("output", None, "File for these objects, one a line.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Its file, where it did not come along or is no longer where it was."
)


def main() -> int:
    """Write what the flags ask for."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    lines = _prompts()
    with _output_file() as output:
        model = find_model(_checkpoint())
        commands.show_notes(model.notes)
        engine = Engine.from_checkpoint(
            model,
            kv_bytes=parse_bytes(_KV_BYTES.value),
            max_sequences=min(len(lines), _MOST_SEQUENCES),
            policy=_POLICY.value,
            tokenizer=_TOKENIZER.value,
            page_size=_PAGE_SIZE.value,
            window=_WINDOW.value,
            budget=_BUDGET.value,
        )
        for line in lines:
            engine.submit(line.prompt, line.params)  # ids count from 0, as the lines
        started = time.perf_counter()
        # Text comes as it is made where there is one prompt; that of several would be mingled.
        live = len(lines) == 1 and _STREAM.value and not _JSON.value
        opening = lines[0].prompt if live else ""
        results, code = _run(engine, opening, lambda event: _show(event, lines, live))
        for sequence in sorted(results) if output else ():
            print(_as_json(sequence, lines[sequence], results[sequence]), file=output)
    if not _JSON.value:
        print(_summary(list(results.values()), time.perf_counter() - started))
    return code


def _run(
    engine: Engine, opening: str, show: Callable[[Event], None]
) -> tuple[dict[int, Result], int]:
    """The results of all sequences, cut short by Ctrl-C, and the exit code."""
    results = {}
    # Between two steps only: an interrupt in the middle of one can get lost in JAX's callbacks.
    with commands.stop_requests("ending after this step") as asked:
        print(opening, end="", flush=True)
        while engine.unfinished:
            for sequence in engine.unfinished if asked else ():
                engine.cancel(sequence)
            for event in engine.step():
                show(event)
                if event.finish_reason:
                    results[event.sequence] = event.result
    return results, 130 if asked else 0


def _prompts() -> list[PromptLine]:
    given = [flag for flag in (_PROMPT, _PROMPT_FILE, _PROMPTS) if flag.value is not None]
    if len(given) != 1:
        raise UserError("give one of --prompt, --prompt_file and --prompts")
    params = SamplingParams(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stop=tuple(_STOP.value),
    )
    if _PROMPTS.value is not None:
        return read_prompts(_PROMPTS.value, params)
    if _PROMPT.value is not None:
        return [PromptLine(_PROMPT.value, params)]
    try:
        return [PromptLine(Path(_PROMPT_FILE.value).read_text(encoding="utf-8"), params)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompt_file={_PROMPT_FILE.value}: {error}") from error


def _checkpoint() -> str | Path:
    if _CHECKPOINT.value is None and not _DEMO_RUN.is_dir():
        raise UserError(
            f"no --checkpoint, and no run of the demo in {_DEMO_RUN}: `make demo` makes one"
        )
    return _CHECKPOINT.value or _DEMO_RUN


def _output_file() -> contextlib.AbstractContextManager:
    """Opened before the work, which a bad name would lose."""
    if _OUTPUT.value is None:
        return contextlib.nullcontext()
    try:
        return open(_OUTPUT.value, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --output={_OUTPUT.value}: {error}") from error


def _show(event: Event, lines: list[PromptLine], live: bool) -> None:
    line = lines[event.sequence]
    if live:
        print(event.text, end="", flush=True)
    elif event.finish_reason and _JSON.value:
        print(_as_json(event.sequence, line, event.result), flush=True)
    elif event.finish_reason:
        print(f"[{event.sequence}] {line.prompt}{event.result.text}\n", flush=True)


def _as_json(number: int, line: PromptLine, result: Result) -> str:
    return json.dumps(
        {"index": number, "prompt": line.prompt, **dataclasses.asdict(result)}, ensure_ascii=False
    )


def _summary(results: list[Result], seconds: float) -> str:
    new = sum(result.new_tokens for result in results)
    begun = [result for result in results if result.ratio is not None]
    first = min((result.seconds_to_first_token for result in begun), default=0.0)
    read = [result.prompt_tokens + result.new_tokens - 1 for result in begun]
    slots = sum(tokens / result.ratio for tokens, result in zip(read, begun, strict=True))
    live = sum(result.live_cache_bytes for result in results)
    dense = sum(result.dense_cache_bytes for result in results)
    # One sequence's rate is from its first token on; that of many is over all that they took.
    rate = results[0].tokens_per_second if len(results) == 1 else new / seconds
    return (
        f"\n\n{sum(result.prompt_tokens for result in results)} prompt tokens, {new} new; first "
        f"token after {first:.2f} s, {rate:.1f} tokens/s; {sum(read) / slots if slots else 1:.2f} "
        f"tokens per slot: {live:,} bytes of cache in use, dense {dense:,}"
    )


if __name__ == "__main__":
    commands.run(main)
