"""Results are on disk as they come, and a file that was there is as before until all are."""

import subprocess
import sys

import pytest

from dmc_jax.errors import UserError
from dmc_jax.inference.output import check_output, results_file


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def results_outlive_a_failure_beside_the_old_ones_test(error, tmp_path):
    path = tmp_path / "output"
    path.write_text("old")
    output = check_output(str(path), "replace", [])
    with pytest.raises(error), results_file(output) as write:
        write(1, "second")
        write(0, "first")
        assert output.partial.read_text() == "second\nfirst\n"  # a crash here would leave that
        raise error
    assert (path.read_text(), output.partial.read_text()) == ("old", "second\nfirst\n")
    with results_file(output) as write:
        assert path.read_text() == "old" and output.partial.read_text() == ""
        write(1, "b")
        write(0, "a\u2028")
    assert path.read_text() == "a\u2028\nb\n" and not output.partial.exists()


def a_failure_before_the_first_result_leaves_nothing_test(tmp_path):
    output = check_output(str(tmp_path / "output"), "replace", [])
    with pytest.raises(ValueError, match="bad"), results_file(output):
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []


def two_cannot_write_the_same_file_test(tmp_path):
    output = check_output(str(tmp_path / "output"), "replace", [])
    with results_file(output) as write:
        write(0, "mine")
        with pytest.raises(UserError, match="another process is writing"), results_file(output):
            pass
        assert output.partial.read_text() == "mine\n"
    assert output.path.read_text() == "mine\n"


def a_link_leads_to_the_file_that_is_replaced_test(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    with results_file(check_output(str(tmp_path / "link"), "replace", [])) as write:
        write(0, "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "new\n"


def a_device_takes_results_as_they_come_test():
    with results_file(check_output("/dev/null", "refuse", [])) as write:
        write(0, "a")


def standard_output_can_be_a_pipe_test():
    code = """
from dmc_jax.inference.output import check_output, results_file
with results_file(check_output("/dev/stdout", "replace", [])) as write:
    write(0, "a")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"a\n"
