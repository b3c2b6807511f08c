"""The throughput benchmark: a real run at configured sizes without files.

Its FLOPs are those of docs/algorithms.md, "FLOPs of a forward".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import REPOSITORY

from benchmarks.throughput import main
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.models.wan.config import FLAVORS
from titan_distill.observability.flops import forward_flops

DMD2 = """
[job]
name = "sizes_only"
[recipe]
method = "dmd2"
[roles]
teacher = { flavor = "tiny", init_from = "no/such/folder", trainable = false }
student = { flavor = "tiny", init_from = "no/such/folder", trainable = true }
critic = { flavor = "tiny", init_from = "no/such/folder", trainable = true }
[method_config]
update_ratio = 2
[pipeline_config]
path = "no/such/pipeline"
height = 96
width = 96
num_frames = 17
[data]
path = "no/such/data"
max_text_tokens = 64
[training]
steps = 1000
global_batch_size = 2
local_batch_size = 1
[validation]
prompts = "no/such/prompts.txt"
"""
FORWARD_TFLOP = forward_flops(FLAVORS["tiny"], 5 * 6 * 6, 64).total / 1e12
NUM_WARMUP, NUM_STEPS, SAMPLES = 1, 3, 2


def exits(role: str) -> list[int]:
    """The student's forwards in each measured rollout for ``role``'s update."""
    steps = range(NUM_WARMUP, NUM_WARMUP + NUM_STEPS)
    due = [step for step in steps if role == "critic" or step % 2 == 0]
    return [KeyedNoise(0).index(f"dmd2/{role}/exit", step, 4) + 1 for step in due]


def arguments(folder: Path, *overrides: str) -> list[str]:
    (folder / "job.toml").write_text(DMD2)
    out = ("--out", str(folder / "result.json"))
    return [str(folder / "job.toml"), "--steps", str(NUM_STEPS), "--warmup", str(NUM_WARMUP), *out, *overrides]


def test_phases_cost_what_the_formulas_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A student update is its rollout, one critic and two teacher forwards, and a backward of two; a critic update its
    rollout, one forward and a backward. Guidance doubles the teacher, exits are those drawn."""
    main(arguments(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["updates"] == {"critic": 3, "student": 1}
    unit = SAMPLES * FORWARD_TFLOP
    mean_critic_exit = sum(exits("critic")) / NUM_STEPS
    expected = {
        ("student", "rollout"): (["student"], exits("student")[0]),
        ("student", "critic"): (["critic"], 1),
        ("student", "teacher"): (["teacher"], 2),
        ("student", "backward"): (["student"], 2),
        ("critic", "rollout"): (["student"], mean_critic_exit),
        ("critic", "critic"): (["critic"], 1),
        ("critic", "backward"): (["critic"], 2),
    }
    worked = {(row["update"], row["phase"]): row for row in result["phases"] if row["roles"]}
    assert worked.keys() == expected.keys()
    for key, (roles, forwards) in expected.items():
        assert worked[key]["roles"] == roles
        assert worked[key]["executed_tflop"] == pytest.approx(forwards * unit, rel=1e-6), key
        assert worked[key]["dense_equivalent_tflop"] == pytest.approx(forwards * unit, rel=1e-6), key
    all_forwards = exits("student")[0] + 5 + sum(exits("critic")) + 3 * NUM_STEPS
    seconds = result["seconds_per_step"] * NUM_STEPS
    assert result["executed_tflops_per_rank"] * seconds == pytest.approx(all_forwards * unit, rel=1e-6)
    check_schema(result)
    assert "no MFU" in capsys.readouterr().out


def check_schema(result: dict[str, Any]) -> None:
    """Rates agree with each other, and everything says where it was made."""
    assert result["tokens_per_second"] * result["seconds_per_step"] == pytest.approx(SAMPLES * 180)
    assert result["tokens_per_second_per_rank"] * result["ranks"] == pytest.approx(result["tokens_per_second"])
    assert result["mfu"] is None and result["hfu"] is None and "not in" in result["no_mfu_because"]
    assert result["memory_gib"] > 0.1
    assert len(result["config_digest"]) == 64
    assert {"processor", "torch", "commit", "date"} <= result["machine"].keys()
    assert sum(row["seconds"] for row in result["phases"]) < result["seconds_per_step"] * NUM_STEPS


def test_recomputation_is_executed_and_not_useful(tmp_path: Path) -> None:
    """With full checkpointing a backward executes about one forward more: its blocks are nearly all of the tiny one."""
    main(arguments(tmp_path, "--activation_checkpoint.mode", "full"))
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["update"], row["phase"]): row for row in result["phases"]}
    for update in ("student", "critic"):
        row = rows[update, "backward"]
        assert row["dense_equivalent_tflop"] == pytest.approx(2 * SAMPLES * FORWARD_TFLOP, rel=1e-6)
        assert 1.4 < row["executed_tflop"] / row["dense_equivalent_tflop"] <= 1.5
    assert result["executed_tflops_per_rank"] > result["dense_equivalent_tflops_per_rank"]


def test_two_ranks_report_once_for_both(tmp_path: Path) -> None:
    """The same steps on two ranks are the same work, and a rank's share of the tokens is half."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "benchmarks.throughput", *arguments(tmp_path)],
        cwd=REPOSITORY, env={**os.environ}, capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tokens/s") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ranks"] == 2
    all_forwards = exits("student")[0] + 5 + sum(exits("critic")) + 3 * NUM_STEPS
    seconds = result["seconds_per_step"] * NUM_STEPS
    assert 2 * result["executed_tflops_per_rank"] * seconds == pytest.approx(
        all_forwards * SAMPLES * FORWARD_TFLOP, rel=1e-6
    )
    check_schema(result)


def test_finetuning_gets_latents_and_a_forward_phase(tmp_path: Path) -> None:
    text = DMD2.replace('"dmd2"', '"finetune"').replace("update_ratio = 2", "")
    lines = [line for line in text.splitlines() if not line.startswith(("teacher", "critic"))]
    (tmp_path / "finetune.toml").write_text("\n".join(lines))
    out = tmp_path / "result.json"
    main([str(tmp_path / "finetune.toml"), "--steps", "1", "--warmup", "0", "--out", str(out)])
    rows = {row["phase"]: row for row in json.loads(out.read_text())["phases"]}
    assert rows["forward"]["executed_tflop"] == pytest.approx(SAMPLES * FORWARD_TFLOP, rel=1e-6)
    assert rows["backward"]["executed_tflop"] == pytest.approx(2 * SAMPLES * FORWARD_TFLOP, rel=1e-6)


def test_sparsity_follows_its_schedule(tmp_path: Path) -> None:
    """Step 0 is dense; step 1, after a step of warm-up, reads a quarter of the tiles."""
    text = DMD2.replace('"dmd2"', '"finetune"').replace("update_ratio = 2", "")
    lines = [line for line in text.splitlines() if not line.startswith(("teacher", "critic"))]
    job = "\n".join(lines).replace("trainable = true }", 'trainable = true, attention = "sparse" }')
    schedule = "sparsity = 0.75\nschedule_rate = 0.75\nschedule_interval = 1\ncrossover = 0.0"
    (tmp_path / "sparse.toml").write_text(f"{job}\n[sparse_attention]\n{schedule}\n")
    executed = []
    for warmup in (0, 1):
        out = tmp_path / f"{warmup}.json"
        main([str(tmp_path / "sparse.toml"), "--steps", "1", "--warmup", str(warmup), "--out", str(out)])
        rows = {row["phase"]: row for row in json.loads(out.read_text())["phases"]}
        executed.append(rows["forward"]["executed_tflop"])
    assert executed[1] < executed[0]


@pytest.mark.parametrize("override", [("--training.stepz", "1"), ("--training.dtype", "int8")])
def test_wrong_input_is_one_sentence(
    override: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments(tmp_path, *override))
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and override[0].removeprefix("--") in shown
