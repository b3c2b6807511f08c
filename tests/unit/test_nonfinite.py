"""A non-finite update ends the run on all ranks in one sentence, or is left out on all where that is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_family
from forked import train_forked
from runs import read_metrics
from toy_run import ASSETS, toy_trainer

from titan_distill.methods.finetune import Finetune
from titan_distill.trainer import NonFiniteError, Trainer

NAN, INF = float("nan"), float("inf")


def poison(trainer: Trainer, steps: dict[int, dict[int, float]]) -> None:
    """Multiplies losses: step -> sample id -> factor."""
    real = trainer.method.updates

    def updates(at: int) -> list:
        (update,) = real(at)

        def loss(batch: Any, at: int) -> Any:
            result = update.loss(batch, at)
            factors = [steps.get(at, {}).get(sample, 1.0) for sample in batch.sample_ids]
            return type(result)(result.losses_B * torch.tensor(factors))

        return [type(update)(update.role, loss)]

    trainer.method.updates = updates  # type: ignore[method-assign]


def state(trainer: Trainer) -> list[Any]:
    """All that an update changes."""
    role = trainer.roles["student"]
    moments = [v for entry in role.optimizers["transformer"].state.values() for v in entry.values()]
    assert role.ema is not None
    tensors = [*role.parameters(), *role.ema.shadow.values(), *moments]
    return [role.num_updates, role.schedulers["transformer"].state_dict(), *[t.detach().clone() for t in tensors]]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


SKIPPING = (
    "--ema.decay", "0.9", "--ema.role", "student", "--lr_scheduler.warmup_steps", "6", "--checkpoint.enabled", "true",
    "--checkpoint.interval", "4", "--training.max_nonfinite_skips", "2",
)  # fmt: skip


def test_a_skipped_update_changes_nothing_and_is_counted_over_the_run(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "finetune", *SKIPPING)
    poison(trainer, {2: {20: NAN}, 5: {41: INF}})
    for _ in range(2):
        trainer.train_step()
    before = state(trainer)
    trainer.train_step()
    assert len(before) == len(state(trainer)) and all(map(same, before, state(trainer)))
    assert all(p.grad is None for p in trainer.roles["student"].parameters())
    trainer.train_step()
    assert not all(map(same, before, state(trainer)))
    trainer.after_step()
    trainer.metrics.close()

    again = toy_trainer(tmp_path, "finetune", *SKIPPING, "--checkpoint.resume_from", "latest")
    poison(again, {5: {41: INF}, 7: {60: NAN}})
    with pytest.raises(NonFiniteError, match=r"step 8.*2 such updates were allowed and skipped"):
        again.run()
    lines = read_metrics(tmp_path / "run")
    assert [line["nonfinite_skips/student"] for line in lines] == [0, 0, 1, 1, 1, 2, 2]
    assert lines[2]["loss/student"] is None and lines[3]["loss/student"] is not None


def test_without_leave_the_first_one_ends_the_run(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "finetune", "--training.local_batch_size", "4")
    poison(trainer, {1: {9: NAN, 14: INF}})
    expected = r"^loss/student is not finite at step 2: rank 0, samples \[9, 14\]\. Nothing was updated"
    with pytest.raises(NonFiniteError, match=expected):
        trainer.run()
    assert trainer.roles["student"].num_updates == 1


def test_a_gradient_that_overflows_is_told_apart(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "finetune")
    trainer.roles["student"].parameters()[0].register_hook(lambda gradient: gradient * INF)
    with pytest.raises(NonFiniteError, match=r"^grad_norm/student is not finite at step 1 on ranks \[0\], though"):
        trainer.run()


def see_nan_in_sample_13() -> None:
    """The sample of rank 1 in step 1."""
    real = Finetune.student_loss

    def student_loss(self: Finetune, batch: Any, step: int) -> Any:
        result = real(self, batch, step)
        factors = [NAN if sample == 13 else 1.0 for sample in batch.sample_ids]
        return type(result)(result.losses_B * torch.tensor(factors))

    Finetune.student_loss = student_loss  # type: ignore[method-assign]


@pytest.mark.parametrize(("max_skips", "code"), [(0, 1), (1, 0)])
def test_what_one_rank_sees_all_ranks_do(max_skips: int, code: int, tmp_path: Path) -> None:
    data = toy_family.write_data(tmp_path / "toy.parquet")
    argv = [
        "--job.config_file", str(ASSETS / "toy_finetune.toml"), "--job.output_dir", str(tmp_path / "run"),
        "--data.path", str(data), "--training.local_batch_size", "4", "--training.steps", "3",
        "--training.max_nonfinite_skips", str(max_skips),
    ]  # fmt: skip
    codes = train_forked(2, argv, tmp_path, before=see_nan_in_sample_13)
    told = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert codes == [code, code], told
    expected = "loss/student is not finite at step 2: rank 1, samples [13]"
    assert expected in told[0]
    assert (expected in told[1]) == (max_skips == 0), "an end is said by all, a skip once"
