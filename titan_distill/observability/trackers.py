"""Trackers show a run in TensorBoard or Weights & Biases, beside `metrics.jsonl`.

A tracker gets scalars by step (`log_scalars`; steps never decrease), pictures and mp4 files (`log_media`), and the
resolved configuration, read from the `config.toml` that the run has already written with its secrets redacted. Nothing
here reads the environment or the command line, and W&B's own collection of both is switched off: a key typed there must
not end up on a server.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
import textwrap
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from titan_distill.config.sections import MetricsConfig
from titan_distill.data.footage import read_mp4
from titan_distill.fault_tolerance import run_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def check_trackers(config: MetricsConfig) -> None:
    """Raises ValueError when TensorBoard is not installed or W&B has no key."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "metrics.tensorboard = true, but TensorBoard is not installed; "
            "run pip install 'titan_distill[tensorboard]' or set it to false"
        )
    if config.wandb:
        import wandb

        if wandb.setup().settings.mode in (None, "online", "run", "shared") and not wandb.api.api_key:
            raise _without_wandb("it has no API key")


def _without_wandb(reason: str) -> ValueError:
    return ValueError(
        f"metrics.wandb = true, but W&B cannot start ({reason}); "
        "run `wandb login`, set WANDB_MODE=offline, or set metrics.wandb to false"
    )


def build_trackers(config: MetricsConfig, folder: Path, name: str, start_step: int) -> list[Tracker]:
    """Returns the enabled trackers, for a run in `folder` that continues after `start_step` steps.

    Raises as `check_trackers`, and ValueError when W&B cannot start.
    """
    check_trackers(config)
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder, start_step))
    if config.wandb:
        trackers.append(WandbTracker(folder, config.wandb_project, name, start_step))
    return trackers


class TensorBoardTracker:
    """Event files under `tensorboard/`. Videos become animated GIFs, which is what its image tab can play."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run repeats the steps after its checkpoint: TensorBoard is told to forget what it knows of them.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
        for name in ("config.toml", run_folder.NAME):
            if (folder / name).is_file():
                text = (folder / name).read_text(encoding="utf-8")
                self._writer.add_text(Path(name).stem, textwrap.indent(text, "    "), start_step)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def log_media(self, step: int, key: str, path: Path) -> None:
        if path.suffix != ".mp4":
            with Image.open(path) as image:
                self._writer.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        video, fps = read_mp4(path)
        image = Summary.Image(height=video.shape[1], width=video.shape[2], encoded_image_string=_gif(video, fps))
        # add_video would need moviepy for these few bytes.
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A W&B run, which a resumed job continues. `WANDB_MODE=offline` keeps it on disk, under `wandb/`."""

    def __init__(self, folder: Path, project: str, name: str, start_step: int) -> None:
        import wandb

        config_path = folder / "config.toml"
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=_run_id(folder / "wandb_run_id", start_step),
                resume="allow",
                dir=folder,
                config=tomllib.loads(config_path.read_text(encoding="utf-8")) | _identity(folder),
                settings=wandb.Settings(x_disable_meta=True, disable_code=True, disable_git=True),
            )
        except wandb.errors.UsageError as error:
            raise _without_wandb(str(error).rstrip(".")) from error
        # A copy, because W&B only links to a file outside its folder, and the link dangles once the folder is moved.
        copy = shutil.copy(config_path, self._run.dir)
        self._run.save(copy, base_path=self._run.dir, policy="now")

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_media(self, step: int, key: str, path: Path) -> None:
        import wandb

        media = wandb.Video(str(path), format="mp4") if path.suffix == ".mp4" else wandb.Image(str(path))
        self._run.log({key: media}, step=step)

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoardTracker | WandbTracker


def _identity(folder: Path) -> dict[str, dict[str, object]]:
    run = run_folder.read_run(folder)
    return {} if run is None else {"run": asdict(run)}


def _run_id(path: Path, start_step: int) -> str:
    """Returns the id of the W&B run. A resumed job reads it from `path`; a new job creates it and writes it there."""
    if start_step == 0 or not path.exists():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _gif(video_THWC: np.ndarray, fps: float) -> bytes:
    frames = [Image.fromarray(frame) for frame in video_THWC]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()
