"""What a run writes replaces a file as a whole, and nothing else."""

import json
import os
import resource
import stat
from pathlib import Path

import pytest

from files import check_writable, write_json


def test_a_pipe_is_not_opened_before_there_is_something_to_write(tmp_path, monkeypatch):
    """Its reader would see the end of the file, and without one it does not open."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "open", lambda *args: pytest.fail("opened"))
    check_writable(tmp_path / "pipe")


def test_files_are_replaced_behind_links_and_nothing_else_is(tmp_path):
    """Devices, pipes and open files are written to as they are; what cannot be is told before."""
    file, link, pipe = tmp_path / "a.json", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("a.json")
    for value in ({"a": 1}, {"b": 2}):
        check_writable(link)
        write_json(value, link)
        assert link.is_symlink() and json.loads(file.read_text()) == value
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with open(tmp_path / "log", "w+") as log:
        log.write("before\n")
        log.flush()
        opened = Path(f"/dev/fd/{log.fileno()}")
        for path in (pipe, opened):  # no device: a mistake would replace it for everybody
            kind = stat.S_IFMT(path.stat().st_mode)
            check_writable(path)
            write_json({}, path)
            assert stat.S_IFMT(path.stat().st_mode) == kind
        assert (tmp_path / "log").read_text() == "before\n{}\n"
    assert os.read(reader, 99) == b"{}\n"
    os.close(reader)
    for path in (tmp_path, file / "b", Path("/proc/version"), Path("/proc/new"),
                 tmp_path / ("x" * 253)):  # fmt: skip
        with pytest.raises(OSError):
            check_writable(path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk
    try:
        with pytest.raises(OSError):
            check_writable(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link", "log", "pipe"]
