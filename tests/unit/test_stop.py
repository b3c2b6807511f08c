"""A signal ends a run after the step at hand, with a checkpoint from which it goes on exactly; a validation at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import read_metrics
from toy_run import ASSETS, toy_trainer

from titan_distill.diffusion.requests import SampleRequest
from titan_distill.fault_tolerance.signals import Stop, StopRequested
from titan_distill.launch import Relay
from titan_distill.train import main, train
from titan_distill.trainer import Trainer
from titan_distill.validation.sampling import Sampling
from titan_distill.validation.validator import Validator

SAVING = ("--checkpoint.enabled", "true", "--checkpoint.interval", "100", "--ema.decay", "0.9", "--ema.role", "student")


def signal_in_step(trainer: Trainer, step: int, *numbers: signal.Signals) -> None:
    """Sends the signals to this process while `step` (0-based) computes its loss."""
    real = trainer.method.updates

    def updates(at: int) -> list:
        (update,) = real(at)

        def loss(batch: Any, at: int) -> Any:
            if at == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return update.loss(batch, at)

        return [type(update)(update.role, loss)]

    trainer.method.updates = updates  # type: ignore[method-assign]


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1)], ids=str)
def test_stopped_run_goes_on_exactly(numbers: tuple[signal.Signals, ...], tmp_path: Path) -> None:
    whole = toy_trainer(tmp_path / "whole", "finetune", *SAVING)
    assert whole.run()

    with Stop() as stop:
        stopped = toy_trainer(tmp_path / "parts", "finetune", *SAVING)
        stopped.stop = stop
        signal_in_step(stopped, 2, *numbers)
        assert train(stopped) == 75
    saved = [path.name for path in (tmp_path / "parts" / "run" / "checkpoints").iterdir()]
    assert saved == ["step-00000003"], "the step at hand is finished, and saved once"

    again = toy_trainer(tmp_path / "parts", "finetune", *SAVING, "--checkpoint.resume_from", "latest")
    assert again.state.step == 3 and again.run()
    losses = [[line["loss/student"] for line in read_metrics(tmp_path / name / "run")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    for a, b in zip(whole.roles["student"].parameters(), again.roles["student"].parameters(), strict=True):
        assert torch.equal(a, b)
    for name, shadow in whole.roles["student"].ema.shadow.items():  # type: ignore[union-attr]
        assert torch.equal(shadow, again.roles["student"].ema.shadow[name])  # type: ignore[union-attr]


def test_step_that_is_due_for_a_checkpoint_is_saved_once(tmp_path: Path) -> None:
    with Stop() as stop:
        trainer = toy_trainer(tmp_path, "finetune", *SAVING, "--checkpoint.interval", "3")
        trainer.stop = stop
        saves = []
        trainer.save = lambda: saves.append(trainer.state.step)  # type: ignore[method-assign]
        signal_in_step(trainer, 2, signal.SIGTERM)
        assert not trainer.run()
    assert saves == [3]


def test_the_sentence_says_when_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Stop() as stop:
        trainer = toy_trainer(tmp_path, "finetune")
        trainer.stop = stop
        signal_in_step(trainer, 2, signal.SIGUSR1)
        assert train(trainer) == 75
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stopped as asked after step 3; nothing is saved, because checkpoint.enabled = false"
    )


def test_a_signal_during_start_up_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = toy_trainer(tmp_path, "finetune").config.data.path
    monkeypatch.setattr("titan_distill.train.banner", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    config = ["--job.config_file", str(ASSETS / "toy_finetune.toml"), "--data.path", data]
    assert main([*config, "--job.output_dir", str(tmp_path / "run")]) == 75
    assert "stopped as asked before step 1" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run") == []


class LongValidator(Validator):
    """Asks for a stop in its second forward pass."""

    forwards = 0

    def __init__(self) -> None:
        """It samples nothing, so it needs neither prompts nor a folder."""

    def validate(self, step: int, request: Any, roles: Any) -> dict[str, float]:
        role = roles["student"]
        with role.evaluation():
            while True:
                self.poll()
                type(self).forwards += 1
                if self.forwards == 2:
                    os.kill(os.getpid(), signal.SIGTERM)


def test_a_validation_is_left_at_once_and_the_trained_weights_are_saved(tmp_path: Path) -> None:
    with Stop() as stop:
        trainer = toy_trainer(tmp_path, "finetune", *SAVING)
        trainer.stop = stop
        while trainer.state.step < 3:
            trainer.train_step()
        trainer.validator = LongValidator()
        before = [p.clone() for p in trainer.roles["student"].parameters()]
        trainer.config.validation.__dict__["interval"] = 3  # after_step validates at this step
        trainer.after_step()
    assert LongValidator.forwards == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.roles["student"].parameters(), strict=True))
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert "validation" not in "".join((tmp_path / "run" / "metrics.jsonl").read_text())


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_sampling_is_left_between_two_forward_passes(solver: Any, tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "finetune")
    stop, polls = Stop(), []

    def poll() -> None:
        polls.append(1)
        stop.is_signalled = len(polls) == 3
        stop.poll()

    sampling = Sampling(trainer.adapter, trainer.method.noise, torch.device("cpu"), poll)
    request = SampleRequest("student", "student", solver, 4, sigmas=(1.0, 0.75, 0.5, 0.25))
    condition = trainer.adapter.encode_prompts(["a", "b"])
    with pytest.raises(StopRequested):
        sampling.run(request, trainer.roles["student"], condition, [0, 1])
    assert len(polls) == 3


def test_handlers_are_put_back_unless_the_stop_is_agreed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with Stop() as stop:
        stop.agree(1.0)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher's second one does not kill a run that has saved
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "also while Python ends, which drops handlers of Python"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("turn", range(2))
def test_what_one_test_ignores_the_next_one_hears(turn: int) -> None:
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def test_interrupt_stays_an_interrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Stop() as stop:
        trainer = toy_trainer(tmp_path, "finetune", *SAVING)
        trainer.stop = stop
        signal_in_step(trainer, 2, signal.SIGINT)
        assert train(trainer) == 130
    shown = capsys.readouterr().out
    assert "interrupted after step 2, before its first save: the same command starts it again" in shown
    assert "latest" not in shown
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_interrupt_names_the_last_save_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stop() as stop:
        trainer = toy_trainer(tmp_path, "finetune", *SAVING, "--checkpoint.interval", "2")
        trainer.stop = stop
        signal_in_step(trainer, 3, signal.SIGINT)
        assert train(trainer) == 130
    shown = capsys.readouterr().out
    assert (
        "interrupted after step 3; --checkpoint.resume_from latest resumes from the last save, step-00000002" in shown
    )


@pytest.mark.parametrize(
    ("received", "workers", "expected"),
    [
        ([], {75}, 75),  # one rank had the signal; torchrun then ends the others
        ([], {75, -signal.SIGTERM}, 75),
        ([signal.SIGUSR1], {-signal.SIGUSR1, -signal.SIGTERM}, 75),  # before the ranks had handlers
        ([], {-signal.SIGTERM}, 1),
        ([signal.SIGTERM], {1, -signal.SIGTERM}, 1),
        ([signal.SIGTERM], {-signal.SIGKILL}, 1),
        ([signal.SIGINT], {130, -signal.SIGKILL}, 130),
        ([], {130, 1}, 130),
        ([], {1}, 1),
        ([], {2, 1, -signal.SIGTERM}, 2),  # wrong input that only one rank could find
    ],
)
def test_exit_code_of_the_launcher(received: list[int], workers: set[int], expected: int) -> None:
    relay = Relay()
    relay.received.update(received)
    assert relay.exit_code(workers) == expected
