"""Hugging Face checkpoints by hand: written and read without the code under test."""

import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.interop.reference_llama import Sizes, random_weights

RECORDED = Path(__file__).parents[1] / "data" / "huggingface"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header_of(weights):
    header, at = {}, 0
    for name, array in weights.items():
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    return header


def write_raw(file, header, data):
    """A file of any header (a value for JSON, or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_safetensors(file, weights):
    write_raw(file, header_of(weights), b"".join(array.tobytes() for array in weights.values()))


def read_safetensors(folder):
    """All tensors of a folder's files, by name; no tensor may be in two files."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__", None) == {"format": "pt"}
        for name, entry in header.items():
            assert name not in tensors
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            data = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]])
            assert data.size == math.prod(entry["shape"])
            tensors[name] = data.reshape(entry["shape"])
    return tensors


def config_of(sizes: Sizes, **changes):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.V,
        "hidden_size": sizes.D,
        "intermediate_size": sizes.F,
        "num_hidden_layers": sizes.L,
        "num_attention_heads": sizes.N,
        "num_key_value_heads": sizes.K,
        "head_dim": sizes.H,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": sizes.tied,
    } | changes


def write_checkpoint(folder, sizes=None, weights=None, **changes):
    """A folder with config.json and one safetensors file; returns the weights."""
    sizes = sizes or Sizes()
    weights = random_weights(sizes) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(sizes, **changes)))
    write_safetensors(folder / "model.safetensors", weights)
    return weights


def write_shards(folder, parts, sizes=None, **changes):
    """A folder with config.json, one file for each part of the weights, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(sizes or Sizes(), **changes)))
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number}.safetensors"
        write_safetensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name
