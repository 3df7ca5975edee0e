"""A tiny random model whose heads differ in how they merge."""

import pytest

from tests.tiny_llama import build


@pytest.fixture
def build_model():
    return build


@pytest.fixture(scope="session")
def tiny_model():
    return build()
