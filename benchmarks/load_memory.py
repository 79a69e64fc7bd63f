"""How much memory does loading a sharded checkpoint take beyond the model itself?

    python benchmarks/load_memory.py                    # 1.2B parameters, about a minute
    python benchmarks/load_memory.py --model ... --shards 8 --dtype float32

Writes a checkpoint of random weights in shards to a temporary directory, loads it in a process of
its own, and compares the growth of that process's peak resident memory (mapped pages of the files
included) with the bound: the model, and 1.2 times the largest shard.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import DTYPES, load_model
from files import write_json
from scripts.save_model import save_model

BOUND = 1.2  # of the largest shard


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def load(directory: Path, dtype: str) -> dict:
    """Load it here, on the CPU; how long it took, and how the memory grew."""
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    model = load_model(directory, torch.device("cpu"), DTYPES[dtype])
    return {
        "seconds": time.perf_counter() - start,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "peak_growth_bytes": resident_bytes("VmHWM") - before,
    }


def measure(name: str, n_shards: int, stored: str, dtype: str) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        model = load_model(Path(f"random:{name}"), torch.device("cpu"), DTYPES[stored])
        save_model(model, Path(directory), n_shards)
        del model
        largest = max(p.stat().st_size for p in Path(directory).glob("*.safetensors"))
        command = [sys.executable, __file__, "--load", directory, "--dtype", dtype]
        loaded = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    extra = loaded["peak_growth_bytes"] - loaded["model_bytes"]
    return {
        "model": name, "n_shards": n_shards, "stored": stored, "dtype": dtype, **loaded,
        "largest_shard_bytes": largest, "extra_bytes": extra, "extra_in_shards": extra / largest,
        "within_bound": extra <= BOUND * largest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a preset of config.py")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--stored", choices=DTYPES, default="bfloat16", help="dtype of the files")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype to load as")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load, args.dtype)))
        return
    r = measure(args.model, args.shards, args.stored, args.dtype)
    gb = {k: v / 1e9 for k, v in r.items() if k.endswith("_bytes")}
    print(
        f"{r['model']}, {r['n_shards']} shards of {r['stored']} loaded as {r['dtype']} in "
        f"{r['seconds']:.1f} s: model {gb['model_bytes']:.2f} GB, peak "
        f"{gb['peak_growth_bytes']:.2f} GB, {r['extra_in_shards']:.2f} times the largest shard "
        f"({gb['largest_shard_bytes']:.2f} GB) beyond the model; bound {BOUND}"
    )
    date = time.strftime("%Y-%m-%d")
    result = {"command": " ".join(["python", *sys.argv]), "date": date,
              "torch": torch.__version__} | r  # fmt: skip
    write_json(result, args.out or ROOT / "benchmarks" / "results" / f"load_memory_{date}.json")
    sys.exit(0 if r["within_bound"] else 1)


if __name__ == "__main__":
    main()
