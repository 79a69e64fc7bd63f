"""Prompt lookup and self-draft in one round: each row takes the one that keeps more."""

import pytest
import torch

from drafters import OPTIMISM, LookupDrafter, MixedDrafter, SelfDrafter
from lookup import NGRAM
from policies import Strategy
from spec_decode import Engine
from tests.reference import tiny_model
from tests.test_spec_decode import GREEDY, PROMPTS

GAMMA, WRONG = 3, 999
KEY = [*range(1, NGRAM + 2)]
START = 2 * len(KEY) + 1  # so many tokens end with a key that occurred before
MISLEADING = [token for i in range(40) for token in (*KEY, 20 + i)]  # lookup is wrong after a key
PERIODIC = KEY * 50
NEW = [*range(300, 500)]  # nothing repeats


class Game:
    """Rounds over texts that are known. The self-draft is right in some rows, else wrong."""

    def __init__(self, monkeypatch, texts: list[list[int]], right: list[bool], kind=MixedDrafter):
        self.engine = Engine(tiny_model(), len(texts), 300, Strategy("mixed", GAMMA, 24), GREEDY)
        self.batch, self.drafter = self.engine.batch, self.engine.drafter
        self.texts, self.kind, self.own = texts, kind, torch.tensor(right)[:, None]
        self.begin()
        self.drafter.away, self.drafter.found = False, None  # the latter as a LookupDrafter
        monkeypatch.setattr(SelfDrafter, "propose", lambda _, gamma, pick: self.self_draft(gamma))

    def begin(self) -> None:
        for row, text in zip(self.batch.tokens, self.texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        self.batch.seq_len.fill_(START)

    def ahead(self, gamma: int) -> torch.Tensor:
        place = self.batch.seq_len[:, None] + torch.arange(gamma)
        return self.batch.tokens.gather(1, place)

    def self_draft(self, gamma: int) -> torch.Tensor:
        return torch.where(self.own, self.ahead(gamma), WRONG)

    def round(self, gamma: int = GAMMA) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts, and how many a row kept. The text goes on behind them."""
        drafts = self.kind.propose(self.drafter, gamma, None)
        assert torch.equal(self.kind.propose(self.drafter, gamma, None), drafts)  # decides nothing
        kept = (drafts == self.ahead(gamma)).cumprod(dim=1).sum(dim=1)
        self.batch.seq_len.add_(kept + 1)
        return drafts, kept


def test_a_row_that_repeats_itself_is_copied_and_a_new_one_drafted(monkeypatch):
    game = Game(monkeypatch, [PERIODIC, NEW, PERIODIC], [False, False, True])
    expected = game.ahead(GAMMA)
    drafts, kept = game.round()
    assert torch.equal(drafts[[0, 2]], expected[[0, 2]])
    assert drafts[1].tolist() == [WRONG] * GAMMA and kept.tolist() == [GAMMA, 0, GAMMA]


def test_a_row_in_which_lookup_is_wrong_gives_it_up_and_comes_back(monkeypatch):
    """While the self-draft is right. Then that is wrong, and lookup as good or better."""
    game = Game(monkeypatch, [MISLEADING, MISLEADING], [True, False])
    kept = torch.stack([game.round()[1] for _ in range(20)])
    assert kept[0].tolist() == [0, 0]  # both begin with lookup
    assert kept[-4:, 0].tolist() == [GAMMA] * 4 and game.drafter.gain[0] < 0
    assert game.drafter.gain[1] > 0  # nothing better is known
    game.texts = [PERIODIC, PERIODIC]
    game.begin()
    game.own.fill_(False)
    kept = torch.stack([game.round()[1] for _ in range(12)])
    assert kept[0].tolist() == [0, GAMMA] and kept[-3:].tolist() == [[GAMMA] * 2] * 3


@pytest.mark.parametrize("texts, right", [
    ([MISLEADING, PERIODIC], [True, False]), ([PERIODIC, NEW], [False, True]),
    ([MISLEADING, MISLEADING], [True, True]), ([PERIODIC, PERIODIC], [False, False]),
])  # fmt: skip
def test_it_is_as_good_as_the_better_part_in_every_row(monkeypatch, texts, right):
    """In tokens of 45 rounds, but for the few in which a misled row learns whom to believe."""
    tokens = {}
    for kind in (MixedDrafter, LookupDrafter, SelfDrafter):
        game = Game(monkeypatch, texts, right, kind)
        for _ in range(45):
            game.round()
        tokens[kind] = game.batch.seq_len - START
    mixed, copied, own = tokens.values()
    better = copied.maximum(own)
    assert (mixed >= 0.9 * better).all()
    assert all(mixed[b] == better[b] for b in range(2) if texts[b] is not MISLEADING)


def test_a_row_that_begins_anew_has_learned_nothing(monkeypatch):
    game = Game(monkeypatch, [MISLEADING, MISLEADING], [True, True])
    for _ in range(20):
        game.round()
    learned = game.drafter.gain[0].item()
    assert learned < 0 and game.drafter.gain.tolist() == [learned] * 2
    game.drafter.start(1)
    assert game.drafter.gain.tolist() == [learned, OPTIMISM]
    game.drafter.rewind()
    game.drafter.learn()  # the rounds before taught what they could
    assert game.drafter.gain.tolist() == [OPTIMISM] * 2


def test_rounds_of_others_teach_it_nothing(monkeypatch):
    """It does not know what it would have proposed in them."""
    game = Game(monkeypatch, [PERIODIC, NEW], [False, False])
    game.round()
    game.drafter.leave()
    game.batch.seq_len.add_(2)
    game.drafter.read_missed()
    game.round()
    assert game.drafter.gain.tolist() == [OPTIMISM] * 2
    game.round()
    assert game.drafter.gain.tolist() == [pytest.approx(0.9 * OPTIMISM + 0.1 * GAMMA), OPTIMISM]


def test_what_it_learns_is_the_difference_of_what_both_would_have_kept(monkeypatch):
    """Of drafts that were decided: the second one of a round that kept none is not known."""
    game = Game(monkeypatch, [PERIODIC, MISLEADING, NEW], [False, True, True])
    game.drafter.gain.zero_()
    _, kept = game.round(2)
    assert kept.tolist() == [2, 0, 2]
    game.drafter.learn()
    assert game.drafter.gain.tolist() == pytest.approx([0.2, -0.1, 0])


def test_the_engines_own_rounds_teach_it():
    """Random weights soon repeat themselves: more is kept than by the self-draft alone.

    Rounds would not show it: they are those of the slowest row.
    """
    kept = {}
    for policy in ("mixed", "snapkv"):
        engine = Engine(tiny_model(), 4, 180, Strategy(policy, 3, 24, 3, obs_window=7), GREEDY)
        engine.prefill(PROMPTS, [100] * 4)
        engine.run()
        kept[policy] = engine.batch.stats().draft_acceptance_rate
    assert kept["mixed"] > kept["snapkv"]
