"""Megatron's DMC checkpoints: the weights bit for bit, the model's logits, or one clear error."""

import random

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.data.tokenizer import train_sentencepiece
from dmc_jax.errors import UserError
from dmc_jax.interop.megatron import is_megatron, open_megatron
from dmc_jax.interop.parameters import read_params
from dmc_jax.model.llama import Llama
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole
from tests.interop.reference_llama import Sizes, dmc_head, logits, random_weights, with_decisions
from tests.interop.torch_zip import Call, Global, Ordered, save

SIZES = Sizes()
PADDED = 24  # rows of the embedding: a multiple of the ranks
LOGITS_TOLERANCE = 1e-5  # float32 against float64
NAMESPACE = "argparse Namespace"
ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_weight"
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"


def arguments(sizes, ranks, padded=PADDED, **changes):
    """The run's arguments: those that matter, and a few of the hundreds that do not."""
    args = {
        "num_layers": sizes.L,
        "hidden_size": sizes.D,
        "num_attention_heads": sizes.N,
        "group_query_attention": sizes.K != sizes.N,
        "num_query_groups": sizes.K if sizes.K != sizes.N else 1,
        "kv_channels": sizes.H,
        "ffn_hidden_size": sizes.F,
        "padded_vocab_size": padded,
        "max_position_embeddings": 64,
        "seq_length": 64,
        "norm_epsilon": 1e-5,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not sizes.tied,
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": 1,
        "num_experts": None,
        "params_dtype": Global("torch bfloat16"),
        "model_type": Call("megatron.core.enums ModelType", (1,)),
        "tokenizer_type": "Llama2Tokenizer",
        "adam_betas": (0.9, 0.95),
        "dmc_window_size": 4,
        "dmc_temp": 0.25,
        "dmc_init_val": 3.0,
        "dmc_cr": 4.0,
        "dmc_finetune": True,
        "dmc_is_stage_one": False,
    }
    return {name: value for name, value in (args | changes).items() if value != "absent"}


def rank_weights(weights, sizes, rank, ranks, rows):
    """What one rank of tensor parallelism holds, written out row by row."""
    s = sizes
    groups = range(rank * s.K // ranks, (rank + 1) * s.K // ranks)
    mlp = slice(rank * s.F // ranks, (rank + 1) * s.F // ranks)
    heads = slice(rank * s.N * s.H // ranks, (rank + 1) * s.N * s.H // ranks)

    def vocabulary(weight):
        padded = np.full((rows, s.D), 7, weight.dtype)
        padded[: s.V] = weight
        return padded[rank * rows // ranks : (rank + 1) * rows // ranks]

    state = {
        "embedding.word_embeddings.weight": vocabulary(weights["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "decoder.final_layernorm._extra_state": None,
    }
    if not s.tied:
        state["output_layer.weight"] = vocabulary(weights["lm_head.weight"])
    for layer in range(s.L):
        ours = {
            name.split(".", 3)[3].removesuffix(".weight"): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        q, k, v = (ours[f"self_attn.{name}_proj"].reshape(-1, s.H, s.D) for name in "qkv")
        rows = []
        for group in groups:
            rows += [q[head] for head in range(s.N) if head // (s.N // s.K) == group]
            rows += [k[group], v[group]]
        extra = Call("_io BytesIO", (), (b"\x80\xff" * 9, 0, None), new=True)
        theirs = {
            "self_attention.linear_qkv.weight": np.concatenate(rows),
            "self_attention.linear_qkv._extra_state": extra,
            ATTENTION_NORM: ours["input_layernorm"],
            "self_attention.linear_proj.weight": ours["self_attn.o_proj"][:, heads],
            "mlp.linear_fc1.weight": np.concatenate(
                [ours["mlp.gate_proj"][mlp], ours["mlp.up_proj"][mlp]]
            ),
            MLP_NORM: ours["post_attention_layernorm"],
            "mlp.linear_fc2.weight": ours["mlp.down_proj"][:, mlp],
        }
        state |= {f"decoder.layers.{layer}.{name}": weight for name, weight in theirs.items()}
    return {
        name: np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value
        for name, value in state.items()
    }


def random_state():
    """What a training run saves of its random generators."""
    key = np.random.default_rng(0).integers(0, 2**32, 8, dtype=np.uint32)
    array = Call("numpy.core.multiarray _reconstruct", (Global("numpy ndarray"), (0,), b"b"))
    dtype = Call("numpy dtype", ("u4", False, True), (3, "<", None, None, None, -1, -1, 0))
    array.state = (1, (8,), dtype, False, key.tobytes())
    return {
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": ("MT19937", array, 623, 0, 0.0),
        "torch_rng_state": np.arange(8, dtype=np.uint8),
        "rng_tracker_states": {"model-parallel-rng": np.arange(8, dtype=np.uint8)},
    }


def write(folder, weights, sizes, ranks=1, *, edit=None, args=None, padded=PADDED, **changes):
    """A checkpoint in `folder`; `edit` may change the states of the ranks."""
    args = args or arguments(sizes, ranks, padded, **changes)
    states = [
        {
            "args": Call(NAMESPACE, (), args, new=True),
            "checkpoint_version": 3.0,
            "iteration": 100,
            "model": rank_weights(weights, sizes, rank, ranks, padded),
            "rng_state": [random_state()],
        }
        for rank in range(ranks)
    ]
    if edit is not None:
        edit(states)
    for rank, state in enumerate(states):
        if isinstance(state.get("model"), dict):
            state["model"] = Ordered(state["model"])
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True, exist_ok=True)
        save(folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", state, "model_optim_rng")
    return folder


def assert_same_bits(tensors, weights):
    assert set(tensors) == set(weights)
    for name, weight in weights.items():
        result = tensors[name].read()
        assert result.shape == tensors[name].shape == weight.shape, name
        assert result.dtype == tensors[name].dtype == weight.dtype, name
        assert result.flags.c_contiguous and result.tobytes() == weight.tobytes(), name


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 300 ids, and so a model of them."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(["the quick brown fox jumps over the lazy dog " * 20], 300, path)
    return path


# ---- what Megatron writes ---------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def every_tensor_comes_back_bit_for_bit_test(tmp_path, ranks, kv_heads, dtype):
    sizes = Sizes(K=kv_heads)
    weights = random_weights(sizes, dtype)
    write(tmp_path, weights, sizes, ranks, vocab_size=sizes.V)
    source = open_megatron(tmp_path)
    assert_same_bits(source.tensors, weights)
    assert (source.format, source.policy.threshold) == ("megatron", 0.0)
    assert source.policy.settings == DMCSettings(window=4, temperature=0.25, offset=3.0, eps=2**-7)
    assert source.notes == () and source.tokenizer == ()
    c = source.config
    assert (c.vocab_size, c.width, c.layers, c.heads, c.kv_heads) == (19, 16, 2, 4, kv_heads)
    assert (c.head_dim, c.mlp_width, c.rope_theta, c.norm_eps) == (6, 24, 10_000.0, 1e-5)
    assert (c.max_length, c.tied_embeddings, c.rope_scaling) == (64, False, None)


@pytest.mark.parametrize("ranks", [1, 2])
def a_tied_model_comes_back_test(tmp_path, ranks):
    sizes = Sizes(tied=True)
    weights = random_weights(sizes)
    source = open_megatron(write(tmp_path, weights, sizes, ranks, vocab_size=sizes.V))
    assert source.config.tied_embeddings
    assert_same_bits(source.tensors, weights)


def norms_of_megatrons_own_layers_come_back_test(tmp_path):
    def edit(states):
        model = states[0]["model"]
        for layer in range(SIZES.L):
            prefix = f"decoder.layers.{layer}."
            model[prefix + "input_layernorm.weight"] = model.pop(prefix + ATTENTION_NORM)
            model[prefix + "pre_mlp_layernorm.weight"] = model.pop(prefix + MLP_NORM)

    weights = random_weights(SIZES)
    write(tmp_path, weights, SIZES, edit=edit, vocab_size=SIZES.V)
    assert_same_bits(open_megatron(tmp_path).tensors, weights)


def both_layouts_and_the_latest_iteration_are_found_test(tmp_path):
    weights = [random_weights(SIZES, seed=seed) for seed in range(4)]
    run = tmp_path / "run"
    for iteration, value in ((50, weights[0]), (100, weights[1])):
        write(run / f"iter_{iteration:07d}", value, SIZES, 2, vocab_size=SIZES.V)
    with pytest.raises(UserError, match="2 folders iter_"):
        open_megatron(run)
    (run / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert_same_bits(open_megatron(run).tensors, weights[1])
    assert_same_bits(open_megatron(run / "iter_0000050").tensors, weights[0])
    (run / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(UserError, match="'release', but .* does not exist"):
        open_megatron(run)
    write(run / "release", weights[2], SIZES, vocab_size=SIZES.V)
    assert_same_bits(open_megatron(run).tensors, weights[2])
    write(run, weights[3], SIZES, vocab_size=SIZES.V)  # as NVIDIA's released models
    assert_same_bits(open_megatron(run).tensors, weights[3])
    one = tmp_path / "one"
    write(one / "iter_0000007", weights[0], SIZES, vocab_size=SIZES.V)
    assert_same_bits(open_megatron(one).tensors, weights[0])


@pytest.mark.parametrize("text", ["", "../iter_0000100", "-1", "99999999", "1" * 99, "\xff", "/"])
def the_latest_iteration_names_no_other_folder_test(tmp_path, text):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match="expected a number or 'release'"):
        open_megatron(tmp_path)


def recognition_looks_at_names_test(tmp_path):
    assert not is_megatron(tmp_path) and not is_megatron(tmp_path / "nowhere")
    for name in ("mp_rank_00", "mp_rank_00_001", "iter_0000100"):
        (tmp_path / name / name).mkdir(parents=True)
        assert is_megatron(tmp_path / name)
    file = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    file.parent.mkdir()
    file.write_text("100")
    assert is_megatron(file.parent) and not is_megatron(file)


def what_arguments_leave_out_has_the_documented_value_and_is_said_test(tmp_path):
    absent = ("rotary_base", "norm_epsilon", "dmc_window_size", "dmc_temp", "dmc_init_val")
    changes = dict.fromkeys(absent, "absent") | {"kv_channels": None}
    sizes = Sizes(H=4)
    write(tmp_path, random_weights(sizes), sizes, vocab_size=None, **changes)
    source = open_megatron(tmp_path)
    assert source.policy.settings == DMCSettings(window=12, temperature=0.1, offset=5.0, eps=2**-7)
    c = source.config
    assert (c.head_dim, c.rope_theta, c.norm_eps, c.vocab_size) == (4, 10_000.0, 1e-5, PADDED)
    for text in (*absent, "all 24 ids kept"):
        assert any(text in note for note in source.notes), text
    args = arguments(sizes, 1, vocab_size=sizes.V)
    args = {name: value for name, value in args.items() if not name.startswith("dmc_")}
    write(tmp_path, random_weights(sizes), sizes, args=args)
    assert any("single DMC setting" in note for note in open_megatron(tmp_path).notes)


def settings_and_rotary_fields_are_the_runs_test(tmp_path):
    changes = {"dmc_window_size": 0, "dmc_init_val": 0, "rotary_base": 5e5, "norm_epsilon": 1e-6}
    changes |= {"use_rope_scaling": True, "vocab_size": SIZES.V}
    source = open_megatron(write(tmp_path, random_weights(SIZES), SIZES, **changes))
    assert source.policy.settings == DMCSettings(window=None, temperature=0.25, offset=0.0)
    assert source.config.rope_scaling == Llama3Scaling(factor=8.0)
    assert (source.config.rope_theta, source.config.norm_eps) == (5e5, 1e-6)
    older = {"layernorm_epsilon": 1e-3, "norm_epsilon": "absent"}
    older |= {"position_embedding_type": "absent", "use_rotary_position_embeddings": True}
    source = open_megatron(write(tmp_path, random_weights(SIZES), SIZES, **older))
    assert source.config.norm_eps == 1e-3


def the_vocabulary_is_the_tokenizers_test(tmp_path, tokenizer):
    sizes = Sizes(V=300)
    weights = random_weights(sizes)
    write(tmp_path / "iter_0000001", weights, sizes, 2, padded=304, vocab_size=250)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    source = open_megatron(tmp_path)
    assert source.tokenizer == (tmp_path / "tokenizer.model",)
    assert_same_bits(source.tensors, weights)
    write(tmp_path / "iter_0000001", random_weights(SIZES), SIZES, 2)
    with pytest.raises(UserError, match="300 ids, but the model only 24"):
        open_megatron(tmp_path)


# ---- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window", [0, 3])
def logits_equal_a_loop_over_the_merged_cache_test(tmp_path, kv_heads, ranks, window):
    sizes = Sizes(K=kv_heads)
    weights = with_decisions(random_weights(sizes), sizes)
    changes = {"dmc_window_size": window, "vocab_size": sizes.V}
    source = open_megatron(write(tmp_path, weights, sizes, ranks, **changes))
    tokens = np.random.default_rng(2).integers(0, sizes.V, 24)

    record = []
    expected = logits(
        weights,
        sizes,
        tokens,
        head=dmc_head,
        base=10_000.0,
        window=window,
        offset=3.0,
        eps=2**-7,
        record=record,
    )
    margins = np.abs(record)
    assert 0.1 < np.mean(np.array(record) > 0) < 0.6 and margins.min() > 1e-3

    attend = attend_whole(source.policy, source.config, jnp.arange(24)[None])
    params = {"params": read_params(source)}
    model = Llama(source.config)
    run = jax.jit(lambda params, tokens: model.apply(params, tokens, attend=attend).logits)
    np.testing.assert_allclose(run(params, tokens[None])[0], expected, atol=LOGITS_TOLERANCE)


# ---- broken input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"num_layers": 3}, "num_layers is 3, the weights have 2"),
        ({"num_layers": 10**18}, "num_layers is 1000000000000000000; expected an integer"),
        ({"num_layers": "absent"}, "num_layers is missing"),
        ({"num_layers": [2]}, "num_layers is of type list"),
        ({"hidden_size": 32}, "has shape .* ask for"),
        ({"hidden_size": 17, "kv_channels": None}, "no multiple of num_attention_heads"),
        ({"num_attention_heads": 8}, "linear_qkv.weight' has shape"),
        ({"num_attention_heads": 5}, "cannot share"),
        ({"group_query_attention": False}, "linear_qkv.weight' has shape"),
        ({"group_query_attention": 2}, "expected true or false"),
        ({"num_query_groups": 4}, "linear_qkv.weight' has shape"),
        ({"num_query_groups": 0}, "num_query_groups is 0"),
        ({"num_query_groups": None}, "num_query_groups is missing"),
        ({"kv_channels": 4}, "has shape"),
        ({"kv_channels": 5}, "even"),
        ({"ffn_hidden_size": 25}, "linear_fc1.weight' has shape"),
        ({"padded_vocab_size": 32_000}, "word_embeddings.weight' has shape"),
        ({"padded_vocab_size": "absent"}, "padded_vocab_size is missing"),
        ({"vocab_size": 25}, "25 ids, but the model only 24"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"untie_embeddings_and_output_weights": False}, "is not set, .* a head of their own"),
        ({"tensor_model_parallel_size": 4}, "name 4 ranks"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size is 2; only 1"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"swiglu": False}, "swiglu is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"add_qkv_bias": True}, "add_qkv_bias is True"),
        ({"qk_layernorm": True}, "qk_layernorm is True"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p is True"),
        ({"num_experts": 8}, "num_experts is set"),
        ({"window_size": (128, 0)}, "window_size is set"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"rotary_percent": 0.5}, "rotary_percent is 0.5"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True"),
        ({"rotary_base": float("nan")}, "rotary_base is nan"),
        ({"norm_epsilon": -1e-5}, "norm_epsilon is -1e-05"),
        ({"dmc_window_size": -1}, "dmc_window_size is -1"),
        ({"dmc_window_size": 1.5}, "dmc_window_size is 1.5"),
        ({"dmc_temp": 0.0}, "dmc_temp is 0.0"),
        ({"dmc_init_val": "5"}, "dmc_init_val is '5'"),
        ({"dmc_is_stage_one": True}, "within the first stage"),
    ],
)
def arguments_that_are_wrong_are_said_test(tmp_path, changes, match):
    write(tmp_path, random_weights(SIZES), SIZES, **changes)
    with pytest.raises(UserError, match=match) as error:
        open_megatron(tmp_path)
    assert len(str(error.value)) < 600 + 2 * len(str(tmp_path))


def the_end_of_the_first_stage_is_a_model_that_merges_nothing_test(tmp_path):
    weights = random_weights(SIZES)
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight[SIZES.H - 1 :: SIZES.H] = 0
    write(tmp_path, weights, SIZES, 2, dmc_is_stage_one=True, vocab_size=SIZES.V)
    source = open_megatron(tmp_path)
    assert isinstance(source.policy, DMC)
    assert_same_bits(source.tensors, weights)


PREFIX = "decoder.layers.1."
BROKEN_WEIGHTS = [
    ({"decoder.final_layernorm.weight": "absent"}, "final_layernorm.weight' is missing"),
    ({PREFIX + "mlp.linear_fc2.weight": "absent"}, "linear_fc2.weight' is missing"),
    ({PREFIX + MLP_NORM: "absent"}, "pre_mlp_layernorm.weight' is missing"),
    ({PREFIX + "input_layernorm.weight": np.ones(16, np.float32)}, "does not have"),
    ({PREFIX + "self_attention.linear_qkv.bias": np.ones(48, np.float32)}, "linear_qkv.bias"),
    ({PREFIX + "mlp.experts.0.weight": np.ones(1, np.float32)}, "another architecture"),
    ({"decoder.layers.9.x": np.ones(1, np.float32)}, "some are missing"),
    ({"output_layer.weight": np.ones((19, 16), np.float32)}, "has shape"),
    ({"output_layer.weight": np.ones((24, 16), np.int64)}, "not a tensor of bfloat16"),
    ({"output_layer.weight": {}}, "not a tensor of bfloat16"),
    ({7: np.ones(1, np.float32)}, "tensors by name"),
]


@pytest.mark.parametrize("changes, match", BROKEN_WEIGHTS)
@pytest.mark.parametrize("rank", [0, 1])
def weights_that_are_wrong_are_said_test(tmp_path, changes, match, rank):
    def edit(states):
        model = states[rank]["model"] | changes
        states[rank]["model"] = {
            name: value
            for name, value in model.items()
            if not (isinstance(value, str) and value == "absent")
        }

    write(tmp_path, random_weights(SIZES), SIZES, 2, edit=edit)
    if rank == 1:  # which norm a layer has, and how many layers, is read off the first rank
        match += "|layer_norm_weight' is missing|does not have"
        match = match.replace("has shape", "has shape|another dtype")
    with pytest.raises(UserError, match=match) as error:
        open_megatron(tmp_path)
    assert "mp_rank" in str(error.value)


def a_key_that_is_there_twice_is_said_test(tmp_path):
    weights = random_weights(SIZES)

    class Twice(dict):
        def items(self):
            yield from super().items()
            yield "output_layer.weight", weights["model.norm.weight"]

    def edit(states):
        states[0]["model"] = Twice(states[0]["model"])

    write(tmp_path, weights, SIZES, edit=edit)
    with pytest.raises(UserError, match="'output_layer.weight' twice"):
        open_megatron(tmp_path)


def ranks_that_do_not_fit_together_are_said_test(tmp_path):
    weights = random_weights(SIZES)
    write(tmp_path, weights, SIZES, 2)
    second = tmp_path / "mp_rank_01"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        (second / "model_optim_rng.pt").rename(tmp_path / "away")
        open_megatron(tmp_path)
    (tmp_path / "away").unlink()
    second.rename(tmp_path / "mp_rank_02")
    with pytest.raises(UserError, match="mp_rank_00, mp_rank_02; expected all"):
        open_megatron(tmp_path)
    (tmp_path / "mp_rank_02").rmdir()
    with pytest.raises(UserError, match=r"1 folder\(s\) mp_rank_XX, but .* 2 ranks"):
        open_megatron(tmp_path)
    # Without that argument the shapes tell.
    write(tmp_path, weights, SIZES, 2, tensor_model_parallel_size=None)
    (tmp_path / "mp_rank_01" / "model_optim_rng.pt").unlink()
    (tmp_path / "mp_rank_01").rmdir()
    with pytest.raises(UserError, match="has shape"):
        open_megatron(tmp_path)
    write(tmp_path, weights, SIZES, 1, tensor_model_parallel_size=3)
    for rank in (1, 2):
        write(tmp_path / f"{rank}", weights, SIZES, 1, tensor_model_parallel_size=3)
        (tmp_path / f"{rank}" / "mp_rank_00").rename(tmp_path / f"mp_rank_{rank:02d}")
    with pytest.raises(UserError, match=r"cannot be split among 3 shard\(s\)|has shape"):
        open_megatron(tmp_path)


@pytest.mark.parametrize(
    "edit, match",
    [
        (lambda state: state.pop("model"), "no weights under 'model'"),
        (lambda state: state.update(model0=state.pop("model")), "virtual pipeline"),
        (lambda state: state.update(model=[1]), "no weights under 'model'"),
        (lambda state: state.update(model={"language_model": {}}), "legacy models"),
        (lambda state: state.update(model={}), "num_layers is 2, the weights have 0"),
        (lambda state: state.pop("args"), "no arguments of the run"),
        (lambda state: state.update(args=None), "no arguments of the run"),
        (lambda state: state.update(args={1: 2}), "no arguments of the run"),
        (lambda state: state.update(args=Call(NAMESPACE, (), None, True)), "no arguments"),
        (lambda state: state.update(args=Call("_io BytesIO", ())), "no arguments of the run"),
        (lambda state: state.update(x=Call("os system", ("echo",))), "os.system"),
        (lambda state: state.update(x=Global("torch.nn.modules.linear Linear")), "Linear"),
    ],
)
def a_file_that_is_no_checkpoint_is_said_test(tmp_path, edit, match):
    write(tmp_path, random_weights(SIZES), SIZES, edit=lambda states: edit(states[0]))
    with pytest.raises(UserError, match=match):
        open_megatron(tmp_path)


@pytest.mark.parametrize("value", [None, [], "model", 3, np.ones(3, np.float32)])
def a_file_of_something_else_is_said_test(tmp_path, value):
    (tmp_path / "mp_rank_00").mkdir()
    save(tmp_path / "mp_rank_00" / "model_optim_rng.pt", value)
    with pytest.raises(UserError, match="no arguments of the run"):
        open_megatron(tmp_path)


@pytest.mark.parametrize(
    "names, match",
    [
        ([], "0 folders iter_"),
        (["mp_rank_00_000"], "pipeline"),
        (["mp_rank_00", "mp_rank_00_001"], "pipeline"),
        (["mp_rank_01"], "expected all from mp_rank_00"),
        (["iter_0000001/.metadata"], "distributed format"),
        (["iter_0000001/x"], "no mp_rank_00"),
    ],
)
def folders_in_another_layout_are_said_test(tmp_path, names, match):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=match):
        open_megatron(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        open_megatron(tmp_path / "nowhere")
