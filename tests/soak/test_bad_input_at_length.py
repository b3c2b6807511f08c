"""Ten thousand broken configurations and hundreds of broken data files: never a traceback, a hang, or memory for all.

One command: `pytest -m soak tests/soak/test_bad_input_at_length.py`; about a quarter of an hour on one core.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from config_mutations import NUM_RANKS, Mutant, assert_sentence, bounded, mutants, outcome, sweep
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parquet_mutations import good_records, mutate, read_some
from runs import REPOSITORY
from tiny_media import write_video

from titan_distill.config.config import Config
from titan_distill.data.footage import VideoSize, read_clips
from titan_distill.train import CHECK

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutant=mutants(), num_ranks=st.sampled_from(NUM_RANKS))
def test_mutated_configurations(tmp_path: Path, mutant: Mutant, num_ranks: int) -> None:
    outcome(mutant, tmp_path, num_ranks)


def test_every_key_at_the_ends_of_its_type(tmp_path: Path) -> None:
    outcomes = [outcome(mutant, tmp_path, 1) for mutant in sweep()]
    assert sum(isinstance(result, Config) for result in outcomes) > 300 < sum(isinstance(r, str) for r in outcomes)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(mutant=mutants(), num_ranks=st.sampled_from(NUM_RANKS))
def test_as_a_process(tmp_path: Path, mutant: Mutant, num_ranks: int) -> None:
    """As the launcher asks: exit code 0 or 2, and one sentence or none on stderr."""
    (tmp_path / "mutant.toml").write_bytes(mutant.content)
    overrides = [word for word in mutant.overrides if "\0" not in word]  # no command line can hold one
    done = subprocess.run(
        [sys.executable, "-m", "titan_distill.train", CHECK, "--job.config_file", tmp_path / "mutant.toml", *overrides],
        env={**os.environ, "WORLD_SIZE": str(num_ranks)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 2), done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == (done.returncode == 2) and "Traceback" not in done.stderr
    for sentence in sentences:
        assert_sentence(sentence.removeprefix("error: "))


@pytest.mark.parametrize(("seeds", "num_workers"), [(range(300), 0), (range(300, 320), 2)])
def test_mutated_parquet_files(tmp_path: Path, seeds: range, num_workers: int) -> None:
    records = good_records(tmp_path)
    for seed in seeds:
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        told = mutate(folder, records, draw)
        print(f"seed {seed}: {told}")  # the last one printed is the one that failed
        read_some(folder, max_bad_rows=draw.choice([0, 2, 100]), num_workers=num_workers)


def test_mutated_videos(tmp_path: Path) -> None:
    """Three containers, the index before or behind: whole clips, or the file named."""
    kinds = {"a.mp4": {}, "b.mp4": {"movflags": "faststart"}, "c.mkv": {}, "d.avi": {}}
    whole = {
        name: write_video(tmp_path / name, num_frames=40, **options).read_bytes() for name, options in kinds.items()
    }
    for seed in range(600):
        draw = random.Random(seed)
        name = draw.choice(sorted(whole))
        path = tmp_path / f"broken-{name}"
        path.write_bytes(_damaged(whole[name], draw))
        print(f"seed {seed}: {name}")
        try:
            with bounded():
                for clip in read_clips(path, VideoSize(5, 32, 48, draw.choice([8.0, None]))):
                    assert clip.pixels.shape == (5, 3, 32, 48)
        except ValueError as error:
            assert str(path) in str(error) and str(error).isprintable()


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed near either end, where containers keep their tables, or anywhere; cut, blanked or inserted."""
    damaged, at = bytearray(data), draw.randrange(len(data))
    how = draw.choice(["head", "tail", "anywhere", "cut", "zero", "insert"])
    if how == "cut":
        del damaged[at:]
    elif how == "zero":
        damaged[at : at + 200] = bytes(len(damaged[at : at + 200]))
    elif how == "insert":
        damaged[at:at] = draw.randbytes(50)
    else:
        first, last = {"head": (0, 1200), "tail": (len(data) - 1500, len(data)), "anywhere": (0, len(data))}[how]
        for _ in range(draw.choice([1, 4, 40])):
            damaged[draw.randrange(max(0, first), min(last, len(data)))] = draw.randrange(256)
    return bytes(damaged)
