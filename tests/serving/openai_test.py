"""OpenAI's own client gets from a server what the engine says alone."""

import logging
import time

import httpx
import openai
import pytest

from dmc_jax.data.tokenizer import encode_prompt
from dmc_jax.inference.sampling import SamplingParams
from tests.serving.live import LIMITS, MODEL, PAGES, PATIENCE, make_engine, serving

SECRET = "abaaba XYZZY"


@pytest.fixture(scope="module")
def live(tiny):
    with serving(tiny, make_engine(tiny)) as live:
        yield live


@pytest.fixture
def client(live):
    with openai.OpenAI(
        base_url=live.url, api_key="none", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


@pytest.fixture(scope="module")
def alone(tiny):
    """Another engine, which nobody shares."""
    engine = make_engine(tiny)

    def result(prompt, new, seed, **options):
        params = SamplingParams(new, **{"temperature": 1.0, "seed": seed} | options)
        return engine.generate([prompt], params)[0]

    return result


def chat_ids(tiny, *messages):
    text = "".join(f"<s>{role[0]} {content}</s>" for role, content in messages)
    return tiny.tokenizer.encode_special(f"{text}<s>a ")


@pytest.mark.slow
def what_was_read_before_is_not_read_again_and_counted_test(tiny, alone):
    prompt = "abba" * 20
    with (  # with pages for what three leave behind
        serving(tiny, make_engine(tiny, prefix_cache=None, pages=4 * PAGES)) as live,
        openai.OpenAI(base_url=live.url, api_key="none", max_retries=0, timeout=PATIENCE) as client,
    ):
        said = [
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
            for _ in range(3)  # the second keeps what it has in common with the first
        ]
    counts = [done.usage.prompt_tokens_details.cached_tokens for done in said]
    assert counts == [0, 0, said[0].usage.prompt_tokens - 1]
    expected = alone(prompt, 4, 0, temperature=0.0).text
    assert [done.choices[0].text for done in said] == [expected] * 3


def a_completion_is_what_the_engine_says_alone_test(client, alone, live):
    done = client.completions.create(model=MODEL, prompt="abba", max_tokens=12, seed=3, top_p=0.9)
    expected = alone("abba", 12, 3, top_p=0.9)
    [choice] = done.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert (done.object, done.model, choice.logprobs) == ("text_completion", MODEL, None)
    usage = done.usage
    counts = expected.prompt_tokens, expected.new_tokens
    assert (usage.prompt_tokens, usage.completion_tokens) == counts
    assert usage.total_tokens == sum(counts) and usage.prompt_tokens_details.cached_tokens == 0
    assert usage.model_extra["compression"]["cache_bytes"] == expected.live_cache_bytes
    metrics = live.wait_until_idle()
    assert "dmc_time_to_first_token_seconds_count" in metrics and "dmc_tokens_per_second" in metrics


def several_prompts_have_several_choices_that_differ_by_seed_test(client, alone, tiny):
    prompts = ["abba", "é€ ab"]
    expected = [alone(prompt, 9, 5 + n) for prompt in prompts for n in range(2)]
    for given in (prompts, [encode_prompt(tiny.tokenizer, prompt) for prompt in prompts]):
        done = client.completions.create(model=MODEL, prompt=given, max_tokens=9, seed=5, n=2)
        assert [choice.index for choice in done.choices] == list(range(4))
        assert [choice.text for choice in done.choices] == [one.text for one in expected]
        # The choices of a prompt share it.
        assert done.usage.prompt_tokens == sum(one.prompt_tokens for one in expected) / 2
    assert len({choice.text for choice in done.choices}) == 4


@pytest.mark.parametrize("n", [1, 4])
def a_stream_joins_to_the_whole_test(client, alone, n):
    options = {"model": MODEL, "max_tokens": 20, "seed": 8, "n": n}
    texts, reasons, usages = [""] * n, {}, []
    with client.completions.create(
        prompt="ab é", stream=True, stream_options={"include_usage": True}, **options
    ) as stream:
        for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
    whole = client.completions.create(prompt="ab é", **options)
    assert texts == [choice.text for choice in whole.choices]
    assert texts == [alone("ab é", 20, 8 + place).text for place in range(n)]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usages[-1] == whole.usage and set(usages[:-1]) == {None}
    with client.completions.create(prompt="ab é", stream=True, **options) as stream:
        assert all(chunk.usage is None and chunk.choices for chunk in stream)


def a_chat_is_rendered_by_the_models_template_test(client, alone, tiny):
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "ba"}]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": parts}]
    options = {"model": MODEL, "messages": messages, "seed": 4, "max_completion_tokens": 10}
    done = client.chat.completions.create(**options)
    expected = alone(chat_ids(tiny, ("system", "b"), ("user", "abba")), 10, 4)
    [choice] = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert done.usage.prompt_tokens == expected.prompt_tokens
    with client.chat.completions.create(stream=True, **options) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    # Without a number of tokens: as many as one request may have.
    del options["max_completion_tokens"]
    endless = client.chat.completions.create(**options, extra_body={"ignore_eos": True})
    assert endless.usage.completion_tokens == LIMITS.new_tokens


def a_text_ends_before_a_stop_string_test(client, alone):
    text = alone("abba", 30, 0, temperature=0.0).text
    stop = text[5:7]
    options = {"model": MODEL, "prompt": "abba", "max_tokens": 30, "temperature": 0}
    for given in (stop, ["not there", stop]):
        done = client.completions.create(stop=given, **options)
        assert done.choices[0].text == text[: text.index(stop)]
        assert done.choices[0].finish_reason == "stop"
    with client.completions.create(stop=stop, stream=True, **options) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]


def a_request_has_a_ratio_of_its_own_test(client, alone):
    options = {"model": MODEL, "prompt": "abba" * 7, "max_tokens": 20, "temperature": 0}
    slots = {}
    for ratio in (1.0, 3.0):
        done = client.completions.create(extra_body={"ratio": ratio}, **options)
        expected = alone("abba" * 7, 20, 0, temperature=0.0, ratio=ratio)
        assert done.choices[0].text == expected.text
        slots[ratio] = done.usage.model_extra["compression"]["tokens_per_slot"]
        assert slots[ratio] == pytest.approx(expected.ratio)
    assert slots[1.0] == 1 and slots[3.0] > 1.2


def log_probabilities_stand_beside_their_tokens_test(client, alone):
    options = {"model": MODEL, "max_tokens": 8, "seed": 2}
    expected = alone("abba", 8, 2, logprobs=3)
    done = client.completions.create(prompt="abba", logprobs=3, **options)
    said = done.choices[0].logprobs
    assert said.token_logprobs == [one.logprob for one in expected.logprobs]
    for name, own, top, one in zip(
        *(said.tokens, said.token_logprobs, said.top_logprobs, expected.logprobs), strict=True
    ):
        assert set(top.values()) <= {logprob for _, logprob in one.likely}
        assert top.get(name, own) == own or "\ufffd" in name  # several bytes are called so
    assert len(said.tokens) == len(expected.tokens) == len(said.text_offset)
    joined, text = "".join(said.tokens), done.choices[0].text
    assert joined == text or "\ufffd" in joined  # characters of several tokens
    with client.completions.create(prompt="abba", logprobs=3, stream=True, **options) as stream:
        parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [x for part in parts for x in part.token_logprobs] == said.token_logprobs
    assert [x for part in parts for x in part.text_offset] == said.text_offset

    messages = [{"role": "user", "content": "abba"}]
    options |= {"messages": messages, "logprobs": True}
    done = client.chat.completions.create(top_logprobs=2, **options)
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 2 and entry.logprob <= entry.top_logprobs[0].logprob
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    none = client.chat.completions.create(**options).choices[0].logprobs.content
    assert [(x.logprob, x.top_logprobs) for x in none] == [(x.logprob, []) for x in content]


REFUSED = {
    "no such model": ({"model": "gpt"}, openai.NotFoundError, "there is no model 'gpt' here"),
    "too long": ({"prompt": "ab" * 300}, openai.BadRequestError, "here it may have 100"),
    "no room": ({"prompt": "ab" * 95, "max_tokens": 40}, openai.BadRequestError, "exceed the 128"),
    "too many": ({"max_tokens": 41}, openai.BadRequestError, "max_tokens: expected a whole number"),
    "choices": ({"n": 9}, openai.BadRequestError, "n: expected a whole number from 1 to 8"),
    "negative": ({"temperature": -1}, openai.BadRequestError, "temperature: expected"),
    "top_p": ({"top_p": 0}, openai.BadRequestError, "top_p: expected a probability"),
    "unknown": ({"extra_body": {"magic": 1}}, openai.BadRequestError, "unknown field 'magic'"),
    "echo": ({"echo": True}, openai.BadRequestError, "echo: only false here"),
    "stop": ({"stop": ["a"] * 17}, openai.BadRequestError, "stop: expected 16 texts"),
    "ids": ({"prompt": [1, 999]}, openai.BadRequestError, "token 999: the model's ids"),
    "ratio": ({"extra_body": {"ratio": 7.5}}, openai.BadRequestError, "ratio"),
    "not streamed": (
        {"stream_options": {"include_usage": True}},
        openai.BadRequestError,
        "stream_options: only for streams",
    ),
}


@pytest.mark.parametrize("fields, kind, message", REFUSED.values(), ids=REFUSED)
def what_cannot_be_is_refused_by_name_test(client, fields, kind, message):
    with pytest.raises(kind, match=message) as refused:
        client.completions.create(
            **{"model": MODEL, "prompt": "ab", "max_tokens": 4, "temperature": 0} | fields
        )
    assert set(refused.value.body) == {"message", "type", "param", "code"}


def models_are_listed_test(client):
    [model] = client.models.list().data
    assert (model.id, client.models.retrieve(MODEL).id) == (MODEL, MODEL)
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("other/model")


def no_text_of_a_prompt_is_logged_test(client, live, caplog):
    caplog.set_level(logging.DEBUG)
    client.completions.create(model=MODEL, prompt=SECRET, max_tokens=2)
    messages = [{"role": "user", "content": SECRET}]
    with client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=2, stream=True
    ) as stream:
        list(stream)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=SECRET * 99)
    assert httpx.get(f"{live.url}/{SECRET}?{SECRET}", timeout=PATIENCE).status_code == 404
    clients = ("httpx", "httpcore", "openai")
    until, logged = time.monotonic() + PATIENCE, []
    while not any(line.startswith("GET other 404") for line in logged):  # after its client has it
        assert time.monotonic() < until
        time.sleep(0.01)
        records = list(caplog.records)
        logged = [x.getMessage() for x in records if not x.name.startswith(clients)]
    assert sum(line.startswith("POST /v1/completions 200") for line in logged) == 1
    assert not [line for line in logged if "XYZZY" in line]
