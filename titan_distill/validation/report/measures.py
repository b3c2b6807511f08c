"""Measures of the doctor: healthy range, reason and remedies of each. docs/doctor.md is made from them.

A range is wide. It is left by runs that fail, not by runs that are merely good or bad: the doctor must be silent in a
healthy run, or nobody will read it. Where it is possible a value is relative to the run's own first validation, because
no absolute contrast, error or motion is right for all footage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number that the doctor compares with a range. `metrics.jsonl` has it as `doctor/<role>/<name>`."""

    name: str
    title: str
    """Noun phrase for messages."""
    low: float
    """Smallest healthy value; -inf for any."""
    high: float
    """Largest healthy value; inf for any."""
    definition: str
    reason: str
    """Reason why a healthy run stays within the range."""
    too_low: str = ""
    """Cause and remedy of a value below the range."""
    too_high: str = ""
    """Cause and remedy of a value above the range."""

    @property
    def healthy(self) -> tuple[float | None, float | None]:
        """The range, None for a side without a limit."""
        return (self.low if math.isfinite(self.low) else None, self.high if math.isfinite(self.high) else None)

    def is_healthy(self, value: float) -> bool:
        """Returns whether a value is in the range; NaN is not."""
        return self.low <= value <= self.high

    def message(self, role: str, value: float) -> str:
        """Returns the sentence of an alarm: value, range, cause and remedy."""
        whose = f"the {role}'s {self.title}" if role else f"the {self.title}"
        remedy = self.too_low if value < self.low else self.too_high
        return f"{whose} is {value:.3g}, healthy is {self.range_text()}: {remedy}"

    def range_text(self) -> str:
        """Returns the range in words."""
        low, high = self.healthy
        if low is None:
            return f"at most {high:g}"
        return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"

    def section(self) -> str:
        """Returns the measure's section of docs/doctor.md."""
        lines = [f"### `{self.name}`", "", f"Healthy: {self.range_text()}. {self.definition}", "", self.reason, ""]
        lines += [f"- Below: {self.too_low}."] * bool(self.too_low)
        lines += [f"- Above: {self.too_high}."] * bool(self.too_high)
        return "\n".join(lines)


_AGAINST = (
    "of the trained role's samples, divided by that of the teacher's: the same prompts from the same noise. Without a "
    "teacher it is divided by that of the first baseline, and without baselines by that of the run's first validation."
)
_COLOUR = "Mean over pixels of the largest minus the smallest of red, green and blue"
_LIGHT = "Standard deviation of brightness within a video"
_SLOWER = "lower the student's learning rate, or raise the critic's (or update_ratio)"

_ALL = (
    Measure(
        name="saturation",
        title="saturation",
        low=0.5,
        high=1.6,
        definition=f"{_COLOUR} {_AGAINST}",
        reason="A student imitates its teacher's colours. Distribution matching that runs away drives them to their "
        "limits, and a regression that answers with means greys them.",
        too_low="the colours fade; train longer, or lower the weight of a consistency or regression term",
        too_high=f"the colours run to their limits; lower guidance_scale, {_SLOWER}",
    ),
    Measure(
        name="contrast",
        title="contrast",
        low=0.5,
        high=1.6,
        definition=f"{_LIGHT} {_AGAINST}",
        reason="As `saturation`, for brightness. It is near 0 where a student answers every prompt with a grey video.",
        too_low=f"the samples go flat; {_SLOWER}",
        too_high=f"the samples get harsher than the teacher's; lower guidance_scale, {_SLOWER}",
    ),
    Measure(
        name="motion",
        title="motion ratio",
        low=0.4,
        high=2.5,
        definition=f"Mean absolute difference of brightness between one frame and the next {_AGAINST}",
        reason="A student that stands still has a small part of its teacher's motion, and one that flickers several "
        "times as much.",
        too_low=f"the videos stand still; {_SLOWER}, and check that the training data moves",
        too_high=f"the videos flicker; {_SLOWER}",
    ),
    Measure(
        name="diversity",
        title="diversity over noise",
        low=0.4,
        high=2.0,
        definition="Root mean square distance between samples of the first prompt from four different noises, divided "
        "by that of the teacher's from the same noises, or by that of the run's first validation where no teacher is.",
        reason="A collapsed student makes one video of a prompt, whatever the noise. Distribution matching always "
        "loses some of its teacher's diversity.",
        too_low=f"one prompt gives one video whatever the noise; lower guidance_scale, {_SLOWER}",
        too_high=f"samples of one prompt scatter more than the teacher's; {_SLOWER}",
    ),
    Measure(
        name="start_error",
        title="denoising error under an untrained network",
        low=-math.inf,
        high=5.0,
        definition="Mean squared error of the velocity that the student (where it is causal, the critic) predicts "
        "before training for the teacher's samples, noised to the levels 0.25, 0.5 and 0.75, divided by that for the "
        "student's own samples. Once, before the first step, under the role whose samples are judged.",
        reason="Guided samples may be some times as hard to denoise as the student's own: in the default job 0.8 times "
        "at its guidance of 2, 2.3 times at 5 and 3.0 times at 6, but 7.7 times at 10, and 7.9 times when the "
        "teacher's velocities are doubled.",
        too_high="the teacher's samples are not what student and critic know, so the student would learn from noise; "
        "lower guidance_scale, or check that the roles belong to one VAE and its normalisation",
    ),
    Measure(
        name="denoising_error",
        title="error on fresh student samples",
        low=-math.inf,
        high=10.0,
        definition="Mean squared error of the velocity that the critic predicts for the student's validation samples, "
        "noised to the levels 0.25, 0.5 and 0.75 with always the same noise, divided by that of the first validation.",
        reason="Sharper samples are harder to denoise than those of the untrained student: a critic that follows has "
        "up to 4 times its first error in the default job, and one that does not follow many times.",
        too_high=f"the critic does not follow the student; {_SLOWER}",
    ),
    Measure(
        name="score_difference",
        title="score difference",
        low=0.1,
        high=2.0,
        definition="Mean size of the direction in which distribution matching moves the student's samples, over the "
        "latest 10 student updates, divided by that over the first 10 of the run.",
        reason="It falls slowly while the student approaches its teacher, and never far, because both scores are of "
        "noisy samples.",
        too_low="teacher and critic agree, so that the student has nothing to learn; check that they differ",
        too_high=f"the student runs away from its critic; {_SLOWER}",
    ),
    Measure(
        name="update_size",
        title="update size in units of the weights' last place",
        low=0.1,
        high=math.inf,
        definition="‖change of the stored weights‖ / ‖weights‖ / epsilon of their type, in every 10th update of a "
        "role, judged while the learning rate is at least a tenth of its peak.",
        reason="A smaller update is rounded away. Weights in float32 move by thousands of units. Weights in bfloat16 "
        "do not move at the learning rates that distillation needs.",
        too_low="its stored weights do not move; raise its learning rate, and store trained weights in float32 "
        "(dtype of the role)",
        too_high="its weights or gradients are not finite",
    ),
    Measure(
        name="prompts",
        title="number of different prompts among the latest samples",
        low=2,
        high=math.inf,
        definition="Number of different captions among the last 64 samples that rank 0 has loaded, from the 16th on.",
        reason="A student that trains on one prompt forgets all others.",
        too_low="all samples have the same prompt; check data.path",
    ),
)
MEASURES = {measure.name: measure for measure in _ALL}
"""All measures by name."""
