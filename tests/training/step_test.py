"""Sharded, accumulated and plain steps agree; the optimizer treats each parameter as it should."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmc_jax.config import GATED, STAGES, MeshConfig, OptimizerConfig
from dmc_jax.data.loader import training_batches
from dmc_jax.data.prepared import open_data
from dmc_jax.errors import UserError
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import batch_sharding, make_mesh, partition_spec, shardings
from dmc_jax.training import loop
from dmc_jax.training.absent import bytes_moved
from dmc_jax.training.optimizer import make_optimizer, zero_decision_rows
from dmc_jax.training.stages import finish_stage
from dmc_jax.training.state import abstract_batch, abstract_state, init_state, key_of
from dmc_jax.training.step import make_train_step

NAMES = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
MESHES = [(d, f, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for t in (1, 2, 4, 8)]
QUICK = [(2, 2, 2)]  # which uses all axes at once
MESHES = [
    pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MESHES if np.prod(m) == 8
]
init = jax.jit(init_params, static_argnums=0)


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@jax.jit
def three_times_the_matrices(params):
    return jax.tree.map(lambda p: 3.0 * p if p.ndim > 2 else p, params)


def losses(run, stage, sizes, steps, teacher=None):
    """Loss and compression loss of some steps on a mesh, and the parameters after them."""
    mesh = mesh_of(sizes)
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    state = init_state(run.model, optimizer, mesh, run.seed)
    # Decisions of a fresh model are all alike: spread them, so that noise and hinge matter.
    state = dataclasses.replace(state, params=three_times_the_matrices(state.params))
    step = make_train_step(run, stage, mesh, optimizer, teacher and run.model)
    params = init(run.model, jax.random.key(9)) if teacher else None
    data = open_data(run.data.path)
    batches = iter(training_batches([(data, 1.0)], length=32, batch=run.data.batch, seed=0))
    history = []
    for _ in range(steps):
        batch = next(batches)
        placed = {n: jax.device_put(batch[n], batch_sharding(mesh)) for n in NAMES}
        state, metrics = step(state, placed, params)
        history.append([metrics["loss"], metrics.get("compression_loss", 0.0)])
    return np.array(history), jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    return {}


@pytest.mark.parametrize("sizes", MESHES, ids=lambda m: "x".join(map(str, m)))
def every_mesh_gives_the_losses_of_one_device_test(tiny_run, one_device, sizes):
    if not one_device:
        one_device["history"] = losses(tiny_run, "retrofit", (1, 1, 1), 10)[0]
    expected = one_device["history"]
    assert (expected[1:, 1] > 0).all() and len(np.unique(expected[:, 1])) > 5
    history, _ = losses(tiny_run, "retrofit", sizes, 10)
    np.testing.assert_allclose(history, expected, rtol=0, atol=1e-5)


def parameters_are_really_sharded_test(tiny_run):
    mesh = mesh_of((2, 2, 2))
    optimizer = make_optimizer(tiny_run.optimizer, 1.0)
    state = init_state(tiny_run.model, optimizer, mesh, 0)
    kernel = state.params["run_0"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    moment = state.optimizer[1].mu["run_0"]["gate"]["kernel"]
    assert moment.sharding == kernel.sharding
    step = make_train_step(tiny_run, "pretrain", mesh, optimizer)
    batch = {n: jnp.zeros((8, 32), jnp.int32) for n in NAMES[:-1]} | {
        "loss_mask": jnp.ones((8, 32))
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    after, _ = step(state, batch, None)
    same = jax.tree.map(lambda s, leaf: s.is_equivalent_to(leaf.sharding, leaf.ndim), before, after)
    assert all(jax.tree.leaves(same))
    assert kernel.is_deleted()  # donated


@pytest.mark.parametrize("parts", [1, 4])
def gradients_are_added_up_over_data_once_a_step_test(tiny_run, parts):
    """Each part after the other would move them as often as there are parts."""
    run = dataclasses.replace(tiny_run, accumulation=parts)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch=16))
    mesh, optimizer = mesh_of((4, 1, 1)), make_optimizer(run.optimizer, 1.0)
    state, batch = abstract_state(run.model, optimizer, mesh), abstract_batch(16, 32, mesh)
    step = make_train_step(run, "retrofit", mesh, optimizer)
    moved = bytes_moved(step.lower(state, batch, None).compile().as_text())
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    assert list(moved) == ["all-reduce"]  # which counts twice
    assert 2 * gradients <= moved["all-reduce"] < 2.1 * gradients


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("run_0/k/kernel", (2, 32, 2, 8), (None, "fsdp", None, None)),  # 2 heads, 4 devices
        ("run_0/k/kernel", (2, 32, 4, 8), (None, "fsdp", "tensor", None)),
        ("optimizer/1/mu/embedding", (280, 32), ("tensor", "fsdp")),
        ("run_0/mlp_norm/scale", (2, 32), ()),
        ("head_norm/scale", (32,), ()),
    ],
)
def an_axis_that_does_not_divide_is_left_out_test(path, shape, expected):
    assert tuple(partition_spec(path, shape, mesh_of((1, 2, 4)))) == expected


def fresh_weights_have_the_deviation_that_is_asked_for_test(tiny_run):
    """Those into the residual stream less, by depth; norms begin at 1."""
    optimizer, mesh = make_optimizer(tiny_run.optimizer, 1.0), mesh_of((1, 1, 1))
    usual = init_state(tiny_run.model, optimizer, mesh, 0).params
    wide = init_state(tiny_run.model, optimizer, mesh, 0, 0.1).params
    assert np.std(usual["embedding"]) == pytest.approx(0.02, rel=0.05)
    for name in "qkvo":
        times = np.asarray(wide["run_0"][name]["kernel"] / usual["run_0"][name]["kernel"])
        np.testing.assert_allclose(times, 5.0, rtol=1e-5)
    into = (2 * tiny_run.model.layers) ** -0.5
    assert np.std(wide["run_0"]["down"]["kernel"]) == pytest.approx(0.1 * into, rel=0.05)
    assert (wide["run_0"]["mlp_norm"]["scale"] == 1).all()


def impossible_mesh_is_refused_test():
    with pytest.raises(UserError, match="data 3 x fsdp 1 x tensor 1 does not fit 8 devices"):
        make_mesh(MeshConfig(3, 1, 1))
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def accumulation_is_weighted_by_tokens_test(tiny_run):
    """Pieces with different numbers of targets; dense, since noise is drawn per piece."""
    whole, params = losses(tiny_run, "pretrain", (1, 1, 1), 2)
    parts = dataclasses.replace(tiny_run, accumulation=4)
    pieces, same_params = losses(parts, "pretrain", (1, 1, 1), 2)
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), same_params, params)


@pytest.mark.parametrize(
    "parts, per_layer", [(2, True), pytest.param(8, False, marks=pytest.mark.slow)]
)
def any_accumulation_gives_the_gradients_and_metrics_of_the_whole_batch_test(
    tiny_run, parts, per_layer
):
    """All terms of the loss, at a target that some parts and layers meet and others do not."""
    compression = dataclasses.replace(
        tiny_run.compression, per_layer=per_layer, ratio=2.05, distillation=0.5, weight=3.0
    )
    run = dataclasses.replace(
        tiny_run, compression=compression, dmc=dataclasses.replace(tiny_run.dmc, offset=0.0)
    )
    mesh = mesh_of((1, 1, 1))

    def after(run):
        """Metrics of a step by the plain gradient, and that gradient."""
        plain = optax.identity()
        state = init_state(run.model, plain, mesh, run.seed)
        state = dataclasses.replace(state, params=three_times_the_matrices(state.params))
        before = jax.device_get(state.params)
        step = make_train_step(run, "finetune", mesh, plain, run.model)
        (data,) = [open_data(run.data.path)]
        batch = next(iter(training_batches([(data, 1.0)], length=32, batch=8, seed=0)))
        # Uneven parts: most targets of half of the windows do not count.
        batch["loss_mask"][::2, 5:] = 0.0
        placed = {n: jax.device_put(batch[n], batch_sharding(mesh)) for n in NAMES}
        state, metrics = step(state, placed, init(run.model, jax.random.key(9)))
        return metrics, jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.params))

    rate = dataclasses.replace(run.finetune, learning_rate=1.0, shape="constant", warmup=0)
    run = dataclasses.replace(run, finetune=rate)
    whole, gradient = after(run)
    metrics, summed = after(dataclasses.replace(run, accumulation=parts))
    assert whole["compression_loss"] > 0 and set(whole) == set(metrics)
    for name in whole:
        np.testing.assert_allclose(metrics[name], whole[name], atol=1e-5, rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), summed, gradient)


def distillation_pulls_towards_the_teacher_test(tiny_run):
    run = dataclasses.replace(
        tiny_run, compression=dataclasses.replace(tiny_run.compression, distillation=5.0)
    )
    plain, params = losses(tiny_run, "pretrain", (1, 1, 1), 2)
    taught, other = losses(run, "pretrain", (1, 1, 1), 2, teacher=True)
    assert plain[0, 0] == pytest.approx(taught[0, 0], abs=1e-6)  # the reported loss is the text's
    assert np.abs(params["head"] - other["head"]).max() > 1e-6


# ---- optimizer --------------------------------------------------------------------------------


def one_update(config, multiplier, params, grads):
    optimizer = make_optimizer(config, multiplier)

    @jax.jit
    def update(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    return update(params, grads)


def update_is_adamw_with_decay_on_matrices_only_test(tiny_run):
    params = init(tiny_run.model, jax.random.key(0))
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda p: rng.normal(0, 1e-4, p.shape).astype(np.float32), params)
    update = one_update(OptimizerConfig(), 1.0, params, grads)
    expected = jax.tree.map(lambda g: g / (np.abs(g) + 1e-5), grads)  # the first step of Adam
    for path, decay in (("gate", 0.1), ("mlp_norm", 0.0), ("q", 0.1)):
        (name,) = params["run_0"][path]
        wanted = expected["run_0"][path][name] + decay * params["run_0"][path][name]
        np.testing.assert_allclose(update["run_0"][path][name], wanted, atol=1e-5)


def gradient_is_clipped_by_its_global_norm_test(tiny_run):
    params = init(tiny_run.model, jax.random.key(0))
    grads = jax.tree.map(lambda p: np.full(p.shape, 7.0, np.float32), params)
    config = OptimizerConfig(
        eps=1e6, weight_decay=0.0, clip=2.0
    )  # eps so large that Adam is linear
    update = one_update(config, 1.0, params, grads)
    np.testing.assert_allclose(optax.tree.norm(update) * 1e6, 2.0, rtol=1e-3)


def only_decision_rows_of_q_and_k_are_multiplied_test(tiny_run):
    params = init(tiny_run.model, jax.random.key(0))
    grads = jax.tree.map(lambda p: np.ones(p.shape, np.float32), params)
    plain, multiplied = (one_update(OptimizerConfig(), m, params, grads) for m in (1.0, 3.0))
    ratio = jax.tree.map(lambda a, b: np.asarray(a) / b, multiplied, plain)
    for name in ("q", "k"):
        kernel = ratio["run_0"][name]["kernel"]
        np.testing.assert_allclose(kernel[..., -1], 3.0, rtol=1e-6)
        np.testing.assert_allclose(kernel[..., :-1], 1.0, rtol=1e-6)
    for name in ("v", "o", "gate"):
        np.testing.assert_allclose(ratio["run_0"][name]["kernel"], 1.0, rtol=1e-6)


def zero_out_ends_with_empty_rows_in_parameters_and_moments_test(tiny_run):
    mesh = mesh_of((1, 1, 1))
    optimizer = make_optimizer(tiny_run.optimizer, 1.0)
    state = init_state(tiny_run.model, optimizer, mesh, 0)
    state = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state))(state)
    done = jax.jit(finish_stage, static_argnums=0)("zero_out", state)
    assert finish_stage("pretrain", state) is state
    for tree, before in (
        (done.params, state.params),
        (done.optimizer[1].mu, state.optimizer[1].mu),
        (done.optimizer[1].nu, state.optimizer[1].nu),
    ):
        for name in ("q", "k"):
            kernel, old = tree["run_0"][name]["kernel"], before["run_0"][name]["kernel"]
            np.testing.assert_array_equal(kernel[..., -1], 0)
            np.testing.assert_array_equal(kernel[..., :-1], old[..., :-1])
        np.testing.assert_array_equal(tree["run_0"]["v"]["kernel"], before["run_0"]["v"]["kernel"])


def biases_of_the_decision_channel_are_zeroed_too_test():
    tree = {"run_0": {"q": {"bias": jnp.ones((2, 4, 8))}, "v": {"bias": jnp.ones((2, 4, 8))}}}
    done = zero_decision_rows(tree)
    np.testing.assert_array_equal(done["run_0"]["q"]["bias"][..., -1], 0)
    np.testing.assert_array_equal(done["run_0"]["v"]["bias"], 1)


def released_fused_rows_are_zeroed_alike_test():
    """The reference's wqkv_before/after, split into our q and k kernels."""
    for path in sorted((Path(__file__).parents[1] / "data").glob("stage1_*.npz")):
        with np.load(path) as file:
            D, K = file["k"].shape[-1], file["k"].shape[2]
            G = file["q"].shape[2] // K

            def kernels(fused, K=K, G=G, D=D):
                grouped = fused.reshape(K, G + 2, D, -1)
                q = grouped[:, :G].reshape(K * G, D, -1).transpose(2, 0, 1)
                return {"q": {"kernel": jnp.asarray(q)}} | {
                    name: {"kernel": jnp.asarray(grouped[:, G + i].transpose(2, 0, 1))}
                    for i, name in enumerate("kv")
                }

            zeroed = zero_decision_rows(kernels(file["wqkv_before"]))
            jax.tree.map(np.testing.assert_array_equal, zeroed, kernels(file["wqkv_after"]))


def shardings_cover_every_leaf_test(tiny_run):
    mesh = mesh_of((2, 2, 2))
    params = jax.eval_shape(lambda: init_params(tiny_run.model, jax.random.key(0)))
    specs = {s.spec for s in jax.tree.leaves(shardings(params, mesh))}
    assert len(specs) >= 6  # every rule of the table is in use


def clip_0_is_off_and_keeps_the_form_of_the_state_test(tiny_run):
    params = init(tiny_run.model, jax.random.key(0))
    grads = jax.tree.map(lambda p: np.full(p.shape, 7.0, np.float32), params)
    linear = OptimizerConfig(eps=1e6, weight_decay=0.0, clip=0.0)
    update = one_update(linear, 1.0, params, grads)
    jax.tree.map(lambda u: np.testing.assert_allclose(u * 1e6, 7.0, rtol=1e-3), update)
    forms = [
        jax.tree.structure(make_optimizer(dataclasses.replace(linear, clip=c), 1.0).init(params))
        for c in (0.0, 1.0)
    ]
    assert forms[0] == forms[1]


# ---- seeds ------------------------------------------------------------------------------------


def seeds_of_any_size_have_keys_of_their_own_test():
    seeds = [
        0,
        1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 1,
        2**63 - 1,
        2**63,
        2**64,
        2**64 + 2**32,
        3**99,
    ]
    keys = [tuple(jax.random.key_data(key_of(seed)).tolist()) for seed in seeds]
    assert len(set(keys)) == len(seeds)
    for seed, key in zip(seeds[:4], keys, strict=False):  # as they have always been
        assert key == tuple(jax.random.key_data(jax.random.key(seed)).tolist())


def neighbouring_seeds_and_stages_share_no_order_of_the_data_test(tiny_run):
    datas = [(open_data(tiny_run.data.path), 1.0)]

    def order(seed, stage, draws=2):
        run = dataclasses.replace(tiny_run, seed=seed, draws=draws)
        batches = loop._batches(run, stage, datas)
        return tuple(np.concatenate([next(batches)["window"] for _ in range(2)]).tolist())

    seeds = (0, 1, 2, 3, 2**63, 2**63 + 1)
    trained = [stage for stage in STAGES if stage not in GATED]
    for stages in (trained, GATED):  # which no run has both of
        orders = {(seed, stage): order(seed, stage) for seed in seeds for stage in stages}
        assert len(set(orders.values())) == len(orders)
        assert all(orders[0, stage] == order(0, stage, draws=1) for stage in stages)
    former = {order(seed, stage, draws=1) for seed in range(4) for stage in trained}
    assert len(former) == 7  # which runs of then go on with


@pytest.mark.slow
def a_seed_beyond_64_bits_trains_test(tiny_run):
    small, large = (dataclasses.replace(tiny_run, seed=seed) for seed in (5, 2**64 + 5))
    (a, _), (b, _) = (losses(run, "retrofit", (1, 1, 1), 2) for run in (small, large))
    assert np.isfinite(b).all() and not np.array_equal(a, b)
