"""Folders of videos by prompt, named as VBench names them: `{prompt}-{index}.mp4`, index 0, 1, … per prompt.

VBench takes the ending from any file of the folder, so nothing but videos may lie in it. The prompts by file name are
in `{folder}.json` beside it, which VBench reads as its `--prompt_file`. It is needed for prompts that no file name can
hold (with a slash, or longer than 255 bytes), because their names are shortened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from titan_distill.data.footage import SUFFIXES, decode
from titan_distill.fault_tolerance.files import atomic, parse_json
from titan_distill.validation.video import write_mp4

_MOST_BYTES = 255
"""Longest file name in bytes, of the usual file systems."""

Key = tuple[str, int]
"""Prompt of a video, and its index among the videos of that prompt."""


def video_name(prompt: str, index: int) -> str:
    """Returns a video's file name. A prompt that no file name can hold is shortened and made unique by a digest."""
    name = f"{prompt}-{index}.mp4"
    if is_nameable(prompt, index):
        return name
    start, digest = re.sub("[/\0]", " ", prompt)[:40].strip(), hashlib.sha256(prompt.encode()).hexdigest()[:12]
    return f"{start} {digest}-{index}.mp4"


def is_nameable(prompt: str, index: int = 0) -> bool:
    """Returns whether a file name can hold the prompt."""
    return not set("/\0") & set(prompt) and len(f"{prompt}-{index}.mp4".encode()) <= _MOST_BYTES


def prompts_file(folder: Path) -> Path:
    """Returns the file with the prompts of a folder of videos."""
    folder = folder.resolve()  # `.` has no name
    return folder.with_name(f"{folder.name}.json")


class VideoWriter:
    """Writes videos into a new folder and, as each is written, its prompt into the file beside it."""

    def __init__(self, folder: Path, fps: int) -> None:
        self._folder, self._fps = folder, fps
        self._prompts: dict[str, str] = {}

    def write(self, key: Key, video: Tensor) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = video_name(*key)
        write_mp4(self._folder / name, video.cpu().numpy(), self._fps)
        self._prompts[name] = key[0]
        with atomic(prompts_file(self._folder)) as temporary:
            temporary.write_text(json.dumps(self._prompts, indent=1, ensure_ascii=False), encoding="utf-8")


@dataclass(frozen=True)
class VideoFolder:
    """Videos of a folder by prompt and index."""

    path: Path
    files: dict[Key, Path]

    @classmethod
    def scan(cls, path: Path) -> VideoFolder:
        """Finds the videos of a folder. The prompts are those in the file beside it or, without such a file, in the
        names. Raises ValueError for a folder without videos and for a damaged file of prompts."""
        videos = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not videos:
            raise ValueError(f"{path} has no videos ({', '.join(SUFFIXES)})")
        prompts = _read_prompts(prompts_file(path))
        files: dict[Key, Path] = {}
        seen: Counter[str] = Counter()
        for file in videos:
            named = re.fullmatch(r"(.+)-(\d+)", file.stem)
            text, index = (named[1], int(named[2])) if named else (file.stem, 0)
            if file.name in prompts:
                text = prompts[file.name]
            key = (text, index if named else seen[text])
            if key in files:
                raise ValueError(f"{file} and {files[key].name} are both video {index} of one prompt; rename one")
            files[key] = file
            seen[text] += 1
        return cls(path, files)

    @functools.cached_property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the first video."""
        first = next(iter(self.files))
        frames, height, width, _ = self.read(first).shape
        return frames, height, width

    def read(self, key: Key) -> Tensor:
        """Returns all frames of a video, uint8 [T, H, W, 3]. Raises ValueError for a file that can't be decoded."""
        frames = [timed.frame.to_ndarray(format="rgb24") for timed in decode(self.files[key])]
        return torch.from_numpy(np.stack(frames))


def _read_prompts(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}; write the prompts by file name") from error
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ValueError(f"{file} must hold one prompt per file name, as a JSON object of strings")
    return content
