"""Check the CUDA path on a machine without a GPU: what it launches, and what ptxas makes of it.

    pip install -r requirements.txt             # the CPU build of torch is enough; needs g++
    pip install --no-deps triton==3.7.1         # the version that torch 2.13 asks for
    pip install numpy==2.2.6                    # what Triton's interpreter computes with
    python scripts/check_cuda_offline.py                             # all modes, some minutes
    python scripts/check_cuda_offline.py kernels --match "G 4 T 17"  # cases with this in their name

torch is told that there is an H200, see `cuda_offline/pretend.py`. Four things are checked:

    rounds   a round and a selection of every drafter, greedy and sampled, in both dtypes, on CUDA
             tensors without data. Whatever could not be captured raises or is listed: a value that
             the host asks for, a shape that depends on values, a tensor on the CPU. The number of
             kernels outside of the blocks is printed, as they are without compiling
    kernels  the Triton code that Inductor generates for the model's blocks at the geometry of
             Llama-3.1-8B, compiled for Hopper (sm_90a) by the ptxas in the triton package: no
             spills, no more shared memory than there is, no copy of a cache, split-KV where it
             should be, one autotuning candidate for what writes a cache, no recompilation
    numbers  the generated attention kernels in Triton's interpreter, against dense attention
    graphs   rounds replayed from a tape of their operations, as a CUDA graph would replay them:
             the text must be the model's own, whatever Python decides once

**What this cannot tell**: how fast anything is; whether a launch works, and races in it; cuBLAS;
which kernel scaled_dot_product_attention takes; real captures, with their streams and memory
pools, and inputs that are freed before a replay. `tests/test_cuda.py` is for these.

Exit status 1 if something failed, with a list of what; 2 if the check cannot run.
"""

import argparse
import importlib
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MODES = ("kernels", "numbers", "graphs", "rounds")  # the longest one first
HALVES = {"kernels": ("attention", "block")}  # of a mode, by its cases' names: run side by side
NEEDED = {"triton": "pip install --no-deps triton==3.7.1", "numpy": "pip install numpy==2.2.6"}


def check_machine() -> None:
    """Exit with status 2, and one line, where something that the check needs is missing."""
    missing = [command for name, command in NEEDED.items() if find_spec(name) is None]
    if subprocess.run(["sh", "-c", "command -v g++"], capture_output=True).returncode:
        missing.append("install g++")
    if missing:
        print(f"check_cuda_offline.py cannot run yet: {'; '.join(missing)}", file=sys.stderr)
        sys.exit(2)


def run_here(mode: str, match: str) -> list[str]:
    """The failures of one mode. It changes torch for the rest of this process."""
    warnings.simplefilter("ignore")  # what torch says of tensors without data
    return importlib.import_module(f"scripts.cuda_offline.{mode}").check(match)


def run_apart(mode: str, match: str) -> list[str]:
    """The failures of one mode, run in a process of its own; prints what that printed."""
    command = [sys.executable, __file__, mode, "--match", match]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(f"---- {mode} {match}\n{done.stdout}", flush=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL ")]
    if done.returncode and not failed:
        failed = [f"FAIL {mode} {match}: it ended with status {done.returncode}"]
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)}; all")
    parser.add_argument("--match", default="", help="only cases with this text in their name")
    args = parser.parse_args()
    modes = args.modes or list(MODES)
    if unknown := set(modes) - set(MODES):
        parser.error(f"unknown mode {', '.join(unknown)}; known: {', '.join(MODES)}")
    if args.match and len(modes) > 1:
        parser.error("--match goes with one mode")
    check_machine()
    os.environ["OMP_NUM_THREADS"] = "1"  # of torch, which is not imported yet
    halves = {} if args.match else HALVES
    jobs = [(mode, match) for mode in modes for match in halves.get(mode, (args.match,))]
    if len(jobs) == 1:
        failed = run_here(*jobs[0])
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = sum(pool.map(lambda job: run_apart(*job), jobs), [])
        print("\n".join(failed))
    print(f"{len(failed)} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
