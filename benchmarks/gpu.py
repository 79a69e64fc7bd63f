"""One GPU: every step against its memory floor, whole rounds, baselines, the cost model's fit.

    python benchmarks/gpu.py                          # checks, then measures
    python benchmarks/gpu.py --points 8,32768 64,8192 --skip checks demo --out FILE.json
    python benchmarks/gpu.py --smoke                  # all of it at toy sizes on the CPU

Nothing is downloaded: weights are random, of Llama-3.1-8B's geometry, made on the device; K and V
are random too. For whole rounds all work is real, and how many drafts stay is drawn at the paper's
rates (`ACCEPTED`; the tables say "synthetic"): tokens/s are those of a batch of which no row is
finished, Omega tokens a round. Real acceptance comes from the demo checkpoint, which runs first.
Times are medians of CUDA graph replays by device events (on a CPU: of calls by clock). A floor is
the bytes that must be read, over the bandwidth measured at the start.

The points are ordered by what they are needed for; the first `--detailed` ones have all, and the
first one also a sweep of the split-KV kernel's programs per multiprocessor (PROGRAMS_PER_SM in
kv_cache.py). Results are written after every part, JSON and a Markdown table beside it; a part that
fails is recorded and the others go on. What the tests print is in a file beside it from the moment
they print it. When `--minutes` are over, points left are skipped and named: keep them well below
the limit of the machine, because a point that has begun is finished.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from synthetic import SyntheticEngine, random_prompts

from acceptance import omega
from benchmarks.saving import table
from checkpoint import DTYPES, load_model, randomize
from config import ModelConfig, kv_bytes_per_token, layer_params, open_json
from device import timed
from files import write_json
from generate import main as generate_main
from kernels import compile_blocks
from kv_cache import KVCache
from measure import environment
from model import Transformer
from policies import Strategy
from roofline import HARDWARE, Timing, Workload, fit, forward_time
from sampling import Sampling
from spec_decode import Engine

ACCEPTED = (  # policy, budget, acceptance of each draft: arXiv 2408.11049, at 32k
    ("streaming", 512, 0.81),
    ("snapkv", 2048, 0.895),
)
POLICY_GAMMA = 5  # draft caches are made for it and serve all smaller ones
ROUNDS = 16  # that are timed together; a policy selects again every 4
NEW_TOKENS = ROUNDS * (POLICY_GAMMA + 1) + 2  # per row: none is finished meanwhile


@dataclass(frozen=True)
class Settings:
    model: str | None  # a preset; None: TOY
    dtype: str
    points: tuple[tuple[int, int], ...]  # (B, S)
    budgets: tuple[int, ...]  # of T_D, at detailed points
    gammas: tuple[int, ...]  # of T_V, at detailed points
    round_gammas: tuple[int, ...]  # of whole rounds
    programs_per_sm: tuple[int, ...]  # of the split-KV kernel, swept at the first detailed point
    repeats: int


FULL = Settings(
    "random:llama-3.1-8b", "bfloat16",
    ((24, 32768), (16, 32768), (1, 32768), (8, 32768), (32, 16384), (64, 8192), (128, 4096)),
    (256, 512, 1024, 2048), (1, 2, 3, 4, 5, 6, 7, 8), (3, 5), (1, 2, 3, 4), 20,
)  # fmt: skip
SMOKE = Settings(None, "float32", ((2, 300), (1, 100)), (16, 32), (1, 2), (2,), (1, 2), 2)
TOY = ModelConfig(64, 1, 4, 2, 32, 96, 500, max_seq_len=2048)


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of the work on the device, after one run of it."""
    work()
    if device.type != "cuda":
        return 1e3 * statistics.median(timed(device, work)[0] for _ in range(repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
              for _ in range(repeats)]  # fmt: skip
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events)


def bandwidth(device: torch.device, n_bytes: int) -> dict[str, float]:
    """Bytes/s of a copy (read and written) and of a sum (read), of a buffer beyond any cache."""
    a = torch.randn(n_bytes // 4, device=device)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / (1e-3 * milliseconds(lambda: b.copy_(a), device, 10))
    read = a.nbytes / (1e-3 * milliseconds(lambda: a.sum(), device, 10))
    return {"copy_bytes_per_s": copy, "read_bytes_per_s": read, "bytes_per_s": max(copy, read)}


def kernel_milliseconds(work: Callable[[], object], device: torch.device) -> float | None:
    """What the kernels of the work take together, by the profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    n = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            work()
        torch.cuda.synchronize(device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in kernels) / n / 1e3


class Point:
    """One batch size and context: an engine with a full cache, and what is measured on it."""

    def __init__(self, model: Transformer, B: int, S: int, per_second: float, settings: Settings):
        self.model, self.B, self.S, self.settings = model, B, S, settings
        self.per_second = per_second
        device = model.norm.weight.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.engine = SyntheticEngine(model, B, S + NEW_TOKENS, Strategy(), Sampling())
        prompts = random_prompts([S] * B, model.config.vocab_size)
        self.engine.prefill(prompts, [NEW_TOKENS] * B)
        self.device = device
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        if not model.config.tie_embeddings:
            self.weight_bytes -= model.tok_embeddings.weight.nbytes  # of which B rows are read
        self.slot_bytes = B * kv_bytes_per_token(
            model.config, self.engine.full.spec.stored_dtype.itemsize
        )

    def against_floor(self, ms: float, n_slots: int) -> dict:
        """With the floor: the time to read the weights and n_slots tokens of KV per row."""
        floor = 1e3 * (self.weight_bytes + n_slots * self.slot_bytes) / self.per_second
        return {"ms": ms, "floor_ms": floor, "over_floor": ms / floor}

    def time(self, work: Callable[[], object]) -> float:
        return milliseconds(work, self.device, self.settings.repeats)

    def steps(self, detailed: bool) -> dict:
        """T_T, T_V and T_D."""
        engine, numbers = self.engine, {}
        engine.use(Strategy())
        nothing = engine.draft(0)
        seconds, plain = timed(self.device, lambda: engine.capture(lambda: self.decide(nothing)))
        numbers["compile_and_capture_seconds"] = seconds
        numbers["T_T"] = self.against_floor(self.time(plain), self.S)
        if self.device.type == "cuda":
            beyond = torch.cuda.max_memory_allocated(self.device)
            beyond -= self.engine.full.n_bytes
            beyond -= sum(p.nbytes for p in self.model.parameters())
            numbers["plain_beyond_weights_and_kv_bytes"] = beyond
        if detailed:
            kernels = kernel_milliseconds(plain, self.device)
            numbers["T_T"]["kernels_ms"] = kernels
            numbers["T_T"]["replay_over_kernels"] = kernels and numbers["T_T"]["ms"] / kernels
        for gamma in self.settings.gammas if detailed else ():
            drafts = engine.batch.tokens[:, :gamma].contiguous()
            work = engine.capture(lambda drafts=drafts: self.decide(drafts))
            numbers[f"T_V({gamma})"] = self.against_floor(self.time(work), self.S)
        for budget in self.settings.budgets if detailed else ():
            numbers[f"T_D({budget})"] = self.draft_step(Strategy("streaming", POLICY_GAMMA, budget))
        return numbers

    def draft_step(self, strategy: Strategy) -> dict:
        """T_D; the engine drafts like this from here on."""
        self.engine.use(strategy)
        work = self.engine.capture(lambda: self.engine.draft(strategy.gamma))
        return self.against_floor(self.time(work) / strategy.gamma, min(strategy.budget, self.S))

    def decide(self, drafts: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """A forward of the target alone, reading the full cache (None) and writing only that."""
        token, pos = self.engine.batch.newest()
        pos = pos + torch.arange(drafts.shape[1] + 1, device=pos.device)
        tokens = torch.cat((token, drafts), dim=1)
        return self.model(tokens, pos, cache or self.engine.full).argmax(dim=-1)

    def split_sweep(self) -> dict[str, dict[int, float]]:
        """T_T and T_V by split-KV programs per multiprocessor; ms. On a CPU there are none."""
        engine, full = self.engine, self.engine.full
        engine.use(Strategy())
        numbers = {}
        for gamma in (0, max(self.settings.round_gammas)):
            drafts, times = engine.batch.tokens[:, :gamma].contiguous(), {}
            for n in self.settings.programs_per_sm:
                cache = replace(full, spec=replace(full.spec, programs_per_sm=n))
                times[n] = self.time(engine.capture(partial(self.decide, drafts, cache)))
            numbers[f"T_V({gamma})" if gamma else "T_T"] = times
        return numbers

    def tokens_per_second(self, gamma: int, rate: float = 0.0) -> float:
        """Of whole rounds, selections and the host's part included, while no row is finished."""
        seconds: list[float] = []
        self.engine.accept_at(rate)
        for _ in range(4):  # the first one compiles and captures
            self.engine.rewind()
            seconds.append(timed(self.device, lambda: self.engine.run(gamma, ROUNDS))[0])
        return self.B * omega(gamma, rate) * ROUNDS / statistics.median(seconds[1:])

    def rounds(self) -> dict:
        """Plain decoding, and every policy and gamma at its synthetic acceptance."""
        self.engine.use(Strategy())
        numbers = {"plain_tokens_per_s": self.tokens_per_second(0), "runs": []}
        for policy, budget, rate in ACCEPTED:
            budget = min(budget, max(self.settings.budgets))
            t_draft = self.draft_step(Strategy(policy, POLICY_GAMMA, budget))
            for gamma in self.settings.round_gammas:
                speed = self.tokens_per_second(gamma, rate)
                numbers["runs"].append({
                    "policy": policy, "budget": budget, "gamma": gamma,
                    "synthetic_acceptance": rate, "tokens_per_s": speed,
                    "speedup": speed / numbers["plain_tokens_per_s"], "T_D": t_draft,
                })  # fmt: skip
        return numbers

    def baselines(self) -> dict:
        """The same plain step with SDPA, and as gpt-fast compiles it; ms."""
        engine, numbers = self.engine, {}
        engine.use(Strategy())
        token, pos = engine.batch.newest()
        cache = replace(engine.full, spec=replace(engine.full.spec, flex=False))
        other = same_weights(self.model)
        if self.model.compiled:
            compile_blocks(other)
        numbers["sdpa_ms"] = self.time(
            engine.capture(lambda: other(token, pos, cache).argmax(dim=-1))
        )
        for buffer in cache.k + cache.v:
            torch._dynamo.mark_static_address(buffer)
        whole = same_weights(self.model)
        how = {"mode": "reduce-overhead"} if token.is_cuda else {"backend": "eager"}  # at toy sizes
        gpt_fast = torch.compile(
            lambda token, pos: whole(token, pos, cache).argmax(dim=-1),
            fullgraph=True, dynamic=False, **how,
        )  # fmt: skip
        for _ in range(3):  # compile, record, replay
            gpt_fast(token, pos)
        numbers["gpt_fast_style_ms"] = self.time(lambda: gpt_fast(token, pos))
        return numbers

    def prefill(self) -> dict:
        """One row's prompt: tokens/s, and FLOP/s of its matrices and attention."""

        def read() -> list:  # as an engine does that makes nothing up
            return [*Engine.read_row(self.engine, 0, self.S)]

        seconds = 1e-3 * milliseconds(read, self.device, 1)
        c = self.model.config
        matrices = c.n_layer * layer_params(c)  # no logits but the last
        flops = 2 * matrices * self.S
        flops += 4 * c.n_layer * c.n_head * c.head_dim * self.S**2 / 2
        return {"tokens_per_s": self.S / seconds, "flops_per_s": flops / seconds}


def same_weights(model: Transformer) -> Transformer:
    """Another module around the same parameters, with nothing compiled."""
    with torch.device("meta"):
        other = Transformer(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.rope_freq = model.rope_freq
    return other.eval().requires_grad_(False)


def cost_model_fit(config: ModelConfig, points: list[dict], kind: str) -> dict:
    """The cost model's constants from all plain and verifying steps, and how well they explain."""
    timings = []
    for p in points:
        w = Workload(p["batch_size"], p["prefix_len"], itemsize=p["itemsize"])
        for name, step in p.get("steps", {}).items():
            if name == "T_T" or name.startswith("T_V"):
                T = 1 if name == "T_T" else int(name[4:-1]) + 1
                timings.append(Timing(w, T, w.prefix_len, 1e-3 * step["ms"]))
    hw, error = fit(config, HARDWARE[kind], timings)
    before = [abs(forward_time(config, HARDWARE[kind], t.workload, t.T).total / t.seconds - 1)
              for t in timings]  # fmt: skip
    return {"hardware": asdict(hw), "median_error": error,
            "median_error_of_the_preset": statistics.median(before)}  # fmt: skip


def markdown(result: dict) -> str:
    """A line per point."""
    head = ("B", "S", "T_T ms", "x floor", "T_V(4)/T_T", "T_D x floor", "plain tokens/s",
            *(f"{policy} {budget}, synthetic {rate}" for policy, budget, rate in ACCEPTED), "SDPA",
            "gpt-fast style")  # fmt: skip
    rows = []

    def ratio(a: dict | None, b: float) -> str:
        return f"{a['ms'] / b:.2f}" if a else ""

    for p in result["points"]:
        if "rounds" not in p or "steps" not in p:  # failed
            continue
        s, runs = p["steps"], p["rounds"]["runs"]
        t = s["T_T"]["ms"]
        best = [max((r for r in runs if r["policy"] == policy), key=lambda r: r["speedup"])
                for policy, _, _ in ACCEPTED]  # fmt: skip
        base = p.get("baselines", {})
        cells = (
            p["batch_size"], p["prefix_len"], f"{t:.2f}", f"{s['T_T']['over_floor']:.2f}",
            ratio(s.get("T_V(4)"), t),
            f"{runs[0]['T_D']['over_floor']:.2f}",
            f"{p['rounds']['plain_tokens_per_s']:.0f}",
            *(f"{r['speedup']:.2f} (gamma {r['gamma']})" for r in best),
            *(f"{base[k] / t:.2f} T_T" if k in base else ""
              for k in ("sdpa_ms", "gpt_fast_style_ms")),
        )  # fmt: skip
        rows.append(cells)
    return table(head, rows)


def run_logged(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit status of a command, None if it was ended for taking longer; its output is in `log`."""
    with log.open("w") as file:
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds,
                check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return None


def checks(log: Path, seconds: float) -> dict:
    """The tests that need a GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-v", "tests/test_cuda.py"]
    status = run_logged(command, log, seconds)
    output = log.read_text()
    last = "" if status is None else output.strip().split("\n")[-1]
    last = last or f"not done in {seconds:.0f} s, see {log}"
    print(f"checks: {last}", flush=True)
    return {"command": " ".join(command[1:]), "status": status, "last_line": last,
            "output": output[-4000:] if status != 0 else ""}  # fmt: skip


def demo(device: str, out: Path, smoke: bool) -> dict:
    """The demo's own run: real acceptance. What `generate.py --json` writes, without its texts."""
    file = out.with_suffix(".demo.json")
    flags = ["--device", device, "--dtype", "float32", "--json", str(file), "--check_lossless"]
    if smoke:
        flags += ["--batch_size", "2", "--max_new_tokens", "8", "--max_context", "300"]
        flags += ["--no-compile"]
    status = generate_main([*flags, "--draft", "streaming", "--speculate_k", "5"])
    result = {"flags": flags, "status": status}
    if file.exists():
        result |= {
            k: v for k, v in open_json(file).of(dict).items() if k not in ("outputs", "model")
        }
        file.unlink()
    return result


def load(settings: Settings, device: torch.device) -> Transformer:
    """Random weights of the geometry."""
    if settings.model:
        return load_model(Path(settings.model), device, DTYPES[settings.dtype])
    model = Transformer(TOY).to(device).eval().requires_grad_(False)
    randomize(model)
    return model


def batch_and_length(text: str) -> tuple[int, int]:
    B, S = map(int, text.split(","))
    return B, S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no point after them")
    parser.add_argument("--points", nargs="+", type=batch_and_length, metavar="B,S")
    parser.add_argument("--detailed", type=int, default=2, metavar="N",
                        help="points with all gammas and budgets, profile, baselines")  # fmt: skip
    parser.add_argument("--check_seconds", type=float, default=240, help="that tests may take")
    parser.add_argument("--skip", nargs="*", default=[], choices=("checks", "demo"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no GPU here; --smoke runs everything at toy sizes on the CPU")
    device = torch.device("cpu" if args.smoke else "cuda")
    settings = SMOKE if args.smoke else FULL
    date = time.strftime("%Y-%m-%d")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    default = f"gpu_{name.replace(' ', '_').lower()}_{date}.json"
    out = args.out or ROOT / "benchmarks" / "results" / default
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": " ".join(["python", *sys.argv]), "date": date,
              "settings": asdict(settings), "points": [], "skipped": []}  # fmt: skip

    def part(where: dict, name: str, work: Callable[[], object]) -> None:
        """Do one part and save what is there; on the GPU a failure does not end the others."""
        try:
            where[name] = work()
        except Exception as e:
            if args.smoke:
                raise
            where.setdefault("failed", {})[name] = f"{type(e).__name__}: {e}"
            print(f"{name} failed: {type(e).__name__}: {e}", flush=True)
        result["seconds"] = time.monotonic() - start
        write_json(result, out)
        out.with_suffix(".md").write_text(markdown(result))

    if "checks" not in args.skip:
        log = out.with_suffix(".checks.txt")
        part(result, "checks", lambda: checks(log, args.check_seconds))
    if "demo" not in args.skip:
        part(result, "demo", lambda: demo(device.type, out, args.smoke))
    with torch.inference_mode():
        part(result, "bandwidth", lambda: bandwidth(device, 2**24 if args.smoke else 2**33))
        per_second = result["bandwidth"]["bytes_per_s"]
        print(f"{per_second / 1e9:.0f} GB/s", flush=True)
        model = load(settings, device)
        if not args.smoke:
            compile_blocks(model)
        result["environment"] = environment(Engine(model, 1, 1, Strategy(), Sampling()))
        for i, (B, S) in enumerate(args.points or settings.points):
            if time.monotonic() - start > 60 * args.minutes:
                result["skipped"].append([B, S])
                continue
            torch._dynamo.reset()  # shapes of the point before
            numbers = {"batch_size": B, "prefix_len": S,
                     "itemsize": DTYPES[settings.dtype].itemsize}  # fmt: skip
            result["points"].append(numbers)
            here = replace(settings, programs_per_sm=settings.programs_per_sm if i == 0 else ())
            measure(model, numbers, i < args.detailed, per_second, here, part)
            free(device)
        if any("steps" in p for p in result["points"]):
            kind = "cpu" if args.smoke else "h200"
            part(result, "cost_model",
                 lambda: cost_model_fit(model.config, result["points"], kind))  # fmt: skip
    if "cost_model" in result:
        print(f"cost model fitted: median error {result['cost_model']['median_error']:.1%}")
    if result["skipped"]:
        print(f"no time was left for {result['skipped']}")
    print(markdown(result) + f"wrote {out}")


def measure(model, numbers: dict, detailed: bool, per_second: float, settings: Settings, part):
    """All parts of one point, into `numbers`."""
    B, S = numbers["batch_size"], numbers["prefix_len"]
    point = Point(model, B, S, per_second, settings)
    part(numbers, "steps", lambda: point.steps(detailed))
    part(numbers, "rounds", point.rounds)
    if detailed and settings.programs_per_sm:
        part(numbers, "split_kv", point.split_sweep)
    part(numbers, "prefill", point.prefill)
    if point.device.type == "cuda":
        numbers["peak_memory_bytes"] = torch.cuda.max_memory_allocated(point.device)
    if detailed:
        part(numbers, "baselines", point.baselines)
    if "steps" in numbers:
        t = numbers["steps"]["T_T"]
        print(f"B {B} S {S}: T_T {t['ms']:.2f} ms, {t['over_floor']:.2f} x floor", flush=True)
    for name, times in numbers.get("split_kv", {}).items():
        swept = ", ".join(f"{n}: {ms:.3f} ms" for n, ms in times.items())
        print(f"    {name} by split-KV programs per multiprocessor: {swept}", flush=True)


def free(device: torch.device) -> None:
    """Give the memory of the point that ended back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
