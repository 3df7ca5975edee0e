"""What a run keeps: limits by count and by bytes over all stages, and every stage's newest."""

import dataclasses

import pytest

from dmc_jax.checkpoints.retention import Limits, surplus
from dmc_jax.checkpoints.run_directory import remove_step
from dmc_jax.config import RunConfig

PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "data/metadata", "metadata/metadata")


@pytest.fixture
def run_dir(tmp_path):
    """Two stages of three steps, of 100 bytes a step in the first and 1,000 in the second."""
    for stage, nbytes in (("zero_out", 100), ("retrofit", 1000)):
        for step in (1, 2, 10):
            for part in PARTS:
                file = tmp_path / stage / str(step) / part
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"x" * (nbytes // len(PARTS)))
    (tmp_path / "zero_out" / "11.damaged").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "limits, going",
    [
        (Limits(3), []),
        (Limits(2), ["retrofit/1"]),
        (Limits(1), ["retrofit/1", "retrofit/2"]),
        (Limits(3, total=6), []),
        (Limits(3, total=5), ["zero_out/1"]),
        (Limits(2, total=4), ["retrofit/1", "zero_out/1"]),
        (Limits(3, total=3), ["zero_out/1", "zero_out/2", "retrofit/1"]),
        (Limits(3, total=1), ["zero_out/1", "zero_out/2", "retrofit/1", "retrofit/2"]),
        (Limits(3, nbytes=3300), []),
        (Limits(3, nbytes=3299), ["zero_out/1"]),
        (Limits(3, nbytes=3099), ["zero_out/1", "zero_out/2", "retrofit/1"]),
        (Limits(3, nbytes=1), ["zero_out/1", "zero_out/2", "retrofit/1", "retrofit/2"]),
        (Limits(3, total=5, nbytes=3199), ["zero_out/1", "zero_out/2"]),
    ],
)
def the_oldest_of_all_stages_go_first_and_no_stages_newest_goes_test(run_dir, limits, going):
    found = surplus(run_dir, "retrofit", limits)
    assert [str(path.relative_to(run_dir)) for path in found] == going
    for path in found:
        remove_step(path)
    assert surplus(run_dir, "retrofit", limits) == []


def limits_are_those_of_the_config_test():
    run = RunConfig.named("tiny_4x")
    assert Limits.of(run) == Limits(run.keep, None, None)
    run = dataclasses.replace(run, keep=3, keep_total=7, keep_gb=0.5)
    assert Limits.of(run) == Limits(3, 7, 5e8)
