"""The best numbers of heads: as brute force finds them, and what cannot be is refused."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.baselines.kv_heads_search import (
    best_assignment,
    heads_within,
    kv_head_options,
    loss_changes,
    predicted_change,
    uniform_assignment,
)
from dmc_jax.errors import UserError
from dmc_jax.model.presets import PRESETS


def sizes(kv_heads, heads=12):
    layers = 3 if isinstance(kv_heads, int) else len(kv_heads)
    return dataclasses.replace(PRESETS["tiny"], layers=layers, heads=heads, kv_heads=kv_heads)


numbers = st.floats(-1, 1, width=16)  # also changes for the better, and equal ones
options = st.lists(st.sampled_from([2, 3, 4, 6]), max_size=3, unique=True).map(lambda x: [1, *x])


@st.composite
def changes_and_totals(draw):
    changes = [
        {count: draw(numbers) for count in draw(options)} for _ in range(draw(st.integers(1, 5)))
    ]
    return changes, draw(st.integers(len(changes), sum(map(max, changes)) + 1))


@settings(deadline=None)
@given(changes_and_totals())
def the_best_assignment_is_that_of_brute_force_test(drawn):
    changes, heads = drawn
    chosen = best_assignment(changes, heads)
    assert all(count in of_layer for count, of_layer in zip(chosen, changes, strict=True))
    assert sum(chosen) <= heads
    possible = (c for c in itertools.product(*changes) if sum(c) <= heads)
    assert predicted_change(changes, chosen) == min(predicted_change(changes, c) for c in possible)


def one_layer_that_suffers_keeps_its_heads_test():
    changes = [{1: 0.1, 2: 0.05, 4: 0.0}, {1: 2.0, 2: 1.0, 4: 0.0}, {1: 0.1, 2: 0.09, 4: 0.0}]
    assert best_assignment(changes, 6) == (1, 4, 1)
    assert best_assignment(changes, 7) == (2, 4, 1)
    assert best_assignment(changes, 3) == (1, 1, 1)


def a_layer_at_a_time_is_measured_against_the_model_as_it_is_test():
    config = sizes((6, 1, 4))
    assert kv_head_options(config) == ((1, 2, 3, 4, 6), (1,), (1, 2, 3, 4))
    measured, reported = [], []

    def loss_of(kv_heads):
        measured.append(kv_heads)
        return 5.0 + 12.0 / kv_heads[0] + 6.0 / kv_heads[2]

    changes = loss_changes(config, loss_of, lambda *what: reported.append(what))
    assert len(measured) == len(set(measured)) == 1 + 4 + 0 + 3
    assert all(np.sum(np.not_equal(x, (6, 1, 4))) == 1 for x in measured[1:])
    assert changes[0] == {1: 10.0, 2: 4.0, 3: 2.0, 4: 1.0, 6: 0.0}
    assert changes[1:] == [{1: 0.0}, {1: 4.5, 2: 1.5, 3: 0.5, 4: 0.0}]
    assert reported[0] == (0, 1, 10.0) and len(reported) == 7


def heads_within_a_budget_are_counted_whatever_its_rounding_test():
    config = sizes((3,) * 30, heads=9)
    assert heads_within(config, 0.5) == 45
    assert heads_within(config, 1 / 3) == heads_within(config, 30.0 / 90) == 30
    assert heads_within(config, 0.999) == 89


@pytest.mark.parametrize("budget", [0.3, 0.0, -1.0, 1.0, 1.5, float("nan"), float("inf")])
def a_budget_that_is_not_possible_says_what_is_test(budget):
    with pytest.raises(UserError, match=r"90 KV heads in 30 layers, .* from 0.3334 to below 1$"):
        heads_within(sizes((3,) * 30, heads=9), budget)


def a_model_with_one_kv_head_in_every_layer_has_nothing_to_choose_test():
    with pytest.raises(UserError, match="one KV head in every layer"):
        kv_head_options(sizes(1))


def as_many_heads_everywhere_are_the_most_that_all_may_have_test():
    assert uniform_assignment(sizes(12), 3 * 5) == (4, 4, 4)
    assert uniform_assignment(sizes((4, 6, 1)), 10) == (1, 1, 1)
    assert uniform_assignment(sizes((4, 6, 2)), 11) == (2, 2, 2)
