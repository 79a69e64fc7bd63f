"""An engine that does all the work and draws what comes of it: for figures of speed alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sampling import noise, place_keys
from spec_decode import Engine


class SyntheticEngine(Engine):
    """Accepts drafts at a rate that is asked for, and reads prompts as fast as they can be made up.

    Every draft stays with the probability `rate`, given that those before it stayed, after all the
    work of drafting and verifying. The text means nothing. A prompt's K and V are random numbers:
    the time of a step depends on how many there are, not on what they are.
    """

    def __init__(self, *args, rate: float = 0.0, **options) -> None:
        super().__init__(*args, **options)
        self.threshold = torch.zeros((), device=self.device)  # a captured round reads it
        self.accept_at(rate)

    @torch.inference_mode()
    def accept_at(self, rate: float) -> None:
        """Draw at this rate from here on. ValueError if it is no probability."""
        if not 0 <= rate <= 1:
            raise ValueError(f"synthetic acceptance {rate} must be in 0..1")
        self.threshold.fill_(-torch.tensor(rate).log().neg().log())  # Gumbel noise is below it

    @torch.inference_mode()
    def accept(self, draft: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """n_accepted [B], drawn, and the target's next_token [B]; logits are [B, gamma + 1, V]."""
        _, next_token = super().accept(draft, logits)
        B, gamma = draft.shape
        pos = self.batch.seq_len[:, None] + torch.arange(gamma, device=self.device)
        drawn = noise(place_keys(torch.arange(B, device=self.device), pos), 1)[..., 0]
        return (drawn < self.threshold).long().cumprod(dim=1).sum(dim=1), next_token

    def read_row(
        self, b: int, length: int, n_cached: int = 0, tail: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """All tokens at once, and the last's hidden state [dim]: random, as their K and V are."""
        for buffer in self.full.k + self.full.v:
            row = buffer[b]
            if row.dtype.itemsize > 1:
                row.normal_()
            else:  # which float8 cannot
                row.copy_(torch.randn(row.shape, dtype=torch.bfloat16, device=row.device))
        norm = self.model.norm.weight
        yield length, torch.randn(len(norm), dtype=norm.dtype, device=norm.device)


def random_prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """Prompts of these lengths, of tokens that are drawn."""
    return [torch.randint(vocab_size, (n,)).tolist() for n in lengths]
