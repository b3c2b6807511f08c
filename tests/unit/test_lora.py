"""Low-rank adapters: they start as nothing, are all that is trained and saved, and merge into what they were."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from runs import TINY_WAN, read_metrics, tiny_argv
from torch import Tensor, nn

from titan_distill.checkpoint.diffusers_folder import open_folder
from titan_distill.checkpoint.initial_weights import resolve_reference
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.checkpoint.tools.contents import open_checkpoint, role_tensors
from titan_distill.commands.export import export
from titan_distill.config.loading import load_config
from titan_distill.config.role_sections import LoraConfig
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.parallelize import HIGH_PRECISION
from titan_distill.models.wan.plugin import WanFamily
from titan_distill.models.wan.state_dict import UNUSED_KEY, load_weights, read_config
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.compile import compile_blocks
from titan_distill.parallelisms.lora import apply_lora, initial_adapters, is_adapter, merge
from titan_distill.parallelisms.mesh import World
from titan_distill.planner import memory
from titan_distill.resolve import resolve
from titan_distill.train import assemble, main
from titan_distill.trainer import Trainer

SMALL = "--pipeline_config.num_frames 5 --pipeline_config.height 32 --pipeline_config.width 32"
# alpha differs from the rank: a merge that forgets the scale is another model.
LORA = "--roles.student.lora.rank 4 --roles.student.lora.alpha 8 --roles.critic.lora.rank 2 --ema.start_step 1"
SEED = 3
TINY = read_config(TINY_WAN / "transformer")


def arguments(output: Path, *more: str) -> list[str]:
    return tiny_argv("dmd2", output, *f"{SMALL} {LORA} --method_config.update_ratio 1".split(), *more)


def make_trainer(output: Path, *more: str) -> Trainer:
    os.chdir(TINY_WAN.parents[2])
    return assemble(resolve(load_config(arguments(output, *more)), 1), World(0, 1, torch.device("cpu")))


def train(trainer: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        trainer.train_step()
    return trainer


def forward(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 2, 4, 4, generator=generator), torch.randn(2, 8, 64, generator=generator)
    with torch.no_grad():
        return module(x, torch.tensor([900.0, 300.0]), text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run of three steps, saved."""
    trainer = train(make_trainer(tmp_path_factory.mktemp("runs") / "lora"), 3)
    trainer.save()
    return trainer, trainer.config.job.output_folder / "checkpoints" / "step-00000003"


def test_an_adapted_model_starts_as_its_base_bit_for_bit(tmp_path: Path) -> None:
    roles = make_trainer(tmp_path, "--roles.teacher.dtype", "float32").roles
    base = WanTransformer(roles["student"].transformer.config)
    load_weights(base, TINY_WAN / "transformer")
    assert torch.equal(forward(roles["student"].transformer), forward(base))
    a = [p for name, p in roles["student"].transformer.named_parameters() if "lora_A" in name]
    assert len(a) == 60 and all(float(p.detach().abs().max()) > 0.04 for p in a)


def test_first_values_depend_on_the_name_alone() -> None:
    def values(targets: tuple[str, ...]) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = WanTransformer(WanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=6))
        apply_lora(model, LoraConfig(rank=2, target_modules=targets), excluded=HIGH_PRECISION)
        by_identity = {id(p): name for name, p in model.named_parameters()}
        torch.manual_seed(len(targets))
        return {
            by_identity[id(parameter)]: value for parameter, value in initial_adapters(model, SEED, torch.device("cpu"))
        }

    some, everything = values(("attn1.to_v", "ffn.net.2")), values(())
    assert len(some) == 8 and some.keys() < everything.keys()
    assert all(torch.equal(some[name], everything[name]) for name in some)
    # Cross-attention's layers among them; conditions, patches and head have none.
    assert {name.split(".")[0] for name in everything} == {"blocks"} and len(everything) == 2 * 2 * 10


def test_nothing_but_adapters_is_trained_averaged_and_saved(trained: tuple[Trainer, Path]) -> None:
    trainer, path = trained
    student = trainer.roles["student"]
    names = [name for name, p in student.transformer.named_parameters() if p.requires_grad]
    assert names and all(map(is_adapter, names)) and student.ema is not None and list(student.ema.shadow) == names
    stored = load_weights_of(student.transformer.config)
    for name, parameter in student.transformer.named_parameters():
        if not is_adapter(name):
            assert torch.equal(parameter, stored[name.replace(".base_layer", "")]), name
    held = open_checkpoint(path).names
    assert [n for n in held if n.startswith(("models/student", "ema/student"))] == sorted(
        f"{prefix}.{name}" for prefix in ("models/student/transformer", "ema/student") for name in names
    )
    size = sum(p.numel() for p in student.parameters())
    found = memory.states(student.transformer, has_ema=True)
    assert (found.gradients, found.ema) == (4 * size, 4 * size) and found.parameters > 10 * found.gradients


def load_weights_of(config: WanConfig) -> dict[str, Tensor]:
    base = WanTransformer(config)
    load_weights(base, TINY_WAN / "transformer")
    return dict(base.named_parameters())


@pytest.mark.parametrize("use_ema", [False, True])
def test_what_is_exported_is_the_adapted_model(trained: tuple[Trainer, Path], tmp_path: Path, use_ema: bool) -> None:
    trainer, path = trained
    student = trainer.roles["student"]
    export(path, tmp_path / "out", weights="ema" if use_ema else "raw")
    with student.evaluation() if use_ema else torch.no_grad():
        expected = forward(student.transformer)
    exported = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 2, 4, 4, generator=generator), torch.randn(2, 8, 64, generator=generator)
    with torch.no_grad():
        found = exported(x, torch.tensor([900.0, 300.0]), text, return_dict=False)[0]
    assert bool(((found - expected).abs() <= 1e-5).all())
    base = WanTransformer(student.transformer.config)
    load_weights(base, TINY_WAN / "transformer")
    assert float((forward(base) - expected).abs().max()) > 1e-4, "nothing was learned, so nothing was compared"
    assert "merged into tests/assets/tiny_wan" in (tmp_path / "out" / "README.md").read_text()


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    whole = train(make_trainer(tmp_path / "whole"), 4)
    stopped = train(make_trainer(tmp_path / "stopped"), 2)
    stopped.save()
    resumed = train(make_trainer(tmp_path / "stopped", "--checkpoint.resume_from", "latest"), 2)
    for name in ("student", "critic"):
        expected, found = (dict(t.roles[name].transformer.named_parameters()) for t in (whole, resumed))
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    ema, other = whole.roles["student"].ema, resumed.roles["student"].ema
    assert ema is not None and other is not None
    assert all(torch.equal(ema.shadow[key], other.shadow[key]) for key in ema.shadow)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--roles.teacher.lora.rank 4", "leaves lora.rank = 4 without effect"),
        ("--roles.student.lora.rank 0", "alpha = 8.0 has no effect with rank = 0"),
        ("--roles.student.lora.rank -1", "rank = -1 is out of range"),
        ("--roles.student.lora.dropout 0.1", 'lora.dropout = "0.1" is not known'),
        ("--roles.student.attention sparse", "does not go with attention = 'sparse'"),
        ("--roles.student.path= --roles.student.flavor tiny", "adapts weights, but the role has none"),
        ("--roles.student.lora.target_modules to_q,to_x", "has 'to_x', which names no linear layer"),
        ("--roles.student.lora.target_modules patch_embedding", "names no linear layer"),
    ],
)
def test_what_can_not_be_is_one_sentence(
    more: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TINY_WAN.parents[2])
    assert main([*arguments(tmp_path), "--job.dry_run", *more.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_tensor_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(TINY_WAN.parents[2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*arguments(tmp_path), "--job.dry_run", "--parallelism.tensor", "2"]) == 2
    assert "roles.student.lora does not go with tensor = 2" in capsys.readouterr().err


def test_adapters_are_no_weights_to_start_from(trained: tuple[Trainer, Path]) -> None:
    found = "holds only a LoRA adapter of 'student', for the weights in tests/assets/tiny_wan"
    with pytest.raises(ValueError, match=found):
        resolve_reference(f"{trained[1]}#student:ema")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda folder: ("--roles.student.path", str(folder)),
            "has a LoRA adapter of 'student' for tests/assets/tiny_wan with scaling 2,",
        ),
        (lambda _: ALPHA, "cannot be resumed with roles.student.lora.alpha: 8.0 -> 4.0;"),
    ],
)
def test_a_run_goes_on_with_its_own_base_and_scale(
    trained: tuple[Trainer, Path], tmp_path: Path, change: Callable[[Path], tuple[str, ...]], sentence: str
) -> None:
    folder = other_weights(tmp_path / "other")
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path / "run", "--checkpoint.resume_from", str(trained[1]), *change(folder))


ALPHA = ("--roles.student.lora.alpha", "4")


def other_weights(folder: Path) -> Path:
    """The small Wan with one weight changed."""
    tensors = {name: p.detach() for name, p in load_weights_of(TINY).items()}
    tensors["proj_out.bias"] += 1
    WanFamily.write_weights(tensors.items(), TINY.to_diffusers(), folder, None)
    return folder


def test_a_changed_base_is_not_merged(tmp_path: Path) -> None:
    folder = other_weights(tmp_path / "base")
    trainer = train(make_trainer(tmp_path / "run", "--roles.student.path", str(folder)), 1)
    trainer.save()
    path = tmp_path / "run" / "checkpoints" / "step-00000001"
    base = read_manifest(path).trained["student"].base
    assert base is not None and (base.path, base.scale) == (str(folder), 2.0)
    assert sum(1 for _ in role_tensors(path, "student", use_ema=False)) == len(load_weights_of(TINY))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(ValueError, match="are not those that the LoRA adapter was trained on"):
        role_tensors(path, "student", use_ema=False)


def test_merging_is_done_in_fp32_and_leaves_other_tensors_alone() -> None:
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    adapters = {"x.lora_A.default.weight": a, "x.lora_B.default.weight": b}
    weight = torch.randn(4, 6)
    torch.testing.assert_close(merge("x.weight", weight, adapters, 0.5), weight + 0.5 * b @ a)
    merged = merge("x.weight", weight.bfloat16(), adapters, 0.5)
    torch.testing.assert_close(merged, weight.bfloat16().float() + 0.5 * b @ a)
    bias = torch.randn(4)
    assert torch.equal(merge("x.bias", bias, adapters, 0.5), bias)


def test_published_keys_that_no_network_has_are_left_out(tmp_path: Path) -> None:
    tensors = {name: p.detach() for name, p in load_weights_of(TINY).items()}
    tensors[f"blocks.0.attn2.{UNUSED_KEY}.weight"] = torch.ones(3)
    WanFamily.write_weights(tensors.items(), TINY.to_diffusers(), tmp_path, None)
    load_weights(WanTransformer(TINY), tmp_path)
    assert UNUSED_KEY not in "".join(open_folder(tmp_path).shapes)


@pytest.mark.nightly
def test_blocks_with_adapters_are_one_graph(tmp_path: Path) -> None:
    model = make_trainer(tmp_path).roles["student"].transformer
    expected = forward(model)
    compile_blocks(model.blocks, load_config(arguments(tmp_path, "--compile.enabled")).compile, backend="eager")
    torch.testing.assert_close(forward(model), expected)


@pytest.mark.nightly
def test_float8_computes_the_base_and_adapters_train(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, *["--float8.enabled", "--float8.emulate", "--float8.min_features", "32"])
    assert any("base_layer" in name and "Float8" in type(m).__name__ for name, m in
               trainer.roles["student"].transformer.named_modules())  # fmt: skip
    train(trainer, 2)
    trainer.metrics.close()
    assert all(line["grad_norm/student"] > 0 for line in read_metrics(tmp_path))
