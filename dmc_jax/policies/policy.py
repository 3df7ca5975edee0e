"""What a row keeps of its tokens: what every method is asked, and how a model attends with one.

A row is one KV head of one layer of one sequence; its slots hold a key and a value each. A method
says which slots there are after every token, three times over: for whole sequences at once, in
training and evaluation (`whole`); for one token of every row, in decoding (`step`); and for many of
them, in prefill (`chunk`). All three mean the same, and the tests of every policy prove it. Whoever
decodes applies the edits and knows no method.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.core.dmc import segment_starts
from dmc_jax.core.noise import decision_noise
from dmc_jax.core.rope import Llama3Scaling, rotary_frequencies
from dmc_jax.model.llama import Attend, ModelOutput
from pallas_kernels.cache_update import api as cache_update

State = Any  # a pytree of arrays [*rows, ...]: what a row remembers beside its slots


class Where(NamedTuple):
    """Where the tokens of whole sequences stand."""

    positions: Int[Array, "B T"]  # in their documents
    segment_ids: Int[Array, "B T"] | None  # documents of packed windows
    rope_theta: float
    rope_scaling: Llama3Scaling | None


class Record(NamedTuple):
    """What the rows of a layer did with their tokens; in a `ModelOutput`, those of a stack."""

    # 1 where a token took one slot more, else 0; less what a prompt lost that ends with it.
    appends: Float[Array, "*L B T K"]
    decisions: Float[Array, "*L B T K"] | None  # what a compression loss counts, where one can


class Attended(NamedTuple):
    """Result of `Policy.whole`."""

    out: Float[Array, "B T N H"]
    record: Record


class Tokens(NamedTuple):
    """One token of every sequence in one layer, axes [B, ...]; or a chunk of them, [B, T, ...]."""

    q: Float[Array, "B *T N H"]
    k: Float[Array, "B *T K H"]  # unrotated, as q
    v: Float[Array, "B *T K H"]
    positions: Int[Array, "B *T"]
    frequencies: Float[Array, " H//2"]  # rotary, radians per token
    x: Float[Array, "B *T D"] | None = None  # input of the attention, after the norm; gates read it


class Edit(NamedTuple):
    """Write a key and a value to a slot of every row, which grows where that is its length.

    Of a chunk the axes are [B, K, T] and [B, T, K, H]; what is written to one slot several times
    is there one after the other, and the last of it stays. Without `until` a token writes to the
    newest slot of its row or to a new one, and what is there before is for its own query alone.
    A token may write to another slot too; the first write is what its own query surely sees.
    """

    slot: Int[Array, "B K *T"]
    key: Float[Array, "B *T K H"]  # rotated
    value: Float[Array, "B *T K H"]
    # First token of the chunk whose query does not see this any more; from T on: it stays.
    until: Int[Array, "B K T"] | None = None
    tokens: Int[Array, "B K *T"] | None = None  # in the slot, where the policy has a `gamma`
    also: "Edit | None" = None  # another slot, -1 where it is none; in chunks with `until` too

    def writes(self) -> list["Edit"]:
        """List what is written, of which a row grows by one slot at most."""
        return [self] if self.also is None else [self, *self.also.writes()]

    def side_by_side(self) -> "Edit":
        """Put all writes of a chunk after one another, as if it had so many tokens more."""
        joint = {
            name: jnp.concatenate(x, axis=1 if name in ("key", "value") else 2)
            for name, *x in zip(self._fields, *self.writes(), strict=True)
            if name != "also" and x[0] is not None
        }
        return Edit(**joint)


class Policy(abc.ABC):
    """A method. Frozen dataclasses registered as pytrees: sizes are static, numbers are leaves."""

    name: ClassVar[str]
    # Logit above which a token is given up, where the method decides by one: a field then. Of all
    # sequences, or, where a cache is read into, one for each of its seats.
    threshold: ClassVar[float | Array | None] = None
    # Tokens at the end of a prompt that say what stays of it, where the method cuts prompts: a
    # chunk's are told to `observe`, and `kept` is asked where the prompt ends. They have a `chunk`.
    observers: ClassVar[int] = 0
    prompt: ClassVar[int | Array | None] = None  # its tokens then; of all, or of each as above
    chunked: ClassVar[bool] = (
        False  # it has a `chunk`; else a prompt is read by steps, in each layer
    )
    watches: ClassVar[bool] = False  # it has an `observe`, which is told the weights of attention
    launches: ClassVar[bool] = False  # it has a `launch`: a kernel of `cache_update` can do a step
    branches: ClassVar[bool] = False  # tokens decide most of a row for good: it has `open_slots`

    @property
    def gamma(self) -> Float[Array, " K"] | None:
        """By what times the logarithm of its tokens a slot's score is higher; None: by nothing.

        With one, edits say how many `tokens` are in a slot.
        """
        return None

    def most_slots(self, tokens: int) -> int:
        """Say how many slots a row may come to, which is what memory is for.

        Args:
            tokens: of a sequence, at most.
        """
        return tokens

    def of_layer(self, layer: int | Array, first: int | Array, heads: int) -> "Policy":
        """Take what is the layer's own of the numbers; everything below is asked of the result.

        Args:
            layer: its index.
            first: row of its first KV head, those of all layers counted in order.
            heads: K.
        """
        return self

    def of_seats(self, seats: Int[Array, " B"]) -> "Policy":
        """Take what is the sequences' own of the numbers.

        Args:
            seats: of the sequences; one that the cache does not have gets the numbers of another.
        """
        own = {
            name: jnp.asarray(getattr(self, name)).at[seats].get(mode="clip")
            for name in ("threshold", "prompt")
            if np.ndim(getattr(self, name))
        }
        return dataclasses.replace(self, **own) if own else self

    def of_prompts(self, tokens: int | Int[Array | np.ndarray, " B"]) -> "Policy":
        """Take the lengths of prompts, which only those need that cut them.

        Args:
            tokens: of every prompt; or of that of each sequence, or of each seat of a cache. 0: it
                has none.
        """
        return self

    @abc.abstractmethod
    def rotate(
        self,
        x: Float[Array, "B T heads H"],
        positions: Int[Array, "B T"],
        frequencies: Float[Array, " H//2"],
    ) -> Float[Array, "B T heads H"]:
        """Rotate queries or keys for attention."""

    @abc.abstractmethod
    def whole(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        where: Where,
        *,
        x: Float[Array, "B T D"],
        noise: Float[Array, "B T K"] | None = None,
        attention: CausalAttention = causal_attention,
    ) -> Attended:
        """Attend over whole sequences, every token to the slots that there are after it.

        Args:
            q, k, v: projections before rotation.
            where: the tokens stand; no document sees another.
            x: input of the attention, after the norm.
            noise: logistic noise, for relaxed decisions in training; None: as in decoding.
            attention: what computes the attention itself; see `model.causal_attention`.
        """

    @abc.abstractmethod
    def start(self, rows: tuple[int, ...], head_dim: int, dtype: DTypeLike, slots: int) -> State:
        """Make what empty rows remember: arrays [*rows, ...] of zeros.

        Args:
            rows: shape of all rows.
            head_dim: H.
            dtype: of the keys and values that they will read.
            slots: that a row may come to. An axis of so many grows with them, and what is there of
                slots that a row does not have yet means nothing.
        """

    @abc.abstractmethod
    def step(self, state: State, token: Tokens, lengths: Int[Array, "B K"]) -> tuple[State, Edit]:
        """Read one token of every row.

        Args:
            state: of the rows [B, K, ...], before the token.
            token: of every sequence.
            lengths: slots that the rows have before it.

        Returns:
            (the state after it, what to write).
        """

    def observe(
        self,
        state: State,
        weights: Float[Array, "B K G S"],
        lengths: Int[Array, "B K"],
    ) -> State:
        """Look at what the query of a step attended to, or all observers of a chunk in sum.

        Args:
            state: of the rows [B, K, ...], after the step or chunk.
            weights: of every query head, 0 beyond the row's slots.
            lengths: slots that the rows have after it.
        """
        raise NotImplementedError(f"{self.name} does not watch attention")

    def kept(self, state: State) -> Bool[Array, "B K S"]:
        """Say which slots stay of rows that hold a prompt, a slot a token, and what came after it.

        Args:
            state: of the rows [B, K, ...], after all observers.
        """
        raise NotImplementedError(f"{self.name} does not cut prompts")

    def open_slots(self, state: State, lengths: Int[Array, "*rows"]) -> Int[Array, "*rows n"]:
        """Say which slots may be written to again, -1 being none; what others hold stays.

        Args:
            state: of the rows.
            lengths: slots that they have.
        """
        raise NotImplementedError(f"{self.name} writes to any slot")

    def chunk(
        self, state: State, tokens: Tokens, lengths: Int[Array, "B K"], counts: Int[Array, " B"]
    ) -> tuple[State, Edit]:
        """Read many tokens of every row at once: `step` for each of them.

        Args:
            state: of the rows [B, K, ...], before the chunk.
            tokens: of every sequence.
            lengths: slots that the rows have before it.
            counts: tokens of each sequence that are not padding, at the front.

        Returns:
            (the state after the last real token, what to write); edits of padding mean nothing.
        """
        raise NotImplementedError(f"{self.name} reads a token at a time")

    # ---- a step in one launch -----------------------------------------------------------------

    def launch(
        self,
        held: cache_update.State,
        state: State,
        token: Tokens,
        *,
        page_table: Int[Array, "seats R maxp"],
        first: int | Array,
        active: Bool[Array, " seats"],
        implementation: str,
    ) -> tuple[Array, cache_update.State, State]:
        """Do a step of all sequences in one layer by a kernel.

        Args:
            held: the pool, and the lengths of the rows of all layers, without a segment.
            state: of these rows.
            token: of every seat.
            page_table: of all rows, -1 where a row has no page for the slot after its last.
            first: row of the layer's first KV head.
            active: seats that read a token; the rows of the others stay as they are.
            implementation: of `pallas_kernels.cache_update`.

        Returns:
            (the queries, rotated; pool and lengths after the token, the state after it).
            A row that would take a slot for which it has no page has the length ~n for its n.
        """
        raise NotImplementedError(f"{self.name} has no kernel")


def whole_by_steps(
    policy: Policy,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    where: Where,
    x: Float[Array, "B T D"],
) -> Attended:
    """Attend over whole sequences by a policy's steps: `Policy.whole` of one with no other form.

    Args:
        policy: any.
        q, k, v, where, x: as for `Policy.whole`.
    """
    B, T, K, H = k.shape
    G, slots = q.shape[2] // K, policy.most_slots(T)
    frequencies = rotary_frequencies(H, where.rope_theta, where.rope_scaling)
    begins = jnp.broadcast_to(segment_starts(B, T, where.segment_ids), (B, T, K)) > 0
    nothing = policy.start((B, K), H, k.dtype, slots)

    @jax.vmap
    @jax.vmap
    def put(row, new, slot):  # in place, where a choice between two arrays would copy the row
        return jax.lax.dynamic_update_slice_in_dim(row, new[None].astype(row.dtype), slot, 0)

    def read(carry, now):
        keys, values, lengths, state = carry
        q, k, v, x, positions, begins = now  # of one token; where a document begins, a row does
        lengths = jnp.where(begins, 0, lengths)

        def renewed(old, fresh):
            return jnp.where(begins[(..., *(None,) * (old.ndim - 2))], fresh, old)

        token = Tokens(q, k, v, positions, frequencies, x)
        state, edit = policy.step(jax.tree.map(renewed, state, nothing), token, lengths)
        keys, values = (put(*each, edit.slot) for each in ((keys, edit.key), (values, edit.value)))
        grown = jnp.maximum(lengths, edit.slot + 1)

        q = policy.rotate(q[:, None], positions[:, None], frequencies).reshape(B, K, G, H)
        live = (jnp.arange(slots) < grown[..., None])[:, :, None]
        scores = jnp.einsum("BKGH,BKSH->BKGS", q, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(live, H**-0.5 * scores, -jnp.inf), axis=-1)
        out = jnp.einsum(
            "BKGS,BKSH->BKGH", weights, values, preferred_element_type=jnp.float32
        ).astype(q.dtype)
        if policy.watches:
            state = policy.observe(state, weights, grown)
        appends = (grown > lengths).astype(jnp.float32)
        return (keys, values, grown, state), (out.reshape(B, K * G, H), appends)

    rows = jnp.zeros((B, K, slots, H), k.dtype)
    empty = rows, rows, jnp.zeros((B, K), jnp.int32), nothing
    by_token = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (q, k, v, x, where.positions, begins))
    _, (out, appends) = jax.lax.scan(read, empty, by_token)
    return Attended(out.swapaxes(0, 1), Record(appends.swapaxes(0, 1), decisions=None))


# ---- a model that attends with a policy -------------------------------------------------------


def first_rows(config: ModelConfig) -> Int[Array, " L"]:
    """Number the first row of every layer."""
    return jnp.asarray(np.cumsum((0, *config.kv_heads_by_layer[:-1])), jnp.int32)


def attend_whole(
    policy: Policy,
    config: ModelConfig,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    noise_key: Array | None = None,
    noise_part: tuple[Int[Array, ""] | int, int] = (0, 1),
    attention: CausalAttention = causal_attention,
) -> Attend:
    """Make the attention function of whole sequences, whose records are of `Record`.

    Args:
        policy: what the rows keep.
        config: gives the rotary base and scaling.
        positions: of the tokens in their document.
        segment_ids: documents of packed windows, which keep apart.
        noise_key: of a training step's noise, into which layers fold their index, one or a key of
            each sequence; None: the decisions of inference.
        noise_part: of one key, (i, n) where the sequences are every n-th, from i on, of a batch
            whose noise is drawn as one.
        attention: what computes the attention itself; see `model.causal_attention`.
    """
    where = Where(positions, segment_ids, config.rope_theta, config.rope_scaling)

    offsets = first_rows(config)

    def attend(q, k, v, x, layer, state):
        noise = None
        if noise_key is not None:
            noise = decision_noise(noise_key, noise_part, layer, k.shape[:3])
        own = policy.of_layer(layer, offsets[layer], k.shape[2])
        attended = own.whole(q, k, v, where, x=x, noise=noise, attention=attention)
        return attended.out, state, attended.record

    return attend


def decision_means(output: ModelOutput) -> Float[Array, "L B"]:
    """Average the decisions of every layer and sample, over tokens and KV heads."""
    return jnp.concatenate([record.decisions.mean(axis=(2, 3)) for record in output.records])


def slots_taken(
    output: ModelOutput, real: Float[Array, "B T"]
) -> tuple[Float[Array, "stack K"], ...]:
    """Count the slots that real tokens took in every KV head, one array [layers, K] per stack.

    Args:
        output: of a model that attends by `attend_whole`.
        real: 1 for tokens, 0 for padding.
    """
    return tuple(jnp.einsum("LBTK,BT->LK", record.appends, real) for record in output.records)
