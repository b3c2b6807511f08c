"""Golden curves without training: what is compared and how, and that neither jobs nor curves change unnoticed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from runs import REPOSITORY

from benchmarks import golden
from titan_distill.config.loading import load_config
from titan_distill.config.text import to_dict

EIGHT_STEPS = {
    "job.config_file",
    "job.name",
    "training.steps",
    "training.global_batch_size",
    "training.local_batch_size",
    "lr_scheduler.warmup_steps",
    "ema.start_step",
}
ITS_OWN = {
    "dmd2": {"method_config.denoising_steps", "method_config.guidance_scale"},
    "finetune": set(),
    "sparse": {
        "sparse_attention.schedule_rate", "sparse_attention.schedule_interval", "sparse_attention.crossover",
    },
    "self_forcing": {"roles.student.init_from", "roles.student.flavor", "roles.student.path"},
    "rcm": {"method_config.tangent_warmup", "method_config.consistency_weight"},
}  # fmt: skip
OFF = ("checkpoint.", "validation.", "job.imports")  # imports: the scorer of validation


def values(path: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def add(prefix: str, table: dict[str, Any]) -> None:
        for name, value in table.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            else:
                flat[f"{prefix}{name}"] = value

    add("", to_dict(load_config(["--job.config_file", str(REPOSITORY / path)])))
    return flat


@pytest.mark.parametrize("name", golden.NAMES)
def test_a_golden_job_is_the_shipped_one_but_for_these_keys(name: str) -> None:
    shipped, job = values(f"train_configs/tiny_wan_{name}.toml"), values(f"tests/golden/{name}.toml")
    changed = {key for key in shipped.keys() | job.keys() if shipped.get(key) != job.get(key)}
    assert {key for key in changed if not key.startswith(OFF)} == EIGHT_STEPS | ITS_OWN[name]
    assert job["checkpoint.enabled"] is job["validation.enabled"] is False
    assert (job["training.steps"], job["training.dtype"]) == (8, "float32")
    steps_per_update = 1 if name == "rcm" else job.get("method_config.update_ratio", 1)  # rcm begins with its warm-up
    assert (job["lr_scheduler.warmup_steps"], job["ema.start_step"]) == (2, 2 * steps_per_update)


@pytest.mark.parametrize("name", golden.NAMES)
def test_whoever_writes_curves_says_why_in_the_log(name: str) -> None:
    written = golden.read(name)
    line = f"{name} {golden.digest(written['curves'])}"
    assert line in (REPOSITORY / "docs" / "log.md").read_text(), f"docs/log.md does not say why there is {line!r}"


@pytest.mark.parametrize("name", golden.NAMES)
def test_a_file_says_where_it_was_written(name: str) -> None:
    written = golden.read(name)
    assert written["machine"]["processor"] and written["machine"]["torch"]
    assert written["tolerance"] == golden.AGAINST_FILE
    assert written["command"] == f"python -m benchmarks.golden write --only {name}"


def worst(expected: list[float | None], found: list[float | None]) -> float:
    return golden.largest(golden.compare({"loss/student": expected}, {"loss/student": found}))


def test_differences_are_relative_to_the_file() -> None:
    assert worst([2.0, 4.0], [2.0, 4.002]) == pytest.approx(5e-4)
    found = golden.compare({"loss/student": [2.0, 4.0]}, {"loss/student": [2.0, 4.002]})["loss/student"]
    assert (found.step, found.expected, found.found) == (2, 4.0, 4.002)


def test_values_near_zero_are_compared_with_the_curve_they_are_part_of() -> None:
    assert worst([0.0, 1.0], [0.0, 1.0]) == 0
    assert worst([0.0, 1.0], [1e-10, 1.0]) == pytest.approx(1e-10 / golden.FLOOR)
    assert worst([1e-3, 1.0], [1.1e-3, 1.0]) == pytest.approx(0.1)
    assert worst([0.0, 0.0], [0.0, 1e-30]) == math.inf


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        pytest.param([1.0, 1.0], [1.0, None], id="an update that is missing"),
        pytest.param([1.0, None], [1.0, 1.0], id="an update too many"),
        pytest.param([1.0, 1.0], [1.0], id="a step that is missing"),
        pytest.param([1.0, 1.0], [1.0, math.nan], id="not a number"),
        pytest.param([1.0, 1.0], [1.0, math.inf], id="not finite"),
    ],
)
def test_no_bound_covers(expected: list[float | None], found: list[float | None]) -> None:
    assert not worst(expected, found) <= 1e9


def test_a_curve_that_only_one_side_has_has_moved() -> None:
    assert golden.largest(golden.compare({"loss/critic": [1.0]}, {})) == math.inf
    assert golden.largest(golden.compare({}, {"loss/critic": [1.0]})) == math.inf


def test_the_table_names_what_has_moved_and_what_did_not_run() -> None:
    curves = {key: list(values) for key, values in golden.read("rcm")["curves"].items()}
    curves["loss/critic"][5] *= 1.001
    rows = golden.judge("rcm", golden.Recording(curves, ["the moon does not shine"]), "cpu")
    assert [row["metric"] for row in rows if not row["passed"]] == ["loss/critic", "spy"]
    shown = golden.table(rows)
    assert "MOVED" in shown and "the moon does not shine" in shown
    assert shown.count("MOVED") == 1


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.001, golden.EXIT_MOVED)])
def test_the_command_fails_where_a_number_has_moved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float, code: int
) -> None:
    """With rows from memory: `tests/distributed/test_golden_curves.py` trains."""
    curves = golden.read("finetune")["curves"]
    curves["loss/student"][2] *= factor
    monkeypatch.setattr(golden, "check", lambda name, device: golden.judge(name, golden.Recording(curves, []), device))
    with pytest.raises(SystemExit) as done:
        golden.main(["check", "--only", "finetune"])
    assert done.value.code == code
    assert ("MOVED" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize("arguments", [["write", "--device", "cuda"], ["check", "--only", "dmd3"]])
def test_the_command_refuses(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        golden.main(arguments)
    assert refused.value.code == 2
