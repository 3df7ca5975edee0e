"""Let a model write: `python -m dmc_jax.decode --prompt="def main("`.

Prints the prompt and what follows as it comes, then what it took. `--prompts=F.jsonl` continues
many at a time, as many as `--kv_bytes` holds; a prompt that cannot be is named, and the others are
continued. Ctrl-C ends with what there is after the present step, a second one at once. Exit codes:
0 done, 2 bad input or flags (one prompt of many is enough), 1 a failure, 130 Ctrl-C.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging

from dmc_jax import commands
from dmc_jax.data.chat import encode_chat
from dmc_jax.data.tokenizer import encode_prompt
from dmc_jax.errors import UserError
from dmc_jax.inference import compiling
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.engine_flags import EngineFlags
from dmc_jax.inference.output import EXISTING, Output, as_json, check_output, results_file
from dmc_jax.inference.prompts import PromptLine, read_prompts, read_text
from dmc_jax.inference.requests import Event, Result, check_text
from dmc_jax.inference.sampling import SamplingParams

_INTERRUPTED = 130  # the exit code
_MOST_SEQUENCES = 64  # at a time; the bytes of the cache are the limit that counts

_ENGINE = EngineFlags()
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; may be empty.")
_PROMPT_FILE = flags.DEFINE(commands.PATH, "prompt_file", None, "File whose text is the prompt.")
_PROMPTS = flags.DEFINE(
    commands.PATH,
    "prompts",
    None,
    'JSON Lines, - for standard input: strings, or objects with a "prompt" (a text, or a list of '
    'token ids) or "messages" (for the model\'s chat template), and fields of SamplingParams, such '
    'as "temperature" or "ratio".',
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to write at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from that many likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likely tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the output; may be given again.")
_STREAM = flags.DEFINE_bool("stream", True, "Show a single prompt's text as it is made.")
_SPECIAL_TOKENS = flags.DEFINE_bool(
    "special_tokens", False, "Take special tokens that a text spells, such as </s>, as such."
)
_JSON = flags.DEFINE_bool("json", False, "Print a JSON object per prompt, and nothing else.")
_OUTPUT = flags.DEFINE(commands.PATH, "output", None, "File for these objects, one a line.")
_EXISTING = flags.DEFINE_enum(
    "existing",
    EXISTING[0],
    EXISTING,
    "What to do with an --output that is there; it is replaced once the new one is complete.",
)


def main() -> int:
    """Write what the flags ask for."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    output, lines = _output(), _prompts()
    compiling.keep_programs()
    compiling.show_compiling()
    model = _ENGINE.find()
    engine = _ENGINE.engine(model, min(len(lines), _MOST_SEQUENCES))
    ask = functools.partial(_ask, engine, _ENGINE.tokenizer(model))
    with results_file(output) as write:
        code = _decode(engine, lines, ask, write)
        if code == _INTERRUPTED and output and output.path.exists() and not output.is_stream:
            commands.show_notes([f"{output.path} stays; what there is is in {output.partial}"])
            raise KeyboardInterrupt
    return code


def _decode(
    engine: Engine,
    lines: list[PromptLine],
    ask: Callable[[PromptLine], int],
    write: Callable[[int, str], None],
) -> int:
    """Continue the prompts, show and write what comes of them; the exit code."""
    # Text comes as it is made where there is one prompt; that of several would be mingled.
    live = len(lines) == 1 and _STREAM.value and not _JSON.value
    sequences, results = _submit(lines, ask, write), []

    def show(event: Event) -> None:
        index = sequences[event.sequence]
        line = lines[index]
        if event.finish_reason:
            results.append(event.result)
            write(index, as_json(index, line, event.result, None, ascii_only=False))
        if live:
            print(event.text, end="", flush=True)
        elif event.finish_reason and _JSON.value:
            print(as_json(index, line, event.result, None, ascii_only=_ascii_only()), flush=True)
        elif event.finish_reason:
            print(f"[{index}] {_shown(engine, line)}{event.result.text}\n", flush=True)

    started = compiling.working_seconds()
    asked = _run(engine, _shown(engine, lines[0]) if live and sequences else "", show)
    if not _JSON.value and results:
        print(_summary(results, compiling.working_seconds() - started))
    if asked:
        return _INTERRUPTED
    return 0 if len(sequences) == len(lines) else 2


def _submit(
    lines: list[PromptLine], ask: Callable[[PromptLine], int], write: Callable[[int, str], None]
) -> dict[int, int]:
    """Queue all prompts that can be, say what is wrong with the others: indices by sequence."""
    sequences = {}
    for index, line in enumerate(lines):
        error = line.error
        if error is None:
            try:
                sequences[ask(line)] = index
                continue
            except UserError as refused:
                if line.line is None:  # the only one
                    raise
                error = f"line {line.line}: {refused}"
        write(index, as_json(index, line, None, error, ascii_only=False))
        print(f"error: {_PROMPTS.value}, {error}", file=sys.stderr)
        if _JSON.value:
            print(as_json(index, line, None, error, ascii_only=_ascii_only()), flush=True)
    return sequences


def _run(engine: Engine, opening: str, show: Callable[[Event], None]) -> bool:
    """Continue all sequences, or until Ctrl-C asks to stop: whether it did."""
    # Between two steps only: an interrupt in the middle of one can get lost in JAX's callbacks.
    with commands.stop_requests("ending after this step") as asked:
        print(opening, end="", flush=True)
        while engine.unfinished:
            for sequence in engine.unfinished if asked else ():
                engine.cancel(sequence)
            for event in engine.step():
                show(event)
    return bool(asked)


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
        check_text(_PROMPT.value)  # bytes of a command line need not be a text
        return [PromptLine(_PROMPT.value, params)]
    return [PromptLine(read_text(_PROMPT_FILE.value, "the prompt"), params)]


def _output() -> Output | None:
    if _OUTPUT.value is None:
        return None
    inputs = [name for name in (_PROMPTS.value, _PROMPT_FILE.value) if name is not None]
    return check_output(_OUTPUT.value, _EXISTING.value, inputs)


def _ask(engine: Engine, tokenizer: Path, line: PromptLine) -> int:
    """Submit a prompt; the id of its sequence."""
    prompt = line.prompt
    if line.messages is not None:
        prompt = encode_chat(engine.tokenizer, tokenizer, line.messages)
    elif _SPECIAL_TOKENS.value and isinstance(prompt, str):
        prompt = encode_prompt(engine.tokenizer, prompt, special=True)
    return engine.submit(prompt, line.params)


def _shown(engine: Engine, line: PromptLine) -> str:
    """The text of a prompt; of a chat, its last message."""
    if line.messages is not None:
        return f"{line.messages[-1].get('content')}\n"
    return line.prompt if isinstance(line.prompt, str) else engine.tokenizer.decode(line.prompt)


def _ascii_only() -> bool:
    """Whether standard output, such as a pipe in the C locale, takes no other characters."""
    return not (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def _summary(results: list[Result], seconds: float) -> str:
    new = sum(result.new_tokens for result in results)
    begun = [result for result in results if result.ratio is not None]
    first = min((result.seconds_to_first_token for result in begun), default=0.0)
    read = [result.prompt_tokens + result.new_tokens - 1 for result in begun]
    slots = sum(tokens / result.ratio for tokens, result in zip(read, begun, strict=True))
    live = sum(result.live_cache_bytes for result in results)
    peak = sum(result.peak_cache_bytes for result in results)
    at_most = f" ({peak:,} before prompts were cut)" if peak > live else ""
    dense = sum(result.dense_cache_bytes for result in results)
    # One sequence's rate is from its first token on; that of many is over all that they took.
    rate = results[0].tokens_per_second if len(results) == 1 else new / seconds
    return (
        f"\n\ncompiling took {compiling.compile_seconds():.2f} s\n\n"
        f"{sum(result.prompt_tokens for result in results)} prompt tokens, {new} new; first "
        f"token after {first:.2f} s, {rate:.1f} tokens/s; {sum(read) / slots if slots else 1:.2f} "
        f"tokens per slot: {live:,} bytes of cache in use{at_most}, dense {dense:,}"
    )


if __name__ == "__main__":
    commands.run(main)
