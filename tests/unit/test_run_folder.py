"""Whose a run folder is: fresh starts, resumes, children of other runs, and folders that are moved away."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_distill.fault_tolerance import run_folder
from titan_distill.fault_tolerance.run_folder import open_run, read_run


def with_checkpoint(folder: Path, step: int = 10) -> Path:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    return path


def test_a_fresh_start_makes_an_id(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a", "", overwrite=False)
    assert read_run(tmp_path / "a") == run and run.parent == "" and {"torch", "python"} <= run.versions.keys()
    assert open_run(tmp_path / "a", "", overwrite=False).id != run.id  # nothing was saved in between


def test_a_fresh_start_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    run = open_run(tmp_path, "", overwrite=False)
    with_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"has checkpoints of another start; resume it with .*--job.name.*--job.overw"):
        open_run(tmp_path, "", overwrite=False)
    assert read_run(tmp_path) == run


def test_a_resume_keeps_the_id(tmp_path: Path) -> None:
    run = open_run(tmp_path, "", overwrite=False)
    step = with_checkpoint(tmp_path)
    assert open_run(tmp_path, "latest", overwrite=False) == run
    assert open_run(tmp_path, str(step), overwrite=False) == run


def test_a_folder_without_identity_is_adopted(tmp_path: Path) -> None:
    with_checkpoint(tmp_path)
    run = open_run(tmp_path, "latest", overwrite=False)
    assert open_run(tmp_path, "latest", overwrite=False) == run


def test_a_start_from_another_run_has_a_parent(tmp_path: Path) -> None:
    parent = open_run(tmp_path / "a", "", overwrite=False)
    step = with_checkpoint(tmp_path / "a")
    child = open_run(tmp_path / "b", str(step), overwrite=False, parent=parent, parent_step=10)
    assert (child.parent, child.parent_step) == (parent.id, 10) and child.id != parent.id


def test_another_run_is_no_resume_of_a_used_folder(tmp_path: Path) -> None:
    step = with_checkpoint(tmp_path / "a")
    with_checkpoint(tmp_path / "b")
    with pytest.raises(ValueError, match="b has checkpoints of another start"):
        open_run(tmp_path / "b", str(step), overwrite=False)


def test_overwrite_moves_everything_away(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    run = open_run(folder, "", overwrite=False)
    with_checkpoint(folder)
    (folder / "run.lock").touch()
    again = open_run(folder, "", overwrite=True)
    (old,) = tmp_path.glob("a.old-*")
    assert read_run(old) == run and (old / "checkpoints/step-00000010").is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "run.lock"] and again.id != run.id


def test_overwrite_contradicts_a_resume(tmp_path: Path) -> None:
    with_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"contradicts checkpoint.resume_from = 'latest'; remove one of the two"):
        open_run(tmp_path, "latest", overwrite=True)


@pytest.mark.parametrize("variable", run_folder.RESTART_VARIABLES)
def test_overwrite_is_ignored_after_a_restart(
    tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "1")
    open_run(tmp_path / "a", "", overwrite=True)
    assert "job.overwrite is ignored" in caplog.text and not list(tmp_path.glob("*.old-*"))
    with_checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match="resume it with"):
        open_run(tmp_path / "a", "", overwrite=True)


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        open_run(tmp_path, "latest", overwrite=False)
