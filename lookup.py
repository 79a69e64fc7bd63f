"""Prompt lookup: what followed these tokens the last time. A draft without a model.

Texts repeat themselves: code, tables, quotations, answers about a document. So the newest tokens
are looked for in the row's own text. What followed their latest earlier occurrence is proposed::

    ... def read ( path ) : ... ... def read (        the newest 3 tokens: "def read ("
        ^^^^^^^^^^ followed by "path ) :"              proposed: path ) :

It costs next to nothing, and has nothing to say about text that is new: the length of the match
tells how far it may be trusted, before a single forward.
"""

import torch
from torch import Tensor

NGRAM = 3  # prompt lookup matches the newest 3 tokens, or as many as it can


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


def trust(gamma: int) -> list[list[float]]:  # [NGRAM + 1, gamma]
    """How likely a draft is kept if all before it are, by the length of the match and by place.

    Copies have no usual length: of n tokens or more there are as many as 1 / n says. So one that
    was right n times, in its match and since, is so once more with n / (n + 1).
    """
    return [[n / (n + 1) for n in range(match, match + gamma)] for match in range(NGRAM + 1)]
