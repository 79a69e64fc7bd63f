"""What a run writes: a file as a whole, or not at all. No torch.

A figure that took an hour must not be lost to a Ctrl-C while it is written, nor to a directory that
does not exist. So a file is written beside its place, under a name of its own, and then renamed:

    out.json.part  --rename-->  out.json        there is the old file or the new one, never a half

and `check_writable` tries that before the hour. What is no file is not replaced: to a device, a
pipe, or a file that this process has open, the data are appended.
"""

import errno
import json
import os
import re
from pathlib import Path


def write_json(value: dict, path: Path) -> None:
    """Write a JSON file, see `write_file`."""
    write_file((json.dumps(value, indent=2) + "\n").encode(), path)


def write_file(data: bytes, path: Path) -> None:
    """Write a file in one step: an interruption leaves the old one or the new one.

    A symbolic link stays one. To a device, a pipe or a file that is open already, the data are
    appended. OSError with the path if that is not possible.
    """
    target, part = resolved(path)
    try:
        if written_in_place(path):
            with path.open("ab") as file:
                file.write(data)
            return
        try:
            part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise OSError(f"cannot write {path}: {e.strerror}") from None


def check_writable(path: Path) -> None:
    """OSError if `write_file` cannot write there, as far as this can be told beforehand."""
    if path.exists() and not path.is_dir() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if not written_in_place(path):
        path, part = resolved(path)
        try:
            part.write_bytes(bytes(4096))  # fails on a full disk too
        finally:
            part.unlink(missing_ok=True)
    elif not path.is_fifo():  # its reader would take the end of this for the end of all
        path.open("ab").close()


def written_in_place(path: Path) -> bool:
    """Whether there is something that must not be replaced by a file."""
    opened = re.match(r"/dev/(fd/|std)|/proc/[^/]+/fd/", str(path))
    return path.exists() and (opened is not None or not path.is_file())


def resolved(path: Path) -> tuple[Path, Path]:
    """The path behind symbolic links, and beside it the one that is written first."""
    path = Path(os.path.realpath(path))
    return path, path.with_name(path.name + ".part")
