"""Which policies there are, and which one a model runs with."""

import dataclasses
from typing import Any

import jax

from dmc_jax.config import to_dict
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Policy
from dmc_jax.policies.tova import TOVA

POLICIES = {policy.name: policy for policy in (Dense, DMC, TOVA)}


def policy_for(
    settings: DMCSettings | None,
    threshold: float = 0.0,
    *,
    name: str | None = None,
    window: int | None = None,
    budget: int | None = None,
) -> Policy:
    """Make the policy that a model runs with.

    Args:
        settings: those that it was trained with; None: a dense model.
        threshold: of its decisions, as calibrated.
        name: in `POLICIES`; None: what the model was trained for.
        window: merge window in tokens instead of the trained one, 0 for an unlimited one.
        budget: slots of a row, where the policy has one.

    Raises:
        UserError: an unknown policy, one that the model was not trained for, or a window or budget
            that is none or that the policy does not have.
    """
    name = name or ("dense" if settings is None else "dmc")
    if name not in POLICIES:
        raise UserError(f"policy: expected {' or '.join(POLICIES)}, got {name!r}")
    if window is not None and name != "dmc":
        raise UserError(f"window: it is that of merging, which {name} does not")
    if (budget is None) == (name == "tova"):
        raise UserError("budget: give the slots of a row with tova, and with no other policy")
    # A DMC model's attention knows no decision channel, whether it merges or not.
    channel_scale = None if settings is None else 0.0
    if name == "dense":
        return Dense(channel_scale)
    if name == "tova":
        return TOVA(budget, channel_scale)
    if settings is None:
        raise UserError("policy: dmc needs a model that was trained for it, this one is dense")
    if window is not None:
        if window < 0:
            raise UserError(f"window: expected tokens, or 0 for no limit, got {window}")
        settings = dataclasses.replace(settings, window=window or None)
    return DMC(settings, threshold)


def describe(policy: Policy) -> dict[str, Any]:
    """Name a policy and its numbers, as JSON can hold them."""
    fields = jax.tree.map(lambda x: x.item() if hasattr(x, "item") else x, to_dict(policy))
    return {"name": policy.name, **fields}
