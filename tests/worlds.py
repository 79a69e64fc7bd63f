"""Runs the cases of `test_parallel.py` alone, and as the ranks of worlds that are forked from here.

    python tests/worlds.py FOLDER

One process imports torch, makes the models and runs every case alone. Then it forks the ranks: they
start in no time. FOLDER gets a file alone.json, and one for each rank of each world.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import device
from auto import Auto, Candidate
from checkpoint import load_model
from config import ModelConfig, total_params
from families import load_config
from kernels import compile_blocks
from model import Transformer
from parallel import Shard, check_same, from_first, shard_of
from policies import Strategy
from refill import Refill, generate
from results import open_shared
from sampling import Sampling
from scripts.make_model_fixtures import LENGTHS
from scripts.save_model import save_model
from spec_decode import Engine
from tests.reference import tiny_model

CPU, FIXTURES = torch.device("cpu"), Path(__file__).parent / "fixtures" / "models"
FAMILIES = ("llama-3.1", "llama-3.2", "llama-bias", "mistral-v0.1", "qwen2.5-yarn", "qwen3",
            "phi-3", "gemma-2", "gemma-3")  # fmt: skip
STRATEGIES = {
    "none": Strategy(),
    "streaming": Strategy("streaming", 3, 24),
    "snapkv": Strategy("snapkv", 3, 24, obs_window=7, reselect_every=2),
    "chunks": Strategy("chunks", 2, 40),
    "ngram": Strategy("ngram", 3),
    "mixed": Strategy("mixed", 3, 24, obs_window=7),
    "int8": Strategy("streaming", 3, 24, weights="int8"),
}
BY_MODEL = {"full": Strategy("full", 3), "streaming": Strategy("streaming", 3, 24),
            "snapkv": Strategy("snapkv", 2, 24, obs_window=7)}  # fmt: skip
HEADS = ((4, 4), (4, 2), (8, 2), (4, 1), (28, 4), (28, 2))  # query heads, KV heads
GREEDY, SAMPLED = Sampling(), Sampling(0.9, 30, 0.95)
PROMPT = [*torch.randint(97, (150,), generator=torch.Generator().manual_seed(5)).tolist()]
PROMPTS = [PROMPT[:130], PROMPT[3:4], PROMPT[40:57] * 3, PROMPT[10:99], PROMPT[:60]]
N_NEW = 8
HANG = timedelta(seconds=60)  # ranks that decide differently wait for each other
SMALL = "2-1-1"  # the directory of a model of two heads and one layer
TWO_ONLY = {  # what four ranks show no better
    "strategy none", "strategy chunks", "strategy ngram", "strategy int8", "draft model streaming",
    "draft model snapkv", "heads (4, 2)", "heads (4, 1)", "sampled none", "family llama-3.1",
    "family mistral-v0.1", "family qwen2.5-yarn", "family qwen3", "family gemma-2", "file",
}  # fmt: skip


def load(path: Path, whole: Callable[[int], bool] | None = None) -> Transformer:
    shard = shard_of(load_config(path), whole)
    return load_model(path, CPU, torch.float32, shard=shard)


def text(
    path: Path, strategy: Strategy, sampling: Sampling = GREEDY, draft: Path | None = None
) -> list:
    """Five prompts of 1 to 130 tokens through three rows; one draft model is not divided."""
    draft_model = draft and load(draft, whole=lambda n: strategy.policy == "streaming")
    engine = Engine(load(path), 3, 150, strategy, sampling, 7, draft_model)
    outputs, stats = generate(engine, PROMPTS, N_NEW)
    return [outputs, stats.accepted_histogram]


def family(name: str) -> list:
    """The texts of transformers, too."""
    from safetensors import safe_open

    with safe_open(FIXTURES / name / "expected.safetensors", framework="pt") as file:
        prompt = file.get_tensor("prompt").tolist()
        expected = [file.get_tensor(f"greedy_{n}").tolist()[:N_NEW] for n in LENGTHS[1:]]
    strategy = Strategy("snapkv", 3, 24, obs_window=7, reselect_every=4)
    engine = Engine(load(FIXTURES / name), 2, max(LENGTHS) + N_NEW, strategy, Sampling())
    outputs, _ = generate(engine, [prompt[:n] for n in LENGTHS[1:]], N_NEW)
    return [outputs, outputs == expected]


def short_text(path: Path, compiled: bool = False) -> list:
    """Few shapes: each is compiled."""
    model = load(path)
    if compiled:
        compile_blocks(model)
    engine = Engine(model, 2, 60, Strategy("streaming", 2, 24), Sampling())
    engine.prefill_chunk = 16
    engine.prefill([PROMPT[:33], PROMPT[50:59]], [N_NEW, N_NEW])
    engine.run()
    return engine.batch.outputs()


def automatic(path: Path) -> list:
    """Every rank has a clock of its own: what is chosen must be the same."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    clock = SimpleNamespace(now=0.0, seed=torch.Generator().manual_seed(rank))

    def perf_counter() -> float:
        clock.now += float(torch.rand((), generator=clock.seed)) * (1 + rank) * 3e-2
        return clock.now

    device.time = SimpleNamespace(perf_counter=perf_counter)
    try:
        engine = Engine(load(path), 3, 150, Strategy(), Sampling())
        strategies = [STRATEGIES[name] for name in ("ngram", "mixed", "streaming")]
        chooser = Auto(engine, [Candidate(replace(s, gamma=3)) for s in strategies], (1, 3))
        engine.warm_up(refills=True)
        chooser.calibrate(refills=True)
        requests = engine.requests(PROMPTS, [N_NEW] * len(PROMPTS))
        results = sorted(Refill(engine, requests, auto=chooser).results(), key=lambda r: r.index)
    finally:
        device.time = time
    link = chooser.hardware.all_reduce_seconds, chooser.hardware.link_bandwidth
    decided = [chooser.decision(), chooser.residual, link, chooser.explain()]
    return [[r.token_ids for r in results], json.dumps(decided)]


def agreements(_: Path) -> list:
    """What ranks tell each other; alone, what one tells itself."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    values = [device.agreed(3.0 - rank), device.agreed(3.0 - rank, "min"), from_first(["a", rank])]
    check_same("it", [1, 2])
    try:
        check_same("it", rank)
        values.append("same")
    except ValueError as e:
        values.append(str(e))
    return values


def shared_file(folder: Path) -> list:
    """One writes, all know."""
    given = SimpleNamespace(path=folder / "in", lines=[SimpleNamespace(id="a")], bad=[])
    given.path.touch()
    path = folder / f"out-{dist.get_world_size() if dist.is_initialized() else 1}.jsonl"
    with open_shared(path, given, {"x": 1}) as output:
        output.append({"id": "a"})
    with open_shared(path, given, {"x": 1}) as output:
        return [sorted(output.done)]


class Unconnected(Shard):
    """What a rank loads, without others."""

    def apply(self, model: Transformer) -> None:
        pass


def resident(field: str) -> int:
    """Bytes of this process's memory, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(folder: Path) -> list[int]:
    """Bytes: of a rank's parameters, expected, anonymous, at the peak, of the largest slice."""
    config = ModelConfig(256, 3, 8, 8, 32, 24000, 500)
    folder.mkdir()
    save_model(Transformer(config), folder)
    shard = Unconnected(config, 1, 4)

    def load() -> Transformer:
        return load_model(folder, CPU, torch.float32, config=config, shard=shard)

    models = [load()]  # then the code is in memory, too
    anonymous, before = resident("RssAnon"), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    models.append(load())
    held = sum(p.nbytes for p in models[1].parameters())
    peak, anonymous = resident("VmHWM") - before, resident("RssAnon") - anonymous
    return [held, total_params(shard.config) * 4, anonymous, peak, 256 * 6000 * 4]


def cases(folder: Path) -> dict[str, Callable[[], list]]:
    """By name; a model's directory is made where there is none."""

    def model(n_head: int = 4, n_kv_head: int = 2, **changes) -> Path:
        path = folder / "-".join(map(str, (n_head, n_kv_head, *changes.values())))
        if not path.exists():
            path.mkdir()
            save_model(tiny_model(n_head, n_kv_head, **changes), path)
        return path

    small, tiny = model(2, 1, n_layer=1), model()
    return (
        {f"strategy {n}": lambda s=s: text(tiny, s) for n, s in STRATEGIES.items()}
        | {f"draft model {n}": lambda s=s: text(tiny, s, draft=small) for n, s in BY_MODEL.items()}
        | {f"heads {h}": lambda h=h: text(model(*h), STRATEGIES["snapkv"]) for h in HEADS}
        | {f"sampled {n}": lambda s=STRATEGIES[n]: text(tiny, s, SAMPLED)
           for n in ("none", "mixed")}
        | {f"family {n}": lambda n=n: family(n) for n in FAMILIES}
        | {"auto": lambda: automatic(tiny), "agreements": lambda: agreements(tiny)}
        | {"file": lambda: shared_file(folder)}
    )  # fmt: skip


def run(wanted: dict[str, Callable[[], list]]) -> dict[str, list]:
    with torch.inference_mode():
        return {name: case() for name, case in wanted.items()}


def world(n: int, folder: Path, wanted: dict[str, Callable[[], list]]) -> None:
    """Fork n ranks, each of which writes a file, and wait for them."""
    ranks = []
    for rank in range(n):
        if pid := os.fork():
            ranks.append(pid)
            continue
        try:
            store = dist.FileStore(str(folder / f"store-{n}"), n)
            how = {"store": store, "rank": rank, "world_size": n, "timeout": HANG}
            dist.init_process_group("gloo", **how)
            (folder / f"{n}-{rank}.json").write_text(json.dumps(run(wanted)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    for pid in ranks:
        os.waitpid(pid, 0)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        wanted = cases(Path(directory))
        measured = {"memory": memory(Path(directory) / "large")}
        small = Path(directory) / SMALL
        eager = run({"compiled": lambda: short_text(small)})
        (folder / "alone.json").write_text(json.dumps(run(wanted) | eager | measured))
        world(2, folder, wanted | {"compiled": lambda: short_text(small, compiled=True)})
        world(4, folder, {name: case for name, case in wanted.items() if name not in TWO_ONLY})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
