"""Two processes that are one run: equal to one process, stopped by a signal to either, killed."""

import collections
import dataclasses
import json
import math
import random
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dmc_jax import processes
from dmc_jax.checkpoints.gates import FILE, load_gates
from dmc_jax.checkpoints.metadata import load_metadata
from dmc_jax.checkpoints.models import find_model, open_model
from dmc_jax.checkpoints.run_directory import PARTIAL_MARK, complete_steps, latest
from dmc_jax.config import GatesConfig, MeshConfig, StageConfig
from dmc_jax.data.prepared import open_data
from dmc_jax.errors import LostPeer, UserError
from dmc_jax.evaluation.report import write_report
from dmc_jax.evaluation.times import MARK
from dmc_jax.model.sharding import make_mesh
from dmc_jax.training.loop import train
from dmc_jax.training.ownership import locked
from tests.processes import free_port, started, trained, wait_for
from tests.tiny_run import make_data, save_model, tiny_run

TOLERANCE = 5e-7


@pytest.fixture(scope="module", autouse=True)
def as_many_devices():
    """This process takes as many as two others together."""

    def some(config):
        return make_mesh(config, jax.devices()[: config.data * config.fsdp * config.tensor])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmc_jax.training.checks.make_mesh", some)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_data(folder, 320, seed=0, words=(150, 200))
    return open_data(folder / "data")


@pytest.fixture
def run(data, tmp_path):
    """A dense stage of four steps, with a checkpoint of each."""
    return dataclasses.replace(
        tiny_run(data, tmp_path),
        stages="pretrain",
        pretrain=StageConfig(steps=4, learning_rate=1e-3),
        mesh=MeshConfig(data=2, fsdp=2, tensor=1),
        save_every=1,
        keep=9,
    )


def directory_of(run):
    return Path(run.output) / run.name


def alone(run):
    """The directory of the same run, trained by this one process."""
    directory = train(dataclasses.replace(run, name="alone"), quiet=True)
    write_report(directory)
    return directory


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not _is_of_time(k)} for line in lines]


def _is_of_time(name):
    return name.startswith(MARK) or name in ("tokens_per_second", "goodput")


def figures_of(directory):
    """What the report says of stages; perplexities as the losses that they are of."""

    def in_nats(figures):
        if "perplexity" in figures:
            figures["perplexity"] = math.log(figures["perplexity"])
        return figures

    report = (directory / "report" / "report.json").read_text()
    return json.loads(report, object_hook=in_nats)["stages"]


def assert_close(a, b):
    def close(x, y):
        if isinstance(x, str):
            assert x == y
        else:
            np.testing.assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)

    jax.tree.map(close, a, b)


def assert_same_run(a, b, *stages):
    """Metrics, reports and parameters are equal."""
    assert_close(metrics_of(a), metrics_of(b))
    assert_close(figures_of(a), figures_of(b))
    for stage in stages:
        assert_close(open_model(a / stage).params, open_model(b / stage).params)


def told_by_slurm():
    """Variables of two tasks on this machine; JAX takes their port from the job's number."""
    first = 2**16 - 2**12
    for port in np.random.default_rng().permutation(np.arange(first, 2**16)):
        with socket.socket() as place:
            if place.connect_ex(("localhost", int(port))):
                break
    job = {
        "SLURM_JOB_ID": str(port - first),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    return [job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]


def two_tasks_of_slurm_train_what_one_process_does_test(run, tmp_path):
    two_steps = StageConfig(steps=2, learning_rate=1e-3)
    run = dataclasses.replace(run, pretrain=two_steps, mesh=MeshConfig(data=2), save_every=9)
    said = trained(run, tmp_path / "said", devices=1, environment=told_by_slurm())
    assert "report: " in said[0] and "report: " not in said[1]
    assert_same_run(directory_of(run), alone(run), "pretrain")


def a_coordinator_that_cannot_be_reached_is_told_in_a_line_test():
    address = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(UserError, match=f"no coordinator at {address} within 0 seconds"),
        processes.joined(address, 2, 1, start_timeout=0),
    ):
        pass
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(UserError, match="cannot be used: Address already in use"),
            processes.joined(address, 2, 0),
        ):
            pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "give all three"),
        (("host", 2, 0), "expected HOST:PORT, got 'host'"),
        (("host:1", 2, 2), "expected 0 to 1 of 2 processes, got 2"),
    ],
)
def addresses_and_numbers_that_do_not_fit_are_refused_test(given, message):
    with pytest.raises(UserError, match=message), processes.joined(*given):
        pass


def what_tells_of_a_lost_peer_is_told_as_that_test(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    closed = jax.errors.JaxRuntimeError(
        "UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:51385"
    )
    with pytest.raises(LostPeer, match="has died"), processes.lost_peers_named():
        raise closed
    with pytest.raises(LostPeer, match="has died"), processes.lost_peers_named():
        raise TimeoutError("Timed out while waiting for a barrier.") from closed
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory"), processes.lost_peers_named():
        raise full


def a_lost_peer_is_no_damage_of_the_checkpoint_that_was_read_test(data, tmp_path, monkeypatch):
    model = find_model(save_model(data, tmp_path / "base"))

    def lost(*_, **__):
        raise LostPeer("another process has died")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", lost)
    with pytest.raises(LostPeer):
        model.load()


@pytest.mark.slow
def processes_that_share_windows_train_what_one_does_test(run, tmp_path):
    model = dataclasses.replace(run.model, heads=4)
    run = dataclasses.replace(run, model=model, mesh=MeshConfig(data=1, fsdp=1, tensor=4))
    trained(run, tmp_path / "said")
    assert_same_run(directory_of(run), alone(run), "pretrain")


@pytest.mark.slow
def all_stages_are_those_of_one_process_test(run, tmp_path):
    two_steps = StageConfig(steps=2, learning_rate=1e-3)
    run = dataclasses.replace(
        run,
        stages="pretrain,zero_out,retrofit,finetune",
        pretrain=two_steps,
        compression=dataclasses.replace(
            run.compression, calibration_windows=8, distillation=1.0, per_layer=True
        ),
        accumulation=2,
        eval_every=1,
    )
    trained(run, tmp_path / "said")
    assert_same_run(directory_of(run), alone(run), *run.stage_names)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["frozen", "lora"])
def gates_are_those_of_one_process_test(run, data, tmp_path, model):
    run = dataclasses.replace(
        run,
        stages="closed_form,distill",
        init_from=str(save_model(data, tmp_path / "base")),
        data=dataclasses.replace(run.data, length=48, batch=4),
        gates=GatesConfig(delay=3, windows=6, ratios=(1.5, 2.0), model=model, rank=2),
        distill=StageConfig(steps=2, learning_rate=1e-2),
        eval_windows=4,
    )
    trained(run, tmp_path / "said")
    one, two = alone(run), directory_of(run)
    # The threshold of a table is a figure that follows from others by a division.
    a, b = (load_gates(directory / FILE, run.model) for directory in (one, two))
    assert_close(metrics_of(one), metrics_of(two))
    assert_close(jax.device_get(a.policy), jax.device_get(b.policy))
    assert_close([x.ratio for x in a.table], [x.ratio for x in b.table])
    if model == "lora":
        assert_close(open_model(one / "model").params, open_model(two / "model").params)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def a_signal_to_one_stops_both_and_one_process_or_two_go_on_test(run, tmp_path, told):
    run = dataclasses.replace(run, pretrain=StageConfig(steps=40, learning_rate=1e-3))
    directory = directory_of(run)

    def stopped(signalled, number, **how):
        """Goes on until a checkpoint more is there, and sends a signal to one."""
        begun = latest(directory)
        with started(run, tmp_path / "said", **how) as each:
            wait_for(lambda: latest(directory) not in (begun, None), each)
            each[signalled].popen.send_signal(number)
            ends = [process.end() for process in each]
        assert {code for code, _ in ends} == {128 + number}, ends
        last = latest(directory).step
        assert last < 40 and len(metrics_of(directory)) == last

    stopped(told, signal.SIGTERM)
    stopped(0, signal.SIGINT, count=1, devices=4)
    stopped(1 - told, signal.SIGUSR1)
    trained(run, tmp_path / "said")
    assert_same_run(directory, alone(run), "pretrain")


# The process of number DIES ends in its second save, as by `kill -9`.
_DIES = """
import importlib, os, signal
import jax
from dmc_jax import commands
from dmc_jax.checkpoints import digests, states

def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)

save, wait = states.Saver.save, states.Saver.wait
def saves(self, step, *rest):
    done = save(self, step, *rest)
    if step == 2 and jax.process_index() == DIES:
        WHERE
    return done

states.Saver.save = saves
commands.run(importlib.import_module("dmc_jax.train").main)
"""
_WHERE = {
    "as the save begins": "dies()",
    "before its name is given": "digests.record = dies; wait(self)",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "where"),
    [(0, "as the save begins"), (1, "as the save begins"), (0, "before its name is given")],
)
def a_process_that_dies_in_a_save_is_told_and_costs_no_checkpoint_test(run, tmp_path, dies, where):
    program = _DIES.replace("DIES", str(dies)).replace("WHERE", _WHERE[where])
    directory = directory_of(run)
    with started(run, tmp_path / "killed", program=program) as both:
        ends = [process.end() for process in both]
    assert ends[dies][0] == -signal.SIGKILL
    code, said = ends[1 - dies]
    assert code == 1
    assert "another process of this run has died" in said.splitlines()[-1], said
    assert "damaged" not in said
    # With the other alive to the end of its writing, the second may have become whole.
    assert complete_steps(directory / "pretrain") in ([1], [1, 2])

    said = trained(run, tmp_path / "again")
    assert "damaged" not in "".join(said)
    assert not [*directory.rglob("*.damaged*"), *directory.rglob(f"*{PARTIAL_MARK}*")]
    assert complete_steps(directory / "pretrain") == [1, 2, 3, 4]
    assert load_metadata(latest(directory)).validation is not None
    assert_same_run(directory, alone(run), "pretrain")


KILLS = 20


@pytest.mark.slow
def random_kills_of_either_leave_a_run_bit_equal_test(run, tmp_path):
    """Some between saves, some within one; a checkpoint more is there before the next."""
    draw = random.Random(0)
    run = dataclasses.replace(run, pretrain=StageConfig(steps=8 * KILLS, learning_rate=1e-3))
    directory, killed = directory_of(run), collections.Counter()
    while sum(killed.values()) < KILLS:
        begun, one = latest(directory), draw.randrange(2)
        with started(run, tmp_path / "said") as both:
            wait_for(lambda: latest(directory) not in (begun, None), both)  # noqa: B023
            time.sleep(draw.uniform(0.0, 0.5))
            both[one].popen.kill()
            ends = [process.end() for process in both]
        assert ends[one][0] == -signal.SIGKILL and ends[1 - one][0] == 1, ends
        assert "another process of this run has died" in ends[1 - one][1].splitlines()[-1], ends
        assert "damaged" not in ends[1 - one][1]
        killed[one] += 1
    assert set(killed) == {0, 1}
    trained(run, tmp_path / "said")
    trained(dataclasses.replace(run, name="whole"), tmp_path / "said")
    assert metrics_of(directory) == metrics_of(directory.with_name("whole"))
    ours, whole = (open_model(d / "pretrain") for d in (directory, directory.with_name("whole")))
    jax.tree.map(np.testing.assert_array_equal, ours.params, whole.params)


@pytest.mark.slow
def a_refusal_of_one_is_told_to_both_test(run, tmp_path):
    directory = directory_of(run)
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    with locked(directory), started(run, tmp_path / "locked") as both:
        ends = [process.end() for process in both]
    assert [code for code, _ in ends] == [2, 2]
    lines = [process.errors() for process in both]
    assert all(len(each) == 1 and f"{directory} is being trained by" in each[0] for each in lines)
    assert "process 0: " in lines[1][0] and "process 0: " not in lines[0][0]

    other = dataclasses.replace(run, seed=1)
    with started([run, other], tmp_path / "differing") as both:
        ends = [process.end() for process in both]
    assert [code for code, _ in ends] == [2, 2]
    for process in both:
        assert "process 1: its config is not that of process 0 (seed is 1, there 0)" in str(
            process.errors()
        )
