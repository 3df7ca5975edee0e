"""A conversation whose cache is kept between turns: only what is new of a turn is read.

A reply is stopped here and not by the engine, so that its sequence can be kept: a snapshot of it,
which the next turn goes on from where the chat template's text goes on from the last one's.
"""

import dataclasses
from collections.abc import Iterator

from dmc_jax.data.chat import Render
from dmc_jax.data.tokenizer import end_ids
from dmc_jax.errors import UserError
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.requests import Result
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.snapshot import Snapshot


class Conversation:
    """What was said, and the cache that holds it.

    Attributes:
        messages: objects with role and content, so far.
        result: of the last reply, for its bytes; None before the first.
        read: tokens that the last turn read, those of its reply aside.
        note: why the last turn was read from the beginning though something was held; or None.
    """

    def __init__(
        self, engine: Engine, render: Render, params: SamplingParams, system: str | None = None
    ):
        """Begin.

        Args:
            engine: that nobody else uses.
            render: a conversation to its text, up to where the answer begins.
            params: of replies; `max_new_tokens` is that of each.
            system: what a message from the system says first; None: there is none.
        """
        self._engine, self._render, self._params = engine, render, params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all but what the system says."""
        self.messages, self.result = list(self._system), None
        self.read, self.note = 0, None
        self._held: Snapshot | None = None
        self._text, self._ids = "", []  # that the messages have come to

    def say(self, text: str) -> Iterator[str]:
        """Yield the reply as it comes, with empty parts while there is none.

        Whoever closes the iterator stops the reply: what there is of it counts as said.

        Args:
            text: of the user.

        Raises:
            UserError: the template has no text for it, or there is no room for it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            rendered = self._render(messages)
        except ValueError as error:
            raise UserError(f"messages: {error}") from None
        prompt, held = self._prompt(rendered)
        room = self._engine.max_length - len(prompt)
        if room < 2:
            raise UserError(
                f"the conversation has {len(prompt)} tokens with this, and there is room for "
                f"{self._engine.max_length}"
            )
        # One more than it may say, so that the engine does not end it.
        params = dataclasses.replace(
            self._params,
            max_new_tokens=min(self._params.max_new_tokens + 1, room),
            seed=(self._params.seed + len(messages)) % 2**32,
            ignore_eos=True,
        )
        for unfinished in self._engine.unfinished:  # where an interrupt left one
            self._engine.cancel(unfinished)
        self.read = len(prompt) - (0 if held is None else held.rows.position)
        if held is None:
            sequence = self._engine.submit(prompt, params)
        else:
            sequence = self._engine.resume(held.followed_by(prompt), params)
        said, parts = [], []
        try:
            yield from self._reply(sequence, params.max_new_tokens - 1, said, parts)
        finally:
            parts.append(rest := self._keep(sequence, len(said)))
            if said:
                reply = "".join(parts)
                self.messages = [*messages, {"role": "assistant", "content": reply}]
                self._text, self._ids = rendered + reply, [*prompt, *said]
        if rest:
            yield rest

    def _prompt(self, rendered: str) -> tuple[list[int], Snapshot | None]:
        """The ids of a text, and what is held of their beginning."""
        self.note, tokenizer = None, self._engine.tokenizer
        if not self._ids:
            return tokenizer.encode_special(rendered), None
        reason = "there was no place to keep it"
        if self._held is not None:
            reason = "the chat template changes what was said before"
            # A special token begins anew, whatever stands before it; other tokens might not.
            goes_on = rendered.startswith(self._text)
            new = tokenizer.encode_special(rendered[len(self._text) :]) if goes_on else []
            if new and new[0] in end_ids(tokenizer):
                prompt = [*self._ids, *new]
                try:
                    self._held.followed_by(prompt)
                    return prompt, self._held
                except UserError as error:
                    reason = str(error)
        self.note = f"read from the beginning: {reason}"
        return tokenizer.encode_special(rendered), None

    def _reply(self, sequence: int, most: int, said: list[int], parts: list[str]) -> Iterator[str]:
        """Yield a reply up to an end of text, `most` tokens, or the end of the sequence."""
        ends = end_ids(self._engine.tokenizer)
        while True:
            events = [event for event in self._engine.step() if event.sequence == sequence]
            for event in events:
                if event.tokens and event.tokens[0] not in ends:
                    said += event.tokens
                parts.append(event.text)
                self.result = event.result or self.result
                yield event.text
                if event.finish_reason or len(said) >= most or set(event.tokens) & set(ends):
                    return
            if not events:
                yield ""

    def _keep(self, sequence: int, said: int) -> str:
        """Hold what the cache has of a sequence, and end it.

        Returns:
            The end of its text of so many tokens, which others might have changed.
        """
        self._held, rest = None, ""
        if sequence in self._engine.unfinished:
            snapshot = self._engine.snapshot(sequence)
            self._held = None if snapshot.rows is None else snapshot
            self._engine.cancel(sequence)
            for event in self._engine.step():
                if event.sequence == sequence:
                    self.result = event.result
                    beyond = set(event.result.tokens[said:])  # EOS has no text; others may have
                    rest = "" if beyond - set(end_ids(self._engine.tokenizer)) else event.text
        return rest


def cache_in_words(conversation: Conversation) -> str:
    """Say what a conversation takes of the cache, beside what a dense one would."""
    result: Result | None = conversation.result
    if result is None or result.ratio is None:
        return "nothing is in the cache yet"
    tokens = result.prompt_tokens + result.new_tokens - 1
    return (
        f"{tokens:,} tokens in {result.live_cache_bytes:,} bytes of cache, dense "
        f"{result.dense_cache_bytes:,}: {result.ratio:.2f} tokens per slot; the last turn read "
        f"{conversation.read:,} tokens"
    )
