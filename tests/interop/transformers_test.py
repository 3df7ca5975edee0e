"""Against transformers itself, where it and torch are installed: requirements-parity.txt.

Its own models are read here, ours are read there, and the file of remote code computes what we do.
"""

import copy
import dataclasses
import warnings

import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.interop.compare import logits_of
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source
from dmc_jax.interop.gates import with_gates
from dmc_jax.interop.huggingface_config import DIALECTS
from dmc_jax.policies.dmc import DMC
from tests.interop.checkpoint_files import (
    assert_same_bits,
    read_safetensors,
    write_checkpoint,
)
from tests.interop.gates_files import write_gates
from tests.interop.reference_llama import Sizes, random_weights, with_decisions

torch = pytest.importorskip("torch")
with warnings.catch_warnings():  # of its own deprecated imports, which differ by version
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

# Whatever it says of its own future is not about this project.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-5  # float32 logits of about 5
TOKENS = np.random.default_rng(3).integers(0, 40, 30)
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMAS = {
    "every head its own": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-3},
    "one KV head": {"num_key_value_heads": 1},
    "scaled frequencies": {
        "num_key_value_heads": 2,
        "rope_theta": 500_000.0,
        "rope_scaling": SCALING,
    },
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "wide heads": {"num_key_value_heads": 2, "head_dim": 10},
}


@pytest.fixture(autouse=True)
def remote_code_in_a_folder_of_its_own(tmp_path, monkeypatch):
    """`trust_remote_code` copies modules to a cache in the home folder by default."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )


def computed(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)[None]).logits[0].float().numpy()


def ours(folder):
    return logits_of(open_source(folder), [TOKENS.tolist()])[0]


def exported(source, folder, **changes):
    folder.mkdir()
    write_huggingface(dataclasses.replace(source, **changes), folder, None, lambda _: None)
    return folder


def loaded(cls, folder, **options):
    model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def of_unequal_layers(weights, sizes, kv_heads):
    """Weights with these numbers of KV heads in their layers, and how a config says so."""
    rng = np.random.default_rng(0)
    for layer, count in enumerate(kv_heads):
        for name in "kv":
            rows = rng.normal(size=(count * sizes.H, sizes.D)).astype(np.float32) / 4
            weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = rows
    heads = list(kv_heads)
    return weights, {
        "architectures": ["DeciLMForCausalLM"],
        "num_key_value_heads_per_layer": heads,
    }


@pytest.mark.parametrize("change", LLAMAS.values(), ids=LLAMAS)
def llamas_of_transformers_give_the_same_logits_here_and_go_back_test(change, tmp_path):
    torch.manual_seed(1)
    # A copy: transformers 5 writes its base into the scaling that it is given.
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **copy.deepcopy(change)))
    model.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(ours(tmp_path / "theirs"), computed(model), atol=TOLERANCE, rtol=0)
    back = exported(open_source(tmp_path / "theirs"), tmp_path / "back")
    assert_same_bits(read_safetensors(back), read_safetensors(tmp_path / "theirs"))
    again = loaded(LlamaForCausalLM, back)
    np.testing.assert_array_equal(computed(again), computed(model))


def mistral_without_a_window_gives_the_same_logits_and_goes_back_as_a_llama_test(tmp_path):
    torch.manual_seed(2)
    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)
    model = MistralForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(ours(tmp_path / "theirs"), computed(model), atol=TOLERANCE, rtol=0)
    back = exported(open_source(tmp_path / "theirs"), tmp_path / "back")
    np.testing.assert_array_equal(computed(loaded(LlamaForCausalLM, back)), computed(model))


def bfloat16_exports_are_loaded_as_bfloat16_with_every_bit_test(tmp_path):
    weights = write_checkpoint(tmp_path / "hf")
    back = exported(open_source(tmp_path / "hf"), tmp_path / "back")
    model = loaded(LlamaForCausalLM, back, torch_dtype="auto")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.view(torch.int16).numpy().tobytes() == weights[name].tobytes()


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize("tied, kv_heads", [(True, 2), (False, 4)])
def remote_code_computes_the_logits_of_a_dmc_model_test(window, tied, kv_heads, tmp_path):
    sizes = Sizes(V=40, L=3, K=kv_heads, tied=tied)
    weights = with_decisions(random_weights(sizes, np.float32), sizes)
    write_checkpoint(tmp_path / "hf", sizes, weights, rope_scaling=SCALING)
    settings = DMCSettings(window=window, offset=1.0, eps=0.01)
    dense = open_source(tmp_path / "hf")
    folder = exported(dense, tmp_path / "dmc", policy=DMC(settings, 0.25))
    expected = ours(folder)
    model = loaded(AutoModelForCausalLM, folder, trust_remote_code=True)
    assert type(model).__name__ == "LlamaDMCForCausalLM"
    np.testing.assert_allclose(computed(model), expected, atol=TOLERANCE, rtol=0)
    vanilla = computed(loaded(LlamaForCausalLM, folder))
    np.testing.assert_allclose(vanilla, ours(tmp_path / "hf"), atol=10 * TOLERANCE, rtol=0)
    assert np.abs(vanilla - expected).max() > 0.1


@pytest.mark.parametrize("kv_heads", [2, (4, 1, 2)], ids=str)
@pytest.mark.parametrize("delay", [1, 4, 40])
def remote_code_drops_tokens_by_the_gates_of_an_export_test(delay, kv_heads, tmp_path):
    sizes = Sizes(V=40, L=3)
    weights, changes = random_weights(sizes, np.float32), {}
    if kv_heads != 2:
        weights, changes = of_unequal_layers(weights, sizes, kv_heads)
    write_checkpoint(tmp_path / "hf", sizes, weights, rope_scaling=SCALING, **changes)
    dense = open_source(tmp_path / "hf")
    gates = write_gates(tmp_path / "some.safetensors", dense, delay)
    folder = exported(with_gates(dense, gates, 1.5), tmp_path / "gated")
    expected = ours(folder)
    model = loaded(AutoModelForCausalLM, folder, trust_remote_code=True)
    np.testing.assert_allclose(computed(model), expected, atol=TOLERANCE, rtol=0)
    apart = np.abs(expected - ours(tmp_path / "hf")).max(axis=-1)
    assert (apart[:delay] < TOLERANCE).all() and (delay == 40) == (apart.max() < TOLERANCE)
    model = model.to(torch.bfloat16)
    assert np.abs(computed(model) - expected).mean() < 0.2


MERGING = DMCSettings(window=3, offset=0.0, eps=0.01)


@pytest.mark.parametrize(
    "parts, margin",
    [((), None), (("importance",), 0.7), (("gamma",), None), (("importance", "gamma"), None)],
)
@pytest.mark.parametrize("delay", [0, 1, 4, 40])
def remote_code_merges_tokens_by_the_gates_of_an_export_test(delay, parts, margin, tmp_path):
    write_checkpoint(tmp_path / "hf", Sizes(V=40), random_weights(Sizes(V=40), np.float32))
    dense = open_source(tmp_path / "hf")
    how = {"merging": MERGING, "parts": parts, "margin": margin}
    gates = write_gates(tmp_path / "some", dense, delay, **how)
    folder = exported(with_gates(dense, gates, 1.5), tmp_path / "gated")
    expected = ours(folder)
    model = loaded(AutoModelForCausalLM, folder, trust_remote_code=True)
    np.testing.assert_allclose(computed(model), expected, atol=TOLERANCE, rtol=0)
    apart = np.abs(expected - ours(tmp_path / "hf")).max(axis=-1)
    assert (apart[:delay] < TOLERANCE).all() and (delay == 40) == (apart.max() < TOLERANCE)


def remote_code_merges_within_an_unlimited_window_in_layers_of_unequal_heads_test(tmp_path):
    weights = random_weights(Sizes(V=40, L=3), np.float32)
    weights, changes = of_unequal_layers(weights, Sizes(L=3), (4, 1, 2))
    write_checkpoint(tmp_path / "hf", Sizes(V=40, L=3), weights, rope_scaling=SCALING, **changes)
    dense, settings = open_source(tmp_path / "hf"), dataclasses.replace(MERGING, window=None)
    parts = "importance", "gamma"
    gates = write_gates(tmp_path / "some", dense, merging=settings, parts=parts)
    folder = exported(with_gates(dense, gates, 1.5), tmp_path / "gated")
    expected = ours(folder)
    model = loaded(AutoModelForCausalLM, folder, trust_remote_code=True)
    np.testing.assert_allclose(computed(model), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(computed(model.to(torch.bfloat16)) - expected).mean() < 0.2


def all_that_merging_gates_have_counts_in_the_remote_code_test(tmp_path):
    write_checkpoint(tmp_path / "hf", Sizes(V=40), random_weights(Sizes(V=40), np.float32))
    dense = open_source(tmp_path / "hf")
    how = {"merging": MERGING, "parts": ("importance", "gamma"), "margin": 0.7}
    gates = write_gates(tmp_path / "some", dense, **how)
    source = with_gates(dense, gates, 1.5)
    folder = exported(source, tmp_path / "gated")
    theirs = computed(loaded(AutoModelForCausalLM, folder, trust_remote_code=True))
    policy = source.gates.policy
    for change in (
        {"margin": None},
        {"settings": dataclasses.replace(MERGING, window=None)},
        {"settings": dataclasses.replace(MERGING, eps=1.0)},
        {"gates": dataclasses.replace(policy.gates, importance_weight=None)},
        {"gates": dataclasses.replace(policy.gates, gamma=None)},
    ):
        stored = dataclasses.replace(source.gates, policy=dataclasses.replace(policy, **change))
        changed = logits_of(dataclasses.replace(source, gates=stored), [TOKENS.tolist()])[0]
        assert np.abs(changed - theirs).max() > 100 * TOLERANCE


def gates_of_another_method_are_refused_by_the_remote_code_test(tmp_path):
    write_checkpoint(tmp_path / "hf", Sizes(V=40))
    dense = open_source(tmp_path / "hf")
    gates = write_gates(tmp_path / "some.safetensors", dense)
    folder = exported(with_gates(dense, gates), tmp_path / "gated")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"dms"', '"magic"'))
    with pytest.raises(ValueError, match="gates for 'magic': this file computes dms and dmc"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def remote_code_pads_on_the_right_and_scores_what_it_is_given_test(tmp_path):
    sizes = Sizes(V=40)
    write_checkpoint(
        tmp_path / "hf", sizes, with_decisions(random_weights(sizes, np.float32), sizes)
    )
    folder = exported(
        open_source(tmp_path / "hf"), tmp_path / "dmc", policy=DMC(DMCSettings(offset=1.0))
    )
    model = loaded(AutoModelForCausalLM, folder, trust_remote_code=True)
    tokens = torch.tensor(TOKENS)[None]
    mask = torch.ones_like(tokens)
    mask[:, -5:] = 0
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask).logits[0, :-5].numpy()
        np.testing.assert_allclose(padded, computed(model)[:-5], atol=TOLERANCE)
        with pytest.raises(ValueError, match="pad on the right"):
            model(tokens, attention_mask=mask.flip(1))
        loss, logits = model(tokens, labels=tokens, return_dict=False)
    log_likelihood = torch.log_softmax(logits[0, :-1], dim=-1)[range(29), TOKENS[1:]]
    np.testing.assert_allclose(loss, -log_likelihood.mean(), rtol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def remote_code_computes_dense_models_of_unequal_layers_test(dialect, tmp_path):
    sizes = Sizes(V=40, L=3, F=256)
    weights, changes = of_unequal_layers(random_weights(sizes, np.float32), sizes, (4, 1, 2))
    write_checkpoint(tmp_path / "hf", sizes, weights, **changes)
    folder = tmp_path / "back"
    folder.mkdir()
    write_huggingface(open_source(tmp_path / "hf"), folder, None, lambda _: None, dialect=dialect)
    model = loaded(AutoModelForCausalLM, folder, trust_remote_code=True)
    np.testing.assert_allclose(computed(model), ours(folder), atol=TOLERANCE, rtol=0)
