"""`python -m dmc_jax.chat`: what it cannot talk with, and an end of input."""

import pytest

from tests.doors import runs_of
from tests.serving.live import save_checkpoint


@pytest.mark.slow
def it_talks_until_its_input_ends_and_says_what_is_missing_test(tmp_path):
    checkpoint = save_checkpoint(tmp_path)
    [ended] = runs_of("chat", [f"--checkpoint={checkpoint}"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\n", "")
    (tmp_path / "chat_template.jinja").unlink()
    wordless, nowhere = runs_of(
        "chat", [f"--checkpoint={checkpoint}"], [f"--checkpoint={tmp_path / 'none'}"]
    )
    assert (wordless.returncode, nowhere.returncode) == (2, 2)
    assert "came without a chat template" in wordless.stderr
    assert "no complete checkpoint" in nowhere.stderr
