"""The sparse cache against written-out masks and a ring kept by hand; no copies when compiled."""

import random
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch._functorch.config
from torch._inductor.utils import run_and_get_code

import device
from config import visible_tokens, work_bytes
from kernels import compile_blocks
from kv_cache import NEVER, CacheSpec, KVCache, SparseKVCache
from model import Transformer
from policies import Layer, Strategy, select_streaming
from sampling import Sampling
from spec_decode import Engine
from tests.reference import (
    COMPILED_BUDGET,
    COMPILED_CHUNK,
    COMPILED_LEN,
    COMPILED_ROWS,
    reference_logits,
    ring_after,
    sinks_and_window,
    tiny_model,
)


def both_caches(
    model: Transformer, n_rows: int, n_sink: int, n_recent: int, gamma: int
) -> tuple[KVCache, SparseKVCache]:
    spec = CacheSpec.for_model(model, n_rows)
    return KVCache.empty(spec, COMPILED_LEN), SparseKVCache(spec, n_sink, n_recent, gamma)


def prefill(
    model: Transformer, full: KVCache, sparse: SparseKVCache, rows: list[list[int]]
) -> None:
    """All but the newest token of every row into the full cache, then the streaming selection."""
    for b, row in enumerate(rows):
        n = len(row) - 1
        if n:
            model(torch.tensor([row[:n]]), torch.arange(n)[None], full.row(b))
    n_cached = torch.tensor([len(row) - 1 for row in rows])
    fill_streaming(sparse, full, n_cached)


def fill_streaming(sparse: SparseKVCache, full: KVCache, n_cached: torch.Tensor) -> None:
    sparse.follow(full, n_cached)
    for i, window in enumerate(full.spec.windows):
        if window is None:
            beside = sparse.n_selected, sparse.n_recent, None, None
            layer = Layer(full.k[i], full.v[i], n_cached, *beside)
            pos = select_streaming(layer, sparse.n_selected)
            sparse.selected(i).fill(full.k[i], full.v[i], pos, n_cached)


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (7, 1)])
@pytest.mark.parametrize("n_sink, n_recent", [(0, 5), (3, 8), (4, 100)])
def test_draft_sees_sinks_and_window_through_rejections(heads, n_sink, n_recent):
    """Rounds of drafting, verifying and accepting a random part, rows of different lengths.

    The draft's logits must be those of a dense forward where only the draft's own queries are
    restricted: earlier K and V are the target's exact ones, however many drafts were rejected.
    """
    gamma, rng = 3, random.Random(0)
    model = tiny_model(*heads)
    rows = [[rng.randrange(97) for _ in range(n)] for n in (30, 1, 7)]
    lengths = [len(row) for row in rows]
    full, sparse = both_caches(model, len(rows), n_sink, n_recent, gamma)
    prefill(model, full, sparse, rows)
    for _ in range(6):
        drafts = [[rng.randrange(97) for _ in range(gamma)] for _ in rows]
        fed = [[row[-1], *d] for row, d in zip(rows, drafts, strict=True)]
        start = torch.tensor([[len(row) - 1] for row in rows])
        logits = [
            model(torch.tensor([[f[i]] for f in fed]), start + i, sparse) for i in range(gamma)
        ]
        for b, row in enumerate(rows):
            # A sink that did not exist when the policy selected is never a selected slot.
            seen = sinks_and_window(min(n_sink, lengths[b] - 1), n_recent, first=len(row) - 1)
            expected = reference_logits(model, row + drafts[b], seen)[len(row) - 1 : -1]
            got = torch.stack([step[b, 0] for step in logits]).double()
            assert (got - expected).abs().max() < 1e-4 * expected.std()
        model(torch.tensor(fed), start + torch.arange(gamma + 1), full, (full, sparse))
        for row, d in zip(rows, drafts, strict=True):
            row += [*d[: rng.randint(0, gamma)], rng.randrange(97)]


def test_verification_reads_the_full_cache():
    model = tiny_model()
    rows = [[5, 9, 11, 3] * 9]
    full, sparse = both_caches(model, 1, n_sink=2, n_recent=4, gamma=3)
    prefill(model, full, sparse, rows)
    start = torch.tensor([[len(rows[0]) - 1]])
    got = model(torch.tensor([[3, 1, 4, 1]]), start + torch.arange(4), full, (full, sparse))[
        0
    ].double()
    expected = reference_logits(model, rows[0] + [1, 4, 1])[-4:]
    assert (got - expected).abs().max() < 1e-4 * expected.std()


def test_ring_positions_follow_from_the_newest_one():
    """The arithmetic against a ring written by hand, with positions written and taken back."""
    rng = random.Random(1)
    spec = CacheSpec.for_model(tiny_model(), 1)
    for _ in range(200):
        n_recent, gamma = rng.randint(1, 9), rng.randint(0, 5)
        cache = SparseKVCache(spec, 2, n_recent, gamma)
        n, writes = rng.randint(1, 30), []
        writes.append(list(range(n)))
        for _ in range(5):  # each round writes gamma + 1 positions and keeps 1 to gamma + 1
            writes.append(list(range(n, n + gamma + 1)))
            n += rng.randint(1, gamma + 1)
        query = n  # the next draft's position, written before it attends
        held = ring_after([*writes, [query]], n_recent + gamma + 1)
        visible = cache.visible(torch.tensor([[query]]))[0, 0, 0, 0, 2:]
        window = set(range(max(query - n_recent + 1, 0), query + 1))
        assert {held[slot] for slot in range(len(visible)) if visible[slot]} == window


@pytest.mark.parametrize("longest", [1, 40])
@pytest.mark.parametrize("window", [None, 1, 4, 6, 8, 20])
def test_no_token_is_seen_twice_nor_outside_the_models_window(window, longest, monkeypatch):
    """Layer 0 has a window, shorter than the budget, as long, or longer; layer 1 has none.

    What the draft's cache is filled from is a ring if forwards are short.
    """
    full = small_ring(window, monkeypatch, longest)
    cache = SparseKVCache(full.spec, n_selected=4, n_recent=6, gamma=2)

    def write(to: KVCache | SparseKVCache, p: int) -> None:  # each slot says which token it holds
        for k, slot in zip(to.k, to.slots(torch.tensor([[p]])), strict=True):
            k[0, :, slot[0]] = float(p)

    for n_cached in range(1, 30):
        write(full, n_cached - 1)
        fill_streaming(cache, full, torch.tensor([n_cached]))
        write(cache, n_cached)
        newest = set(range(max(n_cached - 5, 0), n_cached + 1))
        for i, access in enumerate(cache.access(torch.tensor([[n_cached]]))):
            expected = newest | set(range(min(4, n_cached)))
            if window is not None and i == 0:
                expected = set(range(max(n_cached - min(window, 10) + 1, 0), n_cached + 1))
            visible = access.mask.expand(1, 2, 2, -1)[0, 1, 0]
            assert sorted(cache.k[i][0, 1, visible, 0].tolist()) == sorted(expected)
    assert bool(full.rings) == (window is not None and longest == 1)


def window_is_whole(cache: SparseKVCache, gamma: int, n_fed: int, accepted: list[int]) -> bool:
    """Whether every query of a draft finds its whole window in the ring, by doing all writes.

    The first step of a round feeds the newest n_fed tokens, 1 or 2, and each later one a draft.
    With 1 the verification writes all of the round's tokens, self-speculation; with 2 only the
    drafts that were fed are written, a draft model.
    """
    n, writes = 20, [list(range(20 - n_fed))]  # n decided tokens
    for n_accepted in accepted:
        for i in range(gamma):
            fed = list(range(n - n_fed, n)) if i == 0 else [n + i - 1]
            writes.append(fed)
            visible = cache.visible(torch.tensor([fed]))[0, 0, 0]
            held = ring_after(writes, cache.n_recent + cache.slack)
            for q, row in zip(fed, visible, strict=True):
                found = {held[slot] for slot in range(len(row)) if row[slot]}
                if found != set(range(q - cache.n_recent + 1, q + 1)):
                    return False
        if n_fed == 1:
            writes.append(list(range(n - 1, n + gamma)))
        n += n_accepted + 1
    return True


@pytest.mark.parametrize("n_fed", [1, 2])
@pytest.mark.parametrize("gamma", [1, 2, 3, 5])
@pytest.mark.parametrize("n_recent", [2, 7])
def test_how_much_slack_the_ring_needs(n_recent, gamma, n_fed):
    """With one slot less than the module docstring says, a token of the window is overwritten."""
    spec = CacheSpec.for_model(tiny_model(), 1)
    needed = max(gamma - 1, n_fed - 1)
    for slack in range(gamma + 2):
        cache = SparseKVCache(spec, 0, n_recent, gamma)
        assert cache.slack >= needed
        cache.slack = slack
        rounds = [[a, b, c] for a in range(gamma + 1) for b in (0, gamma) for c in (0, 1)]
        whole = all(window_is_whole(cache, gamma, n_fed, accepted) for accepted in rounds)
        assert whole == (slack >= needed)


def test_positions_not_cached_yet_are_never_seen():
    spec = CacheSpec.for_model(tiny_model(), 1)
    cache = SparseKVCache(spec, n_selected=4, n_recent=2, gamma=1)
    full = KVCache.empty(spec, 40)
    fill_streaming(cache, full, torch.tensor([2]))
    assert cache.selected_pos[0, 0, 0].tolist() == [0, 1, NEVER, NEVER]
    assert cache.visible(torch.tensor([[39]]))[0, 0, 0, 0, :4].tolist() == [
        True,
        True,
        False,
        False,
    ]


def small_ring(window: int | None, monkeypatch, longest: int = 6) -> KVCache:
    """One row of 40 tokens in a layer with a window, in blocks of 4, and one without."""
    monkeypatch.setattr(CacheSpec, "kv_block", 4)
    spec = CacheSpec.for_model(tiny_model(sliding_window=window, full_every=2), 1)
    return KVCache.empty(spec, 40, longest=longest)


@pytest.mark.parametrize("window", [1, 5, 9])
def test_a_ring_shows_what_a_full_layer_shows(window, monkeypatch):
    """Forwards of 1 to 6 tokens, some taken back, some texts begun anew; tokens by their names."""
    rng = random.Random(window)
    cache, clock, n = small_ring(window, monkeypatch), 0, 0
    wrapped = 0
    for _ in range(300):
        T = rng.randint(1, 6)
        if n + T > 40 or rng.random() < 0.02:
            n = 0
        pos = n + torch.arange(T)[None]
        for i, slot in enumerate(cache.slots(pos)):
            cache.k[i][0, :, slot[0]] = clock + torch.arange(T)[:, None].float()
        for size, flex in ((40, False), (cache.k[0].shape[2], False), (cache.k[0].shape[2], True)):
            names = cache.k[size == 40][0, 0, :, 0]
            mask = cache.dense_mask(pos, size, window)[0, 0, :T]
            if flex:
                q, slot = torch.arange(T)[:, None], torch.arange(size)
                mask = cache.block_mask(pos, size, window).mask_mod(0, 0, q, slot)
            shown = [sorted(names[row].tolist()) for row in mask]
            if size == 40:
                expected = shown
            assert shown == expected
            assert [len(row) for row in shown] == [min(n + t + 1, window) for t in range(T)]
        wrapped += n + T > cache.k[0].shape[2]
        clock, n = clock + T, n + T - rng.randint(0, min(T, 4) - 1 if T > 1 else 0)
    assert wrapped > 100


def test_a_forward_that_a_ring_cannot_hold_is_a_mistake(monkeypatch):
    cache = small_ring(5, monkeypatch, longest=6)
    n = cache.k[0].shape[2] - 5
    cache.access(torch.arange(n)[None])
    with pytest.raises(AssertionError):
        cache.access(torch.arange(n + 1)[None])


@pytest.mark.parametrize("window", [1, 4, 7])
def test_a_ring_knows_what_it_has_lost(window, monkeypatch):
    """Against a ring kept by hand, after a text of 38 tokens or a shorter one, row by row."""
    for length in (38, 20, 9, 3):
        cache = small_ring(window, monkeypatch)
        size, writes = cache.k[0].shape[2], []
        for start in range(0, length, 5):
            pos = torch.arange(start, min(start + 5, length))
            cache.slots(pos[None])
            writes.append(pos.tolist())
        held = set(ring_after(writes, size).values())
        for n in range(length + 1):
            for back in (0, 2):
                first = range(max(n - back - window + 1, 0), n - back)
                if first:  # else all that they see is written again
                    assert bool(cache.holds(n, back)) == all(p in held for p in first)
        assert cache.holds(torch.tensor([length])).tolist() == [True]
        cache.slots(torch.arange(3)[None])  # another text
        assert cache.holds(3).all()


def test_a_windowed_layer_takes_the_memory_of_its_window():
    """At the length of the text it is bounded by window and chunk, as config.py counts."""
    model = tiny_model(sliding_window=100, full_every=2)
    spec = replace(CacheSpec.for_model(model, 3), allocated=False)
    for n in (300, 1024, 10_000):
        sizes = [k.shape[2] for k in KVCache.empty(spec, n).k]
        assert sizes == [min(768, -(-n // 256) * 256), -(-n // 256) * 256]
        counted = visible_tokens(model.config, n, margin=spec.prefill_chunk)
        assert counted <= sum(sizes) < counted + 2 * 256
    assert KVCache.empty(spec, 10_000).n_bytes == 2 * 3 * 2 * 16 * 4 * (768 + 10_240)


def cache_sized_buffers(code: str, cache: KVCache) -> list[str]:
    """Allocations in generated code that are at least as large as one layer's K."""
    sizes = re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", code)
    numel = [torch.Size(int(n) for n in s.split(",") if n.strip()).numel() for s in sizes]
    return [s for s, n in zip(sizes, numel, strict=True) if n >= cache.k[0].numel()]


@contextmanager
def generated_anew():
    """Inside, code is generated again; what a C++ compiler has made of the same code is used."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.mark.parametrize("step", ["decode", "verify", "draft", "prefill", "decode in a ring"])
def test_a_compiled_step_does_not_copy_the_cache(step, monkeypatch):
    """Only the full cache is large; the sparse one counts as a cache too when it is read."""
    ring = step == "decode in a ring"
    model, B = tiny_model(sliding_window=300 if ring else None), COMPILED_ROWS
    monkeypatch.setattr(CacheSpec, "prefill_chunk", COMPILED_CHUNK)
    compile_blocks(model)
    torch._dynamo.reset()  # what other tests compiled would be taken, and no code seen
    n_recent = 400 if step == "draft" else COMPILED_BUDGET - 3
    full, sparse = both_caches(model, B, n_sink=3, n_recent=n_recent, gamma=3)
    row = full.row(1)
    B, T, read, write = {
        "decode": (B, 1, full, (full,)),
        "decode in a ring": (B, 1, full, (full,)),
        "verify": (B, 4, full, (full, sparse)),
        "draft": (B, 1, sparse, (sparse,)),
        "prefill": (1, COMPILED_CHUNK, row, (row,)),
    }[step]
    pos = torch.tensor([[9], [33], [600], [0]])[:B] + torch.arange(T)
    with generated_anew():
        _, code = run_and_get_code(model, torch.zeros(B, T, dtype=torch.int64), pos, read, write)
    assert code and bool(full.rings) == ring
    large = sparse if step == "draft" else full.row(0)
    assert not cache_sized_buffers("".join(code), large)
    flex, operator = "kernel_micro_gemm", "magicdec.attend"  # flex's CPU template, and ours
    own = full.spec.operator and step != "prefill"
    assert (operator in "".join(code)) == own
    assert (flex in "".join(code)) == (not own and step != "draft")


def test_garbage_in_unseen_slots_of_the_sparse_cache_changes_nothing():
    model = tiny_model()
    rows = [[5, 9, 11, 3] * 9, [7, 2]]
    full, sparse = both_caches(model, 2, n_sink=4, n_recent=8, gamma=3)
    prefill(model, full, sparse, rows)
    pos = torch.tensor([[len(row) - 1] for row in rows])
    token = torch.tensor([[row[-1]] for row in rows])
    clean = model(token, pos, sparse)
    visible = sparse.visible(pos)[:, :, :, 0, :, None]
    assert not visible.all()
    for k, v, seen in zip(sparse.k, sparse.v, visible, strict=True):
        k.copy_(torch.where(seen, k, 1e6))
        v.copy_(torch.where(seen, v, -1e30))
    assert torch.equal(model(token, pos, sparse), clean)


def test_the_detector_of_compiled_copies_detects():
    """The same check on a write that torch.compile is known to turn into a copy."""
    cache = KVCache.empty(CacheSpec.for_model(tiny_model(), 2), 200)
    index = torch.zeros(2, 2, 1, 16, dtype=torch.int64)

    def write(k: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        k.scatter_(2, index, new)
        return k.sum()

    with generated_anew():
        _, code = run_and_get_code(torch.compile(write), cache.k[0], torch.ones(2, 2, 1, 16))
    assert cache_sized_buffers("".join(code), cache)


@pytest.mark.parametrize("operator", [True, False])
def test_compiled_a_finished_row_visits_no_block_and_changes_no_other_row(operator):
    model = tiny_model()
    compile_blocks(model)
    spec = CacheSpec.for_model(model, COMPILED_ROWS)
    if operator > spec.operator:
        pytest.skip("the operator cannot be built here")
    cache = KVCache.empty(replace(spec, operator=operator), COMPILED_LEN)
    for buffer in cache.k + cache.v:
        buffer.normal_(generator=torch.Generator().manual_seed(4))
    tokens, pos = torch.tensor([[3], [1], [4], [1]]), torch.tensor([[20], [590], [300], [700]])
    everyone = model(tokens, pos, cache)
    cache = replace(cache, finished=torch.tensor([False, True, False, False]))
    mask = cache.access(pos)[0].mask
    if operator:
        assert mask.start.tolist() == [20, -1, 300, 700]
    else:
        assert mask.kv_num_blocks[:, 0, 0].tolist() == [1, 0, 2, 3]
    some = model(tokens, pos, cache)
    assert torch.equal(some[[0, 2, 3]], everyone[[0, 2, 3]])
    assert some.isfinite().all() and not torch.equal(some[1], everyone[1])


def test_the_largest_batch_that_fits_is_computed(monkeypatch):
    """And it does fit, to the byte; one byte less and it does not."""
    model, strategy = tiny_model(), Strategy("streaming", 3, 24)
    per_row = Engine(model, 1, 500, strategy, Sampling())
    caches = per_row.full.k + per_row.full.v + per_row.drafter.sparse.k + per_row.drafter.sparse.v
    sizes = 3, per_row.prefill_chunk, 4, 0
    chunk, work = (work_bytes(model.config, n_rows, *sizes) for n_rows in (0, 1))
    n_bytes = sum(buffer.nbytes for buffer in caches) + work - chunk
    monkeypatch.setattr(device, "free_memory", lambda device: 5 * n_bytes + chunk)
    both = (
        r"use --batch_size 5 \(the most that fits\) or --max_context (\d+) \(the most that fits\)$"
    )
    with pytest.raises(ValueError, match=both) as error:
        Engine(model, 9, 500, strategy, Sampling())
    longest = int(re.search(both, str(error.value))[1])
    Engine(model, 9, longest, strategy, Sampling())
    with pytest.raises(ValueError, match=f"--max_context {longest} "):
        Engine(model, 9, longest + 1, strategy, Sampling())
    Engine(model, 5, 500, strategy, Sampling())
    monkeypatch.setattr(device, "free_memory", lambda device: 5 * n_bytes + chunk - 1)
    with pytest.raises(ValueError, match=r"use --batch_size 4 \(the most"):
        Engine(model, 5, 500, strategy, Sampling())
    monkeypatch.setattr(device, "free_memory", lambda device: 5 * n_bytes + chunk)
    with pytest.raises(ValueError, match=r"use --batch_size 4 \(the most"):
        Engine(model, 5, 500, strategy, Sampling(0.8))  # sampling needs more
    monkeypatch.setattr(device, "free_memory", lambda device: n_bytes + chunk - 1)
    with pytest.raises(ValueError, match=r"free; use --max_context \d+ \(the most that fits\)$"):
        Engine(model, 1, 500, strategy, Sampling())
    monkeypatch.setattr(device, "free_memory", lambda device: 0)
    with pytest.raises(ValueError, match="free; use a smaller --batch_size and --max_context"):
        Engine(model, 1, 500, strategy, Sampling())


def test_the_blocks_of_a_ring_are_not_contiguous(monkeypatch):
    cache = small_ring(5, monkeypatch)
    cache = replace(cache, spec=replace(cache.spec, flex=True))
    monkeypatch.setattr("kv_cache.kernel_options", lambda spec, B, T, contiguous: contiguous)
    told = [access.kernel_options for access in cache.access(torch.tensor([[7]]))]
    assert told == [window is None for _, window in cache.layers] == [False, True]


@pytest.mark.parametrize("window", [None, 1, 50, 256, 300])
@pytest.mark.parametrize(
    "n_group, n_tokens", [(1, 1), (7, 5), (7, 33), (1, 256), (2, 128), (3, 384), (1, 511)]
)
def test_the_block_mask_is_the_dense_mask(n_group, n_tokens, window):
    """The rule inside the blocks; and those that are not visited hold nothing that is seen."""
    spec = CacheSpec.for_model(tiny_model(n_group, 1, sliding_window=window), 4)
    cache = KVCache.empty(replace(spec, flex=True), 1200)
    pos = torch.tensor([[0], [250], [711], [767]]) + torch.arange(n_tokens)  # rings of 768 wrap
    layer = cache.layers[0]
    mask, dense = cache.block_mask(pos, *layer), cache.dense_mask(pos, *layer)[:, 0]
    assert mask.seq_lengths == dense.shape[1:]
    b, q, slot = (torch.arange(n) for n in dense.shape)
    assert torch.equal(mask.mask_mod(b[:, None, None], 0, q[:, None], slot), dense)
    for b in range(4):
        for i, part in enumerate(dense[b].split(128)):
            needed = part.any(dim=0).view(-1, spec.kv_block).any(dim=1).nonzero()[:, 0].tolist()
            n_visited = mask.kv_num_blocks[b, 0, i]
            visited = mask.kv_indices[b, 0, i, :n_visited].tolist()
            assert n_visited == len(visited) == len(set(visited)) and set(needed) <= set(visited)
            if n_tokens % 128 == 0 or len(dense[b]) <= 128:
                assert needed == sorted(visited)


@pytest.mark.parametrize("window", [1, 50, 300, 444, 445, None])
def test_a_sliding_window_visits_only_its_blocks(window):
    spec = CacheSpec.for_model(tiny_model(sliding_window=window), 2)
    cache = KVCache.empty(replace(spec, flex=True), 700)
    mask = cache.access(torch.tensor([[699], [255]]))[0].mask
    for b, (p, last) in enumerate([(699, 2), (255, 0)]):
        first = 0 if window is None else max(p - window + 1, 0) // 256
        assert mask.kv_num_blocks[b, 0, 0] == last - first + 1
        assert mask.kv_indices[b, 0, 0, : last - first + 1].tolist() == [*range(first, last + 1)]
