"""Broken and hostile checkpoints: one clear error each, and nothing written."""

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.interop import huggingface
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source
from dmc_jax.interop.output import new_folder
from dmc_jax.interop.parameters import frequency_notes
from dmc_jax.interop.source import Tensor
from dmc_jax.model.presets import PRESETS
from tests.interop.checkpoint_files import (
    header_of,
    write_checkpoint,
    write_raw,
    write_safetensors,
    write_shards,
)
from tests.interop.reference_llama import Sizes, random_weights

ROOT = Path(__file__).parents[2]
WEIGHTS = random_weights(Sizes())
DATA = b"".join(array.tobytes() for array in WEIGHTS.values())
Q = "model.layers.0.self_attn.q_proj.weight"


def refused(folder, message):
    with pytest.raises(UserError, match=message) as refusal:
        open_source(folder)
    text = str(refusal.value)
    assert "\n" not in text and len(text) < 600
    assert str(folder) in text


# ---- the safetensors header -------------------------------------------------------------------


def changed(name, **fields):
    header = header_of(WEIGHTS)
    header[name] = header[name] | fields
    return header


def doubled():
    text = json.dumps(header_of(WEIGHTS))
    return (text[:-1] + f', "{Q}": ' + json.dumps(header_of(WEIGHTS)[Q]) + "}").encode()


TERABYTES = 2**42
HEADERS = {
    "terabytes of data": (
        changed(Q, shape=[TERABYTES, 2**20], data_offsets=[0, TERABYTES]),
        "by its shape and .* by its offsets",
    ),
    "terabytes, consistently": (
        changed(Q, shape=[TERABYTES // 2], data_offsets=[0, TERABYTES]),
        "overlaps|describes",
    ),
    "endless sizes": (changed(Q, shape=[2**62] * 2**12), "no list of at most 8 sizes"),
    "a size beyond all": (changed(Q, shape=[10**30, 1]), "no list of at most 8 sizes"),
    "negative sizes": (changed(Q, shape=[-24, -16]), "no list of at most 8 sizes"),
    "negative offsets": (changed(Q, data_offsets=[-768, 0]), "no pair of positions"),
    "three offsets": (changed(Q, data_offsets=[0, 1, 2]), "no pair of positions"),
    "a tensor twice": (doubled(), "appears twice"),
    "bytes used twice": (
        changed("model.norm.weight", data_offsets=[0, 32]),
        "overlaps the tensor before it",
    ),
    "unknown dtype": (changed(Q, dtype="Q4"), "unknown dtype 'Q4'"),
    "a dtype of another size": (changed(Q, dtype="F32"), "by its shape and"),
    "a list for a dtype": (changed(Q, dtype=["BF16"]), "unknown dtype"),
    "a field too many": (changed(Q, offset=3), "and nothing else"),
    "an entry that is no object": (header_of(WEIGHTS) | {Q: 3}, "needs dtype, shape and"),
    "a list": ([1, 2], "its header is a list"),
    "no JSON": (b"{" * 64, "its JSON cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', "its JSON cannot be read"),
    "depth without end": (b"[" * 100_000, "nested too deep"),
    "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "cannot be read"),
    "not a number": (b'{"a": NaN}', "NaN is not a JSON number"),
}


@pytest.mark.parametrize("header, message", HEADERS.values(), ids=HEADERS)
def a_header_that_lies_is_refused_test(header, message, tmp_path):
    write_checkpoint(tmp_path)
    write_raw(tmp_path / "model.safetensors", header, DATA)
    refused(tmp_path, message)


def gaps_between_tensors_are_refused_test(tmp_path):
    write_checkpoint(tmp_path)
    header, first = header_of(WEIGHTS), "model.embed_tokens.weight"
    for name, entry in header.items():
        if name != first:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    write_raw(tmp_path / "model.safetensors", header, DATA + bytes(8))
    refused(tmp_path, "follows a gap")


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1, -1000], ids=str)
def a_truncated_file_is_refused_test(kept, tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path, "has only|claims a header|of data, the file has .* fewer")


def bytes_after_the_last_tensor_are_refused_test(tmp_path):
    write_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"#!")
    refused(tmp_path, "of data, the file has .*, 2 more")


def a_header_longer_than_the_file_is_not_read_test(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", TERABYTES) + b"{}")
    refused(tmp_path, "claims a header of 4,398,046,511,104 bytes")


def a_file_that_shrinks_before_it_is_read_is_an_error_test(tmp_path):
    write_checkpoint(tmp_path)
    source = open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="was it changed meanwhile"):
        source.tensors[Q].read()


# ---- tensors against the config ---------------------------------------------------------------


def without(name):
    return {key: array for key, array in WEIGHTS.items() if key != name}


WRONG_TENSORS = {
    "missing": (without(Q), {}, f"lacks '{Q}'"),
    "no head": (without("lm_head.weight"), {}, "tie_word_embeddings: true"),
    "unknown": (WEIGHTS | {"model.layers.0.self_attn.q_proj.bias": WEIGHTS[Q]}, {}, "q_proj.bias"),
    "transposed": (WEIGHTS | {Q: WEIGHTS[Q].T}, {}, r"shape \[16, 24\], its config asks for"),
    "more layers": (WEIGHTS, {"num_hidden_layers": 3}, "lacks 'model.layers.2"),
    "fewer layers": (WEIGHTS, {"num_hidden_layers": 1}, "has 'model.layers.1"),
    "other KV heads": (WEIGHTS, {"num_key_value_heads": 4}, "its config asks for"),
    "other vocabulary": (WEIGHTS, {"vocab_size": 20}, "its config asks for"),
}


@pytest.mark.parametrize("weights, change, message", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def weights_that_disagree_with_the_config_are_refused_test(weights, change, message, tmp_path):
    write_checkpoint(tmp_path, weights=weights, **change)
    refused(tmp_path, message)


def quantised_weights_are_refused_test(tmp_path):
    write_checkpoint(tmp_path)
    header = changed(Q, dtype="I8", shape=[48, 16])
    write_raw(tmp_path / "model.safetensors", header, DATA)
    refused(tmp_path, "asks for|quantised")


def what_old_files_repeat_is_left_out_test(tmp_path):
    frequencies = np.ones(3, np.float32)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies for i in range(2)}
    write_checkpoint(tmp_path, weights=WEIGHTS | extra)
    assert open_source(tmp_path).tensors.keys() == WEIGHTS.keys()
    repeated = WEIGHTS | {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"]}
    write_checkpoint(tmp_path, Sizes(tied=True), repeated)
    assert "lm_head.weight" not in open_source(tmp_path).tensors


def stored_frequencies_of_another_base_are_said_test(tmp_path):
    def notes(theta):
        frequencies = theta ** (-np.arange(0, Sizes().H, 2, dtype=np.float32) / Sizes().H)
        extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies}
        write_checkpoint(tmp_path, weights=WEIGHTS | extra)
        return [note for note in open_source(tmp_path).notes if "frequencies" in note]

    assert notes(10_000.0) == []
    (note,) = notes(500_000.0)
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" in note and "rope_theta 10000" in note


@pytest.mark.parametrize("name", ["decoder.rotary_pos_emb.inv_freq", "rope.freqs"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def frequencies_of_the_config_are_known_by_their_names_elsewhere_and_dtypes_test(name, dtype):
    config = dataclasses.replace(PRESETS["llama3_8b"], head_dim=16)
    scaled = np.asarray(rotary_frequencies(16, config.rope_theta, config.rope_scaling))
    unscaled = np.asarray(rotary_frequencies(16, config.rope_theta))

    def notes(array):
        return frequency_notes(config, {name: Tensor(array.shape, array.dtype, lambda: array)})

    assert notes(scaled.astype(dtype)) == notes(unscaled.astype(dtype)) == ()
    assert len(notes((2 * scaled).astype(dtype))) == len(notes(scaled[:-1])) == 1
    assert frequency_notes(config, {name: b"no tensor", "lm_head.weight": None}) == ()


# ---- the index --------------------------------------------------------------------------------

NAMES = list(WEIGHTS)
HALVES = [{n: WEIGHTS[n] for n in NAMES[:5]}, {n: WEIGHTS[n] for n in NAMES[5:]}]
OUTSIDE = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "C:\\x.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "x\0.safetensors", "evil.py", 3, None, ["x"]], ids=repr)
def an_index_that_names_a_file_elsewhere_is_refused_test(name, tmp_path):
    folder = tmp_path / "hf"
    index = write_shards(folder, HALVES)
    write_safetensors(tmp_path / "secret.safetensors", HALVES[0])
    for tensor in HALVES[0]:
        index["weight_map"][tensor] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "expected the name of a .safetensors file in the same folder")


def an_index_is_held_against_its_files_test(tmp_path):
    index = write_shards(tmp_path, HALVES)
    file = tmp_path / "model.safetensors.index.json"

    def with_map(weight_map):
        file.write_text(json.dumps(index | {"weight_map": weight_map}))

    with_map(index["weight_map"] | {Q: "model-1.safetensors"})
    refused(tmp_path, "is in model-1.safetensors; it is in model-0.safetensors")
    with_map(index["weight_map"] | {"model.extra": "model-1.safetensors"})
    refused(tmp_path, "it is in none of them")
    with_map(dict.fromkeys(NAMES, "model-7.safetensors"))
    refused(tmp_path, "names model-7.safetensors, which is not there")
    for nothing in ({}, [], None, "model-0.safetensors"):
        with_map(nothing)
        refused(tmp_path, "weight_map is no table")
    file.write_text("[]")
    refused(tmp_path, "expected a JSON object")
    file.write_text(json.dumps(index))
    write_safetensors(tmp_path / "model-1.safetensors", HALVES[1] | {Q: WEIGHTS[Q]})
    refused(tmp_path, "is both in model-0.safetensors and in model-1.safetensors")


def a_pickle_that_runs_a_command_is_refused_and_runs_nothing_test(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    write_checkpoint(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    with zipfile.ZipFile(tmp_path / "hf/pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({Q: Evil()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    refused(tmp_path / "hf", "system")
    assert not (tmp_path / "ran").exists()


def a_dmc_config_of_another_make_is_refused_test(tmp_path):
    write_checkpoint(tmp_path)
    good = {"format": "dmc_jax.dmc", "version": 1, "window": 4, "temperature": 0.1}
    good |= {"offset": 5.0, "eps": 0.01, "threshold": 0.0}
    file = tmp_path / "dmc_config.json"
    for change, message in (
        ({"version": 2}, "expected format dmc_jax.dmc version 1"),
        ({"threshold": None}, "threshold is None"),
        ({"window": -3}, "window must be >= 1"),
        ({"eps": "tiny"}, "'eps'"),
        ({"sharpness": 1}, "no field 'sharpness'"),
    ):
        file.write_text(json.dumps(good | change))
        refused(tmp_path, message)
    del good["eps"]
    file.write_text(json.dumps(good))
    refused(tmp_path, "lacks eps")


# ---- fuzz -------------------------------------------------------------------------------------

STRANGE = [None, True, -1, 0, 2**63, 10**40, 0.5, "", "x" * 300, "../x", [], {}, [[]], "\0", "BF16"]


def damaged(text, rng):
    """Bytes of JSON with a few bytes changed, or with a value exchanged for a strange one."""
    if rng.random() < 0.5:
        data = bytearray(text)
        for _ in range(rng.integers(1, 5)):
            at = int(rng.integers(0, len(data)))
            kind = rng.integers(0, 3)
            if kind == 0:
                data[at] = int(rng.integers(0, 256))
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 40))]
            else:
                data[at:at] = rng.bytes(int(rng.integers(1, 4)))
        return bytes(data)
    value = json.loads(text)
    node = value
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else int(rng.integers(0, len(node)))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        node[key] = STRANGE[int(rng.integers(0, len(STRANGE)))]
        return json.dumps(value).encode()


def fuzz(path, rounds, seed, damage, form="huggingface"):
    """Opens and reads damaged checkpoints; only a UserError may come of it."""
    rng, refusals = np.random.default_rng(seed), 0
    for _ in range(rounds):
        damage(rng)
        try:
            source = open_source(path, form)
            for tensor in source.tensors.values():
                assert tensor.read().shape == tensor.shape
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > rounds / 4


ROUNDS = [
    pytest.param(200, id="a few"),
    pytest.param(10_000, id="ten thousand", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rounds", ROUNDS)
def a_damaged_header_never_crashes_the_reader_test(rounds, tmp_path):
    write_checkpoint(tmp_path)
    text = json.dumps(header_of(WEIGHTS)).encode()
    data = b"".join(array.tobytes() for array in WEIGHTS.values())
    file = tmp_path / "model.safetensors"
    fuzz(tmp_path, rounds, 0, lambda rng: write_raw(file, damaged(text, rng), data))


@pytest.mark.parametrize("rounds", ROUNDS)
def a_damaged_index_never_crashes_the_reader_or_leads_out_test(rounds, tmp_path, monkeypatch):
    folder = tmp_path / "hf"
    text = json.dumps(write_shards(folder, HALVES)).encode()
    write_safetensors(tmp_path / "x", HALVES[0])
    opened = set()
    open_file = huggingface.open_safetensors

    def watched(file):
        opened.add(file.parent.resolve())
        return open_file(file)

    monkeypatch.setattr(huggingface, "open_safetensors", watched)
    file = folder / "model.safetensors.index.json"
    fuzz(folder, rounds, 1, lambda rng: file.write_bytes(damaged(text, rng)))
    assert opened == {folder.resolve()}


@pytest.mark.parametrize("rounds", ROUNDS)
def a_damaged_config_never_crashes_the_reader_test(rounds, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    write_checkpoint(tmp_path, rope_scaling=scaling, num_key_value_heads_per_layer=[2, 2])
    file = tmp_path / "config.json"
    text = file.read_bytes()
    fuzz(tmp_path, rounds, 2, lambda rng: file.write_bytes(damaged(text, rng)))


# ---- the output -------------------------------------------------------------------------------


def nothing_is_left_of_an_output_that_failed_test(tmp_path):
    for failure in (KeyboardInterrupt, OSError("disk"), UserError("damaged")):
        with (
            pytest.raises(BaseException) as raised,
            new_folder(tmp_path / "out", 10) as folder,
        ):
            (folder / "part").write_text("x")
            raise failure
        assert raised.type is (failure if isinstance(failure, type) else type(failure))
        assert list(tmp_path.iterdir()) == []


def what_a_killed_process_left_is_cleared_and_others_work_is_not_test(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    with new_folder(tmp_path / "out", 10) as folder:
        name = folder.name
    dead, alive = (
        tmp_path / name.replace(str(os.getpid()), str(process))
        for process in (done.stdout.strip(), os.getppid())
    )
    unrelated = tmp_path / ".out2.partial"
    for left in (dead, alive, unrelated):
        left.mkdir()
    (tmp_path / "out").rmdir()
    with new_folder(tmp_path / "out", 10):
        assert not dead.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", alive.name, unrelated.name])


def an_output_that_exists_or_does_not_fit_is_refused_before_any_work_test(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("there", "exists: choose another output"),
        ("link", "exists: choose another output"),
        ("file", "exists: choose another output"),
        ("large", "make room"),
        ("file/below", "cannot write"),
    ):
        size = 10**18 if name == "large" else 10
        with pytest.raises(UserError, match=message), new_folder(tmp_path / name, size):
            raise AssertionError("must not get here")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "there"]


@pytest.mark.parametrize("write", [write_dmc_jax, write_huggingface])
def a_source_that_breaks_half_way_leaves_nothing_test(write, tmp_path):
    write_checkpoint(tmp_path / "hf")
    source = open_source(tmp_path / "hf")

    def cut(_):
        (tmp_path / "hf/model.safetensors").write_bytes(b"")

    with (
        pytest.raises(UserError, match="was it changed meanwhile"),
        new_folder(tmp_path / "out", 10) as folder,
    ):
        write(source, folder, None, cut)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.output import new_folder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source = open_source(sys.argv[1])
for name, write in (("ours", write_dmc_jax), ("hf", write_huggingface)):
    try:
        with new_folder(Path(sys.argv[2], name), 10) as folder:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
            write(source, folder, None, lambda _: None)
    except OSError as error:
        print(name, error.strerror)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
"""


def a_full_disk_is_one_error_and_leaves_nothing_test(tmp_path):
    """A limit on a file's size stands for a full disk, in Python's writes and in TensorStore's."""
    write_checkpoint(tmp_path / "hf", Sizes(V=4000), random_weights(Sizes(V=4000)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, tmp_path / "hf", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )
    assert done.stdout == "ours File too large\nhf File too large\n", done.stderr
    assert list((tmp_path / "out").iterdir()) == []
