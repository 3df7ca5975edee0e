"""The page that shows what becomes of tokens: figures are the policy's, text is only text."""

import base64
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.gates import Gates
from dmc_jax.evaluation.inside import Inside, look_inside, page
from dmc_jax.policies.dms import DMS
from tests.tiny_llama import build

PARAMS, CONFIG = build()
T, DELAY = 40, 4


@pytest.fixture(scope="module")
def seen():
    L, D, R = CONFIG.layers, CONFIG.width, CONFIG.kv_rows
    rng = np.random.default_rng(0)
    arrays = np.zeros((L, D)), np.ones((L, D)), rng.normal(size=(R, D)), np.zeros(R)
    gates = Gates(*(jnp.asarray(x, "f4") for x in arrays))
    tokens = rng.integers(0, CONFIG.vocab_size, T)
    return [
        look_inside(PARAMS, CONFIG, tokens, DMS(gates, threshold, DELAY))
        for threshold in (np.inf, 0.5, -np.inf)
    ]


def what_is_seen_is_what_the_policy_decides_test(seen):
    none, some, all_of_them = seen
    assert not none.decided.any() and none.appends.all() and none.ratio == 1.0
    assert all_of_them.decided.all() and all_of_them.ratio == T / DELAY
    # A token takes the slot of the one that is `delay` old, if that one is dropped.
    np.testing.assert_array_equal(some.appends[..., DELAY:], ~some.decided[..., :-DELAY])
    assert 0.1 < some.decided.mean() < 0.9


def the_page_holds_all_of_it_and_text_stays_text_test(seen):
    texts = ["</script><b>&amp;", *"x" * (T - 1)]
    text = page("<i>", texts, seen, merges=False)
    [packed] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    data = json.loads(packed)
    assert data["tokens"] == texts and data["ratios"] == [round(each.ratio, 2) for each in seen]
    assert "<title>&lt;i&gt;</title>" in text and "$" not in re.sub(r"\$\{", "", text)
    for name in Inside._fields:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(data[name]), np.uint8))
        want = np.stack([getattr(each, name) for each in seen])
        np.testing.assert_array_equal(bits[: want.size].reshape(want.shape), want)
        assert want.shape == (len(seen), data["layers"], data["heads"], T)
