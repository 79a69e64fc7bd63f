"""Prompt lookup: what followed these tokens the last time. A draft without a model.

Texts repeat themselves: code, tables, quotations, answers about a document. So the newest tokens
are looked for in the row's own text. What followed their latest earlier occurrence is proposed::

    ... def read ( path ) : ... ... def read (        the newest 3 tokens: "def read ("
        ^^^^^^^^^^ followed by "path ) :"              proposed: path ) :

It costs next to nothing, and has nothing to say about text that is new: the length of the match
tells how far it may be trusted. And it can be judged in hindsight: what it would have proposed at
any place of a text is known without a single forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NGRAM = 3  # prompt lookup matches the newest 3 tokens, or as many as it can

# [B, gamma + 1] both: how often a row kept n drafts, and how often it had n, at index n.
Histograms = tuple[Tensor, Tensor]


def lookup(tokens: Tensor, seq_len: Tensor, gamma: int) -> tuple[Tensor, Tensor]:
    """What followed the latest earlier occurrence of the newest tokens, the longest match first.

    tokens [B, S] and seq_len [B] to drafts [B, gamma] and the length of the match [B], 0 to NGRAM.
    Where the occurrence is so near that the copy runs into the end of the text, it goes on
    periodically. Without any occurrence the newest token is repeated.
    """
    newest, S = seq_len[:, None] - 1, tokens.shape[1]
    end = torch.arange(S, device=tokens.device)  # where an occurrence would end
    earlier = end < newest
    same, matched = earlier.clone(), torch.zeros_like(tokens, dtype=torch.int8)
    for n in range(NGRAM):
        key = tokens.gather(1, (newest - n).clamp_min(0))
        same[:, n:].logical_and_(tokens[:, : S - n] == key)
        same[:, :n].fill_(False)
        matched += same
    length = matched.amax(dim=1, keepdim=True)
    end = torch.where(earlier & (matched == length), end, -1).amax(dim=1, keepdim=True)
    copied = torch.arange(gamma, device=tokens.device) % (newest - end)
    return tokens.gather(1, end + 1 + copied), length[:, 0].long()


def look_back(
    tokens: Tensor,  # [B, S]
    seq_len: Tensor,  # [B], decided tokens of each row
    finished: Tensor,  # [B] bool, rows that are not judged by
    gamma: int,
) -> Histograms:
    """How often rows would have kept 0, 1, .. gamma drafts in the rounds for their last tokens.

    Copies to the host.
    """
    B, device = len(seq_len), tokens.device
    n = min(max(64 // B, 4), 12)  # tokens per row
    length = seq_len[:, None] - torch.arange(gamma + n - 1, gamma - 1, -1, device=device)  # [B, n]
    exists = length >= 2
    length = length.clamp_min(2).reshape(-1, 1)  # [B * n, 1]
    tokens = tokens.repeat_interleave(n, dim=0)
    actual = tokens.gather(1, length + torch.arange(gamma, device=device))
    same = lookup(tokens, length[:, 0], gamma)[0] == actual
    kept = same.long().cumprod(dim=1).sum(dim=1).view(-1, n)
    kept = kept.masked_fill(~exists, -1).masked_fill(finished[:, None], -1)
    accepted = torch.zeros(B, gamma + 1, dtype=torch.int64)
    for histogram, row in zip(accepted, kept.tolist(), strict=True):
        i = row.count(-1)
        while i < n:
            histogram[row[i]] += 1
            i += row[i] + 1
    return accepted, F.pad(accepted.sum(dim=1, keepdim=True), (gamma, 0))
