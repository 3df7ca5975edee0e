"""Which tokens share a slot or lose theirs, head by head, as one page for a browser."""

import base64
import functools
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dmc_jax.config import ModelConfig
from dmc_jax.model.llama import Llama
from dmc_jax.policies.policy import Policy, attend_whole


class Inside(NamedTuple):
    """What the rows of a model do with a text of T tokens."""

    decided: Bool[np.ndarray, "L K T"]  # the token is merged with those before it, or dropped
    appends: Bool[np.ndarray, "L K T"]  # the row takes one slot more when the token comes

    @property
    def ratio(self) -> float:
        """Tokens per slot at the end of the text."""
        return self.appends[..., 0].size * self.appends.shape[-1] / int(self.appends.sum())


def look_inside(
    params: Any, config: ModelConfig, tokens: Int[np.ndarray, " T"], policy: Policy
) -> Inside:
    """Run a model over a text and see what every row decides.

    Args:
        params: of the model, as `init_params` gives them.
        config: its sizes; all layers have as many KV heads.
        tokens: ids.
        policy: one that decides token by token: `DMC`, or that of gates.
    """
    decided, appends = _run(params, config, jnp.asarray(tokens)[None], policy)
    return Inside(*(np.asarray(x) > 0.5 for x in (decided, appends)))


@functools.partial(jax.jit, static_argnames="config")
def _run(params, config, tokens, policy):
    attend = attend_whole(policy, config, jnp.arange(tokens.shape[1])[None])
    records = Llama(config).apply({"params": params}, tokens, attend=attend).records
    each = (
        [getattr(record, name)[:, 0] for record in records] for name in ("decisions", "appends")
    )
    return tuple(jnp.concatenate(x).transpose(0, 2, 1) for x in each)


def page(title: str, texts: Sequence[str], seen: Sequence[Inside], *, merges: bool) -> str:
    """Make the page, which needs nothing beside it.

    Args:
        title: what stands above it.
        texts: of the T tokens.
        seen: at several ratios, which rise.
        merges: whether what is decided is merging; else it is dropping.

    Returns:
        HTML.
    """
    L, K, T = seen[0].decided.shape
    data = {
        "tokens": list(texts),
        "ratios": [round(each.ratio, 2) for each in seen],
        "layers": L,
        "heads": K,
        "merges": merges,
        **{name: _bits([getattr(each, name) for each in seen]) for name in Inside._fields},
    }
    template = resources.files(__package__).joinpath("inside.html").read_text(encoding="utf-8")
    # In a script element only "</" could end it.
    packed = json.dumps(data).replace("</", "<\\/")
    return template.replace("$TITLE", html.escape(title)).replace("$DATA", packed)


def _bits(arrays: Sequence[Bool[np.ndarray, "L K T"]]) -> str:
    return base64.b64encode(np.packbits(np.stack(arrays)).tobytes()).decode()
