"""Answers in the shapes of OpenAI's API: whole, or in the parts of a stream."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.inference.requests import Event, Result
from dmc_jax.inference.sampling import TokenLogprob
from dmc_jax.serving.engine_thread import Job
from dmc_jax.serving.protocol import ApiError, Asked

_END = b"data: [DONE]\n\n"
_BROKEN = "\ufffd"  # what a token of part of a character decodes to


def as_json(value: Any) -> bytes:
    """Write JSON in ASCII: a client's half surrogate in a message is no text in UTF-8."""
    return json.dumps(value).encode()


class Reply:
    """What is said of one request."""

    def __init__(self, asked: Asked, job: Job, model: str, tokenizer: Tokenizer):
        """Begin an answer.

        Args:
            asked: the request.
            job: its sequences, the choices of the first prompt before those of the next.
            model: its name.
            tokenizer: names tokens whose log-probabilities are reported.
        """
        self._asked, self._job, self._tokenizer = asked, job, tokenizer
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._about = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._about["model"] = model
        self._before = tokenizer.encode("a") if asked.params.logprobs is not None else []

    async def whole(self) -> dict[str, Any]:
        """Wait for all choices and make one answer of them.

        Raises:
            ApiError: the engine could not finish them.
        """
        logprobs = [[] for _ in range(self._job.size)]
        results: dict[int, Result] = {}
        async for place, event in self._job.events():
            logprobs[place] += _pairs(event)
            if event.finish_reason:
                results[place] = event.result
        choices = []
        for place, pairs in enumerate(logprobs):
            text, reason = results[place].text, _reason(results[place])
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            said = said if self._asked.chat else {"text": text}
            about = {"logprobs": self._logprobs(pairs, 0), "finish_reason": reason}
            choices.append({"index": place, **said, **about})
        kind = "chat.completion" if self._asked.chat else "text_completion"
        usage = self._usage(list(results.values()))
        return {**self._about, "object": kind, "choices": choices, "usage": usage}

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events: text as it is certain, an end for each choice, usage if asked.

        What the engine could not finish ends with an error instead.
        """
        results, written = [], [0] * self._job.size
        try:
            for place in range(self._job.size) if self._asked.chat else ():
                yield self._chunk(place, {"delta": {"role": "assistant", "content": ""}})
            async for place, event in self._job.events():
                pairs = _pairs(event)
                reason = None
                if event.finish_reason:
                    reason = _reason(event.result)
                    results.append(event.result)
                if not (event.text or pairs or reason):
                    continue
                delta = {"content": event.text} if event.text or not reason else {}
                said = {"delta": delta} if self._asked.chat else {"text": event.text}
                said["logprobs"] = self._logprobs(pairs, written[place])
                written[place] += sum(len(self._name(token)) for token, _ in pairs)
                yield self._chunk(place, said, reason)
            if self._asked.include_usage:
                yield self._part([], self._usage(results))
            yield _END
        except ApiError as error:
            yield b"data: " + as_json(error.body()) + b"\n\n"

    def _chunk(self, place: int, said: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": place, "logprobs": None, "finish_reason": reason} | said
        return self._part([choice], None)

    def _part(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        part = {**self._about, "object": kind, "choices": choices}
        part |= {"usage": usage} if self._asked.include_usage else {}
        return b"data: " + as_json(part) + b"\n\n"

    def _usage(self, results: Sequence[Result]) -> dict[str, Any]:
        # Choices share their prompt, which thus counts once.
        prompt = sum(result.prompt_tokens for result in results) // self._asked.choices
        cached = sum(result.cached_tokens for result in results) // self._asked.choices
        new = sum(result.new_tokens for result in results)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "compression": {  # ours
                "tokens_per_slot": tokens_per_slot(results),
                "cache_bytes": sum(result.live_cache_bytes for result in results),
                "dense_cache_bytes": sum(result.dense_cache_bytes for result in results),
            },
        }

    # ---- log-probabilities --------------------------------------------------------------------

    def _logprobs(
        self, pairs: Sequence[tuple[int, TokenLogprob]], begin: int
    ) -> dict[str, Any] | None:
        """Name tokens and say how likely they were; the first begins at a character of the text."""
        if self._asked.params.logprobs is None:
            return None
        if self._asked.chat:
            content = [
                self._entry(token, one.logprob)
                | {"top_logprobs": [self._entry(*likely) for likely in one.likely]}
                for token, one in pairs
            ]
            return {"content": content, "refusal": None}
        names = [self._name(token) for token, _ in pairs]
        return {
            "tokens": names,
            "token_logprobs": [one.logprob for _, one in pairs],
            "top_logprobs": [
                {self._name(token): logprob for token, logprob in one.likely} for _, one in pairs
            ],
            "text_offset": [begin + sum(map(len, names[:n])) for n in range(len(names))],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._name(token)
        known = None if _BROKEN in name else list(name.encode())
        return {"token": name, "logprob": logprob, "bytes": known}

    def _name(self, token: int) -> str:
        """A token's text within another one; a special token's name."""
        text = self._tokenizer.decode([*self._before, token])[1:]
        tells = getattr(self._tokenizer, "name_of", None)
        return text or (tells and tells(token)) or ""


def tokens_per_slot(results: Sequence[Result]) -> float | None:
    """Average the compression ratio over what sequences hold; None if they hold nothing."""
    begun = [result for result in results if result.ratio is not None]
    tokens = [result.prompt_tokens + result.new_tokens for result in begun]
    slots = sum(n / result.ratio for n, result in zip(tokens, begun, strict=True))
    return sum(tokens) / slots if slots else None


def _pairs(event: Event) -> list[tuple[int, TokenLogprob]]:
    return list(zip(event.tokens, event.logprobs or (), strict=event.logprobs is not None))


def _reason(result: Result) -> str:
    """Why a text ends, as OpenAI has it."""
    if result.finish_reason == "pages" and not result.new_tokens:
        raise ApiError(
            400,
            f"the whole cache is too small for a prompt of {result.prompt_tokens} tokens",
            code="context_length_exceeded",
        )
    return "stop" if result.finish_reason == "stop" else "length"
