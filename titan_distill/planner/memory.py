"""Estimate of the training memory of one rank, in bytes, computed without allocating anything.

Model and optimizer states (weights, gradients, optimizer, EMA) are exact: they are counted from the local shards of a
role built on the meta device. The activations that a forward stores for its backward are computed from the operations
of a block. With c bytes per element in the compute dtype, width d, hidden width f and tensor degree t, a block without
activation checkpointing stores for each token of a rank

    28 d                                   fp32: inputs of three layer norms, two normed values, two gated updates
    c (3 d + 6 d / t + 2 f / t) + norms    inputs of linear layers; q, k, v, out and cross-attention's q, out; FFN

where *norms* are the inputs of q/k norms, 3 c d / t if they are fused. It also stores log-sum-exps and the keys and
values of the text. With full checkpointing a block stores only its input, c d. `saved_by_block` adds the terms of token
regions, Ulysses and gathered keys.

Only one autograd graph exists at a time. The peak of a run is therefore the sum of all states and of the largest
update: gradients and autograd graph of one role, and the largest working set (temporary tensors of one operation).
Working sets are those of eager mode; the compiler removes part of them by fusion. Measured on a CPU, a training forward
and backward of the small Wan peaks at 87 to 100 % of the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import DTensor

from titan_distill.observability.flops import DiTConfig
from titan_distill.parallelisms.activation_checkpoint import is_checkpointed, is_kept

if TYPE_CHECKING:
    from titan_distill.attention.sparse import TilesRead
    from titan_distill.config.sections import ActivationCheckpointConfig

FP32 = 4
GIB = 2**30


@dataclass(frozen=True)
class States:
    """Bytes of one role's weights, gradients, optimizer and EMA on one rank. Gradients exist only during an update."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def lasting(self) -> int:
        """Bytes that remain allocated while another role is updated: all but the gradients."""
        return self.parameters + self.optimizer + self.ema


def states(module: nn.Module, *, has_ema: bool) -> States:
    """Returns the exact bytes of a role's states on this rank, from its local shards. `module` may be on the meta
    device.

    FSDP gives the last ranks fewer rows or none, so no rank holds more than rank 0.
    """
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    held = sum(_local_bytes(p) for p in trained)
    return States(
        parameters=sum(_local_bytes(p) for p in parameters),
        gradients=held,
        optimizer=2 * held + FP32 * len(trained),  # AdamW's two moments, and a step counter a parameter
        ema=held if has_ema else 0,
    )


def num_gathered(parameters: list[nn.Parameter]) -> int:
    """Returns the number of elements in `parameters` after FSDP has gathered them: all, or the part of one
    tensor-parallel rank."""
    return sum(p.numel() // _tensor_shards(p) for p in parameters)


def _local_bytes(parameter: nn.Parameter) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * parameter.element_size()


def _tensor_shards(parameter: nn.Parameter) -> int:
    if not isinstance(parameter, DTensor) or "tensor" not in (parameter.device_mesh.mesh_dim_names or ()):
        return 1
    axis = (parameter.device_mesh.mesh_dim_names or ()).index("tensor")
    return 1 if parameter.placements[axis].is_replicate() else parameter.device_mesh.size(axis)


@dataclass(frozen=True)
class LocalForward:
    """One forward on one rank.

    Attributes:
        architecture: of the network.
        samples: samples in the batch. It includes samples received from other ranks, and counts a sample once per
            condition.
        num_tokens: video tokens of one sample on this rank, padding included.
        num_text_tokens: text tokens of a sample.
        sequence: ranks that share a sample's tokens.
        tensor: ranks that share each weight.
        gathers_keys: whether attention all-gathers keys and values; otherwise it uses Ulysses.
        token_region: whether tensor ranks shard the tokens between tensor-parallel layers.
        compute_bytes: bytes per element in the compute dtype.
        fused_norms: whether RMS norms save only their input, as on GPUs. On CPUs they save two fp32 tensors.
        sparse: tiles that sparse attention reads, over all heads and ranks; None for dense attention.
    """

    architecture: DiTConfig
    samples: int
    num_tokens: int
    num_text_tokens: int
    sequence: int = 1
    tensor: int = 1
    gathers_keys: bool = False
    token_region: bool = False
    compute_bytes: int = 2
    fused_norms: bool = True
    sparse: TilesRead | None = None

    @property
    def width(self) -> int:
        return self.architecture.num_attention_heads * self.architecture.attention_head_dim

    @property
    def tokens(self) -> int:
        """Tokens of the batch inside attention and feed-forward, where tensor ranks have gathered them."""
        return self.samples * self.num_tokens

    @property
    def activation(self) -> float:
        """Bytes of one activation: all tokens at full model width."""
        return self.compute_bytes * self.width * self.tokens

    @property
    def heads(self) -> float:
        """Bytes of one activation in this rank's heads, for instance of its queries."""
        return self.activation / self.tensor

    @property
    def hidden(self) -> float:
        """Bytes of the feed-forward's hidden activation on this rank."""
        return self.compute_bytes * self.architecture.ffn_dim * self.tokens / self.tensor

    @property
    def residual(self) -> float:
        """Bytes of the residual stream, which is a block's input."""
        return self.activation / (self.tensor if self.token_region else 1)

    @property
    def residual_fp32(self) -> float:
        """Bytes of the residual stream in fp32."""
        return self.residual * FP32 / self.compute_bytes

    @property
    def norm(self) -> float:
        """Tensors that a q/k norm saves, as a multiple of the bytes of its input. It depends on whether the norm is
        fused, shared over tensor ranks, or made of single operations."""
        if self.tensor > 1:
            return 1 + FP32 / self.compute_bytes
        return 1 if self.fused_norms else 2 * FP32 / self.compute_bytes

    @property
    def log_sums(self) -> float:
        """Bytes that a fused attention saves in addition to its inputs and outputs: the log-sum-exps."""
        return FP32 * self.architecture.num_attention_heads / self.tensor * self.tokens

    @property
    def selection(self) -> float:
        """Bytes of the lists of selected tiles."""
        if self.sparse is None:
            return 0.0
        listed = self.sparse.num_lists * self.sparse.num_selected
        return 4 * self.samples * self.architecture.num_attention_heads * listed / (self.sequence * self.tensor)

    @property
    def coarse(self) -> float:
        """Bytes of one tensor of tile means, for the coarse branch."""
        if self.sparse is None:
            return 0.0
        return FP32 * self.samples * self.sparse.num_tiles * self.width / (self.sequence * self.tensor)

    @property
    def latents(self) -> float:
        """Bytes of the latents in fp32, which all ranks of a sample hold. A token has four latents."""
        return FP32 * 4 * self.architecture.in_channels * self.tokens * self.sequence

    @property
    def inputs(self) -> float:
        """Bytes of the network's inputs, which it holds until its end: latents, this rank's patches of them, text
        embeddings and their projection."""
        text = FP32 * self.samples * self.num_text_tokens * self.architecture.text_dim
        return self.latents * (1 + 1 / self.sequence) + text + self.text_heads * self.tensor

    @property
    def text_heads(self) -> float:
        """Bytes of the activation of all text tokens in this rank's heads."""
        return self.compute_bytes * self.width * self.samples * self.num_text_tokens / self.tensor


def saved_by_block(forward: LocalForward) -> float:
    """Returns the bytes that a block without activation checkpointing stores for its backward."""
    # Own copies of other ranks' keys and values, or of the heads that come back from Ulysses.
    foreign = 2 * (forward.sequence - 1) if forward.gathers_keys else int(forward.sequence > 1)
    layer_norms = 7 * forward.residual_fp32 + 3 * 2 * FP32 * forward.tokens
    linear_inputs = 3 * forward.activation + 2 * forward.hidden
    attention = (4 + 2 + foreign + 3 * forward.norm) * forward.heads + 2 * forward.log_sums
    rms = 3 * FP32 * forward.tokens
    if forward.sparse is not None:
        # Gate and ungated output; means of queries, keys and values, and what becomes of them.
        attention += 2 * forward.heads + forward.selection + 4 * forward.coarse
    return layer_norms + linear_inputs + attention + rms + (2 + forward.norm) * forward.text_heads


def kept_by_block(forward: LocalForward, index: int, config: ActivationCheckpointConfig) -> float:
    """Returns the bytes that block `index` stores under activation checkpointing. The backward recomputes the rest of
    `saved_by_block`."""
    if not is_checkpointed(index, config):
        return saved_by_block(forward)
    kept = forward.residual + forward.selection
    if config.mode == "selective":
        kept += 2 * forward.heads + 2 * forward.log_sums + forward.coarse
        outputs = matmul_outputs(forward)
        hidden = len(outputs) - 2
        kept += sum(size for at, size in enumerate(outputs) if is_kept(at, config, is_hidden=at == hidden))
    return kept


def matmul_outputs(forward: LocalForward) -> list[float]:
    """Returns the bytes of the outputs of a block's linear layers, in the order they run."""
    heads, text, whole = forward.heads, forward.text_heads, forward.activation
    gate = [] if forward.sparse is None else [heads]
    return [heads, heads, heads, *gate, whole, heads, text, text, whole, forward.hidden, whole]


def graph(forward: LocalForward, config: ActivationCheckpointConfig) -> float:
    """Returns the bytes that a forward with gradients stores: in all blocks, in the head, and as rotary phases."""
    blocks = sum(kept_by_block(forward, index, config) for index in range(forward.architecture.num_layers))
    head = forward.activation * (1 + 2 * FP32 / forward.compute_bytes)
    return blocks + head + _phases(forward)


def forward_working_set(forward: LocalForward) -> float:
    """Returns the peak bytes of the temporary tensors of a block's forward, inside attention or inside the
    feed-forward."""
    # The block's input, the residual, and in fp32 the modulated input and a copy of it.
    held = forward.inputs + 2 * forward.residual + 2 * forward.residual_fp32
    rotary = (4 + 2 * FP32 / forward.compute_bytes) * forward.heads
    return _phases(forward) + held + max(rotary, _exchange_buffers(forward), 2 * forward.hidden)


def backward_working_set(forward: LocalForward, config: ActivationCheckpointConfig) -> float:
    """Returns the peak bytes that a backward needs beyond the autograd graph that it starts with.

    These are the activations that a block recomputes and the gradients of activations, minus what later blocks have
    already freed.
    """
    # At the FFN's hidden features everything recomputed is still there; later, attention's gradients replace it.
    gradients = 2 * forward.residual_fp32 + forward.activation + 2 * forward.hidden
    saved, freed, most = saved_by_block(forward), 0.0, 0.0
    for index in reversed(range(forward.architecture.num_layers)):
        kept = kept_by_block(forward, index, config)
        most = max(most, saved - kept - freed)
        freed += kept
    return most + max(gradients, _exchange_buffers(forward))


def _phases(forward: LocalForward) -> float:
    return 2 * FP32 * forward.architecture.attention_head_dim * forward.num_tokens


def _exchange_buffers(forward: LocalForward) -> float:
    """Returns the bytes of the copies around the collectives of sequence parallelism: stacked, sent, received and
    unpadded."""
    if forward.sequence == 1:
        return 0.0
    if forward.gathers_keys:
        return (5 + 3 * 2 * forward.sequence) * forward.heads
    return 5 * 3 * forward.heads
