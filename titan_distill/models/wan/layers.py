"""The parts of a Wan block: attention, feed-forward, modulation.

Precision is a property of the parameters, not of a global switch: every part casts its input to its own weights' dtype,
so a model with bf16 weights computes in bf16, and a wrapper that gathers fp32 masters as bf16 needs no autocast. Three
things never leave fp32, whatever the weights: layer norms, modulation (scale, shift and gate, with the time MLP that
makes them) and the addition of a gated update to the residual stream.

Module names are diffusers', because checkpoints are.

Shape suffixes: B batch, L video tokens, S keys, M model width, N heads, D head dim, R rows of modulation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_distill.attention.causal import KeysAndValues, TextCache
from titan_distill.attention.dense import AttentionCall, dense_attention
from titan_distill.attention.sharded import ShardedAttention
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.tokens import TokenContext, apply_rotary
from titan_distill.parallelisms.tensor import local


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where `dtype` is fp64."""
    return torch.promote_types(dtype, torch.float32)


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32 (or better) even if its weights are stored in less."""

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)

    @staticmethod
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the layer with the given weights: this rank's shards under tensor parallelism."""
        dtype = at_least_float32(weight.dtype)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _unchanged(x: Tensor) -> Tensor:
    return x


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm that computes and returns fp32 (or better).

    `share` is applied to its parameters first. It is the identity unless ranks share its tokens.
    """

    share: Callable[[Tensor], Tensor] = staticmethod(_unchanged)

    def forward(self, x: Tensor) -> Tensor:
        dtype = at_least_float32(x.dtype)
        weight, bias = (p if p is None else self.share(local(p)).to(dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class GeluProjection(nn.Module):
    """Linear, then GELU."""

    def __init__(self, in_dim: int, out_dim: int, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x.to(self.proj.weight.dtype)), approximate=self.approximate)


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, approximate: str = "tanh") -> None:
        super().__init__()
        # Place 1 is diffusers' dropout, which Wan trains without; it only keeps the name of the last layer.
        self.net = nn.ModuleList(
            [GeluProjection(in_dim, hidden_dim, approximate), nn.Identity(), nn.Linear(hidden_dim, out_dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Attention(nn.Module):
    """Projections and q/k norms that self- and cross-attention share."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.head_dim = config.attention_head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        # Over the full width, not per head: under tensor parallelism its mean square needs a reduction.
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def split_heads(self, x_BLM: Tensor) -> Tensor:
        """[B, L, N, D]; N follows from the width, which is local under tensor parallelism."""
        return x_BLM.unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    """Self-attention of video tokens, computed by an exchangeable attention core."""

    def __init__(self, config: WanConfig, attention: ShardedAttention) -> None:
        super().__init__(config)
        self.attention = attention

    def forward(self, x_BLM: Tensor, context: TokenContext, to_gate: nn.Linear | None = None) -> Tensor:
        """Return [B, L, M]. `to_gate` is the block's layer for the gate of a sparse core; it is applied here, to what
        queries are made from, so that under tensor parallelism both enter the region together."""
        x_BLM = x_BLM.to(self.to_q.weight.dtype)
        q_BLND = apply_rotary(self.split_heads(self.norm_q(self.to_q(x_BLM))), context)
        k_BLND = apply_rotary(self.split_heads(self.norm_k(self.to_k(x_BLM))), context)
        v_BLND = self.split_heads(self.to_v(x_BLM))
        gate_BLND = None if to_gate is None else self.split_heads(to_gate(x_BLM))
        attention = self.attention if context.attention is None else context.attention
        call = AttentionCall(q_BLND, k_BLND, v_BLND, context.layout, gate_BLND, context.num_selected)
        mixed_BLND = attention(call)
        return self.to_out[0](mixed_BLND.flatten(2))


class CrossAttention(Attention):
    """Attention from video tokens to text and, in I2V models, to image tokens; the two results are summed."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(config.added_kv_proj_dim, config.inner_dim)
            self.add_v_proj = nn.Linear(config.added_kv_proj_dim, config.inner_dim)
            self.norm_added_k = nn.RMSNorm(config.inner_dim, eps=config.eps)

    def forward(
        self, x_BLM: Tensor, text_BSM: Tensor, image_BSM: Tensor | None, cache: TextCache | None = None
    ) -> Tensor:
        """Return [B, L, M]. For forwards without gradient, `cache` holds the text's keys and values; the first one
        fills it."""
        dtype = self.to_q.weight.dtype
        q_BLND = self.split_heads(self.norm_q(self.to_q(x_BLM.to(dtype))))
        mixed_BLND = dense_attention(q_BLND, *self._text_keys_and_values(text_BSM.to(dtype), cache))
        if image_BSM is not None:
            image_BSM = image_BSM.to(dtype)
            k_BSND = self.split_heads(self.norm_added_k(self.add_k_proj(image_BSM)))
            mixed_BLND = mixed_BLND + dense_attention(q_BLND, k_BSND, self.split_heads(self.add_v_proj(image_BSM)))
        return self.to_out[0](mixed_BLND.flatten(2))

    def _text_keys_and_values(self, text_BSM: Tensor, cache: TextCache | None) -> KeysAndValues:
        if cache is None or torch.is_grad_enabled():
            return self.split_heads(self.norm_k(self.to_k(text_BSM))), self.split_heads(self.to_v(text_BSM))
        if cache.keys_and_values is None:
            cache.keys_and_values = self._text_keys_and_values(text_BSM, None)
        return cache.keys_and_values


def modulation_parts(rows_RKM: Tensor, row_BL: Tensor | None) -> list[Tensor]:
    """Split modulation rows into their K parts, each [B, 1, M] (row b for sample b) or, with `row_BL`, [B, L, M].

    Indexing goes through `embedding`, whose backward sums the gradients of a repeated row without atomics: the result
    does not change from run to run.
    """
    parts = rows_RKM.unbind(1)
    if row_BL is None:
        return [part[:, None] for part in parts]
    return [F.embedding(row_BL, part) for part in parts]


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed * (1 + scale) + shift, fp32."""
    return torch.addcmul(shift, normed, 1 + scale)


def add_gated(residual: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """residual + update * gate, computed in fp32, in the residual's dtype."""
    return torch.addcmul(residual.to(gate.dtype), update.to(gate.dtype), gate).to(residual.dtype)


class WanBlock(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward.

    `share` is applied to the modulation first. It is the identity unless ranks share the tokens.
    """

    share: Callable[[Tensor], Tensor] = staticmethod(_unchanged)

    def __init__(self, config: WanConfig, attention: ShardedAttention) -> None:
        super().__init__()
        dim = config.inner_dim
        self.norm1 = Float32LayerNorm(dim, config.eps, elementwise_affine=False)
        self.attn1 = SelfAttention(config, attention)
        # The name and the place that published sparse checkpoints have it under.
        self.to_gate_compress = nn.Linear(dim, dim) if config.sparse_attention else None
        self.norm2 = Float32LayerNorm(dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.attn2 = CrossAttention(config)
        self.norm3 = Float32LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, config.ffn_dim, dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x_BLM: Tensor, text_BSM: Tensor, image_BSM: Tensor | None, rows_R6M: Tensor, context: TokenContext
    ) -> Tensor:
        """Return the tokens after this block, in x's dtype.

        Args:
            x_BLM: video tokens, tile order.
            text_BSM: text tokens.
            image_BSM: image tokens of I2V models, else None.
            rows_R6M: fp32 time modulation: shift, scale, gate of self-attention, then of the feed-forward.
            context: the tokens' tiles, phases and rows.
        """
        rows_R6M = self.share(rows_R6M + local(self.scale_shift_table))
        # In two halves: per-token parts are as large as the activations.
        shift, scale, gate = modulation_parts(rows_R6M[:, :3], context.row_BL)
        modulated_BLM = modulate(self.norm1(x_BLM), shift, scale)
        x_BLM = add_gated(x_BLM, self.attn1(modulated_BLM, context, self.to_gate_compress), gate)
        x_BLM = x_BLM + self.attn2(self.norm2(x_BLM), text_BSM, image_BSM, context.text)
        shift, scale, gate = modulation_parts(rows_R6M[:, 3:], context.row_BL)
        return add_gated(x_BLM, self.ffn(modulate(self.norm3(x_BLM), shift, scale)), gate)
