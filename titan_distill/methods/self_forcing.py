"""Self-Forcing (arXiv 2506.08009): distribution matching for a causal student, trained on its own rollouts.

A causal student generates a sample segment by segment, each from the segments before it. If it were trained on segments
of real data, it would drift at inference, where it continues its own segments. Training therefore unrolls the student
exactly as inference does: each segment is denoised in a few steps, and the result becomes context of the next segment.
The *exit* is the step at which denoising a segment stops; its x0 prediction is the result. The losses are those of
`dmd2`, applied to the whole rollout at once. Teacher and critic see a complete sample, so they also judge whether its
segments fit together.

Memory limits where gradients flow. Per segment only the forward at the exit has gradients. The context has none: one
more forward without gradient computes it, at noise level 0 or at `context_noise`, which hides small errors of earlier
segments from later ones. A rollout therefore stores the activations of one forward over a whole sample.

A rollout may be longer than a sample. Then only its last segments, as many as a sample has, are trained on
(`Adapter.last_sample`). The first of these has no gradient: the student generated it from earlier segments, which the
teacher does not see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.parsing import check_range
from titan_distill.config.resume import logged
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.methods.base import Passes
from titan_distill.methods.dmd2 import Dmd2, Dmd2Config, Rollout
from titan_distill.models.base import Condition
from titan_distill.models.streaming import SegmentStream, write_context
from titan_distill.parallelisms.compile import check_num_segments
from titan_distill.registry import register_method


@dataclass(frozen=True)
class SelfForcingConfig(Dmd2Config):
    """[method_config] of `recipe.method = "self_forcing"`."""

    same_step_across_blocks: bool = logged(True)
    """True: one exit step for all segments of a rollout. False: one is drawn for each segment."""
    context_noise: float = logged(0.0)
    """Timestep to which finished segments are noised before they enter the KV cache, in training and in sampling. 0
    adds no noise."""
    num_rollout_segments: int = logged(0)
    """Segments that the student makes in training. 0: as many as a sample has. A longer rollout is trained only on its
    last segments, one fewer than a sample has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "context_noise", least=0, below=schedule.NUM_TRAIN_TIMESTEPS)
        check_range(self, "num_rollout_segments", least=0, most=1000)
        if self.rollout == "data":
            raise ValueError(
                "rollout = 'data' trains on noised data, and recipe.method = 'self_forcing' on what the student makes "
                "itself; leave it at 'simulate'"
            )
        if (self.ts_schedule or self.ts_schedule_max) and not self.same_step_across_blocks:
            name = "ts_schedule" if self.ts_schedule else "ts_schedule_max"
            raise ValueError(
                f"{name} = true follows the exit of a rollout, but same_step_across_blocks = false gives each segment "
                "its own; change one of the two"
            )

    @property
    def context_sigma(self) -> float:
        """Noise level of `context_noise`."""
        return self.context_noise / schedule.NUM_TRAIN_TIMESTEPS


@register_method("self_forcing")
class SelfForcing(Dmd2):
    """Roles `student` (causal) and `critic` are trained, `teacher` is frozen."""

    config_class: ClassVar[type] = SelfForcingConfig
    uses_loss_mask = False  # a rollout begins with the student's own first segment, and has a mask of its own
    causal_roles: ClassVar[frozenset[str]] = frozenset({"student"})

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.context_sigma = self.config.context_sigma
        self.sample_lengths, self.lengths = self._segment_lengths(self.config.num_rollout_segments)

    def _segment_lengths(self, num_segments: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the lengths of the segments of a sample and of a rollout. Raises ValueError for a rollout without a
        segment to train."""
        if "student" not in self.roles:  # `titan-distill generate` may hold the critic alone
            return (), ()
        own = self.adapter.segment_lengths(self.roles["student"])
        assert own is not None, "the configuration checks that the student is causal"
        if not num_segments or num_segments == len(own):
            return own, own
        if num_segments < len(own) or len(own) == 1:
            raise ValueError(
                f"method_config.num_rollout_segments = {num_segments}, but a sample has {len(own)} segments, of which "
                "a longer rollout trains all but the first; set it to 0, or to more where a sample has two or more"
            )
        lengths = own + own[-1:] * (num_segments - len(own))
        # No samples: what a family lacks to encode their beginnings is told now, not after the first rollout.
        self.adapter.last_sample(torch.zeros(0, *self.adapter.segment_shape(sum(lengths))))
        return own, lengths

    @classmethod
    def validate(cls, config: Config) -> None:
        super().validate(config)
        if (attention := config.roles["student"].attention) != "causal":
            raise ValueError(
                f"roles.student.attention = {attention!r}, but recipe.method = {config.recipe.method!r} makes samples "
                "segment by segment; set it to 'causal'"
            )
        check_num_segments(config.compile, config.method_config.num_rollout_segments)

    @classmethod
    def passes(cls, config: Dmd2Config) -> list[Passes]:
        """Returns the passes of all updates. A segment takes the forwards up to its exit, and one that writes its
        context.

        For a rollout longer than a sample, all exits are counted without gradient, and those of the sample also with
        gradient, which slightly overestimates the cost.
        """
        assert isinstance(config, SelfForcingConfig)
        segments = config.num_rollout_segments

        def unrolled(passes: Passes) -> Passes:
            if passes.phase != "rollout":
                return replace(passes, segments=0) if passes.phase == "student" else passes
            written = 1 + bool(segments) if passes.update == "student" else 1
            return replace(passes, num_forwards=passes.num_forwards + written, segments=segments)

        return [unrolled(passes) for passes in super().passes(config)]

    def rollout(self, batch: Batch, condition: Condition, step: int, purpose: str) -> Rollout:
        """Runs the student over all segments. Within a segment, only the forward at its exit step may have
        gradients."""
        stream = self.adapter.open_stream(self.roles["student"], condition)
        exits = [self._exit_index(step, purpose, segment) for segment in range(len(self.lengths))]
        is_longer = len(self.lengths) > len(self.sample_lengths)
        first_trained = len(self.lengths) - len(self.sample_lengths) + is_longer
        segments = []
        with self.timer("rollout"):
            for segment, exit_index in enumerate(exits):
                trained = segment >= first_trained and torch.is_grad_enabled()
                with torch.set_grad_enabled(trained):
                    segments.append(self._segment(stream, batch, step, f"{purpose}/{segment}", segment, exit_index))
                if segment + 1 < len(exits):
                    self._write(stream, batch, step, f"{purpose}/{segment}", segments[-1])
            sequence = torch.cat(segments, dim=self.adapter.sequence_dim)
            if not is_longer:
                return Rollout(sequence, exits[-1])
            sample = self.adapter.last_sample(sequence)
        return Rollout(sample, exits[-1], self._all_but_the_first(sample))

    def _exit_index(self, step: int, purpose: str, segment: int) -> int:
        """Returns the random exit step, drawn once for the global batch, so that all ranks make the same number of
        forwards."""
        last = len(self.sigmas) - 1
        if self.config.last_step_only:
            return last
        whose = "exit" if self.config.same_step_across_blocks else f"exit/{segment}"
        return self.noise.index(f"{purpose}/{whose}", step, last + 1)

    def _segment(
        self, stream: SegmentStream, batch: Batch, step: int, purpose: str, segment: int, exit_index: int
    ) -> Tensor:
        """Returns the x0 prediction of one segment at its exit step."""
        length, levels = self.lengths[segment], self.rollout_levels(batch, step, purpose, exit_index)

        def normal(index: int) -> Tensor:
            return self._segment_noise(batch, step, f"{purpose}/noise/{index}", length)

        with torch.no_grad():
            x = self.denoise(stream.predict_x0, normal, levels)
        return stream.predict_x0(x, levels[-1])

    def _write(self, stream: SegmentStream, batch: Batch, step: int, purpose: str, x0: Tensor) -> None:
        length = x0.shape[self.adapter.sequence_dim]
        write_context(
            stream,
            x0.detach(),
            self.context_sigma,
            lambda: self._segment_noise(batch, step, f"{purpose}/context", length),
        )

    def _segment_noise(self, batch: Batch, step: int, purpose: str, length: int) -> Tensor:
        shape = self.adapter.segment_shape(length)
        return self.normal(purpose, batch, step, shape)

    def _all_but_the_first(self, sample: Tensor) -> Tensor:
        """Returns a mask that leaves the first segment of `sample` out of the student's loss."""
        dim = self.adapter.sequence_dim
        mask = sample.new_ones([sample.shape[dim] if d == dim else 1 for d in range(sample.ndim)])
        mask.narrow(dim, 0, self.sample_lengths[0]).zero_()
        return mask

    @classmethod
    def student_sample(cls, config: Dmd2Config, flow_shift: float) -> SampleRequest:
        """Returns the request of dmd2's student samples, sampled segment by segment."""
        assert isinstance(config, SelfForcingConfig)
        return replace(super().student_sample(config, flow_shift), context_sigma=config.context_sigma)
