"""Pages of several owners: counted, never written to, and free when the last one gives them up."""

import copy

import jax
import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from dmc_jax.inference import kept_rows
from tests.inference import paged_cache_test as alone
from tests.inference.paged_cache_test import PAGE, PAGES, ROWS, SEATS, policy_of

seat = st.integers(0, SEATS - 1)


class Branching(alone.Allocator):
    """What it extends, whose sequences are kept, gone on from and given up at any time."""

    def __init__(self):
        super().__init__()
        self.cache = kept_rows.with_references(self.cache)
        self.kept = []  # (rows, slots and open segments of each row, tokens read)

    def pages_held(self):
        owned = (table[: -(-len(held) // PAGE)] for table, held in self.tables())
        return len({page for pages in owned for page in pages})

    def tables(self):
        """Page table and slots of every row that owns pages."""
        seats = np.asarray(self.cache.page_table)
        yield from ((seats[row], held) for row, held in self.slots.items())
        for kept, (slots, _), _ in self.kept:
            table = np.asarray(kept.page_table)
            yield from ((table[row], held) for row, held in enumerate(slots))

    def copied(self, slots):
        """Pages that a branch of a sequence has for itself: those of the newest slots."""
        writes = [held for held in slots if held]
        if self.settings is None:  # no slot is written to again
            writes = [held for held in writes if len(held) % PAGE]
        return len(writes)

    @rule(seat=seat)
    def keep(self, seat):
        if self.failed[seat]:
            return
        of_seat = tuple(
            [copy.deepcopy(rows[seat, row]) for row in range(ROWS)]
            for rows in (self.slots, self.open)
        )
        enough = self.copied(of_seat[0]) <= PAGES - self.pages_held()
        policy = policy_of(self.settings)
        self.cache, kept, counts = kept_rows.keep(self.cache, policy, np.int32(seat))
        assert (counts[0] >= 0) == enough
        if enough:
            assert counts[1] == self.copied(of_seat[0])
            self.kept.append((kept, of_seat, self.position[seat]))

    @precondition(lambda self: self.kept)
    @rule(seat=seat, data=st.data())
    def go_on(self, seat, data):
        kept, (slots, segments), position = data.draw(st.sampled_from(self.kept))
        self.leave([number == seat for number in range(SEATS)])
        enough = self.copied(slots) <= PAGES - self.pages_held()
        policy = policy_of(self.settings)
        self.cache, counts = kept_rows.put(self.cache, policy, kept, np.int32(seat))
        assert (counts[0] >= 0) == enough
        if enough:
            self.position[seat] = position
            for row in range(ROWS):
                self.slots[seat, row] = copy.deepcopy(slots[row])
                self.open[seat, row] = copy.deepcopy(segments[row])

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def give_up(self, data):
        number = data.draw(st.integers(0, len(self.kept) - 1))
        self.cache = kept_rows.drop(self.cache, self.kept.pop(number)[0])

    @invariant()
    def every_page_is_owned_once_or_free_once(self):
        owners = np.zeros(PAGES, int)
        for table, held in self.tables():
            np.add.at(owners, table[: -(-len(held) // PAGE)], 1)
        np.testing.assert_array_equal(self.cache.references, np.maximum(owners - 1, 0))
        free = np.asarray(self.cache.free_pages)[: int(self.cache.free_count)]
        np.testing.assert_array_equal(np.sort(free), np.flatnonzero(owners == 0))
        of_seats = {
            page
            for row, held in self.slots.items()
            for page in np.asarray(self.cache.page_table)[row][: -(-len(held) // PAGE)]
        }
        assert kept_rows.pages_of_seats(self.cache) == len(of_seats)

    @invariant()
    def what_is_kept_stays_as_it_was(self):
        v_pages = np.asarray(self.cache.pages.v)
        for table, held in list(self.tables())[len(self.slots) :]:
            for index, value in enumerate(held):
                if value is not None:
                    stored = v_pages[table[index // PAGE], index % PAGE]
                    np.testing.assert_allclose(stored, value, atol=alone.TOLERANCE, rtol=0)

    def teardown(self):
        self.leave([True] * SEATS)
        for kept, *_ in self.kept:
            self.cache = kept_rows.drop(self.cache, kept)
        assert self.cache.free_count == PAGES and not np.asarray(self.cache.references).any()


class DenseBranching(Branching):
    policy = "dense"


for machine, examples in ((Branching, 12), (DenseBranching, 3)):
    machine.TestCase.settings = hypothesis_settings(
        max_examples=examples, stateful_step_count=16, deadline=None
    )
BranchingTest = Branching.TestCase
DenseBranchingTest = DenseBranching.TestCase


@pytest.mark.parametrize("name", ["keep", "put"])
def sharing_copies_no_pool_test(name):
    """It is most of the memory."""
    policy = policy_of(None)
    cache = jax.eval_shape(lambda: kept_rows.with_references(alone.small_cache(None, pages=50_000)))
    seat = jax.ShapeDtypeStruct((), np.int32)
    _, kept, _ = jax.eval_shape(kept_rows.keep, cache, policy, seat)
    arguments = {"keep": (cache, policy, seat), "put": (cache, policy, kept, seat)}[name]
    program = getattr(kept_rows, name).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * cache.pages.nbytes
