"""Many processes through one file of prompts: each has a model and rows of its own.

    torchrun --nproc_per_node 8 generate.py --data_parallel --prompts IN.jsonl --output OUT.jsonl

They share a queue and a file of results, and nothing else. Texts depend on their requests alone, so
it does not matter who decodes which.

**A claim is a lock.** Who takes request i locks a byte of OUT that is far behind its end, and keeps
the lock. The system gives it back when the process ends, however it ends. So what is neither locked
nor written is free, also if it was once claimed by somebody who died: only rows in flight are lost,
and the others take them. There is nothing else to keep in order, and no process that must not die.
A process ends when all results are written.

**A line is written whole.** Who appends holds one more lock, and first takes away what somebody who
died in the midst of a line has left. Locks are those of one machine, or of a file system that has
them for several; that was not tested.

`torchrun` ends all processes when one has failed. So each of them only starts the process that
works, and waits for it (`supervise`). If that dies, the others go on; the status is bad if all did.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.distributed import Store

from offline import Input, Line
from results import Output

WRITING = 2**40  # the byte that is locked by who appends; those behind it are the requests'
PIPE = "GENERATE_DATA_PARALLEL"  # the environment's name of a pipe that ends with the supervisor


class SharedOutput(Output):
    """The file of results, which several processes write. See `results.open_output`."""

    shared = True

    def begin(self, manifest: dict, given: Input) -> None:
        """As in Output, one process after the other."""
        self.seen = 0  # bytes, whose lines are known
        self.claimed: set[int] = set()  # numbers of lines
        with self.alone():
            super().begin(manifest, given)
            self.look()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, nobody else writes."""
        self.lock(WRITING, "EX")
        try:
            yield
        finally:
            self.lock(WRITING, "UN")

    def lock(self, byte: int, *how: str) -> bool:
        """Lock or unlock a byte; False if somebody has it. The flags are fcntl's, LOCK_..."""
        import fcntl  # which Windows has not, where all else runs

        try:
            fcntl.lockf(self.fd, sum(getattr(fcntl, f"LOCK_{flag}") for flag in how), 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def look(self) -> None:
        """Learn what the others have written; cut off a line that is not whole. While `alone`."""
        data = os.pread(self.fd, os.fstat(self.fd).st_size - self.seen, self.seen)
        whole = data[: data.rfind(b"\n") + 1]
        for text in whole.splitlines():
            record = json.loads(text)
            if "id" in record and "error" not in record:
                self.done.add(record["id"])
        self.seen += len(whole)
        if len(whole) < len(data):
            os.ftruncate(self.fd, self.seen)

    def append(self, record: dict) -> None:
        """Write one line, all of it or nothing. OSError as in Output."""
        if self.seen == 0:  # `begin` is alone already
            super().append(record)
            return
        with self.alone():
            self.look()
            super().append(record)

    def claims(self, lines: Sequence[Line]) -> Iterator[Line]:
        """Lines that nobody has claimed or done, and that are this process's now, one by one."""
        for line in lines:
            if line.id in self.done or line.number in self.claimed:
                continue
            if not self.lock(WRITING + line.number, "EX", "NB"):
                continue
            self.claimed.add(line.number)
            with self.alone():
                self.look()
            if line.id not in self.done:  # who had claimed it has died before that, or after
                yield line

    def missing(self, lines: Sequence[Line]) -> bool:
        """Whether a result is not written yet."""
        with self.alone():
            self.look()
        return any(line.id not in self.done for line in lines)


def supervised() -> bool:
    """Whether this process works, for one that torchrun has started. It will end with that one."""
    if PIPE not in os.environ:
        return False
    reader = int(os.environ[PIPE])

    def follow() -> None:
        os.read(reader, 1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    return True


def supervise(store: Store) -> int:
    """Start the process that works, and wait for it. Returns an exit status for torchrun.

    It is bad only if no process has come to the end.
    """
    reader, writer = os.pipe()
    signal.signal(signal.SIGINT, lambda *_: None)  # the other one is interrupted, too
    environment = os.environ | {PIPE: str(reader)}
    command = [sys.executable, *sys.orig_argv[1:]]
    status = subprocess.Popen(command, env=environment, pass_fds=[reader]).wait()
    os.close(writer)
    if status < 0:
        print(f"generate.py: process {os.environ['RANK']} was ended by signal {-status}; the "
              "others take its requests", file=sys.__stderr__)  # fmt: skip
    all_failed = status and store.add("failed", 1) == int(os.environ["WORLD_SIZE"])
    return abs(status) if all_failed else 0
