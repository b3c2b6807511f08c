"""Decisions at the start of CUDA. No GPU is needed: where there is none, torch is told that there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, tiny_argv

from titan_distill.commands import preprocess
from titan_distill.config.degrees import needs_group
from titan_distill.config.loading import load_config
from titan_distill.fault_tolerance.watchdog import record_collectives
from titan_distill.models.base import model_family
from titan_distill.models.wan import plugin
from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.mesh import ALLOCATOR_VARIABLES, default_device
from titan_distill.train import CHECK, main


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("options", [(), ("--roles.teacher.parallelism.cpu_offload", "false")])
def test_offloading_needs_a_process_group(options: tuple[str, ...], tmp_path: Path) -> None:
    def config(*overrides: str) -> bool:
        return needs_group(load_config(tiny_argv("dmd2", tmp_path, *overrides)))

    assert not config(*options)
    assert config(*options, "--parallelism.cpu_offload", "true")
    assert config(*options, "--training.dtype", "bfloat16")
    assert config("--roles.teacher.parallelism.cpu_offload", "true"), "a role of its own is enough"


@pytest.mark.parametrize("arguments", [(CHECK,), ()])
def test_more_ranks_than_gpus_is_one_sentence(
    arguments: tuple[str, ...],
    two_gpus: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    assert main([*tiny_argv("dmd2", tmp_path, "--training.local_batch_size", "1"), *arguments]) == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("error: 4 ranks ") and "2 GPUs" in shown and "NGPU" in shown and "\n" not in shown


def test_launchers_say_how_many_ranks_a_machine_gets() -> None:
    """Before torchrun, which tells the ranks, the check must be told as well."""
    for launcher in ("run_train.sh", "scripts/slurm/train.sbatch"):
        (line,) = [text for text in (REPOSITORY / launcher).read_text().splitlines() if "WORLD_SIZE=$" in text][-1:]
        assert "LOCAL_WORLD_SIZE=$" in line, launcher


ALLOCATOR = """
import torch
from titan_distill.parallelisms.mesh import default_device
torch.cuda.is_available = lambda: True
assert default_device() == torch.device("cuda", 0)
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="torch 2.11 can't be asked")
@pytest.mark.parametrize("user", [None, *ALLOCATOR_VARIABLES])
def test_segments_of_the_allocator_grow_unless_the_user_says_how(user: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    if user is not None:
        environment[user] = "max_split_size_mb:64"
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATOR], env=environment, capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert ("expandable_segments:True" in done.stdout) == (user is None)


def test_preprocessing_runs_on_the_gpu_where_there_is_one(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def text_encoder(*_: object, device: torch.device) -> None:
        raise Reached(device)

    def device(**given: str) -> torch.device:
        config = preprocess.PreprocessConfig(
            folder=tmp_path,
            captions=tmp_path / "c.csv",
            vae=tmp_path,
            text_encoder=tmp_path,
            out=tmp_path / "out",
            **given,
        )
        with pytest.raises(Reached) as reached:
            preprocess.preprocess(config)
        return reached.value.args[0]

    (tmp_path / "c.csv").write_text("file_name,caption\na.mp4,a grey ramp\n")
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(plugin, "TextEncoder", text_encoder)
    assert device() == torch.device("cuda", 0)
    assert device(device="cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == default_device() == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_computes_as_the_run_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """In fp32 with the trained numbers, else with what a validation of the run has gathered of them."""
    trained = WanTransformer(FLAVORS["tiny"])
    config = load_config(tiny_argv("dmd2", tmp_path, "--training.dtype", str(dtype).removeprefix("torch.")))
    tensors = trained.state_dict().items()
    restored = model_family("wan")(config).restore_module(FLAVORS["tiny"].to_diffusers(), tensors, torch.device("cpu"))
    assert {parameter.dtype for parameter in restored.parameters()} == {dtype}
    inputs = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 4, 64)
    with torch.no_grad():
        assert torch.equal(restored(*inputs), trained.to(dtype)(*inputs))


VARIABLES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
)


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what is set here
        monkeypatch.delenv(name)


def test_flight_recorder_can_write_where_it_is_told_to(no_settings: None, tmp_path: Path) -> None:
    record_collectives(tmp_path / "run" / "logs", 300)
    assert {name for name in VARIABLES if name in os.environ} == set(VARIABLES[:4]), "no deprecated names"
    assert Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"]).parent.is_dir()


def test_flight_recorder_is_left_to_the_user(
    no_settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new name would overrule the old one that the user has set."""
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/tmp/mine")
    record_collectives(tmp_path / "logs", 300)
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "/tmp/mine"
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7" and "TORCH_FR_BUFFER_SIZE" not in os.environ
