"""A model opens from anyone's checkpoint, ready to run; our own needs nobody else's code."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.checkpoints.metadata import Metadata, load_metadata
from dmc_jax.checkpoints.models import find_model, load_tokenizer_of, open_model
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.checkpoints.states import open_for_saving
from dmc_jax.config import MeshConfig, ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import fingerprint, train_sentencepiece
from dmc_jax.errors import UserError
from dmc_jax.fields import from_dict
from dmc_jax.interop.dmc_jax import open_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import make_mesh, shardings
from dmc_jax.policies.dmc import DMC
from tests.doors import runs_of

ROOT = Path(__file__).parents[2]
VERSION_1 = json.loads((ROOT / "tests/data/metadata/version_1_trained.json").read_text())
MODEL = from_dict(ModelConfig, VERSION_1["run"]["model"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DMC model as a checkpoint of ours, `ours`, and as a Hugging Face folder, `hf`."""
    root = tmp_path_factory.mktemp("models")
    texts = ["the cache merges a token into its newest slot " * 50]
    train_sentencepiece(texts, MODEL.vocab_size - 20, root / "t.model")
    metadata = Metadata(
        stage="finetune",
        step=5,
        model=MODEL,
        policy=DMC(DMCSettings(window=3, offset=0.5), -0.25),
        compute_dtype="float32",
        tokenizer=str(root / "t.model"),
        tokenizer_sha256=fingerprint(root / "t.model"),
    )
    params = init_params(MODEL, jax.random.key(0))
    with open_for_saving(root / "ours", "finetune", keep=1) as saver:
        saver.save(5, {"params": params}, {}, metadata)
    (root / "hf").mkdir()
    write_huggingface(open_dmc_jax(root / "ours"), root / "hf", None, lambda _: None)
    return root


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


def any_format_opens_as_the_same_model_test(folders):
    ours, theirs = open_model(folders / "ours"), open_model(folders / "hf")
    assert (ours.format, theirs.format) == ("dmc_jax", "huggingface")
    assert (ours.config, ours.policy) == (
        dataclasses.replace(theirs.config, kv_heads=MODEL.kv_heads),
        theirs.policy,
    )
    assert_same(theirs.params, ours.params)
    assert_same(
        ours.params, jax.device_put(init_params(MODEL, jax.random.key(0)), jax.devices()[0])
    )
    text = "the newest token"
    assert load_tokenizer_of(ours).encode(text) == load_tokenizer_of(theirs).encode(text)
    assert ours.notes == () and "is a huggingface checkpoint, read directly" in theirs.notes[0]


@pytest.mark.parametrize("name", ["ours", "hf"])
def parameters_come_on_a_mesh_and_in_a_dtype_but_norms_in_float32_test(folders, name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    exact = open_model(folders / name).params
    model = open_model(folders / name, mesh, "bfloat16")
    wanted = shardings(model.params, mesh)
    for (path, leaf), where, full in zip(
        jax.tree_util.tree_leaves_with_path(model.params),
        jax.tree.leaves(wanted),
        jax.tree.leaves(exact),
        strict=True,
    ):
        dtype = jnp.float32 if path[-1].key == "scale" else jnp.bfloat16
        assert (leaf.dtype, leaf.sharding) == (dtype, where), path
        np.testing.assert_array_equal(leaf, np.asarray(full.astype(dtype)))
    assert len(model.params["run_0"]["q"]["kernel"].sharding.device_set) == 4


def a_checkpoint_from_before_metadata_had_a_version_opens_test(folders, tmp_path):
    shutil.copytree(folders / "ours", tmp_path / "old")
    ref = latest(tmp_path / "old")
    (ref.path / "metadata" / "metadata").write_text(json.dumps(VERSION_1))
    (ref.path / "digests.json").unlink()  # nor had it that
    model = open_model(tmp_path / "old")
    assert model.policy == DMC(DMCSettings(window=3, offset=0.5), VERSION_1["threshold"])
    assert_same(model.params, open_model(folders / "ours").params)
    exported = tmp_path / "hf"
    exported.mkdir()
    write_huggingface(open_dmc_jax(ref.path), exported, None, lambda _: None)
    assert find_model(exported).policy.threshold == VERSION_1["threshold"]


def a_flipped_byte_is_told_whoever_reads_test(folders, tmp_path):
    shutil.copytree(folders / "ours", tmp_path / "flipped")
    ref = latest(tmp_path / "flipped")
    data = max((ref.path / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    for read in (open_dmc_jax, open_model):
        with pytest.raises(UserError, match=f"{data.name} is not as it was written"):
            read(ref.path)


def another_tokenizer_than_the_models_is_refused_test(folders, tmp_path):
    train_sentencepiece(["some other text entirely " * 50], 280, tmp_path / "other.model")
    for name in ("ours", "hf"):
        model = find_model(folders / name)
        assert model.accepts_tokenizer(fingerprint(folders / "t.model"))
        with pytest.raises(UserError, match="other.model is not the tokenizer that"):
            load_tokenizer_of(model, tmp_path / "other.model")


def a_tokenizer_that_has_moved_is_named_with_the_flag_to_give_test(folders, tmp_path):
    model = dataclasses.replace(find_model(folders / "ours"), tokenizer=tmp_path / "gone.model")
    with pytest.raises(UserError, match="gone.model, the tokenizer of .* --tokenizer=FILE"):
        load_tokenizer_of(model)
    assert load_tokenizer_of(model, folders / "t.model").vocab_size == MODEL.vocab_size - 20


def a_folder_without_a_checkpoint_is_one_clear_error_test(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"no complete checkpoint in {path}; expected a run"):
            open_model(path)


# What is loaded is asked in a process of its own, after each of two engines has said something.
DECODE = """
import json, sys
import dmc_jax.decode
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams

for path in sys.argv[1:]:
    engine = Engine.from_checkpoint(path, kv_bytes=2**20, max_sequences=1)
    said = engine.generate("the cache", SamplingParams(max_new_tokens=4, temperature=0))[0]
    loaded = [name for name in sys.modules if name.split(".")[0] == "dmc_jax"]
    print(json.dumps({"tokens": said.new_tokens, "text": said.text, "loaded": loaded}))
"""


def decoding_our_own_checkpoint_loads_neither_training_nor_interop_test(folders):
    done = subprocess.run(
        [sys.executable, "-c", DECODE, folders / "ours", folders / "hf"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ours, theirs = map(json.loads, done.stdout.splitlines())
    folders_of = [{name.split(".")[1] for name in x["loaded"][1:]} for x in (ours, theirs)]
    assert {"decode", "checkpoints", "inference", "model"} <= folders_of[0]
    assert not folders_of[0] & {"training", "interop", "evaluation", "baselines"}
    assert folders_of[1] - folders_of[0] == {"interop"}
    assert (theirs["tokens"], theirs["text"]) == (ours["tokens"], ours["text"])


def the_decode_command_reads_a_hugging_face_folder_and_says_so_test(folders):
    flags = [f"--checkpoint={folders / 'hf'}", "--prompt=the cache", "--max_new_tokens=4"]
    [done] = runs_of("decode", [*flags, "--temperature=0"])
    assert done.returncode == 0, done.stderr
    first, *rest = done.stderr.splitlines()
    assert first == f"note: {folders / 'hf'} is a huggingface checkpoint, read directly"
    assert all(line.startswith("note: ") for line in rest)
    assert done.stdout.startswith("the cache")
    assert load_metadata(latest(folders / "ours")).run is None  # nothing was made up for it
