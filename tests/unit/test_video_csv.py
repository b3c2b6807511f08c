"""A CSV of videos and prompts as data: the same samples as from parquet, and videos that start from pictures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_ti2v
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_media import brightness, write_video

from titan_distill.cli import main as cli
from titan_distill.commands.preprocess import PreprocessConfig, preprocess
from titan_distill.config.loading import load_config
from titan_distill.data.footage import VideoSize, read_picture
from titan_distill.data.loader import Batch
from titan_distill.data.prompts import read_prompts
from titan_distill.data.videos import VideoDataset
from titan_distill.models.wan.latents import find_latent_space
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble, main
from titan_distill.trainer import Trainer

CPU = torch.device("cpu")
SIZE = VideoSize(tiny_ti2v.NUM_FRAMES, tiny_ti2v.HEIGHT, tiny_ti2v.WIDTH)
LENGTHS = (9, 12, 10, 9, 11)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ti2v.write_pipeline(tmp_path_factory.mktemp("ti2v"))


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with clips/0.mp4 …, videos.csv and a captions.csv for `data preprocess`; two prompts are equal."""
    folder = tmp_path_factory.mktemp("footage")
    lines, captions = ["video,seconds,prompt"], ["file_name,caption"]
    for index, length in enumerate(LENGTHS):
        write_video(folder / "clips" / f"{index}.mp4", length, size=(64 + 16 * index, 96))
        lines.append(f'clips/{index}.mp4,1,"ramp, {index % 4}"')
        captions.append(f'{index}.mp4,"ramp, {index % 4}"')
    (folder / "videos.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    (folder / "captions.csv").write_text("\n".join(captions))
    return folder


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make(pipeline: Path, tmp_path: Path) -> MakeTrainer:
    def make(data: Path, *overrides: str, method: str = "finetune") -> Trainer:
        argv = tiny_ti2v.arguments(method, pipeline, data, tmp_path / "run", *overrides)
        return assemble(resolve(load_config(argv), 1), World(rank=0, size=1, device=CPU))

    return make


def batches(trainer: Trainer, count: int) -> list[Batch]:
    return [trainer.adapter.prepare_batch(next(trainer.loader)) for _ in range(count)]


def assert_same(one: Batch, other: Batch) -> None:
    assert one.sample_ids == other.sample_ids and one.captions == other.captions
    assert one.latents is not None and other.latents is not None
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.text_embeddings, other.text_embeddings)


def test_a_row_is_the_first_clip_of_its_video(footage: Path) -> None:
    dataset = VideoDataset(footage / "videos.csv", SIZE)
    assert len(dataset) == len(LENGTHS) and dataset.has_latents
    row = dataset[2]
    assert row.caption == "ramp, 2"
    assert row.pixels is not None and row.pixels.shape == (9, 64, 96, 3) and row.pixels.dtype == torch.uint8
    assert brightness(row.pixels) == list(range(9))
    slow = VideoDataset(footage / "videos.csv", VideoSize(3, 64, 96, fps=4.0))[1]
    assert slow.pixels is not None and brightness(slow.pixels) == [0, 2, 4]


def test_samples_are_those_of_preprocessed_parquet(
    make: MakeTrainer, footage: Path, pipeline: Path, tmp_path: Path
) -> None:
    """In the same order, over the end of an epoch, with workers, and after a resume; to the last bit."""
    preprocess(
        PreprocessConfig(
            folder=footage / "clips", captions=footage / "captions.csv", vae=pipeline, text_encoder=pipeline,
            out=tmp_path / "parquet", height=64, width=96,
            num_frames=9, fps=None, clips_per_video=1, max_text_tokens=tiny_ti2v.MAX_TEXT_TOKENS, dtype="float32",
        )
    )  # fmt: skip
    stored = batches(make(tmp_path / "parquet"), 3)
    on_the_fly = make(footage / "videos.csv", "--data.num_workers", "1")
    found = batches(on_the_fly, 3)
    for one, other in zip(found, stored, strict=True):
        assert_same(one, other)
    on_the_fly.loader.load_state_dict({"samples_seen": 4})
    assert_same(batches(on_the_fly, 1)[0], stored[1])


def test_a_sample_does_not_depend_on_its_batch(make: MakeTrainer, footage: Path) -> None:
    whole = next((trainer := make(footage / "videos.csv")).loader)
    parts = [trainer.adapter.prepare_batch(part) for part in whole.split(1)]
    together = trainer.adapter.prepare_batch(whole).split(1)
    for one, other in zip(parts, together, strict=True):
        assert_same(one, other)


def test_repeated_prompts_are_encoded_once(make: MakeTrainer, footage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    compute = TextEncoder._compute

    def counted(self: TextEncoder, prompt: str, max_tokens: int) -> torch.Tensor:
        encoded.append(prompt)
        return compute(self, prompt, max_tokens)

    monkeypatch.setattr(TextEncoder, "_compute", counted)
    batches(make(footage / "videos.csv"), 3)
    assert sorted(encoded) == ["", *(f"ramp, {index}" for index in range(4))]  # and the negative prompt
    batches(make(footage / "videos.csv"), 2)  # of the same run: they are on disk
    assert len(encoded) == 5


def test_an_offloaded_text_encoder_says_the_same(pipeline: Path) -> None:
    plain, offloaded = (TextEncoder(pipeline, offload=offload) for offload in (False, True))
    assert torch.equal(offloaded.encode(["a", "longer one"], 16), plain.encode(["a", "longer one"], 16))
    assert all(parameter.is_meta for parameter in offloaded._model.parameters())  # nothing stays on the device


def test_training_without_latents_reads_no_video(make: MakeTrainer, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\na\nb\n")
    trainer = make(tmp_path / "prompts.csv", "--pipeline_config.image_probability", "0", method="dmd2")
    (batch,) = batches(trainer, 1)
    assert batch.latents is None and batch.text_embeddings.shape == (4, tiny_ti2v.MAX_TEXT_TOKENS, 16)
    trainer.train_step()


BAD_FILES = {
    "no column": (
        "file,prompt\na.mp4,x\n",
        r"line 2: there is no video or .* among the columns file, prompt",
    ),
    "two columns": ("video,caption,text\nclips/0.mp4,x,y\n", r"line 2: caption and text could both be meant; rename"),
    "no rows": ("video,prompt\n", "has no rows: write one per video"),
    "blank": ("video,prompt\nclips/0.mp4, \n", "line 2: expected a non-empty prompt and video"),
    "missing": ("video,prompt\nclips/0.mp4,x\nclips/9.mp4,x\n", r"line 3: there is no file .*clips/9\.mp4; correct"),
    "folder": ("video,prompt\nclips,x\n", "line 2: there is no file"),
    "empty": ("", "is empty: expected a line with the names of the columns"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_csv_is_one_sentence(
    case: str, footage: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = BAD_FILES[case]
    (tmp_path / "videos.csv").write_text(text)
    (tmp_path / "clips").symlink_to(footage / "clips")
    argv = tiny_ti2v.arguments("finetune", pipeline, tmp_path / "videos.csv", tmp_path / "run")
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and len(printed.splitlines()) == 1
    assert re.search(message, printed), printed


def test_a_video_that_can_not_be_used_is_named_with_its_row(make: MakeTrainer, footage: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video")
    write_video(tmp_path / "clips" / "short.mp4", 5)
    write_video(tmp_path / "clips" / "good.mp4", 9)
    table = tmp_path / "videos.csv"
    for name, message in (
        ("short", r"videos\.csv, line 2: .*short\.mp4 has 5 frames, but a clip needs 9"),
        ("broken", r"videos\.csv, line 2: .*broken\.mp4 can't be decoded"),
    ):
        table.write_text(f"video,prompt\nclips/{name}.mp4,x\nclips/good.mp4,y\n")
        with pytest.raises(ValueError, match=message):
            make(table)
        tolerant = make(table, "--data.max_bad_rows", "1")
        assert set(next(tolerant.loader).captions) == {"y"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--pipeline_config.path", ""), r"videos\.csv' holds videos and prompts to encode, but .*path is empty"),
        (("--data.path", "x.parquet", "--data.fps", "8"), r"fps = 8.0 has no effect on path = 'x.parquet'"),
        (("--data.fps", "0"), "data.fps = 0.0 is out of range"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    argv = tiny_ti2v.arguments("finetune", tmp_path, tmp_path / "videos.csv", tmp_path, *overrides)
    with pytest.raises(ValueError, match=message):
        load_config(argv)


def test_other_data_needs_are_refused(make: MakeTrainer, footage: Path) -> None:
    with pytest.raises(ValueError, match=r"is a table of videos, which can't hold the tensors trajectory, "):
        make(footage / "videos.csv", "--pipeline_config.image_probability", "0", method="knowledge_distillation")


# Videos from pictures


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gradient of 128 × 96 pixels, which is cropped to 64 × 96 at its centre."""
    path = tmp_path_factory.mktemp("picture") / "first.png"
    rows = torch.arange(128, dtype=torch.uint8)[:, None, None].expand(128, 96, 3)
    Image.fromarray(rows.numpy()).save(path)
    return path


def test_pictures_are_cropped_at_their_centre(picture: Path, footage: Path, tmp_path: Path) -> None:
    pixels = read_picture(picture, 64, 96)
    assert pixels.shape == (64, 96, 3) and pixels.dtype == torch.uint8
    assert (pixels[:, 0, 0].int() - torch.arange(32, 96)).abs().max() <= 1
    assert brightness(read_picture(footage / "clips" / "0.mp4", 64, 96)[None]) == [0]
    with pytest.raises(ValueError, match="there is no picture"):
        read_picture(tmp_path / "absent.png", 64, 96)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png can't be decoded"):
        read_picture(tmp_path / "text.png", 64, 96)


@pytest.fixture(scope="module")
def run(pipeline: Path, footage: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of DMD2 from the CSV, validated on two pictures before and after."""
    output = tmp_path_factory.mktemp("run")
    (footage / "pictures.csv").write_text(f"prompt,image\na ramp,{picture}\nanother,clips/1.mp4\n")
    argv = tiny_ti2v.arguments(
        "dmd2", pipeline, footage / "videos.csv", output, "--training.steps", "1", "--checkpoint.enabled", "true",
        "--validation.enabled", "true", "--validation.prompts", str(footage / "pictures.csv"),
        "--validation.num_prompts", "3", "--validation.num_videos", "2", "--method_config.teacher_steps", "2",
        "--pipeline_config.validate_from_image", "true",
    )  # fmt: skip
    assert main(argv) == 0
    return output


def test_validation_starts_from_the_pictures(run: Path, footage: Path, picture: Path, make: MakeTrainer) -> None:
    assert read_prompts(footage / "pictures.csv", None) == ["a ramp", "another"]
    adapter = make(footage / "videos.csv").adapter
    pictures = torch.stack([read_picture(path, 64, 96) for path in (picture, footage / "clips" / "1.mp4", picture)])
    expected = torch.cat([adapter.encode_video(pixels[None, None]) for pixels in pictures])
    for label in ("teacher", "student_before"):
        files = sorted((run / "validation" / "baselines" / label).iterdir())
        latents = torch.stack([load_file(file)["latents"] for file in files])
        assert torch.equal(latents[:3, :, :1], expected)
        assert all(torch.equal(of_noise[:, :1], expected[0]) for of_noise in latents[3:])  # the doctor's
        assert not torch.equal(latents[0, :, 1:], latents[2, :, 1:])
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["validation/student/sliced_wasserstein"] > 0


def test_generate_starts_from_a_picture(
    run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*options: str) -> Path:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4"
        cli(
            [
                "generate",
                "--checkpoint",
                str(run / "checkpoints/latest"),
                "--prompt",
                "a ramp",
                "--out",
                str(out),
                *options,
            ]
        )
        return out

    assert generate().read_bytes() != generate("--image", str(picture)).read_bytes()
    with pytest.raises(SystemExit) as leaving:
        generate("--image", str(tmp_path / "absent.png"))
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --image = ") and "there is no picture" in shown


def test_an_exported_student_is_a_ti2v_pipeline(run: Path, pipeline: Path, tmp_path: Path) -> None:
    """Whatever the pipeline says from which it takes the VAE: the student was trained on images."""
    shutil.copytree(pipeline, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("true", "false"))
    options = ("--out", str(tmp_path / "out"), "--pipeline", str(tmp_path / "other"))
    cli(["checkpoint", "export", "--checkpoint", str(run / "checkpoints/latest"), *options])
    assert WanImageToVideoPipeline.from_pretrained(tmp_path / "out").config.expand_timesteps
    assert find_latent_space(str(tmp_path / "out"), lambda: 0).channels == tiny_ti2v.CHANNELS


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("p.txt", r"p\.txt holds prompts only; set validation\.prompts to"),
        ("p.csv", r"line 2: there is no file .*absent\.png"),
        ("c.csv", "line 2: there is no video or .* among the columns prompt, other"),
    ],
)
def test_validation_without_pictures_is_refused(prompts: str, message: str, make: MakeTrainer, footage: Path) -> None:
    (footage / "p.txt").write_text("a\n")
    (footage / "p.csv").write_text("prompt,image\na,absent.png\n")
    (footage / "c.csv").write_text("prompt,other\na,b\n")
    options = (
        "--validation.enabled", "true", "--validation.prompts", str(footage / prompts),
        "--validation.num_prompts", "1", "--validation.num_videos", "1",
        "--pipeline_config.validate_from_image", "true",
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        make(footage / "videos.csv", *options)
