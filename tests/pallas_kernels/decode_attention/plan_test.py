"""Plans against a deal of blocks by NumPy, and against what they promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from pallas_kernels import target, triton_call
from pallas_kernels.decode_attention import plan as plan_module
from pallas_kernels.decode_attention.plan import make_plan
from tests.pallas_kernels.interpreted import GPU, launch_triton

if triton_call.unavailable() is None:
    HERE = {"capability": target.current().capability, "launch": triton_call.launch}
else:
    HERE = {"capability": GPU.capability, "launch": launch_triton}

# Shapes are few, since each is compiled; what hypothesis varies are the lengths.
ROWS = 7
BLOCK = 8
programs = st.sampled_from([3, 20])
lengths_of_rows = st.lists(
    st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 300)), min_size=ROWS, max_size=ROWS
)
many = settings(max_examples=150, deadline=None)


def items_of(plan):
    """[(program, row, begin, end)] in the order of the plan."""
    row, begin, end, of_program = (
        np.asarray(x) for x in (plan.row, plan.begin, plan.end, plan.of_program)
    )
    return [
        (program, int(row[i]), int(begin[i]), int(end[i]))
        for program, (first, last) in enumerate(itertools.pairwise(of_program))
        for i in range(first, last)
    ]


def dealt(lengths, block, programs):
    """The same, by dealing out a list of all blocks."""
    line = [(row, at) for row, length in enumerate(lengths) for at in range(0, length, block)]
    stretches = np.array_split(np.array(line, int).reshape(-1, 2), programs)
    return [
        (program, int(row), int(of_row[0, 1]), min(int(of_row[-1, 1]) + block, lengths[row]))
        for program, stretch in enumerate(stretches)
        for row in dict.fromkeys(stretch[:, 0])
        for of_row in [stretch[stretch[:, 0] == row]]
    ]


def plan_of(lengths, block, programs):
    return make_plan(jnp.array(lengths, jnp.int32), block=block, programs=programs, **HERE)


@pytest.fixture(autouse=True, scope="module")
def few_rows_at_a_time():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan_module, "MOST_ROWS", 4)  # a plan takes several turns
        yield


@many
@given(lengths_of_rows, programs)
def items_are_those_of_an_even_deal_of_blocks_test(lengths, programs):
    assert items_of(plan_of(lengths, BLOCK, programs)) == dealt(lengths, BLOCK, programs)


@many
@given(lengths_of_rows, programs)
def every_live_slot_is_in_one_item_and_no_program_has_a_block_too_many_test(lengths, programs):
    plan = plan_of(lengths, BLOCK, programs)
    uses = [np.zeros(length, int) for length in lengths]
    load = np.zeros(programs, int)
    for program, row, begin, end in items_of(plan):
        assert begin % BLOCK == 0 and begin < end <= lengths[row]
        uses[row][begin:end] += 1
        load[program] += end - begin
    assert all(np.all(x == 1) for x in uses)
    assert load.max() <= sum(-(-length // BLOCK) * BLOCK for length in lengths) / programs + BLOCK


@pytest.mark.slow
@many
@given(lengths_of_rows, programs)
def the_items_of_a_row_follow_one_another_test(lengths, programs):
    plan = plan_of(lengths, BLOCK, programs)
    for row, (first, last) in enumerate(itertools.pairwise(np.asarray(plan.of_row))):
        assert np.all(plan.row[first:last] == row)
        ends = [0, *np.asarray(plan.end[first:last])]
        np.testing.assert_array_equal(plan.begin[first:last], ends[:-1])
        assert ends[-1] == lengths[row]


def a_plan_by_hand_test():
    # Blocks: row 0 has 3, row 1 none, row 2 one, row 3 six; ten for four programs: 3, 3, 2, 2.
    plan = plan_of([10, 0, 3, 21], block=4, programs=4)
    assert items_of(plan) == [
        (0, 0, 0, 10),
        (1, 2, 0, 3),
        (1, 3, 0, 8),
        (2, 3, 8, 16),
        (3, 3, 16, 21),
    ]


@pytest.mark.parametrize("programs", [3, 20])
def rows_that_are_all_empty_have_no_items_test(programs):
    plan = plan_of([0] * ROWS, BLOCK, programs)
    assert items_of(plan) == []
    assert plan.row.size == ROWS + programs - 1
    assert not np.any(plan.of_row) and not np.any(plan.begin) and not np.any(plan.end)


def layers_are_planned_at_once_test():
    lengths = jnp.array(np.random.default_rng(0).integers(0, 300, (3, ROWS)), jnp.int32)
    together = make_plan(lengths, block=BLOCK, programs=3, **HERE)
    for layer in range(3):
        one = jax.tree.map(lambda x: x[layer] if x.ndim else x, together)  # noqa: B023
        assert items_of(one) == dealt(lengths[layer].tolist(), BLOCK, 3)


@pytest.mark.usefixtures("annotations_aside")
@pytest.mark.parametrize(
    "lengths, block, programs, message",
    [
        (jnp.zeros(0, jnp.int32), 8, 1, r"be \[\*L, R\] with R >= 1, got shape \(0,\)"),
        (jnp.zeros((), jnp.int32), 8, 1, r"got shape \(\)"),
        (jnp.zeros(2, jnp.int32), 0, 1, "block and programs must be >= 1, got 0 and 1"),
        (jnp.zeros(2, jnp.int32), 8, 0, "block and programs must be >= 1, got 8 and 0"),
    ],
)
def what_cannot_be_planned_is_refused_test(lengths, block, programs, message):
    with pytest.raises(ValueError, match=message):
        make_plan(lengths, block=block, programs=programs, **HERE)
