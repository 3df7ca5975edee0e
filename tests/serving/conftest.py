"""A tiny model for clients."""

import pytest

from tests.serving.live import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))
