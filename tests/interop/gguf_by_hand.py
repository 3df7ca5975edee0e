"""GGUF files by hand, from the format's description: written without the code under test."""

import struct

import ml_dtypes
import numpy as np

from tests.interop.reference_llama import Sizes

FLOATS = {np.dtype("<f4"): 0, np.dtype("<f2"): 1, np.dtype(ml_dtypes.bfloat16): 30}
ARRAYS = {np.dtype("u1"): 0, np.dtype("<i4"): 5, np.dtype("<u4"): 4, np.dtype("<f4"): 6}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(x):
    """A type and a value of metadata."""
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, str | bytes):
        return struct.pack("<I", 8) + string(x)
    if isinstance(x, list):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(string, x))
    return struct.pack("<IIQ", 9, ARRAYS[x.dtype], len(x)) + x.tobytes()


def padded(data, alignment):
    return data + bytes(-len(data) % alignment)


def gguf_bytes(metadata, tensors, version=3, alignment=32, **changes):
    """A whole file.

    Args:
        metadata: by key; bytes are a type and a value as they stand.
        tensors: by name: arrays, or (number of the type, shape, bytes).
        changes: `offsets` or `counts` other than what is right.
    """
    entries = {
        name: (FLOATS[x.dtype], x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x
        for name, x in tensors.items()
    }
    counts = changes.get("counts", (len(entries), len(metadata)))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for key, x in metadata.items():
        head += string(key) + (x.raw if isinstance(x, Raw) else value(x))
    at, data = 0, b""
    for name, (kind, shape, content) in entries.items():
        offset = changes.get("offsets", {}).get(name, at)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += string(name) + sizes + struct.pack("<IQ", kind, offset)
        data += padded(content, alignment)
        at = len(data)
    return padded(head, alignment) + data


class Raw:
    """A type and a value of metadata as they are to stand in the file."""

    def __init__(self, raw):
        self.raw = raw


def llama_metadata(s: Sizes, **changes):
    keys = {
        "general.architecture": "llama",
        "llama.block_count": s.L,
        "llama.context_length": 64,
        "llama.embedding_length": s.D,
        "llama.feed_forward_length": s.F,
        "llama.attention.head_count": s.N,
        "llama.attention.head_count_kv": s.K,
        "llama.attention.key_length": s.H,
        "llama.attention.value_length": s.H,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": s.H,
        "llama.rope.freq_base": 10_000.0,
    }
    changes = {name.replace("__", "."): x for name, x in changes.items()}
    return {name: x for name, x in (keys | changes).items() if x is not None}


def llama_tensors(weights, s: Sizes):
    """Tensors of Hugging Face's Llama as llama.cpp's convert_hf_to_gguf.py stores them."""
    found = {}
    for name, x in weights.items():
        if name.startswith("model.layers."):
            _, _, layer, *middle, _ = name.split(".")
            part = ".".join(middle)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = s.N if "q_proj" in part else s.K
                x = x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:])
                x = np.ascontiguousarray(x.swapaxes(1, 2)).reshape(weights[name].shape)
            found[f"blk.{layer}.{NAMES[part]}.weight"] = x
        else:
            ours = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
            ours["lm_head"] = "output"
            found[ours[name.removesuffix(".weight")] + ".weight"] = x
    return found
