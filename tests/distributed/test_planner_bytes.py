"""The planner's bytes against what real gloo ranks hold: states and encoders after one optimizer step for every kind of
layout, gradients between micro-batches and the batch exchange for each of their settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import HELPERS, REPOSITORY, run_worker, tiny_argv

from titan_distill.models.base import EncoderMemory
from titan_distill.planner.memory import States

TOLERANCE = 0.02

# Runs one step and writes what each rank holds. Gradients are caught before the optimizer clears them.
PROBE = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from titan_distill import roles, train, trainer
from titan_distill.models.wan import text_encoder

def held(tensors):
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    # FSDP cuts the gradients of a unit from one buffer.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.numel()}
    return sum(storages.values())

found = {}
def step(role, train_step, *, tick_ema, real=roles.RoleHandle.step):
    gradients = held(p.grad for p in role.parameters())
    real(role, train_step, tick_ema=tick_ema)
    found[role.name] = {
        "parameters": held(role.transformer.parameters()),
        "gradients": gradients,
        "optimizer": held(v for o in role.optimizers.values() for s in o.state.values() for v in s.values()),
        "ema": held(role.ema.shadow.values()) if role.ema else 0,
    }

def assemble(*args, real=train.assemble):
    trainer = real(*args)
    frozen = [role for role in trainer.roles if not role.trainable]
    for role in frozen:
        found[role.name] = dict(parameters=held(role.transformer.parameters()), gradients=0, optimizer=0, ema=0)
    return trainer

roles.RoleHandle.step, train.assemble = step, assemble
folder, *argv = sys.argv[1:]

def released(self, real=text_encoder.TextEncoder.release):
    found["released"] = real(self)
    return found["released"]

def run(self, real=trainer.Trainer.run):
    finished = real(self)
    encoders = self.adapter.encoders
    weights = [*encoders.vae.parameters()]
    if "_model" in vars(encoders.text):
        weights += encoders.text._model.parameters()
    found["encoders"] = held(weights)
    return finished

text_encoder.TextEncoder.release, trainer.Trainer.run = released, run
code = train.main(argv)
Path(folder, f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
sys.exit(code)
"""

# In a process of its own: a process has one world, and tests beside this one may have theirs.
PLAN = """
import dataclasses, json, sys
from titan_distill.config import load_config
from titan_distill.planner.hardware import GPUS
from titan_distill.commands.plan import planner
with planner(int(sys.argv[1]), GPUS["H100"]) as planned:
    plan = planned.plan(load_config(sys.argv[2:]))
print(json.dumps({name: dataclasses.asdict(role.states) for name, role in plan.roles.items()}))
student, teacher = plan.roles["student"], plan.roles["teacher"]
weights = teacher.weights.lasting + teacher.weights.passing
exchanged = {setting: size - weights for setting, size in teacher.exchanged.items()}
print(json.dumps({**student.accumulated, **exchanged, "chosen": teacher.temporary - weights}))
print(json.dumps(dataclasses.asdict(plan.encoders)))
"""

LAYOUTS = {
    "fsdp 2": (2, ()),
    "tensor 2": (2, ("--parallelism.tensor", "2")),
    "teacher sequence 2 in bf16": (2, ("--roles.teacher.parallelism.sequence", "2", "--training.dtype", "bfloat16")),
    "hsdp 2 x 2": (4, ("--parallelism.dp_replicate", "2", "--parallelism.dp_shard", "2")),
}


def planned(num_ranks: int, arguments: list[str]) -> tuple[dict[str, States], dict[str, float], EncoderMemory]:
    """States of each role; the sums that the settings `REDUCE` and `EXCHANGE` choose from, without gathered weights;
    the encoders."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(num_ranks), *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    states, sums, encoders = map(json.loads, done.stdout.splitlines()[-3:])
    return {name: States(**sizes) for name, sizes in states.items()}, sums, EncoderMemory(**encoders)


@pytest.mark.parametrize(
    "layout",
    [name if name.startswith("fsdp") else pytest.param(name, marks=pytest.mark.nightly) for name in LAYOUTS],
)
def test_states_and_encoders_are_what_ranks_hold(layout: str, tmp_path: Path) -> None:
    num_ranks, overrides = LAYOUTS[layout]
    few = ("--training.steps", "1", "--training.local_batch_size", "1", "--checkpoint.enabled", "false")
    arguments = tiny_argv("dmd2", tmp_path / "run", *few, *overrides)
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    done = subprocess.run(
        [*torchrun, str(probe), str(tmp_path), *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    plan, _, encoders = planned(num_ranks, arguments)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    for role, expected in plan.items():
        for kind in ("parameters", "gradients", "optimizer", "ema"):
            held = [rank[role][kind] for rank in ranks]
            assert getattr(expected, kind) == pytest.approx(held[0], rel=TOLERANCE), f"{role}: {kind} on rank 0"
            assert max(held) <= held[0], f"{role}: {kind} is larger on another rank than on rank 0"
    if "bfloat16" not in overrides:  # a CPU's VAE is fp32
        for rank in ranks:
            assert encoders.held == pytest.approx(rank["encoders"], rel=TOLERANCE)
        # Rank 0 has encoded the negative prompt; no rank validates.
        assert encoders.released == pytest.approx(ranks[0]["released"], rel=TOLERANCE)
        assert ranks[1]["released"] == 0
    assert plan["student"].gradients > 0
    assert plan["teacher"].gradients == 0


REDUCE, EXCHANGE = ("last", "every"), ("all", "in_turn")
SETTINGS = [(reduce, exchange) for reduce in REDUCE for exchange in EXCHANGE]


def settings(reduce: str, exchange: str, output: Path) -> list[str]:
    """A job with two micro-batches and a teacher that two data groups hold together."""
    return tiny_argv(
        "dmd2", output, "--checkpoint.enabled", "false",
        "--training.global_batch_size", "16", "--training.local_batch_size", "4",
        "--roles.teacher.parallelism.tensor", "2", "--roles.teacher.parallelism.exchange_groups", exchange,
        "--training.reduce_gradients", reduce, "--training.dtype", "bfloat16",
    )  # fmt: skip


def check_settings(chosen: list[tuple[str, str]], folder: Path) -> None:
    runs = {"-".join(setting): settings(*setting, folder / "-".join(setting)) for setting in chosen}
    table = folder / "runs.json"
    table.write_text(json.dumps(runs), encoding="utf-8")
    run_worker(2, HELPERS / "held_bytes_worker.py", table, folder, timeout=500)
    for reduce, exchange in chosen:
        name = f"{reduce}-{exchange}"
        _, sums, _ = planned(2, runs[name])
        assert sums["chosen"] == sums[exchange]
        for rank in range(2):
            held = json.loads((folder / f"{name}.rank{rank}.json").read_text(encoding="utf-8"))
            assert held["gradients"] == pytest.approx(sums[reduce], rel=TOLERANCE), (name, rank)
            assert held["exchange"] == pytest.approx(sums[exchange], rel=TOLERANCE), (name, rank)


def test_ranks_hold_what_the_settings_say(tmp_path: Path) -> None:
    check_settings([("every", "in_turn")], tmp_path)


@pytest.mark.nightly
def test_ranks_hold_what_all_settings_say(tmp_path: Path) -> None:
    check_settings(SETTINGS, tmp_path)
