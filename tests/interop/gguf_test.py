"""Llamas in GGUF: every type of number, the layout of llama.cpp, and what it says of sizes."""

import sys
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest

from dmc_jax.checkpoints.models import find_model, open_model
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.interop import gguf_files
from dmc_jax.interop.compare import logits_of
from dmc_jax.interop.formats import describe, open_source, recognise
from tests.interop.checkpoint_files import assert_same_bits, config_of, write_checkpoint
from tests.interop.gguf_by_hand import gguf_bytes, llama_metadata, llama_tensors
from tests.interop.reference_llama import Sizes, random_weights

SMALL = Sizes()
WEIGHTS = random_weights(SMALL)
TOKENS = np.random.default_rng(3).integers(0, SMALL.V, 12).tolist()
# Rows of blocks: 32 numbers in the old quantised types, 256 in the new ones.
BLOCKS = Sizes(V=5, D=256, L=1, N=4, K=2, H=64, F=256)
Q = "model.layers.0.self_attn.q_proj.weight"


def write(file, weights=WEIGHTS, sizes=SMALL, tensors=None, **changes):
    tensors = llama_tensors(weights, sizes) | (tensors or {})
    file.write_bytes(gguf_bytes(llama_metadata(sizes, **changes), tensors))
    return file


def found(path):
    return {name: tensor.read() for name, tensor in open_source(path).tensors.items()}


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


@pytest.fixture
def no_gguf(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def floats_are_read_as_they_are_and_without_the_package_test(dtype, tmp_path, no_gguf):
    weights = random_weights(SMALL, dtype)
    assert_same_bits(found(write(tmp_path / "x.gguf", weights)), weights)


def written_by_package(gguf, file, sizes, weights, kinds):
    """A file by the package's own writer; `kinds`: the type of each tensor by its name there."""
    writer = gguf.GGUFWriter(file, "llama")
    for key, x in llama_metadata(sizes, llama__vocab_size=sizes.V).items():
        if key != "general.architecture":
            (writer.add_float32 if isinstance(x, float) else writer.add_uint32)(key, x)
    for name, x in llama_tensors(weights, sizes).items():
        kind = kinds(name)
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def files_of_the_package_hold_what_it_dequantises_test(name, gguf, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    weights = random_weights(BLOCKS, np.float32)

    def kind_of(tensor):
        return gguf.GGMLQuantizationType.F32 if "norm" in tensor else kind

    written_by_package(gguf, tmp_path / "x.gguf", BLOCKS, weights, kind_of)
    # Rows are quantised one by one, so moving them changes nothing.
    expected = {
        n: x if x.ndim == 1 else gguf.dequantize(gguf.quantize(x, kind), kind)
        for n, x in weights.items()
    }
    actual = {n: x.astype(np.float32) for n, x in found(tmp_path / "x.gguf").items()}
    assert_same_bits(actual, expected)
    quantised = name.startswith("Q")
    said = f"its matrices are dequantised from {name}" in open_source(tmp_path / "x.gguf").notes
    assert said == quantised


def dequantised(gguf):
    """All types that the package dequantises, and how many numbers and bytes a block has."""
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        if kind.name not in ("F32", "F16", "BF16"):
            yield kind, block, size


def random_blocks_of_every_type_are_what_the_package_makes_of_them_test(
    gguf, tmp_path, monkeypatch
):
    monkeypatch.setattr(gguf_files, "PART_BYTES", 7 * 256 * 4)  # 64 rows do not divide into sevens
    rng, seen = np.random.default_rng(0), []
    for kind, block, size in dequantised(gguf):
        data = rng.integers(0, 256, (64, 256 // block * size), dtype=np.uint8)
        name = "blk.0.ffn_down.weight"
        sizes = Sizes(V=5, D=64, L=1, N=2, K=1, H=32, F=256)
        tensor = {name: (int(kind), (64, 256), data.tobytes())}
        file = write(tmp_path / "x.gguf", random_weights(sizes), sizes, tensor)
        actual = open_source(file).tensors["model.layers.0.mlp.down_proj.weight"].read()
        with np.errstate(all="ignore"):  # some scales are infinite
            np.testing.assert_array_equal(actual, gguf.dequantize(data, kind))
        seen.append(kind.name)
    assert {"Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0"} <= {*seen}


def dequantising_takes_the_result_and_a_few_parts_of_memory_test(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "PART_BYTES", 2**18)
    sizes = Sizes(V=8192, D=256, L=1, N=2, K=1, H=32, F=32, tied=True)  # 8 MiB of embedding
    data = np.zeros((sizes.V, 8 * 34), np.uint8)
    tensor = {"token_embd.weight": (8, (sizes.V, sizes.D), data.tobytes())}
    file = write(tmp_path / "x.gguf", random_weights(sizes), sizes, tensor)
    embedding = open_source(file).tensors["model.embed_tokens.weight"]
    tracemalloc.start()
    embedding.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert embedding.nbytes < peak < embedding.nbytes + 8 * 2**18


# ---- layout and sizes ---------------------------------------------------------------------------


def with_scaling(sizes, factor):
    """`rope_freqs.weight` as convert_hf_to_gguf.py makes it of Llama 3.1's rule."""
    factors = []
    for f in range(sizes.H // 2):
        length = 2 * np.pi * 500_000.0 ** (2 * f / sizes.H)
        if length < 8192 / 4:
            factors.append(1.0)
        elif length > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


SHAPES = {
    "every head its own": Sizes(K=4),
    "grouped": Sizes(K=2),
    "one KV head": Sizes(K=1),
    "tied": Sizes(tied=True),
    "wide heads": Sizes(H=10),
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def a_model_is_the_one_that_huggingface_has_test(sizes, tmp_path):
    weights = random_weights(sizes)
    write_checkpoint(tmp_path / "hf", sizes, weights)
    file = write(tmp_path / "x.gguf", weights, sizes)
    ours, theirs = open_source(file), open_source(tmp_path / "hf")
    assert ours.config == theirs.config
    assert_same_bits(found(file), weights)
    np.testing.assert_array_equal(*(logits_of(source, [TOKENS])[0] for source in (ours, theirs)))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def stretched_frequencies_are_llama_3s_scaling_test(factor, tmp_path):
    sizes = Sizes(H=16)
    factors = with_scaling(sizes, factor)
    assert 1 < np.sort(np.unique(factors))[1] < factor  # one is between the extremes
    file = write(
        tmp_path / "x.gguf",
        random_weights(sizes),
        sizes,
        {"rope_freqs.weight": factors},
        llama__rope__freq_base=500_000.0,
    )
    config = open_source(file).config
    assert config.rope_scaling == Llama3Scaling(factor=factor)
    assert config.rope_theta == 500_000.0


def what_scales_nothing_is_no_scaling_test(tmp_path):
    ones = {"rope_freqs.weight": np.ones(SMALL.H // 2, np.float32)}
    for changes in (
        {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0},
        {"llama__rope__scale_linear": 1.0},
    ):
        source = open_source(write(tmp_path / "x.gguf", tensors=ones, **changes))
        assert source.config.rope_scaling is None


def heads_may_be_told_of_by_the_width_or_by_what_is_rotated_test(tmp_path):
    absent = {"llama__attention__key_length": None, "llama__attention__value_length": None}
    assert open_source(write(tmp_path / "x.gguf", **absent)).config.head_dim == SMALL.H
    square = Sizes(H=4)
    absent["llama__rope__dimension_count"] = None
    file = write(tmp_path / "x.gguf", random_weights(square), square, **absent)
    assert open_source(file).config.head_dim == 4
    absent = {"llama__attention__head_count_kv": None, "llama__rope__freq_base": None}
    every = Sizes(K=4)
    source = open_source(write(tmp_path / "x.gguf", random_weights(every), every, **absent))
    assert source.config.kv_heads == 4 and source.config.rope_theta == 10_000.0
    assert any("llama.rope.freq_base: taken as 10000" in note for note in source.notes)


def sizes_may_differ_by_layer_where_the_model_can_test(tmp_path):
    weights = dict(WEIGHTS)
    for name in ("k", "v"):
        full = f"model.layers.1.self_attn.{name}_proj.weight"
        weights[full] = weights[full][: SMALL.H]
    second = {name: x for name, x in weights.items() if ".layers.1." in name}
    tensors = llama_tensors(WEIGHTS, SMALL) | llama_tensors(second, Sizes(K=1))
    kv_heads = np.array([2, 1], "<i4")
    metadata = llama_metadata(SMALL, llama__attention__head_count_kv=kv_heads)
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata, tensors))
    assert open_source(tmp_path / "x.gguf").config.kv_heads == (2, 1)
    assert_same_bits(found(tmp_path / "x.gguf"), weights)
    alike = write(
        tmp_path / "y.gguf", llama__feed_forward_length=np.array([SMALL.F, SMALL.F], "<u4")
    )
    assert open_source(alike).config.mlp_width == SMALL.F


def numbers_are_those_that_were_meant_not_their_float32_test(tmp_path):
    file = write(tmp_path / "x.gguf", llama__attention__layer_norm_rms_epsilon=1e-6)
    assert open_source(file).config.norm_eps == 1e-6


# ---- files --------------------------------------------------------------------------------------


def write_parts(folder, count):
    tensors = list(llama_tensors(WEIGHTS, SMALL).items())
    for part in range(count):
        metadata = {"split.no": part, "split.count": count, "split.tensors.count": len(tensors)}
        metadata = (llama_metadata(SMALL) if part == 0 else {}) | metadata
        file = folder / f"x-{part + 1:05}-of-{count:05}.gguf"
        file.write_bytes(gguf_bytes(metadata, dict(tensors[part::count])))


def a_model_in_parts_is_opened_by_any_of_them_or_by_their_folder_test(tmp_path):
    write_parts(tmp_path, 3)
    for path in (tmp_path, *tmp_path.iterdir()):
        assert_same_bits(found(path), WEIGHTS)


def a_file_is_known_by_its_first_bytes_a_folder_by_the_names_in_it_test(tmp_path):
    write(tmp_path / "sha256-0123")
    assert recognise(tmp_path / "sha256-0123") == "gguf"
    assert recognise(tmp_path) is None
    write(tmp_path / "x.gguf")
    assert recognise(tmp_path) == "gguf"
    write_checkpoint(tmp_path)
    assert recognise(tmp_path) == "huggingface"


def a_model_runs_where_it_is_test(tmp_path):
    file = write(tmp_path / "x.gguf")
    write_checkpoint(tmp_path / "hf")
    assert find_model(file).config == find_model(tmp_path / "hf").config
    for ours, theirs in zip(
        open_model(file).params["run_0"].values(),
        open_model(tmp_path / "hf").params["run_0"].values(),
        strict=True,
    ):
        for name, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[name])
    assert "GGUF" not in describe(open_source(file)) and "gguf, Llama" in describe(
        open_source(file)
    )


# ---- transformers -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q8_0"])
def transformers_reads_the_same_model_from_the_file_test(name, gguf, tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():  # of its own deprecated imports, which differ by version
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    kind = gguf.GGMLQuantizationType[name]
    weights = random_weights(BLOCKS, np.float32)

    def kind_of(tensor):
        return gguf.GGMLQuantizationType.F32 if "norm" in tensor else kind

    written_by_package(gguf, tmp_path / "x.gguf", BLOCKS, weights, kind_of)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    )
    tokens = [token % BLOCKS.V for token in TOKENS]
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)[None]).logits[0].numpy()
    ours = logits_of(open_source(tmp_path / "x.gguf"), [tokens])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    assert config_of(BLOCKS)["head_dim"] == model.config.head_dim
