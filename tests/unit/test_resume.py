"""Resumes with keys and data that have changed since the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_family
from titan_kernels.layout import DEFAULT_TILE
from toy_run import ASSETS, JOBS, METHODS, toy_trainer

from titan_distill import registry, train
from titan_distill.checkpoint import manifest as manifests
from titan_distill.config.changes import changes
from titan_distill.config.config import Config
from titan_distill.config.loading import help_text, load_config
from titan_distill.config.resume import FREE, LOGGED, REFUSED, on_resume
from titan_distill.config.sections import FIRST_TILE
from titan_distill.config.text import field_types, fields_of, to_dict
from titan_distill.methods.base import method_class
from titan_distill.trainer import Trainer

SAVING = ("--checkpoint.enabled", "true", "--checkpoint.resume_from", "latest")
WAN = ("--job.config_file", "train_configs/tiny_wan_dmd2.toml")

FREE_KEYS = """job.name job.output_dir training.local_batch_size parallelism.dp_shard parallelism.tensor compile.enabled
roles.student.parallelism.sequence activation_checkpoint.mode checkpoint.interval checkpoint.keep checkpoint.mode
validation.interval metrics.wandb profiling.enabled comm.train_timeout_seconds data.num_workers roles.student.path
pipeline_config.offload_text_encoder"""
LOGGED_KEYS = """optimizer.lr optimizer.betas optimizer.weight_decay roles.critic.optimizer.lr lr_scheduler.decay
lr_scheduler.warmup_steps training.steps training.max_grad_norm training.dtype roles.student.max_grad_norm ema.decay
method_config.guidance_scale method_config.denoising_steps method_config.fake_guidance_scale validation.prompts
validation.seed validation.num_prompts sparse_attention.sparsity float8.enabled data.path pipeline_config.flow_shift"""
REFUSED_KEYS = """job.seed training.global_batch_size recipe.method recipe.family optimizer.name roles.student.flavor
roles.student.attention roles.student.trainable roles.student.dtype roles.student.lora.rank ema.role
method_config.update_ratio method_config.discriminator_depths pipeline_config.num_frames sparse_attention.tile
roles.student.tile"""


def toy_config(job: str, *overrides: str) -> Config:
    return load_config(["--job.config_file", str(ASSETS / f"toy_{job}.toml"), *overrides])


def saved_config(config: Config) -> dict[str, Any]:
    """As a manifest returns it."""
    content: dict[str, Any] = json.loads(json.dumps(to_dict(config, skip_origins=True)))
    return content


def leaves(table: Any, prefix: str = "") -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each key of nested tables: its table, its name and its dotted key."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield table, name, f"{prefix}{name}"


def configuration_classes() -> Iterator[Any]:
    for method in METHODS:
        yield method_class(method).config_class
    for family in registry.names(registry.FAMILIES):
        yield registry.lookup(registry.FAMILIES, family).pipeline_config_class
    remaining: list[Any] = [Config]
    while remaining:
        kind = remaining.pop()
        yield kind
        hints = [*field_types(kind).values()]
        hints += [argument for hint in hints for argument in getattr(hint, "__args__", ())]
        remaining += [hint for hint in hints if dataclasses.is_dataclass(hint)]


def test_every_field_says_one_of_the_three_words() -> None:
    kinds = {kind.__name__: kind for kind in configuration_classes()}
    assert {"JobConfig", "LoraConfig", "RcmConfig", "WanPipelineConfig"} <= kinds.keys()
    words = {f"{kind}.{field.name}": on_resume(field) for kind in kinds for field in fields_of(kinds[kind])}
    assert [key for key, word in words.items() if word not in (FREE, LOGGED, REFUSED)] == []


@pytest.mark.parametrize("job", [*JOBS, "wan"])
def test_another_value_of_any_key_is_one_change_with_its_word(job: str) -> None:
    """The words of the sections do not depend on the job; the toy family's own keys are all refused."""
    config = load_config(list(WAN)) if job == "wan" else toy_config(job)
    saved = saved_config(config)
    assert changes(saved, config) == []
    words = {}
    for table, name, key in leaves(saved):
        value, table[name] = table[name], "another"
        (change,) = changes(saved, config)
        assert change.key == key and change.before == '"another"'
        words[key], table[name] = change.resume, value
    for keys, word in ((FREE_KEYS, FREE), (LOGGED_KEYS, LOGGED), (REFUSED_KEYS, REFUSED)):
        present = [key for key in keys.split() if job == "wan" or not key.startswith("pipeline_config.")]
        assert {key: words[key] for key in present if words.get(key, word) != word} == {}
        assert job != "wan" or set(present) <= words.keys()


def test_a_checkpoint_of_before_the_tile_had_the_published_one() -> None:
    overrides = ("--roles.student.attention", "sparse", "--sparse_attention.tile")
    for tile, changed in (("4,4,4", []), ("3,5,4", ["sparse_attention.tile"])):
        config = load_config([*WAN, *overrides, tile])
        saved = saved_config(config)
        del saved["sparse_attention"]["tile"]
        assert [change.key for change in changes(saved, config)] == changed
    assert FIRST_TILE == DEFAULT_TILE


def test_the_help_says_the_words() -> None:
    text = help_text(list(WAN))
    for line in (
        "--job.seed: an integer (default 0; resume: refused)",
        "--training.local_batch_size: an integer (required; resume: free)",
        "--optimizer.lr: a number (default 2e-06; resume: logged)",
        "--method_config.guidance_scale: a number (default 4.0; resume: logged)",
    ):
        assert line in text
    assert text.count("; resume: ") == text.count("\n  --")


def test_a_change_of_a_section_is_said_once() -> None:
    before = toy_config("dmd2", "--roles.critic.optimizer.lr", "0.5")
    after = toy_config("dmd2", "--roles.critic.optimizer.lr", "0.25", "--optimizer.lr", "1e-3")
    assert [str(change) for change in changes(saved_config(before), after)] == [
        "roles.critic.optimizer.lr: 0.5 -> 0.25",
        "optimizer.lr: 0.01 -> 0.001",
    ]


def test_keys_of_another_age() -> None:
    """A key that the checkpoint lacks had its default; one that is gone is named."""
    config = toy_config("dmd2", "--method_config.clamp", "resample")
    saved = saved_config(config)
    del saved["method_config"]["clamp"], saved["method_config"]["min_step"], saved["comm"]
    saved["training"]["gone"] = 3
    assert [str(change) for change in changes(saved, config)] == [
        'method_config.clamp: default -> "resample"',
        "training.gone: 3 -> no longer a key",
    ]


def test_roles_that_one_of_the_two_lacks() -> None:
    with_teacher = toy_config("knowledge_distillation")
    saved = saved_config(with_teacher)
    del saved["roles"]["teacher"]
    assert [(str(change), change.resume) for change in changes(saved, with_teacher)] == [
        ("roles.teacher: absent -> frozen", LOGGED)
    ]
    saved["roles"]["teacher"] = saved_config(with_teacher)["roles"]["teacher"]
    saved["roles"]["discriminator"] = saved["roles"]["student"]
    assert [(str(change), change.resume) for change in changes(saved, with_teacher)] == [
        ("roles.discriminator: trained -> absent", REFUSED)
    ]


def learning_rates(trainer: Trainer, steps: int) -> dict[str, list[float]]:
    """Trains and returns the rates of each role's updates, as they are logged."""
    rates: dict[str, list[float]] = {}
    for _ in range(steps):
        for name, values in trainer.run_step():
            if f"lr/{name}" in values:
                rates.setdefault(name, []).append(values[f"lr/{name}"])
        trainer.state.step += 1
        trainer.state.samples_seen += 8
    return rates


COSINE = ("--lr_scheduler.decay", "cosine", "--optimizer.lr", "1e-4", "--checkpoint.interval", "100")


def test_an_extended_cosine_goes_on_at_its_present_rate(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "finetune", *SAVING, *COSINE, "--training.steps", "3")
    assert learning_rates(trainer, 3)["student"][-1] == 0
    trainer.save()
    resumed = toy_trainer(tmp_path, "finetune", *SAVING, *COSINE, "--training.steps", "9")
    before = torch.nn.utils.parameters_to_vector(resumed.roles["student"].parameters()).detach()
    assert resumed.roles["student"].learning_rate == pytest.approx(6.9134e-5, rel=1e-4)
    assert learning_rates(resumed, 1)["student"] == pytest.approx([6.9134e-5], rel=1e-4)
    after = torch.nn.utils.parameters_to_vector(resumed.roles["student"].parameters()).detach()
    assert 6.9e-5 < (after - before).abs().max() < 5e-4  # a step of Adam, once the gradient is larger than before
    assert learning_rates(resumed, 5)["student"][-1] == 0


def test_every_trained_role_goes_on_at_its_present_rate(tmp_path: Path) -> None:
    """A student that is updated at every other step, its critic and its discriminator at every step, each with its own
    number of updates and the critic with a rate of its own."""
    job = ("--method_config.update_ratio", "2", "--roles.critic.optimizer.lr", "3e-4", *SAVING, *COSINE)
    trainer = toy_trainer(tmp_path, "adversarial", *job, "--training.steps", "6")
    done = {name: len(rates) for name, rates in learning_rates(trainer, 4).items()}
    trainer.save()
    changed = ("--lr_scheduler.min_lr_ratio", "0.1", "--optimizer.lr", "2e-4")
    resumed = toy_trainer(tmp_path, "adversarial", *job, *changed, "--training.steps", "16")
    rates = learning_rates(resumed, 12)
    assert done == {"critic": 4, "student": 2, "discriminator": 4} and rates.keys() == done.keys()
    for name, found in rates.items():
        peak, last = 3e-4 if name == "critic" else 2e-4, done[name] + len(found) - 1
        assert last == (7 if name == "student" else 15)
        expected = [
            peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * update / last))) for update in range(done[name], last + 1)
        ]
        assert found == pytest.approx(expected, rel=1e-12)


def test_changed_settings_take_effect_and_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(tmp_path, "dmd2", *SAVING, "--ema.decay", "0.5", "--training.steps", "2").run()
    changed = ("--optimizer.lr", "5e-4", "--optimizer.betas", "[0.5,0.9]", "--training.max_grad_norm", "0.5")
    changed += ("--ema.decay", "0.9", "--method_config.guidance_scale", "2", "--training.local_batch_size", "4")
    resumed = toy_trainer(tmp_path, "dmd2", *SAVING, *changed, "--training.steps", "4")
    lines = [message for message in caplog.messages if message.startswith("Changed since the checkpoint")]
    assert lines == [
        f"Changed since the checkpoint: {change}"
        for change in (
            "method_config.guidance_scale: 3.0 -> 2.0",
            "training.steps: 2 -> 4",
            "training.max_grad_norm: 10.0 -> 0.5",
            "optimizer.lr: 0.01 -> 0.0005",
            "optimizer.betas: [0.0, 0.99] -> [0.5, 0.9]",
            "ema.decay: 0.5 -> 0.9",
        )
    ]
    for name in ("student", "critic"):
        role = resumed.roles[name]
        (group,) = role.optimizers["transformer"].param_groups
        assert (group["lr"], group["betas"], role.max_grad_norm) == (5e-4, (0.5, 0.9), 0.5)
    assert resumed.roles["student"].ema is not None and resumed.roles["student"].ema.decay == 0.9
    assert resumed.method.config.guidance_scale == 2
    resumed.run()
    caplog.clear()
    again = toy_trainer(tmp_path, "dmd2", *SAVING, *changed, "--training.steps", "4")
    assert "Changed since" not in caplog.text and again.state.step == 4


@pytest.mark.parametrize(
    "changed, sentence",
    [
        (("--job.seed", "7"), "job.seed: 0 -> 7; set it back"),
        (("--training.global_batch_size", "16"), "training.global_batch_size: 8 -> 16"),
        (("--roles.student.dtype", "bfloat16"), 'roles.student.dtype: "auto" -> "bfloat16"'),
        (("--pipeline_config.num_values", "32"), "pipeline_config.num_values: 64 -> 32"),
        (("--recipe.method", "consistency", "--roles.teacher.flavor", "analytic", "--roles.teacher.trainable", "false",
          "--method_config.target", "student"), 'recipe.method: "finetune" -> "consistency"'),
        (("--job.seed", "7", "--roles.student.flavor", "affine"),
         'job.seed: 0 -> 7, roles.student.flavor: "mlp" -> "affine"'),
        (("--ema.decay", "0.9"), "ema.decay = 0.9, but .* has no EMA of 'student'"),
        (("--training.steps", "1"), r"training.steps = 1, but .*step-00000002 has done 2 already; raise it"),
    ],
)  # fmt: skip
def test_what_the_state_depends_on_is_refused(tmp_path: Path, changed: tuple[str, ...], sentence: str) -> None:
    toy_trainer(tmp_path, "finetune", *SAVING, "--training.steps", "2").run()
    recorded = (tmp_path / "run/config.toml").read_bytes()
    with pytest.raises(ValueError, match=sentence) as error:
        toy_trainer(tmp_path, "finetune", *SAVING, *changed)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run/config.toml").read_bytes() == recorded


def test_an_ema_is_not_dropped(tmp_path: Path) -> None:
    toy_trainer(tmp_path, "finetune", *SAVING, "--ema.decay", "0.9").run()
    with pytest.raises(ValueError, match=r"ema.decay = 0, but .* has an EMA of 'student'.*; set it above 0, or start"):
        toy_trainer(tmp_path, "finetune", *SAVING)


def test_a_run_that_begins_at_anothers_checkpoint_follows_the_same_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the command line, whose `--check` refuses, too; exit code 2, one line, and the weights are never built."""
    toy_trainer(tmp_path, "finetune", *SAVING).run()
    child = tmp_path / "child"
    command = ["--job.config_file", str(ASSETS / "toy_finetune.toml"), "--data.path", str(tmp_path / "toy.parquet")]
    command += ["--job.output_dir", str(child), "--training.steps", "9", "--checkpoint.enabled", "true"]
    command += ["--checkpoint.resume_from", str(tmp_path / "run/checkpoints/step-00000008")]
    capsys.readouterr()
    for options in (("--check",), ()):
        assert train.main([*command, "--job.seed", "1", *options]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and message.startswith("error: ") and "job.seed: 0 -> 1" in message
        assert not list(child.glob("config.toml")) and not list(child.glob("checkpoints"))
    assert train.main([*command, "--optimizer.lr", "1e-3"]) == 0
    assert "Changed since the checkpoint: optimizer.lr: 0.01 -> 0.001" in caplog.messages
    last = json.loads((child / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["lr/student"]) == (9, 1e-3)


def test_a_checkpoint_from_before_the_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line each about configuration and data; seed and family are compared."""
    toy_trainer(tmp_path, "finetune", *SAVING).run()
    (step,) = (tmp_path / "run/checkpoints").iterdir()
    manifests.write_manifest(step, dataclasses.replace(manifests.read_manifest(step), config=None, data=None))
    toy_family.write_data(tmp_path / "toy.parquet", num_rows=32)
    trainer = toy_trainer(tmp_path, "finetune", *SAVING, "--training.steps", "9", "--training.global_batch_size", "16")
    assert trainer.state.step == 8
    assert [message for message in caplog.messages if "does not record" in message] == [
        "The checkpoint does not record its data: whether it has changed since is not known",
        "The checkpoint does not record its configuration: only job.seed and recipe.family are compared",
    ]
    with pytest.raises(ValueError, match=r"cannot be resumed with job\.seed: 0 -> 1"):
        toy_trainer(tmp_path, "finetune", *SAVING, "--job.seed", "1")


def test_changed_data_is_refused_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(tmp_path, "finetune", *SAVING).run()
    data, longer = tmp_path / "toy.parquet", ("--training.steps", "12")
    moved = Path(shutil.move(data, tmp_path / "elsewhere.parquet"))
    toy_family.write_data(data, num_rows=60)
    with pytest.raises(ValueError, match=r"toy.parquet' has 60 rows \(digest \w{12}\), but .* was saved with 64 rows"):
        toy_trainer(tmp_path, "finetune", *SAVING, *longer)

    assert toy_trainer(tmp_path, "finetune", *SAVING, *longer, "--data.path", str(moved)).state.step == 8
    assert "Data has changed" not in caplog.text

    allowed = toy_trainer(tmp_path, "finetune", *SAVING, *longer, "--checkpoint.allow_changed_data")
    assert sum("Data has changed: data.path = " in message for message in caplog.messages) == 1
    assert allowed.state.samples_seen == 64 and allowed.loader.order.num_rows == 60
    allowed.run()
    assert "allow_changed_data" not in (tmp_path / "run/config.toml").read_text()
    assert toy_trainer(tmp_path, "finetune", *SAVING, *longer).state.step == 12  # step 12 has seen this data


def test_a_check_refuses_changed_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before torchrun, whose ranks would build the weights first."""
    toy_trainer(tmp_path, "finetune", *SAVING).run()
    command = ["--job.config_file", str(ASSETS / "toy_finetune.toml"), "--data.path", str(tmp_path / "toy.parquet")]
    command += ["--job.output_dir", str(tmp_path / "run"), *SAVING, "--training.steps", "9", "--check"]
    assert train.main(command) == 0
    toy_family.write_data(tmp_path / "toy.parquet", num_rows=60)
    capsys.readouterr()
    assert train.main(command) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "has 60 rows" in shown and "was saved with 64 rows" in shown


def test_the_manifest_records_configuration_and_data(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "finetune", *SAVING, "--training.steps", "1", "--training.max_grad_norm", "inf")
    trainer.run()
    manifest = manifests.read_manifest(tmp_path / "run/checkpoints/step-00000001")
    assert manifest.config == to_dict(trainer.config, skip_origins=True)
    assert manifest.config["training"]["max_grad_norm"] == math.inf
    assert manifest.data == manifests.DataRecord(64, manifest.data.digest) and len(manifest.data.digest) == 64
