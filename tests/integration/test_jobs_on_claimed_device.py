"""Jobs and tools on a claimed GPU: nothing mixes devices, and the host waits no more often than a table says."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from claimed_device import claimed_device
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN, tiny_argv
from tiny_media import write_video

from titan_distill import train
from titan_distill.checkpoint.diffusers_folder import PIPELINE_INDEX
from titan_distill.commands.generate import generate
from titan_distill.commands.ode_pairs import OdePairsOptions, ode_pairs
from titan_distill.commands.preprocess import PreprocessConfig, preprocess
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS, few_step_sigmas
from titan_distill.fault_tolerance.signals import Stop
from titan_distill.methods.knowledge_distillation import STATES, TIMESTEPS
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.pipeline_index import BOUNDARY
from titan_distill.models.wan.state_dict import save_folder
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.validation.report import doctor

CONFIG = WanConfig(num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, text_dim=64, freq_dim=16)
LATENT_SHAPE, FLOW_SHIFT = (16, 3, 4, 4), 3.0
SMALL = (
    "--pipeline_config.num_frames", "9",
    "--pipeline_config.height", "32",
    "--pipeline_config.width", "32",
    "--training.local_batch_size", "2",  # two micro-batches
    "--validation.num_prompts", "2",
    "--validation.num_videos", "2",
    "--validation.scorer", "none",
    "--ema.start_step", "1",
)  # fmt: skip
WARM_UP, COUNTED = 2, 2
"""Steps: those that fill caches and make the optimizers' states, and those whose waits are counted."""

WAITS_PER_UPDATE = {"trainer._sum_over_ranks": 1}
WAITS_PER_LOGGED_LINE = {"observability.timing.drain": 1}
ROLES: dict[str, tuple[str, ...]] = {
    "a14b": ("teacher", "student", "critic"),
    "dmd2_gan": ("teacher", "student", "critic"),
    "ode_init": ("teacher", "student"),
}
"""The roles of the jobs that every change must pass."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "a14b": ("--checkpoint.interval", "1"),
    "dmd2_gan": ("--method_config.discriminator_depths", "[0]"),
    "dmd2": ("--validation.enabled", "true", "--method_config.teacher_steps", "2"),
    "finetune": ("--method_config.cfg_dropout", "0.5", "--method_config.weighting", "bell"),
    "rcm": ("--method_config.tangent_warmup", "2", "--method_config.update_ratio", "2"),
    "self_forcing": ("--roles.student.init_from", str(TINY_WAN)),
    "ti2v": ("--validation.enabled", "true", "--method_config.validation_steps", "2"),
}
NIGHTLY = ["dmd2", "dmd2_sparse", "finetune", "sparse", "lora", "kd", "cm", "scm", "rcm", "self_forcing", "ti2v"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(doctor, "INTERVAL", 1)  # in every update it measures how far the weights move


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of one small block, and the index that makes a pipeline of them."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("transformer", "transformer_2")):
        generator = torch.Generator().manual_seed(seed)
        named = WanTransformer(CONFIG).named_parameters()
        save_folder({key: 0.2 * torch.randn(p.shape, generator=generator) for key, p in named}, CONFIG, folder / name)
    index = json.loads((TINY_WAN / PIPELINE_INDEX).read_text())
    index |= {"transformer_2": index["transformer"], BOUNDARY: 0.875}
    (folder / PIPELINE_INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with all that any method reads: latents, and a trajectory that leads to them."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    generator = torch.Generator().manual_seed(0)
    levels = few_step_sigmas((1000.0, 750.0, 500.0, 250.0), FLOW_SHIFT, True)

    def row(index: int) -> LatentRow:
        states = torch.randn(len(levels), *LATENT_SHAPE, generator=generator)
        return LatentRow(
            id=str(index), caption="a red square", text_embedding=torch.randn(8, 64, generator=generator),
            vae_latent=torch.randn(LATENT_SHAPE, generator=generator),
            extra={STATES: states, TIMESTEPS: (levels * NUM_TRAIN_TIMESTEPS).float()},
        )  # fmt: skip

    write_rows(path, map(row, range(16)))
    return path


def arguments(job: str, data: Path, output: Path, *more: str) -> list[str]:
    steps = ("--training.steps", str(WARM_UP + COUNTED))
    return tiny_argv(job, output, *SMALL, "--data.path", str(data), *steps, *OPTIONS.get(job, ()), *more)


def run(arguments: list[str]) -> None:
    """Trains. Fails with the place of every fault, and of every wait that the tables don't have."""
    with claimed_device() as device, ExitStack() as held:
        trainer = train.start(arguments, Stop(), held)
        assert trainer is not None and trainer.timer.device.type == "cuda"
        while trainer.state.step < WARM_UP:
            trainer.train_step()
        device.waits.clear()
        allowed: Counter[str] = Counter()
        while trainer.state.step < trainer.config.training.steps:
            num_updates = len(trainer.method.updates(trainer.state.step))
            trainer.train_step()
            for table, times in ((WAITS_PER_UPDATE, num_updates), (WAITS_PER_LOGGED_LINE, 1)):
                allowed.update({place: times * number for place, number in table.items()})
        too_many = Counter(event.place for event in device.waits) - allowed
        trainer.after_step()  # saves, and validates where the job does
        trainer.metrics.close()
    assert not device.faults
    assert not too_many, [event for event in device.waits if event.place in too_many]


@pytest.mark.parametrize("job", ROLES)
def test_a_job_neither_mixes_devices_nor_waits(job: str, data: Path, weights: Path, tmp_path: Path) -> None:
    folder = weights if job == "a14b" else weights / "transformer"
    own = {"path": str(folder), "flavor": "", "init_from": ""}
    small = [word for role in ROLES[job] for key in own for word in (f"--roles.{role}.{key}", own[key])]
    run(arguments(job, data, tmp_path / "run", *small))
    if job == "a14b":  # its checkpoint has everything that one can have
        resumed = ("--checkpoint.resume_from", "latest", "--training.steps", str(WARM_UP + COUNTED + 1))
        run(arguments(job, data, tmp_path / "run", *small, *resumed))
        with claimed_device() as device:
            generate(tmp_path / "run" / "checkpoints" / "latest", "a red square", tmp_path / "video.mp4")
        assert not device.faults and (tmp_path / "video.mp4").stat().st_size


@pytest.mark.nightly
@pytest.mark.parametrize("job", NIGHTLY)
def test_every_other_job_neither_mixes_devices_nor_waits(job: str, data: Path, tmp_path: Path) -> None:
    run(arguments(job, data, tmp_path / "run"))


@pytest.mark.nightly
def test_tools_do_not_mix_devices(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", 17, size=(32, 32))
    (tmp_path / "captions.csv").write_text("file_name,caption\na.mp4,a red square\n")
    with claimed_device() as device:
        pairs = OdePairsOptions(
            REPOSITORY / "train_configs" / "tiny_wan_kd.toml", TINY_SHAPES / "held_out_prompts.txt", tmp_path / "pairs",
            num_pairs=2, num_steps=4, batch_size=2,
        )  # fmt: skip
        ode_pairs(pairs)
        preprocess(
            PreprocessConfig(
                folder=tmp_path / "videos", captions=tmp_path / "captions.csv", vae=TINY_WAN, text_encoder=TINY_WAN,
                out=tmp_path / "clips",
                height=32, width=32, num_frames=9, device="cuda",
            )
        )  # fmt: skip
    assert not device.faults
