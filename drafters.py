"""Who drafts: the table of all drafters, and those without a model of their own.

    SelfDrafter              the target's weights, or a low-precision copy of them, with a sparse
                             cache of the target's own K and V
    LookupDrafter            no model: what followed these tokens the last time (prompt lookup)
    MixedDrafter             both at once: in every row the one that is expected to keep more

**Two drafters in one round.** Beside a self-draft prompt lookup costs nothing. So `MixedDrafter`
lets both propose. A row whose newest NGRAM tokens occurred before takes what lookup says, others
take the self-draft. The next round knows the text that both should have foreseen. From that a row
learns how many drafts more lookup keeps, and believes it only while that is not negative. Both are
judged, whichever was taken: a row returns to lookup when that would have been right again.

`draft_models.py` has the three with a small model. A `Strategy` says how to draft, `DRAFTERS` which
class does it. A new drafter is one class (its interface: `drafter.py`) and one line in `DRAFTERS`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from config import ModelConfig
from draft_models import ModelDrafter, SparseModelDrafter, StreamingModelDrafter
from drafter import Drafter, Pick, Target
from kernels import compile_step
from kv_cache import NEVER, KVCache
from lookup import NGRAM, lookup, trust
from model import Caches, Transformer
from policies import POLICIES, Strategy
from quantize import emulated
from selection import Selection

OPTIMISM = 0.5  # drafts that lookup is believed to keep more, before a row has learned
RATE = 0.1  # weight of the latest round in what it has learned
NO_TOKEN = -1


class SelfDrafter(Drafter):
    """Self-speculation: the target itself or its twin, reading a few of the target's K and V."""

    has_twin = True

    def __init__(self, strategy: Strategy, target: Target, draft_model: None = None) -> None:
        super().__init__(strategy, target)
        self.model = target.twins.get(strategy.weights)
        self.places = torch.arange(strategy.gamma, device=self.batch.seq_len.device)  # [gamma]
        self.one_graph = compile_step(SelfDrafter.eager_logits, self.model)
        (self.sparse,) = self.writes = self.caches
        self.n_selected = self.sparse.n_selected
        self.selection = Selection(strategy, target.model, target.full, self.sparse)

    @staticmethod
    def build(strategy, spec, capacity, finished=None) -> Caches:
        if strategy.weights == "bf16" and spec.stored_dtype == torch.float32:
            spec = replace(spec, draft_dtype=torch.bfloat16)
        return (strategy.sparse_cache(spec, capacity),)

    def renew(self, b: int | None = None) -> None:
        self.selection.renew(self.batch.tokens, self.batch.seq_len - 1, b)

    def select(self, b: int | None = None) -> None:
        self.selection.select(self.batch.seq_len - 1, b)

    def label(self, model_name: str) -> str:
        kind, model = self.strategy.weights, self.target.model
        how = " emulated" * emulated(kind, model.config, model.norm.weight.device)
        copy = f", with weights in{how} {kind}" if kind != "same" else ""
        return super().label(model_name) + copy

    def logits(self, i: int | Tensor, token: Tensor) -> Tensor:
        if self.one_graph is None:
            return self.eager_logits(i, token)
        return self.one_graph(self, self.places[i], token)

    def eager_logits(self, i: int | Tensor, token: Tensor) -> Tensor:  # [], [B, 1] -> [B, V]
        """The same, not compiled into one function."""
        return self.model(token, self.batch.seq_len[:, None] - 1 + i, self.sparse)[:, -1]


class LookupDrafter(Drafter):
    """Prompt lookup: copies from the row's own text. No model, no cache, no doubt."""

    def __init__(self, strategy: Strategy, target: Target, draft_model: None = None) -> None:
        super().__init__(strategy, target)
        self.trust = trust(strategy.gamma)
        self.found: Tensor | None = None  # drafts for the text as it is

    def propose(self, gamma: int, pick: Pick) -> Tensor:
        found, self.found = self.found, None
        if found is None:
            found, _ = lookup(self.batch.tokens, self.batch.seq_len, gamma)
        return found[:, :gamma]

    def copies(self) -> Tensor:
        return torch.ones_like(self.batch.finished)

    def label(self, model_name: str) -> str:
        return f"prompt lookup, matches of at most {NGRAM} tokens"

    def kinds(self) -> list[int]:
        """The lengths of the matches. On a CPU the next round need not look again."""
        drafts, match = lookup(self.batch.tokens, self.batch.seq_len, self.strategy.gamma)
        self.found = drafts if drafts.device.type == "cpu" else None  # a GPU replays a whole round
        return match.tolist()

    def leave(self) -> None:
        super().leave()
        self.found = None

    def forget(self, rows: slice, n_kept: int) -> None:
        super().forget(rows, n_kept)
        self.found = None

    def rewind(self) -> None:
        super().rewind()
        self.found = None


class MixedDrafter(SelfDrafter):
    """In every row prompt lookup or the self-draft, by what both would have kept there so far."""

    reads = "prompt lookup where it keeps more, else " + SelfDrafter.reads

    def __init__(self, strategy: Strategy, target: Target, draft_model: None = None) -> None:
        super().__init__(strategy, target)
        seq_len = self.batch.seq_len
        self.proposed = seq_len.new_zeros(2, len(seq_len), strategy.gamma)  # by lookup, by itself,
        self.place = torch.empty_like(seq_len)  # [B], for this place and the next ones; or NEVER
        self.gain = torch.empty_like(seq_len, dtype=torch.float32)  # [B], drafts that lookup keeps
        self.catch_up(self.n_read)  # more, an average

    def catch_up(self, n_read: Tensor, b: int | None = None) -> None:
        rows = slice(None) if b is None else slice(b, b + 1)
        self.place[rows], self.gain[rows] = NEVER, OPTIMISM

    def rewind(self) -> None:
        super().rewind()
        self.catch_up(self.n_read)

    def propose(self, gamma: int, pick: Pick) -> Tensor:
        self.learn()
        copied, match = lookup(self.batch.tokens, self.batch.seq_len, gamma)
        drafts = torch.stack((copied, super().propose(gamma, pick)))
        self.proposed.fill_(NO_TOKEN)[..., :gamma] = drafts
        self.place.copy_(torch.where(match == NGRAM, self.batch.seq_len, NEVER))
        return torch.where(self.copies()[:, None], *drafts)

    def copies(self) -> Tensor:
        return (self.place == self.batch.seq_len) & (self.gain >= 0)

    def learn(self) -> None:
        """Compare what both proposed last with what was decided; nothing where that is nothing."""
        tokens, seq_len = self.batch.tokens, self.batch.seq_len[:, None]
        place = self.place[:, None] + torch.arange(self.strategy.gamma, device=tokens.device)
        right = self.proposed == tokens.gather(1, place.clamp_max(tokens.shape[1] - 1))
        copied, own = (right & (place < seq_len)).cumprod(dim=2).sum(dim=2)
        decided = self.place < self.batch.seq_len
        self.gain.add_(RATE * decided * (copied - own - self.gain))


ANY_POLICY = "a name in POLICIES"
DRAFTERS: dict[tuple[str, bool], type[Drafter]] = {  # by policy, and whether by a draft model
    ("full", True): ModelDrafter,
    ("streaming", True): StreamingModelDrafter,
    (ANY_POLICY, True): SparseModelDrafter,
    (ANY_POLICY, False): SelfDrafter,
    ("ngram", False): LookupDrafter,
    ("mixed", False): MixedDrafter,
}


def check_name(policy: str) -> None:
    """ValueError for a policy by which nobody drafts, with a draft model or without one."""
    others = dict.fromkeys(name for name, _ in DRAFTERS if name not in (ANY_POLICY, *POLICIES))
    known = ["none", *POLICIES, *others]
    if policy not in known:
        raise ValueError(
            f"draft policy {policy!r} is unknown; known: {', '.join(known)}, and for --draft also "
            f"auto"
        )


def shared_policies() -> list[str]:
    """Those by which a draft model drafts as well as the target itself."""
    return [name for name in POLICIES if (name, False) not in DRAFTERS]


def drafter_class(strategy: Strategy, own_model: bool) -> type[Drafter]:
    """Who does it. ValueError if nobody does, with a draft model or without one."""
    name = strategy.policy
    check_name(name)
    kind = DRAFTERS.get((name, own_model))
    if kind is None and name in shared_policies():
        kind = DRAFTERS[ANY_POLICY, own_model]
    if kind is not None:
        return kind
    if (name, True) in DRAFTERS:
        raise ValueError(
            f"draft policy {name} needs a draft model (--draft_checkpoint_path): the target "
            "itself, with all of its KV, would draft no faster than it decodes"
        )
    raise ValueError(f"draft policy {name} has no use for a draft model")


def with_weights(strategy: Strategy, kind: str, own_model: bool) -> Strategy:
    """The same with draft weights of that kind, if it drafts with the target. Raises as above."""
    if strategy.enabled and drafter_class(strategy, own_model).has_twin:
        return replace(strategy, weights=kind)
    return strategy


def check_strategy(strategy: Strategy, draft: ModelConfig | None, max_len: int) -> None:
    """ValueError if the strategy does not go with the draft model, or with texts of max_len."""
    kind = None
    if strategy.enabled or draft is not None:
        kind = drafter_class(strategy, draft is not None)
        kind.check(strategy, draft, max_len)
    if strategy.weights != "same" and not (kind and kind.has_twin):
        who = "a draft model" if draft else f"draft policy {strategy.policy}"
        raise ValueError(
            f"draft_weights {strategy.weights} is for self-speculation: {who} does not draft with "
            f"the target's weights"
        )


def draft_cache_bytes(
    strategy: Strategy,
    full: KVCache,  # the target's, allocated or not
    draft_model: Transformer | None,
) -> int:
    """What the drafter's own caches will take."""
    if not strategy.enabled:
        return 0
    kind = drafter_class(strategy, draft_model is not None)
    caches = kind.own_caches(strategy, full, draft_model, allocated=False)
    return sum(cache.n_bytes for cache in caches)
