"""Broken and hostile GGUF files: one clear error each, and no more memory than the file has."""

import struct
import sys

import numpy as np
import pytest

from dmc_jax.checkpoints.models import find_model
from dmc_jax.errors import UserError
from dmc_jax.interop.formats import open_source
from tests.interop.gguf_by_hand import Raw, gguf_bytes, llama_metadata, llama_tensors, string
from tests.interop.hostile_test import ROUNDS, fuzz
from tests.interop.reference_llama import Sizes, random_weights

SIZES = Sizes()
TENSORS = llama_tensors(random_weights(SIZES), SIZES)
Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
WHOLE = gguf_bytes(llama_metadata(SIZES), TENSORS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 98362432\n"
HUGE = struct.pack("<Q", 2**62)


def refused(file, message):
    with pytest.raises(UserError, match=message) as refusal:
        open_source(file)
    text = str(refusal.value)
    assert "\n" not in text and len(text) < 600
    assert str(file) in text


def changed(metadata=None, tensors=None, without=(), **options):
    tensors = {k: x for k, x in (TENSORS | (tensors or {})).items() if k not in without}
    return gguf_bytes(llama_metadata(SIZES) | (metadata or {}), tensors, **options)


def with_key(**changes):
    return changed({name.replace("__", "."): x for name, x in changes.items()})


TWICE = 2 * (string("a") + struct.pack("<IB", 0, 1))


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# ---- the file -----------------------------------------------------------------------------------

FILES = {
    "empty": (b"", "is no GGUF file: it begins with b''"),
    "another format": (b"PK\3\4" + WHOLE, "begins with .*PK.*, expected b'GGUF'"),
    "a pointer": (POINTER, "is a Git LFS pointer .* 98,362,432 bytes: fetch that with `git lfs"),
    "version 1": (changed(version=1), "is of version 1; little-endian GGUF of version 2 or 3"),
    "big-endian": (changed(version=0x03000000), "is big-endian; little-endian GGUF"),
    "magic alone": (b"GGUF", "4 bytes should follow at byte 4 of its header, the file has 0"),
    "endless keys": (changed(counts=(21, 2**60)), "is not a sound GGUF file"),
    "endless tensors": (changed(counts=(2**60, 12)), "is not a sound GGUF file"),
    "an endless text": (with_key(a=Raw(struct.pack("<I", 8) + HUGE)), "bytes should follow"),
    "endless texts": (with_key(a=Raw(struct.pack("<II", 9, 8) + HUGE)), "bytes should follow"),
    "endless numbers": (with_key(a=Raw(struct.pack("<II", 9, 0) + HUGE)), "bytes should follow"),
    "arrays of arrays": (with_key(a=Raw(struct.pack("<IIQ", 9, 9, 1))), "'a' has type 9, which"),
    "an unknown kind": (with_key(a=Raw(struct.pack("<I", 77))), "'a' has type 77, which GGUF does"),
    "no text": (with_key(a=b"\xff\xfe"), "the text at byte [0-9,]+ is not UTF-8"),
    "a key twice": (WHOLE[:24] + TWICE + WHOLE[24:], "the key 'a' appears twice"),
    "no alignment": (with_key(general__alignment=0), "alignment is 0; expected a power of two"),
    "odd alignment": (with_key(general__alignment=24), "alignment is 24; expected a power of two"),
    "no axes": (changed(tensors={Q: (0, (), b"")}), "has 0 axes; expected 1 to 4"),
    "five axes": (changed(tensors={Q: (0, (1,) * 5, bytes(4))}), "has 5 axes; expected 1 to 4"),
    "nothing in it": (changed(tensors={Q: (0, (24, 0), b"")}), "impossible shape, .24, 0."),
    "beyond all": (changed(tensors={Q: (0, (2**62, 4), b"")}), "has an impossible shape"),
    "terabytes": (changed(tensors={Q: (0, (2**30, 16), b"")}), "should end at byte .* cut short"),
    "bytes used twice": (changed(offsets={Q: 0}), f"'{Q}' is at byte 0 of the data, not"),
    "a gap": (changed(offsets={Q: 10**6}), f"'{Q}' is at byte 1,000,000 of the data, not"),
}


@pytest.mark.parametrize("data, message", FILES.values(), ids=FILES)
def a_file_that_lies_is_refused_test(data, message, tmp_path):
    (tmp_path / "x.gguf").write_bytes(data)
    refused(tmp_path / "x.gguf", message)


@pytest.mark.parametrize("kept", [5, 23, 24, 100, 700, -64, -3000], ids=str)
def a_truncated_file_is_refused_test(kept, tmp_path):
    (tmp_path / "x.gguf").write_bytes(WHOLE[:kept])
    refused(tmp_path / "x.gguf", "is it cut short")


def a_file_that_shrinks_before_it_is_read_is_an_error_test(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(WHOLE)
    source = open_source(file)
    file.write_bytes(WHOLE[:1000])
    with pytest.raises(UserError, match="was it changed meanwhile"):
        source.tensors["model.norm.weight"].read()


def parts_that_are_missing_or_of_another_model_are_named_test(tmp_path):
    names = [f"x-0000{part}-of-00002.gguf" for part in (1, 2)]
    first = {"split.no": 0, "split.count": 2}
    (tmp_path / names[0]).write_bytes(changed(first))
    refused(tmp_path / names[0], f"is one of 2 parts, and 1 are not beside it, such as {names[1]}")
    (tmp_path / names[1]).write_bytes(changed(first))
    refused(tmp_path / names[1], "split.no and split.count are 0 and 2; by its name .* 1 and 2")
    second = first | {"split.no": 1}
    (tmp_path / names[1]).write_bytes(changed(second))
    refused(tmp_path / names[0], "two of its 2 parts hold the same tensor")
    some = gguf_bytes(second, {"output.weight": TENSORS["output.weight"]})
    (tmp_path / names[1]).write_bytes(some)
    (tmp_path / names[0]).write_bytes(changed(first | {"split.tensors.count": 99}))
    refused(tmp_path / names[0], "its 2 parts hold 22 tensors, split.tensors.count is 99")
    (tmp_path / "one.gguf").write_bytes(changed(first))
    refused(tmp_path / "one.gguf", "is one of 2 parts .* expected one as NAME-00001-of-00003")
    refused(tmp_path, "has 2 GGUF models, name one of them: one.gguf")


# ---- types --------------------------------------------------------------------------------------


def a_quantised_file_names_the_package_that_it_needs_test(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    file = tmp_path / "x.gguf"
    file.write_bytes(changed(tensors={DOWN: (2, (16, 32), bytes(16 * 18))}))
    refused(file, f"'{DOWN}' has type 2.* the library gguf reads: pip install 'gguf>=")


def types_that_the_package_does_not_dequantise_are_named_test(tmp_path):
    pytest.importorskip("gguf")
    for number, name in ((99, ""), (4, ""), (15, r" \(Q8_K\)"), (26, r" \(I32\)")):
        file = tmp_path / "x.gguf"
        file.write_bytes(changed(tensors={DOWN: (number, (16, 256), bytes(16 * 512))}))
        refused(
            file, f"'{DOWN}' has type {number}{name}, which the installed library gguf does not"
        )
    file.write_bytes(changed(tensors={DOWN: (2, (16, 24), bytes(16 * 18))}))
    refused(file, f"'{DOWN}' has rows of 24, Q4_0 has blocks of 32")


# ---- the model ----------------------------------------------------------------------------------

BIAS = {"blk.0.attn_q.bias": np.zeros(24, np.float32)}
FREQUENCIES = "rope_freqs.weight"
MODELS = {
    "another architecture": (with_key(general__architecture="qwen2"), "is 'qwen2'; only 'llama'"),
    "numbers for text": (with_key(general__architecture=3), "general.architecture is 3; expected"),
    "an array for text": (
        with_key(general__architecture=np.ones(3, "<u4")),
        "architecture is of type ndarray; expected text",
    ),
    "no size": (with_key(llama__block_count="two"), "llama.block_count is 'two'; expected an int"),
    "endless layers": (with_key(llama__block_count=2**31 - 1), "but the file has 21 tensors"),
    "more layers": (with_key(llama__block_count=3), "lacks 'blk.2.attn_norm.weight'"),
    "fewer layers": (with_key(llama__block_count=1), "has 'blk.1.attn_norm.weight'"),
    "missing": (changed(without=[Q]), f"lacks '{Q}': 1 of the 21 tensors"),
    "no embedding": (changed(without=["token_embd.weight"]), "lacks 'token_embd.weight'"),
    "biased": (changed(tensors=BIAS), "has 'blk.0.attn_q.bias'"),
    "another width": (with_key(llama__embedding_length=32), r"shape \[19, 16\], its config asks"),
    "other heads": (with_key(llama__attention__head_count=8), f"{Q} has shape"),
    "other KV heads": (with_key(llama__attention__head_count_kv=3), "4 query heads cannot share 3"),
    "other vocabulary": (with_key(llama__vocab_size=20), "vocab_size is 20, token_embd.weight has"),
    "odd heads": (
        with_key(
            llama__attention__key_length=5,
            llama__attention__value_length=5,
            llama__rope__dimension_count=5,
        ),
        "head_dim must be even",
    ),
    "rotated in part": (with_key(llama__rope__dimension_count=2), "rotated whole"),
    "experts": (with_key(llama__expert_count=8), "'llama.expert_count', which a plain Llama"),
    "a window": (with_key(llama__attention__sliding_window=16), "over a sliding window cannot"),
    "both ways": (with_key(llama__attention__causal=False), "causal is False; only True"),
    "stretched": (
        with_key(llama__rope__scaling__type="yarn", llama__rope__scaling__factor=4.0),
        "scaling.type is 'yarn' with a factor of 4; only Llama 3's scaling",
    ),
    "stretched by half": (with_key(llama__rope__scale_linear=2.0), "'linear' with a factor of 2"),
    "other factors": (
        changed(tensors={FREQUENCIES: np.array([1, 2, 3], np.float32)}),
        "holds factors from 1 to 3, which are not Llama 3's scaling of 3 frequencies",
    ),
    "factors of nothing": (
        changed(tensors={FREQUENCIES: np.full(3, np.nan, np.float32)}),
        "holds factors from nan to nan",
    ),
    "more factors": (changed(tensors={FREQUENCIES: np.ones(4, np.float32)}), "heads ask for .3."),
    "layers apart": (
        with_key(llama__feed_forward_length=np.array([24, 12], "<u4")),
        "feed_forward_length differs by layer",
    ),
    "a size a head": (
        with_key(llama__attention__head_count_kv=np.array([2, 2, 2], "<u4")),
        "head_count_kv has 3 entries",
    ),
}


@pytest.mark.parametrize("data, message", MODELS.values(), ids=MODELS)
def a_model_that_is_not_ours_is_refused_by_name_test(data, message, tmp_path):
    (tmp_path / "x.gguf").write_bytes(data)
    refused(tmp_path / "x.gguf", message)


def what_is_no_model_at_all_is_said_to_the_one_who_opens_it_test(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="x.gguf is no GGUF file"):
        find_model(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="nowhere.gguf; expected a run directory"):
        find_model(tmp_path / "nowhere.gguf")


# ---- fuzz ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", ROUNDS)
def a_damaged_file_never_crashes_the_reader_test(rounds, tmp_path):
    tokens = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
        "tokenizer.ggml.scores": np.arange(6, dtype="<f4"),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1], "<i4"),
        "tokenizer.ggml.eos_token_id": 2,
        "general.alignment": 32,
        "llama.rope.scaling.type": "none",
    }
    whole = changed(tokens)
    header = whole.index(b"output.weight") + 60
    file = tmp_path / "x.gguf"

    def damage(rng):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(4, header))
            kind = rng.integers(0, 3)
            if kind == 0:
                data[at] = int(rng.integers(0, 256))
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 40))]
            else:
                data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        file.write_bytes(data)

    fuzz(file, rounds, 4, damage, "gguf")
