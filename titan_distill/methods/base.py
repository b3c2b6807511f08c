"""A training method is a list of updates.

At each step the trainer runs the updates of `method.updates(step)` in order: accumulate over micro-batches, backward,
finiteness, clip, optimizer, schedule, EMA. The cadence (for instance five critic updates per student update) is thus a
property of the method. The trainer knows neither roles nor losses. The method knows no model family, because it uses
models only through the family's Adapter. So N methods and M families need N + M implementations, not N × M.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.role_sections import HEAD_FLAVOR
from titan_distill.data.loader import Batch
from titan_distill.data.parquet import RowCheck
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import TrajectoryRequest, ValidationRequest
from titan_distill.models.base import Adapter
from titan_distill.observability.timing import PhaseTimer
from titan_distill.registry import METHODS, lookup
from titan_distill.roles import RoleManager


@dataclass(frozen=True)
class LossResult:
    """Per-sample values of one micro-batch. The trainer sums over samples and divides by the global count."""

    losses_B: Tensor
    """Differentiable losses [B]. Training minimises their sum over the global batch divided by the global batch
    size."""
    metrics_B: dict[str, Tensor] = field(default_factory=dict)
    """Detached [B] values, averaged over the global batch and logged under their key."""


GlobalMean = Callable[[Tensor], Tensor]
"""Mean over the global batch of values [N, ...], one for each of this rank's samples. Collective."""


@dataclass(frozen=True)
class Update:
    """One optimizer step of one role."""

    role: str
    loss: Callable[[Batch, int], LossResult]
    """Called as `loss(micro_batch, step)` once per micro-batch, with gradients enabled."""
    ema: bool = True
    """Whether this update also updates the role's EMA, if the role has one."""
    prepare: Callable[[Sequence[Batch], int, GlobalMean], Sequence[Batch]] | None = None
    """Called as `prepare(micro_batches, step, mean)` before the first loss, without gradients. It returns the
    micro-batches that `loss` gets, for instance with tensors that depend on the whole global batch."""


@dataclass(frozen=True)
class Passes:
    """Forward passes that an update makes through one role. A method declares its passes so that the planner knows its
    costs.

    `num_forwards` is the number of calls per micro-batch, averaged over random choices. `num_conditions` is the number
    of copies of each sample in a call's batch (2 if guidance needs both conditions).
    """

    update: str
    """Role whose update makes the passes."""
    role: str
    phase: str
    """Purpose of the passes, as the method's timers name it."""
    num_forwards: float
    updates_per_step: float
    num_conditions: int = 1
    backward: bool = False
    """Whether the passes have a backward. At most one call of an update has one."""
    forward_mode: bool = False
    """Whether the passes carry tangents, which count as a second condition. Self-attention then has three times its
    products, not two."""
    segments: int | None = None
    """Number of segments if a causal role generates segment by segment, with one call per segment. 0 means as many as a
    sample has, None means calls on whole samples."""


@dataclass(frozen=True)
class Head:
    """Input of a role that is a small head on the features of another role, not a network of the family."""

    of: str
    """Role whose network provides the features."""
    depths: tuple[int, ...]
    """Blocks of that network, counted from 0, whose outputs are the features."""


class TrainingMethod(ABC):
    """Base of all methods; subclasses are registered with `@register_method`."""

    config_class: ClassVar[type]
    """Frozen dataclass that types `[method_config]`."""
    roles_required: ClassVar[dict[str, bool]]
    """Role name -> whether the role must be trainable. `required_roles` adapts it to the configuration."""
    causal_roles: ClassVar[frozenset[str]] = frozenset()
    """Roles that may generate a sample segment by segment."""

    def __init__(self, config: Any, roles: RoleManager, adapter: Adapter, noise: KeyedNoise, timer: PhaseTimer) -> None:
        self.config, self.roles, self.adapter, self.noise, self.timer = config, roles, adapter, noise, timer

    num_held_out_draws: ClassVar[int] = 4
    """Number of draws of noise, levels and exits in which the held-out loss takes each row."""
    uses_loss_mask: ClassVar[bool] = False
    """Whether every loss leaves out the parts of a sample that the condition gives (`Adapter.loss_mask`). Families give
    such parts only to methods for which this is true."""

    @classmethod
    def required_roles(cls, config: Any) -> dict[str, bool]:
        """Returns the roles under this `method_config`: name -> whether the role must be trainable."""
        return cls.roles_required

    @classmethod
    def heads(cls, config: Any) -> dict[str, Head]:
        """Returns the roles that are heads under this `method_config`; their `flavor` is "head"."""
        return {}

    @classmethod
    def needs_latents(cls, config: Any) -> bool:
        """Returns whether the data must have latents. Otherwise rows with text suffice."""
        return True

    @classmethod
    def extra_tensors(cls, config: Any) -> tuple[str, ...]:
        """Returns the names of further tensors that every row of the data must have. `Batch.extra` contains them."""
        return ()

    @classmethod
    def unreached(cls, config: Config) -> list[str]:
        """Returns a sentence with the consequence for each of the method's own schedules that the run is too short
        for."""
        return []

    @classmethod
    def row_checks(cls, config: Config) -> tuple[RowCheck, ...]:
        """Returns checks of each row of parquet data: the tensors of `extra_tensors` against the configuration."""
        return ()

    @classmethod
    def teacher_trajectory(cls, config: Any, flow_shift: float) -> TrajectoryRequest | None:
        """Returns the teacher's sampling whose trajectories the data must contain under this `method_config`; None if
        it needs none."""
        return None

    @classmethod
    def passes(cls, config: Any) -> list[Passes]:
        """Returns the passes of all updates under this `method_config`, in the order they run, for the planner.
        Default: an empty list, for unknown passes."""
        return []

    @classmethod
    def validate(cls, config: Config) -> None:
        """Checks the whole configuration against the method's invariants. Raises ValueError."""
        required = cls.required_roles(config.method_config)
        for name, trainable in required.items():
            if name not in config.roles:
                raise ValueError(
                    f"recipe.method = {config.recipe.method!r} needs [roles.{name}], but the configuration has only "
                    f"{', '.join(config.roles) or 'no roles'}; add a [roles.{name}] table"
                )
            if config.roles[name].trainable != trainable:
                raise ValueError(
                    f"roles.{name}.trainable = {str(not trainable).lower()}, but {config.recipe.method!r} "
                    f"{'trains' if trainable else 'never trains'} its {name}; set it to {str(trainable).lower()}"
                )
            if config.roles[name].attention == "causal" and name not in cls.causal_roles:
                raise ValueError(
                    f"roles.{name}.attention = 'causal', but {config.recipe.method!r} runs its {name} on whole samples "
                    "with one noise level; set it to 'dense' or 'sparse'"
                )
        if unused := sorted(set(config.roles) - set(required)):
            raise ValueError(
                f"[roles.{unused[0]}] is not used by recipe.method = {config.recipe.method!r}, "
                f"whose roles are {', '.join(required)}; remove the table"
            )

        heads = cls.heads(config.method_config)
        for name, role in config.roles.items():
            if (name in heads) != (role.flavor == HEAD_FLAVOR):
                what = f"is a head; set it to {HEAD_FLAVOR!r}" if name in heads else "is no head; name a network's"
                raise ValueError(
                    f"roles.{name}.flavor = {role.flavor!r}, but the {name} of {config.recipe.method!r} {what}"
                )
            if name in heads and (role.init_from or role.attention != "dense" or role.dtype != "auto"):
                raise ValueError(
                    f"roles.{name} is a head, which has no init_from, attention or dtype of its own; remove them"
                )

    @abstractmethod
    def updates(self, step: int) -> list[Update]:
        """Returns the updates due at `step` (counted from 0), in the order they must run."""

    @classmethod
    @abstractmethod
    def num_updates(cls, config: Any, num_steps: int) -> dict[str, int]:
        """Returns how many updates each trained role has in the first `num_steps` steps under this `method_config`, by
        a formula: a run may have more steps than can be counted one by one. Learning-rate schedules need it."""
        raise ValueError(f"the method {cls.__name__} has no classmethod num_updates(cls, config, num_steps); add it")

    def held_out_updates(self, step: int) -> list[Update]:
        """Returns the updates whose losses and metrics are the held-out loss after `step` steps. Default: those due at
        `step`. A method whose roles take turns returns the updates of all of them."""
        return self.updates(step)

    def measured_with(self, noise: KeyedNoise, timer: PhaseTimer) -> TrainingMethod:
        """Returns the method on the same roles with other noise, for losses that train nothing. Their seconds go to
        `timer`, because those of the run's are seconds of training."""
        other = copy.copy(self)
        other.noise, other.timer = noise, timer
        return other

    def normal(self, purpose: str, batch: Batch, step: int, shape: Sequence[int] | None = None) -> Tensor:
        """Returns standard normal noise [B, *shape] keyed by `purpose`, step and sample. Default shape: that of
        latents."""
        shape, device = self.adapter.latent_shape if shape is None else shape, batch.text_embeddings.device
        return self.noise.normal(purpose, step, batch.sample_ids, shape, device=device)

    @abstractmethod
    def validation_request(self) -> ValidationRequest:
        """Returns the sample sets that a validation compares."""


def method_class(name: str) -> type[TrainingMethod]:
    """Returns the method registered under `name`. Raises ValueError with the known methods and the nearest name."""
    return lookup(METHODS, name)
