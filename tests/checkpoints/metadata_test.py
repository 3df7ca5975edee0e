"""Metadata comes back as it was given, and what earlier versions wrote still does."""

import dataclasses
import json
from pathlib import Path

import pytest

from dmc_jax.checkpoints.metadata import Metadata, Origin, from_json, to_json
from dmc_jax.config import RunConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.errors import UserError
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC

# Written by the code before metadata had a version.
VERSION_1 = Path(__file__).parents[1] / "data" / "metadata"

DENSE = Metadata("pretrain", 3, PRESETS["deci_6b"], Dense(), "bfloat16")
TRAINED = Metadata(
    stage="finetune",
    step=7,
    model=PRESETS["llama3_8b"],
    policy=DMC(DMCSettings(window=None, offset=0.5), 0.1 + 0.2),
    compute_dtype="float32",
    data="/data",
    tokenizer="/data/tokenizer.model",
    tokenizer_sha256="0" * 64,
    run=RunConfig.named("tiny_4x"),
    validation={"loss": 1.5, "ratio_by_layer": [2.0, 3.0]},
)
CONVERTED = dataclasses.replace(TRAINED, run=None, converted_from=Origin("meta", "/llama"))


def read(name):
    return from_json(json.loads((VERSION_1 / name).read_text()), name)


@pytest.mark.parametrize("metadata", [DENSE, TRAINED, CONVERTED])
def metadata_comes_back_from_json_as_it_was_test(metadata):
    assert from_json(json.loads(json.dumps(to_json(metadata))), "here") == metadata


def metadata_of_a_run_without_a_version_still_reads_test():
    found = read("version_1_trained.json")
    assert (found.stage, found.step) == ("retrofit", 2)
    assert found.policy == DMC(DMCSettings(window=3, offset=0.5), -0.517822265625)
    assert found.model.kv_heads == (2, 1) and found.model.rope_scaling == Llama3Scaling()
    assert found.run.model == found.model and found.run.dmc == found.policy.settings
    assert (found.compute_dtype, found.evaluation_length) == ("float32", 32)
    assert found.tokenizer == "/home/user/old/data/tokenizer.model"
    assert found.validation["ratio"] == 2.136752128601074 and found.converted_from is None


def the_run_that_a_conversion_made_up_is_forgotten_test():
    found = read("version_1_converted.json")
    assert found.run is None
    assert found.converted_from == Origin("huggingface", "/home/user/old/hf")
    assert found.policy.settings == DMCSettings(window=3, offset=0.5)
    assert (found.compute_dtype, found.evaluation_length) == ("float32", 64)
    assert found.tokenizer == "../../tokenizer/tokenizer.model"


def a_dense_model_without_a_version_is_dense_test():
    values = json.loads((VERSION_1 / "version_1_trained.json").read_text())
    found = from_json(values | {"mode": "dense", "threshold": 0.0}, "here")
    assert found.policy == Dense()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "here is no metadata of a dmc_jax checkpoint"),
        ({"version": 3}, "here is of version 3; versions 1 to 2 can be read"),
        ({"policy": {"name": "tova"}}, "here is damaged: .*'tova' is unknown"),
        ({"policy": {"name": "dmc"}}, "here is damaged: 'threshold' is missing"),
        ({"model": {"width": 3}}, "here is damaged: .*missing"),
        ({"step": "seven"}, "here is damaged: field 'step'"),
        ({"colour": "blue"}, "here is damaged: .*no field 'colour'"),
        ({"run": 3}, "here is damaged: field 'run'"),
    ],
)
def metadata_that_cannot_be_understood_is_one_clear_error_test(change, message):
    with pytest.raises(UserError, match=message):
        from_json(to_json(TRAINED) | change, "here")


def what_is_no_table_is_no_metadata_test():
    for values in (None, [], 3, "dmc_jax"):
        with pytest.raises(UserError, match="is no metadata"):
            from_json(values, "here")
