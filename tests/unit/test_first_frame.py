"""First-frame conditioning of Wan 2.2 TI2V: what networks are shown, what losses count, and what diffusers does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_ti2v
import torch
import toy_run
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from titan_distill.config.loading import load_config
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.methods.base import method_class
from titan_distill.models.base import Guidance
from titan_distill.models.wan import first_frame
from titan_distill.models.wan.first_frame import IMAGE, MASK, ImageMixing
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer
from titan_distill.validation.sampling import Sampling

CPU = torch.device("cpu")
CLEAN = ("--pipeline_config.image_noise_mean", "-inf")
ALL_IMAGES = ("--pipeline_config.image_probability", "1.0")
METHODS = [name for name in toy_run.METHODS if method_class(name).uses_loss_mask]
SETTINGS = {"consistency": ("--ema.decay", "0.9"), "rcm": ("--method_config.tangent_warmup", "2")}

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ti2v.write_pipeline(tmp_path_factory.mktemp("ti2v"))


@pytest.fixture
def make(pipeline: Path, tmp_path: Path) -> MakeTrainer:
    def make(method: str, *overrides: str) -> Trainer:
        data = tiny_ti2v.write_data(tmp_path / "data.parquet")
        argv = tiny_ti2v.arguments(method, pipeline, data, tmp_path / "run", *SETTINGS.get(method, ()), *overrides)
        return assemble(resolve(load_config(argv), 1), World(rank=0, size=1, device=CPU))

    return make


def first_batch(trainer: Trainer) -> Batch:
    return trainer.adapter.prepare_batch(next(trainer.loader))


@contextmanager
def watched(trainer: Trainer) -> Iterator[list[dict[str, Any]]]:
    """Every call of a network: role, input, times and output."""
    calls: list[dict[str, Any]] = []
    hooks = []
    for role in trainer.roles:

        def note(module: Any, arguments: tuple[Tensor, ...], output: Tensor, name: str = role.name) -> None:
            if output.requires_grad:
                output.retain_grad()
            x, timestep = (value.detach().clone() for value in arguments[:2])
            calls.append({"role": name, "x": x, "timestep": timestep, "output": output})

        hooks.append(role.transformer.register_forward_hook(note))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def losses_of(trainer: Trainer, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    """Loss of each update due, with its gradients in the networks."""
    found = {}
    for update in trainer.method.updates(step):
        result = update.loss(batch, step)
        result.losses_B.sum().backward()
        found[update.role] = result.losses_B.detach()
    return found


# What networks are shown


def test_a_noised_image_in_its_place_is_the_image_at_its_own_level() -> None:
    """(1 − m) z + m x_σ is z noised to m σ, so that both halves of `held` say the same."""
    generator = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(3, 4, 5, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma_B, mask_B = torch.tensor([0.9, 0.4, 1.0]).double(), torch.tensor([0.03, 1.0, 0.0]).double()
    x, level = first_frame.held(schedule.add_noise(z, noise, sigma_B), sigma_B, {IMAGE: z[:, :, :1], MASK: mask_B})
    expected_BF = sigma_B[:, None] * torch.ones(3, 5)
    expected_BF[:, 0] *= mask_B
    assert torch.equal(level.flatten(1), expected_BF)
    torch.testing.assert_close(x, schedule.add_noise(z, noise, level), rtol=0, atol=1e-15)
    assert torch.equal(x[2, :, 0], z[2, :, 0])
    assert torch.equal(x[1], schedule.add_noise(z, noise, sigma_B)[1])


def test_clean_estimates_use_each_frames_own_level(make: MakeTrainer) -> None:
    """With the scalar level, the given frame would be moved by a velocity that nobody learned."""
    trainer = make("finetune", *ALL_IMAGES, *CLEAN)
    batch = first_batch(trainer)
    assert batch.latents is not None
    condition = trainer.adapter.text_condition(batch)
    x = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    sigma_B = torch.tensor([0.9, 0.5, 0.2, 1.0]).double()
    with torch.no_grad(), watched(trainer) as calls:
        x0 = trainer.adapter.predict_x0(trainer.roles["student"], x, sigma_B, condition, Guidance(3.0))
    assert torch.equal(x0[:, :, 0], batch.latents[:, :, 0])
    (call,) = calls
    cond, uncond = call["output"].chunk(2)
    velocity = uncond + 3.0 * (cond - uncond)
    expected = x[:, :, 1:].double() - sigma_B.view(-1, 1, 1, 1, 1) * velocity[:, :, 1:].double()
    torch.testing.assert_close(x0[:, :, 1:], expected.float())
    assert velocity[:, :, 0].abs().min() > 0


def test_every_sample_has_times_of_its_own(make: MakeTrainer) -> None:
    """Images and text in one batch: frame 0 at m · 1000 σ, the rest at 1000 σ, by sample and under both guidances."""
    trainer = make("finetune")
    batch = first_batch(trainer)
    condition = trainer.adapter.text_condition(batch)
    mask_B = condition[MASK]
    assert 0 < int((mask_B < 1).sum()) < 4  # the seed gives both kinds
    sigma_B = torch.tensor([0.9, 0.5, 0.2, 0.7]).double()
    x = torch.zeros(4, *tiny_ti2v.LATENT_SHAPE)
    with torch.no_grad(), watched(trainer) as calls:
        trainer.adapter.predict_x0(trainer.roles["student"], x, sigma_B, condition, Guidance(3.0))
    times_BF = 1000 * sigma_B[:, None] * torch.cat([mask_B[:, None], torch.ones(4, 2)], 1)
    torch.testing.assert_close(calls[0]["timestep"], torch.cat([times_BF, times_BF]).float())
    assert calls[0]["timestep"].dtype == torch.float32


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_the_image_is_put_back_after_every_step_of_a_rollout(make: MakeTrainer, sampler: str) -> None:
    trainer = make("dmd2", *ALL_IMAGES, *CLEAN, "--method_config.student_sampler", sampler)
    batch = first_batch(trainer)
    assert batch.latents is not None
    step = next(s for s in range(50) if trainer.method.noise.index("dmd2/student/exit", s, 4) == 3)
    with watched(trainer) as calls:
        trainer.method.student_loss(batch, step)  # type: ignore[attr-defined]
    assert [call["role"] for call in calls] == ["student"] * 4 + ["critic", "teacher"]
    for call in calls:
        copies = len(call["x"]) // len(batch.latents)
        assert torch.equal(call["x"][:, :, 0], batch.latents[:, :, 0].repeat(copies, 1, 1, 1))
        assert (call["timestep"][:, 0] == 0).all() and (call["timestep"][:, 1:] > 0).all()


# What losses count


DISCRIMINATOR = (
    "--roles.discriminator.flavor", "head", "--roles.discriminator.trainable", "true",
    "--method_config.adversarial_weight", "1.0", "--method_config.discriminator_depths", "[0,1]",
)  # fmt: skip


def test_a_discriminator_does_not_move_a_given_frame(make: MakeTrainer) -> None:
    """It reads the whole sample, with a share of m of what the student says there, from which no gradient comes."""
    trainer = make("dmd2", *DISCRIMINATOR)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.roles["discriminator"].parameters():  # as it starts, it says nothing
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    batch = first_batch(trainer)
    is_given_B = trainer.adapter.text_condition(batch)[MASK] < 1
    with watched(trainer) as calls:
        trainer.method.student_loss(batch, 0).losses_B.sum().backward()  # type: ignore[attr-defined]
    (student,) = (call for call in calls if call["role"] == "student" and call["output"].grad is not None)
    assert (student["output"].grad[is_given_B][:, :, 0] == 0).all()
    assert (student["output"].grad[~is_given_B][:, :, 0] != 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_on_a_given_frame_are_exactly_zero(make: MakeTrainer, method: str) -> None:
    trainer = make(method)
    batch = first_batch(trainer)
    is_given_B = trainer.adapter.text_condition(batch)[MASK] < 1
    with watched(trainer) as calls:
        losses_of(trainer, batch)
    outputs = {call["role"]: call["output"] for call in calls if call["output"].requires_grad}
    assert outputs.keys() == {role.name for role in trainer.roles.trainable}
    for output in outputs.values():
        assert output.grad is not None
        assert (output.grad[is_given_B][:, :, 0] == 0).all()
        assert all((frame != 0).any() for frame in output.grad[:, :, 1:].unbind(2))
        assert (output.grad[~is_given_B][:, :, 0] != 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_no_loss_reads_what_a_network_says_about_a_given_frame(make: MakeTrainer, method: str) -> None:
    """Not even through DMD's normaliser: any velocity there gives the same losses and gradients, to the last bit."""
    seen = []
    for scale in (1.0, 100.0):
        trainer = make(method, *ALL_IMAGES, *CLEAN)

        def change(module: Any, arguments: Any, output: Tensor, scale: float = scale) -> Tensor:
            return torch.cat([scale * output[:, :, :1], output[:, :, 1:]], 2)

        for role in trainer.roles:
            role.transformer.register_forward_hook(change)
        losses = losses_of(trainer, first_batch(trainer))
        gradients = [p.grad for role in trainer.roles.trainable for p in role.transformer.parameters()]
        seen.append([*losses.values(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_dmd_is_its_formula_over_the_frames_that_are_made(make: MakeTrainer) -> None:
    """½ mean g², g = (x_fake − x_real) / mean |x_g − x_real|, all means over the frames after the image."""
    trainer = make("dmd2", *ALL_IMAGES, "--method_config.guidance_scale", "4")
    with watched(trainer) as calls:
        losses_B = losses_of(trainer, first_batch(trainer))["student"]
    (student, critic, teacher), _ = calls_of_student_update(calls)
    conditional, unconditional = teacher["output"].chunk(2)
    guided = unconditional + 4 * (conditional - unconditional)
    x_g, fake, real = (
        call["x"][: len(losses_B), :, 1:].double()
        - call["timestep"][: len(losses_B), 1:, None, None].unsqueeze(1).double() / 1000 * velocity[:, :, 1:].double()
        for call, velocity in ((student, student["output"]), (critic, critic["output"]), (teacher, guided))
    )
    g = (fake - real) / (x_g - real).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(losses_B, 0.5 * (g**2).flatten(1).mean(1).detach(), rtol=1e-5, atol=0)


def calls_of_student_update(calls: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Exit forward, critic and teacher of the student's update; what came after."""
    last = next(index for index, call in enumerate(calls) if call["role"] == "teacher")
    return calls[last - 2 : last + 1], calls[last + 1 :]


def test_text_alone_counts_every_frame(make: MakeTrainer) -> None:
    """In a mixed batch a sample without an image is trained on as in a run without images."""
    mixed = make("finetune", "--method_config.cfg_dropout", "0")
    plain = make("finetune", "--method_config.cfg_dropout", "0", "--pipeline_config.image_probability", "0")
    batch = first_batch(mixed)
    text_only_B = mixed.adapter.text_condition(batch)[MASK] == 1
    losses, expected = (losses_of(trainer, batch)["student"] for trainer in (mixed, plain))
    torch.testing.assert_close(losses[text_only_B], expected[text_only_B], rtol=1e-6, atol=0)
    assert (losses[~text_only_B] != expected[~text_only_B]).all()


# Which samples start from an image


def draws(mixing: ImageMixing, ids: list[int]) -> Tensor:
    return mixing.condition(ids, torch.zeros(len(ids), 1, 2, 1, 1))[MASK]


def test_images_are_drawn_by_sample_with_the_published_law() -> None:
    mixing = ImageMixing(KeyedNoise(3), 0.2, -3.5, 0.5)
    mask_N = draws(mixing, list(range(4000)))
    given = mask_N[mask_N < 1]
    assert abs(len(given) / 4000 - 0.2) < 0.02
    assert abs(given.log().mean() + 3.5) < 0.06 and abs(given.log().std() - 0.5) < 0.04
    assert torch.equal(draws(mixing, [70, 3]), mask_N[[70, 3]])  # by id, whatever else is in the batch
    assert not torch.equal(draws(ImageMixing(KeyedNoise(4), 0.2, -3.5, 0.5), list(range(4000))), mask_N)
    clean = draws(ImageMixing(KeyedNoise(3), 1.0, float("-inf"), 0.5), [0, 1])
    assert (clean == 0).all()


def test_prompts_to_sample_from_bring_no_image(make: MakeTrainer) -> None:
    """As when trajectories are recorded: rows without latents, in a job that trains on images."""
    trainer = make("finetune", *ALL_IMAGES)
    batch = replace(first_batch(trainer), latents=None)
    assert trainer.adapter.text_condition(batch).keys() == {"text"}


# Sampling, and what diffusers does


@pytest.mark.parametrize("solver", ["sde", "euler", "unipc"])
def test_a_video_starts_with_the_image_exactly(make: MakeTrainer, solver: str) -> None:
    adapter, role = (trainer := make("finetune")).adapter, trainer.roles["student"]
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    text = adapter.encode_prompts(["one", "another"])
    condition = adapter.with_image(text, images)
    sigmas = None if solver == "unipc" else (1.0, 0.9, 0.6)
    request = SampleRequest("student", "student", solver, 3, sigmas, guidance_scale=2.0)  # type: ignore[arg-type]
    sampling = Sampling(adapter, KeyedNoise(0), CPU)
    video, without = (sampling.run(request, role, given, [0, 1]) for given in (condition, text))
    assert torch.equal(video[:, :, :1], adapter.encode_video(images[:, None]))
    assert (video[:, :, 1:] - without[:, :, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("from_image", [False, True])
def test_sampling_equals_diffusers(make: MakeTrainer, pipeline: Path, from_image: bool) -> None:
    """UniPC with guidance, same noise, through a pipeline with expand_timesteps."""
    trainer = make("finetune", "--pipeline_config.negative_prompt", "blurred")
    adapter = trainer.adapter
    noise = torch.randn(2, *tiny_ti2v.LATENT_SHAPE, generator=torch.Generator().manual_seed(2))
    prompts, scale, num_steps = ["a circle", "two squares that move"], 4.0, 6
    image = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {
        "prompt": prompts, "negative_prompt": ["blurred"] * 2, "height": 64, "width": 96,
        "num_frames": tiny_ti2v.NUM_FRAMES, "num_inference_steps": num_steps, "guidance_scale": scale,
        "latents": noise, "max_sequence_length": tiny_ti2v.MAX_TEXT_TOKENS, "output_type": "latent",
    }  # fmt: skip
    kind = WanImageToVideoPipeline if from_image else WanPipeline
    if from_image:
        common["image"] = (image.permute(2, 0, 1).float() / 127.5 - 1)[None]
    loaded = kind.from_pretrained(pipeline)
    assert loaded.config.expand_timesteps
    loaded.set_progress_bar_config(disable=True)
    theirs = loaded(**common).frames
    condition = adapter.encode_prompts(prompts)
    if from_image:
        condition = adapter.with_image(condition, image.expand(2, -1, -1, -1))
    ours = sample_from(trainer, noise, condition, scale, num_steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if from_image:
        assert torch.equal(ours[:, :, :1], condition[IMAGE])


def sample_from(trainer: Trainer, noise: Tensor, condition: Any, scale: float, num_steps: int) -> Tensor:
    class Given(KeyedNoise):
        def normal(self, *arguments: Any, **options: Any) -> Tensor:
            return noise

    request = SampleRequest("student", "student", "unipc", num_steps, guidance_scale=scale)
    return Sampling(trainer.adapter, Given(0), CPU).run(request, trainer.roles["student"], condition, [0, 1])


# Refusals


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        (
            "finetune",
            ("--pipeline_config.image_probability", "1.5"),
            "image_probability = 1.5 is out of range",
        ),
        ("finetune", ("--pipeline_config.image_noise_mean", "0.5"), "image_noise_mean = 0.5 must be at most -1"),
        (
            "finetune",
            ("--pipeline_config.image_noise_std", "2"),
            "image_noise_std = 2.0 is out of range",
        ),
        ("finetune", (*CLEAN, "--pipeline_config.image_noise_std", "0.1"), "image_noise_std = 0.1 has no effect"),
        ("finetune", ("--pipeline_config.num_frames", "1"), "num_frames = 1 leaves nothing to make"),
        (
            "finetune",
            ("--pipeline_config.image_probability", "0", "--pipeline_config.image_noise_std", "0.1"),
            "image_noise_std = 0.1 has no effect with image_probability = 0",
        ),
        *(
            (method, (), f"which recipe.method = '{method}' would count in its loss")
            for method in ("scm", "rcm", "knowledge_distillation")
        ),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    argv = tiny_ti2v.arguments(method, tmp_path, tmp_path, tmp_path, *SETTINGS.get(method, ()), *overrides)
    with pytest.raises(ValueError, match=message):
        load_config(argv)


def test_a_model_without_images_says_so(make: MakeTrainer, pipeline: Path) -> None:
    trainer = make("finetune", "--pipeline_config.image_probability", "0")
    images = torch.zeros(1, 64, 96, 3, dtype=torch.uint8)
    assert MASK in trainer.adapter.with_image({}, images)  # the pipeline is a TI2V one
    index = pipeline / "model_index.json"
    text = index.read_text()
    try:
        index.write_text(text.replace("true", "false"))
        adapter = make("finetune", "--pipeline_config.image_probability", "0").adapter
        with pytest.raises(ValueError, match="make videos from text only"):
            adapter.with_image({}, images)
        index.write_text("[]")
        with pytest.raises(ValueError, match="is no index of a pipeline"):
            make("finetune", "--pipeline_config.image_probability", "0")
    finally:
        index.write_text(text)


def test_text_only_data_is_refused(make: MakeTrainer, tmp_path: Path) -> None:
    from titan_distill.data.parquet import LatentRow, write_rows

    write_rows(tmp_path / "text.parquet", [LatentRow("0", "a", torch.zeros(2, tiny_ti2v.TEXT_WIDTH))])
    with pytest.raises(ValueError, match="holds only text"):
        make("dmd2", "--data.path", str(tmp_path / "text.parquet"))
