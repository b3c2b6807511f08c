"""An adversarial term for distribution matching: a discriminator that reads the critic's features.

A student that only follows its teacher inherits the teacher's faults. Real samples know better: a discriminator learns
to tell them from the student's, and the student learns to deceive it (DMD2, 2405.14867, §4.3). It judges noised
samples, at the noise levels at which scores are compared, and reads what the critic holds between its parts, which at
every level knows what a sample should look like.

The discriminator is a role of its own, `discriminator`, a head (`models.head`) with its own update and learning rate,
due whenever the critic's is. Its update leaves the critic as it is: features are made without gradient, so that they
stay those of the task that the critic is for, the student's score, and cost no activations. The student's term does
need the gradient through the critic, but with respect to its own samples alone: it is taken on the spot, and what
enters the student's loss is linear in the sample. No gradient of critic or discriminator is ever made there.

With a logit z that tells real (positive) from made (negative) samples, trained by the non-saturating losses

    discriminator   softplus(−z_real) + softplus(z_made) [+ r1_weight · (z_real − z_perturbed)²]
    student         softplus(−z_made)

the optimum is z = log(p_real / p_made). R1 proper penalises the discriminator's gradient at real samples and needs a
second derivative through all of the critic; its approximation (APT, 2501.08316, eq. 3) compares a real sample with one
that is moved a little in a random direction. Both are then noised alike, with the same noise at the same level, or the
difference would be one between noise levels.

**Which divergence.** Distribution matching descends the reverse KL divergence, one of many D_f = ∫ p_made f(r),
r = p_real / p_made. Differentiating through the samples, ∇_x = −r f″(r) ∇r = −r² f″(r) (s_real − s_made): the same
difference of scores, weighed by h(r) = r² f″(r) (f-distill, 2502.15681). And r = exp(z) is at hand:

    reverse_kl        f = −log r                              h = 1            seeks modes
    forward_kl        f = r log r                             h = r            covers them
    jensen_shannon    f = r log r − (1 + r) log((1 + r)/2)    h = r / (1 + r)  between the two, bounded

The scores are the guided teacher's and the ratio is the data's: a heuristic wherever guidance moves the one from the
other.

A discriminator that wins finds all of the student's samples unlikely. Then h is small for every sample, and the whole
term fades just where the student is furthest from the data. `normalise_weights` makes h relative to the global batch:
r is divided by its mean among samples of similar noise levels, where a perfect discriminator's mean is 1, and h by its
mean over all. The means need every sample before the first loss, so the student makes its samples twice
(`Update.prepare`); in return they do not depend on ranks and micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.parsing import check_no_effect, check_range
from titan_distill.config.resume import logged
from titan_distill.data.loader import Batch
from titan_distill.diffusion.transfer import to_device
from titan_distill.methods.base import GlobalMean, Head, LossResult, Passes, Update
from titan_distill.methods.few_step import FewStepTraining, GuidedFewStepConfig
from titan_distill.models.base import Condition

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]

MAX_RATIO = 10.0
"""Largest weight of forward_kl, and largest ratio p_real / p_made or p_made / p_real that normalised weights consider.
Without it, a confident discriminator could let one sample dominate the batch."""
NUM_RATIO_BINS = 10
"""Number of equal parts of [0, 1] in which noise levels count as similar, as in FastGen. The ratio of a sample alone in
its part becomes 1."""
WEIGHT = "divergence_weight"
"""Name in `Batch.extra` of the normalised weights [B]."""


@dataclass(frozen=True)
class AdversarialConfig(GuidedFewStepConfig):
    """Settings of the discriminator and of the uses of its logit."""

    adversarial_weight: float = logged(0.0)
    """Weight of the adversarial term in the student's update; 0 leaves it out, FastGen uses 0.03."""
    f_divergence: Divergence = logged("reverse_kl")
    """Divergence that distribution matching minimises. All but reverse_kl need a discriminator, whose output weighs
    each student sample."""
    normalise_weights: bool = logged(True)
    """True: the weights of f_divergence have mean 1 over the global batch, so that a discriminator that finds all
    samples unlikely does not switch distribution matching off. It costs one more rollout without gradient per student
    update."""
    discriminator_depths: tuple[int, ...] = ()
    """Blocks of the critic, counted from 0, whose hidden states the discriminator reads, for example 15, 22 and 29 of
    30."""
    r1_weight: float = logged(0.0)
    """Weight of the approximate R1 penalty in the discriminator's update; 0 leaves it out."""
    r1_noise: float = logged(0.1)
    """Standard deviation of the noise added to a real sample for the R1 penalty."""

    @property
    def has_discriminator(self) -> bool:
        return self.adversarial_weight > 0 or self.f_divergence != "reverse_kl"

    @property
    def has_normalised_weights(self) -> bool:
        return self.f_divergence != "reverse_kl" and self.normalise_weights

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "adversarial_weight", "r1_weight", least=0)
        check_range(self, "r1_noise", above=0)
        if self.f_divergence == "reverse_kl":
            check_no_effect(self, "normalise_weights", given="f_divergence")
        if self.has_discriminator and not self.discriminator_depths:
            raise ValueError(
                "discriminator_depths is empty, but adversarial_weight and f_divergence ask for a discriminator; name "
                "the critic's blocks that it reads"
            )
        if not self.has_discriminator and (self.discriminator_depths or self.r1_weight):
            raise ValueError(
                "discriminator_depths and r1_weight have no effect without a discriminator; set adversarial_weight "
                "above 0, or remove them"
            )
        if len(set(self.discriminator_depths)) < len(self.discriminator_depths):
            raise ValueError(f"discriminator_depths = {list(self.discriminator_depths)} names a block twice; drop one")


def discriminator_loss(z_real_B: Tensor, z_made_B: Tensor) -> Tensor:
    """Returns softplus(−z_real) + softplus(z_made), [B]: logistic regression of real against generated samples."""
    return F.softplus(-z_real_B) + F.softplus(z_made_B)


def deception_loss(z_made_B: Tensor) -> Tensor:
    """Returns softplus(−z_made), [B]. It is non-saturating: its gradient is largest where the discriminator is
    right."""
    return F.softplus(-z_made_B)


DIVERGENCE_WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda z_B: z_B.exp().clamp(max=MAX_RATIO),
    "jensen_shannon": torch.sigmoid,
}
"""Weight h(r) = r² f″(r) at r = exp(z) per divergence, as a function of the logits z [B] of generated samples.
forward_kl's is limited to MAX_RATIO."""


@torch.no_grad()
def divergence_weight(divergence: Divergence, z_made_B: Tensor) -> Tensor:
    """Returns the weights [B] of generated samples with these logits."""
    return DIVERGENCE_WEIGHTS[divergence](z_made_B)


@torch.no_grad()
def normalised_weight(divergence: Divergence, z_made_N: Tensor, sigma_N: Tensor, mean: GlobalMean) -> Tensor:
    """Returns weights [N] whose mean over the global batch is 1.

    Each ratio exp(z), limited to [1 / MAX_RATIO, MAX_RATIO], is divided by the mean ratio of the samples whose noise
    level is in the same of NUM_RATIO_BINS parts, and each weight h by the mean weight.
    """
    z_N = z_made_N.double().clamp(-math.log(MAX_RATIO), math.log(MAX_RATIO))
    part_N = (sigma_N * NUM_RATIO_BINS).long().clamp(max=NUM_RATIO_BINS - 1)
    is_in_NP = to_device(F.one_hot(part_N, NUM_RATIO_BINS).double(), z_N.device)
    share_P, ratio_P = mean(torch.stack([is_in_NP, is_in_NP * z_N.exp()[:, None]], 1)).unbind()
    mean_ratio_N = is_in_NP @ (ratio_P / share_P.clamp(min=torch.finfo(torch.float64).tiny))
    h_N = divergence_weight(divergence, z_N - mean_ratio_N.log())
    return h_N / mean(h_N)


class AdversarialTraining(FewStepTraining):
    """Training of the discriminator, for methods with a student, a critic and samples of the student."""

    @classmethod
    def heads(cls, config: Any) -> dict[str, Head]:
        return {"discriminator": Head("critic", config.discriminator_depths)} if config.has_discriminator else {}

    @classmethod
    def required_roles(cls, config: Any) -> dict[str, bool]:
        return super().required_roles(config) | dict.fromkeys(cls.heads(config), True)

    @classmethod
    def validate(cls, config: Config) -> None:
        super().validate(config)
        for name in ("critic", "discriminator") if cls.heads(config.method_config) else ():
            if config.roles[name].parallelism != config.parallelism:
                raise ValueError(
                    f"roles.{name}.parallelism differs from [parallelism], but critic and discriminator must be on the "
                    "ranks that share a sample; remove the table"
                )

    @classmethod
    def adversarial_passes(cls, config: Any, rollout: float, students: float, critics: float) -> list[Passes]:
        """Returns the passes that the discriminator adds, if a rollout makes `rollout` forwards."""
        if not config.has_discriminator:
            return []
        judged = 3 if config.r1_weight else 2
        weights = [Passes("student", "student", "rollout", rollout, students)] if config.has_normalised_weights else []
        if config.f_divergence != "reverse_kl":
            weights.append(Passes("student", "critic", "discriminator", 1, students))
        deception = Passes("student", "critic", "discriminator", 1, students, backward=True)
        return [
            *weights,
            *([deception] if config.adversarial_weight else []),
            Passes("discriminator", "student", "rollout", rollout, critics),
            Passes("discriminator", "critic", "discriminator", 1, critics, num_conditions=judged),
        ]

    def discriminator_updates(self) -> list[Update]:
        """Returns the discriminator's updates, which are due whenever the critic's is."""
        return [Update("discriminator", self.discriminator_loss)] if self.config.has_discriminator else []

    def sample_for_discriminator(self, batch: Batch, condition: Condition, step: int) -> tuple[Tensor, Tensor]:
        """Returns samples of the student, and the noise levels [B] at which to judge them. Called without gradient."""
        raise NotImplementedError

    def discriminator_loss(self, batch: Batch, step: int) -> LossResult:
        """Teaches the discriminator to tell the batch from the student's current samples."""
        assert batch.latents is not None
        config, real, condition = self.config, batch.latents, self.adapter.text_condition(batch)
        with torch.no_grad():
            made, sigma_B = self.sample_for_discriminator(batch, condition, step)
        clean, noises = [real, made], [self._noise(batch, step, "real"), self._noise(batch, step, "made")]
        if config.r1_weight:
            # Moved, then noised as the one that was not: all that differs is what the penalty is about.
            clean.append(real + config.r1_noise * self._noise(batch, step, "r1"))
            noises.append(noises[0])
        x = torch.cat([self.adapter.add_noise(*pair, sigma_B) for pair in zip(clean, noises, strict=True)])
        times = len(clean)
        repeated = {name: torch.cat([value] * times) for name, value in condition.items()}
        z_B, z_made_B, *z_moved_B = self._logits(x, sigma_B.repeat(times), repeated, through=False).chunk(times)
        losses_B = discriminator_loss(z_B, z_made_B)
        if z_moved_B:
            losses_B = losses_B + config.r1_weight * (z_B - z_moved_B[0]) ** 2
        metrics = {"discriminator/logit_real": z_B.detach(), "discriminator/logit_made": z_made_B.detach()}
        return LossResult(losses_B, metrics)

    def adversarial_term(
        self, batch: Batch, condition: Condition, step: int, x0: Tensor, sigma_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Returns the weighted deception loss of the student's samples, [B]. Its gradient reaches only `x0`.

        `sigma_of` turns uniform draws into noise levels.
        """
        sigma_B = sigma_of(self.noise.uniform("adversarial/student/timestep", step, batch.sample_ids))
        leaf = x0.detach().requires_grad_()
        with torch.enable_grad():  # the held-out loss has no graph but this one
            x = self.adapter.add_noise(leaf, self._noise(batch, step, "student"), sigma_B)
            loss_B = deception_loss(self._logits(x, sigma_B, condition, through=True))
            (gradient,) = torch.autograd.grad(loss_B.sum(), leaf)
        linear_B = ((x0 - leaf.detach()) * gradient).double().flatten(1).sum(1)
        return self.config.adversarial_weight * (loss_B.detach() + linear_B)

    def scored_sample(self, batch: Batch, condition: Condition, step: int) -> tuple[Tensor, Tensor]:
        """Returns the student's samples of its update as their scores are compared: noised, with their noise levels
        [B]. Called without gradient."""
        raise NotImplementedError

    def with_weights(self, micro_batches: Sequence[Batch], step: int, mean: GlobalMean) -> list[Batch]:
        """Returns the micro-batches with the normalised weights of their samples, WEIGHT."""
        z_N, sigma_N = [], []
        for batch in micro_batches:
            condition = self.adapter.text_condition(batch)
            x, sigma_B = self.scored_sample(batch, condition, step)
            z_N.append(self._logits(x, sigma_B, condition, through=False))
            sigma_N.append(sigma_B)
        weight_N = normalised_weight(self.config.f_divergence, torch.cat(z_N), torch.cat(sigma_N), mean)
        parts = weight_N.split([len(batch.sample_ids) for batch in micro_batches])
        return [
            replace(batch, extra={**batch.extra, WEIGHT: part})
            for batch, part in zip(micro_batches, parts, strict=True)
        ]

    @torch.no_grad()
    def weight(self, batch: Batch, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor | None:
        """Returns the weights [B] of the samples' differences of scores at `x` for the configured divergence; None for
        weights of 1."""
        if self.config.f_divergence == "reverse_kl":
            return None
        if self.config.normalise_weights:
            return batch.extra[WEIGHT]
        return divergence_weight(self.config.f_divergence, self._logits(x, sigma_B, condition, through=False))

    def _logits(self, x: Tensor, sigma_B: Tensor, condition: Condition, *, through: bool) -> Tensor:
        """Returns the logits [B], float64. `through` says whether gradients reach `x`; they always reach the head."""
        critic, head = self.roles["critic"], self.roles["discriminator"].transformer
        with self.timer("discriminator"), torch.set_grad_enabled(through):
            features = self.adapter.features(critic, x, sigma_B, condition, self.config.discriminator_depths)
        return self.adapter.mean_over_positions(critic, x, head(*features))

    def _noise(self, batch: Batch, step: int, whose: str) -> Tensor:
        return self.normal(f"adversarial/noise/{whose}", batch, step)
