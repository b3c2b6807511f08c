"""Exported students of every kind, as small as they get, each with a video that `titan-distill generate` made."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import tiny_i2v
import tiny_media
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from titan_distill.commands.export import export
from titan_distill.commands.generate import generate
from titan_distill.config.loading import load_config
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.models.wan.config import WanConfig
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble

TEXT = replace(tiny_i2v.CONFIG, in_channels=16, image_dim=None, added_kv_proj_dim=None)
CHANNELS = replace(TEXT, in_channels=36)
PROMPT, MAX_TEXT_TOKENS = "a disc", 512  # diffusers finds the tokens of a picture by counting 512 of text
NEGATIVE, SHIFT, BOUNDARY = "blurry", 3.0, 0.875
NUM_FRAMES, SIZE = 5, 32
LEVELS = "[1000.0, 750.0, 500.0, 250.0]"


@dataclass(frozen=True)
class Kind:
    """A kind of student: its networks, its method and how its videos start."""

    architecture: WanConfig = TEXT
    method: str = "dmd2"
    has_two_experts: bool = False
    starts_from_picture: bool = False
    options: tuple[str, ...] = ()


GUIDED = ("--pipeline_config.negative_prompt", NEGATIVE, "--method_config.validation_steps", "5")
FINETUNE = ("--method_config.validation_guidance", "3.0", *GUIDED)
KINDS = {
    "stochastic": Kind(),
    "lora": Kind(options=("--roles.student.lora.rank", "2")),
    "unevenly spaced": Kind(
        options=("--method_config.denoising_steps", "[1000.0, 757.0, 522.0]", "--method_config.warp", "false")
    ),
    "euler": Kind(options=("--method_config.student_sampler", "ode")),
    "two experts": Kind(has_two_experts=True),
    "first frame": Kind(starts_from_picture=True, options=("--pipeline_config.image_probability", "0.5")),
    "text of a first-frame model": Kind(options=("--pipeline_config.image_probability", "0.5")),
    "picture channels": Kind(CHANNELS, has_two_experts=True, starts_from_picture=True),
    "picture channels and CLIP": Kind(tiny_i2v.CONFIG, starts_from_picture=True),
    "many steps": Kind(method="finetune", options=FINETUNE),
    "many steps of Euler": Kind(method="finetune", options=(*FINETUNE, "--method_config.validation_solver", "euler")),
    "many steps from a first frame": Kind(
        method="finetune", starts_from_picture=True, options=(*FINETUNE, "--pipeline_config.image_probability", "0.5")
    ),
    "many steps of two experts": Kind(
        method="finetune", has_two_experts=True, options=(*FINETUNE, "--pipeline_config.guidance_scale_2", "2.0")
    ),
}


@dataclass(frozen=True)
class Exported:
    """An exported folder, its checkpoint, and the file of `generate --save-noise`."""

    folder: Path
    checkpoint: Path
    saved: Path

    @property
    def latents(self) -> Tensor:
        """The latents of `generate`'s video."""
        return load_file(self.saved)["latents"]

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")

    @property
    def snippet(self) -> str:
        """The card's program."""
        found = re.findall(r"^```python\n(.*?)^```$", self.card, flags=re.S | re.M)
        assert "load_file" in found[0]
        return found[0]

    def program(self, **values: str | None) -> str:
        """Returns the snippet with values of a reader in the line that is for them."""
        (line,) = [line for line in self.snippet.splitlines() if line.startswith("folder, device, ")]
        names, defaults = line.split(" = ")
        chosen = {"folder": str(self.folder), "device": "cpu", "prompt": PROMPT, "seed": 0, **values}
        assert chosen.keys() <= set(names.split(", "))
        defaults_by_name = dict(zip(names.split(", "), eval(defaults), strict=True))
        return self.snippet.replace(line, f"{names} = {tuple((defaults_by_name | chosen).values())}")


def write_pipeline(folder: Path, kind: Kind) -> Path:
    """A pipeline folder whose networks have random weights."""
    tiny_i2v.write_i2v_pipeline(folder) if kind.architecture.image_dim else tiny_media.write_pipeline(folder)
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    names = ("transformer", "transformer_2") if kind.has_two_experts else ("transformer",)
    for seed, name in enumerate(names):
        tiny_i2v.save_random(kind.architecture, folder / name, seed)
        parts[name] = ["diffusers", "WanTransformer3DModel"]
    has_pictures = kind.architecture.in_channels > kind.architecture.out_channels
    if kind.architecture.image_dim:
        parts["image_encoder"] = ["transformers", "CLIPVisionModel"]
        parts["image_processor"] = ["transformers", "CLIPImageProcessor"]
    index = {"_class_name": "WanImageToVideoPipeline" if has_pictures else "WanPipeline", **parts}
    index |= {"boundary_ratio": BOUNDARY} if kind.has_two_experts else {}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    wrong = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 11.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**wrong, "prediction_type": "flow_prediction"})
    )
    return folder


def write_data(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = (16, (NUM_FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    extra = {"image_latent": draw(*latents), "image_embedding": draw(5, 24)}
    write_rows(path, [LatentRow(str(i), "a clip", draw(4, 16), draw(*latents), extra=extra) for i in range(4)])
    return path


def save_student(folder: Path, kind: Kind, *more: str) -> Path:
    """A checkpoint of a run that has not trained, its student moved away from the weights that it started from."""
    pipeline, data = write_pipeline(folder / "pipeline", kind), write_data(folder / "data.parquet")
    roles = ("student",) if kind.method == "finetune" else ("teacher", "student", "critic")
    words = [*("--job.name", "small", "--job.output_dir", str(folder / "run"), "--recipe.method", kind.method)]
    for role in roles:
        words += [f"--roles.{role}.path", str(pipeline), f"--roles.{role}.trainable", str(role != "teacher").lower()]
    for name, value in (("num_frames", NUM_FRAMES), ("height", SIZE), ("width", SIZE), ("flow_shift", SHIFT)):
        words += [f"--pipeline_config.{name}", str(value)]
    words += ["--pipeline_config.path", str(pipeline), "--data.path", str(data), "--data.max_text_tokens"]
    words += [str(MAX_TEXT_TOKENS), "--training.steps", "1", "--training.global_batch_size", "1"]
    words += ["--training.local_batch_size", "1", "--validation.enabled", "false"]
    words += [] if kind.method == "finetune" else ["--method_config.denoising_steps", LEVELS]
    trainer = assemble(resolve(load_config([*words, *kind.options, *more]), 1), World(0, 1, torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.roles["student"].parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer.save()
    return folder / "run" / "checkpoints" / "latest"


def write_picture(path: Path) -> Path:
    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def export_student(folder: Path, kind: Kind, *more: str) -> Exported:
    """Saves a student, makes a video with it, and exports it."""
    checkpoint = save_student(folder, kind, *more)
    image = write_picture(folder / "picture.png") if kind.starts_from_picture else None
    exported = Exported(folder / "exported", checkpoint, folder / "saved.safetensors")
    generate(checkpoint, PROMPT, folder / "video.mp4", seed=3, image=image, save_noise=exported.saved)
    export(checkpoint, exported.folder)
    return exported
