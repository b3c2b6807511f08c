"""The plan of a run, computed on a CPU: memory per rank, FLOPs, bytes between ranks and seconds per step.

In a `fake_world` this process acts as rank 0 of any number of ranks. It builds the roles on the meta device with the
meshes of the run. Rank 0 has the largest shard of every tensor, so no rank needs more memory. The rest is arithmetic:
`memory` and `communication` give the costs of one forward, and the method's `passes` give the number of forwards per
role.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.distributed as dist
from titan_kernels import TileLayout, tile_layout
from titan_kernels.layout import useful_share
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_distill.attention.causal import Segmentation
from titan_distill.attention.sparse import SparseAttention, TilesRead
from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees, RunLayout, needs_group
from titan_distill.methods.base import Passes
from titan_distill.models.base import EncoderMemory
from titan_distill.models.head import FeatureHead
from titan_distill.observability.flops import (
    DiTConfig,
    block_matmuls,
    checkpointed_share,
    forward_flops,
    recomputed_matmuls,
    recomputed_share,
)
from titan_distill.parallelisms.mesh import World
from titan_distill.parallelisms.sequence import Method, SequenceParallel, TokenShards, choose_method
from titan_distill.planner import communication, memory, seconds
from titan_distill.planner.communication import Links, Transfer, Weights
from titan_distill.planner.hardware import Gpu
from titan_distill.planner.memory import LocalForward, States
from titan_distill.planner.seconds import Backward, Part
from titan_distill.planner.unrolling import Unrolling
from titan_distill.resolve import ResolvedRun
from titan_distill.roles import RoleHandle, RoleManager

BYTES = {"float32": 4, "bfloat16": 2}
START, VALIDATION = "the start", "validation"


@dataclass(frozen=True)
class RolePlan:
    """Plan of one role on rank 0.

    Attributes:
        num_exchanged: number of data-parallel groups whose samples the role processes.
        num_turns: number of batches in which it processes them.
        num_experts: networks of the role; each sample goes through one of them.
        tile_layout: tiles of the tokens, in which sequence ranks share them.
        sparse: key tiles that a query tile reads at the end of the schedule; None for dense attention.
        segmentation: the segments of a causal role's videos; None for other roles.
        accumulated: bytes of gradients on the device while micro-batches accumulate them, for each value of
            `training.reduce_gradients`; empty for a frozen role.
        graph: bytes of the activations stored for the backward.
        temporary: peak bytes in addition to `states` and `graph`: gathered weights, working sets, buffers.
        exchanged: `temporary` for each value of `parallelism.exchange_groups`; empty for a role without exchange.
    """

    name: str
    architecture: DiTConfig
    degrees: Degrees
    method: Method
    tile_layout: TileLayout
    shards: TokenShards
    num_exchanged: int
    num_turns: int
    states: States
    weights: Weights
    offloaded: bool
    adapters_only: bool = False
    num_experts: int = 1
    sparse: TilesRead | None = None
    segmentation: Segmentation | None = None
    accumulated: Mapping[str, float] = field(default_factory=dict)
    graph: float = 0.0
    temporary: float = 0.0
    exchanged: Mapping[str, float] = field(default_factory=dict)

    @property
    def useful_share(self) -> float:
        """Fraction of the pairs of tokens in whole blocks that are pairs of tokens of the video."""
        return useful_share(self.tile_layout.grid, self.tile_layout.tile)

    @property
    def num_groups(self) -> int:
        """Number of data-parallel groups whose samples are in one batch."""
        return self.num_exchanged // self.num_turns


@dataclass(frozen=True)
class PhasePlan:
    """Costs of one phase of a training step that the method declares."""

    passes: Passes
    executed_flops: float
    """FLOPs for the global batch, recomputation included."""
    dense_flops: float
    """FLOPs for the global batch if attention were dense and nothing were recomputed."""
    parts: tuple[Part, ...]
    """Work of one rank, padding and recomputation included."""
    transfers: tuple[Transfer, ...]
    """Transfers of one rank."""

    @property
    def compute_seconds(self) -> float:
        """Seconds in which a rank computes."""
        return sum(part.seconds for part in self.parts)

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
    held: Mapping[str, float]
    """Bytes on the device for the whole run: of each role, and of the encoders."""
    optimizer: Part
    """Optimizer steps on the device, averaged over the method's cadence."""
    reduce_gradients: str
    """`training.reduce_gradients` of the run."""
    encoders: EncoderMemory
    peak: float
    """Peak memory in bytes on the rank that needs most."""
    peak_phase: str
    """Phase of the run that reaches `peak`: `START`, `VALIDATION` or the name of the role that is updated."""
    left_out: tuple[str, ...]
    """Features of the run whose costs are missing from the plan."""

    @property
    def seconds(self) -> float:
        """Seconds per step, averaged over the method's cadence."""
        return self.optimizer.seconds + sum(phase.compute_seconds + phase.exposed_seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the GPU's usable memory."""
        return self.peak <= self.gpu.usable_gib * memory.GIB


@contextmanager
def fake_world(num_ranks: int) -> Iterator[World]:
    """Makes this process rank 0 of `num_ranks` pretended ranks. Collectives do nothing; models are built on the meta
    device."""
    assert not dist.is_initialized(), "a process has one world"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield World(rank=0, size=num_ranks, device=torch.device("meta"))
    finally:
        dist.destroy_process_group()


def can_plan(run: ResolvedRun, roles: RoleManager) -> bool:
    """Returns whether the family's networks are video transformers. Only their costs are known."""
    return run.family.token_grid() is not None and all(hasattr(role.transformer, "config") for role in _networks(roles))


def make_plan(run: ResolvedRun, roles: RoleManager, gpu: Gpu) -> Plan:
    """Plans a run whose `roles` are built on the meta device.

    Raises ValueError for a family whose networks are not video transformers.
    """
    config, layout, grid = run.config, run.layout, run.family.token_grid()
    if grid is None or not can_plan(run, roles):
        raise ValueError(f"recipe.family = {config.recipe.family!r} has no video transformers, which a plan needs")
    plans = {role.name: _role_plan(config, layout, role, grid) for role in _networks(roles)}
    work = run.method.passes(config.method_config)
    calls = [Calls(run, gpu, grid, plans[passes.role], passes) for passes in work if passes.num_forwards]
    for name, plan in plans.items():
        own = [each for each in calls if each.role.name == name]
        graph, working = _most(own)
        exchanged = {}
        if plan.num_exchanged > 1:
            for setting, turns in (("all", 1), ("in_turn", plan.num_exchanged)):
                exchanged[setting] = plan.weights.lasting + _most(each.in_turns(turns) for each in own)[1]
        plans[name] = replace(plan, graph=graph, temporary=working + plan.weights.lasting, exchanged=exchanged)
    states = sum(0 if plan.offloaded else plan.states.lasting for plan in plans.values())
    lasting = states + sum(plan.weights.lasting for plan in plans.values())
    encoders = run.family.encoder_memory()
    peaks = {VALIDATION: lasting + encoders.held + encoders.decoding} if encoders.decoding else {}
    if encoders.released:
        peaks[START] = states + encoders.held + encoders.released
    for update in [passes.update for passes in work] or [role.name for role in roles.trainable]:
        # The gradients of a head are too small to count.
        gradients = plans[update].accumulated[config.training.reduce_gradients] if update in plans else 0
        peaks[update] = (
            lasting + encoders.held + gradients + sum(_most(each for each in calls if each.passes.update == update))
        )
    peak_phase = max(peaks, key=peaks.__getitem__)
    return Plan(
        gpu=gpu,
        layout=layout,
        grid=grid,
        roles=plans,
        phases=tuple(each.phase for each in calls),
        held={
            **{name: 0 if plan.offloaded else plan.states.lasting for name, plan in plans.items()},
            "encoders": encoders.held,
        },
        optimizer=_optimizer(work, plans, gpu),
        reduce_gradients=config.training.reduce_gradients,
        encoders=encoders,
        peak=peaks[peak_phase],
        peak_phase=peak_phase,
        left_out=tuple(_left_out(config, plans)),
    )


@dataclass(frozen=True)
class Calls:
    """Costs on rank 0 of the calls that one declared kind of passes makes to one role."""

    run: ResolvedRun
    gpu: Gpu
    grid: tuple[int, int, int]
    role: RolePlan
    passes: Passes

    def in_turns(self, num_turns: int) -> Calls:
        """Returns these calls as if the role processed the samples of other data groups in `num_turns` batches."""
        return replace(self, role=replace(self.role, num_turns=num_turns))

    @property
    def unrolling(self) -> Unrolling:
        """Segments of a sample. Each is one call if the role generates segment by segment."""
        return Unrolling.of(self.role.segmentation, self.grid, self.passes)

    @property
    def sample(self) -> LocalForward:
        """Shape of a forward pass over whole videos, in one turn, for counting its bytes and FLOPs."""
        role, config = self.role, self.run.config
        return LocalForward(
            architecture=role.architecture,
            samples=config.training.local_batch_size * role.num_groups * self.passes.num_conditions,
            num_tokens=role.shards.padded_length,
            num_text_tokens=config.data.max_text_tokens,
            sequence=role.degrees.sequence,
            tensor=role.degrees.tensor,
            gathers_keys=role.degrees.sequence > 1 and role.method == "all_gather",
            token_region=config.roles[role.name].parallelism.token_region,
            compute_bytes=BYTES[config.training.dtype],
            fused_norms=not self.gpu.is_cpu,
            sparse=role.sparse,
        )

    @property
    def forward(self) -> LocalForward:
        """Forward pass of the longest call."""
        return self.unrolling.longest_call(self.sample, self.grid[0])

    @property
    def graph(self) -> float:
        """Bytes of the activations stored for the backward."""
        if not self.passes.backward:
            return 0.0
        unrolling, sample = self.unrolling, self.sample
        copied = (1 - self._checkpointed) * unrolling.copied_bytes(sample)
        turn = memory.graph(sample, self.run.config.activation_checkpoint) + unrolling.cache_bytes(sample) + copied
        return self.role.num_turns * turn  # the backward comes after all turns

    @property
    def working_set(self) -> float:
        """Peak memory in bytes beyond the autograd graph and the weight, gradient and optimizer states."""
        weights, forward = self.role.weights, self.forward
        # In the role's own update the graph contains the KV cache until the backward.
        is_own = self.passes.update == self.role.name
        cache = 0.0 if is_own else self.role.num_turns * self.unrolling.cache_bytes(self.sample)
        results = (self.role.num_turns - 1) * forward.latents
        needed = weights.passing + cache + results
        if not self.passes.backward:
            return needed + memory.forward_working_set(forward)
        working = memory.backward_working_set(forward, self.run.config.activation_checkpoint)
        return needed + weights.reducing + max(working, memory.forward_working_set(forward))

    @property
    def phase(self) -> PhasePlan:
        """Costs of all these calls in a step."""
        role, passes, config = self.role, self.passes, self.run.config
        unrolling, architecture = self.unrolling, role.architecture
        sizes = unrolling.num_tokens, config.data.max_text_tokens
        reads = role.sparse, unrolling.num_keys
        flops = forward_flops(architecture, *sizes, *reads)
        dense_flops = forward_flops(architecture, *sizes, num_keys=unrolling.num_keys)
        times = passes.num_forwards * passes.updates_per_step
        samples = times * passes.num_conditions * config.training.global_batch_size
        dense, executed = (
            samples * (of.total + passes.backward * (of.backward_of_inputs if role.adapters_only else of.backward))
            for of in (dense_flops, flops)
        )
        if passes.forward_mode:
            dense, executed = (
                total + samples / passes.num_conditions * of.self_attention
                for total, of in ((dense, dense_flops), (executed, flops))
            )
        if passes.backward:
            share = recomputed_share(architecture, config.activation_checkpoint, *sizes, *reads)
            executed += samples * flops.total * share
        calls = times * self.run.layout.num_micro_batches * len(unrolling.lengths) * role.num_turns
        return PhasePlan(
            passes=passes,
            executed_flops=executed,
            dense_flops=dense,
            parts=tuple(self._parts(samples, calls)),
            transfers=tuple(transfer.repeated(calls) for transfer in self._transfers()),
        )

    def _parts(self, samples: float, calls: float) -> Iterator[Part]:
        """Yields the work of one rank for all `samples` of all ranks, in `calls` calls of the network."""
        role, config, unrolling, sample = self.role, self.run.config, self.unrolling, self.sample
        architecture, sizes = role.architecture, (unrolling.num_tokens, config.data.max_text_tokens)
        flops = forward_flops(architecture, *sizes, role.sparse, unrolling.num_keys)
        gated, section = role.sparse is not None, config.activation_checkpoint
        backward = None
        if self.passes.backward:
            backward = Backward(
                of_weights=not role.adapters_only,
                matmuls=recomputed_matmuls(architecture, section, *sizes, gated=gated),
                attention=self._checkpointed * (section.mode == "full"),
                checkpointed=self._checkpointed,
            )
        # Keys and values of the text are the products of a block without video tokens.
        text = architecture.num_layers * sum(block_matmuls(architecture, 0, sizes[1]))
        reads_tiles = role.sparse is not None and role.sparse.num_lists
        products = seconds.products(flops, text, backward, role.useful_share if reads_tiles else None)
        if self.passes.forward_mode:
            products[seconds.ATTENTION_FORWARD] += flops.self_attention / self.passes.num_conditions
        # Padded tokens cost FLOPs, too, and every rank waits for the one with the most tokens.
        stretch = role.degrees.sequence * role.shards.padded_length / role.shards.bounds[-1]
        for part in seconds.product_parts(products, self.gpu):
            yield part.repeated(samples * stretch / role.degrees.world_size)
        moved = seconds.pointwise_bytes(sample, backward, compiled=config.compile.enabled)
        videos = calls / len(unrolling.lengths) * unrolling.num_positions / self.grid[0]
        yield seconds.memory_part(seconds.POINTWISE, videos * moved, self.gpu)
        copied = seconds.weights_bytes(role.weights, role.states, backward=backward is not None)
        yield seconds.memory_part(seconds.WEIGHTS, calls * copied, self.gpu)

    @property
    def _checkpointed(self) -> float:
        """Fraction of the blocks with activation checkpointing."""
        return checkpointed_share(self.role.architecture, self.run.config.activation_checkpoint)

    def _transfers(self) -> Iterator[Transfer]:
        role, backward, forward = self.role, self.passes.backward, self.forward
        links, last = Links(role.degrees, self.gpu), 1 / self.run.layout.num_micro_batches
        scatters = 1 if self.run.config.training.reduce_gradients == "every" else last
        yield from communication.weight_transfers(
            role.weights, links, backward=backward, scatters=scatters, sums_replicas=last
        )
        # A checkpointed block exchanges its tokens again, whatever it stores.
        directions = 1 + backward * (1 + self._checkpointed)
        yield from communication.token_transfers(forward, links, directions=directions)
        if role.offloaded:
            trips = 1 + backward * (1 + scatters)  # weights for both directions, gradients back
            size = role.states.parameters * trips
            yield Transfer("weights and gradients, host", size, size / self.gpu.host_bytes, overlaps=True)
        if role.num_exchanged > 1:
            text = memory.FP32 * role.architecture.text_dim * forward.samples * forward.num_text_tokens
            size = (forward.latents + text) * (1 + backward)
            yield links.transfer("samples, exchange all-gather", "exchange", size)


def _optimizer(work: Iterable[Passes], roles: dict[str, RolePlan], gpu: Gpu) -> Part:
    """Returns the optimizer steps of all roles that are updated on the device."""
    updates = {passes.update: passes.updates_per_step for passes in work if passes.update in roles}
    moved = sum(
        times * seconds.optimizer_bytes(roles[name].states)
        for name, times in updates.items()
        if not roles[name].offloaded
    )
    return seconds.memory_part(seconds.OPTIMIZER, moved, gpu)


def _most(calls: Iterable[Calls]) -> tuple[float, float]:
    """Returns the largest autograd graph and the largest working set of `calls`, in bytes."""
    pairs = [(each.graph, each.working_set) for each in calls]
    return max((graph for graph, _ in pairs), default=0.0), max((working for _, working in pairs), default=0.0)


def _networks(roles: RoleManager) -> list[RoleHandle]:
    """Returns all roles except heads, whose few thin layers cost next to nothing."""
    return [role for role in roles if not isinstance(role.transformer, FeatureHead)]


def _accumulated(role: RolePlan, num_micro_batches: int) -> dict[str, float]:
    """Returns the bytes of gradients on the device while micro-batches accumulate them, for each value of
    `training.reduce_gradients`.

    Whole gradients become shards block by block in the last backward, so that there is no time with all of both. The
    shards of an offloaded role are on the device only until its replicas have summed them.
    """
    several, replicated = num_micro_batches > 1, role.degrees.dp_replicate > 1
    shards = role.states.gradients if not role.offloaded else 0
    every = role.states.gradients if several and replicated else shards
    whole = role.weights.gradients if role.states.gradients else 0
    return {"last": max(whole, shards) if several else shards, "every": every}


def _role_plan(config: Config, layout: RunLayout, role: RoleHandle, grid: tuple[int, int, int]) -> RolePlan:
    architecture = cast(DiTConfig, role.transformer.config)
    degrees, parallelism = layout.roles[role.name], config.roles[role.name].parallelism
    heads = architecture.num_attention_heads
    sequence = cast("SequenceParallel | None", role.transformer.sequence)
    core = cast("SparseAttention | None", role.transformer.sparse_attention)
    layout_of_tokens = tile_layout(grid, cast("tuple[int, int, int]", role.transformer.tile))
    if core is not None:  # one of its own, at the end of the schedule: a run plans with the roles that it trains
        core = SparseAttention(config.sparse_attention)
        core.start_step(config.training.steps - 1)
    num_exchanged = degrees.model_parallel // layout.default.model_parallel
    plan = RolePlan(
        name=role.name,
        architecture=architecture,
        degrees=degrees,
        method=choose_method(heads, degrees.sequence, degrees.tensor, parallelism.sequence_method),
        tile_layout=layout_of_tokens,
        shards=TokenShards.of(layout_of_tokens, 1) if sequence is None else sequence.shards(layout_of_tokens),
        num_exchanged=num_exchanged,
        num_turns=num_exchanged if role.name in layout.in_turn else 1,
        states=memory.states(role.network, has_ema=bool(config.ema.decay) and config.ema.role == role.name),
        weights=_weights(
            role,
            BYTES[config.training.dtype],
            reshards=parallelism.reshard_after_forward,
            by_fsdp=degrees.world_size > 1 or needs_group(config),
        ),
        num_experts=len(role.modules),
        offloaded=parallelism.cpu_offload,
        adapters_only=role.adapters_only,
        sparse=None if core is None else core.tiles_read(layout_of_tokens.num_tiles),
        segmentation=cast("Segmentation | None", role.transformer.segmentation),
    )
    return replace(plan, accumulated=_accumulated(plan, layout.num_micro_batches))


def _weights(role: RoleHandle, compute_bytes: int, *, reshards: bool, by_fsdp: bool) -> Weights:
    """Returns the weights of all modules of a role together, because a batch gathers both experts of a role that has
    two."""
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
        by_fsdp=by_fsdp,
        num_modules=len(stacks),
        # A frozen role has no gradients to reduce.
        trained_share=trained / memory.num_gathered(list(module.parameters())) if trained else 1.0,
    )


def _left_out(config: Config, roles: dict[str, RolePlan]) -> Iterator[str]:
    if config.float8.enabled:
        yield "float8: seconds are those of bf16"
    if any(role.sparse is not None for role in roles.values()):
        yield "sparse attention: steps before the schedule's final sparsity"
    if config.compile.enabled:
        yield "compile: activations are those of eager mode, an upper bound"
    if any(role.num_experts > 1 for role in roles.values()):
        yield "two experts: steps of a rollout share a noise level and gather only one of them"
    if any(role.adapters_only for role in roles.values()):
        yield "LoRA adapters: their own FLOPs and activations"
    if any(role.offloaded and role.states.optimizer for role in roles.values()):
        yield "optimizer steps on the host"
