"""A decoder that works the way gpt-fast does (github.com/meta-pytorch/gpt-fast), in our own words.

K and V of a layer lie in static buffers [B, Hkv, S, D], which are written in place. All rows are at
the same position, so the mask of a step is a row of a lower triangle. Attention is PyTorch's
`scaled_dot_product_attention` over the whole buffer, masked: its kernel, or (`fused` False) its
mathematics, which are written out here because compiled graphs are cached without regard to
`sdpa_kernel`. A step, from the embedding to the argmax, is one compiled function of static shape.

The weights are those of this program's Transformer, of the plain Llama family: RMSNorm, RoPE
without scaling, SiLU, no biases.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Attention, RMSNorm, Transformer, rotate

CHUNK = 128  # prompt tokens per forward


class Place(NamedTuple):
    """Where the tokens of a forward are, the same for all rows, and how they attend."""

    pos: Tensor  # [T]
    mask: Tensor  # [T, S] bool, the slots that each of them sees
    rope: tuple[Tensor, Tensor]  # cos and sin, each [T, 1, D / 2]
    fused: bool


class GptFast:
    """Weights, static KV cache, mask and a table of rotations for rows of up to max_len tokens."""

    def __init__(
        self, model: Transformer, batch_size: int, max_len: int, fused: bool, compiled: bool
    ) -> None:
        self.model, self.fused, c = model, fused, model.config
        S = -(-max_len // 8) * 8
        self.mask = torch.ones(S, S, dtype=torch.bool).tril()  # [query, slot]
        angle = (torch.arange(S)[:, None] * model.rope_freq[0])[:, None]
        self.cos, self.sin = angle.cos(), angle.sin()  # [S, 1, D / 2]
        shape = batch_size, c.n_kv_head, S, c.head_dim
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
        how = {"mode": "default", "fullgraph": True, "dynamic": False}
        self.step = torch.compile(self.next_token, **how) if compiled else self.next_token

    @torch.inference_mode()
    def prefill(self, prompts: Tensor) -> Tensor:  # [B, T] -> [B]
        """The first new token of every row, after prompts of one length."""
        for start in range(0, prompts.shape[1], CHUNK):
            tokens = prompts[:, start : start + CHUNK]
            first = self.next_token(tokens, start + torch.arange(tokens.shape[1]))
        return first

    @torch.inference_mode()
    def decode_one(self, token: Tensor, pos: int) -> Tensor:  # [B] -> [B]
        """The token after this one, which is at position `pos` of every row."""
        return self.step(token[:, None], torch.tensor([pos]))

    def next_token(self, tokens: Tensor, pos: Tensor) -> Tensor:  # [B, T], [T] -> [B]
        """Write K and V of these tokens in place; the greedy choice after the last of them."""
        place = Place(pos, self.mask[pos], (self.cos[pos], self.sin[pos]), self.fused)
        x = self.model.tok_embeddings(tokens)
        for layer, kv in zip(self.model.layers, self.cache, strict=True):
            x = x + attention(layer.attention, norm(layer.attention_norm, x), kv, place)
            ffn = layer.feed_forward
            gate, up = ffn.w_gate_up(norm(layer.ffn_norm, x)).chunk(2, dim=-1)
            x = x + ffn.w_down(F.silu(gate) * up)
        return self.model.output(norm(self.model.norm, x[:, -1])).argmax(dim=-1)


def norm(weights: RMSNorm, x: Tensor) -> Tensor:  # [..., dim] -> [..., dim]
    """x / rms(x) * w."""
    return F.rms_norm(x, weights.weight.shape, weights.weight, weights.eps)


def attention(
    weights: Attention,
    x: Tensor,  # [B, T, dim]
    kv: tuple[Tensor, Tensor],  # each [B, Hkv, S, D], written in place
    place: Place,
) -> Tensor:  # [B, T, dim]
    """Of these tokens to the whole buffer, behind the mask."""
    B, T, _ = x.shape
    c, G = weights.config, weights.config.n_group
    heads = weights.wqkv(x).view(B, T, -1, c.head_dim)
    q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
    q, k, v = (y.transpose(1, 2) for y in (rotate(q, *place.rope), rotate(k, *place.rope), v))
    for buffer, new in zip(kv, (k, v), strict=True):
        buffer[:, :, place.pos] = new
    if place.fused:
        y = F.scaled_dot_product_attention(q, *kv, attn_mask=place.mask, enable_gqa=G > 1)
    else:
        k, v = (buffer.repeat_interleave(G, dim=1) for buffer in kv) if G > 1 else kv
        scores = q @ k.transpose(-1, -2) * c.head_dim**-0.5
        y = scores.masked_fill(~place.mask, -torch.inf).softmax(dim=-1) @ v
    return weights.wo(y.transpose(1, 2).reshape(B, T, -1))
