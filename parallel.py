"""One model on several devices: tensor parallelism, applied to it from outside.

    torchrun --nproc_per_node 8 generate.py --checkpoint_path DIR ...

`torchrun` starts the same program once per device, as *ranks*. Each has some of the heads and a
part of every feed-forward, and all of them read the same prompts and decide the same tokens::

    x -> wqkv (rows of its heads)   -> attention, its KV heads -> wo (columns)     -> sum -> x
    x -> w_gate_up (rows)           -> activation              -> w_down (columns) -> sum -> x
    x -> output (rows, its tokens)  -> gather                  -> all logits, on every rank

So there are two all-reduces per layer (Megatron-LM, arXiv 1909.08053), and a gather per forward.
Nothing else knows of it: a rank's ModelConfig has its own head counts (`config.one_rank`), so
caches, kernels, policies and selections are those of a smaller model. After loading, three kinds of
linear layers are wrapped (`Shard.apply`). The embedding is whole on every rank: a step reads B of
its rows, and dividing it costs one more all-reduce. A tied output layer is a view of it.

**Every decision is one decision.** Ranks that disagree about a token or about who drafts wait for
each other forever. All tokens are picked from logits that were gathered, the same bytes everywhere,
by the same arithmetic. That holds for drafts too: the output layer of a draft model whose heads do
not divide, and which is whole on every rank, is divided all the same. What follows the clock or the
free memory follows the slowest rank and the fullest one (`device.agreed`), and `auto` takes its
choice from rank 0. What policies select is a rank's own affair: it is chosen per KV head, and where
ranks share one, by the query heads of each.

**One ends, all end.** `torchrun` ends all ranks when one has ended badly. The first to do so says
why, the others are silent (`as_one`). An interruption may find a rank waiting for another in C++,
where no exception gets through: then a thread ends it.

NCCL connects GPUs, gloo CPUs. The collectives are functional ones: they compile with the block that
they are in, and can be captured in a CUDA graph.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, one_rank, output_rows
from device import agreed, several_ranks
from model import Transformer

HANG = timedelta(minutes=10)  # that ranks may be apart, in loading or compiling
GRACE = 3.0  # seconds that an interrupted rank has to end by itself
CUTS = {  # by the name of a layer in files: the dimension that is cut, and what is stacked along it
    "q_proj": (0, "q"), "k_proj": (0, "kv"), "v_proj": (0, "kv"), "qkv_proj": (0, "q kv kv"),
    "o_proj": (1, "q"), "gate_proj": (0, "ffn"), "up_proj": (0, "ffn"),
    "gate_up_proj": (0, "ffn ffn"), "down_proj": (1, "ffn"), "lm_head": (0, "vocab"),
}  # fmt: skip
Opened = Callable[[], AbstractContextManager[Any]]  # a tensor of a file, while it is open


class Part(NamedTuple):
    """A rank's part of something that is divided."""

    start: int  # in the whole
    size: int
    room: int  # for it on every rank: what the last ones lack is zero
    whole: int


def all_reduce(x: Tensor, group: str) -> Tensor:  # [...] -> [...]
    """The sum over all ranks."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x, "sum", group))


class AllReduced(nn.Module):
    """A linear layer of which each rank has some input columns. The bias is added once."""

    def __init__(self, linear: nn.Linear, group: str) -> None:
        super().__init__()
        self.bias, linear.bias = linear.bias, None
        self.linear, self.group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        """[..., K / n] -> [..., N]."""
        y = all_reduce(self.linear(x), self.group)
        return y if self.bias is None else y + self.bias


class Gathered(nn.Module):
    """The output layer, of which each rank has the rows of some tokens."""

    def __init__(self, weight: Tensor, part: Part, n: int, group: str) -> None:  # [size, dim]
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.part, self.n, self.group = part, n, group

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., V], the same bytes on every rank."""
        y, (_, size, room, whole) = F.linear(x, self.weight), self.part
        y = F.pad(y, (0, room - size)).contiguous()
        ops = torch.ops._c10d_functional
        ranks = ops.wait_tensor(ops.all_gather_into_tensor(y, self.n, self.group))
        return ranks.view(self.n, *y.shape).movedim(0, -2).flatten(-2)[..., :whole]


class Shard:
    """What one of n ranks has of a model."""

    def __init__(self, whole: ModelConfig, rank: int, n: int, replicated: bool = False) -> None:
        """`replicated`: all but the output layer is whole. ValueError: heads that do not divide."""
        c = self.config = whole if replicated else one_rank(whole, n)
        self.n, self.replicated = n, replicated
        rows = output_rows(replace(whole, n_ranks=n))
        first = 0 if replicated else rank
        D, kv = c.head_dim, 0 if replicated else rank * whole.n_kv_head // n * c.head_dim
        self.parts = {
            "q": Part(first * c.n_head * D, c.n_head * D, c.n_head * D, whole.n_head * D),
            "kv": Part(kv, c.n_kv_head * D, c.n_kv_head * D, whole.n_kv_head * D),
            "ffn": piece(first, c.ffn_dim, whole.ffn_dim),
            "vocab": piece(rank, rows, whole.vocab_size),
        }

    def trim(self, model: Transformer) -> None:
        """Leave the output layer its part only, before its weights are made."""
        if not self.config.tie_embeddings:
            weight = model.output.weight[: self.parts["vocab"].size]
            model.output.weight = nn.Parameter(weight, requires_grad=False)

    def read(self, name: str, opened: Opened, place: Tensor) -> Tensor:  # [...] -> [...]
        """Fill a place with this rank's part of a file's tensor."""
        layer, kind = name.split(".")[-2:]
        dim, stacked = CUTS.get(layer, (0, ""))
        if not stacked or (dim == 1 and kind == "bias"):
            return self.copy(opened, place, 0, slice(None))
        at = base = 0
        for start, size, room, whole in map(self.parts.__getitem__, stacked.split()):
            columns = slice(base + start, base + start + size) if dim else slice(None)
            to = place.narrow(dim, at, room if layer != "lm_head" else size)
            if size:
                self.copy(opened, to.narrow(dim, 0, size), 0 if dim else base + start, columns)
            to.narrow(dim, size, to.shape[dim] - size).zero_()
            at, base = at + room, base + whole
        return place

    def copy(self, opened: Opened, place: Tensor, first: int, columns: slice) -> Tensor:
        """Fill a place, [R] or [R, C], with these columns of R rows of a file's tensor.

        Band by band, each from a file that is opened anew: the pages of whole rows are mapped, and
        what is cut out of them is a copy. Both together are less than the place itself.
        """
        height = max(len(place) // (2 * self.n), 1)
        for n, band in enumerate(place.split(height)):
            rows = slice(first + n * height, first + n * height + len(band))
            with opened() as tensor:
                band.copy_(tensor[(rows, columns)[: place.dim()]])
        return place

    def apply(self, model: Transformer) -> None:
        """Wrap the layers after which ranks exchange what they have. In place."""
        from torch.distributed import _functional_collectives  # noqa: F401, for the compiler

        group = dist.group.WORLD.group_name
        for layer in () if self.replicated else model.layers:
            layer.attention.wo = AllReduced(layer.attention.wo, group)
            layer.feed_forward.w_down = AllReduced(layer.feed_forward.w_down, group)
        weight, part = model.output.weight, self.parts["vocab"]
        if self.config.tie_embeddings:
            weight = weight[part.start : part.start + part.size]
        model.output = Gathered(weight.data, part, self.n, group)


def piece(rank: int, room: int, whole: int) -> Part:
    """The rank's part of what is cut into pieces of `room`; the last one may be short, or empty."""
    start = min(rank * room, whole)
    return Part(start, min(room, whole - start), room, whole)


def shard_of(
    config: ModelConfig,
    whole: Callable[[int], bool] | None = None,  # had n ranks better?
) -> Shard | None:
    """This rank's part of such a model; None where there is one rank.

    Where `whole` says so, or heads do not divide, it is whole on every rank. ValueError for heads
    that do not divide, without `whole`.
    """
    if not several_ranks():
        return None
    rank, n = dist.get_rank(), dist.get_world_size()
    try:
        return Shard(config, rank, n, replicated=whole is not None and whole(n))
    except ValueError:
        if whole:
            return Shard(config, rank, n, replicated=True)
        raise


def from_first(value: Any) -> Any:
    """Rank 0's value, something that JSON can say, on every rank; alone, the value itself."""
    if not several_ranks():
        return value
    text = json.dumps(value).encode()
    size = torch.tensor(len(text))
    dist.broadcast(size, src=0)
    data = torch.tensor([*text.ljust(int(size))[:size]], dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.tolist()))


def check_same(what: str, value: object) -> None:
    """ValueError unless all ranks have the same value, as it prints."""
    number = zlib.crc32(repr(value).encode())
    if agreed(number, "max") != agreed(number, "min"):
        raise ValueError(f"{what} is not the same on all ranks: they would wait for each other")


def reducer(model: Transformer, n_tokens: int) -> Callable[[], Tensor]:
    """Work to be timed: what a layer exchanges, twice, for so many tokens, [n_tokens, dim]."""
    x, group = model.norm.weight.repeat(n_tokens, 1), dist.group.WORLD.group_name
    return lambda: all_reduce(x, group)


def launched() -> bool:
    """Whether `torchrun` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def own_device(name: str) -> str:
    """The device of this process: with "cuda", the GPU of its place on this machine.

    ValueError for one GPU by name, which all would use.
    """
    if ":" in name:
        raise ValueError(f"--device {name}: several processes need several devices; give cuda")
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name


def connect() -> dist.Store:
    """Where ranks leave each other messages: in torchrun's own store, or in one that rank 0 has."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    ours = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"generate/{attempt}", dist.TCPStore(host, port, None, ours))


def join(device: str, store: dist.Store) -> None:
    """Become one of the ranks. On GPUs, values of the host still go through gloo."""
    rank, n, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=HANG)


def as_one(command: Callable[[dist.Store], int], failed: Callable[[BaseException], int]) -> int:
    """Run the command on this rank; rank 0 prints. Returns the exit status.

    `failed` tells of an exception and returns the status for it, or raises what is our own mistake.
    The first rank that has one tells of it; each ends at once. Where one was killed, torchrun's
    SIGTERM may reach the others before they miss it.
    """
    store, streams = connect(), (sys.stdout, sys.stderr)
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGTERM, told_to_end)
    watch_interruptions()
    try:
        status = command(store)
    except (Exception, KeyboardInterrupt, ToldToEnd) as raised:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        status, e = 1, begun_by(raised)
        if first_to_end(store):
            sys.stdout, sys.stderr = streams
            try:
                status = failed(OSError("another rank has ended") if lost_others(e) else e)
            except BaseException:
                traceback.print_exc()
        with suppress(OSError, AttributeError):
            streams[0].flush()
        os._exit(status)
    if several_ranks():
        dist.destroy_process_group()
    return status


class ToldToEnd(BaseException):
    """By torchrun: another rank has ended, or somebody ends all."""


def told_to_end(*_: object) -> None:
    """What SIGTERM does."""
    raise ToldToEnd


def begun_by(e: BaseException) -> BaseException:
    """The interruption in whose wake it was raised, by a library that was tidying up; or itself."""
    before: BaseException | None = e
    while before and not isinstance(before, (KeyboardInterrupt, ToldToEnd)):
        before = before.__context__
    return before or e


def first_to_end(store: dist.Store) -> bool:
    """Whether this rank is the first that says so. True if nobody can be asked any more."""
    with suppress(RuntimeError):
        return store.add("ended", 1) == 1
    return True


def lost_others(e: BaseException) -> bool:
    """Whether another rank has gone: a collective fails then, and torchrun says so."""
    return isinstance(e, (dist.DistError, ToldToEnd)) or (
        isinstance(e, RuntimeError) and "gloo" in str(e)
    )


def watch_interruptions() -> None:
    """Let a thread end this process if Ctrl-C has not done so in GRACE seconds.

    Python hears of it when the C++ code returns that waits for another rank, but a byte is written
    at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def end() -> None:
        os.read(reader, 1)
        time.sleep(GRACE)
        os._exit(130)

    threading.Thread(target=end, daemon=True).start()
