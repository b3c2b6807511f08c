"""The tensor parallelism of a Wan transformer: the cut of its weights, and where activations enter and leave regions.

    attention     q, k, v and a sparse role's gate by outputs (whole heads), out by inputs; the q/k norms span all
                  heads, so their sum of squares is reduced over ranks
    feed-forward  in by outputs, out by inputs
    conditions    text and time MLPs likewise; the time projection by outputs, gathered, because modulation needs all
    head          by inputs: the sum of [B, L, 64] is cheaper than gathering [B, L, width]
    replicated    patch embedding (0.002 % of 14B; cutting it would cost an all-gather of all activations), norms,
                  modulation tables, the image MLP of I2V models

With `by_tokens` the residual stream between regions is cut along tokens (Megatron's sequence parallelism).
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_distill.models.wan.layers import Float32LayerNorm, WanBlock
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms import collectives
from titan_distill.parallelisms.tensor import (
    Region,
    TokenRegion,
    distribute_parameters,
    enter_region,
    gather_outputs,
    make_row_wise,
    share_norm,
    use_local_parameters,
)

BY_OUTPUTS = (
    "to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "norm_q", "norm_k", "norm_added_k", "to_gate_compress",
    "ffn.net.0.proj", "text_embedder.linear_1", "time_embedder.linear_1", "time_proj",
)  # fmt: skip
"""Ends of the names of modules whose parameters are cut along their outputs, dim 0."""
BY_INPUTS = ("to_out.0", "ffn.net.2", "text_embedder.linear_2", "time_embedder.linear_2", "proj_out")
"""Ends of the names of layers whose weights are cut along their inputs, dim 1."""


def apply_tensor_parallel(model: WanTransformer, mesh: DeviceMesh, *, by_tokens: bool) -> None:
    """Cuts the weights of a model, on the meta device or not, over the ranks of `mesh`.

    Raises ValueError when the ranks do not divide the heads or a width.
    """
    heads = model.config.num_attention_heads
    if heads % mesh.size():
        raise ValueError(
            f"{heads} attention heads can't be shared by {mesh.size()} tensor-parallel ranks; use a divisor"
        )
    group = mesh.get_group()
    region = Region(group)
    model.token_region = TokenRegion(group) if by_tokens else None
    for name, module in model.named_modules():
        if name.endswith(BY_INPUTS):
            # What enters the embedders' is data, so nothing flows back and nothing has to enter.
            make_row_wise(module, model.token_region or region if name.startswith("blocks.") else region)
        elif name.endswith(("norm_q", "norm_k", "norm_added_k")):
            share_norm(module, group)
    for block in model.blocks:
        assert isinstance(block, WanBlock)
        for part in (block.attn1, block.attn2, block.ffn):
            enter_region(part, model.token_region or region)
        if model.token_region is not None:
            # Each rank applies these to its own tokens only: their gradients are parts, to be summed.
            block.share = model.token_region.share
            if isinstance(block.norm2, Float32LayerNorm):
                block.norm2.share = model.token_region.share

    conditions = model.condition_embedder
    gather_outputs(conditions.time_proj, group)
    for embedder in (conditions.text_embedder, conditions.image_embedder):
        if embedder is not None:
            # All blocks' keys and values are made from it by rank: its gradient is summed once, behind all of them.
            embedder.register_forward_hook(lambda module, args, output: region.enter(output))
    model.proj_out.register_forward_pre_hook(lambda module, args: (collectives.shard(args[0], -1, group),))
    distribute_parameters(model, mesh, _shards(model))
    for module in model.modules():
        # Those without a role above compute with what they hold: shards of outputs, or the whole weight.
        if isinstance(module, nn.Linear) and "forward" not in vars(module):
            use_local_parameters(module)


def _shards(model: WanTransformer) -> dict[str, int]:
    """Returns the dim along which each sharded parameter is cut, by name."""
    shards = {}
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module.endswith(BY_OUTPUTS):
            shards[name] = 0
        elif module.endswith(BY_INPUTS) and leaf == "weight":
            shards[name] = 1
    return shards
