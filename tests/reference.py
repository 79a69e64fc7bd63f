"""Slow twins: the same results in another style (loops, float64, no cache), and a tiny model.

Nothing here shares code with what it checks, except the weights of the model.

Compiling a block for one shape takes as long as a hundred other tests. So tests of compiled models
have the same shapes where they can, and the second one finds them compiled: `tiny_model()`,
COMPILED_ROWS rows of at most COMPILED_LEN tokens, prefilled in chunks of COMPILED_CHUNK, gamma 3,
and a draft budget of COMPILED_BUDGET.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from config import ModelConfig, RopeScaling
from model import Transformer
from sampling import Sampling

COMPILED_ROWS = 4
COMPILED_LEN = 735  # a round's overshoot makes it 768, three KV blocks
COMPILED_CHUNK = 128
COMPILED_BUDGET = 24
KNOWN: dict[tuple, list[int]] = {}  # model, prompt, how to sample it -> text


def tiny_model(
    n_head: int = 4, n_kv_head: int = 2, vocab_size: int = 97, seed: int = 0, **changes
) -> Transformer:
    """Two odd-sized random layers with weights large enough that attention matters."""
    config = ModelConfig(
        dim=40, n_head=n_head, n_kv_head=n_kv_head, head_dim=16, ffn_dim=56,
        vocab_size=vocab_size, **{"max_seq_len": 4096, "n_layer": 2} | changes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        scale = 0.5 / math.sqrt(p.shape[-1]) * (1 if "output" in name else 3)
        p.copy_(torch.randn(p.shape, generator=generator) * scale + (p.dim() == 1))
    return model


def causal(q: int, p: int) -> bool:
    return p <= q


def sinks_and_window(n_sink: int, n_recent: int, first: int) -> Callable[[int, int], bool]:
    """Queries from position `first` on are a draft's and see sinks and the window; others all."""

    def visible(q: int, p: int) -> bool:
        return p <= q and (q < first or p < n_sink or p > q - n_recent)

    return visible


def angle_rates(config: ModelConfig) -> list[float]:
    """RoPE angle per position of each pair; the llama3 rule as its authors wrote it, branch by
    branch."""
    rates = []
    for i in range(config.head_dim // 2):
        rate = config.rope_theta ** (-2 * i / config.head_dim)
        s: RopeScaling | None = config.rope_scaling
        if s is not None:
            wavelength = 2 * math.pi / rate
            if wavelength > s.original_max_seq_len / s.low_freq_factor:
                rate /= s.factor
            elif wavelength > s.original_max_seq_len / s.high_freq_factor:
                smooth = s.original_max_seq_len / wavelength - s.low_freq_factor
                smooth /= s.high_freq_factor - s.low_freq_factor
                rate = (1 - smooth) * rate / s.factor + smooth * rate
        rates.append(rate)
    return rates


def rotated(x: Tensor, pos: int, rates: list[float]) -> Tensor:  # [D] float64
    half, old = len(rates), x.tolist()
    new = [0.0] * len(old)
    for i, rate in enumerate(rates):
        c, s = math.cos(pos * rate), math.sin(pos * rate)
        new[i] = old[i] * c - old[i + half] * s
        new[i + half] = old[i + half] * c + old[i] * s
    return torch.tensor(new, dtype=x.dtype)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [dim] float64
    return x / math.sqrt(float((x * x).mean()) + eps) * weight.double()


def reference_logits(
    model: Transformer,
    tokens: list[int],
    visible: Callable[[int, int], bool] = causal,
    trace: list[tuple[list, list]] | None = None,  # gets (queries, keys) of every layer
) -> Tensor:  # [len(tokens), V] float64
    """The model without cache, batch or fused weights, one query at a time.

    `visible` is what layers without a window see of the text; those with one see it alone.
    """
    c, rates = model.config, angle_rates(model.config)
    D, G = c.head_dim, c.n_head // c.n_kv_head
    xs = [model.tok_embeddings.weight[t].double() for t in tokens]
    for layer, window in zip(model.layers, c.windows, strict=True):
        w = layer.attention.wqkv.weight.double()
        wq, wk, wv = w[: c.n_head * D], w[c.n_head * D : -c.n_kv_head * D], w[-c.n_kv_head * D :]
        norms = [normed(x, layer.attention_norm.weight, c.norm_eps) for x in xs]
        heads = range(c.n_kv_head)
        keys = [[rotated((wk @ n)[h * D : h * D + D], p, rates) for h in heads]
                for p, n in enumerate(norms)]  # fmt: skip
        values = [[(wv @ n)[h * D : h * D + D] for h in heads] for n in norms]
        queries = [[rotated((wq @ n)[h * D : h * D + D], q, rates) for h in range(c.n_head)]
                   for q, n in enumerate(norms)]  # fmt: skip
        if trace is not None:
            trace.append((queries, keys))
        wo = layer.attention.wo.weight.double()
        for q in range(len(tokens)):
            seen = [p for p in range(q + 1) if (p > q - window if window else visible(q, p))]
            mixed = []
            for head in range(c.n_head):
                k = torch.stack([keys[p][head // G] for p in seen])
                v = torch.stack([values[p][head // G] for p in seen])
                mixed.append((k @ queries[q][head] / math.sqrt(D)).softmax(0) @ v)
            xs[q] = xs[q] + wo @ torch.cat(mixed)
        for q, x in enumerate(xs):
            n = normed(x, layer.ffn_norm.weight, c.norm_eps)
            gate, up = (layer.feed_forward.w_gate_up.weight.double() @ n).chunk(2)
            hidden = gate * torch.sigmoid(gate) * up
            xs[q] = x + layer.feed_forward.w_down.weight.double() @ hidden
    out = model.output.weight.double()
    return torch.stack([out @ normed(x, model.norm.weight, c.norm_eps) for x in xs])


def snapkv_scores(
    queries: list, keys: list, obs_window: int, before: int, after: int
) -> list[list[float]]:
    """Per KV head, the attention that each token receives from the newest ones, pooled.

    queries [token][head] and keys [token][KV head] are those of one layer.
    """
    n, H, Hkv = len(keys), len(queries[0]), len(keys[0])
    start = max(n - obs_window, 0)
    scores = []
    for h in range(Hkv):
        stacked = torch.stack([key[h] for key in keys]) / math.sqrt(len(keys[0][h]))
        received = [0.0] * n
        for head in range(H):
            if head // (H // Hkv) != h:
                continue
            for q in range(start, n):
                x = [math.exp(v) for v in (stacked[: q + 1] @ queries[q][head]).tolist()]
                for p in range(q + 1):
                    received[p] += x[p] / sum(x) / (H // Hkv) / (n - start)
        around = [received[max(p - before, 0) : p + after + 1] for p in range(n)]
        scores.append([sum(values) / (before + 1 + after) for values in around])
    return scores


def latest_match(tokens: list[int], n_most: int, gamma: int) -> tuple[list[int], int]:
    """What followed the latest earlier occurrence of the newest n tokens, n from n_most to 1; n."""
    for n in range(min(n_most, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                copy = tokens[start + n :]
                return [copy[i % len(copy)] for i in range(gamma)], n
    return [tokens[-1]] * gamma, 0


def plain(
    model: Transformer, prompt: list[int], n: int, sampling: Sampling, seed: int = 0
) -> list[int]:
    """Continuation with the model's own uncached forward, one token at a time.

    Many tests ask for the same: what was computed for these weights and this prompt is kept.
    """
    weights = tuple((p.shape, p.double().sum().item()) for p in model.parameters())
    tokens = KNOWN.setdefault((model.config, weights, sampling, seed, *prompt), list(prompt))
    while len(tokens) < len(prompt) + n:
        place = len(tokens)
        logits = model(torch.tensor([tokens]), torch.arange(place)[None])[0, -1].tolist()
        scores = dict(enumerate(logits))
        if not sampling.greedy:
            probs = reference_probs(logits, sampling.temperature, sampling.top_k, sampling.top_p)
            scores = {v: math.log(p) + reference_noise(seed, place, v)
                      for v, p in enumerate(probs) if p > 0}  # fmt: skip
        tokens.append(max(scores, key=lambda v: scores[v]))
    return tokens[len(prompt) : len(prompt) + n]


def plain_greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """The same with the likeliest token at each place."""
    return plain(model, prompt, n, Sampling())


def reference_noise(seed: int, place: int, token: int) -> float:
    """Of one token, in Python's integers."""

    def mixed(word: int, key: int = 0) -> int:
        word = (word ^ word >> 16) * 0x21F0AAAD % 2**32 ^ key
        word = (word ^ word >> 15) * 0x735A2D97 % 2**32
        return word ^ word >> 15

    def key(salt: int) -> int:
        return mixed(mixed(mixed(seed % 2**32 ^ salt) ^ seed // 2**32) ^ place)

    word = mixed(mixed(token) ^ key(0x2545F491), key(0x9E3779B9))
    return -math.log(-math.log1p(-(word + 0.5) / 2**32))


def reference_probs(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """Temperature, then top-k, then top-p, one token at a time (no ties)."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[:top_k] if top_k else order
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    total = sum(weight.values())
    nucleus, mass = [], 0.0
    for i in kept:
        if top_p is not None and mass >= top_p:
            break
        nucleus.append(i)
        mass += weight[i] / total
    return [weight[i] / total / mass if i in nucleus else 0.0 for i in range(len(logits))]


def ring_after(writes: list[list[int]], ring_size: int) -> dict[int, int]:
    """Slot -> position held, by doing the writes one at a time."""
    ring = {}
    for positions in writes:
        for p in positions:
            ring[p % ring_size] = p
    return ring
