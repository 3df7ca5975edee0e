"""Which policies there are, and which one a model runs with."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmc_jax.config import to_dict
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.fields import from_dict
from dmc_jax.policies.budget import LEAST, Budgeted, check_ratio
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.dms import DMS
from dmc_jax.policies.h2o import H2O
from dmc_jax.policies.policy import Policy
from dmc_jax.policies.snapkv import SnapKV
from dmc_jax.policies.stride import Stride
from dmc_jax.policies.tova import TOVA
from dmc_jax.policies.window import Window

_ALL = (Dense, DMC, DMS, Stride, TOVA, H2O, Window, SnapKV)
POLICIES = {policy.name: policy for policy in _ALL}
BUDGETED = tuple(name for name, policy in POLICIES.items() if issubclass(policy, Budgeted))

Trained = Dense | DMC  # what a model can be trained for
Gated = DMS | DelayedDMC  # what gates make of a model as it is


def policy_for(
    trained: Trained,
    *,
    name: str | None = None,
    window: int | None = None,
    budget: int | None = None,
    ratio: float | None = None,
    threshold: float | None = None,
    gates: Gated | None = None,
    prompt: int | None = None,
) -> Policy:
    """Choose the policy that a model runs with.

    Args:
        trained: what it was trained for.
        name: in `POLICIES`; None: what it was trained for.
        window: merge window in tokens instead of the trained one, 0 for an unlimited one.
        budget: slots of a row, where the policy has one; with a ratio, the least that it has.
        ratio: tokens for a slot of a budget that grows with the text, never below `budget` or, if
            there is none, `LEAST`; or of a segment of `Stride`. With gates it was looked up in
            their file.
        threshold: logit above which a token merges or is dropped, instead of the trained one.
        gates: the policy of a file of gates, made for this model.
        prompt: tokens of each document that are its prompt, where whole ones are read with a policy
            that cuts prompts. An engine knows its prompts.

    Raises:
        UserError: an unknown policy, one that the model was not trained for, or a window, budget,
            ratio, threshold or prompt that is none or that the policy does not have.
    """
    name = name or (trained if gates is None else gates).name
    if name not in POLICIES:
        raise UserError(f"policy: expected {' or '.join(POLICIES)}, got {name!r}")
    if window is not None and name != DMC.name:
        raise UserError(f"window: it is that of merging, which policy {name} does not")
    if threshold is not None and name not in (DMC.name, DMS.name):
        raise UserError(f"threshold: it decides what merges or is dropped, {name} has none")
    if threshold is not None and math.isnan(threshold):
        raise UserError("threshold: expected a logit, such as 0 (even odds), got nan")
    if gates is None and name == DMS.name:
        raise UserError("gates: give their file with dms, which decides by them")
    if gates is not None and gates.name != name:
        raise UserError(f"gates: these are for {gates.name}: give them with no other policy")
    budgeted = f"{', '.join(BUDGETED[:-1])} or {BUDGETED[-1]}"
    if name in BUDGETED and budget is None and ratio is None:
        raise UserError(f"budget: give the slots of a row with {budgeted}, or a ratio")
    if name not in BUDGETED and budget is not None:
        raise UserError(f"budget: give the slots of a row with {budgeted}, not with {name}")
    with_ratio = *BUDGETED, Stride.name
    if name not in with_ratio and gates is None and ratio is not None:
        those = ", ".join(with_ratio)
        raise UserError(f"ratio: give it with {those} or a file of gates, not with {name}")
    if name == Stride.name and ratio is None:
        raise UserError(f"ratio: give the tokens of a slot with {name}, such as 2 or 2.5")
    if prompt is not None and not POLICIES[name].observers:
        raise UserError(f"prompt: how long one is matters to {SnapKV.name}, not to {name}")
    if prompt is not None and prompt < 1:
        raise UserError(f"prompt: expected a token or more, got {prompt}")
    if isinstance(trained, DMC) and (gates is not None or name == Stride.name):
        what = Stride.name if gates is None else "gates"
        raise UserError(f"{what}: for models as they were pretrained, this one merges")
    # A DMC model's attention knows no decision channel, whether it merges or not.
    channel_scale = 0.0 if isinstance(trained, DMC) else None
    if name == Dense.name:
        return Dense(channel_scale)
    if name in BUDGETED:
        budget = LEAST if budget is None else budget
        policy = POLICIES[name](budget, ratio=ratio, channel_scale=channel_scale)
        return policy if prompt is None else policy.of_prompts(prompt)
    if name == Stride.name:
        check_ratio(ratio)
        return Stride(float(ratio))
    if gates is None and not isinstance(trained, DMC):
        raise UserError(
            "policy: dmc needs a model that was trained for it, or gates; this one is dense"
        )
    policy = trained if gates is None else gates
    if threshold is not None:
        policy = dataclasses.replace(policy, threshold=float(threshold))
    if window is None:
        return policy
    if window < 0:
        raise UserError(f"window: expected tokens, or 0 for no limit, got {window}")
    settings = dataclasses.replace(policy.settings, window=window or None)
    return dataclasses.replace(policy, settings=settings)


def to_json(policy: Policy) -> dict[str, Any]:
    """Write a policy as JSON can hold it: its name, its settings, its numbers; of gates, a hash."""
    fields = to_dict(policy)
    if isinstance(policy, Gated):
        arrays = [np.asarray(x).tobytes() for x in fields["gates"].values() if x is not None]
        fields["gates"] = hashlib.sha256(b"".join(arrays)).hexdigest()
    for later in ("ratio", "margin"):  # snapshots from before there was one do not have it
        if later in fields and fields[later] is None:
            del fields[later]
    fields = {name: x.item() if hasattr(x, "item") else x for name, x in fields.items()}
    return {"name": policy.name, **fields.pop("settings", {}), **fields}


def from_json(values: Mapping[str, Any]) -> Trained:
    """Read what `to_json` wrote of a policy that models are trained for.

    Args:
        values: what it wrote.

    Raises:
        KeyError, TypeError, ValueError, UserError: something else.
    """
    values = dict(values)
    name = values.pop("name")
    if name == Dense.name:
        return Dense(**values)
    if name != DMC.name:
        raise ValueError(f"policy {name!r} is unknown; expected dense or dmc")
    threshold = float(values.pop("threshold"))
    return DMC(from_dict(DMCSettings, values), threshold)
