"""The memory of training on a rank, in bytes, before anything is allocated.

States (weights, gradients, optimizer, EMA) are exact: they are the local shards of a role that is built on the meta
device. The activations that a forward stores for its backward follow from the operations of a block. With c bytes per
number in the compute type, width d, hidden width f and tensor degree t, a block without activation checkpointing stores
for each token of a rank

    28 d                                   fp32: inputs of three layer norms, two normed values, two gated updates
    c (3 d + 6 d / t + 2 f / t) + norms    inputs of linear layers; q, k, v, out and cross-attention's q, out; FFN

(norms: the inputs of q/k norms, 3 c d / t where they are fused), and log-sum-exps and the text's keys and values.
With full checkpointing it stores c d, its input. `saved_by_block` has the rest: token regions, Ulysses, gathered keys.

Only one autograd graph is alive at a time. A run's peak is therefore its states plus the largest update: gradients and
graph of one role, and the largest working set beside them. The working sets are those of eager mode; the compiler fuses
part of them away. Measured on a CPU, a training forward and backward of the small Wan peaks at 87 to 100 % of the
estimate.
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
    """Bytes of one role on a rank: between steps, and of its gradients within a step."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def lasting(self) -> int:
        """Bytes that stay while another role is updated."""
        return self.parameters + self.optimizer + self.ema


def states(module: nn.Module, *, has_ema: bool) -> States:
    """The exact states of a role on this rank, from its local shards. `module` may be on the meta device.

    Shards have equal numbers of rows, and the last ranks get the remainder, so no rank has more than rank 0.
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
    """Numbers in `parameters` after FSDP has gathered them: all, or the part of a tensor-parallel rank."""
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
        samples: samples in the batch, after the exchange between ranks and with all conditions.
        num_tokens: video tokens of a sample on this rank, with padding.
        num_text_tokens: text tokens of a sample.
        sequence: ranks that share a sample's tokens.
        tensor: ranks that share each weight.
        gathers_keys: attention gathers keys and values, instead of Ulysses.
        token_region: tensor ranks shard the tokens between tensor-parallel layers.
        compute_bytes: bytes per number in the compute type.
        fused_norms: RMS norms save their input alone, as on GPUs. On CPUs they save two fp32 tensors.
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
        """All tokens in a region: inside attention and feed-forward."""
        return self.samples * self.num_tokens

    @property
    def activation(self) -> float:
        """Bytes of all features of all tokens."""
        return self.compute_bytes * self.width * self.tokens

    @property
    def heads(self) -> float:
        """Bytes of all tokens' features in this rank's heads."""
        return self.activation / self.tensor

    @property
    def hidden(self) -> float:
        """Bytes of the feed-forward's hidden features."""
        return self.compute_bytes * self.architecture.ffn_dim * self.tokens / self.tensor

    @property
    def residual(self) -> float:
        """Bytes of the residual stream: a block's input."""
        return self.activation / (self.tensor if self.token_region else 1)

    @property
    def residual_fp32(self) -> float:
        """Bytes of a residual in fp32."""
        return self.residual * FP32 / self.compute_bytes

    @property
    def norm(self) -> float:
        """Bytes that a q/k norm saves, as a multiple of its input: fused, shared over tensor ranks, or written out."""
        if self.tensor > 1:
            return 1 + FP32 / self.compute_bytes
        return 1 if self.fused_norms else 2 * FP32 / self.compute_bytes

    @property
    def log_sums(self) -> float:
        """Bytes that one fused attention saves beside its inputs and outputs."""
        return FP32 * self.architecture.num_attention_heads / self.tensor * self.tokens

    @property
    def selection(self) -> float:
        """Bytes of the lists of chosen tiles."""
        if self.sparse is None:
            return 0.0
        listed = self.sparse.num_lists * self.sparse.num_selected
        return 4 * self.samples * self.architecture.num_attention_heads * listed / (self.sequence * self.tensor)

    @property
    def coarse(self) -> float:
        """Bytes of one tensor of tile means."""
        if self.sparse is None:
            return 0.0
        return FP32 * self.samples * self.sparse.num_tiles * self.width / (self.sequence * self.tensor)

    @property
    def text_heads(self) -> float:
        """Bytes of all text tokens' features in this rank's heads."""
        return self.compute_bytes * self.width * self.samples * self.num_text_tokens / self.tensor


def saved_by_block(forward: LocalForward) -> float:
    """Bytes that one block without activation checkpointing stores for its backward."""
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
    """Bytes that block `index` stores under activation checkpointing. It recomputes the rest of `saved_by_block`."""
    if not is_checkpointed(index, config):
        return saved_by_block(forward)
    kept = forward.residual + forward.selection
    if config.mode == "selective":
        kept += 2 * forward.heads + 2 * forward.log_sums + forward.coarse
        kept += sum(size for order, size in enumerate(matmul_outputs(forward)) if is_kept(order, config))
    return kept


def matmul_outputs(forward: LocalForward) -> list[float]:
    """Bytes of the outputs of a block's linear layers, in the order they run."""
    heads, text, whole = forward.heads, forward.text_heads, forward.activation
    gate = [] if forward.sparse is None else [heads]
    return [heads, heads, heads, *gate, whole, heads, text, text, whole, forward.hidden, whole]


def graph(forward: LocalForward, config: ActivationCheckpointConfig) -> float:
    """Bytes that a forward with gradients stores: all blocks, the head, and the rotary phases."""
    blocks = sum(kept_by_block(forward, index, config) for index in range(forward.architecture.num_layers))
    head = forward.activation * (1 + 2 * FP32 / forward.compute_bytes)
    return blocks + head + _phases(forward)


def forward_working_set(forward: LocalForward) -> float:
    """Most bytes that a block's forward needs at once and does not store: inside attention or inside the FFN."""
    # Residual, modulated input in fp32 (the caller holds it) and in the compute type.
    held = forward.residual + forward.residual_fp32 + forward.activation
    rotary = (4 + 2 * FP32 / forward.compute_bytes) * forward.heads
    return _phases(forward) + held + max(rotary, _exchange_buffers(forward), 2 * forward.hidden)


def backward_working_set(forward: LocalForward, config: ActivationCheckpointConfig) -> float:
    """Most bytes that a backward needs beyond the graph that it starts with: what a block recomputes, and gradients of
    activations, less what the later blocks have freed."""
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
    """Copies around sequence parallelism's collectives: stacked, sent, received and unpadded."""
    if forward.sequence == 1:
        return 0.0
    if forward.gathers_keys:
        return (5 + 3 * 2 * forward.sequence) * forward.heads
    return 5 * 3 * forward.heads
