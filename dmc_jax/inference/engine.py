"""Many prompts at a time over one cache: continuous batching, for a notebook or a server.

Sequences join and leave between steps, and what one says does not depend on who else is there;
`scheduler` says how.
"""

import collections
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dmc_jax.checkpoints.gates import StoredGates, check_base, gates_for
from dmc_jax.checkpoints.models import LoadedModel, StoredModel, find_model, load_tokenizer_of
from dmc_jax.config import ModelConfig, to_dict
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.inference.branching import BranchingScheduler
from dmc_jax.inference.requests import (
    Event,
    Params,
    Prompt,
    Request,
    Result,
    cut_request,
    new_requests,
    resumed_request,
    settled,
)
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.scheduler import Scheduler
from dmc_jax.inference.snapshot import Snapshot
from dmc_jax.model.llama import unstack_layers
from dmc_jax.policies.choice import policy_for, to_json
from dmc_jax.policies.policy import Policy


class Engine:
    """Continues prompts, as many at a time as the cache holds.

    Give it prompts with `submit` and drive it with `step`, or let `generate` or `stream` do both.
    Not for several threads.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        policy: Policy,
        gates: StoredGates | None = None,
        max_sequences: int,
        pages: int | None = None,
        kv_bytes: int | None = None,
        page_size: int = 16,
        max_length: int | None = None,
        chunk: int | None = None,
        dtype: str = "float32",
        kv_dtype: str | None = None,
        prefix_cache: bool | None = False,
        rollback: int = 0,
        prompt_lookup: int = 0,
    ):
        """Allocate the cache.

        Args:
            params: of the model.
            config: its sizes.
            tokenizer: of prompts and texts; its EOS ends a sequence.
            policy: what the rows of the cache keep, by its threshold where a request has none.
            gates: the file that the policy is from, in whose table ratios are looked up.
            max_sequences: that run at a time; others wait.
            pages: in the pool. More than all sequences could fill are not allocated.
            kv_bytes: the pool's size in bytes instead of pages.
            page_size: slots per page, a power of two of 8 or more.
            max_length: tokens of a prompt and its continuation; None: what the model knows.
            chunk: tokens of prompts that a step reads at most, a power of two of 16 or more:
                between two tokens nobody waits for more. None: 512, on a GPU 1,024.
            dtype: of the forward pass: float32 or bfloat16.
            kv_dtype: of keys and values in the pool: float32, bfloat16, or int8 with a scale for
                each key and each value; None: that of the forward pass.
            prefix_cache: whether prompts go on from what was read of others that begin alike
                (`Result.cached_tokens`), which is kept as long as nobody needs its pages; None:
                where the policy's caches branch.
            rollback: tokens that `truncate` may take back; above 0 this includes `prefix_cache`.
            prompt_lookup: tokens of a draft at most, of what its sequence said, tried in one pass.

        Raises:
            UserError: not one of `pages` and `kv_bytes`, a pool without a page for every row of a
                sequence, a length that the model does not know, a bad `chunk`, an unknown dtype, a
                policy that cannot branch or try drafts, or what `paged_cache.init` refuses.
        """
        kv_dtype = dtype if kv_dtype is None else kv_dtype
        self.config, self.tokenizer = config, tokenizer
        self.max_sequences, self.page_size = max_sequences, page_size
        self.max_length = config.max_length if max_length is None else max_length
        if self.max_length > config.max_length:
            raise UserError(
                f"max_length: the model was made for {config.max_length}, got {self.max_length}"
            )
        kept = to_json(policy)
        threshold = kept.pop("threshold", None)  # each sequence has its own
        settle = functools.partial(settled, threshold=threshold, gates=gates, policy=policy.name)
        self._limits = {"vocab_size": config.vocab_size, "max_length": self.max_length}
        self._limits["settle"] = settle
        kept.pop("prompt", None)  # likewise
        # What a snapshot's rows depend on, but for the parameters. As JSON gives it back.
        stored = {"dtype": dtype, "kv_dtype": kv_dtype, "page_size": page_size}
        self._model = {"model": to_dict(config), "policy": kept, **stored}
        self._model = json.loads(json.dumps(self._model))
        self._rollback, make = rollback, Scheduler
        if rollback or (policy.branches if prefix_cache is None else prefix_cache):
            make = functools.partial(BranchingScheduler, rollback=rollback)
        self._scheduler = make(
            *(params, config, tokenizer),
            **stored,
            policy=policy,
            seats=max_sequences,
            pages=pages,
            kv_bytes=kv_bytes,
            max_length=self.max_length,
            chunk=chunk,
            prompt_lookup=prompt_lookup,
        )
        self._ids = 0
        self._inboxes: dict[int, collections.deque[Event]] = {}  # of sequences that a stream reads

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike | StoredModel,
        *,
        kv_bytes: int = 2**28,
        max_sequences: int = 8,
        policy: str | None = None,
        tokenizer: str | os.PathLike | None = None,
        dtype: str | None = None,
        window: int | None = None,
        budget: int | None = None,
        threshold: float | None = None,
        gates: str | os.PathLike | None = None,
        ratio: float | None = None,
        add_bos: bool | None = None,
        **options: Any,
    ) -> "Engine":
        """Make an engine for a checkpoint, ours or of another format.

        Args:
            path: as in `find_model`, or the model found or loaded already.
            kv_bytes: of keys and values in the pool.
            max_sequences: that run at a time.
            policy: a name in `policies.choice`, such as "dense" to let a DMC model take a slot for
                every token; None: what the model was trained for.
            tokenizer: its file; None: where it was in training, or came along.
            dtype: of the forward pass, and of the cache without a `kv_dtype`; None: that of
                training, but float32 on a CPU, where XLA copies the whole pool to write to a
                bfloat16 one.
            window: merge window in tokens, 0 for an unlimited one; None: that of training.
            budget: slots of a row, for "tova", "h2o" and "window"; of its prompt, for "snapkv";
                with a ratio, the least.
            threshold: logit above which "dmc" merges and "dms" drops; None: that of training.
            gates: their file, or the name of some that come with dmc_jax, made for this model; it
                says whether they drop or merge. None: those that the checkpoint has.
            ratio: tokens per slot that these gates shall come to, None: as `threshold` says; or
                with which a budget grows; or of the segments of "stride".
            add_bos: whether prompts of text begin with BOS; None: as the model has it.
            options: `page_size`, `max_length`, `chunk`, `kv_dtype`, ... of the engine.

        Raises:
            UserError: no checkpoint there, another tokenizer, an unknown policy, or as for an
                engine.
        """
        model = path if isinstance(path, StoredModel) else find_model(path)
        own = model.own_gates(policy)
        stored = gates_for(gates, model.config, ratio, threshold, own)
        keeps = policy_for(
            model.policy,
            name=policy,
            window=window,
            budget=budget,
            ratio=ratio,
            threshold=threshold,
            gates=stored and stored.policy,
        )
        if dtype is None:
            on_cpu = jax.default_backend() == "cpu"
            dtype = "float32" if on_cpu else model.metadata.compute_dtype
        text = load_tokenizer_of(model, tokenizer, add_bos)
        loaded = model if isinstance(model, LoadedModel) else model.load(dtype=dtype)
        if stored is not None:
            check_base(stored, loaded.params, model.config)
        params = loaded.params
        if loaded is not model:
            params = unstack_layers(params, model.config, jnp.dtype(dtype), give_up=True)
        return cls(
            params,
            model.config,
            text,
            policy=keeps,
            gates=stored,
            kv_bytes=kv_bytes,
            max_sequences=max_sequences,
            dtype=dtype,
            **options,
        )

    # ---- for the user -------------------------------------------------------------------------

    @property
    def unfinished(self) -> list[int]:
        """List the ids of the sequences that run or wait, oldest first."""
        return [request.id for request in self._scheduler.unfinished()]

    @property
    def running(self) -> list[int]:
        """List the ids of those in the cache, oldest first."""
        return [request.id for request in self._scheduler.running()]

    @property
    def free_pages(self) -> int:
        """Count the pages of the pool that no sequence holds."""
        return int(self._scheduler.tally().free)

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt.

        Args:
            prompt: text, or ids that begin with BOS.
            params: how to continue it; None: the defaults.

        Returns:
            The id of the sequence, higher than all before.

        Raises:
            UserError: no token, an unknown one, more than `max_length` with the new ones, a ratio
                that was not measured, or a threshold where the policy has none.
        """
        return self._enqueue([prompt], params)[0]

    def cancel(self, sequence: int) -> None:
        """End a sequence; the next step reports it, with what it has. One that ended stays so.

        Args:
            sequence: an id from `submit`.

        Raises:
            UserError: there never was such a sequence.
        """
        if not 0 <= sequence < self._ids:
            raise UserError(f"no sequence {sequence}: there were {self._ids} so far")
        for request in self._scheduler.unfinished():
            if request.id == sequence:
                self._scheduler.end(request, "cancelled")

    def snapshot(self, sequence: int) -> Snapshot:
        """Copy all that there is of a sequence, which itself goes on.

        Args:
            sequence: an id from `submit`.

        Raises:
            UserError: it has ended, or there never was such a sequence.
        """
        request = self._unfinished(sequence, "to take a snapshot of")
        said = request.prompt, tuple(request.tokens), request.params
        return Snapshot(self._model, *said, self._scheduler.rows(request))

    def truncate(self, sequence: int, tokens: int, params: SamplingParams | None = None) -> None:
        """Let a sequence forget all but its first tokens, and go on as one that never had more.

        Events have told of the others, which nothing takes back. What comes after the last state
        that is kept is read again: 32 tokens at most, or a chunk within the prompt; more where
        others needed its pages, and all of a sequence that was resumed.

        Args:
            sequence: an id from `submit`.
            tokens: of its prompt and what follows that it keeps, 1 or more.
            params: as for `resume`; with the same ones as before it says the same again.

        Raises:
            UserError: it has ended, or has not so many tokens; more than the engine's `rollback`
                are to be taken back; or as for `resume`.
        """
        request = self._unfinished(sequence, "to truncate")
        params = request.params if params is None else params
        cut_request(request, tokens, params, self.tokenizer, self._rollback, **self._limits)
        self._scheduler.rewind(request)

    def resume(self, snapshot: Snapshot, params: SamplingParams | None = None) -> int:
        """Queue a sequence that goes on where a snapshot was taken.

        Its result has the whole text, what it said before included; events tell of what is new.

        Args:
            snapshot: of this engine or another one of the same model.
            params: how it goes on; None: as before. `max_new_tokens` counts those that it has. With
                neither a ratio nor a threshold among them it keeps the one that it has.

        Returns:
            The id of the sequence, higher than all before.

        Raises:
            UserError: another model or cache, or `params` with which it would have ended.
        """
        snapshot.check(self._model)
        params = snapshot.params if params is None else params
        return self._queued([resumed_request(snapshot, params, self.tokenizer, **self._limits)])[0]

    def fork(self, sequence: int, params: SamplingParams | None = None) -> int:
        """Let a sequence go on twice: `resume` of its `snapshot`.

        Args:
            sequence: an id from `submit`.
            params: of the new one, perhaps with another seed; None: as the old one's.

        Returns:
            The id of the new sequence.

        Raises:
            UserError: as in `snapshot` and `resume`.
        """
        return self.resume(self.snapshot(sequence), params)

    def step(self) -> list[Event]:
        """Admit what fits, read on in prompts, and give every other sequence its next token.

        A sequence whose prompt is read to its end gets two. After an interruption (Ctrl-C) the
        engine can go on: what ran is read again.

        Returns:
            What happened since the last step, in order.
        """
        events = self._scheduler.step()
        for event in events:
            if event.sequence in self._inboxes:
                self._inboxes[event.sequence].append(event)
        return events

    def stream(
        self, prompts: int | str | Sequence[Prompt], params: Params = None
    ) -> Iterator[Event]:
        """Yield events of some sequences as they come, until all have ended; others run meanwhile.

        Args:
            prompts: the id of a sequence, or prompts to submit. These are cancelled if the iterator
                is closed before its end.
            params: for all prompts, or one each; None: the defaults. Without meaning for an id.

        Raises:
            UserError: at once; as in `submit`, or the sequence has ended or is streamed already.
        """
        if isinstance(prompts, int):
            if prompts not in self.unfinished or prompts in self._inboxes:
                raise UserError(f"sequence {prompts} has ended, or a stream reads it already")
            ids, own = [prompts], False
        else:
            prompts = [prompts] if isinstance(prompts, str) else prompts
            ids, own = self._enqueue(prompts, params), True
        inbox = collections.deque()
        self._inboxes |= dict.fromkeys(ids, inbox)
        events = self._events_of(ids, inbox, own)
        next(events)  # from here on, closing it cleans up
        return events

    def generate(self, prompts: str | Sequence[Prompt], params: Params = None) -> list[Result]:
        """Continue prompts, all to their ends.

        Args:
            prompts: to submit.
            params: for all, or one each; None: the defaults. Equal prompts with one seed get equal
                texts.

        Returns:
            The results, in the order of the prompts.

        Raises:
            UserError: as in `submit`.
        """
        events = self.stream(prompts, params)
        results = {event.sequence: event.result for event in events if event.finish_reason}
        return [results[sequence] for sequence in sorted(results)]  # ids rise with the prompts

    # ---- what comes in ------------------------------------------------------------------------

    def _unfinished(self, sequence: int, purpose: str) -> Request:
        for request in self._scheduler.unfinished():
            if request.id == sequence:
                return request
        raise UserError(f"no sequence {sequence} {purpose}: it ended or never was")

    def _enqueue(self, prompts: Sequence[Prompt], params: Params) -> list[int]:
        return self._queued(new_requests(prompts, params, self.tokenizer, **self._limits))

    def _queued(self, requests: list[Request]) -> list[int]:
        for request in requests:
            request.id, self._ids = self._ids, self._ids + 1
        self._scheduler.enqueue(requests)
        return [request.id for request in requests]

    def _events_of(self, ids, inbox, own) -> Iterator[Event]:
        left = set(ids)
        try:
            yield
            while left:
                while not inbox:
                    self.step()
                event = inbox.popleft()
                if event.finish_reason:
                    left.discard(event.sequence)
                yield event
        finally:
            for sequence in ids:
                del self._inboxes[sequence]
            for sequence in left if own else ():
                self.cancel(sequence)
