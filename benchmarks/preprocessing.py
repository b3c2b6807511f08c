"""Speed of `data preprocess`: `python -m benchmarks.preprocessing --out benchmarks/results/preprocessing-DATE.json`

Encodes the clips of drawn films twice in one process, on the same device:

- *bare*: a loop that decodes each video with `read_clips` and encodes its clips, in batches of the same size, and keeps
  nothing;
- *ours*: the command, from the first pass to the finished folder, with the loading of the encoders taken off.

They take turns `--rounds` times, so that a machine that drifts hurts both alike. `ratio` is the rate of ours over that
of the bare loop, the median of the rounds, in elapsed time, and should be at least 0.9. `cpu_ratio` compares the CPU
time of the process, which other processes on the machine disturb less: it leaves out the gain of decoding while the
encoder works, and shows what probing, text and writing cost.

Without --vae the VAE is small and random, which is the worst case: the less the encoder does, the more the rest counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import write_result
from titan_distill.commands.preprocess import PreprocessConfig, preprocess
from titan_distill.data.footage import read_clips
from titan_distill.models.base import FootageEncoder, model_family
from titan_distill.parallelisms.mesh import default_device
from titan_distill.validation.video import write_mp4

FPS = 24
PIPELINE = Path(__file__).parents[1] / "tests" / "assets" / "tiny_wan"


def write_films(folder: Path, num_films: int, num_frames: int, height: int, width: int) -> None:
    """Writes films of moving clouds, and `captions.csv`."""
    (folder / "videos").mkdir(parents=True)
    lines = ["file_name,caption"]
    for number in range(num_films):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.rand(1, 3, height // 8, 2 * width // 8, generator=generator)
        clouds = torch.nn.functional.interpolate(coarse, (height, 2 * width), mode="bicubic").clamp(0, 1)[0]
        pixels = (255 * clouds).byte().permute(1, 2, 0).numpy()
        lefts = [index * width // num_frames for index in range(num_frames)]
        frames = np.stack([pixels[:, left : left + width] for left in lefts])
        write_mp4(folder / "videos" / f"{number:04d}.mp4", frames, FPS)
        lines.append(f"{number:04d}.mp4,film {number}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def bare_loop(config: PreprocessConfig, encoder: FootageEncoder) -> int:
    """Decodes and encodes all clips, and nothing more. Returns their number."""
    size = config.video_size(config.height, config.width)
    videos = sorted(config.folder.glob("*.mp4"))
    clips = itertools.chain.from_iterable(read_clips(path, size, config.stride) for path in videos)
    count = 0
    while batch := list(itertools.islice(clips, config.batch_size)):
        latents = encoder.encode_video(torch.stack([clip.pixels for clip in batch]).permute(0, 1, 3, 4, 2))
        latents.to("cpu")  # and so until the device is done
        count += len(batch)
    return count


def load_encoders(config: PreprocessConfig) -> FootageEncoder:
    """Loads all weights, those of the text encoder too, which come with the first prompt."""
    encoder = model_family(config.family).footage_encoder(config, default_device())
    encoder.embed_prompt("warm", config.max_text_tokens)
    return encoder


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Elapsed and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(config: PreprocessConfig, num_rounds: int) -> dict[str, Any]:
    """Runs both in turns, after one round that is not counted."""
    encoder = load_encoders(config)
    num_clips = bare_loop(config, encoder)
    rounds: list[dict[str, float]] = []
    for number in range(num_rounds + 1):
        out = config.out / str(number)
        bare, bare_cpu = timed(lambda: bare_loop(config, encoder))
        load, load_cpu = timed(lambda: load_encoders(config))
        ours, ours_cpu = timed(partial(preprocess, dataclasses.replace(config, out=out)))
        shutil.rmtree(out)
        if number:
            ours, ours_cpu = ours - load, ours_cpu - load_cpu
            rounds.append(
                {
                    "ratio": bare / ours,
                    "cpu_ratio": bare_cpu / ours_cpu,
                    "bare_clips_per_second": num_clips / bare,
                    "ours_clips_per_second": num_clips / ours,
                    "bare_cpu_seconds": bare_cpu,
                    "ours_cpu_seconds": ours_cpu,
                    "loading_seconds": load,
                }
            )
            print("  ".join(f"{key} {value:.4g}" for key, value in rounds[-1].items()), flush=True)
    median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {"num_clips": num_clips, **median, "rounds": rounds}


def main() -> None:
    """Measures and prints; with --out also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--frames", type=int, default=120, help="per film, 24 per second")
    parser.add_argument("--film-size", type=int, nargs=2, default=(180, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--clip-size", type=int, nargs=3, default=(17, 96, 96), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="diffusers folder of VAE and text encoder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    num_frames, height, width = arguments.clip_size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_films(folder, arguments.films, arguments.frames, *arguments.film_size)
        config = PreprocessConfig(
            folder=folder / "videos", captions=folder / "captions.csv", out=folder / "out",
            vae=arguments.pipeline, text_encoder=arguments.pipeline,
            num_frames=num_frames, height=height, width=width, batch_size=arguments.batch_size,
        )  # fmt: skip
        result = measure(config, arguments.rounds)
    print("  ".join(f"{key} {value:,.6g}" for key, value in result.items() if key != "rounds"))
    if arguments.out:
        facts = {name: value for name, value in vars(arguments).items() if name not in ("out", "pipeline")}
        write_result(arguments.out, {"command": "preprocessing", **facts, **result})


if __name__ == "__main__":
    main()
