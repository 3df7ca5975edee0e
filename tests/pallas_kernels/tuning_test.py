"""Settings: where they come from, and how the fastest is found and kept."""

import dataclasses
import json

import pytest

from pallas_kernels import tuning
from pallas_kernels.causal_attention import settings as attention_settings
from pallas_kernels.decode_attention import settings
from pallas_kernels.decode_attention.settings import Settings, settings_for
from pallas_kernels.prefill_attention import settings as prefill_settings

SETTINGS = Settings(block_bytes=16384, warps=4, stages=5, programs_per_core=2)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    default = {"decode_attention": dataclasses.asdict(SETTINGS)}
    (tmp_path / "default.json").write_text(json.dumps(default))
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    tuning._read.cache_clear()
    yield tmp_path
    tuning._read.cache_clear()


def every_kept_entry_can_be_read_and_says_its_source_test():
    files = list(tuning._FOLDER.glob("*.json"))
    assert tuning._FOLDER / "default.json" in files
    for file in files:
        content = json.loads(file.read_text())
        source = content.pop("source")
        assert content.keys() == source.keys() and all(source.values())
        kernels = ("decode", "causal", "prefill")
        assert content.keys() <= {"cache_update", *(f"{name}_attention" for name in kernels)}
        for name, module in (("decode", settings), ("prefill", prefill_settings)):
            if f"{name}_attention" in content:
                module.Settings(**content[f"{name}_attention"])
        if "causal_attention" in content:
            attention_settings.from_json(content["causal_attention"])
        assert content.get("cache_update", "xla") in ("xla", "triton")


def a_device_takes_its_own_settings_once_they_are_saved_test(empty_folder):
    device = "NVIDIA H200 (test)"
    assert settings_for(device) == SETTINGS
    mine = dataclasses.replace(SETTINGS, stages=7)
    file = tuning.save(device, "measured", {"decode_attention": mine})
    assert file == empty_folder / "nvidia_h200_test.json"
    assert settings_for(device) == mine
    assert settings_for("another") == SETTINGS


def what_was_saved_before_stays_with_its_source_test(empty_folder):
    tuning.save("A GPU", "first", {"decode_attention": SETTINGS, "cache_update": "xla"})
    file = tuning.save("A GPU", "second", {"cache_update": "triton"})
    content = json.loads(file.read_text())
    assert content.pop("source") == {"decode_attention": "first", "cache_update": "second"}
    assert content == {"decode_attention": dataclasses.asdict(SETTINGS), "cache_update": "triton"}


def the_fastest_has_the_least_product_of_times_test():
    slow, quick, other = (dataclasses.replace(SETTINGS, stages=n) for n in (3, 5, 7))
    times = {slow: (1e-5, 5e-3), quick: (2e-5, 1e-3), other: (4e-5, 1e-3)}
    assert tuning.fastest(times.__getitem__, (slow, quick, other)) == quick
