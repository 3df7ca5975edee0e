"""A tiny model for clients, and an engine that waits for them."""

import time

import pytest

from dmc_jax.inference.engine import Engine
from tests.serving.live import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hold_steps(monkeypatch):
    """Lets engines make no step while something holds."""
    step = Engine.step

    def hold(holds):
        def held(engine):
            if not holds():
                return step(engine)
            time.sleep(0.001)
            return []

        monkeypatch.setattr(Engine, "step", held)

    return hold
