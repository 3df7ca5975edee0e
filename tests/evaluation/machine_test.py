"""What figures were measured on, in files that others read."""

import pytest

from dmc_jax.evaluation.machine import machine


@pytest.mark.parametrize(
    "typed, kept",
    [
        ("train --config=/home/me/gates.py:/data/smollm2/ --x=1/2", "gates.py:smollm2 --x=1/2"),
        ("gates --data=/a/b,/c,data/code", "--data=b,c,data/code"),
        ("gates --gates /a/b.safetensors runs/x/gates.safetensors", "b.safetensors runs/x/gates."),
    ],
)
def a_command_tells_no_place_of_this_machine_test(typed, kept):
    assert kept in machine(typed)["command"]
