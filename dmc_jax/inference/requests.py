"""A prompt on its way through the engine: what it is given, what it has said, how it ends."""

import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dmc_jax.data.tokenizer import Tokenizer, encode_prompt, end_ids
from dmc_jax.errors import UserError
from dmc_jax.inference.compiling import working_seconds
from dmc_jax.inference.sampling import SamplingParams, TokenLogprob
from dmc_jax.inference.snapshot import CachedRows, Snapshot
from dmc_jax.inference.text import TextState, begin_text, cut_at_stop, end_text, extend_text

Prompt = str | Sequence[int]  # text, or token ids with BOS
Params = SamplingParams | Sequence[SamplingParams] | None  # for all prompts, or one each


class Usage(NamedTuple):
    """What a sequence holds in the cache: all its tokens but the last."""

    ratio: float | None  # tokens per slot over all rows, those of the prompt included
    live_bytes: int  # of its pages
    peak_bytes: int  # of the most that it had at a time: more where its prompt was cut
    dense_bytes: int  # of the pages of the same dtype that a dense model would hold


_NOTHING = Usage(None, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a prompt, and what that took."""

    text: str  # without the prompt and the stop string
    tokens: tuple[int, ...]  # new ones, without EOS or stop token; those of a stop string are in it
    finish_reason: str  # stop, length, cancelled; pages: the whole pool is too small for it alone
    prompt_tokens: int
    new_tokens: int
    ratio: float | None  # as in `Usage`, when the last token came; None if none did
    live_cache_bytes: int
    peak_cache_bytes: int  # more than the live ones where a prompt was cut at its end
    dense_cache_bytes: int
    seconds_to_first_token: float | None  # from `submit` or `resume`: with the time in the queue
    tokens_per_second: float  # from it to the last but for compiling; 0 with fewer than two
    logprobs: tuple[TokenLogprob, ...] | None = None  # of tokens since `submit` or its like
    cached_tokens: int = 0  # of the prompt, that were not read: they had been before
    drafted_tokens: int = 0  # that were tried, as `prompt_lookup` foresaw them
    accepted_tokens: int = 0  # and those of them that are new ones


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one sequence."""

    sequence: int  # its id
    tokens: tuple[int, ...]  # new ids; empty where a sequence ended without one
    text: str  # that is certain now; the parts join to the text of the result
    finish_reason: str | None = None
    result: Result | None = None  # with the finish reason
    logprobs: tuple[TokenLogprob, ...] | None = None  # of the tokens, where `params` asked


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence. It can leave the cache and come back: what it has said is here."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    text: TextState
    submitted: float  # seconds, as the times below
    id: int = -1
    seat: int | None = None  # in the cache; None: it waits
    tokens: list[int] = dataclasses.field(default_factory=list)
    parts: list[str] = dataclasses.field(default_factory=list)  # of the text
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)  # where asked for
    first_time: float | None = None  # of the first token
    first_work: float = 0.0  # when that was, by the clock that stands still for compiling
    last_work: float = 0.0  # and when the newest was
    usage: Usage = _NOTHING
    pages_wanted: int = 0  # to go on with fewer has failed
    inherited: int = 0  # tokens that it had when it was resumed from a snapshot
    rows: CachedRows | None = None  # of that snapshot, until they are in the cache
    put_back: bool = False  # they are there: perhaps not what it would have read by its threshold
    branch: int = 0  # tokens after which another goes on otherwise: a part of the prompt ends there
    cached_tokens: int = 0  # of the prompt, that were not read
    drafted_tokens: int = 0  # that were tried
    accepted_tokens: int = 0  # and are its own

    @property
    def known(self) -> tuple[int, ...]:
        """All its tokens."""
        return *self.prompt, *self.tokens

    def part_end(self, begin: int, chunk: int) -> int:
        """Say how many tokens are read once a part from `begin` on is, of `chunk` at most."""
        end = min(begin + chunk, len(self.prompt) + len(self.tokens))
        return self.branch if begin < self.branch < end else end


def new_request(
    prompt: Prompt,
    params: SamplingParams,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    settle: Callable[[SamplingParams], SamplingParams],
) -> Request:
    """Check a prompt and make a request of it, without an id.

    Args:
        prompt: text, or ids that begin with BOS.
        params: how to continue it.
        tokenizer: of the prompt and what follows.
        vocab_size: ids that the model has.
        max_length: tokens of the prompt and its continuation at most.
        settle: gives `params` the threshold that the sequence is to run by; may refuse.

    Raises:
        UserError: no token, an unknown one, no text, more than `max_length` with the new ones, or
            as `settle`.
    """
    check_text(prompt)
    if isinstance(prompt, str):
        prompt = encode_prompt(tokenizer, prompt)
    try:
        prompt = tuple(map(operator.index, prompt))
    except TypeError as error:
        raise UserError(
            f"a prompt is a text, or token ids, which are whole numbers: {error}"
        ) from error
    if not prompt:
        raise UserError("the prompt has no token: begin it with the tokenizer's BOS")
    for token in (*prompt, *params.stop_token_ids):
        if not 0 <= token < vocab_size:
            raise UserError(f"token {token}: the model's ids are 0 to {vocab_size - 1}")
    if len(prompt) + params.max_new_tokens > max_length:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {params.max_new_tokens} new ones exceed the "
            f"{max_length} that there is room for: shorten the prompt or lower max_new_tokens"
        )
    return Request(
        prompt=prompt,
        params=settle(params),
        stop_ids=frozenset(
            (*(() if params.ignore_eos else end_ids(tokenizer)), *params.stop_token_ids)
        ),
        text=begin_text(tokenizer, prompt),
        submitted=time.perf_counter(),
    )


def settled(
    params: SamplingParams, *, threshold: float | None, gates: Any, policy: str
) -> SamplingParams:
    """Give a request its threshold: that of its ratio, its own or the engine's.

    Args:
        params: of the request.
        threshold: of the engine's policy; None: it has none.
        gates: `StoredGates`, in whose table ratios are looked up, if there are any.
        policy: its name.

    Raises:
        UserError: there is none to be had.
    """
    if threshold is None:
        for name in ("ratio", "threshold"):
            if getattr(params, name) is not None:
                raise UserError(f"{name}: with policy {policy} no threshold decides anything")
        return params
    threshold = threshold if params.threshold is None else params.threshold
    if params.ratio is not None:
        if gates is None:
            raise UserError(
                "ratio: it is looked up in a file of gates, which this engine does not have: "
                "give a threshold"
            )
        threshold = gates.at(params.ratio).threshold
    return dataclasses.replace(params, ratio=None, threshold=float(threshold))


def check_text(prompt: Prompt) -> None:
    r"""Refuse half a surrogate pair, which JSON can write (`"\ud83d"`) and no text can hold.

    Raises:
        UserError: there is one.
    """
    try:
        prompt.encode() if isinstance(prompt, str) else b""
    except UnicodeEncodeError as error:
        half = f"\\u{ord(prompt[error.start]):04x}"
        raise UserError(
            f"character {error.start + 1} of the prompt is {half}, half of a surrogate pair: "
            "write both halves, or the character itself"
        ) from error


def new_requests(prompts: Sequence[Prompt], params: Params, *args, **limits) -> list[Request]:
    """Check prompts and make requests of them.

    Args:
        prompts: of the requests.
        params: for all, or one each; None: the defaults.
        args, limits: as in `new_request`.

    Raises:
        UserError: as in `new_request`, or the numbers of prompts and `params` differ.
    """
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(params)} SamplingParams")
    requests = []
    for number, pair in enumerate(zip(prompts, params, strict=True)):
        try:
            requests.append(new_request(*pair, *args, **limits))
        except UserError as error:
            if len(prompts) == 1:
                raise
            raise UserError(f"prompts[{number}]: {error}") from error
    return requests


def resumed_request(
    snapshot: Snapshot, params: SamplingParams, tokenizer: Tokenizer, **limits: Any
) -> Request:
    """Make a request that has said something already.

    Args:
        snapshot: of the sequence.
        params: how it goes on; `max_new_tokens` counts those that it has. Its threshold stays where
            they name neither one nor a ratio.
        tokenizer: of the prompt and what follows.
        limits: as in `new_request`.

    Raises:
        UserError: as in `new_request`, or with these `params` the sequence would have ended.
    """
    said = snapshot.prompt, snapshot.tokens, snapshot.params.threshold
    request = _said_again(*said, params, tokenizer, **limits)
    request.inherited, request.first_time = len(snapshot.tokens), None
    request.rows = snapshot.rows
    if snapshot.rows is not None:
        request.pages_wanted = snapshot.rows.pages.count
    return request


def cut_request(
    request: Request,
    tokens: int,
    params: SamplingParams,
    tokenizer: Tokenizer,
    most: int,
    **limits: Any,
) -> None:
    """Let a request forget all but its first tokens; it is to be read again.

    Args:
        request: is changed.
        tokens: that it keeps, of its prompt first.
        params: how it goes on, as for `resumed_request`.
        tokenizer: of the prompt and what follows.
        most: tokens that it may forget.
        limits: as in `new_request`.

    Raises:
        UserError: it has not so many tokens, has to forget too many, or as in `resumed_request`.
    """
    has = len(request.known)
    if not 1 <= tokens <= has:
        raise UserError(f"truncate: sequence {request.id} has {has} tokens, cannot keep {tokens}")
    if has - tokens > most or not most:
        raise UserError(
            f"truncate: {has - tokens} tokens are to be taken back, this engine's rollback is "
            f"{most}: make one with a higher rollback, or submit the tokens as a prompt"
        )
    prompt, said = request.prompt[:tokens], request.known[len(request.prompt) : tokens]
    again = _said_again(prompt, said, request.params.threshold, params, tokenizer, **limits)
    for name in ("prompt", "params", "stop_ids", "text", "tokens", "parts", "logprobs"):
        setattr(request, name, getattr(again, name))
    request.inherited = min(request.inherited, len(said))
    request.rows, request.pages_wanted = None, 0


def _said_again(prompt, tokens, threshold, params, tokenizer, **limits) -> Request:
    """Make a request that has said some tokens, by a threshold unless `params` name another."""
    if params.ratio is None and params.threshold is None:
        params = dataclasses.replace(params, threshold=threshold)
    request = new_request(prompt, params, tokenizer, **limits)
    for token in tokens:
        if take_token(request, token, tokenizer).finish_reason:
            raise UserError(
                f"a sequence with {len(tokens)} new tokens cannot be resumed: its "
                "SamplingParams (max_new_tokens or a stop) end it before"
            )
    return request


def take_token(
    request: Request, token: int, tokenizer: Tokenizer, logprob: TokenLogprob | None = None
) -> Event:
    """Let a sequence have its next token.

    Args:
        request: is changed.
        token: the id.
        tokenizer: of the text.
        logprob: the token's, where `params` asked for it.

    Returns:
        What to tell the user; with a finish reason if this was the end.
    """
    request.last_work = working_seconds()
    if request.first_time is None:
        request.first_time, request.first_work = time.perf_counter(), request.last_work
    if token in request.stop_ids:
        return finish(request, "stop", tokenizer)
    request.tokens.append(token)
    request.logprobs += () if logprob is None else (logprob,)
    request.text, ready, stopped = extend_text(tokenizer, request.text, token, request.params.stop)
    request.parts.append(ready)
    if stopped:
        return _ended(request, "stop", (token,), ready)
    if len(request.tokens) == request.params.max_new_tokens:
        return finish(request, "length", tokenizer, (token,), ready)
    return Event(request.id, (token,), ready, logprobs=_newest_logprob(request))


def _newest_logprob(request: Request) -> tuple[TokenLogprob, ...] | None:
    return None if request.params.logprobs is None else tuple(request.logprobs[-1:])


def finish(
    request: Request,
    reason: str,
    tokenizer: Tokenizer,
    tokens: tuple[int, ...] = (),
    ready: str = "",
) -> Event:
    """End a sequence, with the text that was held back.

    Args:
        request: is changed.
        reason: as in `Result`.
        tokenizer: of the text.
        tokens: new ids, which the sequence has already.
        ready: their text, likewise.
    """
    rest, held, stopped = cut_at_stop(end_text(tokenizer, request.text), request.params.stop)
    rest, reason = rest + held, "stop" if stopped else reason
    request.parts.append(rest)
    return _ended(request, reason, tokens, ready + rest)


def _ended(request: Request, reason: str, tokens: tuple[int, ...], text: str) -> Event:
    first, took = request.first_time, request.last_work - request.first_work
    more = len(request.tokens) - request.inherited - 1
    result = Result(
        text="".join(request.parts),
        tokens=tuple(request.tokens),
        finish_reason=reason,
        prompt_tokens=len(request.prompt),
        new_tokens=len(request.tokens),
        ratio=request.usage.ratio,
        live_cache_bytes=request.usage.live_bytes,
        peak_cache_bytes=request.usage.peak_bytes,
        dense_cache_bytes=request.usage.dense_bytes,
        seconds_to_first_token=None if first is None else first - request.submitted,
        tokens_per_second=more / took if more > 0 and took > 0 else 0.0,
        cached_tokens=request.cached_tokens,
        drafted_tokens=request.drafted_tokens,
        accepted_tokens=request.accepted_tokens,
        logprobs=None if request.params.logprobs is None else tuple(request.logprobs),
    )
    return Event(
        request.id, tokens, text, reason, result, _newest_logprob(request) if tokens else None
    )
