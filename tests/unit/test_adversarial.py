"""DMD2's adversarial option: its formulas, who gets gradients, the optimum, and mutants that each of these must catch.

The toy family's data are N(1, 0.49), its guided teacher N(4, 0.49): what follows the discriminator ends at the one,
what follows the scores at the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from forked import train_forked
from mutants import is_caught
from runs import REPOSITORY, tiny_argv
from torch import Tensor
from toy_family import CONDITIONAL_MEAN, VARIANCE, write_data
from toy_run import ASSETS, toy_trainer

from titan_distill.data.loader import Batch
from titan_distill.methods import adversarial, losses
from titan_distill.methods.dmd2 import Dmd2, Dmd2Config
from titan_distill.methods.rcm import Rcm, RcmConfig
from titan_distill.methods.self_forcing import SelfForcing, SelfForcingConfig
from titan_distill.models.head import FeatureHead
from titan_distill.roles import RoleHandle
from titan_distill.train import main
from titan_distill.trainer import Trainer

FP64 = torch.float64
R1 = ("--method_config.r1_weight", "2.0", "--method_config.r1_noise", "0.3")
NAMES = ("student", "critic", "teacher", "discriminator")


def method_and_batch(folder: Path, dtype: torch.dtype, *overrides: str) -> tuple[Trainer, Dmd2, Batch]:
    """A run whose discriminator has an opinion."""
    trainer = toy_trainer(folder, "adversarial", *overrides)
    assert isinstance(trainer.method, Dmd2)
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        trainer.roles[name].transformer.to(dtype)
    for parameter in trainer.roles["discriminator"].transformer.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    batch = trainer.adapter.prepare_batch(next(trainer.loader))
    assert batch.latents is not None
    return trainer, trainer.method, replace(batch, latents=batch.latents.to(dtype))


def with_gradients(trainer: Trainer) -> set[str]:
    return {name for name in NAMES if any(p.grad is not None for p in trainer.roles[name].transformer.parameters())}


def literal_logits(trainer: Trainer, x: Tensor, sigma_B: Tensor) -> Tensor:
    """The discriminator's mean over values, layer by layer."""
    critic, head = (trainer.roles[name].transformer for name in ("critic", "discriminator"))
    assert isinstance(head, FeatureHead)
    inputs = torch.stack([x, sigma_B[:, None].expand_as(x), torch.ones_like(x)], -1)
    first = torch.nn.functional.silu(critic.blocks[0](inputs))
    second = torch.nn.functional.silu(critic.blocks[1](first))
    return sum(reader(f) for reader, f in zip(head.readers, (first, second), strict=True)).squeeze(-1).mean(1)


def softplus(z: Tensor) -> Tensor:
    return (1 + z.exp()).log()


def test_a_sharded_head_has_the_architecture_of_a_whole_one() -> None:
    """FSDP gives a module a type of its own; a checkpoint of any layout resumes in any other."""
    whole, sharded = FeatureHead(4, 2), FeatureHead(4, 2)
    sharded.__class__ = type("FSDPFeatureHead", (FeatureHead,), {})
    assert sharded.architecture() == whole.architecture()


# --- what the updates compute, literally


def check_discriminator_update(folder: Path) -> None:
    """softplus(−z_real) + softplus(z_made) + 2 (z_real − z_moved)², and its gradient; real, made and moved samples at
    one noise level each, the moved one with the real one's noise. Nobody else learns."""
    trainer, method, batch = method_and_batch(folder, FP64, *R1)
    assert batch.latents is not None
    seen: list[tuple[Tensor, Tensor]] = []
    real_features = trainer.adapter.features

    def features(role: RoleHandle, x: Tensor, sigma_B: Tensor, *rest: Any) -> list[Tensor]:
        seen.append((x, sigma_B))
        return real_features(role, x, sigma_B, *rest)

    with patch.object(trainer.adapter, "features", features):
        result = method.discriminator_loss(batch, 3)
    ((x, sigma_3B),) = seen
    x_real, x_made, x_moved = x.chunk(3)
    sigma_B, *others = sigma_3B.chunk(3)
    assert all(torch.equal(other, sigma_B) for other in others)

    noise = {
        name: method.noise.normal(f"adversarial/noise/{name}", 3, batch.sample_ids, (64,), device="cpu").double()
        for name in ("real", "r1")
    }
    level = sigma_B[:, None]
    torch.testing.assert_close(x_real, (1 - level) * batch.latents + level * noise["real"], rtol=0, atol=1e-10)
    torch.testing.assert_close(x_moved - x_real, (1 - level) * 0.3 * noise["r1"], rtol=0, atol=1e-6)
    z_real, z_made, z_moved = (literal_logits(trainer, each, sigma_B) for each in (x_real, x_made, x_moved))
    literal_B = softplus(-z_real) + softplus(z_made) + 2.0 * (z_real - z_moved) ** 2
    assert (result.losses_B - literal_B).abs().max() < 1e-10
    assert (z_real - z_moved).abs().mean() > 1e-3

    result.losses_B.sum().backward()
    assert with_gradients(trainer) == {"discriminator"}
    parameters = list(trainer.roles["discriminator"].transformer.parameters())
    expected = torch.autograd.grad(literal_B.sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def check_student_update(folder: Path) -> None:
    """The gradient in the student's sample is that of distribution matching and half of that of softplus(−z), which is
    taken at the sample noised anew. Nobody else learns."""
    trainer, method, batch = method_and_batch(folder, torch.float32)
    captured: list[Tensor] = []
    real_loss = losses.dmd_loss

    def capture(x: Tensor, g: Tensor, mask: Tensor | None) -> Tensor:
        x.retain_grad()
        captured.extend((x, g))
        return real_loss(x, g, mask)

    with patch.object(losses, "dmd_loss", capture):
        result = method.student_loss(batch, 0)
    result.losses_B.sum().backward()
    assert with_gradients(trainer) == {"student"}
    x_g, direction = captured
    trainer.roles["critic"].transformer.double()
    trainer.roles["discriminator"].transformer.double()
    sample = x_g.detach().double().requires_grad_()
    sigma_B = method.noise.uniform("adversarial/student/timestep", 0, batch.sample_ids).clamp(0.02, 0.98)
    noise = method.noise.normal("adversarial/noise/student", 0, batch.sample_ids, (64,), device="cpu").double()
    x = (1 - sigma_B[:, None]) * sample + sigma_B[:, None] * noise
    deception_B = softplus(-literal_logits(trainer, x, sigma_B))
    (gradient,) = torch.autograd.grad(deception_B.sum(), sample)
    assert x_g.grad is not None and gradient.abs().mean() > 1e-4
    expected = direction / 64 + 0.5 * gradient
    torch.testing.assert_close(x_g.grad.double(), expected, rtol=1e-5, atol=1e-7)
    found_B = result.metrics_B["dmd/adversarial"]
    torch.testing.assert_close(found_B, 0.5 * deception_B.detach(), rtol=1e-5, atol=1e-8)


def check_divergences(folder: Path) -> None:
    """h(r) = r² f″(r) by automatic differentiation, and the weights of a run that does not normalise them."""
    generators: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda r: -r.log(),
        "forward_kl": lambda r: r * r.log(),
        "jensen_shannon": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    }
    z_B = torch.tensor([-2.0, -0.3, 0.0, 0.4, 2.0], dtype=FP64)
    for name, f in generators.items():
        r = z_B.exp().requires_grad_()
        (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), r)
        h_B = adversarial.divergence_weight(name, z_B)  # type: ignore[arg-type]
        assert (h_B - r.detach() ** 2 * curvature).abs().max() < 1e-10, name
    assert adversarial.divergence_weight("forward_kl", torch.tensor([50.0])) == adversarial.MAX_RATIO

    raw = ("--method_config.f_divergence", "forward_kl", "--method_config.normalise_weights", "false")
    trainer, method, batch = method_and_batch(folder, FP64, *raw)
    assert batch.latents is not None
    sigma_B = torch.full((8,), 0.3, dtype=FP64)
    found_B = method.weight(batch, batch.latents, sigma_B, trainer.adapter.text_condition(batch))
    expected_B = literal_logits(trainer, batch.latents, sigma_B).exp().clamp(max=10)
    torch.testing.assert_close(found_B, expected_B.detach(), rtol=1e-9, atol=1e-12)
    assert expected_B.std() > 1e-3
    assert all(update.prepare is None for update in method.updates(0))


DIVERGENCES = ("forward_kl", "jensen_shannon")
SIGMAS = torch.tensor([0.02, 0.03, 0.31, 0.35, 0.39, 0.62, 0.95, 1.0], dtype=FP64)


def literal_weights(divergence: str, z_N: Tensor, sigma_N: Tensor) -> Tensor:
    """Sample by sample: its ratio over the mean ratio of its tenth of noise levels, and h of it over the mean h."""
    ratios = [min(max(math.exp(z), 0.1), 10.0) for z in z_N.tolist()]
    tenths = [min(int(10 * sigma), 9) for sigma in sigma_N.tolist()]
    weights = []
    for ratio, tenth in zip(ratios, tenths, strict=True):
        similar = [r for r, t in zip(ratios, tenths, strict=True) if t == tenth]
        relative = ratio / (sum(similar) / len(similar))
        weights.append(min(relative, 10.0) if divergence == "forward_kl" else relative / (1 + relative))
    return torch.tensor(weights, dtype=FP64) / (sum(weights) / len(weights))


def check_normalised_weights(folder: Path) -> None:
    """Written out, for an undecided discriminator, a winning one, and one that is sure to the last digit."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(8, generator=generator, dtype=FP64)
    for divergence in DIVERGENCES:
        for z_N in (0.5 * spread, 0.5 * spread - 2.0, 300 * spread - 800):
            found = adversarial.normalised_weight(divergence, z_N, SIGMAS, lambda values: values.mean(0))  # type: ignore[arg-type]
            torch.testing.assert_close(found, literal_weights(divergence, z_N, SIGMAS), rtol=1e-12, atol=1e-12)
            assert found.mean().item() == pytest.approx(1, abs=1e-12)
        raw = adversarial.divergence_weight(divergence, 0.5 * spread - 2.0)  # type: ignore[arg-type]
        assert raw.mean() < 0.25


def gradient_of_the_student(folder: Path, *overrides: str) -> tuple[list[Tensor], float]:
    """Gradient that one update of the student leaves, by the real trainer, and the mean size of its direction. The
    discriminator finds all samples unlikely, some more than others."""
    trainer, method, batch = method_and_batch(folder, torch.float32, *overrides)
    real_logits = method._logits

    def logits(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return real_logits(x, *arguments, **options) - 0.3 + 0.3 * x[:, 0]

    with patch.object(method, "_logits", logits):
        update = method.updates(0)[0]
        totals, _ = trainer.forward_backward(update, trainer.roles["student"], batch)
    gradients = [p.grad.clone() for p in trainer.roles["student"].parameters() if p.grad is not None]
    return gradients, totals["dmd/gradient_size"].item() / 8


def check_matching_keeps_its_strength(folder: Path) -> None:
    """A winning discriminator leaves matching about as strong as reverse KL has it, and micro-batches of any
    size give the same gradient."""
    plain = ("--method_config.adversarial_weight", "0.01")
    _, size = gradient_of_the_student(folder, *plain)
    for divergence in DIVERGENCES:
        chosen = (*plain, "--method_config.f_divergence", divergence)
        _, raw = gradient_of_the_student(folder, *chosen, "--method_config.normalise_weights", "false")
        whole, normalised = gradient_of_the_student(folder, *chosen)
        assert raw < 0.3 * size and normalised == pytest.approx(size, rel=0.05)
        for local_batch in ("4", "1"):
            parts, _ = gradient_of_the_student(folder, *chosen, "--training.local_batch_size", local_batch)
            for one, other in zip(whole, parts, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


CHECKS = {
    check.__name__: check
    for check in (
        check_discriminator_update,
        check_student_update,
        check_divergences,
        check_normalised_weights,
        check_matching_keeps_its_strength,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, tmp_path: Path) -> None:
    CHECKS[name](tmp_path)


# --- where it leads

TRAINING = (
    "--training.steps", "200", "--training.global_batch_size", "16", "--training.local_batch_size", "16",
    "--metrics.log_interval", "500", "--method_config.denoising_steps", "[1000.0]", "--method_config.update_ratio", "1",
    "--optimizer.lr", "4e-2", "--lr_scheduler.decay", "cosine",
    "--roles.critic.optimizer.lr", "5e-3", "--roles.discriminator.optimizer.lr", "5e-3",
    "--method_config.adversarial_weight", "1.0",
)  # fmt: skip


def student_law(folder: Path) -> tuple[float, float]:
    """Mean and deviation of a one-step student, without the scores' part of its loss."""
    real_loss = losses.dmd_loss
    trainer = toy_trainer(folder, "adversarial", *TRAINING)
    with patch.object(losses, "dmd_loss", lambda x, g, mask: real_loss(x, 0 * g, mask)):
        trainer.run()
    noise = torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x0 = trainer.adapter.predict_x0(
            trainer.roles["student"], noise, torch.ones(1024, dtype=FP64), {"label": torch.ones(1024, 1)}
        )
    return x0.mean().item(), x0.std().item()


# --- mutants

ORIGINAL_LOGITS, ORIGINAL_NOISE, ORIGINAL_UPDATES = Dmd2._logits, Dmd2._noise, Dmd2.discriminator_updates


def _gradients_everywhere(self: Dmd2, *arguments: Any, through: bool) -> Tensor:
    return ORIGINAL_LOGITS(self, *arguments, through=True)


def _loss_through_the_critic(
    self: Dmd2, batch: Batch, condition: Any, step: int, x0: Tensor, sigma_of: Callable[[Tensor], Tensor]
) -> Tensor:
    sigma_B = sigma_of(self.noise.uniform("adversarial/student/timestep", step, batch.sample_ids))
    x = self.adapter.add_noise(x0, self._noise(batch, step, "student"), sigma_B)
    return self.config.adversarial_weight * adversarial.deception_loss(
        self._logits(x, sigma_B, condition, through=True)
    )


def _fresh_noise_for_r1(self: Dmd2, batch: Batch, step: int, whose: str) -> Tensor:
    noise = ORIGINAL_NOISE(self, batch, step, whose)
    return 2 * noise if whose == "r1" else noise


def _r1_at_another_level(tensors: Any, *rest: Any) -> Tensor:
    """`torch.cat` of the noised samples when the moved one is noised less."""
    parts = list(tensors)
    if len(parts) == 3 and parts[0].shape[-1] == 64:
        parts[2] = parts[2] - 0.1 * (parts[2] - parts[0])
    return ORIGINAL_CAT(parts, *rest)


ORIGINAL_CAT = torch.cat


def _saturating(z_B: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(z_B)


def _encouraged(z_B: Tensor) -> Tensor:
    return torch.nn.functional.softplus(z_B)


def _mean_of_a_micro_batch(self: Dmd2, micro_batches: Any, step: int, mean: Any) -> list[Batch]:
    return [ORIGINAL_WITH_WEIGHTS(self, [batch], step, lambda values: values.mean(0))[0] for batch in micro_batches]


def _raw(divergence: Any, z_N: Tensor, *_: Any) -> Tensor:
    return adversarial.divergence_weight(divergence, z_N)


def _one_stage(divergence: Any, z_N: Tensor, sigma_N: Tensor, mean: Any) -> Tensor:
    h_N = adversarial.divergence_weight(divergence, z_N)
    return h_N / mean(h_N)


ORIGINAL_WITH_WEIGHTS = Dmd2.with_weights


def _labels_swapped(z_real_B: Tensor, z_made_B: Tensor) -> Tensor:
    return torch.nn.functional.softplus(z_real_B) + torch.nn.functional.softplus(-z_made_B)


MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "the discriminator's update reaches the critic": (
        lambda: patch.object(Dmd2, "_logits", _gradients_everywhere), "check_discriminator_update"
    ),
    "the student's update reaches critic and discriminator": (
        lambda: patch.object(Dmd2, "adversarial_term", _loss_through_the_critic), "check_student_update"
    ),
    "R1 moves twice as far": (lambda: patch.object(Dmd2, "_noise", _fresh_noise_for_r1), "check_discriminator_update"),
    "R1 at another level": (lambda: patch.object(torch, "cat", _r1_at_another_level), "check_discriminator_update"),
    "labels swapped": (
        lambda: patch.object(adversarial, "discriminator_loss", _labels_swapped), "check_discriminator_update"
    ),
    "saturating loss": (lambda: patch.object(adversarial, "deception_loss", _saturating), "check_student_update"),
    "student encouraged": (lambda: patch.object(adversarial, "deception_loss", _encouraged), "check_student_update"),
    "weights not normalised": (
        lambda: patch.object(adversarial, "normalised_weight", _raw), "check_matching_keeps_its_strength"
    ),
    "weights normalised by micro-batch": (
        lambda: patch.object(Dmd2, "with_weights", _mean_of_a_micro_batch), "check_matching_keeps_its_strength"
    ),
    "ratios not normalised": (
        lambda: patch.object(adversarial, "normalised_weight", _one_stage), "check_normalised_weights"
    ),
    "weights left out": (
        lambda: patch.object(adversarial, "divergence_weight", lambda name, z: torch.ones_like(z)), "check_divergences"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    plant, check = MUTANTS[name]
    assert is_caught(lambda: CHECKS[check](tmp_path), plant())


OUTCOME_MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "labels swapped": lambda: patch.object(adversarial, "discriminator_loss", _labels_swapped),
    "student encouraged": lambda: patch.object(adversarial, "deception_loss", _encouraged),
    "discriminator never trained": lambda: patch.object(Dmd2, "discriminator_updates", lambda self: []),
}
NIGHTLY = [pytest.param(name, marks=() if name == "none" else pytest.mark.nightly) for name in OUTCOME_MUTANTS]


@pytest.mark.parametrize("name", NIGHTLY)
def test_the_discriminator_alone_leads_to_the_data(name: str, tmp_path: Path) -> None:
    with OUTCOME_MUTANTS[name]():
        mean, deviation = student_law(tmp_path)
    # Ten seeds come within 0.09 and 0.103. Mutants end at means of 0 and -1.9.
    found = abs(mean - CONDITIONAL_MEAN) < 0.15 and abs(deviation - VARIANCE**0.5) < 0.15
    assert found == (name == "none"), (mean, deviation)


# --- on two ranks


def a_rank_forgets_the_others() -> None:
    """Mutant: a global mean that counts the samples of one rank."""
    Trainer._global_mean = lambda self, values_N: values_N.double().sum(0) / 8  # type: ignore[method-assign]


def test_two_ranks_weigh_their_samples_together(tmp_path: Path) -> None:
    """The second student update, of step 5, when the discriminator has an opinion."""
    write_data(tmp_path / "toy.parquet")
    chosen = ("--method_config.f_divergence", "jensen_shannon", "--data.path", str(tmp_path / "toy.parquet"))
    argv = [
        "--job.config_file",
        str(ASSETS / "toy_adversarial.toml"),
        *chosen,
        "--roles.discriminator.optimizer.lr",
        "0.3",
    ]

    def student_step(name: str, num_ranks: int, before: Callable[[], None] | None = None) -> dict[str, float]:
        (tmp_path / name).mkdir()
        options = ["--job.output_dir", str(tmp_path / name / "run"), "--training.local_batch_size", str(8 // num_ranks)]
        codes = train_forked(num_ranks, [*argv, *options], tmp_path / name, before)
        assert codes == [0] * num_ranks, (tmp_path / name / "rank0.txt").read_text()
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[5])

    one, two = student_step("one", 1), student_step("two", 2)
    for key in ("dmd/gradient_size", "loss/student", "grad_norm/student"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
    wrong = student_step("mutant", 2, a_rank_forgets_the_others)
    assert wrong["dmd/gradient_size"] != pytest.approx(one["dmd/gradient_size"], rel=1e-3)


# --- around it


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    saving = ("--checkpoint.enabled", "true", "--checkpoint.interval", "4", "--checkpoint.resume_from", "latest")
    constant = ("--lr_scheduler.decay", "constant")
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = toy_trainer(tmp_path / "whole", "adversarial", *constant)
    whole.run()
    for steps in ("4", "8"):
        resumed = toy_trainer(tmp_path / "parts", "adversarial", *saving, *constant, "--training.steps", steps)
        resumed.run()
    for name in ("student", "critic", "discriminator"):
        pairs = zip(resumed.roles[name].parameters(), whole.roles[name].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name
    assert resumed.roles["discriminator"].num_updates == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--method_config.adversarial_weight", "-1"), "adversarial_weight = -1.0 is out of range; choose at least 0"),
        (("--method_config.discriminator_depths", "[]"), "discriminator_depths is empty, but adversarial_weight"),
        (("--method_config.discriminator_depths", "[1, 1]"), r"discriminator_depths = \[1, 1\] names a block twice"),
        (("--method_config.adversarial_weight", "0"), "no effect without a discriminator"),
        (("--method_config.normalise_weights", "false"), "normalise_weights = false has no effect with f_divergence"),
        (("--method_config.r1_noise", "0"), "r1_noise = 0.0 is out of range; choose above 0"),
        (("--roles.discriminator.flavor", "mlp"), r"roles\.discriminator\.flavor = 'mlp', but .* is a head; set it to"),
        (("--roles.critic.flavor", "head"), r"roles\.critic\.flavor = 'head', but .* is no head; name a network's"),
        (("--roles.discriminator.attention", "sparse"), r"roles\.discriminator is a head, which has no init_from"),
        (("--roles.critic.parallelism.tensor", "2"), r"roles\.critic\.parallelism differs from \[parallelism\]"),
    ],
)
def test_refusals(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, "adversarial", *overrides)


def test_a_discriminator_without_a_role_is_refused(tmp_path: Path) -> None:
    asked = ("--method_config.adversarial_weight", "0.1", "--method_config.discriminator_depths", "[1]")
    with pytest.raises(ValueError, match=r"needs \[roles\.discriminator\]"):
        toy_trainer(tmp_path, "dmd2", *asked)


def test_real_samples_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds only text"):
        toy_trainer(tmp_path, "adversarial", with_latents=False)


def test_rcm_takes_the_option_over(tmp_path: Path) -> None:
    role = ("--roles.discriminator.flavor", "head", "--roles.discriminator.trainable", "true")
    asked = ("--method_config.adversarial_weight", "0.1", "--method_config.discriminator_depths", "[1]")
    trainer = toy_trainer(tmp_path, "rcm", *role, *asked)
    due = [[update.role for update in trainer.method.updates(step)] for step in range(3, 7)]
    assert due == [["student"], ["student"], ["critic", "discriminator"], ["student"]]
    trainer.run()
    assert trainer.roles["discriminator"].num_updates == 2


@pytest.mark.parametrize("config_class", [Dmd2Config, SelfForcingConfig, RcmConfig])
def test_the_plan_only_grows_by_the_discriminators_passes(config_class: type[Dmd2Config]) -> None:
    method = {Dmd2Config: Dmd2, SelfForcingConfig: SelfForcing, RcmConfig: Rcm}[config_class]
    plain = method.passes(config_class())
    passes = method.passes(config_class(adversarial_weight=0.1, discriminator_depths=(1,), r1_weight=1.0))
    assert passes[: len(plain)] == plain
    assert [(p.update, p.role, p.num_conditions) for p in passes[len(plain) :]] == [
        ("student", "critic", 1), ("discriminator", "student", 1), ("discriminator", "critic", 3),
    ]  # fmt: skip
    weighing = method.passes(config_class(f_divergence="forward_kl", discriminator_depths=(1,)))
    assert [(p.update, p.role, p.phase) for p in weighing[len(plain) :]] == [
        ("student", "student", "rollout"), ("student", "critic", "discriminator"),
        ("discriminator", "student", "rollout"), ("discriminator", "critic", "discriminator"),
    ]  # fmt: skip
    rollouts = [p for p in passes if p.phase == "rollout" and p.update != "student"]
    assert rollouts[1] == replace(rollouts[0], update="discriminator")


def test_a_block_that_the_critic_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    asked = ("--method_config.discriminator_depths", "[1, 6]", "--job.dry_run")
    assert main(tiny_argv("dmd2_gan", tmp_path, *asked)) == 2
    assert "after block 6, but the network has 6 blocks, counted from 0; choose from 0 to 5" in capsys.readouterr().err
