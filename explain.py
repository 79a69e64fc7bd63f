"""The next rounds of row 0 as text: `generate.py --explain`. For teaching, with any draft.

    round 2: 1,022 tokens are decided: ...posix._fcopyfile(fsrc,·fdst
      the draft sees      s sinks, r newest, # chosen: 128 tokens, in layer 3 by KV head 0
                          [s................................###.###..............rrrrr]
      it drafts           ,  ·flags  )  :    ⏎
      the model says      ,  ·flags  )  ⏎    (····)  (except)
      kept                3 of 5, then the model's own: ⏎

The model says a token after the newest one and after each draft, all in one forward. What it says
behind a draft that is not kept follows from a wrong text: it stands in brackets, and is forgotten.
The picture is the text from its beginning to its newest token. A sign stands for as many tokens as
the width of the terminal demands, and for the first of KINDS among them. Of prompt lookup it shows
the newest tokens and where they stood before (m), and what followed there (c).

Nothing is decided before a round is committed (`spec_decode.py`). So what it will do is asked
first, and then it is run. A forward must read the weights, and K and V of the tokens that it sees:
here of row 0, in all layers and heads. The model runs eagerly: to compile it would take longer than
to read all this.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch

from auto import Auto
from checkpoint import Checkpoint
from config import kv_bytes
from draft_models import ModelDrafter
from drafter import Drafter
from drafters import SelfDrafter
from kv_cache import SparseKVCache, ring_pos
from load import describe, how
from lookup import lookup
from measure import Job, Runs
from options import Options
from spec_decode import Engine
from tokenizer import NumberTokenizer, TextStream, Tokenizer

LABEL = 20  # characters before a picture, or a list of tokens
TAIL = 12  # newest tokens of the text that are shown
KINDS = {
    "c": "copied",
    "m": "matched",
    "s": "sinks",
    "r": "newest",
    "#": "chosen",
    "=": "all",
}  # by the sign in the picture
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
VISIBLE = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·"})


class Reads(NamedTuple):
    """What forwards must read."""

    n: int  # forwards
    kv: int  # bytes of K and V, of row 0
    weights: int  # bytes, for all rows at once

    def __str__(self) -> str:
        forwards = "1 forward" if self.n == 1 else f"{self.n} forwards"
        return f"{size(self.kv)} of K and V, {size(self.weights)} of weights in {forwards}"


@dataclass(frozen=True, slots=True)
class Round:
    """What one round does to row 0."""

    text: list[int]  # decided before it
    drafts: list[int]
    says: list[int]  # by the model, after the newest token and after each draft
    n_kept: int  # drafts
    new: list[int]  # what became text: less where the row ends
    sight: str  # a sign for each token of the text; "": nothing is drafted
    where: str  # of which layer and head that is
    drafting: Reads | None  # all draft steps; None: without a model
    checking: Reads
    plainly: Reads  # plain steps, for the same new tokens


def explain(o: Options, checkpoint: Checkpoint, engine: Engine, auto: Auto | None, job: Job) -> int:
    """Prefill, then a few rounds as text; returns the exit status."""
    runs, n_rows = Runs(engine, job, print), len(job.prompts)
    what = f"{len(job.prompts[0])} tokens, the first of {n_rows} rows, {how(engine.sampling)}"
    print(describe(o, engine, auto, what))
    runs.warm_up(auto)
    runs.prefill()
    for _ in auto.rounds() if auto else ():  # it probes; then comes the first round of its choice
        if auto and auto.verify:
            print(f"auto: {auto.first}")
            break
    gamma = auto.first.gamma if auto else engine.gamma
    for n in range(1, (o.explain or 0) + 1):
        if engine.watch.rows[0]:
            print("\nthe row has ended")
            break
        print(f"\nround {n}: {show(next_round(engine, gamma), checkpoint.tokenizer)}", flush=True)
    return 0


@torch.inference_mode()
def next_round(engine: Engine, gamma: int) -> Round:
    """Ask what the next round of gamma drafts is going to do, and run it."""
    batch, n = engine.batch, int(engine.batch.seq_len[0])
    text, drafter = batch.tokens[0, :n].tolist(), engine.drafter if gamma else None
    engine.refresh()
    draft = engine.draft(gamma)
    logits = engine.verify(draft)
    pos = batch.seq_len[:, None] + torch.arange(gamma + 1, device=engine.device)
    says = engine.around.pick(logits, pos, batch.sampling, engine.sampling)
    n_kept = int(engine.accept(draft, logits)[0][0])
    sight, where = sight_of(drafter, text, gamma) if drafter else ("", "")
    drafting = draft_reads(drafter, n, gamma) if drafter else None
    engine.round(gamma)
    new = batch.output(0)[n - int(batch.prompt_len[0]) :]
    return Round(
        text, draft[0].tolist(), says[0].tolist(), n_kept, new, sight, where, drafting,
        target_reads(engine, range(n + gamma, n + gamma + 1), gamma + 1),
        target_reads(engine, range(n, n + len(new)), 1),
    )  # fmt: skip


def target_reads(engine: Engine, lengths: range, n_new: int) -> Reads:
    """What forwards of the target must read whose last queries see so many tokens of row 0."""
    config, itemsize = engine.model.config, engine.full.spec.stored_dtype.itemsize
    kv = sum(kv_bytes(config, length, itemsize) for length in lengths)
    weights = engine.model.weight_bytes(n_new * engine.batch.n_rows)
    return Reads(len(lengths), kv, len(lengths) * weights)


def sight_of(drafter: Drafter, text: list[int], gamma: int) -> tuple[str, str]:
    """What the first draft of row 0 comes from, a sign for each token of the text; and where."""
    n, cache, where = len(text), sparse_cache(drafter), ""
    places: dict[str, Iterable[int]] = {"=": range(n)}
    if drafter.copies()[0]:
        n_same = int(lookup(drafter.batch.tokens[:1], drafter.batch.seq_len[:1], 1)[1])
        end = n - 2  # of their latest earlier occurrence
        while text[end + 1 - n_same : end + 1] != text[n - n_same :]:
            end -= 1
        newest = [p - i for p in (end, n - 1) for i in range(n_same)]
        places = {"m": newest, "c": range(end + 1, min(end + 1 + gamma, n))}
        where = "; its own drafts are made too, but not taken" if cache else ""
    elif cache:
        layer, offset, n_sink = shown_layer(cache), own_offset(drafter), drafter.strategy.n_sink
        ring, chosen = (
            [p if p < n_sink else p + offset for p in own]
            for own in seen_places(cache, layer, n - 1 - offset)
        )
        places = {"#": chosen, "r": ring, "s": [p for p in (*ring, *chosen) if p < n_sink]}
        where = f", in layer {layer} by KV head 0"
    signs = ["."] * n
    for sign, at in places.items():
        for p in at:
            signs[p] = sign
    return "".join(signs), where


def sparse_cache(drafter: Drafter) -> SparseKVCache | None:
    """The cache of a few tokens that it drafts from, if it does."""
    return next((c for c in drafter.caches if isinstance(c, SparseKVCache)), None)


def own_offset(drafter: Drafter) -> int:
    """How far row 0's places in the text are beyond those in the drafter's own cache."""
    return int(drafter.offset[0]) if isinstance(drafter, ModelDrafter) else 0


def shown_layer(cache: SparseKVCache) -> int:
    """The middle one of the layers without a window; the first one if there are none."""
    whole = [i for i, window in enumerate(cache.spec.windows) if window is None]
    return whole[len(whole) // 2] if whole else 0


def seen_places(cache: SparseKVCache, layer: int, q: int) -> tuple[list[int], list[int]]:
    """In the ring and among the selected, what row 0's query at q sees of a layer's KV head 0."""
    windows = cache.spec.windows
    pos = torch.full((cache.spec.batch_size, 1), q, device=cache.k[0].device)
    n_recent = cache.parts[layer][1]
    slot = torch.arange(n_recent + cache.slack, device=pos.device)
    ring = ring_pos(pos[0], slot, len(slot))[cache.in_ring(pos, n_recent)[0, 0, 0]].tolist()
    if windows[layer] is not None:
        return ring, []
    rank = windows[:layer].count(None)
    seen = cache.visible(pos)[rank, 0, 0, 0, : cache.n_selected]
    return ring, cache.selected_pos[rank, 0, 0][seen].tolist()


def draft_reads(drafter: Drafter, n: int, gamma: int) -> Reads | None:
    """What all draft steps behind n tokens must read for row 0; None: it has no model."""
    cache, start = sparse_cache(drafter), n - 1 - own_offset(drafter)
    model = drafter.model if isinstance(drafter, SelfDrafter) else drafter.own_model
    if model is None:
        return None
    places = range(start, start + gamma)
    if cache:
        kv = sum(seen_bytes(cache, q) for q in places)
    else:
        itemsize = drafter.caches[0].spec.stored_dtype.itemsize
        kv = sum(kv_bytes(model.config, q + 1, itemsize) for q in places)
    return Reads(gamma, kv, gamma * model.weight_bytes(drafter.batch.n_rows))


def seen_bytes(cache: SparseKVCache, q: int) -> int:
    """Of K and V that row 0's query at q sees, in all layers and heads."""
    spec, pos = cache.spec, torch.full((cache.spec.batch_size, 1), q, device=cache.k[0].device)
    n_seen = int(cache.visible(pos)[:, 0].sum())
    for (_, n_recent), window in zip(cache.parts, spec.windows, strict=True):
        if window is not None:
            n_seen += spec.n_kv_head * int(cache.in_ring(pos, n_recent)[0].sum())
    return n_seen * 2 * spec.head_dim * spec.stored_dtype.itemsize


def show(r: Round, tokenizer: Tokenizer) -> str:
    """The round as text, in the width of the terminal."""
    gamma, n = len(r.drafts), len(r.text)
    tail = [word(tokenizer, r.text[:i], r.text[i]) for i in range(max(n - TAIL, 0), n)]
    lines = [("", f"{n:,} tokens are decided: ...{''.join(tail)}")]
    if r.sight:
        kinds = ", ".join(f"{sign} {KINDS[sign]}" for sign in KINDS if sign in r.sight)
        lines.append(("the draft sees", f"{kinds}: {n - r.sight.count('.')} tokens{r.where}"))
        lines.append(("", picture(r.sight, shutil.get_terminal_size().columns - LABEL - 4)))
    drafts, says = aligned(tokenizer, r)
    own = word(tokenizer, r.text + r.drafts[: r.n_kept], r.says[r.n_kept])
    ends = ", and the row ends" if len(r.new) <= r.n_kept else ""
    lines += [
        ("it drafts", drafts or "nothing"),
        ("the model says", says),
        ("kept", f"{r.n_kept} of {gamma}, then the model's own: {own}{ends}"),
        ("drafting reads", str(r.drafting or "nothing but the text")),
        ("checking reads", f"{r.checking}, {gamma + 1} tokens at once"),
        ("plain decoding", f"{r.plainly}, for the same {len(r.new)} tokens"),
    ]
    return "\n".join(f"  {label:{LABEL}}{text}" for label, text in lines).lstrip()


def aligned(tokenizer: Tokenizer, r: Round) -> tuple[str, str]:
    """What was drafted and what the model says, one below the other."""
    rows: list[list[str]] = []
    for tokens in (r.drafts, r.says):
        rows.append([word(tokenizer, r.text + r.drafts[:i], t) for i, t in enumerate(tokens)])
    drafts, says = rows
    says = [f"({text})" if i > r.n_kept else text for i, text in enumerate(says)]
    widths = [max(map(len, pair)) for pair in zip_longest(drafts, says, fillvalue="")]
    drafts, says = (
        [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
        for texts in (drafts, says)
    )
    return "  ".join(drafts).rstrip(), "  ".join(says).rstrip()


def word(tokenizer: Tokenizer, before: list[int], token: int) -> str:
    """A token as it reads behind others; its id where it has no text of its own."""
    if isinstance(tokenizer, NumberTokenizer):
        return str(token)
    return TextStream(tokenizer, before).feed([token]).translate(VISIBLE) or f"<{token}>"


def picture(sight: str, width: int) -> str:
    """The signs on one line of at most so many, at least 20: each of its part's first kind."""
    n = min(max(width, 20), len(sight))
    bounds = [i * len(sight) // n for i in range(n + 1)]
    parts = [sight[a:b] for a, b in pairwise(bounds)]
    return f"[{''.join(next((s for s in KINDS if s in part), '.') for part in parts)}]"


def size(n_bytes: int) -> str:
    """1.2 GB, 3.4 MB or 5.6 kB."""
    unit = next((u for u in ("GB", "MB") if n_bytes >= UNITS[u]), "kB")
    return f"{n_bytes / UNITS[unit]:,.1f} {unit}"
