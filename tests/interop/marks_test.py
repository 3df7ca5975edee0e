"""A model's own ends and BOS, from its files through conversion, decoding and exports and back."""

import dataclasses
import json
import shutil

import pytest

from dmc_jax.checkpoints.models import find_model, load_tokenizer_of
from dmc_jax.data.tokenizer import encode_prompt, train_sentencepiece
from dmc_jax.data.tokenizer_files import SpecialTokens
from dmc_jax.errors import UserError
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import describe, open_source, with_tokenizer
from tests.interop.checkpoint_files import write_checkpoint
from tests.interop.reference_llama import Sizes, random_weights

SIZES = Sizes(V=310, D=32, H=8)
TEXT = "the cache merges a token into its newest slot "
LLAMA_3 = {"generation_config.json": {"eos_token_id": [257, 258], "temperature": 0.6}}
CHATML = {
    "tokenizer_config.json": {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
        "chat_template": "{{ messages }}",
    },
    "added_tokens.json": {"<|im_start|>": 300, "<|im_end|>": 301},
}


@pytest.fixture
def model(tmp_path):
    """Make a Hugging Face folder with a SentencePiece model of 300 pieces and files beside it."""

    def make(files, config=None, weights=None):
        folder = tmp_path / "hf"
        write_checkpoint(folder, SIZES, weights, **config or {})
        train_sentencepiece([TEXT * 50], 300, folder / "tokenizer.model")
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        return folder

    return make


def written(write, source, folder):
    folder.mkdir()
    write(source, folder, None, lambda _: None)
    return folder


MODELS = {
    "as Llama 3 Instruct": (LLAMA_3, {}, SpecialTokens(1, (2, 257, 258), 3, True)),
    "a list in config.json": (
        {},
        {"eos_token_id": [257, 258]},
        SpecialTokens(1, (2, 257, 258), 3, True),
    ),
    "as SmolLM2, ChatML": (CHATML, {}, SpecialTokens(300, (301,), 3, False)),
    "no BOS": (
        {"tokenizer_config.json": {"add_bos_token": False}},
        {},
        SpecialTokens(1, (2,), 3, False),
    ),
}


@pytest.mark.parametrize("files, config, special", MODELS.values(), ids=MODELS)
def marks_go_wherever_the_model_goes_test(model, tmp_path, files, config, special):
    hf = model(files, config)
    source = with_tokenizer(open_source(hf))
    assert source.special == special
    ours = written(write_dmc_jax, source, tmp_path / "ours")
    shutil.rmtree(hf)
    assert find_model(ours).metadata.special_tokens == special
    back = written(write_huggingface, open_source(ours), tmp_path / "back")
    shutil.rmtree(ours)
    for found in (
        find_model(back).metadata.special_tokens,
        with_tokenizer(open_source(back)).special,
    ):
        assert (found.bos_id, found.add_bos) == (special.bos_id, special.add_bos)
        assert found.eos_ids == special.eos_ids
    ids = special.eos_ids[0] if len(special.eos_ids) == 1 else list(special.eos_ids)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((back / name).read_text())["eos_token_id"] == ids
    # What the model's own files say besides is kept.
    for name, content in files.items():
        kept = json.loads((back / name).read_text())
        assert all(kept[key] == content[key] for key in content if key != "eos_token_id")


@pytest.mark.parametrize("end", [2, 257, 258])
def a_model_stops_at_every_eos_test(model, end):
    weights = random_weights(SIZES)
    for name in weights:  # whatever is read, `end` follows
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = 0 * weights[name]
    weights["model.embed_tokens.weight"][:] = weights["model.norm.weight"][:] = 1
    weights["lm_head.weight"][:] = 0
    weights["lm_head.weight"][end] = 1
    engine = Engine.from_checkpoint(model(LLAMA_3, weights=weights), kv_bytes=2**20)
    greedy = SamplingParams(max_new_tokens=4, temperature=0.0)
    [result] = engine.generate(["the cache"], greedy)
    assert (result.finish_reason, result.tokens) == ("stop", ())


def ids_that_only_the_model_has_are_kept_as_tokens_and_are_no_text_test(model):
    weights = random_weights(SIZES)
    weights["lm_head.weight"][:] = 0
    weights["model.norm.weight"][:] = weights["model.embed_tokens.weight"][:] = 1
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = 0 * weights[name]
    weights["lm_head.weight"][309] = 1  # padding of the vocabulary
    engine = Engine.from_checkpoint(model(CHATML, weights=weights), kv_bytes=2**20)
    [result] = engine.generate(["a"], SamplingParams(max_new_tokens=3, temperature=0.0))
    assert (result.text, result.tokens) == ("", (309,) * 3)


def prompts_follow_the_rule_of_the_model_and_a_flag_outranks_it_test(model, tmp_path):
    hf = model(CHATML)
    ids = load_tokenizer_of(find_model(hf)).encode("the cache")
    assert encode_prompt(load_tokenizer_of(find_model(hf)), "the cache") == ids
    forced = with_tokenizer(open_source(hf), add_bos=True)
    assert dataclasses.asdict(forced.special)["add_bos"]
    ours = written(write_dmc_jax, forced, tmp_path / "ours")
    back = written(write_huggingface, forced, tmp_path / "back")
    for folder in (ours, back):
        assert encode_prompt(load_tokenizer_of(find_model(folder)), "the cache") == [300, *ids]
    tokenizer = load_tokenizer_of(find_model(ours), add_bos=False)
    assert encode_prompt(tokenizer, "the cache") == ids


def what_was_found_is_told_test(model):
    text = describe(with_tokenizer(open_source(model(CHATML))))
    assert (
        "tokenizer: tokenizer.model; BOS <|im_start|> (300), not added; a text ends at "
        "<|im_end|> (301)" in text
    )
    assert "the model has 310 ids, its tokenizer 302: the others stand for nothing in text" in text
    assert "rope theta 10000, eps 1e-05" in text


def a_tokenizer_is_checked_when_a_model_is_converted_test(model):
    hf = model({"added_tokens.json": {"[PAD]": 310}})
    assert any(
        "'[PAD]', id 310: the model has 310" in n for n in with_tokenizer(open_source(hf)).notes
    )
    (hf / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    with pytest.raises(UserError, match="tokenizer.model is a Git LFS pointer"):
        with_tokenizer(open_source(hf))
    # Whoever brings another tokenizer needs this one no more.
    assert find_model(hf).config.vocab_size == 310
    (hf / "tokenizer.model").unlink()
    source = with_tokenizer(open_source(hf))
    assert any("has no tokenizer (tokenizer.model or tokenizer.json)" in n for n in source.notes)
