"""What a run will need, worked out on a CPU: memory a rank, FLOPs, bytes between ranks and seconds a step.

`fake_world` lets one process play rank 0 of any number of ranks, on whose meshes the roles are really built on the meta
device; rank 0 holds the largest shard of everything, so no rank needs more. The rest is arithmetic: `memory` and
`communication` say what one forward costs, the method's `work` how often each role runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from titan_kernels import tile_layout
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_distill.config.degrees import Degrees
from titan_distill.config.layouts import RunLayout, role_parallelism
from titan_distill.methods.base import Passes, method_class
from titan_distill.models.base import model_family
from titan_distill.models.head import FeatureHead
from titan_distill.observability.flops import DiTConfig, ForwardFlops, forward_flops, recomputed_share
from titan_distill.parallelisms.activation_checkpoint import is_checkpointed
from titan_distill.parallelisms.mesh import World
from titan_distill.parallelisms.sequence import Method, SequenceParallel, TokenShards, choose_method
from titan_distill.planner import communication, memory
from titan_distill.planner.communication import Links, Transfer, Weights
from titan_distill.planner.decoding import PUBLISHED, Decoder, decoding_bytes
from titan_distill.planner.hardware import COMPUTE_EFFICIENCY, Gpu
from titan_distill.planner.memory import LocalForward, States
from titan_distill.planner.unrolling import Unrolling

if TYPE_CHECKING:
    from titan_distill.attention.causal import Segmentation
    from titan_distill.attention.sparse import SparseAttention, TilesRead
    from titan_distill.config.config import Config
    from titan_distill.roles import RoleHandle, RoleManager

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class RolePlan:
    """A role as rank 0 holds it."""

    name: str
    architecture: DiTConfig
    degrees: Degrees
    method: Method
    shards: TokenShards
    num_exchanged: int
    """Data groups whose samples it runs together."""
    states: States
    weights: Weights
    offloaded: bool
    adapters_only: bool = False
    num_experts: int = 1
    """Networks of which a sample goes through one."""
    sparse: TilesRead | None = None
    """What its attention reads at the end of the schedule; None where it is dense."""
    segmentation: Segmentation | None = None
    """How a causal role cuts videos; None for others."""
    graph: float = 0.0
    """Activations kept for its backward."""
    temporary: float = 0.0
    """The most it needs beside them: gathered weights, working sets, buffers."""


@dataclass(frozen=True)
class PhasePlan:
    """One declared phase of a step."""

    passes: Passes
    executed_flops: float
    """Of the global batch, with what is recomputed."""
    dense_flops: float
    """What the mathematics needs with dense attention, without recomputation."""
    compute_seconds: float
    transfers: tuple[Transfer, ...]
    """Of one rank, with the seconds they take."""

    @property
    def exposed_seconds(self) -> float:
        """Communication that the step waits for."""
        beside = sum(t.seconds for t in self.transfers if t.overlaps)
        return sum(t.seconds for t in self.transfers if not t.overlaps) + max(0.0, beside - self.compute_seconds)


@dataclass(frozen=True)
class Plan:
    """Everything the report shows."""

    gpu: Gpu
    layout: RunLayout
    grid: tuple[int, int, int]
    roles: dict[str, RolePlan]
    phases: tuple[PhasePlan, ...]
    encoders: float
    """Bytes of VAE and text encoder."""
    decoding: float
    """Bytes of the VAE's activations while a validation decodes a clip; 0 without validation."""
    peak: float
    """Bytes on the fullest rank in its dearest phase: the update of a role, or a validation."""
    peak_update: str | None
    """Role whose update that is; None for a validation."""
    left_out: tuple[str, ...]
    """What the configuration asks for and the plan does not price."""

    @property
    def seconds(self) -> float:
        """A step's, averaged over the method's cadence."""
        return sum(phase.compute_seconds + phase.exposed_seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.gpu.usable_gib * memory.GIB


@contextmanager
def fake_world(num_ranks: int) -> Iterator[World]:
    """This process as rank 0 of ``num_ranks``, whose collectives do nothing; for building on the meta device."""
    assert not dist.is_initialized(), "a process has one world"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield World(rank=0, size=num_ranks, device=torch.device("meta"))
    finally:
        dist.destroy_process_group()


def can_plan(config: Config, roles: RoleManager) -> bool:
    """Whether the family's networks are video transformers, whose costs are known."""
    return _token_grid(config) is not None and all(hasattr(role.transformer, "config") for role in _networks(roles))


def make_plan(config: Config, layout: RunLayout, roles: RoleManager, gpu: Gpu) -> Plan:
    """The plan of a run whose ``roles`` were built on the meta device.

    Raises ValueError for a family whose networks are no video transformers.
    """
    grid = _token_grid(config)
    if grid is None or not can_plan(config, roles):
        raise ValueError(f"recipe.family = {config.recipe.family!r} has no video transformers that a plan is made for")
    plans = {role.name: _role_plan(config, layout, role, grid) for role in _networks(roles)}
    work = method_class(config.recipe.method).passes(config.method_config)
    planner = _Planner(config, layout, gpu, plans, grid)
    plans = planner.plans = {name: planner.with_activations(plan, work) for name, plan in plans.items()}
    architecture = next(iter(plans.values())).architecture
    encoders, decoding = _encoder_bytes(config, architecture.out_channels), _decoding_bytes(config, architecture, grid)
    updates = list(dict.fromkeys(passes.update for passes in work)) or [role.name for role in roles.trainable]
    peaks: dict[str | None, float] = {update: planner.peak(update, work) + encoders for update in updates}
    if decoding:
        peaks[None] = planner.lasting + encoders + decoding
    peak_update = max(peaks, key=peaks.__getitem__)
    return Plan(
        gpu=gpu,
        layout=layout,
        grid=grid,
        roles=plans,
        phases=tuple(planner.phase(passes) for passes in work if passes.num_forwards),
        encoders=encoders,
        decoding=decoding,
        peak=peaks[peak_update],
        peak_update=peak_update,
        left_out=tuple(_left_out(config, plans)),
    )


@dataclass
class _Planner:
    """What all parts of one plan share."""

    config: Config
    layout: RunLayout
    gpu: Gpu
    plans: dict[str, RolePlan]
    grid: tuple[int, int, int]

    def forward(self, passes: Passes) -> LocalForward:
        """One call of the passes, as rank 0 sees it: of whole samples, or of a segment of them."""
        whole, unrolling = self._whole(passes), self._unrolling(passes)
        return whole if unrolling is None else unrolling.one_call(whole, self.grid[0])

    def _unrolling(self, passes: Passes) -> Unrolling | None:
        """How a causal role makes samples; None for calls of whole samples."""
        segmentation = self.plans[passes.role].segmentation
        if segmentation is None or passes.segments is None:
            return None
        return Unrolling.of(segmentation, self.grid, passes)

    def _whole(self, passes: Passes) -> LocalForward:
        role, config = self.plans[passes.role], self.config
        return LocalForward(
            architecture=role.architecture,
            samples=config.training.local_batch_size * role.num_exchanged * passes.num_conditions,
            num_tokens=role.shards.padded_length,
            num_text_tokens=config.data.max_text_tokens,
            sequence=role.degrees.sequence,
            tensor=role.degrees.tensor,
            gathers_keys=role.degrees.sequence > 1 and role.method == "all_gather",
            token_region=role_parallelism(config, passes.role).token_region,
            compute_bytes=BYTES[config.training.dtype],
            sparse=role.sparse,
        )

    def with_activations(self, role: RolePlan, work: list[Passes]) -> RolePlan:
        """The role with the most that any of its passes keeps and needs."""
        own = [passes for passes in work if passes.role == role.name and passes.num_forwards]
        graph = max((self._graph(passes) for passes in own), default=0.0)
        temporary = max((self._working_set(passes) for passes in own), default=0.0)
        return replace(role, graph=graph, temporary=temporary + role.weights.lasting)

    def peak(self, update: str, work: list[Passes]) -> float:
        """Bytes on the device in the update of one role."""
        own = [passes for passes in work if passes.update == update and passes.num_forwards]
        role = self.plans.get(update)  # a head's gradients are not worth counting
        gradients = 0 if role is None or role.offloaded else role.states.gradients
        graph = max((self._graph(passes) for passes in own), default=0.0)
        return self.lasting + gradients + graph + max((self._working_set(passes) for passes in own), default=0.0)

    @property
    def lasting(self) -> float:
        """Bytes on the device between updates."""
        held = (0 if role.offloaded else role.states.lasting for role in self.plans.values())
        return sum(held) + sum(role.weights.lasting for role in self.plans.values())

    def phase(self, passes: Passes) -> PhasePlan:
        """FLOPs of the whole step and global batch, seconds and bytes of one rank."""
        role, training, forward = self.plans[passes.role], self.config.training, self.forward(passes)
        flops, dense_flops = self._flops(role, passes), self._flops(replace(role, sparse=None), passes)
        again = self._recomputed(role, passes) if passes.backward else 0.0
        times = passes.num_forwards * passes.updates_per_step
        samples = times * passes.num_conditions * training.global_batch_size
        dense, executed = (
            samples * (of.total + passes.backward * (of.backward_of_inputs if role.adapters_only else of.backward))
            for of in (dense_flops, flops)
        )
        executed += samples * again
        # Padded tokens are computed, too, and every rank waits for the one with the longest run.
        stretch = role.degrees.sequence * role.shards.padded_length / role.shards.bounds[-1]
        rank_flops = executed * stretch / self.layout.default.world_size
        unrolling = self._unrolling(passes)
        calls = times * self.layout.num_micro_batches * (1 if unrolling is None else unrolling.num_calls)
        return PhasePlan(
            passes=passes,
            executed_flops=executed,
            dense_flops=dense,
            compute_seconds=rank_flops / (self.gpu.peak_flops * COMPUTE_EFFICIENCY),
            transfers=tuple(_times(calls, transfer) for transfer in self._transfers(passes, forward)),
        )

    def _transfers(self, passes: Passes, forward: LocalForward) -> Iterator[Transfer]:
        role = self.plans[passes.role]
        links, reduces = Links(role.degrees, self.gpu), 1 / self.layout.num_micro_batches
        yield from communication.weight_transfers(role.weights, links, backward=passes.backward, reduces=reduces)
        # A checkpointed block exchanges its tokens again, whatever it keeps.
        mode = self.config.activation_checkpoint
        recomputed = sum(is_checkpointed(index, mode) for index in range(role.architecture.num_layers))
        directions = 1 + passes.backward * (1 + recomputed / role.architecture.num_layers)
        yield from communication.token_transfers(forward, links, directions=directions)
        if role.offloaded:
            trips = 1 + passes.backward * (1 + reduces)  # weights for both directions, gradients back
            size = role.states.parameters * trips
            yield Transfer("weights and gradients, host", size, size / self.gpu.host_bytes, overlaps=True)
        if role.num_exchanged > 1:
            latents = role.architecture.in_channels * 4 * forward.num_tokens * role.degrees.sequence
            text = role.architecture.text_dim * forward.num_text_tokens
            size = memory.FP32 * forward.samples * (latents + text) * (1 + passes.backward)
            yield links.transfer("samples, exchange all-gather", "exchange", size)

    def _sizes(self, role: RolePlan, passes: Passes) -> tuple[int, int, TilesRead | None, float | None]:
        """Tokens of one sample, of its text, and what its attention reads."""
        num_tokens, num_keys, num_text_tokens = role.shards.bounds[-1], None, self.config.data.max_text_tokens
        if role.segmentation is not None:
            unrolling = Unrolling.of(role.segmentation, self.grid, passes)
            num_tokens, num_keys = unrolling.num_tokens, unrolling.num_keys
        return num_tokens, num_text_tokens, role.sparse, num_keys

    def _flops(self, role: RolePlan, passes: Passes) -> ForwardFlops:
        return forward_flops(role.architecture, *self._sizes(role, passes))

    def _recomputed(self, role: RolePlan, passes: Passes) -> float:
        """FLOPs that the backward of one sample computes again."""
        share = recomputed_share(role.architecture, self.config.activation_checkpoint, *self._sizes(role, passes))
        return self._flops(role, passes).total * share

    def _graph(self, passes: Passes) -> float:
        if not passes.backward:
            return 0.0
        mode, whole, unrolling = self.config.activation_checkpoint, self._whole(passes), self._unrolling(passes)
        graph = memory.graph(whole, mode)
        if unrolling is None:
            return graph
        num_layers = whole.architecture.num_layers
        joined = sum(not is_checkpointed(index, mode) for index in range(num_layers)) / num_layers
        return graph + unrolling.memory_bytes(whole) + joined * unrolling.copied_bytes(whole)

    def _working_set(self, passes: Passes) -> float:
        """What passes need beside graph and states."""
        unrolling = self._unrolling(passes)
        needed = self._working_set_of_a_call(passes)
        # In the role's own update the graph holds what is in memory until the backward.
        if unrolling is None or passes.update == passes.role:
            return needed
        return needed + unrolling.memory_bytes(self._whole(passes))

    def _working_set_of_a_call(self, passes: Passes) -> float:
        weights, forward = self.plans[passes.role].weights, self.forward(passes)
        if not passes.backward:
            return weights.passing + memory.forward_working_set(forward)
        # A block's gradients in the compute type and, twice, in fp32 on the way to be reduced.
        reduced = weights.trained_share * max(weights.blocks) * (weights.compute_bytes + 2 * memory.FP32)
        # Micro-batches before the last one keep all gradients whole, in fp32.
        whole = memory.FP32 * weights.total * weights.trained_share if self.layout.num_micro_batches > 1 else 0
        working = memory.backward_working_set(forward, self.config.activation_checkpoint)
        return weights.passing + reduced + whole + max(working, memory.forward_working_set(forward))


def _networks(roles: RoleManager) -> list[RoleHandle]:
    """The roles with a cost: all but heads, which are some thin layers on the features of others."""
    return [role for role in roles if not isinstance(role.transformer, FeatureHead)]


def _role_plan(config: Config, layout: RunLayout, role: RoleHandle, grid: tuple[int, int, int]) -> RolePlan:
    architecture = cast(DiTConfig, role.transformer.config)
    degrees, parallelism = layout.roles[role.name], role_parallelism(config, role.name)
    heads = architecture.num_attention_heads
    sequence = cast("SequenceParallel | None", role.transformer.sequence)
    core = cast("SparseAttention | None", role.transformer.sparse_attention)
    layout_of_tokens = tile_layout(grid, cast("tuple[int, int, int]", role.transformer.tile))
    if core is not None:
        core.start_step(config.training.steps - 1)
    return RolePlan(
        name=role.name,
        architecture=architecture,
        degrees=degrees,
        method=choose_method(heads, degrees.sequence, degrees.tensor, parallelism.sequence_method),
        shards=TokenShards.of(layout_of_tokens, 1) if sequence is None else sequence.shards(layout_of_tokens),
        num_exchanged=degrees.model_parallel // layout.default.model_parallel,
        states=memory.states(role.network, has_ema=bool(config.ema.decay) and config.ema.role == role.name),
        weights=_weights(role, BYTES[config.training.dtype], parallelism.reshard_after_forward),
        num_experts=len(role.modules),
        offloaded=parallelism.cpu_offload,
        adapters_only=role.adapters_only,
        sparse=None if core is None else core.tiles_read(layout_of_tokens.num_tiles),
        segmentation=cast("Segmentation | None", role.transformer.segmentation),
    )


def _weights(role: RoleHandle, compute_bytes: int, reshards: bool) -> Weights:
    """Of all modules, one behind the other: where a role has two experts, both are gathered for a batch."""
    module = role.network
    stacks = [cast(nn.ModuleList, single.blocks) for single in role.modules.values()]
    blocks = [list(block.parameters()) for stack in stacks for block in stack]
    inside = {id(p) for parameters in blocks for p in parameters}
    trained = memory.num_gathered([p for p in module.parameters() if p.requires_grad])
    return Weights(
        blocks=tuple(memory.num_gathered(parameters) for parameters in blocks),
        root=memory.num_gathered([p for p in module.parameters() if id(p) not in inside]),
        compute_bytes=compute_bytes,
        reshards=reshards,
        num_modules=len(stacks),
        # A frozen role has no gradients to share out.
        trained_share=trained / memory.num_gathered(list(module.parameters())) if trained else 1.0,
    )


def _token_grid(config: Config) -> tuple[int, int, int] | None:
    return model_family(config.recipe.family)(config).token_grid()


# Of the published files, the VAE's by its channels; any other pipeline folder must be there to be read.
VAE_NUMBERS, TEXT_ENCODER_NUMBERS = {16: 126_892_531, 48: 704_688_668}, 5_680_910_336


def _encoder_bytes(config: Config, channels: int) -> float:
    """VAE and text encoder in the compute type: they stay on a rank once it has embedded a prompt."""
    if not config.pipeline_config.path:
        return 0.0
    folder, in_bytes = Path(config.pipeline_config.path), BYTES[config.training.dtype]
    vae = _numbers_in(folder / "vae") or VAE_NUMBERS.get(channels, max(VAE_NUMBERS.values()))
    text = _numbers_in(folder / "text_encoder") or TEXT_ENCODER_NUMBERS
    return in_bytes * (vae + (0 if config.pipeline_config.offload_text_encoder else text))


def _decoding_bytes(config: Config, architecture: DiTConfig, grid: tuple[int, int, int]) -> float:
    """Of one clip, in the compute type: so a GPU decodes (models/wan/vae.py)."""
    if not (config.pipeline_config.path and config.validation.enabled):
        return 0.0
    file = Path(config.pipeline_config.path) / "vae" / "config.json"
    decoder = Decoder.read(file) if file.is_file() else PUBLISHED[architecture.out_channels]
    frames, height, width = (size * patch for size, patch in zip(grid, architecture.patch_size, strict=True))
    return decoding_bytes(decoder, (frames, height, width), BYTES[config.training.dtype])


def _numbers_in(folder: Path) -> int:
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _left_out(config: Config, roles: dict[str, RolePlan]) -> Iterator[str]:
    if config.float8.enabled:
        yield "float8: seconds are those of bf16"
    if any(role.sparse is not None for role in roles.values()):
        yield "sparse attention: its kernels as fast, by FLOP, as dense ones; the schedule's way to its last sparsity"
    if config.compile.enabled:
        yield "compile: activations are those of eager mode, an upper bound"
    if any(role.num_experts > 1 for role in roles.values()):
        yield "two experts: steps of a rollout, which share a noise level, gather one of them only"
    if any(role.adapters_only for role in roles.values()):
        yield "adapters: their own work and activations"
    if any(role.offloaded and role.states.optimizer for role in roles.values()):
        yield "optimizer steps on the host"


def _times(calls: float, transfer: Transfer) -> Transfer:
    return replace(transfer, bytes_sent=calls * transfer.bytes_sent, seconds=calls * transfer.seconds)
