"""generate.py, whose rank 1 ends badly in the midst of decoding: `torchrun ends.py HOW NOTE ...`.

HOW is raise, kill, or interrupt, which is Ctrl-C. NOTE is a file that gets the time of it.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import generate
from spec_decode import Engine

HOW, NOTE, *FLAGS = sys.argv[1:]
ROUNDS = 20  # before it happens
eager_round = Engine.eager_round


def round_of_rank_1(engine: Engine, gamma: int) -> None:
    if engine.host_rounds == ROUNDS and not Path(NOTE).exists():
        Path(NOTE).write_text(str(time.time()))
        if HOW == "raise":
            raise ValueError("rank 1 cannot go on")
        if HOW == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGINT)
    eager_round(engine, gamma)


if os.environ["RANK"] == "1":
    Engine.eager_round = round_of_rank_1
sys.exit(generate.as_one(partial(generate.command, FLAGS), generate.failed))
