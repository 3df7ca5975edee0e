"""SnapKV: a prompt is cut at its end, to what its last tokens attend to; then all tokens stay."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import superseded
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.policies.budget import Budgeted
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import Attended, Record


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SnapKV(Budgeted):
    """SnapKV (Li et al. 2024, arXiv 2404.14469); needs no training.

    A prompt is read as by `Dense`. What its last tokens, the observers, attend to is summed for
    every token before them, averaged over the query heads of the KV head (the paper knows only one
    for each), and pooled: a token has the most that any of the `kernel` tokens around it was given,
    so that neighbours of what counts stay too. The observers stay, and of the tokens before them
    those with the most, as many as the budget has slots left; of equals the earliest. All tokens
    after the prompt are appended.

    So the budget is that of a prompt, and a row has one slot more for every token after it. Before
    the cut it has as many as a dense one, which is the peak of its memory. Kernel, observers and
    pooling by the most are those of the authors' LongBench runs (`w32_k7_maxpool`); their code
    presets other ones.

    Beside keys and values this takes 4 bytes a slot.

    Attributes:
        observers: tokens at the end of a prompt, fewer than a budget without a ratio. Of a budget
            that grows with prompts, and is less for a short one, its newest tokens stay.
        kernel: tokens, an odd number.
        prompt: tokens of a document that are its prompt; or as many for each sequence. Who reads
            prompts sets it. Another one compiles nothing anew.

    Raises:
        UserError: no observer, no slot beside theirs, or an even kernel.
    """

    observers: int = dataclasses.field(default=32, kw_only=True, metadata={"static": True})
    kernel: int = dataclasses.field(default=7, kw_only=True, metadata={"static": True})
    prompt: int | Array | None = dataclasses.field(default=None, kw_only=True)

    name = "snapkv"
    chunked = True
    launches = True

    def __post_init__(self):
        super().__post_init__()
        if self.observers < 1:
            raise UserError(f"observers: expected a token or more, got {self.observers}")
        if self.ratio is None and self.budget <= self.observers:
            raise UserError(
                f"budget: expected more slots than the {self.observers} of a prompt's last tokens, "
                f"got {self.budget}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"kernel: expected an odd number of tokens, got {self.kernel}")

    def of_prompts(self, tokens):
        """Take them."""
        return dataclasses.replace(self, prompt=tokens)

    def most_slots(self, tokens):
        """Say how many slots a row may come to: a prompt is not cut before its end."""
        return tokens

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend to all tokens in a prompt, and after it to those that stayed; twice the work."""
        if self.prompt is None:
            raise UserError(
                "prompt: snapkv cuts a prompt at its end: say how many tokens of each document are "
                "its prompt"
            )
        frequencies = rotary_frequencies(q.shape[-1], where.rope_theta, where.rope_scaling)
        q, k = (self.rotate(each, where.positions, frequencies) for each in (q, k))
        how = {"scale": q.shape[-1] ** -0.5, "segment_ids": where.segment_ids}
        in_prompt, lse = attention(q, k, v, with_lse=True, **how)
        kept = self._kept(self._votes(q, k, lse, where.positions), where.positions)
        after_it = attention(q, k, v, superseded(1.0 - kept.swapaxes(1, 2)), **how)

        prompt = jnp.reshape(self.prompt, (-1, 1))
        after = (where.positions >= prompt)[..., None, None]
        lost = jnp.where(where.positions == prompt - 1, prompt - self.slots_after(prompt), 0)
        appends = jnp.broadcast_to(1.0 - lost[..., None], k.shape[:3])
        return Attended(jnp.where(after, after_it, in_prompt), Record(appends, decisions=None))

    def start(self, rows, head_dim, dtype, slots):
        """Remember what observers attended to."""
        return jnp.zeros((*rows, slots), jnp.float32)

    def step(self, state, token, lengths):
        """Append the token."""
        return self._dense.step(state, token, lengths)

    def chunk(self, state, tokens, lengths, counts):
        """Append the tokens."""
        return self._dense.chunk(state, tokens, lengths, counts)

    def launch(self, *arguments, **options):
        """Append the token."""
        return self._dense.launch(*arguments, **options)

    def observe(self, state, weights, lengths):
        """Count what every slot was given, by the query heads on average."""
        return state + weights.mean(axis=2)[..., : state.shape[-1]]

    def kept(self, state):
        """Say which slots stay."""
        return self._kept(state, jnp.broadcast_to(jnp.arange(state.shape[-1]), state[:, 0].shape))

    @property
    def _dense(self) -> Dense:
        return Dense(self.channel_scale)

    def _votes(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        lse: Float[Array, "B T N"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B K T"]:
        """What `observe` counts, of whole sequences: of every token by its document's observers."""
        (B, T, K, H), t = k.shape, jnp.arange(q.shape[1])
        begins = t - positions
        first = begins + jnp.reshape(self.prompt, (-1, 1)) - self.observers  # of the observers
        q, lse = q.reshape(B, T, K, -1, H), lse.reshape(B, T, K, -1)

        def count(i, votes):
            at = jnp.clip(first + i, 0, T - 1)  # of the i-th, for every token
            asks, total = (jnp.take_along_axis(x, _over(at, x), axis=1) for x in (q, lse))
            there = (at == first + i) & (jnp.take_along_axis(begins, at, axis=1) == begins)
            scores = H**-0.5 * jnp.einsum(
                "BTKGH,BTKH->BTKG", asks, k, precision="highest", preferred_element_type=jnp.float32
            )
            sees = there & (t <= at)
            return votes + jnp.where(
                sees[..., None], jnp.exp(jnp.minimum(scores - total, 0.0)).mean(axis=-1), 0.0
            )

        votes = jax.lax.fori_loop(0, self.observers, count, jnp.zeros((B, T, K)))
        return votes.swapaxes(1, 2)

    def _kept(
        self, votes: Float[Array, "B K S"], positions: Int[Array, "B S"]
    ) -> Bool[Array, "B K S"]:
        """Say which tokens stay, those after prompts among them."""
        S = votes.shape[-1]
        prompt = jnp.reshape(self.prompt, (-1, 1))
        stay = self.slots_after(prompt)
        newest = jnp.minimum(self.observers, stay)
        begins = jnp.broadcast_to((jnp.arange(S) - positions)[:, None], votes.shape)
        early = (positions < prompt - newest)[:, None]  # those which are voted on
        votes = jnp.where(early, votes, -1.0)
        reach = self.kernel // 2

        def shifted(x, by, filler):
            x = jnp.pad(x, [(0, 0), (0, 0), (reach, reach)], constant_values=filler)
            return x[..., reach + by : reach + by + S]

        pooled = votes
        for by in (*range(-reach, 0), *range(1, reach + 1)):
            of_document = shifted(begins, by, -S) == begins
            pooled = jnp.maximum(pooled, jnp.where(of_document, shifted(votes, by, -1.0), -1.0))
        # Documents are in order: so they are sorted one after the other.
        order = jnp.lexsort((-jnp.where(early, pooled, -1.0), begins))
        rank = jnp.argsort(order, axis=-1) - begins
        return ~early | (rank < (stay - newest)[:, None])


def _over(index, x):
    """An index of tokens [B, T] with the axes that x [B, T, ...] has beside them."""
    return index[(..., *(None,) * (x.ndim - 2))]
