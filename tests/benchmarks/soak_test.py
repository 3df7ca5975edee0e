"""Twenty kills at random moments, saves included, cost a run nothing but time."""

import pytest

from benchmarks import soak


@pytest.mark.slow
def twenty_random_kills_leave_a_run_bit_equal_test(tmp_path):
    def kills(state):
        return state.counts["kill"] + state.counts["kill_in_a_save"]

    state = soak.soak(tmp_path, 0, lambda state: kills(state) < 20, ("kill", "kill_in_a_save"))
    assert state.lost == [] and state.counts["runs"] >= 1
    assert min(state.counts["kill"], state.counts["kill_in_a_save"]) > 0
    # It would have been told.
    log = state.directory / "metrics.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1'))
    assert soak.differences(state.directory, state.whole) == ["other losses"]
