"""What the modes of the offline check have in common: how they tell of cases and failures."""

import atexit
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Report:
    """Prints as it goes; `failures` is what it comes to."""

    def __init__(self, match: str) -> None:
        self.match = match  # only cases with this text in their name
        self.n_wanted = 0
        self.failures: list[str] = []

    def fail(self, what: str) -> None:
        self.failures.append(f"FAIL {what}")
        print(self.failures[-1], flush=True)

    def wants(self, name: str) -> bool:
        self.n_wanted += self.match in name
        return self.match in name

    def end(self) -> list[str]:
        """The failures; that nothing was checked is one."""
        if not self.n_wanted:
            self.fail(f"no case has {self.match!r} in its name")
        return self.failures

    @contextmanager
    def case(self, name: str) -> Iterator[list[str]]:
        """Collects what is to be said of a case; an exception in it is a failure of the case."""
        start, said = time.monotonic(), []
        try:
            yield said
        except Exception as e:
            lines = str(e).strip().splitlines() or [""]
            self.fail(f"{name}: {type(e).__name__}: {lines[0][:200]}{project_line(e)}")
        print(f"{name}: {'; '.join(said)} ({time.monotonic() - start:.1f} s)", flush=True)


def scratch() -> Path:
    """A folder that is gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="cuda_offline"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_product(filename: str) -> bool:
    """Whether a file is one of the program's own, at the root of the repository."""
    return Path(filename).resolve().parent == ROOT


def project_line(e: Exception) -> str:
    """Where in the program an exception came from."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if is_product(f.filename)]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def here() -> str:
    """The program's line that is being run."""
    frames = [f for f in traceback.extract_stack() if is_product(f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
