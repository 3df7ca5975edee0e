"""A run is the same as long as what decides its parameters is, and one process trains it."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dmc_jax.checkpoints.models import find_model
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.config import MeshConfig, StageConfig, to_dict
from dmc_jax.data.prepare import prepare
from dmc_jax.errors import UserError
from dmc_jax.fields import from_dict
from dmc_jax.training import checks, loop, ownership
from dmc_jax.training.loop import train

PARTIAL = "2.orbax-checkpoint-tmp"


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = checks.make_mesh
        patch.setattr(checks, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def base(make_tiny_run, tmp_path_factory):
    """A pretraining of four steps, which no test may change."""
    run = dataclasses.replace(
        make_tiny_run(tmp_path_factory.mktemp("base")), name="base", stages="pretrain"
    )
    train(run, quiet=True)
    return run


@pytest.fixture
def begun(base, tmp_path):
    """The run, in a directory of one's own."""
    shutil.copytree(base.output, tmp_path / "runs")
    return dataclasses.replace(base, output=str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def retrofitted(base, tmp_path_factory):
    """A retrofit of it, taught by it."""
    run = dataclasses.replace(
        base,
        name="retrofit",
        output=str(tmp_path_factory.mktemp("retrofitted")),
        stages="zero_out",
        init_from=f"{base.output}/base",
        compression=dataclasses.replace(
            base.compression, distillation=1.0, teacher=f"{base.output}/base/pretrain"
        ),
        zero_out=StageConfig(steps=2, learning_rate=1e-3),
    )
    train(run, quiet=True)
    return run


def same(run):
    """What `train` would say to going on."""
    ready = checks.check(run)
    contents = ownership.contents_of(run, ready.datas, ready.start, ready.teacher)
    return ownership.same_run(Path(run.output) / run.name, run, contents)


def steps_of(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def other_data(run, folder, lines):
    """The data of a run, its tokenizer and all, with another text."""
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.txt").write_text("\n".join(f"{i} {line} {i * i}" for line in lines * 12))
    tokenizer = Path(run.data.path) / "tokenizer.model"
    prepare(
        folder / "prepared", source=folder, tokenizer=tokenizer, workers=1, report=lambda _: None
    )
    return folder / "prepared"


FREE = [
    {"accumulation": 2},
    {"remat": "none"},
    {"attention": "xla"},
    {"attention_block": 8},
    {"mesh": MeshConfig(data=-1)},
    {"log_every": 3, "save_every": 3, "eval_every": 1, "eval_windows": 3},
    {"keep": 1},
    {"stages": "pretrain,zero_out"},
    {"retrofit": StageConfig(steps=9, learning_rate=1.0)},  # not begun
]


@pytest.mark.parametrize("change", FREE, ids=lambda change: "-".join(change))
def what_does_not_decide_the_parameters_may_change_test(base, change):
    assert same(dataclasses.replace(base, **change)).draws == base.draws


def paths_may_be_spelled_and_folders_called_otherwise_test(begun, tmp_path):
    shutil.copytree(begun.data.path, tmp_path / "copy")
    data = dataclasses.replace(begun.data, path=f"{tmp_path}/./copy/")
    Path(begun.output, "base").rename(Path(begun.output, "renamed"))
    same(dataclasses.replace(begun, data=data, name="renamed", output=f"{begun.output}/."))


DECIDING = [
    ("seed", {"seed": 1}),
    ("pretrain.learning_rate", {"pretrain": StageConfig(steps=4, learning_rate=1.0)}),
    ("compute_dtype", {"compute_dtype": "bfloat16"}),
    ("initializer_range", {"initializer_range": 0.1}),
]


@pytest.mark.parametrize("name, change", DECIDING, ids=lambda value: str(value)[:14])
def what_decides_them_may_not_test(base, name, change):
    with pytest.raises(UserError, match=f"holds a run with another .*{name} is .* there, .* here"):
        same(dataclasses.replace(base, **change))


@pytest.mark.parametrize(
    "group, name, value",
    [
        ("data", "length", 16),
        ("data", "batch", 4),
        ("optimizer", "clip", 0.5),
        ("compression", "ratio", 2.0),
        ("dmc", "window", 3),
        ("model", "rope_theta", 99.0),
    ],
)
def nor_may_any_of_a_group_test(base, group, name, value):
    changed = dataclasses.replace(getattr(base, group), **{name: value})
    with pytest.raises(UserError, match=rf"{group}\.{name} is .* there, {value} here"):
        same(dataclasses.replace(base, **{group: changed}))


def before_the_first_checkpoint_anything_may_be_mended_test(begun):
    directory = Path(begun.output) / "base"
    shutil.rmtree(directory / "pretrain" / "2")
    (directory / "pretrain" / "4").rename(directory / "pretrain" / PARTIAL)
    mended = dataclasses.replace(
        begun, seed=5, pretrain=StageConfig(steps=2, learning_rate=1e-4), optimizer=begun.optimizer
    )
    train(mended, quiet=True)
    assert latest(directory).step == 2
    assert steps_of(directory) == [1, 2]


def a_data_folder_replaced_under_a_run_is_refused_test(begun, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(begun.data.path, folder)
    run = dataclasses.replace(begun, data=dataclasses.replace(begun.data, path=str(folder)))
    train(run, quiet=True)  # the same contents
    other = other_data(run, tmp_path / "corpus", ["nothing but other text"])
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    with pytest.raises(UserError, match=rf"the text of data.path of {folder} has changed"):
        train(run, quiet=True)


def tokens_changed_in_place_are_found_test(begun, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(begun.data.path, folder)
    tokens = np.fromfile(folder / "train.tokens", "<u2")
    tokens[7:30] = 9
    (folder / "train.tokens").write_bytes(tokens.tobytes())
    run = dataclasses.replace(begun, data=dataclasses.replace(begun.data, path=str(folder)))
    with pytest.raises(UserError, match="its contents have changed"):
        train(run, quiet=True)


@pytest.mark.parametrize("what", ["init_from", "teacher"])
def another_start_or_teacher_is_refused_and_a_copy_is_not_test(
    retrofitted, base, begun, tmp_path, what
):
    def pointed_to(path):
        if what == "init_from":
            return dataclasses.replace(retrofitted, init_from=str(path))
        compression = dataclasses.replace(retrofitted.compression, teacher=str(path))
        return dataclasses.replace(retrofitted, compression=compression)

    same(pointed_to(f"{begun.output}/base"))
    other = dataclasses.replace(base, output=str(tmp_path / "other"), seed=1)
    train(other, quiet=True)
    with pytest.raises(UserError, match=f"the model of .*{what} was .*base.* and is now .*other"):
        same(pointed_to(f"{other.output}/base"))


def a_start_that_a_run_never_had_is_refused_test(begun, base):
    with pytest.raises(UserError, match="init_from was none and is now"):
        same(dataclasses.replace(begun, init_from=f"{base.output}/base"))


def the_runs_own_stages_are_part_of_it_test(begun):
    same(dataclasses.replace(begun, stages="zero_out", init_from=f"{begun.output}/base/pretrain"))


def weights_are_the_same_wherever_they_lie_and_other_ones_are_others_test(base, begun, monkeypatch):
    ours, copy = (find_model(f"{run.output}/base") for run in (base, begun))
    assert ownership.weights_hash(ours) == ownership.weights_hash(copy)
    monkeypatch.setattr(ownership, "_WHOLE", 1000)
    monkeypatch.setattr(ownership, "_SAMPLE", 100)
    monkeypatch.setattr(ownership, "_EVERY", 500)
    sampled = ownership.weights_hash(ours)
    assert sampled == ownership.weights_hash(copy)
    file = max((copy.path / "state").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(bytes(255 - b for b in content))
    assert sampled != ownership.weights_hash(copy)


# ---- runs of before ---------------------------------------------------------------------------


def a_run_without_hashes_goes_on_and_keeps_its_draws_test(begun):
    directory = Path(begun.output) / "base"
    (directory / "contents.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    for name in ("draws", "dry_run"):
        del config[name]
    (directory / "config.json").write_text(json.dumps(config))
    assert same(begun).draws == 1
    other = dataclasses.replace(begun.data, path=f"{begun.data.path}/.")
    with pytest.raises(UserError, match=r"data\.path is"):  # all that there was to go by
        same(dataclasses.replace(begun, data=other))
    train(begun, quiet=True)
    assert json.loads((directory / "config.json").read_text())["draws"] == 1
    same(dataclasses.replace(begun, data=other))


def a_damaged_record_gets_one_clear_line_test(begun):
    for name in ("contents.json", "config.json"):
        (Path(begun.output) / "base" / name).write_text("{")
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            same(begun)


def what_is_recorded_is_the_config_test(base):
    recorded = json.loads((Path(base.output) / "base" / "config.json").read_text())
    assert to_dict(from_dict(type(base), recorded)) == to_dict(base)


# ---- one process ------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from dmc_jax.training.ownership import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def the_second_process_is_refused_at_once_and_changes_nothing_test(begun, monkeypatch):
    directory = Path(begun.output) / "base"
    (directory / "zero_out" / PARTIAL).mkdir(parents=True)  # that the first is writing
    run = dataclasses.replace(begun, stages="pretrain,zero_out")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert first.stdout.readline() == "held\n"
            before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
            with monkeypatch.context() as patch:
                patch.setattr(checks, "check", lambda run: pytest.fail("took its time"))
                with pytest.raises(UserError, match=f"is being trained by process {first.pid} on"):
                    train(run, quiet=True)
            assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
        finally:
            first.kill()
    train(run, quiet=True)  # a lock dies with its process, however that ended
    assert latest(directory).stage == "zero_out"


def a_run_that_has_just_begun_is_held_too_test(begun, tmp_path, monkeypatch):
    run = dataclasses.replace(begun, output=str(tmp_path / "new"))
    original = loop._to_devices
    refused = []

    def twice(batch, mesh):
        if not refused:
            with pytest.raises(UserError, match="is being trained by process") as refusal:
                train(run, quiet=True)
            refused.append(refusal)
        return original(batch, mesh)

    monkeypatch.setattr(loop, "_to_devices", twice)
    train(run, quiet=True)
    assert len(refused) == 1
    assert steps_of(Path(run.output) / "base") == [1, 2, 3, 4]


def a_file_system_without_locks_is_said_and_used_test(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(ownership.fcntl, "flock", unsupported)
    with ownership.locked(tmp_path):
        pass
    assert "start this run once only" in caplog.text
