"""The Wan family reads the files that a run names once, however many questions it answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import REPOSITORY, TINY_WAN, tiny_argv
from small_checkpoints import write_weights_only

from titan_distill.checkpoint.diffusers_folder import network_folder, open_folder
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import load_config
from titan_distill.models.base import model_family
from titan_distill.models.wan import plugin, stored


def test_each_stored_configuration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load_config(tiny_argv("dmd2", tmp_path / "run"))
    read: Counter[str] = Counter()

    def counting(function: Any) -> Any:
        def counted(folder: Any, *rest: Any) -> Any:
            read[f"{function.__name__} {folder}"] += 1
            return function(folder, *rest)

        return counted

    monkeypatch.setattr(stored, "read_config", counting(stored.read_config))
    monkeypatch.setattr(plugin, "find_latent_space", counting(plugin.find_latent_space))
    family = model_family("wan")(config)
    family.check_layouts(resolve_layout(config, 1).roles)
    family.spelled_out()
    family.extra_tensors()
    family.token_grid()
    for name, role in config.roles.items():
        family.build_modules(name, role, None, torch.device("cpu"))
    weights = {role.path or role.init_from for role in config.roles.values()}
    assert len(weights) < len(config.roles), "two roles start from one folder"
    assert read == {
        f"find_latent_space {config.pipeline_config.path}": 1,
        **{f"read_config {network_folder(Path(folder))}": 1 for folder in weights},
    }


def test_no_network_is_built_for_a_role_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are compared when they are read; a 14B network takes seconds even without memory."""
    monkeypatch.chdir(REPOSITORY)
    source = open_folder(TINY_WAN)
    step = tmp_path / "other" / "checkpoints" / "step-00000001"
    tensors = {name: source.read(name).clone() for name in source.shapes}
    write_weights_only(step, {"transformer": tensors}, source.architecture)
    start = ("--roles.student.path", "", "--roles.student.init_from", f"{step}#student")
    family = model_family("wan")(load_config([*tiny_argv("finetune", tmp_path / "run"), *start]))
    built: list[Any] = []
    monkeypatch.setattr(plugin, "empty_transformer", lambda *arguments: built.append(arguments))
    family.check_files()
    assert built == []
