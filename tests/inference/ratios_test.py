"""Every sequence compresses by its own ratio or threshold, whoever sits beside it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.snapshot import load_snapshot
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from tests.tiny_llama import some_gates

ROWS, PAGE, SEATS = 4, 8, 3  # of the tiny model
TOLERANCE = 2e-5  # of keys and values of size 1


class Ids(Tokenizer):
    """A tokenizer for prompts that are ids; no token ends a sequence."""

    vocab_size, bos_id, eos_id, pad_id = 50, 1, -1, 0

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return " ".join(map(str, ids))


GATES = some_gates()


def build_engine(model, policy=GATES.policy, gates=GATES, **changes):
    sizes = {"max_sequences": SEATS, "pages": 999, "page_size": PAGE} | changes
    return Engine(*model, Ids(), policy=policy, gates=gates, **sizes)


def greedy(new, **changes):
    return SamplingParams(new, temperature=0.0, **changes)


def what_came_of(result):
    return result.tokens, result.ratio, result.live_cache_bytes


POLICIES = {
    "dmc": (DMC(DMCSettings(offset=0.0)), None, {}),
    "dms": (GATES.policy, GATES, {"ratio": 3.0}),
}
each = pytest.mark.parametrize("policy, gates, asked", POLICIES.values(), ids=POLICIES)


@pytest.mark.parametrize(
    "policy, gates, asked",
    [pytest.param(*POLICIES["dmc"], marks=pytest.mark.slow), POLICIES["dms"]],
    ids=POLICIES,
)
def sequences_of_many_ratios_get_what_each_gets_alone_test(tiny_model, policy, gates, asked):
    prompts = [[1, *range(3 + i, 22 + 4 * i)] for i in range(5)]
    own = [{}, {"threshold": 9.0}, {"threshold": -9.0}, {"threshold": 0.2}, asked]
    params = [greedy(12, **one) for one in own]
    roomy = build_engine(tiny_model, policy, gates)
    alone = [roomy.generate([x], one)[0] for x, one in zip(prompts, params, strict=True)]
    for pages in (999, 14 * ROWS):  # with few, sequences give theirs back to go on later
        engine = build_engine(tiny_model, policy, gates, pages=pages)
        free = engine.free_pages
        together = engine.generate(prompts, params)
        assert list(map(what_came_of, together)) == list(map(what_came_of, alone))
        assert engine.free_pages == free
    ratios = [result.ratio for result in alone]
    assert ratios[1] == 1 and 1.1 < ratios[3] < ratios[2] and ratios[2] > 4


@each
def a_cache_holds_the_same_whoever_sits_beside_it_test(tiny_model, policy, gates, asked):
    prompt, params = [1, *range(3, 30)], greedy(20, threshold=0.1)
    engine, found = build_engine(tiny_model, policy, gates), []
    for others in ([], [-9.0, 9.0]):
        for threshold in others:
            engine.submit(prompt, greedy(20, threshold=threshold))
        sequence = engine.submit(prompt, params)
        for _ in range(7):
            engine.step()
        found.append(engine.snapshot(sequence).rows)
        for one in engine.unfinished:
            engine.cancel(one)
        engine.step()
    np.testing.assert_array_equal(*(rows.lengths for rows in found))
    assert found[0].lengths.min() > 0 and len(set(found[0].lengths)) > 1
    alone, among = ([rows.pages, rows.state] for rows in found)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE), alone, among)


@each
def another_threshold_compiles_nothing_anew_test(tiny_model, policy, gates, asked, caplog):
    engine = build_engine(tiny_model, policy, gates)
    engine.generate([[1, 5, 9]] * 2, greedy(3))
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        own = [{"threshold": 0.7}, {"threshold": -0.3}, {}, asked]
        results = engine.generate([[1, 9, 5]] * 4, [greedy(12, **one) for one in own])
        assert len({result.ratio for result in results}) > 2
    assert [record.message for record in caplog.records if "Compiling jit" in record.message] == []


def what_a_request_does_not_say_the_engine_says_test(tiny_model):
    prompt, engines = [1, *range(3, 40)], []
    for ratio in (1.0, 1.7, 3.0):
        engines.append(build_engine(tiny_model, GATES.at(ratio)))
    told = [engines[0].generate([prompt], greedy(8, ratio=x))[0] for x in (1.0, 1.7, 3.0)]
    usual = [engine.generate([prompt], greedy(8))[0] for engine in engines]
    assert list(map(what_came_of, told)) == list(map(what_came_of, usual))
    assert told[0].ratio < told[1].ratio < told[2].ratio
    by_threshold = engines[2].generate([prompt], greedy(8, threshold=0.5))[0]
    by_ratio = engines[1].generate([prompt], greedy(8, ratio=1.5))[0]
    assert what_came_of(by_threshold) == what_came_of(by_ratio)


def a_copy_of_a_sequence_keeps_its_threshold_unless_another_is_asked_for_test(tiny_model, tmp_path):
    engine, prompt = build_engine(tiny_model), [1, *range(3, 30)]
    [expected] = engine.generate([prompt], greedy(24, ratio=2.0))
    sequence = engine.submit(prompt, greedy(24, ratio=2.0))
    for _ in range(5):
        engine.step()
    copies = [engine.fork(sequence), engine.fork(sequence, greedy(24))]
    lighter = engine.fork(sequence, greedy(24, ratio=1.0))
    engine.snapshot(sequence).save(tmp_path / "sequence")
    results = {}
    while engine.unfinished:
        results |= {event.sequence: event.result for event in engine.step()}
    for one in (sequence, *copies):
        assert what_came_of(results[one]) == what_came_of(expected)
    assert results[lighter].ratio < expected.ratio
    # In an engine that has another one for those who name none.
    elsewhere = build_engine(tiny_model, GATES.at(1.2), gates=None)
    [event] = [
        event
        for event in elsewhere.stream(elsewhere.resume(load_snapshot(tmp_path / "sequence")))
        if event.finish_reason
    ]
    assert what_came_of(event.result) == what_came_of(expected)


def a_snapshot_from_when_the_engine_had_the_threshold_goes_on_by_it_test(tiny_model, tmp_path):
    engine, prompt = build_engine(tiny_model, GATES.at(2.0)), [1, *range(3, 30)]
    [expected] = engine.generate([prompt], greedy(20))
    sequence = engine.submit(prompt, greedy(20))
    engine.step()
    engine.snapshot(sequence).save(tmp_path / "new")
    with np.load(tmp_path / "new") as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    assert about["params"].pop("threshold") == GATES.at(2.0).threshold
    del about["params"]["ratio"]
    about["version"], about["model"]["policy"]["threshold"] = 2, GATES.at(2.0).threshold
    np.savez(tmp_path / "old.npz", **arrays | {"about": np.array(json.dumps(about))})
    other = build_engine(tiny_model)
    [event] = [
        event
        for event in other.stream(other.resume(load_snapshot(tmp_path / "old.npz")))
        if event.finish_reason
    ]
    assert what_came_of(event.result) == what_came_of(expected)


@pytest.mark.parametrize(
    "policy, gates, asked, complaint",
    [
        (GATES.policy, GATES, {"ratio": 3.5}, "ratio: .* were measured from 1 to 3, got 3.5"),
        (
            GATES.policy,
            None,
            {"ratio": 2.0},
            "ratio: .* file of gates, which this engine does not have",
        ),
        (DMC(DMCSettings()), None, {"ratio": 2.0}, "ratio: .* does not have: give a threshold"),
        (Dense(), None, {"threshold": 0.0}, "threshold: with policy dense no threshold decides"),
        (Dense(), None, {"ratio": 2.0}, "ratio: with policy dense no threshold decides"),
    ],
)
def what_an_engine_cannot_do_is_said_at_once_and_nothing_else_is_lost_test(
    tiny_model, policy, gates, asked, complaint
):
    engine = build_engine(tiny_model, policy, gates)
    first = engine.submit([1, 5, 6], greedy(4))
    with pytest.raises(UserError, match=complaint):
        engine.submit([1, 5, 6], greedy(4, **asked))
    with pytest.raises(UserError, match=rf"prompts\[1\]: {complaint}"):
        engine.stream([[1, 5, 6]] * 2, [greedy(4), greedy(4, **asked)])
    assert engine.unfinished == [first]
    [end] = [event for event in engine.stream(first) if event.finish_reason]
    assert end.result.new_tokens == 4


@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize("tokens", [1, 3])
def a_delay_may_be_longer_than_a_prompt_and_than_all_that_is_said_test(tiny_model, tokens, new):
    policy = dataclasses.replace(GATES.policy, threshold=-9.0, delay=64)
    prompt = [1, *range(3, 2 + tokens)]
    [dense] = build_engine(tiny_model, Dense(), None).generate([prompt], greedy(new))
    [delayed] = build_engine(tiny_model, policy, None).generate([prompt], greedy(new))
    assert what_came_of(delayed) == what_came_of(dense)
