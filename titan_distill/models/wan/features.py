"""The hidden states of a Wan transformer between its blocks, for heads that read them.

A forward hook records each block's output. If sequence ranks share the tokens, each returns its own, and the head's
results are averaged over the group. In a tensor-parallel token region the ranks first gather their tokens, as after the
last block. Padding is dropped.

Shape suffixes: B batch, L this rank's tokens, M model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from titan_kernels import TileLayout, tile_layout
from torch import Tensor, nn

from titan_distill.models.wan.tokens import token_grid
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms import collectives


def block_outputs(
    transformer: WanTransformer, depths: Sequence[int], x: Tensor, forward: Callable[[], Tensor]
) -> list[Tensor]:
    """Runs `forward` on latents of the size of `x`, and returns the output [B, L, M] of each block in `depths`, in tile
    order."""
    found: dict[nn.Module, Tensor] = {}
    blocks = [transformer.blocks[depth] for depth in depths]
    hooks = [block.register_forward_hook(lambda block, args, x_BLM: found.update({block: x_BLM})) for block in blocks]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [_own_tokens(transformer, found[block], _layout(transformer, x)) for block in blocks]


def _layout(transformer: WanTransformer, x: Tensor) -> TileLayout:
    return tile_layout(token_grid(x.shape[2:], transformer.config.patch_size), transformer.tile)


def _own_tokens(transformer: WanTransformer, x_BLM: Tensor, layout: TileLayout) -> Tensor:
    region, sequence = transformer.token_region, transformer.sequence
    if region is not None:
        x_BLM = collectives.gather(x_BLM, 1, region.group)
    if sequence is None:
        return x_BLM
    own = 0 if sequence.group is None else sequence.group.rank()
    return x_BLM[:, : sequence.shards(layout).lengths[own]]


def mean_over_tokens(transformer: WanTransformer, values_BL: Tensor, x: Tensor) -> Tensor:
    """Returns the mean over all tokens of the samples `x`, on all ranks that share them: [B], float64, replicated."""
    total_B = values_BL.double().sum(1)
    group = None if transformer.sequence is None else transformer.sequence.group
    return (total_B if group is None else collectives.sum_parts(total_B, group)) / _layout(transformer, x).num_tokens
