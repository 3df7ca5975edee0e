"""What settings mean."""

import pytest

from pallas_kernels.decode_attention.settings import Settings

SETTINGS = Settings(block_bytes=16384, warps=4, stages=5, programs_per_core=2)


@pytest.mark.parametrize(
    "width, itemsize, block",
    [(128, 2, 64), (64, 2, 128), (32, 2, 128), (128, 4, 32), (1024, 4, 16)],
)
def a_block_has_the_bytes_it_should_within_limits_test(width, itemsize, block):
    assert SETTINGS.block(width, itemsize) == block
