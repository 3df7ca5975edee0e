"""Thousands of damaged checkpoints: each is read or refused with one clear error, and none acts."""

import pickletools
import sys

import numpy as np
import pytest

from dmc_jax.errors import UserError
from dmc_jax.interop.megatron import open_megatron
from tests.interop.reference_llama import Sizes, random_weights
from tests.interop.torch_zip import Call, Ordered, Writer, pickle_of, save_zip

SIZES = Sizes(V=5, D=4, L=1, N=2, K=1, H=2, F=3)
# What a pickle could do besides making objects; opening files for reading is our own doing.
ACTS = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.remove", "os.rename")
ACTS += ("os.mkdir", "subprocess.Popen", "socket.connect", "pickle.find_class", "ctypes.dlopen")
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
GLOBALS = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]


@pytest.fixture(scope="module")
def acts():
    """A switch and a list of what happened while it was on; audit hooks cannot be taken away."""
    on, seen = [False], []

    def hook(event, arguments):
        if on[0] and (event in ACTS or (event == "open" and _writes(arguments))):
            seen.append((event, arguments))

    sys.addaudithook(hook)
    yield on, seen
    on[0] = False


def _writes(arguments):
    _, mode, flags = arguments
    return any(letter in mode for letter in "wxa+") if mode else bool(flags & 3)


def valid_members():
    """The archive of a small checkpoint, member by member."""
    args = {
        "num_layers": SIZES.L,
        "hidden_size": SIZES.D,
        "num_attention_heads": SIZES.N,
        "group_query_attention": True,
        "num_query_groups": SIZES.K,
        "kv_channels": SIZES.H,
        "ffn_hidden_size": SIZES.F,
        "padded_vocab_size": SIZES.V,
        "max_position_embeddings": 8,
        "dmc_window_size": 4,
    }
    w = random_weights(SIZES)
    p = "model.layers.0."
    fused = [w[p + f"self_attn.{name}_proj.weight"] for name in "qkv"]
    model = {
        "embedding.word_embeddings.weight": w["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": w["model.norm.weight"],
        "output_layer.weight": w["lm_head.weight"],
        "decoder.layers.0.self_attention.linear_qkv.weight": np.concatenate(fused),
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": w["model.norm.weight"],
        "decoder.layers.0.self_attention.linear_proj.weight": w[p + "self_attn.o_proj.weight"],
        "decoder.layers.0.mlp.linear_fc1.weight": np.concatenate(
            [w[p + "mlp.gate_proj.weight"], w[p + "mlp.up_proj.weight"]]
        ),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": w["model.norm.weight"],
        "decoder.layers.0.mlp.linear_fc2.weight": w[p + "mlp.down_proj.weight"],
        "decoder._extra_state": Call("_io BytesIO", (), (b"\xff", 0, None), new=True),
    }
    state = {"args": Call("argparse Namespace", (), args, new=True), "model": Ordered(model)}
    writer = Writer()
    members = {"archive/data.pkl": pickle_of(state, writer), "archive/byteorder": b"little"}
    return members | {f"archive/data/{key}": data for key, data in writer.storages.items()}


def mutated(rng, data):
    """`data` with a small change or two."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 3)):
        at = int(rng.integers(0, len(data) + 1))
        length = int(rng.integers(1, 30))
        other = int(rng.integers(0, len(data) + 1))
        match rng.integers(0, 8):
            case 0:
                data[at : at + 1] = bytes([rng.integers(0, 256)])
            case 1:
                data[at:at] = bytes([rng.integers(0, 256)])
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[other : other + length]
            case 4:
                data[at:at] = OPCODES[rng.integers(0, len(OPCODES))]
            case 5:
                data[at:at] = GLOBALS[rng.integers(0, len(GLOBALS))]
            case 6:
                data[at : at + 4] = rng.choice([0, 1, 2**31 - 1, 2**32 - 1]).tobytes()[:4]
            case 7:
                del data[at:]
    return bytes(data)


def read_everything(folder):
    """True if the checkpoint is good."""
    try:
        tensors = open_megatron(folder).tensors
        for tensor in tensors.values():
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    except UserError as error:
        assert 10 < len(str(error)) < 2000
        return False
    return True


def fuzz(tmp_path, acts, seed, count):
    on, seen = acts
    rng, members = np.random.default_rng(seed), valid_members()
    file = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir()
    save_zip(file, members)
    assert read_everything(tmp_path)
    whole, good = file.read_bytes(), 0
    for number in range(count):
        if number % 4:  # the pickle inside of a sound archive
            name = "archive/data.pkl"
            save_zip(file, members | {name: mutated(rng, members[name])})
        else:
            file.write_bytes(mutated(rng, whole))
        on[0] = True
        try:
            good += read_everything(tmp_path)
        finally:
            on[0] = False
    assert seen == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        [file.parent.name, file.name]
    )
    # Some changes do no harm (a weight, a name nobody reads); if most did not, nothing was tried.
    assert 0 < good < count / 2


def damaged_checkpoints_are_refused_and_do_nothing_test(tmp_path, acts):
    fuzz(tmp_path, acts, seed=0, count=300)


@pytest.mark.slow
def ten_thousand_damaged_checkpoints_are_refused_and_do_nothing_test(tmp_path, acts):
    fuzz(tmp_path, acts, seed=1, count=10_000)


def the_audit_would_notice_test(acts, tmp_path):
    import os

    on, seen = acts
    on[0] = True
    (tmp_path / "canary").write_text("written")
    os.system("true")
    on[0] = False
    assert {event for event, _ in seen} >= {"open", "os.system"}
    seen.clear()
