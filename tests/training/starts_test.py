"""`--config.init_from=` takes other formats directly, and is not fooled by another model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import sentencepiece

from dmc_jax.checkpoints.models import find_model
from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    MeshConfig,
    RunConfig,
    StageConfig,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.prepare import prepare
from dmc_jax.data.tokenizer import train_sentencepiece
from dmc_jax.errors import UserError
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.formats import open_source
from dmc_jax.model.sharding import make_mesh
from dmc_jax.training import starts
from dmc_jax.training.loop import train
from dmc_jax.training.optimizer import make_optimizer
from tests.interop.checkpoint_files import write_checkpoint
from tests.interop.gguf_by_hand import gguf_bytes, llama_metadata, llama_tensors
from tests.interop.reference_llama import Sizes, random_weights

SIZES = Sizes(V=280)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared data, and a Hugging Face checkpoint with its tokenizer."""
    root = tmp_path_factory.mktemp("foreign")
    (root / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        lines = [f"{a} plus {b} is {a + b}." for a, b in rng.integers(0, 50, size=(20, 2))]
        (root / "texts" / f"{i:03d}.txt").write_text("\n".join(lines))
    data = prepare(
        root / "data", source=root / "texts", vocab_size=280, workers=1, report=lambda _: None
    )
    write_checkpoint(root / "hf", SIZES, random_weights(SIZES))
    (root / "hf/tokenizer.model").write_bytes(data.tokenizer_path.read_bytes())
    return root


@pytest.fixture
def run(folders, tmp_path):
    stage = StageConfig(steps=2, learning_rate=3e-3)
    return RunConfig(
        name="run",
        output=str(tmp_path),
        model=open_source(folders / "hf").config,
        dmc=DMCSettings(window=4, temperature=0.5, offset=1.0),
        compression=CompressionConfig(ratio=2.0, distillation=0.5),
        data=DataConfig(path=str(folders / "data"), length=32, batch=4),
        stages="retrofit",
        init_from=str(folders / "hf"),
        pretrain=stage,
        zero_out=stage,
        retrofit=stage,
        finetune=stage,
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        compute_dtype="float32",
        attention_block=16,
        log_every=1,
        eval_windows=4,
    )


def losses(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture
def mesh(run):
    return make_mesh(run.mesh, jax.devices()[:4])


def converted(run, folder, target):
    """The run, from a checkpoint of ours with the same weights."""
    target.mkdir()
    write_dmc_jax(open_source(folder), target, None, lambda _: None)
    return dataclasses.replace(run, name="other", init_from=str(target))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


def a_start_and_a_teacher_from_a_hugging_face_folder_equal_those_of_its_conversion_test(
    run, mesh, folders, tmp_path
):
    other = converted(run, folders / "hf", tmp_path / "ours")
    optimizer = make_optimizer(run.optimizer, 1.0)
    (direct, _), (ours, _) = (
        starts.start_of_stage(each, "retrofit", optimizer, mesh) for each in (run, other)
    )
    assert_equal(direct, ours)
    assert len(direct.params["run_0"]["q"]["kernel"].sharding.device_set) == 4
    teachers = [starts.load_teacher(each, "retrofit", mesh) for each in (run, other)]
    assert teachers[0][0] == teachers[1][0] == run.model
    assert_equal(teachers[0][1], teachers[1][1])


@pytest.mark.slow
def a_run_from_a_hugging_face_folder_equals_one_from_its_conversion_test(
    run, folders, tmp_path, monkeypatch
):
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    direct = losses(train(run, quiet=True))
    assert direct == losses(train(converted(run, folders / "hf", tmp_path / "ours"), quiet=True))
    assert len(direct) == 2 and direct[0][1] != direct[1][1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_theta": 5e5}, "has rope_theta 10000.0, config.model.rope_theta is 500000.0"),
        ({"layers": 3}, "has layers 2, config.model.layers is 3"),
        ({"kv_heads": 1}, r"has kv_heads \(2, 2\), config.model.kv_heads is \(1, 1\)"),
        ({"tied_embeddings": True}, "has tied_embeddings False"),
    ],
)
def a_config_of_another_model_is_refused_before_anything_is_written_test(
    change, message, run, tmp_path
):
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, **change))
    with pytest.raises(UserError, match=message):
        starts.initial_model(other)
    assert list(tmp_path.iterdir()) == []


def how_the_config_spells_equal_layers_and_the_length_does_not_matter_test(run):
    model = dataclasses.replace(run.model, kv_heads=(2, 2), max_length=4096)
    found = starts.initial_model(dataclasses.replace(run, model=model))
    assert found.format == "huggingface"


def text_of_another_tokenizer_is_refused_test(run, tmp_path):
    write_checkpoint(tmp_path / "hf", SIZES, random_weights(SIZES))
    train_sentencepiece(["another text altogether " * 50], 280, tmp_path / "hf/tokenizer.model")
    other = dataclasses.replace(run, init_from=str(tmp_path / "hf"))
    with pytest.raises(UserError, match="trained with another tokenizer than the one of"):
        starts.initial_model(other)
    (tmp_path / "hf/tokenizer.model").unlink()  # without one there is nothing to compare
    assert starts.initial_model(other).tokenizer is None


def a_start_from_a_gguf_file_with_text_of_its_own_tokenizer_is_the_same_test(
    run, mesh, folders, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    theirs = sentencepiece.SentencePieceProcessor(str(folders / "hf/tokenizer.model"))
    ids = range(theirs.get_piece_size())
    kinds = (theirs.is_unknown, theirs.is_control, theirs.is_byte)
    types = [next((n for f, n in zip(kinds, (2, 3, 6), strict=True) if f(i)), 1) for i in ids]
    tokenizer = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(token) for token in ids],
        "tokenizer.ggml.scores": np.array([theirs.get_score(token) for token in ids], "<f4"),
        "tokenizer.ggml.token_type": np.array(types, "<i4"),
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.add_space_prefix": False,
    }
    tensors = llama_tensors(random_weights(SIZES), SIZES)
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_bytes(llama_metadata(SIZES) | tokenizer, tensors))
    prepare(
        tmp_path / "data",
        source=folders / "texts",
        tokenizer=find_model(file).tokenizer,
        workers=1,
        report=lambda _: None,
    )
    data = dataclasses.replace(run.data, path=str(tmp_path / "data"))
    other = dataclasses.replace(run, init_from=str(file), data=data)
    assert starts.initial_model(other).format == "gguf"
    optimizer = make_optimizer(run.optimizer, 1.0)
    (one, _), (same, _) = (
        starts.start_of_stage(each, "retrofit", optimizer, mesh) for each in (run, other)
    )
    assert_equal(one, same)
    with pytest.raises(UserError, match=f"another tokenizer.*{tmp_path}/cache/dmc_jax/tokenizers"):
        starts.initial_model(dataclasses.replace(run, init_from=str(file)))


def a_folder_of_no_known_format_is_refused_as_before_test(run, tmp_path):
    other = dataclasses.replace(run, init_from=str(tmp_path))
    with pytest.raises(UserError, match="no complete checkpoint in"):
        starts.initial_model(other)
