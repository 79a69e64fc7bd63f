"""The generated attention kernels in Triton's interpreter, against attention written out.

This process lets Inductor generate them, for a GPU of a few multiprocessors, so that there are few
programs. A second one interprets them, because Triton decides that when it is imported. The
reduction after a split-KV kernel is ordinary Inductor code; here it is written out.

Where a kernel is to be exact (`exact.py`), the same queries are computed again as the first ones of
a later forward: what comes out must be the same, bit by bit.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from config import ModelConfig
from exact import mask_by_position
from kernels import compile_blocks
from kv_cache import CacheSpec, KVCache
from scripts.cuda_offline import inductor, pretend
from scripts.cuda_offline.report import ROOT, Report, scratch

SLOTS = 600
STARTS = (SLOTS - 1, 3, 254)  # where a row's tokens end, begin, begin: across two blocks
BLOCK = 128  # slots
TOLERANCE = {"float32": 1e-4, "float16": 3e-2}  # the interpreter has no bfloat16


@dataclass(frozen=True)
class Case:
    H: int
    Hkv: int
    D: int
    B: int
    T: int
    dtype: str = "float32"
    finished: bool = False  # row 1, whose result nobody needs
    window: int | None = None  # of the model's attention
    longest: int = SLOTS  # tokens of a forward; a layer with a window is a ring if they are few
    exact: bool = False

    @property
    def name(self) -> str:
        more = " row 1 finished" * self.finished + f" window {self.window}" * bool(self.window)
        more += " ring" * (self.longest < SLOTS) + " exact" * self.exact
        return f"{self.dtype} H {self.H} Hkv {self.Hkv} D {self.D} B {self.B} T {self.T}{more}"


CASES = (
    Case(8, 2, 32, 3, 1),
    Case(8, 2, 32, 3, 6, finished=True),
    Case(8, 2, 32, 3, 6, window=200),
    Case(8, 2, 32, 3, 6, window=200, longest=100),
    Case(8, 2, 32, 3, 6, window=130, longest=100, finished=True),
    Case(8, 2, 32, 3, 6, "float16"),
    Case(7, 1, 16, 3, 4),  # more programs than blocks of a short row
    Case(8, 2, 32, 2, 17),  # three tiles of queries
    Case(8, 2, 32, 2, 17, "float16"),
    Case(8, 2, 32, 3, 6, exact=True),  # one piece
    Case(7, 1, 16, 2, 4, exact=True),  # four
    Case(7, 1, 16, 2, 4, "float16", finished=True, exact=True),
    Case(8, 2, 32, 1, 6, window=200, longest=100, exact=True),
    Case(8, 2, 32, 2, 33),  # not split, as the following
    Case(4, 1, 32, 1, 256),
    Case(4, 1, 32, 1, 256, window=200),
    Case(4, 1, 32, 1, 128, window=200, longest=128),
)


def generate(case: Case, recorder: inductor.Recorder) -> dict:
    """Where the case's kernel is, and what it is launched with."""
    recorder.clear()
    torch._dynamo.reset()
    config = ModelConfig(64, 2, case.H, case.Hkv, case.D, 64, 500, max_seq_len=4096,
                         sliding_window=case.window)  # fmt: skip
    with pretend.gpu():
        model = pretend.model_on_gpu(config, getattr(torch, case.dtype))
        model.exact = case.exact * (case.T - 1)
        compile_blocks(model)
        cache = KVCache.empty(CacheSpec.for_model(model, case.B), SLOTS, longest=case.longest)
        pos = torch.zeros(case.B, case.T, dtype=torch.int64, device="cuda")
        model.hidden(torch.zeros_like(pos), pos, cache)
    launch = next(x for x in reversed(recorder.launches) if x.kernel.is_attention)
    return {"case": asdict(case), "file": launch.kernel.file, "name": launch.kernel.function,
            "arguments": launch.arguments}  # fmt: skip


def check(match: str) -> list[str]:
    """The failures."""
    pretend.H200.multi_processor_count = 4  # for which there are few programs
    pretend.install()
    recorder, report = inductor.install(), Report(match)
    recorder.builds = "none"
    jobs = [generate(case, recorder) for case in CASES if report.wants(case.name)]
    file = scratch() / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", "-m", "scripts.cuda_offline.numbers", str(file)]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    report.failures += [line for line in done.stdout.splitlines() if line.startswith("FAIL ")]
    if done.returncode and not report.failures:
        report.fail(f"numbers: the interpreter ended with status {done.returncode}")
    return report.end()


def load_kernel(job: dict):
    """The generated function, without what Inductor wraps around it."""
    spec = importlib.util.spec_from_file_location(job["name"], job["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, job["name"])


def attention(
    q: Tensor,  # [B, Hkv, G * T, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, D]
    pos: Tensor,  # [B, T], of the queries
    window: int | None,
    ring: bool,
) -> Tensor:  # [B, Hkv, G * T, D] float32
    """Dense attention of every query to the slots of tokens up to its position."""
    at = pos.repeat(1, q.shape[2] // pos.shape[1])[:, None, :, None]  # [B, 1, G * T, 1]
    p, newest = torch.arange(k.shape[2]), pos[:, -1, None, None, None]
    if ring:  # the newest tokens, each in the slot of its residue
        order = newest - torch.arange(k.shape[2])  # [B, 1, 1, S]
        p = torch.zeros_like(order).scatter(-1, order % k.shape[2], order)
    hidden = p > at if window is None else (p > at) | (p <= at - window)
    hidden = hidden | (p < 0)
    scores = (q.float() @ k.float().mT).masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1) @ v.float()


def reduced(out: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Parts [B, n_split, Hkv, n_query, D] with their maxima and sums of 2 ** x, put together."""
    most = top.amax(dim=1, keepdim=True)
    share = torch.where(most == -torch.inf, 0, (top - most).exp2())
    total = (total * share).sum(dim=1)
    out = (out * share[..., None]).sum(dim=1)
    return out / torch.where(total == 0, 1, total)[..., None]


class Data(NamedTuple):
    """What a case's kernel is launched on."""

    cache: KVCache
    pos: Tensor  # [B, T]
    q: Tensor  # [B, Hkv, G, T, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]

    def later(self, t: int) -> "Data":
        """The queries from the t-th on, as the first ones of a forward, and t others."""
        q = torch.cat((self.q[:, :, :, t:], torch.randn_like(self.q[:, :, :, :t])), dim=3)
        return self._replace(pos=self.pos + t, q=q)


def data(case: Case, n_slots: int) -> Data:
    """Random, with as many slots as the kernel was made for."""
    G, dtype = case.H // case.Hkv, getattr(torch, case.dtype)
    heads = case.Hkv, case.D, G
    spec = CacheSpec((case.window,), case.B, *heads, dtype, torch.device("cpu"), True)
    finished = torch.tensor([case.finished and b == 1 for b in range(case.B)])
    cache = KVCache.empty(spec, max(n_slots, SLOTS), finished, case.longest)
    ends = (2 * BLOCK, *STARTS) if case.exact else STARTS  # one token later there is a third block
    first = torch.tensor([ends[0] - case.T, *ends[1:]])[: case.B]
    pos = first[:, None] + torch.arange(case.T)
    q, k, v = (torch.randn(case.B, case.Hkv, *n, case.D).to(dtype)
               for n in ((G, case.T), (n_slots,), (n_slots,)))  # fmt: skip
    return Data(cache, pos, q, k, v)


def n_pieces_of(arguments: dict, case: Case) -> int:
    """Into how many the cache is cut: each has a mask then, and Q, K, V are only viewed."""
    mask = arguments["arg_KV_NUM_BLKS"]
    return max((mask if isinstance(mask, list) else mask.shape)[1] // case.Hkv, 1)


def launch(job: dict, case: Case, d: Data) -> tuple[dict[str, Tensor], bool]:
    """What the job's kernel wrote, by argument, and whether it is the split-KV kernel."""
    ((size, window),) = d.cache.layers
    shapes = {name: shape for name, shape in job["arguments"] if isinstance(shape, list)}
    n_pieces = n_pieces_of(shapes, case)
    mask = d.cache.block_mask(d.pos, size, window)
    if n_pieces > 1:
        mask = mask_by_position(d.pos, size, n_pieces, d.cache.spec, d.cache.finished)
    splits = "arg_M" in shapes
    blank = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    values = blank | {
        "arg_Q": d.q.view(shapes["arg_Q"]), "arg_K": d.k, "arg_V": d.v,
        "arg_KV_NUM_BLKS": mask.kv_num_blocks, "arg_KV_IDX": mask.kv_indices,
    }  # fmt: skip
    if not splits:
        values["out_ptr0"] = values["out_ptr0"].to(d.q.dtype)
    values |= {name: d.pos[:, 0].contiguous() for name in shapes if name.startswith("in_ptr")}
    for name, shape in shapes.items():
        assert [*values[name].shape] == shape, f"{name}: {values[name].shape}, not {shape}"
    grid = tuple(n for name, n in job["arguments"] if name.startswith("grid"))
    load_kernel(job)[grid](*(values[name] for name in shapes))
    return values, splits


def attended(job: dict, case: Case, d: Data) -> Tensor:  # [B, Hkv, G * T, D]
    """What the kernel computes, with its parts put together."""
    values, splits = launch(job, case, d)
    out, R = values["out_ptr0"], d.q.shape[2] * case.T
    if splits:  # parts of a row, [B, n_split, heads, R, D], or pieces of a cache, as heads
        sizes = case.B, -1, case.Hkv, n_pieces_of(values, case), R
        written = out.view(*sizes, case.D), values["arg_M"].view(sizes), values["arg_L"].view(sizes)
        out = reduced(*(x.transpose(2, 3).flatten(1, 2) for x in written))
    return out.view(case.B, case.Hkv, R, case.D)


def interpret(job: dict) -> float:
    """The largest error of the job's kernel, for random K, V and queries."""
    case = Case(**job["case"])
    (keys,) = (shape for name, shape in job["arguments"] if name == "arg_K")
    d = data(case, keys[2])
    out = attended(job, case, d)
    expected = attention(d.q.flatten(2, 3), d.k, d.v, d.pos, case.window, bool(d.cache.rings))
    expected = expected.masked_fill(d.cache.finished[:, None, None, None], 0)
    for t in range(1, case.T if case.exact else 0):
        again = attended(job, case, d.later(t)).view(d.q.shape)
        if not torch.equal(again[:, :, :, : case.T - t], out.view(d.q.shape)[:, :, :, t:]):
            return float("inf")
    return (out.float() - expected).abs().max().item()


def interpret_all(file: Path) -> int:
    """The second process. Returns the exit status."""
    import numpy
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    # On a tensor core the bits of a row's product do not depend on its place. What numpy calls does
    # not promise that: with AVX2 it is not so.
    numpy.matmul = partial(numpy.einsum, "...ik,...kj->...ij")
    triton_helpers.set_driver_to_gpu = lambda: None
    triton_heuristics.template = lambda **settings: lambda function: function
    torch.manual_seed(0)
    report = Report("")
    with mock.patch.object(CacheSpec, "kv_block", BLOCK):  # a GPU's, on the CPU
        for job in json.loads(file.read_text()):
            case = Case(**job["case"])
            with report.case(case.name) as said:
                error = interpret(job)
                said.append(f"error {error:.1e}")
                if not error < TOLERANCE[case.dtype]:
                    report.fail(f"{case.name}: off dense attention by {error}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(interpret_all(Path(sys.argv[1])))
