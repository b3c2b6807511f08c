"""The plan of a run, computed on a CPU: memory per rank, FLOPs, bytes between ranks and seconds per step.

In a `fake_world` one process is rank 0 of any number of ranks and builds the roles on the meta device, with the meshes
of the run. Rank 0 has the largest shard of everything, so no rank needs more. The rest is arithmetic: `memory` and
`communication` give the costs of one forward, the method's `work` gives the number of forwards per role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from titan_kernels import tile_layout
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_distill.attention.causal import Segmentation
from titan_distill.attention.sparse import SparseAttention, TilesRead
from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees, RunLayout
from titan_distill.methods.base import Passes
from titan_distill.models.head import FeatureHead
from titan_distill.observability.flops import DiTConfig, ForwardFlops, forward_flops, recomputed_share
from titan_distill.parallelisms.activation_checkpoint import is_checkpointed
from titan_distill.parallelisms.mesh import World
from titan_distill.parallelisms.sequence import Method, SequenceParallel, TokenShards, choose_method
from titan_distill.planner import communication, memory
from titan_distill.planner.communication import Links, Transfer, Weights
from titan_distill.planner.hardware import COMPUTE_EFFICIENCY, Gpu
from titan_distill.planner.memory import LocalForward, States
from titan_distill.planner.unrolling import Unrolling
from titan_distill.resolve import ResolvedRun
from titan_distill.roles import RoleHandle, RoleManager

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class RolePlan:
    """The part of a role on rank 0.

    Attributes:
        num_exchanged: data groups whose samples the role runs together.
        num_experts: networks of which a sample goes through one.
        sparse: tiles that its attention reads at the end of the schedule; None for dense attention.
        segmentation: the segments of a causal role's videos; None for other roles.
        graph: bytes of activations stored for its backward.
        temporary: most bytes needed beside states and graph: gathered weights, working sets, buffers.
    """

    name: str
    architecture: DiTConfig
    degrees: Degrees
    method: Method
    shards: TokenShards
    num_exchanged: int
    states: States
    weights: Weights
    offloaded: bool
    adapters_only: bool = False
    num_experts: int = 1
    sparse: TilesRead | None = None
    segmentation: Segmentation | None = None
    graph: float = 0.0
    temporary: float = 0.0


@dataclass(frozen=True)
class PhasePlan:
    """The costs of one declared phase of a step."""

    passes: Passes
    executed_flops: float
    """FLOPs of the global batch, with recomputation."""
    dense_flops: float
    """FLOPs of the global batch with dense attention and without recomputation."""
    compute_seconds: float
    transfers: tuple[Transfer, ...]
    """Transfers of one rank, with their seconds."""

    @property
    def exposed_seconds(self) -> float:
        """Seconds of communication that the step waits for."""
        beside = sum(t.seconds for t in self.transfers if t.overlaps)
        return sum(t.seconds for t in self.transfers if not t.overlaps) + max(0.0, beside - self.compute_seconds)


@dataclass(frozen=True)
class Plan:
    """The plan of a run, as the report shows it."""

    gpu: Gpu
    layout: RunLayout
    grid: tuple[int, int, int]
    roles: dict[str, RolePlan]
    phases: tuple[PhasePlan, ...]
    encoders: float
    """Bytes of VAE and text encoder."""
    decoding: float
    """Bytes of the VAE's activations while a validation decodes a clip. 0 without validation."""
    peak: float
    """Most bytes on the fullest rank, in the update of a role or in a validation."""
    peak_update: str | None
    """Role whose update has the peak. None for a validation."""
    left_out: tuple[str, ...]
    """Features of the run whose costs the plan does not contain."""

    @property
    def seconds(self) -> float:
        """Seconds per step, averaged over the method's cadence."""
        return sum(phase.compute_seconds + phase.exposed_seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the GPU's usable memory."""
        return self.peak <= self.gpu.usable_gib * memory.GIB


@contextmanager
def fake_world(num_ranks: int) -> Iterator[World]:
    """Makes this process rank 0 of `num_ranks`, whose collectives do nothing, to build on the meta device."""
    assert not dist.is_initialized(), "a process has one world"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield World(rank=0, size=num_ranks, device=torch.device("meta"))
    finally:
        dist.destroy_process_group()


def can_plan(run: ResolvedRun, roles: RoleManager) -> bool:
    """Whether the family's networks are video transformers, whose costs are known."""
    return run.family.token_grid() is not None and all(hasattr(role.transformer, "config") for role in _networks(roles))


def make_plan(run: ResolvedRun, roles: RoleManager, gpu: Gpu) -> Plan:
    """Plans a run whose `roles` are built on the meta device.

    Raises ValueError for a family whose networks are not video transformers.
    """
    config, layout, grid = run.config, run.layout, run.family.token_grid()
    if grid is None or not can_plan(run, roles):
        raise ValueError(f"recipe.family = {config.recipe.family!r} has no video transformers, which a plan needs")
    plans = {role.name: _role_plan(config, layout, role, grid) for role in _networks(roles)}
    work = run.method.work(config.method_config)
    planner = _Planner(config, layout, gpu, plans, grid)
    plans = planner.plans = {name: planner.with_activations(plan, work) for name, plan in plans.items()}
    encoders, decoding = run.family.encoder_memory()
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
    """The arithmetic of one plan."""

    config: Config
    layout: RunLayout
    gpu: Gpu
    plans: dict[str, RolePlan]
    grid: tuple[int, int, int]

    def forward(self, passes: Passes) -> LocalForward:
        """One call of the passes on rank 0, with whole samples or with a segment of them."""
        whole, unrolling = self._whole(passes), self._unrolling(passes)
        return whole if unrolling is None else unrolling.one_call(whole, self.grid[0])

    def _unrolling(self, passes: Passes) -> Unrolling | None:
        """The segments in which a causal role generates samples. None for calls with whole samples."""
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
            token_region=config.roles[passes.role].parallelism.token_region,
            compute_bytes=BYTES[config.training.dtype],
            sparse=role.sparse,
        )

    def with_activations(self, role: RolePlan, work: list[Passes]) -> RolePlan:
        """The role with the largest graph and working set of its passes."""
        own = [passes for passes in work if passes.role == role.name and passes.num_forwards]
        graph = max((self._graph(passes) for passes in own), default=0.0)
        temporary = max((self._working_set(passes) for passes in own), default=0.0)
        return replace(role, graph=graph, temporary=temporary + role.weights.lasting)

    def peak(self, update: str, work: list[Passes]) -> float:
        """Most bytes on the device in the update of one role."""
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
        """The costs of passes: FLOPs per step and global batch, seconds and bytes of one rank."""
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
        # Padded tokens cost FLOPs, too, and every rank waits for the one with the most tokens.
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
        # A checkpointed block exchanges its tokens again, whatever it stores.
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
        """Tokens of one sample, tokens of its text, tiles that sparse attention reads, keys per query."""
        num_tokens, num_keys, num_text_tokens = role.shards.bounds[-1], None, self.config.data.max_text_tokens
        if role.segmentation is not None:
            unrolling = Unrolling.of(role.segmentation, self.grid, passes)
            num_tokens, num_keys = unrolling.num_tokens, unrolling.num_keys
        return num_tokens, num_text_tokens, role.sparse, num_keys

    def _flops(self, role: RolePlan, passes: Passes) -> ForwardFlops:
        return forward_flops(role.architecture, *self._sizes(role, passes))

    def _recomputed(self, role: RolePlan, passes: Passes) -> float:
        """FLOPs that the backward of one sample recomputes."""
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
        """Bytes that passes need beside graph and states."""
        unrolling = self._unrolling(passes)
        needed = self._working_set_of_a_call(passes)
        # In the role's own update the graph contains the KV cache until the backward.
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
    """All roles but heads, whose few thin layers cost next to nothing."""
    return [role for role in roles if not isinstance(role.transformer, FeatureHead)]


def _role_plan(config: Config, layout: RunLayout, role: RoleHandle, grid: tuple[int, int, int]) -> RolePlan:
    architecture = cast(DiTConfig, role.transformer.config)
    degrees, parallelism = layout.roles[role.name], config.roles[role.name].parallelism
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
    """The weights of all modules in a row, because a batch gathers both experts of a role that has two."""
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
        # A frozen role has no gradients to reduce.
        trained_share=trained / memory.num_gathered(list(module.parameters())) if trained else 1.0,
    )


def _left_out(config: Config, roles: dict[str, RolePlan]) -> Iterator[str]:
    if config.float8.enabled:
        yield "float8: seconds are those of bf16"
    if any(role.sparse is not None for role in roles.values()):
        yield "sparse attention: lower FLOP/s of its kernels; steps before the schedule's final sparsity"
    if config.compile.enabled:
        yield "compile: activations are those of eager mode, an upper bound"
    if any(role.num_experts > 1 for role in roles.values()):
        yield "two experts: steps of a rollout share a noise level and gather only one of them"
    if any(role.adapters_only for role in roles.values()):
        yield "LoRA adapters: their own FLOPs and activations"
    if any(role.offloaded and role.states.optimizer for role in roles.values()):
        yield "optimizer steps on the host"


def _times(calls: float, transfer: Transfer) -> Transfer:
    return replace(transfer, bytes_sent=calls * transfer.bytes_sent, seconds=calls * transfer.seconds)
