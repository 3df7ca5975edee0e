"""Gates go along with the model that they were made for, and come back; `transformers_test` runs
what goes along.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dmc_jax.checkpoints.gates import load_gates, model_hash
from dmc_jax.checkpoints.models import find_model
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import train_sentencepiece
from dmc_jax.errors import UserError
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import describe, open_source
from dmc_jax.interop.gates import source_hash, with_gates
from dmc_jax.interop.parameters import read_params
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from tests.doors import runs_of
from tests.interop.checkpoint_files import write_checkpoint
from tests.interop.gates_files import TABLE, write_gates
from tests.interop.reference_llama import Sizes, random_weights

SIZES = Sizes(V=300, L=3)
MERGING = DMCSettings(window=5, offset=0.0, eps=0.01)
TEXT = "a gate decides on a token, which goes some time later "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, SIZES, random_weights(SIZES, np.float32))
    train_sentencepiece([TEXT * 50], 280, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    write_checkpoint(folder, SIZES, random_weights(SIZES, np.float32, seed=1))
    return folder


@pytest.fixture(scope="module")
def gates(base, tmp_path_factory):
    return write_gates(tmp_path_factory.mktemp("gates") / "some.safetensors", open_source(base))


@pytest.fixture(scope="module")
def merging_gates(base, tmp_path_factory):
    file, settings = tmp_path_factory.mktemp("gates") / "merging.safetensors", MERGING
    how = {"merging": settings, "parts": ("importance", "gamma"), "margin": 0.7}
    return write_gates(file, open_source(base), **how)


def written(base, gates, folder):
    folder.mkdir()
    write_huggingface(with_gates(open_source(base), gates, 1.5), folder, None, lambda _: None)
    return folder


@pytest.fixture
def exported(base, gates, tmp_path):
    return written(base, gates, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def a_checkpoint_is_known_by_the_hash_of_its_parameters_test(tied, tmp_path):
    sizes = dataclasses.replace(SIZES, tied=tied)
    weights = random_weights(sizes, np.float32)
    write_checkpoint(tmp_path, sizes, weights)
    source = open_source(tmp_path)
    known = source_hash(source)
    assert known == model_hash(read_params(source), source.config)
    narrow = {name: x.astype("bfloat16") for name, x in weights.items()}
    write_checkpoint(tmp_path, sizes, narrow)
    assert source_hash(open_source(tmp_path)) == known
    name = f"model.layers.{sizes.L - 1}.self_attn.o_proj.weight"
    write_checkpoint(tmp_path, sizes, narrow | {name: narrow[name][::-1].copy()})
    assert source_hash(open_source(tmp_path)) != known


@pytest.mark.parametrize(
    "kind, said, description, card",
    [
        (
            "gates",
            {"method": "dms"},
            "with gates, dropping above 0.3 after 4 tokens",
            "whether it drops a token, 4 tokens later: where the logit of its gate exceeds 0.3 "
            "(Lancucki",
        ),
        (
            "merging_gates",
            {"method": "dmc", "window": 5, "eps": 0.01, "margin": 0.7},
            "with gates, window 5, merging above 0.3 after 4 tokens",
            "whether it merges a token into the slot of the one before, 4 tokens later: where the "
            "logit of its gate exceeds 0.3, within a window of 5 tokens, and with next to no "
            "weight where by more than 0.7 (Nawrot",
        ),
    ],
)
def an_export_comes_back_as_the_base_with_its_gates_test(
    kind, said, description, card, base, tmp_path, request
):
    gates = request.getfixturevalue(kind)
    exported = written(base, gates, tmp_path / "out")
    assert (exported / "gates.safetensors").read_bytes() == gates.read_bytes()
    found = json.loads((exported / "config.json").read_text())["gates"]
    expected = {"warning": found["warning"], "delay": 4, "threshold": TABLE[1].threshold, **said}
    assert found == expected
    back = open_source(exported)
    assert description in describe(back)
    assert back.policy == Dense() and back.config == open_source(base).config
    assert source_hash(back) == source_hash(open_source(base))
    model, stored = find_model(exported), load_gates(gates, back.config)
    for found in (back.gates, model.gates):
        assert found.policy.threshold == TABLE[1].threshold
        policy = dataclasses.replace(found.policy, threshold=9.0)
        assert jax.tree.structure(policy) == jax.tree.structure(stored.policy)  # and what is static
        jax.tree.map(np.testing.assert_array_equal, policy, stored.policy)
        assert found.table == TABLE
    own = [said["method"], *{"dms", "dmc", "dense", "tova"} - {said["method"]}]
    assert [model.own_gates(name) is None for name in (None, *own)] == [False] * 2 + [True] * 3
    readme = (exported / "README.md").read_text()
    assert card in readme and "| 2.50 | -0.5 |" in readme


@pytest.mark.parametrize(
    "kind, change, complaint",
    [
        ("gates", {"delay": 5}, "says delay 5, gates.safetensors beside it 4: take the config"),
        ("gates", {"method": "magic"}, "says method 'magic', gates.safetensors beside it 'dms'"),
        ("gates", {"threshold": "high"}, "gates: threshold is 'high'; expected a number"),
        ("gates", {"threshold": None}, "gates: threshold is missing"),
        (
            "merging_gates",
            {"method": "dms"},
            "says method 'dms', gates.safetensors beside it 'dmc'",
        ),
        (
            "merging_gates",
            {"window": None},
            "says window None, gates.safetensors beside it 5: take",
        ),
        (
            "merging_gates",
            {"eps": "0.01"},
            "says eps '0.01', gates.safetensors beside it 0.01: take",
        ),
    ],
)
def an_export_whose_parts_disagree_is_refused_test(
    kind, change, complaint, base, tmp_path, request
):
    exported = written(base, request.getfixturevalue(kind), tmp_path / "out")
    file = exported / "config.json"
    config = json.loads(file.read_text())
    config["gates"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=complaint) as raised:
        open_source(exported)
    assert "\n" not in str(raised.value)


def an_export_without_its_file_of_gates_is_refused_and_without_either_is_dense_test(exported):
    file = exported / "config.json"
    content = (exported / "gates.safetensors").read_bytes()
    for broken in (content[:-40], content[:50]):
        (exported / "gates.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match=r"gates.safetensors is not a file of gates: "):
            open_source(exported)
    (exported / "gates.safetensors").unlink()
    with pytest.raises(UserError, match=r"gates.safetensors is not a file of gates: No such file"):
        open_source(exported)
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"gates": 3}))
    with pytest.raises(UserError, match=r"config.json, gates is no object"):
        open_source(exported)
    del config["gates"]
    file.write_text(json.dumps(config))
    assert open_source(exported).gates is None


def gates_are_for_a_model_that_does_not_merge_already_test(base, gates):
    merging = dataclasses.replace(open_source(base), policy=DMC(DMCSettings()))
    with pytest.raises(UserError, match="gates: .* as they were pretrained, .* merges"):
        with_gates(merging, gates)


@pytest.mark.slow
def gates_go_there_and_back_through_the_doors_test(base, other, gates, tmp_path):
    there, again, ours = (f"--output={tmp_path / name}" for name in ("there", "again", "ours"))
    given = f"--input={base}", f"--gates={gates}"
    back = f"--input={tmp_path / 'there'}"
    converted = runs_of(
        "convert",
        [*given, there, "--ratio=1.5"],
        [back, again, "--to=huggingface", "--ratio=2.5"],
        [back, ours],
        [back, "--verify", f"--against={base}", f"--prompt={TEXT}"],
    )
    for result, note in zip(converted[:3], ("", "", "note: dmc_jax has no place"), strict=True):
        assert result.returncode == 0 and result.stderr.startswith(note), result.stderr
        assert (result.stderr == "") == (note == "")
    assert "DIFFERENT" in converted[3].stdout and converted[3].returncode == 1
    assert open_source(tmp_path / "again").gates.policy.threshold == TABLE[2].threshold
    assert open_source(tmp_path / "ours").gates is None
    prompt = f"--prompt={TEXT}", "--max_new_tokens=8", "--temperature=0", "--json"
    runs = (
        [f"--checkpoint={tmp_path / 'there'}"],
        [f"--checkpoint={base}", f"--gates={gates}", "--ratio=1.5"],
        [f"--checkpoint={tmp_path / 'again'}", "--ratio=1.5"],
        [f"--checkpoint={tmp_path / 'there'}", "--policy=dense"],
    )
    said = [
        {name: json.loads(result.stdout)[name] for name in ("tokens", "ratio")}
        for result in runs_of("decode", *([*run, *prompt] for run in runs))
    ]
    assert said[0] == said[1] == said[2] and said[0]["ratio"] > 1.1
    assert said[3]["ratio"] == 1


def what_cannot_go_along_is_refused_in_a_line_test(base, other, gates, tmp_path):
    output, cut = f"--output={tmp_path / 'out'}", tmp_path / "cut.safetensors"
    cut.write_bytes(gates.read_bytes()[:300])
    ours = f"--input={base}"
    cases = [
        ([f"--input={other}", f"--gates={gates}"], "made for another model"),
        ([ours, f"--gates={gates}", "--ratio=7"], "ratio: these gates were measured from 1 to 2.5"),
        ([ours, "--ratio=2"], "ratio: it is looked up in a file of gates; name one"),
        ([ours, f"--gates={cut}"], "cut.safetensors is not a file of gates"),
        ([ours, "--gates=magic"], "magic is no file, and no name of gates that come with dmc_jax"),
        ([ours, f"--gates={gates}", "--to=dmc_jax"], "--gates: dmc_jax has no place for gates"),
        ([ours, "--verify", f"--against={base}", "--prompt=a", "--gates=x"], "not for --verify"),
    ]
    results = runs_of("convert", *([*flags, output] for flags, _ in cases))
    for result, (_, complaint) in zip(results, cases, strict=True):
        assert result.returncode == 2 and complaint in result.stderr, result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["cut.safetensors"]
