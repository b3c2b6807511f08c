"""Video sparse attention in fp64 with dense masks, from the definition: what kernels and twins are measured against.

The oracle is in raster order and made from coordinates; no layout, list or tile of `titan_kernels` enters it. Scores,
masks and probabilities are full matrices, so it serves a few thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from titan_kernels import TileLayout
from torch import Tensor

Grid = tuple[int, int, int]

GRIDS: dict[str, Grid] = {
    "whole": (8, 4, 8),
    "one axis ragged": (8, 4, 5),
    "two axes ragged": (4, 6, 9),
    "three axes ragged": (5, 6, 7),
    "tiles of one token": (5, 5, 9),
}


NAMES = ("out", "dq", "dk", "dv", "dgate")


class Oracle:
    """The definition on one grid.

    Args:
        grid: tokens along (frames, height, width).
        tile: tokens of a tile along the same.
        tiles_per_list: neighbouring query tiles, in raster order of the tiles, that share a choice.
    """

    def __init__(self, grid: Grid, tile: Grid = (4, 4, 4), tiles_per_list: int = 1, device: str = "cpu") -> None:
        tokens = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))
        cells = tokens // torch.tensor(tile, device=device)
        counts = [math.ceil(size / step) for size, step in zip(grid, tile)]
        self.tile_of_token = (cells[:, 0] * counts[1] + cells[:, 1]) * counts[2] + cells[:, 2]
        self.num_tiles = math.prod(counts)
        self.group_of_token = self.tile_of_token // tiles_per_list
        self.num_groups = math.ceil(self.num_tiles / tiles_per_list)

    def means(self, x: Tensor, group: Tensor, count: int) -> Tensor:
        """[B, groups, H, D] of x [B, L, H, D]."""
        member = torch.nn.functional.one_hot(group, count).to(x.dtype)
        return torch.einsum("lg,blhd->bghd", member / member.sum(0), x)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, groups, tiles]: what a tile is chosen by."""
        q, k = self.means(q, self.group_of_token, self.num_groups), self.means(k, self.tile_of_token, self.num_tiles)
        return torch.einsum("bghd,bthd->bhgt", q, k) / math.sqrt(q.shape[-1])

    def choice(self, scores: Tensor, topk: int) -> Tensor:
        """The tiles that each group attends to, bool [B, H, groups, tiles]: fewer than topk precede them."""
        index = torch.arange(self.num_tiles, device=scores.device)
        before = index[:, None] < index
        higher = scores[..., :, None] > scores[..., None, :]
        equal = scores[..., :, None] == scores[..., None, :]
        return (higher | equal & before).sum(-2) < topk

    def attention(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, chosen: Tensor) -> Tensor:
        """The output for a choice."""
        scale = 1 / math.sqrt(q.shape[-1])
        mask = chosen[:, :, self.group_of_token][..., self.tile_of_token]
        scores = (torch.einsum("blhd,bshd->bhls", q, k) * scale).masked_fill(~mask, -math.inf)
        out = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
        if gate is None:
            return out
        q, k, v = (self.means(x, self.tile_of_token, self.num_tiles) for x in (q, k, v))
        coarse_weights = (torch.einsum("bnhd,bthd->bhnt", q, k) * scale).softmax(-1)
        return out + gate * torch.einsum("bhnt,bthd->bnhd", coarse_weights, v)[:, self.tile_of_token]

    def fused(self, inputs: Sequence[Tensor], grad: Tensor, topk: int) -> tuple[Tensor, ...]:
        """Output and gradients of q, k and v by PyTorch's own attention under the mask of the choice, in the dtype of
        the inputs: how good arithmetic in that dtype can be.

        At large inputs a softmax passes next to no gradient, and what is left are differences of large rounded terms.
        """
        chosen = self.choice(self.scores(inputs[0].double(), inputs[1].double()), topk)
        mask = chosen[:, :, self.group_of_token][..., self.tile_of_token]
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
        by_head = (x.transpose(1, 2) for x in leaves)
        out = torch.nn.functional.scaled_dot_product_attention(*by_head, attn_mask=mask).transpose(1, 2)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def limit(self, inputs: Sequence[Tensor], grad: Tensor, topk: int, tolerance: float) -> float:
        """The largest allowed `error`: `tolerance`, or twice the worst of `fused` where that is more."""
        expected = self(inputs[:3], grad, topk)
        return max(tolerance, 2 * max(map(error, self.fused(inputs, grad, topk), expected)))

    def __call__(
        self, inputs: Sequence[Tensor], grad: Tensor, topk: int, chosen: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Output and gradients, in the order of `NAMES`, for (q, k, v) or (q, k, v, gate) of any float dtype.

        `chosen` overrides the choice, where another one, by less exact scores, is as good.
        """
        leaves = [x.detach().double().requires_grad_() for x in inputs]
        if chosen is None:
            with torch.no_grad():
                chosen = self.choice(self.scores(leaves[0], leaves[1]), topk)
        out = self.attention(*leaves[:3], leaves[3] if len(leaves) > 3 else None, chosen)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def error(actual: Tensor, expected: Tensor) -> float:
    """Distance relative to the norm of what is expected; NaN for NaN."""
    return (actual.double() - expected).norm().item() / expected.norm().item()


def run(
    attention: Callable[..., Tensor], layout: TileLayout, inputs: Sequence[Tensor], grad: Tensor, topk: int
) -> tuple[Tensor, ...]:
    """As the oracle, by a function in tile order with the arguments of `video_sparse_attention`."""
    leaves = [x[:, layout.permutation].requires_grad_() for x in inputs]
    out = attention(*leaves[:3], layout, topk, *leaves[3:])
    gradients = torch.autograd.grad(out, leaves, grad[:, layout.permutation])
    return tuple(x.detach()[:, layout.inverse] for x in (out, *gradients))


def random_inputs(
    grid: Grid, heads: int, head_dim: int, dtype: torch.dtype, scale: float = 1, batch: int = 1, device: str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, gate and an output gradient in raster order, as `dtype` rounds them; equal on every device.

    `scale` is that of q, k and v. Neighbours resemble each other, so that tiles differ and their choice matters.
    """
    generator = torch.Generator().manual_seed(math.prod(grid) * 1000 + heads * 131 + head_dim)

    def draw() -> Tensor:
        fine = torch.randn(batch, *grid, heads, head_dim, generator=generator)
        coarse = torch.randn(batch, *(math.ceil(size / 3) for size in grid), heads, head_dim, generator=generator)
        for dim, size in enumerate(grid, start=1):
            coarse = coarse.repeat_interleave(3, dim).narrow(dim, 0, size)
        return ((fine + coarse) / math.sqrt(2)).flatten(1, 3)

    q, k, v, gate, grad = (draw() for _ in range(5))
    return [x.to(device, dtype) for x in (q * scale, k * scale, v * scale, gate)], grad.to(device, dtype)
