"""Two experts in a role: which one a sample goes through, against diffusers, and on the way to disk and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from runs import REPOSITORY, TINY_WAN, tiny_argv
from safetensors.torch import load_file
from small_checkpoints import write_weights_only
from torch import Tensor

from titan_distill import cli
from titan_distill.checkpoint.diffusers_folder import PIPELINE_INDEX
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.commands.plan import planner
from titan_distill.config.loading import load_config
from titan_distill.diffusion import sampler
from titan_distill.models.base import Guidance
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.pipeline_index import BOUNDARY
from titan_distill.models.wan.state_dict import save_folder
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.observability.flops import forward_flops
from titan_distill.parallelisms.mesh import World
from titan_distill.planner.hardware import GPUS
from titan_distill.resolve import resolve
from titan_distill.roles import RoleHandle
from titan_distill.train import assemble, main
from titan_distill.trainer import Trainer

CONFIG = WanConfig(num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, text_dim=64, freq_dim=16)
SMALL = "--pipeline_config.num_frames 5 --pipeline_config.height 32 --pipeline_config.width 32 "
BOUNDARY_RATIO = 0.7
FILE = "diffusion_pytorch_model.safetensors"


def write_experts(folder: Path, *, seed: int = 0) -> Path:
    """A pipeline's two transformers, of random weights, and its index."""
    for offset, name in enumerate(("transformer", "transformer_2")):
        model = WanTransformer(CONFIG)
        generator = torch.Generator().manual_seed(seed + offset)
        values = {key: 0.2 * torch.randn(p.shape, generator=generator) for key, p in model.named_parameters()}
        save_folder(values, CONFIG, folder / name)
    index = json.loads((TINY_WAN / PIPELINE_INDEX).read_text())
    index |= {"transformer_2": index["transformer"], BOUNDARY: BOUNDARY_RATIO}
    (folder / PIPELINE_INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("weights") / "a14b")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def arguments(weights: Path, output: Path, *more: str) -> list[str]:
    roles = [word for role in ("teacher", "student", "critic") for word in (f"--roles.{role}.path", str(weights))]
    return tiny_argv("dmd2", output, *SMALL.split(), "--ema.start_step", "1", *roles, *more)


def make_trainer(weights: Path, output: Path, *more: str) -> Trainer:
    return assemble(resolve(load_config(arguments(weights, output, *more)), 1), World(0, 1, torch.device("cpu")))


@pytest.fixture(scope="module")
def trainer(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        return make_trainer(weights, tmp_path_factory.mktemp("run"), "--pipeline_config.guidance_scale_2", "2.5")


def latents(batch: int) -> Tensor:
    return torch.randn(batch, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def text(batch: int) -> Tensor:
    return torch.randn(batch, 64, 64, generator=torch.Generator().manual_seed(2))


def count_calls(role: RoleHandle) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the latents that each expert gets from now on."""
    calls: dict[str, list[tuple[int, ...]]] = {name: [] for name in role.modules}
    for name, module in role.modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(tuple(args[0].shape)))
    return calls


@pytest.mark.parametrize("solver_steps", [5, 8])
def test_sampling_is_that_of_diffusers(trainer: Trainer, weights: Path, solver_steps: int) -> None:
    transformers = [WanTransformer3DModel.from_pretrained(weights / name) for name in ("transformer", "transformer_2")]
    shift = trainer.adapter.flow_shift
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformers[0],
        transformer_2=transformers[1], boundary_ratio=BOUNDARY_RATIO,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise, condition = latents(1), {"text": text(1)}
    theirs = pipeline(
        prompt_embeds=condition["text"], negative_prompt_embeds=trainer.adapter.negative_condition(1)["text"],
        latents=noise, guidance_scale=4.0, guidance_scale_2=2.5, num_inference_steps=solver_steps, height=32, width=32,
        num_frames=5, output_type="latent",
    ).frames  # fmt: skip
    teacher = trainer.roles["teacher"]
    calls = count_calls(teacher)
    ours = sampler.sample_ode(
        lambda x, sigma_B: trainer.adapter.guided_velocity(teacher, x, sigma_B, condition, Guidance(4.0)),
        noise, num_steps=solver_steps, shift=shift, solver="unipc",
    )  # fmt: skip
    assert bool(((ours - theirs).abs() <= 1e-4).all())
    assert all(calls.values()) and sum(map(len, calls.values())) == solver_steps


def test_each_sample_goes_through_its_expert(trainer: Trainer) -> None:
    teacher, adapter = trainer.roles["teacher"], trainer.adapter
    x, sigma_B, condition = latents(5), torch.tensor([0.2, 0.9, 0.7, 0.69999, 1.0]).double(), {"text": text(5)}
    assert adapter.work is not None
    adapter.work.drain()
    found = adapter.predict_velocity(teacher, x, sigma_B, condition)
    # Half of the parameters work for a sample, and dummies are not counted as work.
    expected_flops = 5 * forward_flops(CONFIG, 2 * 2 * 2, 64).total
    assert adapter.work.drain().model_flops == pytest.approx(expected_flops)
    for row, name in enumerate(("transformer_2", "transformer", "transformer", "transformer_2", "transformer")):
        with torch.no_grad():
            part = slice(row, row + 1)
            alone = teacher.modules[name](x[part], 1000 * sigma_B[part], condition["text"][part])
        torch.testing.assert_close(found[part], alone, atol=1e-4, rtol=1e-5)


def test_without_gradients_only_what_someone_needs_runs_and_with_them_both(trainer: Trainer) -> None:
    student, adapter = trainer.roles["student"], trainer.adapter
    x, condition = latents(2), {"text": text(2)}
    calls = count_calls(student)
    with torch.no_grad():
        adapter.predict_velocity(student, x, torch.tensor([0.9, 0.8]).double(), condition)
    assert calls == {"transformer": [(2, 16, 2, 4, 4)], "transformer_2": []}
    adapter.predict_velocity(student, x, torch.tensor([0.1, 0.2]).double(), condition).square().sum().backward()
    # A frame of one sample, of which nothing is used: its expert has gradients, and they are zero.
    assert calls == {"transformer": [(2, 16, 2, 4, 4), (1, 16, 1, 4, 4)], "transformer_2": [(2, 16, 2, 4, 4)]}
    sizes = {
        name: [None if p.grad is None else float(p.grad.abs().max()) for p in module.parameters()]
        for name, module in student.modules.items()
    }
    assert all(size == 0 for size in sizes["transformer"]) and any(sizes["transformer_2"])
    student.network.zero_grad(set_to_none=True)


def test_guidance_of_an_offset_form_is_the_same_guidance(trainer: Trainer) -> None:
    arguments = trainer.roles["teacher"], latents(2), torch.tensor([0.9, 0.1]).double(), {"text": text(2)}
    standard = trainer.adapter.guided_velocity(*arguments, Guidance(4.0))
    offset = trainer.adapter.guided_velocity(*arguments, Guidance(3.0, "offset"))
    torch.testing.assert_close(offset, standard)
    one_expert = replace(trainer.roles["teacher"], modules={"transformer": trainer.roles["teacher"].transformer})
    assert trainer.adapter.guidance_scale(one_expert, arguments[2], Guidance(4.0)) == 4.0


def test_a_run_is_exported_read_again_and_sampled_with_both(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The boundary is in model_index.json alone; it goes into config.toml, the manifest and what is exported."""
    moved = shutil.copytree(weights, tmp_path / "moved")
    run = tmp_path / "run"
    assert main(arguments(moved, run, "--training.steps", "2", "--roles.critic.path", str(moved / "transformer"))) == 0
    assert "2 experts" in capsys.readouterr().out
    path = run / "checkpoints" / "step-00000002"
    manifest = read_manifest(path)
    assert manifest.pipeline_config[BOUNDARY] == BOUNDARY_RATIO
    assert manifest.trained["student"].modules == ["transformer", "transformer_2"]
    assert manifest.trained["critic"].modules == ["transformer"]
    shutil.rmtree(moved)

    exported, again = tmp_path / "exported", tmp_path / "again"
    cli.main(["checkpoint", "export", "--checkpoint", str(path), "--out", str(exported), "--weights", "raw"])
    index = json.loads((exported / PIPELINE_INDEX).read_text())
    assert index[BOUNDARY] == BOUNDARY_RATIO and index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    imported = write_weights_only(
        tmp_path / "imported",
        {name: load_file(exported / name / FILE) for name in ("transformer", "transformer_2")},
        manifest.trained["student"].architecture,
    )
    cli.main(["checkpoint", "import", str(exported)])
    assert f'path = "{exported}"' in capsys.readouterr().out
    started = make_trainer(
        exported, tmp_path / "next", *(f"--roles.student.path= --roles.student.init_from {imported}#student").split()
    )
    num_changed = 0
    for name in ("transformer", "transformer_2"):
        before, tensors = (load_file(folder / name / FILE) for folder in (weights, exported))
        found = dict(started.roles["student"].modules[name].named_parameters())
        assert all(torch.equal(found[key], value) for key, value in tensors.items())
        num_changed += sum(not torch.equal(before[key], value) for key, value in tensors.items())
    assert num_changed
    cli.main(["generate", "--checkpoint", str(path), "--prompt", "a red disc", "--out", str(tmp_path / "a.mp4")])
    assert (tmp_path / "a.mp4").stat().st_size

    # One network in the pipeline of two: the teacher's second expert is no part of it.
    cli.main(
        ["checkpoint", "export", "--checkpoint", str(path), "--out", str(again), "--role", "critic", "--pipeline",
         str(exported)]
    )  # fmt: skip
    index = json.loads((again / PIPELINE_INDEX).read_text())
    assert index[BOUNDARY] is None and index["transformer_2"] == [None, None]
    assert not (again / "transformer_2").exists()


def test_an_average_of_two_experts_is_one_of_both(weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(weights, tmp_path)
    student = trainer.roles["student"]
    trainer.train_step()
    assert student.ema is not None
    student.ema.shadow["transformer_2.proj_out.bias"].fill_(7.0)
    before = student.modules["transformer_2"].proj_out.bias.detach().clone()
    with student.evaluation():
        assert bool((student.modules["transformer_2"].proj_out.bias == 7).all())
    assert torch.equal(student.modules["transformer_2"].proj_out.bias, before)
    trainer.save()
    exported = tmp_path / "exported"
    path = tmp_path / "checkpoints" / "step-00000001"
    cli.main(["checkpoint", "export", "--checkpoint", str(path), "--out", str(exported), "--weights", "ema",
              "--pipeline", str(with_index(weights, tmp_path / "pipeline"))])  # fmt: skip
    assert bool((load_file(exported / "transformer_2" / FILE)["proj_out.bias"] == 7).all())


def test_adapters_of_both_experts_are_merged_into_their_own_base(weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(weights, tmp_path, *["--roles.student.lora.rank", "2", "--method_config.update_ratio", "1"])
    student = trainer.roles["student"]
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    trainer.save()
    path, out = tmp_path / "checkpoints" / "step-00000000", tmp_path / "exported"
    cli.main(["checkpoint", "export", "--checkpoint", str(path), "--out", str(out), "--weights", "raw", "--pipeline",
              str(with_index(weights, tmp_path / "pipeline"))])  # fmt: skip
    for name, module in student.modules.items():
        exported = WanTransformer3DModel.from_pretrained(out / name)
        with torch.no_grad():
            found = exported(latents(1), torch.tensor([500.0]), text(1), return_dict=False)[0]
            expected = module(latents(1), torch.tensor([500.0]), text(1))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def with_index(weights: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(weights / PIPELINE_INDEX, folder / PIPELINE_INDEX)
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "--roles.student.path= --roles.student.flavor tiny --roles.student.init_from {}",
            "'tiny' is one network, but",
        ),
        ("--pipeline_config.boundary_ratio 875", "boundary_ratio = 875.0 is out of range"),
        ("--pipeline_config.boundary_ratio 1.0", "boundary_ratio = 1.0 is out of range"),
    ],
)
def test_what_can_not_be_is_one_sentence(
    weights: Path, tmp_path: Path, more: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(weights, tmp_path), *more.format(weights).split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["boundary_ratio", "guidance_scale_2"])
def test_a_boundary_of_one_network_is_refused(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_argv("dmd2", tmp_path), f"--pipeline_config.{key}", "0.5", "--job.dry_run"]) == 2
    assert f"pipeline_config.{key} = 0.5 has no effect" in capsys.readouterr().err


def set_index(folder: Path, **values: object) -> None:
    index = json.loads((folder / PIPELINE_INDEX).read_text())
    (folder / PIPELINE_INDEX).write_text(json.dumps(index | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: set_index(folder, boundary_ratio=None), "no model_index.json says where the second one"),
        (lambda folder: set_index(folder, boundary_ratio="x"), "boundary_ratio = 'x', which is not a share"),
        (lambda folder: set_index(folder, boundary_ratio=0.9), "boundaries differ (0.9 in "),
        (lambda folder: save_other(folder / "transformer_2"), "have different shapes"),
    ],
)
def test_folders_that_do_not_fit_are_one_sentence(
    weights: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(weights, tmp_path / "spoilt")
    spoil(folder)
    others = weights if "differ (" in message else folder
    assert main([*arguments(others, tmp_path / "run"), "--roles.teacher.path", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def save_other(folder: Path) -> None:
    config = replace(CONFIG, ffn_dim=32)
    save_folder(dict(WanTransformer(config).named_parameters()), config, folder)


@pytest.mark.nightly
def test_the_plan_counts_all_parameters_and_the_work_of_one_expert() -> None:
    """The shipped job has 14,288,491,584 numbers per expert, and a LoRA adapter on each linear layer of its blocks."""
    config = load_config(["--job.config_file", "train_configs/wan2.2_a14b_dmd2.toml"])
    with planner(64, GPUS["H100"]) as replan:
        plan = replan.plan(config)
    width, hidden, rank, num_layers = 5120, 13824, 64, 40
    adapters = num_layers * rank * (8 * (width + width) + 2 * (width + hidden))
    student, teacher = plan.roles["student"], plan.roles["teacher"]
    # Rank 0 of 8 that share the weights, bf16, holds what rows are left over: less than a thousandth more.
    assert teacher.states.parameters == pytest.approx(2 * 2 * 14_288_491_584 / 8, rel=1e-3)
    assert student.states.gradients == pytest.approx(4 * 2 * adapters / 8, rel=1e-3)
    assert student.states.optimizer == pytest.approx(2 * student.states.gradients, rel=1e-3)
    assert student.states.ema == student.states.gradients
    assert student.states.parameters - teacher.states.parameters == pytest.approx(student.states.gradients, rel=1e-3)
    teaching = next(phase for phase in plan.phases if phase.passes.role == "teacher")
    samples = 64 * 2 * teaching.passes.updates_per_step
    assert teaching.executed_flops / samples == pytest.approx(1678e12, rel=1e-3)
    training = next(phase for phase in plan.phases if phase.passes.role == "critic" and phase.passes.backward)
    assert training.dense_flops / 64 == pytest.approx(2 * 1678e12, rel=1e-2)


def test_experts_drawn_at_random_are_not_alike(tmp_path: Path) -> None:
    flavor = ["--roles.student.path=", "--roles.student.flavor", "tiny-A14B", "--pipeline_config.boundary_ratio", "0.5"]
    trainer = assemble(
        resolve(load_config([*tiny_argv("dmd2", tmp_path), *flavor]), 1), World(0, 1, torch.device("cpu"))
    )
    first, second = (module.patch_embedding.weight for module in trainer.roles["student"].modules.values())
    assert not torch.equal(first, second)
