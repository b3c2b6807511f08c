"""Image-to-video with channels and CLIP tokens of a picture (Wan 2.1 I2V): against diffusers, and from footage on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from runs import REPOSITORY, read_metrics, tiny_argv
from tiny_i2v import CONFIG, write_i2v_pipeline
from tiny_media import write_video
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel

from titan_distill import cli
from titan_distill.config.loading import load_config
from titan_distill.data.parquet import LatentRow, ParquetDataset
from titan_distill.diffusion import sampler
from titan_distill.models.base import Guidance
from titan_distill.models.wan.image_channels import EMBEDDING, LATENT, needed_tensors, with_channels
from titan_distill.models.wan.rows import check_row
from titan_distill.models.wan.vae import load_vae
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble, main
from titan_distill.trainer import Trainer

SIZE, NUM_FRAMES, NUM_TEXT_TOKENS, SHIFT = 32, 5, 512, 3.0
VIDEO = f"--pipeline_config.num_frames {NUM_FRAMES} --pipeline_config.height {SIZE} --pipeline_config.width {SIZE}"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole image-to-video pipeline of random weights."""
    return write_i2v_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def data(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, with what their first frames give."""
    folder = tmp_path_factory.mktemp("footage")
    for name in ("a.mp4", "b.mp4"):
        write_video(folder / "videos" / name, 8 if name == "a.mp4" else 6, size=(SIZE, SIZE))
    (folder / "captions.csv").write_text("file_name,caption\na.mp4,a disc\nb.mp4,a square\n")
    cli.main(
        ["data", "preprocess", str(folder / "videos"), "--captions", str(folder / "captions.csv"), "--vae",
         str(pipeline), "--text-encoder", str(pipeline), "--out", str(folder / "out"), "--height", str(SIZE), "--width",
         str(SIZE), "--num-frames", str(NUM_FRAMES), "--dtype", "float32", "--images", "--image-encoder",
         str(pipeline)]
    )  # fmt: skip
    return folder / "out"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def arguments(method: str, pipeline: Path, data: Path, output: Path, *more: str) -> list[str]:
    roles = ("teacher", "student", "critic") if method == "dmd2" else ("student",)
    paths = [word for role in roles for word in (f"--roles.{role}.path", str(pipeline))]
    return tiny_argv(
        method, output, *VIDEO.split(), "--pipeline_config.path", str(pipeline), "--data.path", str(data),
        "--training.steps", "2", "--ema.start_step", "1", *paths, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trainer(pipeline: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        # Diffusers finds the image tokens by counting text tokens, of which there must be 512.
        words = ("--data.max_text_tokens", str(NUM_TEXT_TOKENS))
        config = load_config(arguments("dmd2", pipeline, data, tmp_path_factory.mktemp("run"), *words))
        return assemble(resolve(config, 1), World(0, 1, torch.device("cpu")))


def picture() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)


def test_sampling_is_that_of_diffusers(trainer: Trainer, pipeline: Path) -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    theirs = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, scheduler=scheduler, vae=load_vae(pipeline, "cpu"),
        transformer=WanTransformer3DModel.from_pretrained(pipeline / "transformer"),
        image_encoder=CLIPVisionModel.from_pretrained(pipeline / "image_encoder"),
        image_processor=CLIPImageProcessor.from_pretrained(pipeline / "image_processor"),
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 4), (1, NUM_TEXT_TOKENS, 16)))
    expected = theirs(
        image=Image.fromarray(picture().numpy()), prompt_embeds=text, latents=noise, guidance_scale=3.0,
        negative_prompt_embeds=trainer.adapter.negative_condition(1)["text"], num_inference_steps=5, height=SIZE,
        width=SIZE, num_frames=NUM_FRAMES, output_type="latent",
    ).frames  # fmt: skip
    condition = trainer.adapter.with_image({"text": text}, picture()[None])
    assert condition[EMBEDDING].shape == (1, 5, 24) and condition[LATENT].shape == noise.shape
    teacher = trainer.roles["teacher"]
    found = sampler.sample_ode(
        lambda x, sigma_B: trainer.adapter.guided_velocity(teacher, x, sigma_B, condition, Guidance(3.0)),
        noise, num_steps=5, shift=SHIFT, solver="unipc",
    )  # fmt: skip
    assert bool(((found - expected).abs() <= 1e-4).all())


def test_data_hold_what_sampling_makes_of_the_first_frame(trainer: Trainer, data: Path) -> None:
    row = ParquetDataset(data, tensors=(LATENT, EMBEDDING))[0]
    assert row.vae_latent is not None and row.extra[LATENT].shape == row.vae_latent.shape == (16, 2, 4, 4)
    first = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)  # of the drawn video, up to the codec
    expected = trainer.adapter.with_image({}, first)
    for name, value in expected.items():
        assert bool(((row.extra[name] - value[0]).abs() <= 0.05 * value.abs().max()).all()), name
    # Not the first latent frame with zeros behind it, nor the clip's own latent.
    assert float((row.extra[LATENT] - row.vae_latent).abs()[:, 1].max()) > 0.005


def test_mask_and_latent_follow_the_noise() -> None:
    x, latent = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    shown = with_channels(x, {LATENT: latent})
    assert torch.equal(shown[:, :16], x) and torch.equal(shown[:, 20:], latent)
    assert bool((shown[:, 16:20, 0] == 1).all()) and bool((shown[:, 16:20, 1:] == 0).all())
    assert with_channels(x[:, :, :1], {LATENT: latent}).shape == (2, 36, 1, 4, 4)


@pytest.mark.parametrize("method", ["finetune", "dmd2"])
def test_training_from_parquet(method: str, pipeline: Path, data: Path, tmp_path: Path) -> None:
    more = "--validation.enabled true --validation.num_prompts 2 --validation.num_videos 1 --validation.scorer none"
    prompts = f"--validation.prompts {data} --validation.batch_size 2"
    method_steps = "--method_config.validation_steps 2" if method == "finetune" else "--method_config.teacher_steps 2"
    words = f"{more} {prompts} {method_steps}".split()
    assert main(arguments(method, pipeline, data, tmp_path, *words)) == 0
    # The last line of validation aside, each step trained.
    lines = [line for line in read_metrics(tmp_path) if "loss/student" in line]
    assert lines and all(line["grad_norm/student"] > 0 for line in lines)
    if method == "dmd2":
        picture_file = tmp_path / "picture.png"
        Image.fromarray(picture().numpy()).save(picture_file)
        checkpoint = ["--checkpoint", str(tmp_path / "checkpoints" / "latest"), "--prompt", "a disc"]
        out = tmp_path / "a.mp4"
        cli.main(["generate", *checkpoint, "--out", str(out), "--image", str(picture_file)])
        assert out.stat().st_size
        with pytest.raises(SystemExit):
            cli.main(["generate", *checkpoint, "--out", str(out)])


def test_training_from_videos(pipeline: Path, data: Path, tmp_path: Path) -> None:
    """The pictures are encoded with the clips."""
    videos = tmp_path / "videos.csv"
    footage = data.parent / "videos"
    videos.write_text(f"video,prompt\n{footage}/a.mp4,a disc\n{footage}/b.mp4,a square\n")
    config = load_config(arguments("finetune", pipeline, videos, tmp_path / "run", "--method_config.cfg_dropout", "0"))
    trainer = assemble(resolve(config, 1), World(0, 1, torch.device("cpu")))
    batch = trainer.adapter.prepare_batch(next(trainer.loader))
    condition = trainer.adapter.text_condition(batch)
    assert condition[LATENT].shape == (4, 16, 2, 4, 4) and condition[EMBEDDING].shape == (4, 5, 24)
    trainer.train_step()


def test_the_picture_and_not_only_the_text_decides(trainer: Trainer) -> None:
    teacher, x = trainer.roles["teacher"], torch.randn(1, 16, 2, 4, 4)
    text, sigma_B = {"text": torch.zeros(1, 64, 16)}, torch.tensor([0.5]).double()
    condition = trainer.adapter.with_image(text, picture()[None])
    reference = trainer.adapter.predict_velocity(teacher, x, sigma_B, condition)
    for name in (LATENT, EMBEDDING):
        changed = {**condition, name: condition[name].flip(-1)}
        other = trainer.adapter.predict_velocity(teacher, x, sigma_B, changed)
        assert float((other - reference).abs().max()) > 1e-3, name
    with pytest.raises(ValueError, match="starts its videos from an image, but got no image_latent"):
        trainer.adapter.predict_velocity(teacher, x, sigma_B, text)


def test_what_is_missing_is_one_sentence(
    pipeline: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_only = REPOSITORY / "tests" / "assets" / "tiny_shapes" / "prompts.parquet"
    assert main(arguments("dmd2", pipeline, text_only, tmp_path / "a")) == 2
    assert "lacks the columns image_latent_bytes" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a disc\n")
    words = f"--validation.enabled true --validation.prompts {prompts} --validation.scorer none"
    assert main(arguments("dmd2", pipeline, data, tmp_path / "b", *words.split())) == 2
    shown = capsys.readouterr().err
    assert "holds no embeddings; set validation.prompts" in shown and not shown.startswith("error: validation.prompts")
    with pytest.raises(ValueError, match="a first and a last frame are not supported"):
        needed_tensors([replace(CONFIG, pos_embed_seq_len=10)])


def test_preprocess_refuses_an_encoder_without_pictures(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    footage = data.parent
    with pytest.raises(SystemExit):
        cli.main(
            ["data", "preprocess", str(footage / "videos"), "--captions", str(footage / "captions.csv"), "--vae", "v",
             "--text-encoder", "t", "--out", str(footage / "other"), "--image-encoder", "x"]
        )  # fmt: skip
    assert "has no effect without --images" in capsys.readouterr().err


def test_a_picture_of_another_number_of_frames_is_a_bad_row() -> None:
    """Like the latent of its video. Rows of both lengths do not fit into one batch."""
    row = LatentRow("0", "a", torch.zeros(3, 16), extra={LATENT: torch.zeros(16, 3, 4, 4)})
    check_row([(16, 3, 4, 4)], 16, None, row)
    for frames in (2, 4):
        with pytest.raises(ValueError, match=rf"image_latent of \[16, 3, 4, 4\], but .* make \[16, {frames}, 4, 4\]"):
            check_row([(16, frames, 4, 4)], 16, None, row)
