"""What is written with `files` is whole under its name, or not there at all."""

import os
import subprocess
import sys

import pytest

from dmc_jax.files import appears_when_complete, write_text


def a_file_or_a_folder_has_its_name_only_once_it_is_whole_test(tmp_path):
    file, folder = tmp_path / "deep" / "file", tmp_path / "folder"
    with appears_when_complete(file) as partial:
        partial.write_text("whole")
        assert not file.exists()
    with appears_when_complete(folder) as partial:
        partial.mkdir()
        (partial / "inside").write_text("x")
        assert not folder.exists()
    assert (file.read_text(), (folder / "inside").read_text()) == ("whole", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder"]
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def a_failure_leaves_what_was_there_and_nothing_else_test(failure, tmp_path):
    write_text(tmp_path / "file", "before")
    with pytest.raises(failure), appears_when_complete(tmp_path / "file") as partial:
        partial.write_text("half")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def the_bytes_are_on_disk_before_the_name_is_test(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=real, n=name: (calls.append(n), f(*a))[1])
    write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace"]


def a_folder_with_something_in_it_is_not_replaced_test(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OSError), appears_when_complete(tmp_path / "out") as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "precious").read_text() == "x"


def a_link_stays_and_what_it_leads_to_is_made_test(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("before")
    (tmp_path / "file").symlink_to(tmp_path / "real" / "file")
    (tmp_path / "folder").symlink_to(tmp_path / "real" / "folder")  # which is not there yet
    write_text(tmp_path / "file", "after")
    with appears_when_complete(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "inside").write_text("x")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "after"
    assert (tmp_path / "real" / "folder" / "inside").read_text() == "x"


@pytest.mark.parametrize("what", ["mount", "full"])
def what_cannot_be_replaced_is_refused_before_the_work_test(tmp_path, monkeypatch, what):
    (tmp_path / "out").mkdir()
    if what == "full":
        (tmp_path / "out" / "precious").write_text("x")
    else:
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
    message = "is a mount point" if what == "mount" else "has something in it"
    with pytest.raises(OSError, match=message), appears_when_complete(tmp_path / "out"):
        pytest.fail("worked for hours")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def the_half_file_of_a_killed_process_is_cleared_by_the_next_writer_test(tmp_path):
    program = """if True:
        import os, signal, sys
        from dmc_jax.files import appears_when_complete
        with appears_when_complete(sys.argv[1]) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=False)
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == [".file.partial"]
    write_text(tmp_path / "file", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
