"""Meta's checkpoints: every tensor bit for bit as Hugging Face has it, or one clear error."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.errors import UserError
from dmc_jax.interop.meta import is_meta, open_meta, to_huggingface_order, to_meta_order
from dmc_jax.interop.parameters import read_params
from dmc_jax.model.llama import Llama
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import attend_whole
from tests.interop.reference_llama import Sizes, logits, random_weights
from tests.interop.torch_zip import Ordered, save

SIZES = Sizes()
LOGITS_TOLERANCE = 1e-5  # float32 against float64
PARAMS = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "head_dim": 6}
# Meta's name, and the axis that its shards split.
NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
OUTSIDE = {"model.norm": ("norm", None), "lm_head": ("output", 0)}


def interleaved(weight, head_dim):
    """Row by row: Meta's channels 2f and 2f + 1 of a head are Hugging Face's f and f + H/2."""
    result = np.empty_like(weight)
    for row in range(len(weight)):
        head, channel = divmod(row, head_dim)
        f, second = channel % (head_dim // 2), channel >= head_dim // 2
        result[head * head_dim + 2 * f + second] = weight[row]
    return result


def as_meta(weights, sizes, shards, embedding_axis=0, copies=1):
    """The state dictionaries of a model's shards."""
    states = [{} for _ in range(shards)]
    for full, weight in weights.items():
        name = full.removesuffix(".weight")
        if name == "model.embed_tokens":
            theirs, axis = "tok_embeddings", embedding_axis
        elif name in OUTSIDE:
            theirs, axis = OUTSIDE[name]
        else:
            layer, name = name.removeprefix("model.layers.").split(".", 1)
            theirs, axis = NAMES[name]
            theirs = f"layers.{layer}.{theirs}"
        if theirs.endswith(("wq", "wk")):
            weight = interleaved(weight, sizes.H)
        for state in states:
            state[theirs + ".weight"] = weight
        if axis is not None:
            repeated = copies if theirs.endswith(("wk", "wv")) else 1
            parts = [p for p in np.split(weight, shards // repeated, axis) for _ in range(repeated)]
            for state, part in zip(states, parts, strict=True):
                state[theirs + ".weight"] = np.ascontiguousarray(part)
    return states


def write(folder, states, **params):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for number, state in enumerate(states):
        name = f"consolidated.{number:02d}"
        save(folder / f"{name}.pth", Ordered(state), root=name)
    return folder


def assert_same_bits(tensors, weights):
    assert set(tensors) == set(weights)
    for name, weight in weights.items():
        tensor = tensors[name]
        result = tensor.read()
        assert result.shape == tensor.shape == weight.shape, name
        assert result.dtype == tensor.dtype == weight.dtype and result.flags.c_contiguous, name
        assert result.tobytes() == weight.tobytes(), name


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("shards, embedding_axis", [(1, 0), (2, 0), (2, 1)])
def every_tensor_comes_back_bit_for_bit_test(tmp_path, shards, embedding_axis, dtype):
    sizes = Sizes(V=20)
    weights = random_weights(sizes, dtype)
    states = as_meta(weights, sizes, shards, embedding_axis)
    for state in states:
        state["rope.freqs"] = np.ones(3, np.float32)
    source = open_meta(write(tmp_path / "model", states, vocab_size=-1))
    assert_same_bits(source.tensors, weights)
    assert any("frequencies (rope.freqs)" in note for note in source.notes)
    assert (source.format, source.policy) == ("meta", Dense())
    c = source.config
    assert (c.vocab_size, c.width, c.layers, c.mlp_width) == (20, 16, 2, 24)
    assert (c.heads, c.kv_heads, c.head_dim, c.norm_eps) == (4, 2, 6, 1e-5)
    assert not c.tied_embeddings and c.rope_scaling is None


@pytest.mark.parametrize("kv_heads", [2, 1])
def more_shards_than_kv_heads_repeat_them_test(tmp_path, kv_heads):
    sizes = Sizes(V=20, K=kv_heads)
    weights = random_weights(sizes)
    states = as_meta(weights, sizes, 4, copies=4 // kv_heads)
    source = open_meta(write(tmp_path / "model", states, n_kv_heads=kv_heads))
    assert_same_bits(source.tensors, weights)
    # Neighbours that disagree are no copies.
    states[1]["layers.0.attention.wk.weight"] = states[3]["layers.0.attention.wk.weight"] + 1
    source = open_meta(write(tmp_path / "model", states, n_kv_heads=kv_heads))
    with pytest.raises(UserError, match="'layers.0.attention.wk.weight' .* hold different rows"):
        source.tensors["model.layers.0.self_attn.k_proj.weight"].read()


def wrapped_modules_have_the_names_of_what_they_wrap_test(tmp_path):
    weights = random_weights(SIZES)
    [state] = as_meta(weights, SIZES, 1)
    state = {f"module._orig_mod.{name}": value for name, value in state.items()}
    assert_same_bits(open_meta(write(tmp_path / "model", [state])).tensors, weights)


def a_git_lfs_pointer_is_called_one_test(tmp_path):
    folder = write(tmp_path / "model", as_meta(random_weights(SIZES), SIZES, 1))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13476939516\n"
    (folder / "consolidated.00.pth").write_text(pointer)
    with pytest.raises(UserError, match="00.pth is a Git LFS pointer .* has 13,476,939,516 bytes"):
        open_meta(folder)


@pytest.mark.parametrize("kv_heads", [4, 1])
def multi_head_and_multi_query_models_come_back_test(tmp_path, kv_heads):
    sizes = Sizes(K=kv_heads)
    weights = random_weights(sizes)
    params = {"n_kv_heads": kv_heads} if kv_heads < 4 else {"n_kv_heads": None}  # as Llama 2 7B
    source = open_meta(write(tmp_path / "model", as_meta(weights, sizes, 1), **params))
    assert source.config.kv_heads == kv_heads
    assert_same_bits(source.tensors, weights)


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (4, 6), (3, 128)])
def the_two_orders_of_channels_are_each_others_inverse_test(heads, head_dim):
    weight = np.arange(heads * head_dim * 5).reshape(-1, 5)
    meta = to_meta_order(weight, heads)
    np.testing.assert_array_equal(meta, interleaved(weight, head_dim))
    np.testing.assert_array_equal(to_huggingface_order(meta, heads), weight)
    # The channel by which DMC decides is the last one of each head in both.
    np.testing.assert_array_equal(meta[head_dim - 1 :: head_dim], weight[head_dim - 1 :: head_dim])


@pytest.mark.parametrize(
    "params, expected",
    [
        ({}, (10_000.0, 4096, None)),
        ({"max_seq_len": 2048}, (10_000.0, 2048, None)),
        ({"rope_theta": 1e6}, (1e6, 16_384, None)),
        ({"rope_theta": 500_000.0}, (500_000.0, 8192, None)),
        (
            {"rope_theta": 500_000, "use_scaled_rope": True, "rope_scaling_factor": 8},
            (500_000.0, 131_072, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ),
    ],
)
def rotary_fields_and_length_follow_the_family_test(tmp_path, params, expected):
    states = as_meta(random_weights(SIZES), SIZES, 1)
    c = open_meta(write(tmp_path / "model", states, **params)).config
    assert (c.rope_theta, c.max_length, c.rope_scaling) == expected


@pytest.mark.parametrize(
    "width, layers, factor", [(2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8)]
)
def scaling_and_tied_head_of_published_sizes_are_known_test(tmp_path, width, layers, factor):
    sizes = Sizes(V=5, D=width, L=layers, N=1, K=1, H=2, F=1)
    weights = random_weights(sizes)
    embedding = weights["model.embed_tokens.weight"]
    params = {"dim": width, "n_layers": layers, "n_heads": 1, "n_kv_heads": 1, "head_dim": 2}
    params |= {"rope_theta": 500_000.0, "use_scaled_rope": True}
    for head in (weights["lm_head.weight"], embedding.copy(), None):
        state = as_meta(weights, sizes, 1)[0] | {"output.weight": head}
        if head is None:
            del state["output.weight"]
        source = open_meta(write(tmp_path / "model", [state], **params))
        assert source.config.rope_scaling == Llama3Scaling(factor=factor)
        repeated = head is not None and head.tobytes() == embedding.tobytes()
        tied = head is None or (repeated and factor == 32.0)
        assert source.config.tied_embeddings == tied
        assert ("lm_head.weight" in source.tensors) == (not tied)


@pytest.mark.parametrize(
    "params, width",
    [
        ({"multiple_of": 8}, 48),  # 2/3 of 64 is 42
        ({"multiple_of": 8, "ffn_dim_multiplier": 1.3}, 56),  # int(54.6)
        ({"multiple_of": 1, "ffn_dim_multiplier": 1.3}, 54),
        ({"hidden_dim": 30}, 30),
    ],
)
def width_of_the_mlp_follows_metas_rule_test(tmp_path, params, width):
    sizes = Sizes(F=width)
    states = as_meta(random_weights(sizes), sizes, 1)
    assert open_meta(write(tmp_path / "model", states, **params)).config.mlp_width == width
    sizes = Sizes(F=width + 2)
    write(tmp_path / "model", as_meta(random_weights(sizes), sizes, 1), **params)
    with pytest.raises(UserError, match=f"an MLP {width} wide, .* make {width + 2}"):
        open_meta(tmp_path / "model")


def logits_equal_a_loop_over_the_original_weights_test(tmp_path):
    sizes = Sizes(V=20)
    weights = random_weights(sizes)
    source = open_meta(write(tmp_path / "model", as_meta(weights, sizes, 2), rope_theta=500.0))
    tokens = np.random.default_rng(2).integers(0, sizes.V, 16)
    expected = logits(weights, sizes, tokens, base=500.0)
    attend = attend_whole(Dense(), source.config, jnp.arange(16)[None])
    model = Llama(source.config)
    run = jax.jit(lambda params, tokens: model.apply(params, tokens, attend=attend).logits)
    actual = run({"params": read_params(source)}, tokens[None])[0]
    np.testing.assert_allclose(actual, expected, atol=LOGITS_TOLERANCE)


def the_tokenizer_goes_along_test(tmp_path):
    folder = write(tmp_path / "model", as_meta(random_weights(SIZES), SIZES, 1))
    assert open_meta(folder).tokenizer == ()
    (tmp_path / "tokenizer.model").write_bytes(b"above")
    assert [file.read_bytes() for file in open_meta(folder).tokenizer] == [b"above"]
    (folder / "tokenizer.model").write_bytes(b"beside")
    assert [file.read_bytes() for file in open_meta(folder).tokenizer] == [b"beside"]


def recognition_looks_at_names_test(tmp_path):
    assert not is_meta(tmp_path / "nowhere")
    folder = write(tmp_path / "model", [])
    assert not is_meta(folder)
    (folder / "consolidated.00.pth").write_bytes(b"")
    assert is_meta(folder) and not is_meta(folder / "consolidated.00.pth")
    (folder / "params.json").unlink()
    assert not is_meta(folder)


# ---- broken input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, match",
    [
        ({"n_layers": 3}, "n_layers is 3, the weights have 2"),
        ({"n_layers": 10**9}, "n_layers is 1000000000, the weights have 2"),
        ({"n_layers": 2.0}, "n_layers is 2.0; expected an integer"),
        ({"n_layers": True}, "n_layers is True"),
        ({"n_layers": None}, "n_layers is missing"),
        ({"dim": 10**5000}, "not valid JSON|dim is too large"),
        ({"dim": 32}, "vocab_size|shape"),
        ({"dim": -16}, "dim is -16"),
        ({"dim": "16"}, "dim is '16'"),
        ({"dim": [[]]}, "dim is of type list"),
        ({"head_dim": None, "n_heads": 5}, "no multiple of n_heads"),
        ({"n_heads": 8}, "wq.* has shape"),
        ({"n_heads": 3}, "cannot share 2 KV heads"),
        ({"n_kv_heads": 4}, "wk.* has shape"),
        ({"head_dim": 5}, "even"),
        ({"head_dim": 8}, "has shape"),
        ({"vocab_size": 32_000}, "vocab_size is 32000, the weights and 1 shard.* make 19"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"use_scaled_rope": 1}, "expected true or false"),
        ({"use_scaled_rope": True}, "add rope_scaling_factor"),
        ({"moe": {"num_experts": 8}}, "has the field 'moe'"),
        ({"quantization_args": {"group_size": 32}}, "quantized"),
    ],
)
def params_that_are_wrong_are_said_test(tmp_path, params, match):
    folder = write(tmp_path / "model", as_meta(random_weights(SIZES), SIZES, 1))
    try:
        text = json.dumps(PARAMS | params)
    except ValueError:  # Python refuses to print long integers, a file may hold them
        text = '{"dim": 1' + 5000 * "0" + "}"
    (folder / "params.json").write_text(text)
    with pytest.raises(UserError, match=match) as error:
        open_meta(folder)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b"{}", b"null"])
def params_that_are_no_json_object_are_said_test(tmp_path, text):
    folder = write(tmp_path / "model", as_meta(random_weights(SIZES), SIZES, 1))
    (folder / "params.json").write_bytes(text)
    with pytest.raises(UserError, match="JSON|expected an object|is missing"):
        open_meta(folder)


def broken_states(state):
    """(what is done to the state of the only shard, expected message)."""
    wq = "layers.1.attention.wq.weight"
    yield {"norm.weight": None}, "'norm.weight' is missing"
    yield {"tok_embeddings.weight": None}, "'tok_embeddings.weight' is missing"
    yield {wq: None}, "layers.1.attention.wq.weight' is missing"
    yield {wq: state[wq][:-1].copy()}, "has shape"
    yield {wq: np.ascontiguousarray(state[wq].T)}, "has shape"
    yield {wq: state[wq].ravel()}, "has shape"
    yield {"tok_embeddings.weight": state["norm.weight"]}, "expected a matrix"
    yield {wq: state[wq].astype(np.int8)}, "not a tensor of"
    yield {wq: "weights"}, "not a tensor of"
    yield {"layers.1.attention.wq.bias": state["norm.weight"]}, "does not have.*wq.bias"
    yield {"vision_model.x": state["norm.weight"]}, "does not have.*vision_model"
    yield {"layers.7.attention.wq.weight": state[wq]}, "some are missing"
    yield {1: state[wq]}, "tensors by name"


@pytest.mark.parametrize("case", range(13))
def weights_that_are_wrong_are_said_test(tmp_path, case):
    state = as_meta(random_weights(SIZES), SIZES, 1)[0]
    cases = list(broken_states(state))
    assert len(cases) == 13
    changes, match = cases[case]
    state = {name: value for name, value in (state | changes).items() if value is not None}
    with pytest.raises(UserError, match=match):
        open_meta(write(tmp_path / "model", [state]))


def shards_that_do_not_fit_together_are_said_test(tmp_path):
    sizes = Sizes(V=20)
    states = as_meta(random_weights(sizes), sizes, 2)
    folder = write(tmp_path / "model", states)
    second = folder / "consolidated.01.pth"
    second.rename(folder / "consolidated.02.pth")
    with pytest.raises(UserError, match=r"NN = \[0, 2\]; expected all"):
        open_meta(folder)
    (folder / "consolidated.02.pth").unlink()  # half of the model is left
    with pytest.raises(UserError, match="has shape|are all files"):
        open_meta(folder)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match="nothing"):
        open_meta(folder)
    other = {name: value.astype(np.float32) for name, value in states[1].items()}
    with pytest.raises(UserError, match="another dtype"):
        open_meta(write(folder, [states[0], other]))
    with pytest.raises(UserError, match=r"cannot be split among 3 shard\(s\)|has shape|make"):
        open_meta(write(folder, [*states, states[1]]))
    with pytest.raises(UserError, match="dictionary of tensors"):
        save(folder / "consolidated.01.pth", [1, 2])
        open_meta(write(folder, states[:1]))


def a_kv_head_in_two_shards_is_refused_test(tmp_path):
    sizes = dataclasses.replace(SIZES, V=20, K=1)
    weights = random_weights(sizes)
    folder = write(tmp_path / "model", as_meta(weights, sizes, 2), n_kv_heads=1)
    with pytest.raises(UserError, match=r"attention.wk.weight' has shape \(3, 16\)"):
        open_meta(folder)
