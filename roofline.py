"""What one forward costs on a device: bytes and arithmetic, fitted to timings.

A forward of T new tokens for each of B rows with S tokens of context does two kinds of work. A GPU
reads memory and computes at the same time, so a stage takes the longer of the two (a roofline):

    linear      max( weight_bytes / bandwidth,        2 * params * B * T / flops )
    attention   max( B * S * kv_bytes / bandwidth,    4 * L * H * D * S * B * T / flops )
    activations written and read between the matrices, new K and V, logits: bytes / bandwidth
    all-reduce  2 per layer with tensor parallelism:  latency + bytes / link bandwidth
    fixed       per layer: launches, norms, everything that does not grow

Weights, heads and arithmetic are divided by the number of GPUs, but for a model that is one rank of
several (`config.one_rank`): it is divided already. Bandwidth and FLOP/s are the data sheet's peaks
times efficiencies. A layer with a sliding window reads its window, not S.

At long context the attention stage of T = 1 and of T = gamma + 1 read the same bytes. So checking
gamma + 1 tokens takes hardly longer than decoding one, and speculation is possible.

Constants are presets, by type of GPU, or are fitted to a few timed forwards of a real model.
"""

import itertools
import math
import statistics
from dataclasses import dataclass, replace

from config import (
    ModelConfig,
    kv_bytes_per_token,
    layer_params,
    matrix_params,
    visible_tokens,
)

GAMMAS, LONGEST = (2, 5, 12), 12  # compiled draft lengths on the CPU (LOG.md); the most on a GPU


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, and its link to others of its kind. Peaks are the data sheet's, dense, 16 bit."""

    name: str
    peak_flops: float  # FLOP/s
    peak_bandwidth: float  # bytes/s
    memory: float  # bytes
    flop_efficiency: float = 0.6  # reached share of the peak in large matrix products
    bandwidth_efficiency: float = 0.88  # reached share of the peak when reading
    layer_seconds: float = 60e-6  # per layer and forward, whatever the size
    all_reduce_seconds: float = 60e-6  # latency of an all-reduce
    link_bandwidth: float = 50e9  # bytes/s of an all-reduce, as reached

    @property
    def flops(self) -> float:
        """FLOP/s as reached."""
        return self.peak_flops * self.flop_efficiency

    @property
    def bandwidth(self) -> float:
        """Bytes/s as reached."""
        return self.peak_bandwidth * self.bandwidth_efficiency


# Peaks: NVIDIA's and AMD's data sheets. The other constants rest on (`benchmarks/paper.py`):
# A100  47 rows of the paper, 8 GPUs, three model pairs: the defaults above.
# H100  4 rows of the paper, 8 GPUs, Llama-3.1-8B at 32k. They settle two numbers, the latencies and
#       the link; the efficiencies stay the A100's. Rows of 8 GPUs alone cannot tell the time of a
#       layer from that of its all-reduces, so the two stay equal, as they are on the A100.
# H200  no row. It is the H100's chip and link with other memory, and takes all of its constants.
# L40, MI300X: no row; the A100's. An L40 has PCIe 4.0 x16 (32 GB/s) and no NVLink.
# CPU   no row; where the fit of `--draft auto` begins.
HARDWARE = {
    "a100": Hardware("A100-80GB SXM", 312e12, 2039e9, 80e9),
    "h100": Hardware("H100 SXM", 989e12, 3352e9, 80e9,
                     layer_seconds=30e-6, all_reduce_seconds=30e-6, link_bandwidth=150e9),
    "h200": Hardware("H200 SXM", 989e12, 4800e9, 141e9,
                     layer_seconds=30e-6, all_reduce_seconds=30e-6, link_bandwidth=150e9),
    "l40": Hardware("L40", 181e12, 864e9, 48e9, link_bandwidth=10e9),
    "mi300x": Hardware("MI300X", 1307e12, 5300e9, 192e9),
    "cpu": Hardware("2 CPU cores", 300e9, 50e9, 16e9, layer_seconds=300e-6),
}  # fmt: skip


def preset(device_type: str) -> Hardware:
    """What a device is taken for, before anything on it was timed."""
    return HARDWARE["h200" if device_type == "cuda" else "cpu"]


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch on one or several GPUs. ValueError for a number below 1."""

    batch_size: int  # B
    prefix_len: int  # S, tokens of context per row
    num_gpus: int = 1  # tensor parallelism
    itemsize: int = 2  # bytes of a weight or an activation
    kv_itemsize: int | None = None  # bytes of a number in the cache; None: the same

    def __post_init__(self) -> None:
        for field in ("batch_size", "prefix_len", "num_gpus", "itemsize"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)} must be at least 1")

    @property
    def cached_itemsize(self) -> int:
        """Bytes of a number in the cache."""
        return self.kv_itemsize or self.itemsize


@dataclass(frozen=True, slots=True)
class ForwardTime:
    """Seconds of one forward, by what they go to. A stage takes the longer of read and compute."""

    weights: float  # reading the matrices
    linear_compute: float
    kv: float  # reading K and V
    attention_compute: float
    activations: float  # writing and reading them, K and V of the new tokens, the logits
    all_reduce: float
    fixed: float

    @property
    def compute_beyond(self) -> float:
        """Seconds by which computing outlasts the reading beside it, over both stages."""
        linear = max(self.linear_compute - self.weights, 0)
        return linear + max(self.attention_compute - self.kv, 0)

    @property
    def total(self) -> float:
        """Seconds of all of it."""
        reading = self.weights + self.kv + self.activations
        return reading + self.compute_beyond + self.all_reduce + self.fixed

    def scaled(self, read: float, compute: float, fixed: float) -> "ForwardTime":
        """On a device that takes these times as long for reading, for computing, per layer."""
        linear, attention = self.linear_compute * compute, self.attention_compute * compute
        weights, kv, new = self.weights * read, self.kv * read, self.activations * read
        return ForwardTime(weights, linear, kv, attention, new, self.all_reduce, self.fixed * fixed)


def activation_bytes(m: ModelConfig, itemsize: int = 2, cached: int = 2) -> int:
    """Bytes that pass through memory per new token, besides weights and cached K and V.

    Per layer the residual stream (written and read twice), q, k, v and attention's output (written
    and read), gate, up and their product (written and read, the product once); K and V into the
    cache; logits in float32, written and read.
    """
    qkv = (2 * m.n_head + 2 * m.n_kv_head) * m.head_dim
    per_layer = 4 * m.dim + 2 * qkv + 6 * m.ffn_dim
    numbers = m.n_layer * per_layer * itemsize
    return numbers + kv_bytes_per_token(m, cached) + 2 * 4 * m.vocab_size


def layer_windows(m: ModelConfig) -> list[float]:
    """Newest tokens that a query sees, layer by layer; infinite: all of them."""
    return [math.inf if window is None else window for window in m.windows]


def kv_bytes_on_gpu(m: ModelConfig, w: Workload) -> float:
    """Bytes of K and V of one token in all layers, on each GPU. A KV head is not divided."""
    return kv_bytes_per_token(m, w.cached_itemsize) / min(w.num_gpus, m.n_kv_head)


def weight_bytes(m: ModelConfig, w: Workload, weight_itemsize: int | None = None) -> int:
    """Bytes of all matrices; those of the blocks may have numbers of another size."""
    blocks = m.n_layer * layer_params(m)
    output = matrix_params(m) - blocks
    return blocks * (weight_itemsize or w.itemsize) + output * w.itemsize


def moved_bytes(n_bytes: float, n_gpus: int) -> float:
    """What an all-reduce of so many bytes moves through each link, in a ring."""
    return n_bytes * 2 * (n_gpus - 1) / n_gpus


def with_link(hw: Hardware, n_gpus: int, timed: dict[int, float]) -> Hardware:
    """The device with the link that explains timed all-reduces: seconds by bytes, two of them.

    Where the larger takes no longer, all is latency. ValueError for a time that is none.
    """
    (small, first), (large, second) = sorted(timed.items())
    if not 0 < first < math.inf:
        raise ValueError(f"an all-reduce took {first} s; a time must be positive and finite")
    more = max(second - first, 1e-3 * first)
    bandwidth = moved_bytes(large - small, n_gpus) / more
    latency = max(first - moved_bytes(small, n_gpus) / bandwidth, 1e-3 * first)
    return replace(hw, all_reduce_seconds=latency, link_bandwidth=bandwidth)


def forward_time(
    m: ModelConfig,
    hw: Hardware,
    w: Workload,
    T: int = 1,  # new tokens per row
    context: int | None = None,  # tokens that they see; None: the prefix
    weight_itemsize: int | None = None,  # bytes of a number in the blocks; None: the workload's
) -> ForwardTime:
    """Seconds of a forward."""
    rows = w.batch_size * T
    new_bytes = rows * activation_bytes(m, w.itemsize, w.cached_itemsize)
    S = visible_tokens(m, w.prefix_len if context is None else context) / m.n_layer
    attention_flops = 4 * m.n_layer * m.n_head * m.head_dim * S * rows / w.num_gpus
    all_reduce, n_gpus = 0.0, w.num_gpus * m.n_ranks
    if n_gpus > 1:
        n_bytes = moved_bytes(rows * m.dim * w.itemsize, n_gpus)
        all_reduce = 2 * m.n_layer * (hw.all_reduce_seconds + n_bytes / hw.link_bandwidth)
    return ForwardTime(
        weights=weight_bytes(m, w, weight_itemsize) / w.num_gpus / hw.bandwidth,
        linear_compute=2 * matrix_params(m) * rows / w.num_gpus / hw.flops,
        kv=w.batch_size * S * kv_bytes_on_gpu(m, w) / hw.bandwidth,
        attention_compute=attention_flops / hw.flops,
        activations=new_bytes / w.num_gpus / hw.bandwidth,
        all_reduce=all_reduce,
        fixed=m.n_layer * hw.layer_seconds,
    )


def whole_is_faster(m: ModelConfig, hw: Hardware, w: Workload, context: int) -> bool:
    """Whether a draft step of a model that sees so many tokens had better not be divided.

    All of it on each GPU takes longer to read, but there is nothing to exchange.
    """
    divided, whole = (forward_time(m, hw, replace(w, num_gpus=n), 1, context).total
                      for n in (w.num_gpus, 1))  # fmt: skip
    return whole < divided


@dataclass(frozen=True, slots=True)
class Timing:
    """One timed forward, to fit a device's constants to. ValueError unless 0 < seconds < inf."""

    workload: Workload
    T: int  # new tokens per row
    context: int  # tokens that each of them saw
    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"a forward took {self.seconds} s; a time must be positive and finite")


DRIFT = 1e-4  # weight of a constant's squared logarithmic change, that of a timing's error being 1


def fit(m: ModelConfig, hw: Hardware, timings: list[Timing]) -> tuple[Hardware, float]:
    """The device with constants that explain timed forwards of this model, and what is left.

    The constants are the two efficiencies and the fixed time per layer. The squared logarithm of
    predicted / measured is minimised by stepping all of them up or down by a factor that shrinks.
    Leaving its old value costs a constant a little (DRIFT). So one that the timings do not show
    stays, and two that explain the same do not run off in opposite directions. Returned with it is
    the median of |predicted / measured - 1|. ValueError without timings.
    """
    if not timings:
        raise ValueError("there are no timings to fit to")
    before = [forward_time(m, hw, t.workload, t.T, t.context) for t in timings]

    def ratios(change: tuple[float, ...]) -> list[float]:
        bandwidth, flops, layer = change
        scaled = (t.scaled(1 / bandwidth, 1 / flops, layer) for t in before)
        return [p.total / t.seconds for p, t in zip(scaled, timings, strict=True)]

    def error(change: tuple[float, ...]) -> float:
        drift = DRIFT * sum(math.log(c) ** 2 for c in change)
        return sum(math.log(r) ** 2 for r in ratios(change)) + drift

    names = ("bandwidth_efficiency", "flop_efficiency", "layer_seconds")
    best, factor = tuple(1.0 for _ in names), 2.0  # new / old
    while factor > 1.001:
        moves = itertools.product((1 / factor, 1.0, factor), repeat=3)
        tried = [tuple(c * f for c, f in zip(best, move, strict=True)) for move in moves]
        change = min(tried, key=error)
        if error(change) < error(best):
            best = change
        else:
            factor = factor**0.5
    constants = {n: getattr(hw, n) * c for n, c in zip(names, best, strict=True)}
    return replace(hw, **constants), statistics.median(abs(r - 1) for r in ratios(best))


def draft_lengths(device_type: str, n_group: int) -> tuple[int, ...]:
    """The values of gamma that are worth compiling, ascending; n_group is G, heads per KV head.

    CUDA computes attention in tiles of 16, 32 or 64 queries, whatever G * (gamma + 1) is. Drafts
    that fill a tile are free. More than 12 are rarely kept.
    """
    if device_type != "cuda":
        return GAMMAS
    n_tokens = {2, 4} | {min(tile // n_group, LONGEST + 1) for tile in (16, 32, 64)}
    return tuple(sorted(n - 1 for n in n_tokens if n > 1))
