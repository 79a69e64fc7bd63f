"""The file of results: a line for every request that has ended, and nothing lost.

    {"manifest": {"version": 1, "input_sha256": ...}}
    {"id": "a", "line": 1, "text": ..., "token_ids": ..., "finish_reason": ...}

**Nothing is lost.** A line is given to the system in whole when its request has ended. What a full
disk leaves half written is taken away at once, and what a killed process leaves at the next start.
Then the ids in the file are done, and the others run. A text depends on its request alone, so the
file becomes what an undisturbed run would have written, up to the order of its lines.

**Nothing is overwritten.** A file that begins with another manifest, or with none, is refused as it
is. A lock keeps a second process out for as long as the first one lives; the system releases it
when a process is killed. And the file keeps its name: once something else has it, or nothing, the
run ends, because nobody would find its results.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoint import weight_files
from config import is_random
from device import first_rank
from offline import Input, parse
from parallel import from_first

VERSION = 1  # of what the lines mean, and of the tokens that a request gets
EDGE = 2**20  # bytes of both ends of a file that stand for it
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
NAMES = ("checkpoint", "input", "draft_checkpoint")  # of files, which may be moved in between


def fingerprint(checkpoint_dir: Path) -> str:
    """A sha256 that tells checkpoints apart, without reading all of their weights."""
    sha256 = hashlib.sha256(str(checkpoint_dir).encode() if is_random(checkpoint_dir) else b"")
    paths = [] if is_random(checkpoint_dir) else weight_files(checkpoint_dir)
    paths += [path for name in SMALL_FILES if (path := checkpoint_dir / name).is_file()]
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            sha256.update(f"{path.name} {size} ".encode())
            for place in (0, max(size - EDGE, 0)):
                file.seek(place)
                sha256.update(file.read(EDGE))
    return sha256.hexdigest()


class Output:
    """The file of results, which is this process's alone while it lives. See `open_output`."""

    shared = False  # whether others of this kind may have it, too

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd
        self.done: set[str] = set()  # ids with a result
        self.refused: set[int] = set()  # numbers of lines whose error is recorded

    def begin(self, manifest: dict, given: Input) -> None:
        """Write the manifest, or read what is there and cut off a line that is not whole.

        ValueError, before anything is changed, if what is there does not belong to this run.
        """
        head = to_line({"manifest": manifest})
        with open(self.fd, "rb", closefd=False) as file:
            first = file.readline()
            if first and not first.endswith(b"\n") and head.startswith(first):
                first = b""
            end = len(first)
            if first:
                self.check_manifest(first, manifest)
            ids = {line.id for line in given.lines}
            for number, text in enumerate(file, start=2):
                if text.endswith(b"\n"):
                    end += len(text)
                    self.note(text, number, ids)
        os.ftruncate(self.fd, end)
        if not end:
            self.append({"manifest": manifest})
        for line in given.bad:
            if line.number not in self.refused:
                self.append(line.record)

    def check_manifest(self, first: bytes, manifest: dict) -> None:
        """ValueError if the first line is another manifest, or none."""
        try:
            found = parse(first)["manifest"]
            theirs, ours = dotted(found), dotted(parse(to_line(manifest)))
        except (ValueError, KeyError, AttributeError):
            raise ValueError(
                f"{self.path} exists and is no file of results; give --output another name"
            ) from None
        for key in dict.fromkeys([*ours, *theirs]):
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"{self.path} was begun with {key} {theirs.get(key)}, now it is "
                    f"{ours.get(key)}; continue it as it was begun, or give --output another name"
                )

    def note(self, text: bytes, number: int, ids: set[str]) -> None:
        """Remember which request a line is the result of. ValueError if that is none of these."""
        try:
            record = parse(text)
            if "error" in record:
                self.refused.add(record["line"])
                return
            known = record["id"] in ids
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(
                f"{self.path}, line {number}: no result of a request of the input; give --output "
                f"another name"
            )
        self.done.add(record["id"])

    def append(self, record: dict) -> None:
        """Write one line, all of it or nothing. OSError if that fails, or the file has gone."""
        data = memoryview(to_line(record))
        end = os.lseek(self.fd, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except BaseException as e:
            with suppress(OSError):
                os.ftruncate(self.fd, end)
            if isinstance(e, OSError):
                raise OSError(f"cannot write {self.path}: {e.strerror}; {self.kept}") from None
            raise
        self.done.update([record["id"]] if "id" in record and "error" not in record else [])
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.fd)):
                return
        raise OSError(f"{self.path} was moved, deleted or replaced; {self.kept}")

    @property
    def kept(self) -> str:
        """How a message ends that ends a run."""
        return f"{len(self.done)} requests are done, and the same command goes on from there"


class Follower(Output):
    """What a rank knows of the file that another one writes."""

    def append(self, record: dict) -> None:
        """Remember that it is done."""
        self.done.update([record["id"]] if "id" in record and "error" not in record else [])


@contextmanager
def open_output(
    path: Path, given: Input, manifest: dict, kind: type[Output] = Output
) -> Iterator[Output]:
    """The file of results, to be continued where it ends.

    ValueError if it is the input, no ordinary file, or another run's. OSError if it cannot be
    written, or another process has it.
    """
    import fcntl  # which Windows has not, where all else runs

    if path.exists() and not path.is_file():
        raise ValueError(f"--output {path} is no ordinary file; it could not be continued")
    if path.exists() and path.samefile(given.path):
        raise ValueError(f"--output {path} is the file of prompts; give it another name")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as e:
        raise OSError(f"cannot write {path}: {e.strerror}") from None
    try:
        try:
            lock = fcntl.LOCK_SH if kind.shared else fcntl.LOCK_EX
            fcntl.flock(fd, lock | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{path} is being written by another process; wait for it") from None
        output = kind(path, fd)
        output.begin(manifest, given)
        yield output
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def open_shared(path: Path, given: Input, manifest: dict) -> Iterator[Output]:
    """The same where several ranks run one model: the first one writes, all know what is done."""
    if first_rank():
        with open_output(path, given, manifest) as output:
            from_first([*output.done])
            yield output
    else:
        follower = Follower(path, -1)
        follower.done.update(from_first([]))
        yield follower


def to_line(record: dict) -> bytes:
    """A line of JSON; whatever is in the texts, it is ASCII and ends at its end."""
    return (json.dumps(record) + "\n").encode()


def dotted(manifest: dict, prefix: str = "") -> dict:
    """The values of nested objects under joined keys: "sampling.top_k". No names of files."""
    found: dict = {}
    for key, value in manifest.items():
        if isinstance(value, dict):
            found |= dotted(value, f"{prefix}{key}.")
        elif prefix + key not in NAMES:
            found[prefix + key] = value
    return found
