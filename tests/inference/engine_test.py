"""What a sequence gets depends neither on who shares the engine nor on how often it waits."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.checkpoints import models
from dmc_jax.checkpoints.metadata import Metadata
from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import RunFailure, UserError
from dmc_jax.inference import engine as engine_module
from dmc_jax.inference import layers, programs
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.scheduler import Scheduler
from dmc_jax.inference.snapshot import load_snapshot
from dmc_jax.model.causal_attention import over_int8
from dmc_jax.model.llama import Llama
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole

SETTINGS = DMCSettings(offset=0.0)
ROWS, PAGE, SEATS = 4, 8, 4  # of the tiny model
HALF = 0.0  # a threshold at the middle of the merge logits
T = 128
TINY = 3 * ROWS  # pages, so few that sequences get into each other's way
PAGE_BYTES = 2 * PAGE * 16 * 4


class Pieces(Tokenizer):
    """50 ids; those of the euro sign are a byte each."""

    vocab_size, bos_id, eos_id, pad_id = 50, 1, 2, 0
    pieces = (b"", b"", b"", "€".encode()[:1], "€".encode()[1:2], "€".encode()[2:])
    pieces += tuple(bytes([letter]) * (1 + letter % 2) for letter in range(65, 109))

    def encode(self, text):
        return [self.pieces.index(letter.encode() * (1 + ord(letter) % 2)) for letter in text]

    def decode(self, ids):
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


def policy_of(settings):
    return Dense() if settings is None else DMC(settings, HALF)


def build_engine(model, **changes):
    options = {
        "policy": DMC(SETTINGS, HALF),
        "max_sequences": SEATS,
        "pages": 4 * SEATS * ROWS,
        "page_size": PAGE,
    }
    return Engine(*model, Pieces(), **options | changes)


def some_prompts(count, seed=0, longest=24):  # with which one program reads all prompts
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [[1, *rng.integers(3, 50, length - 1).tolist()] for length in lengths]


def some_params(count, seed=0, longest=24):
    """Every second greedy, the others drawn in different ways."""
    rng = np.random.default_rng(seed)
    return [
        SamplingParams(
            max_new_tokens=int(rng.integers(1, longest + 1)),
            temperature=float(rng.uniform(0.5, 1.5)) if number % 2 else 0.0,
            top_k=int(rng.choice([0, 10])),
            top_p=float(rng.choice([1.0, 0.9])),
            min_p=float(rng.choice([0.0, 0.02])),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
            seed=number,
        )
        for number in range(count)
    ]


def greedy(new, **changes):
    return SamplingParams(max_new_tokens=new, temperature=0.0, **changes)


def what_was_said(result):
    return result.tokens, result.text, result.finish_reason


@pytest.fixture(scope="module")
def roomy(tiny_model):
    """Pages for all that its sequences may come to."""
    return build_engine(tiny_model, pages=10_000)


@pytest.fixture(scope="module")
def alone(roomy):
    """What each request gets with nobody else there."""
    known = {}

    def results(prompts, params):
        for prompt, one in zip(prompts, params, strict=True):
            if (tuple(prompt), one) not in known:
                known[tuple(prompt), one] = roomy.generate([prompt], one)[0]
        return [known[tuple(prompt), one] for prompt, one in zip(prompts, params, strict=True)]

    return results


@pytest.fixture
def departures(monkeypatch):
    """Ids of sequences that had to give up their pages, as it happens."""
    ids, requeue = [], Scheduler._requeue
    monkeypatch.setattr(
        Scheduler,
        "_requeue",
        lambda scheduler, request: (ids.append(request.id), requeue(scheduler, request)),
    )
    return ids


# ---- the same output, whoever is there --------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 4))
def evaluated(params, config, settings, tokens, attention):
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    attend = attend_whole(policy_of(settings), config, positions, attention=attention)
    return Llama(config).apply({"params": params}, tokens, attend=attend)


def what_follows(said, model, settings=SETTINGS, attention=causal_attention):
    """What the model makes of whole sequences, padded to equal numbers and lengths."""
    tokens = np.zeros((6, T), np.int32)
    for row, ids in zip(tokens, said, strict=False):
        row[: len(ids)] = ids
    return evaluated(*model, settings, tokens, attention)


@pytest.mark.parametrize(
    "policy, longest",
    [
        ("dmc", 24),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dense", 24), ("dmc", 40))),
    ],
)
def greedy_tokens_are_the_most_likely_ones_of_the_whole_sequence_test(
    tiny_model, build_model, policy, longest
):
    settings = SETTINGS if policy == "dmc" else None
    model = tiny_model if policy == "dmc" else build_model(layers=1)
    engine = build_engine(model, policy=policy_of(settings), pages=10_000)
    prompts, new = some_prompts(6, longest=longest), 16
    results = engine.generate(prompts, greedy(new))
    said = [[*prompt, *result.tokens] for prompt, result in zip(prompts, results, strict=True)]
    likely = np.argmax(what_follows(said, model, settings).logits, axis=-1)
    for row, prompt, result in zip(likely, prompts, results, strict=True):
        end = len(prompt) - 1 + len(result.tokens)
        assert result.tokens == tuple(row[len(prompt) - 1 : end])
        if result.finish_reason == "stop":
            assert row[end] == Pieces.eos_id
        else:
            assert len(result.tokens) == new


def who_shares_the_engine_does_not_matter_test(roomy, alone, departures):
    prompts, params = some_prompts(12), some_params(12)
    together = roomy.generate(prompts, params)
    assert not departures
    assert list(map(what_was_said, together)) == list(map(what_was_said, alone(prompts, params)))
    # Another order: other neighbours, other seats.
    again = roomy.generate(prompts[::-1], params[::-1])[::-1]
    assert list(map(what_was_said, again)) == list(map(what_was_said, together))


def a_sequence_that_gave_up_its_pages_goes_on_as_if_nothing_was_test(tiny_model, alone, departures):
    prompts, params = some_prompts(16, longest=10), some_params(16)
    changes = {"max_new_tokens": 20, "repetition_penalty": 3.0}  # which asks for all it has said
    params = [dataclasses.replace(one, **changes) for one in params]
    engine = build_engine(tiny_model, pages=TINY)
    results = engine.generate(prompts, params)
    assert len(set(departures)) >= 3
    assert 0 not in departures  # the oldest never waits
    assert list(map(what_was_said, results)) == list(map(what_was_said, alone(prompts, params)))
    assert engine.free_pages == TINY and not engine.unfinished


@pytest.mark.slow
def two_hundred_random_requests_with_cancels_get_what_they_would_get_alone_test(
    tiny_model, alone, departures
):
    rng = np.random.default_rng(5)
    prompts, params = some_prompts(200, seed=1, longest=10), some_params(200, seed=2, longest=20)
    engine = build_engine(tiny_model, pages=TINY)
    compiled = layers._run_layer._cache_size()
    ids, results, texts = [], {}, {}
    while len(results) < len(prompts):
        for _ in range(rng.integers(0, 3)):
            if len(ids) < len(prompts):
                ids.append(engine.submit(prompts[len(ids)], params[len(ids)]))
        if rng.random() < 0.08 and engine.unfinished:
            engine.cancel(int(rng.choice(engine.unfinished)))
        for event in engine.step():
            texts[event.sequence] = texts.get(event.sequence, "") + event.text
            if event.finish_reason:
                results[event.sequence] = event.result
        assert len(engine.running) <= SEATS and engine.unfinished == sorted(engine.unfinished)
    assert len(departures) > 20
    assert sum(results[one].finish_reason == "cancelled" for one in ids) > 10
    for one, expected in zip(ids, alone(prompts, params), strict=True):
        assert texts[one] == results[one].text
        if results[one].finish_reason == "cancelled":
            assert expected.tokens[: results[one].new_tokens] == results[one].tokens
        else:
            assert what_was_said(results[one]) == what_was_said(expected)
    assert engine.free_pages == TINY
    assert layers._run_layer._cache_size() - compiled <= 3  # one prompt, four, a step


def a_program_is_compiled_once_a_shape_of_loaded_parameters_test(tiny_model, caplog):
    params, config = tiny_model
    params = jax.device_put(params, jax.devices()[1])  # as a checkpoint's: bound to a device
    engine = build_engine((params, config), policy=DMC(SETTINGS, HALF + 1e-3))
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        engine.generate([[1] * 20, [1] * 40], greedy(3))
        assert [record for record in caplog.records if "Compiling jit" in record.message]
        caplog.clear()
        engine.generate([[3] * 17, [1] * 39, [1]], greedy(5))
    assert [record.message for record in caplog.records if "Compiling jit" in record.message] == []


def an_interrupted_engine_goes_on_where_it_was_test(roomy, alone, monkeypatch):
    prompts, params = some_prompts(6), some_params(6)
    stream, results = roomy.stream(prompts, params), {}
    next_tokens, calls = programs.next_tokens, 0

    def interrupted_after(*args, **options):
        nonlocal calls
        calls += 1
        result = next_tokens(*args, **options)
        if calls == 4:
            raise KeyboardInterrupt  # the old cache is gone, the new one never arrives
        return result

    first = roomy.unfinished[0]
    monkeypatch.setattr(programs, "next_tokens", interrupted_after)
    with pytest.raises(KeyboardInterrupt):
        while True:
            for event in roomy.step():
                results[event.sequence] = event.result
    assert roomy.running == []
    while roomy.unfinished:
        for event in roomy.step():
            results[event.sequence] = event.result
    said = [what_was_said(results[first + number]) for number in range(6)]
    assert said == list(map(what_was_said, alone(prompts, params)))
    assert [event for event in stream if event.finish_reason]  # which had its own copy


# ---- prompts in parts -------------------------------------------------------------------------


def a_long_prompt_keeps_nobody_waiting_test(tiny_model, alone):
    engine = build_engine(tiny_model, pages=10_000, chunk=16)
    [short], long = some_prompts(1, seed=3, longest=10), [1, *[5, 9, 30] * 30]
    first = engine.submit(short, greedy(20))
    engine.step()
    second = engine.submit(long, greedy(4))
    steps = [[]]
    while second not in steps[-1]:
        steps.append([event.sequence for event in engine.step()])
        assert engine.running == [first, second]
    # While 16 tokens are read, who runs says one; the other says two at its prompt's end.
    assert steps[1:] == [[first]] * (len(long) // 16) + [[second, first, second]]
    expected = list(map(what_was_said, alone([short, long], [greedy(20), greedy(4)])))
    assert results_of(engine, first, second) == expected


def prompts_of_one_width_are_read_in_one_pass_test(tiny_model, alone, monkeypatch):
    passes, read = [], programs.read_prompts

    def counted(params, config, batch, parts, **options):
        passes.append([request.id for request, _ in parts])
        return read(params, config, batch, parts, **options)

    monkeypatch.setattr(programs, "read_prompts", counted)
    engine = build_engine(tiny_model, pages=10_000, max_sequences=8)
    prompts = [[1, *range(3, 3 + more)] for more in (4, 7, 40, 20, 30, 9, 45)]
    params = [greedy(3)] * len(prompts)
    results = engine.generate(prompts, params)
    # 32 tokens or fewer: 0, 1, 3, 4 and 5; more: 2 and 6.
    assert passes == [[0, 1, 3, 4], [2], [5], [6]]
    assert list(map(what_was_said, results)) == list(map(what_was_said, alone(prompts, params)))


def a_prompt_that_finds_no_page_beside_others_is_read_again_test(
    tiny_model, departures, monkeypatch
):
    """Whoever is admitted by too low a guess."""
    options = {"policy": Dense(0.0), "max_sequences": SEATS, "chunk": 16}
    prompts = [[1, *range(3, 3 + more)] for more in (20, 11, 25)]
    params = [greedy(6)] * 3
    roomy = build_engine(tiny_model, pages=10_000, **options)
    expected = [roomy.generate([prompt], greedy(6))[0] for prompt in prompts]
    monkeypatch.setattr(Scheduler, "_fits", lambda self, request: True)
    engine = build_engine(tiny_model, pages=5 * ROWS, **options)
    ids = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    said = results_of(engine, *ids)
    assert departures and said == list(map(what_was_said, expected))
    assert engine.free_pages == 5 * ROWS


def a_sequence_may_end_or_be_copied_while_its_prompt_is_read_test(tiny_model, alone):
    engine = build_engine(tiny_model, pages=10_000, chunk=16)
    free, prompt = engine.free_pages, [1, *[5, 9, 30] * 20]
    [expected] = map(what_was_said, alone([prompt], [greedy(4)]))
    sequence = engine.submit(prompt, greedy(4))
    assert engine.step() == [] and engine.running == [sequence]
    fork = engine.fork(sequence)
    engine.step()
    engine.cancel(sequence)
    assert results_of(engine, sequence, fork)[1] == expected
    assert engine.free_pages == free


@pytest.mark.parametrize("chunk", [8, 24, 0])
def a_chunk_is_a_power_of_two_test(tiny_model, chunk):
    with pytest.raises(UserError, match="chunk must be a power of two, 16 or more"):
        build_engine(tiny_model, chunk=chunk)


# ---- pages ------------------------------------------------------------------------------------


def a_model_that_merges_has_more_sequences_in_the_same_pages_test(tiny_model):
    """Without being told its ratio."""
    together = {}
    prompts = [[1, *range(3, 18)]] * SEATS
    for policy in (Dense(0.0), DMC(SETTINGS, -1e3)):
        engine = build_engine(tiny_model, policy=policy, pages=2 * TINY)
        for prompt in prompts:
            engine.submit(prompt, greedy(8))
        engine.step()
        together[policy.name] = len(engine.running)
    # 16 tokens and one more take 3 pages a row; merged to one slot they take 1.
    assert together == {"dense": 2 * TINY // (3 * ROWS), "dmc": SEATS}


def a_sequence_that_the_whole_pool_cannot_hold_ends_with_what_it_has_test(tiny_model, alone):
    engine = build_engine(tiny_model, policy=Dense(0.0), pages=TINY)
    prompts = [[1, 5, 9], [1] * 30, [1, 7, 7]]
    long, impossible, short = engine.generate(prompts, [greedy(60), greedy(4), greedy(4)])
    assert long.finish_reason == "pages" and impossible.finish_reason == "pages"
    # 24 tokens are in the cache; the one after them was chosen, but not read.
    assert len(prompts[0]) + long.new_tokens == 3 * PAGE + 1
    assert impossible.tokens == () and impossible.seconds_to_first_token is None
    assert short.new_tokens == 4 and short.finish_reason == "length"
    assert engine.free_pages == TINY


def a_result_says_what_it_took_test(tiny_model, roomy):
    prompt = some_prompts(1, seed=8)[0]
    result = roomy.generate([prompt], greedy(20))[0]
    said = [*prompt, *result.tokens][:-1]  # the last token is never read
    records = what_follows([said], tiny_model).records
    taken = np.mean([record.appends[:, 0, : len(said)].mean() for record in records])
    assert result.new_tokens == len(result.tokens) and result.prompt_tokens == len(prompt)
    assert result.ratio == pytest.approx(1 / taken) and result.ratio > 1.3
    read = len(prompt) + result.new_tokens - 1
    assert result.dense_cache_bytes == ROWS * -(-read // PAGE) * PAGE_BYTES
    assert ROWS * PAGE_BYTES <= result.live_cache_bytes < result.dense_cache_bytes
    assert result.seconds_to_first_token > 0 and result.tokens_per_second > 0


def page_tables_are_as_wide_as_what_came_and_not_as_the_model_could_read_test(tiny_model, alone):
    params, config = tiny_model
    far = dataclasses.replace(config, max_length=1_024_000)
    engine = build_engine((params, far), kv_bytes=2**20, pages=None)

    def width():
        return engine._scheduler._batch.cache.page_table.shape[2] * PAGE

    engine.generate([[1] * 40], greedy(3))
    assert width() <= 2048
    first = engine.submit([1, 4, 5], greedy(12))
    engine.step()
    engine.submit([1] * 20, greedy(5000))  # comes while the other one runs
    assert 5020 <= width() <= 8192
    for event in engine.stream(first):
        result = event.result
    assert what_was_said(result) == what_was_said(alone([[1, 4, 5]], [greedy(12)])[0])


def bytes_are_as_good_as_pages_test(tiny_model):
    engine = build_engine(tiny_model, pages=None, kv_bytes=40 * PAGE_BYTES + 1)
    assert engine.free_pages == 40


# ---- pages of int8 ----------------------------------------------------------------------------

INT8_PAGE_BYTES = 2 * PAGE * (16 + 4)  # with a float32 scale for each key and value


@pytest.fixture(scope="module")
def in_int8(tiny_model):
    return build_engine(tiny_model, pages=10_000, kv_dtype="int8")


def greedy_tokens_over_int8_are_those_of_whole_sequences_so_rounded_test(tiny_model, in_int8):
    prompts = some_prompts(6)
    results = in_int8.generate(prompts, greedy(16))
    said = [[*prompt, *result.tokens] for prompt, result in zip(prompts, results, strict=True)]
    logits = np.asarray(
        what_follows(said, tiny_model, attention=over_int8(causal_attention)).logits
    )
    for row, prompt, result in zip(logits, prompts, results, strict=True):
        chosen = np.array(result.tokens)
        row = row[len(prompt) - 1 :][: len(chosen)]
        # Here and there a number lies where a last bit decides to which side it is rounded.
        assert (row.max(axis=-1) - row[np.arange(len(chosen)), chosen] < 0.01).all()


def pages_of_int8_are_counted_with_their_scales_test(tiny_model, in_int8, roomy):
    engine = build_engine(
        tiny_model, pages=None, kv_bytes=40 * INT8_PAGE_BYTES + 1, kv_dtype="int8"
    )
    assert engine.free_pages == 40
    prompt = some_prompts(1, seed=8)[0]
    narrow, wide = (one.generate([prompt], greedy(1))[0] for one in (in_int8, roomy))
    assert narrow.dense_cache_bytes / wide.dense_cache_bytes == INT8_PAGE_BYTES / PAGE_BYTES
    assert narrow.live_cache_bytes % INT8_PAGE_BYTES == 0
    assert ROWS * INT8_PAGE_BYTES <= narrow.live_cache_bytes <= narrow.dense_cache_bytes
    half = build_engine(tiny_model, pages=40, kv_dtype="int8", dtype="bfloat16")
    read = half.generate([prompt], greedy(1))[0]
    pages = ROWS * -(-len(prompt) // PAGE)
    assert read.dense_cache_bytes == pages * 2 * PAGE * (16 + 2)  # a bfloat16 scale


def a_snapshot_of_other_pages_is_refused_test(in_int8, roomy):
    sequence = in_int8.submit(some_prompts(1)[0], greedy(4))
    with pytest.raises(UserError, match="the snapshot's kv_dtype is int8, this engine's is float"):
        roomy.resume(in_int8.snapshot(sequence))
    in_int8.cancel(sequence)
    in_int8.step()


# ---- ends -------------------------------------------------------------------------------------


def a_sequence_can_be_cancelled_wherever_it_is_test(roomy):
    ids = [roomy.submit([1, 5 + number], greedy(30)) for number in range(SEATS + 2)]
    before = roomy.step()
    assert roomy.running == ids[:SEATS]
    for one in (ids[1], ids[-1]):
        roomy.cancel(one)
        roomy.cancel(one)  # is no mistake
    events = roomy.step()
    ends = [event for event in events if event.finish_reason == "cancelled"]
    assert [event.sequence for event in ends] == [ids[1], ids[-1]]
    said = [token for event in before if event.sequence == ids[1] for token in event.tokens]
    assert list(ends[0].result.tokens) == said and len(said) == 2
    assert ends[1].result.tokens == () and ends[1].result.ratio is None
    assert roomy.running == [ids[0], *ids[2 : SEATS + 1]]
    for one in roomy.unfinished:
        roomy.cancel(one)
    roomy.step()
    roomy.cancel(ids[0])  # has ended long since
    assert roomy.step() == []
    with pytest.raises(UserError, match="no sequence 1000"):
        roomy.cancel(1000)


def stop_tokens_and_strings_end_a_sequence_before_them_test(roomy):
    prompt = some_prompts(1, seed=4)[0]
    whole = roomy.generate([prompt], greedy(24))[0]
    assert len(set(whole.text)) > 3
    token = whole.tokens[10]
    at = whole.tokens.index(token)
    result = roomy.generate([prompt], greedy(24, stop_token_ids=(token,)))[0]
    assert (result.tokens, result.finish_reason) == (whole.tokens[:at], "stop")
    string = whole.text[5:9]
    cut = whole.text.index(string)
    parts, tokens = [], []
    for event in roomy.stream([prompt], greedy(24, stop=("?", string))):
        parts.append(event.text)
        tokens += event.tokens
    assert "".join(parts) == event.result.text == whole.text[:cut]
    assert event.finish_reason == "stop" and tuple(tokens) == event.result.tokens
    assert event.result.tokens == whole.tokens[: len(tokens)] and len(tokens) < 24


# ---- streams ----------------------------------------------------------------------------------


def streams_take_turns_and_each_gets_its_own_events_test(roomy, alone):
    prompts, params = some_prompts(5, seed=6), some_params(5, seed=6)
    one = roomy.submit(prompts[4], params[4])
    streams = [roomy.stream(prompts[:2], params[:2]), roomy.stream(prompts[2:4], params[2:4])]
    streams.append(roomy.stream(one))
    texts, left = [{}, {}, {}], [0, 1, 2]
    while left:
        for number in list(left):
            event = next(streams[number], None)
            if event is None:
                left.remove(number)
            else:
                texts[number].setdefault(event.sequence, []).append(event.text)
    said = ["".join(parts) for text in texts for _, parts in sorted(text.items())]
    assert said == [result.text for result in alone(prompts, params)]
    assert roomy._inboxes == {}


def a_closed_stream_cancels_its_own_prompts_and_no_others_test(roomy):
    other = roomy.submit([1, 9], greedy(6))
    stream = roomy.stream([[1, 4], [1, 5]], greedy(30))
    next(stream)
    stream.close()
    assert roomy.unfinished == [other]
    watched = roomy.stream(other)
    with pytest.raises(UserError, match="a stream reads it already"):
        roomy.stream(other)
    watched.close()
    assert [event.result.new_tokens for event in roomy.stream(other) if event.finish_reason] == [6]
    with pytest.raises(UserError, match="has ended"):
        roomy.stream(other)


def text_prompts_begin_with_bos_test(roomy):
    by_text = roomy.generate("HeJ", greedy(6))[0]
    assert by_text.prompt_tokens == 4
    by_ids = roomy.generate([[1, *Pieces().encode("HeJ")]], greedy(6))[0]
    assert what_was_said(by_text) == what_was_said(by_ids)


# ---- what comes in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, params, complaint",
    [
        ([[]], greedy(1), "no token"),
        ([[1], [1, 50]], greedy(1), r"prompts\[1\]: token 50: the model's ids are 0 to 49"),
        ([[1]], greedy(1, stop_token_ids=(-1,)), "token -1"),
        ([[1, 2.5]], greedy(1), "whole numbers"),
        (["a\ud83d"], greedy(1), "half of a surrogate pair"),
        ([[1] * 120], greedy(9), "120 tokens and 9 new ones exceed the 128"),
        ([[1]], [greedy(1)] * 2, "1 prompts but 2 SamplingParams"),
    ],
)
@pytest.mark.usefixtures("annotations_aside")
def bad_prompts_are_refused_at_once_and_with_all_others_test(roomy, prompts, params, complaint):
    with pytest.raises(UserError, match=complaint):
        roomy.stream(prompts, params)
    assert roomy.unfinished == []


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"kv_bytes": 1}, "one of pages and kv_bytes"),
        ({"pages": None}, "one of pages and kv_bytes"),
        ({"pages": 3}, "3 pages cannot hold a token of the 4 rows.*4 pages, 4,096 bytes"),
        ({"page_size": 0}, "page_size must be a power of two"),
        ({"max_sequences": 0}, "seats must be 1 or more"),
        ({"max_length": 129}, "made for 128, got 129"),
        ({"dtype": "float16"}, "dtype: expected float32 or bfloat16, got 'float16'"),
        ({"kv_dtype": "int4"}, "kv_dtype: expected float32 or bfloat16 or int8, got 'int4'"),
    ],
)
def an_engine_that_cannot_be_is_refused_test(tiny_model, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        build_engine(tiny_model, **changes)


def a_checkpoint_makes_an_engine_of_either_policy_test(tiny_model, monkeypatch):
    params, config = tiny_model
    loaded = models.LoadedModel(
        path="run",
        format="dmc_jax",
        metadata=Metadata("finetune", 1, config, DMC(SETTINGS, HALF), "float32"),
        tokenizer=Path(__file__),
        tokenizer_sha256=frozenset([__file__]),
        read_params=None,
        params=params,
    )
    monkeypatch.setattr(engine_module, "find_model", lambda path: loaded)
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: Pieces())
    monkeypatch.setattr(models, "fingerprint", str)
    ratios = {}
    for policy in ("dmc", "dense"):
        engine = Engine.from_checkpoint(
            "run", policy=policy, kv_bytes=TINY * PAGE_BYTES, max_sequences=SEATS, page_size=PAGE
        )
        assert engine.free_pages == TINY
        ratios[policy] = engine.generate([[1, *range(3, 18)]], greedy(4))[0].ratio
    assert ratios["dense"] == 1 and ratios["dmc"] > 1.3
    with pytest.raises(
        UserError, match="expected dense or dmc or dms or stride or .* or snapkv, got 'none'"
    ):
        Engine.from_checkpoint("run", policy="none")
    with pytest.raises(UserError, match="other is not the tokenizer that run was trained with"):
        Engine.from_checkpoint("run", tokenizer="other")


# ---- snapshots --------------------------------------------------------------------------------


def run_until(engine, sequence, tokens):
    """Steps until a sequence has some new tokens."""
    said = 0
    while said < tokens:
        said += sum(len(event.tokens) for event in engine.step() if event.sequence == sequence)


def long_enough(engine, prompt, **changes):
    """The first seed with which a sequence does not end soon, and what it says then."""
    for seed in range(100):
        params = SamplingParams(30, seed=seed, **changes)
        result = engine.generate([prompt], params)[0]
        if result.new_tokens > 20:
            return params, what_was_said(result)
    raise AssertionError("no sequence is long enough")


def results_of(engine, *sequences):
    left, results = set(sequences), {}
    while left - set(results):
        for event in engine.step():
            if event.finish_reason:
                results[event.sequence] = event.result
    return [what_was_said(results[one]) for one in sequences]


@pytest.mark.parametrize(
    ("window", "threshold", "dtype", "kv_dtype"),
    [
        (12, HALF, "float32", None),
        (None, HALF, "bfloat16", None),
        (12, None, "float32", None),
        (12, HALF, "float32", "int8"),
        pytest.param(12, HALF, "bfloat16", "int8", marks=pytest.mark.slow),
    ],
)
def a_forked_or_restored_sequence_goes_on_as_the_first_does_test(
    tiny_model, build_model, tmp_path, window, threshold, dtype, kv_dtype
):
    settings = None if threshold is None else DMCSettings(offset=0.0, window=window)
    options = {"policy": policy_of(settings), "dtype": dtype, "kv_dtype": kv_dtype}
    model = tiny_model if settings == SETTINGS else build_model(layers=1)
    make = functools.partial(build_engine, model, pages=10_000, **options)
    engine, [first, other] = make(), some_prompts(2, seed=3)
    params, expected = long_enough(engine, first, stop=("HH",))
    # Among others, and with a stop string that may have begun.
    engine.submit(other, greedy(30))
    sequence = engine.submit(first, params)
    run_until(engine, sequence, 11)
    engine.snapshot(sequence).save(tmp_path / "sequence.npz")
    read = programs.read_prompts
    try:
        programs.read_prompts = None  # what follows must not read a prompt again
        fork = engine.fork(sequence)
        assert results_of(engine, sequence, fork) == [expected, expected]
        elsewhere = make()
        free = elsewhere.free_pages
        restored = elsewhere.resume(load_snapshot(tmp_path / "sequence.npz"))
        assert results_of(elsewhere, restored) == [expected]
    finally:
        programs.read_prompts = read
    assert elsewhere.free_pages == free


def a_fork_may_go_on_in_another_way_and_harms_nobody_test(roomy):
    [prompt] = some_prompts(1, seed=3)
    params, expected = long_enough(roomy, prompt)
    sequence = roomy.submit(prompt, params)
    run_until(roomy, sequence, 5)
    seeds = (106, 107, 108)
    others = [roomy.fork(sequence, dataclasses.replace(params, seed=seed)) for seed in seeds]
    first, *rest = results_of(roomy, sequence, *others)
    assert first == expected
    assert len({first[0], *(tokens for tokens, *_ in rest)}) == 4
    assert all(tokens[:5] == first[0][:5] for tokens, *_ in rest)


def a_prompt_that_goes_on_where_a_snapshot_ends_is_read_from_there_test(
    tiny_model, alone, monkeypatch
):
    engine = build_engine(tiny_model, pages=10_000)
    [first] = some_prompts(1, seed=3)
    params = greedy(40, ignore_eos=True)
    sequence = engine.submit(first, params)
    said = []
    while len(said) < 9:
        said += [token for event in engine.step() for token in event.tokens]
    snapshot = engine.snapshot(sequence)
    engine.cancel(sequence)
    held = snapshot.rows.position
    assert held == len(first) + len(said) - 1
    read, begins = programs.read_prompts, []
    monkeypatch.setattr(
        programs,
        "read_prompts",
        lambda *args, **options: (
            begins.extend(begin for _, begin in args[3]),
            read(*args, **options),
        )[1],
    )
    for more in ([*said[-1:], 7, 8, 9, 10], said[-1:]):
        prompt = [*first, *said[:-1], *more]
        asked = [greedy(12), SamplingParams(12, seed=5, logprobs=0)]
        results = []
        for one in asked:
            next_turn = engine.resume(snapshot.followed_by(prompt), one)
            results += results_of(engine, next_turn)
        assert begins == [held] * 2
        assert results == [what_was_said(result) for result in alone([prompt] * 2, asked)]
        begins.clear()
    with pytest.raises(UserError, match=f"does not begin with the {held} tokens"):
        snapshot.followed_by([*first, *said[:-1]])
    with pytest.raises(UserError, match="not in the cache"):
        dataclasses.replace(snapshot, rows=None).followed_by(prompt)
    cuts = {**snapshot.model, "policy": {"name": "snapkv"}}
    with pytest.raises(UserError, match="snapkv cuts a prompt"):
        dataclasses.replace(snapshot, model=cuts).followed_by(prompt)


def a_snapshot_of_a_sequence_that_waits_is_read_again_test(tiny_model, alone, departures):
    prompts, params = some_prompts(6, seed=4, longest=10), [greedy(20)] * 6
    engine = build_engine(tiny_model, pages=TINY)
    ids = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    while not departures:
        engine.step()
    copies = [engine.fork(one) for one in engine.unfinished]
    of = dict(zip(copies, engine.unfinished, strict=False))
    expected = list(map(what_was_said, alone(prompts, params)))
    assert results_of(engine, *copies) == [expected[ids.index(of[one])] for one in copies]
    assert engine.free_pages == TINY


def a_snapshot_is_refused_where_it_cannot_go_on_test(tiny_model, roomy, tmp_path):
    sequence = roomy.submit([1, 5, 6], greedy(8))
    run_until(roomy, sequence, 4)
    snapshot = roomy.snapshot(sequence)
    with pytest.raises(UserError, match="page_size is 8, this engine's is 16"):
        build_engine(tiny_model, page_size=16).resume(snapshot)
    with pytest.raises(UserError, match="4 new tokens cannot be resumed"):
        roomy.resume(snapshot, greedy(4))
    roomy.cancel(sequence)
    roomy.step()
    with pytest.raises(UserError, match="ended or never was"):
        roomy.snapshot(sequence)
    for content in (b"", b"no archive"):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(UserError, match="broken is not a snapshot"):
            load_snapshot(tmp_path / "broken")
    with pytest.raises(UserError, match="absent is not a snapshot"):
        load_snapshot(tmp_path / "absent")


def logits_that_are_no_numbers_end_their_sequence_with_an_error_test(tiny_model):
    params, config = tiny_model
    # The token 7 poisons whoever reads it; others are not touched.
    broken = {**params, "embedding": np.array(params["embedding"])}
    broken["embedding"][7] = np.nan
    engine = build_engine((broken, config))
    greedy = SamplingParams(max_new_tokens=4, temperature=0.0, stop_token_ids=(7,))
    alone = build_engine(tiny_model).generate([[1, 5, 6]], greedy)
    engine.submit([1, 5, 6], greedy)
    engine.submit([1, 7, 6], greedy)
    with pytest.raises(RunFailure, match="sequence 1: after 3 tokens the model's logits are NaN"):
        engine.step()
    results = []
    while engine.unfinished:
        results += [event.result for event in engine.step() if event.finish_reason]
    assert [result.tokens for result in results] == [alone[0].tokens]


def log_probabilities_are_those_of_the_model_whoever_asked_for_them_test(tiny_model, alone):
    engine, prompts = build_engine(tiny_model, pages=TINY), some_prompts(5, seed=8, longest=10)
    asked = [None, 0, 3, 20, None]
    params = [SamplingParams(12, temperature=1.5, seed=n, logprobs=x) for n, x in enumerate(asked)]
    parts = {}
    results = {}
    for event in engine.stream(prompts, params):
        assert (event.logprobs is None) == (asked[event.sequence] is None or not event.tokens)
        parts[event.sequence] = (*parts.get(event.sequence, ()), *(event.logprobs or ()))
        results[event.sequence] = event.result
    results = [results[n] for n in range(5)]
    plain = alone(prompts, [dataclasses.replace(one, logprobs=None) for one in params])
    assert list(map(what_was_said, results)) == list(map(what_was_said, plain))
    said = [[*prompt, *result.tokens] for prompt, result in zip(prompts, results, strict=True)]
    expected = jax.nn.log_softmax(what_follows(said, tiny_model).logits, axis=-1)
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        if asked[row] is None:
            assert result.logprobs is None
            continue
        assert result.logprobs == parts[row] and len(result.logprobs) == len(result.tokens)
        of_tokens = expected[row, len(prompt) - 1 :]
        for token, of_all, one in zip(result.tokens, of_tokens, result.logprobs, strict=False):
            np.testing.assert_allclose(one.logprob, of_all[token], atol=1e-4)
            ids, values = [x for x, _ in one.likely], [x for _, x in one.likely]
            assert len(ids) == len(set(ids)) == asked[row]
            np.testing.assert_allclose(values, np.sort(of_all)[::-1][: asked[row]], atol=1e-4)
            np.testing.assert_allclose(values, of_all[np.array(ids, int)], atol=1e-4)


def every_eos_ends_a_text_test(tiny_model):
    class TwoEnds(Pieces):
        eos_ids = (2, 30)

    params, config = tiny_model
    # Greedy, one token follows whatever was read.
    head = np.zeros_like(params["head"])
    certain = {**params, "head": head, "embedding": np.ones_like(params["embedding"])}
    head[:, 30] = 1.0
    options = {"policy": Dense(), "max_sequences": 1, "pages": 99, "page_size": PAGE}
    greedy = SamplingParams(max_new_tokens=5, temperature=0.0)
    [ended] = Engine(certain, config, TwoEnds(), **options).generate([[1, 5]], greedy)
    [went_on] = Engine(certain, config, Pieces(), **options).generate([[1, 5]], greedy)
    assert (ended.finish_reason, ended.tokens) == ("stop", ())
    assert (went_on.finish_reason, went_on.tokens) == ("length", (30,) * 5)
    endless = dataclasses.replace(greedy, ignore_eos=True)
    [ignored] = Engine(certain, config, TwoEnds(), **options).generate([[1, 5]], endless)
    assert (ignored.finish_reason, ignored.tokens) == ("length", (30,) * 5)
