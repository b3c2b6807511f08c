"""TensorBoard and W&B for real: what was logged is read back from their own files."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from titan_distill.config.sections import MetricsConfig
from titan_distill.observability.trackers import Tracker, build_trackers
from titan_distill.validation.video import write_mp4

CONFIG = '[job]\nname = "run"\n[training]\nsteps = 12\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    Image.new("RGB", (40, 20), (200, 30, 30)).save(tmp_path / "sheet.png")
    write_mp4(tmp_path / "clip.mp4", np.stack([np.full((16, 16, 3), 60 * i, np.uint8) for i in range(4)]), fps=8)
    return tmp_path


def log_everything(tracker: Tracker, folder: Path, start_step: int = 0) -> None:
    for step in range(start_step + 1, start_step + 4):
        tracker.log_scalars(step, {"loss/student": 0.5 * step})
    tracker.log_media(start_step + 3, "validation/sheet", folder / "sheet.png")
    tracker.log_media(start_step + 3, "validation/clip", folder / "clip.mp4")
    tracker.close()


def tensorboard_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_tensorboard_has_curves_pictures_moving_videos_and_the_configuration(folder: Path) -> None:
    (tracker,) = build_trackers(MetricsConfig(tensorboard=True), folder, "run", start_step=0)
    log_everything(tracker, folder)
    events = tensorboard_events(folder)
    assert [(point.step, point.value) for point in events.Scalars("loss/student")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    (sheet,) = events.Images("validation/sheet")
    assert (sheet.step, sheet.width, sheet.height) == (3, 40, 20)
    (clip,) = events.Images("validation/clip")
    with Image.open(io.BytesIO(clip.encoded_image_string)) as gif:
        assert (gif.format, gif.n_frames, gif.info["duration"]) == ("GIF", 4, 120)  # GIFs count in 1/100 s
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "steps = 12" in text


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(folder: Path) -> None:
    for start_step in (0, 2):
        (tracker,) = build_trackers(MetricsConfig(tensorboard=True), folder, "run", start_step)
        log_everything(tracker, folder, start_step)
    assert [point.step for point in tensorboard_events(folder).Scalars("loss/student")] == [1, 2, 3, 4, 5]


def wandb_records(folder: Path) -> list[Record]:
    """The records of an offline run. The file is a LevelDB log: blocks of 32 KiB, in them chunks of
    (checksum u32, length u16, kind u8, bytes); kinds 1 and 4 end a record, 2 and 3 are continued."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, payload, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(payload))
            payload = b""
    return records


def run_wandb(folder: Path, start_step: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Logs everything to W&B in a process of its own, because its session is one a process and ends with it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, __file__, str(folder), str(start_step), "--secret", "hunter2hunter2"],
        env={**inherited, "NETRC": str(folder / "netrc"), **environment},
        capture_output=True,
        text=True,
    )


def test_wandb_offline_has_curves_media_and_the_configuration_and_no_secrets(folder: Path) -> None:
    run_wandb(folder, WANDB_MODE="offline", WANDB_API_KEY="f" * 40).check_returncode()

    records = wandb_records(folder)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_id) == ("demo", "run", (folder / "wandb_run_id").read_text())
    config = {item.key: item.value_json for item in run.config.update}
    assert json.loads(config["training"]) == {"steps": 12}
    history = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(line["_step"], line["loss/student"]) for line in history] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert history[2]["validation/sheet/_type"] == "image-file"
    assert history[2]["validation/clip/_type"] == "video-file"

    (files,) = folder.glob("wandb/offline-run-*/files")
    assert (files / "config.toml").read_text() == CONFIG and not (files / "config.toml").is_symlink()
    assert {path.suffix for path in files.glob("media/**/*.*")} == {".mp4", ".png"}
    written = b"".join(path.read_bytes() for path in folder.glob("wandb/**/*") if path.is_file())
    assert b"hunter2" not in written and b"f" * 40 not in written


def test_a_resumed_run_continues_its_wandb_run_and_a_fresh_one_does_not(folder: Path) -> None:
    ids = []
    for start_step in (0, 3, 0):
        run_wandb(folder, start_step, WANDB_MODE="offline").check_returncode()
        ids.append((folder / "wandb_run_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    names = {path.stem.removeprefix("run-") for path in folder.glob("wandb/offline-run-*/*.wandb")}
    assert names == set(ids)


def test_wandb_without_a_key_is_one_sentence(folder: Path) -> None:
    result = run_wandb(folder, WANDB_MODE="online")
    assert result.returncode == 2
    sentence = result.stderr.splitlines()[-1]
    assert re.search(r"metrics\.wandb = true.*wandb login.*WANDB_MODE=offline", sentence)


def test_nothing_is_built_unless_asked_for(folder: Path) -> None:
    assert build_trackers(MetricsConfig(), folder, "run", start_step=0) == []


if __name__ == "__main__":  # what run_wandb runs
    try:
        (wandb_tracker,) = build_trackers(
            MetricsConfig(wandb=True, wandb_project="demo"), Path(sys.argv[1]), "run", int(sys.argv[2])
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    log_everything(wandb_tracker, Path(sys.argv[1]), int(sys.argv[2]))
