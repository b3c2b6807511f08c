"""The configuration: what loads, what is refused and in which words, and that the resolved file reads back."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees, resolve_layout
from titan_distill.config.loading import check_paths, help_text, load_config, to_toml
from titan_distill.config.parsing import ConfigError
from titan_distill.config.role_sections import ParallelismConfig, RoleConfig
from titan_distill.config.sections import SparseAttentionConfig
from titan_distill.config.text import field_docs, field_types, to_dict
from titan_distill.methods.base import TrainingMethod
from titan_distill.models.base import ModelFamily
from titan_distill.registry import register_method, register_model


@dataclass(frozen=True)
class ProbeMethodConfig:
    schedule: tuple[float, ...] = (1000.0, 500.0)
    """Levels of the probe."""
    ratio: int = 5
    """Ratio of the probe."""
    guidance: float | None = 3.0
    """Guidance of the probe."""
    api_key: str = ""
    """A secret where none belongs."""
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Free table of the probe."""
    tokenizers: list[str] = dataclasses.field(default_factory=list)
    """No secrets, though their key contains the word token."""
    order: Literal[1, 2] = 1
    """Order of the probe."""

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"ratio = {self.ratio} must be at least 1")


@dataclass(frozen=True)
class ProbePipelineConfig:
    flow_shift: float = 1.0
    """Shift of the probe."""
    negative_prompt: str = ""
    """Words of the probe."""


@register_method("config_probe")
class ProbeMethod(TrainingMethod):
    config_class = ProbeMethodConfig
    roles_required = {"teacher": False, "student": True}  # noqa: RUF012 - the base class declares it ClassVar


@register_model("config_probe")
class ProbeFamily(ModelFamily):
    pipeline_config_class = ProbePipelineConfig

    @classmethod
    def validate(cls, config: Config) -> None:
        if config.pipeline_config.flow_shift <= 0:
            raise ValueError(f"pipeline_config.flow_shift = {config.pipeline_config.flow_shift} must be positive")


VALID = """\
[job]
name = "probe"

[recipe]
method = "config_probe"
family = "config_probe"

[roles.teacher]
path = "weights/teacher"
trainable = false

[roles.student]
flavor = "tiny"
trainable = true
optimizer = { lr = 1e-4 }

[method_config]
ratio = 3

[data]
path = "data.parquet"

[training]
steps = 10
global_batch_size = 8
local_batch_size = 2

[optimizer]
lr = 1
betas = [0, 0.9]
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Loads VALID after textual replacements, with overrides."""

    def load_(*overrides: str, replace: dict[str, str] | None = None, append: str = "") -> Config:
        text = VALID
        for old, new in (replace or {}).items():
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "x.toml"
        file.write_text(text + append)
        return load_config(["--job.config_file", str(file), *overrides])

    return load_


def sentence(load: Callable[..., Config], *overrides: str, **edits: Any) -> str:
    """The one error, without the folder of the file."""
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **edits)
    assert len(str(caught.value).splitlines()) == 1
    return re.sub(r"\S*/x\.toml", "x.toml", str(caught.value))


def test_file_overrides_and_defaults(load: Callable[..., Config]) -> None:
    config = load("--training.steps", "20", "--roles.student.flavor=1.3B", "--job.dry_run", "--training.steps", "30")
    assert (config.training.steps, config.training.global_batch_size, config.training.gc_interval) == (30, 8, 50)
    assert (config.roles["student"].flavor, config.roles["teacher"].path) == ("1.3B", "weights/teacher")
    assert config.job.dry_run is True and config.job.output_folder == Path("outputs/probe")
    assert type(config.optimizer.lr) is float and config.optimizer.betas == (0.0, 0.9)
    assert config.method_config == ProbeMethodConfig(ratio=3)
    assert config.pipeline_config == ProbePipelineConfig()


@pytest.mark.parametrize(
    ("argument", "read", "expected"),
    [
        ("--job.name=12", lambda c: c.job.name, "12"),
        ("--job.name=a=b", lambda c: c.job.name, "a=b"),
        ("--optimizer.betas=0.0,0.99", lambda c: c.optimizer.betas, (0.0, 0.99)),
        ("--optimizer.betas=[0, 0.99]", lambda c: c.optimizer.betas, (0.0, 0.99)),
        ("--job.imports=json,math", lambda c: c.job.imports, ("json", "math")),
        ("--job.imports=", lambda c: c.job.imports, ()),
        ('--method_config.tokenizers=["a,b", "c"]', lambda c: c.method_config.tokenizers, ["a,b", "c"]),
        ("--method_config.guidance=none", lambda c: c.method_config.guidance, None),
        ("--method_config.weights.left=2", lambda c: c.method_config.weights, {"left": 2.0}),
        ("--method_config.order=2", lambda c: c.method_config.order, 2),
        ("--compile.enabled=false", lambda c: c.compile.enabled, False),
        ("--roles.student.optimizer.eps=1e-6", lambda c: c.roles["student"].optimizer.eps, 1e-6),
        ("--pipeline_config.flow_shift=3", lambda c: c.pipeline_config.flow_shift, 3.0),
    ],
)
def test_overrides_are_read_by_type(
    load: Callable[..., Config], argument: str, read: Callable[[Config], Any], expected: Any
) -> None:
    value = read(load(argument))
    assert value == expected and type(value) is type(expected)
    if "=[" not in argument:
        assert read(load(*argument.split("=", 1))) == expected


def test_role_optimizer_is_laid_over_the_default(load: Callable[..., Config]) -> None:
    config = load("--optimizer.weight_decay", "0.5")
    student = config.roles["student"].optimizer
    assert (student.lr, student.weight_decay, student.betas) == (1e-4, 0.5, (0.0, 0.9))


def test_role_parallelism_is_laid_over_the_default(load: Callable[..., Config]) -> None:
    """A role that sets a degree has a layout of its own; the other keys are those of [parallelism]."""
    run = ("--compile.enabled", "--parallelism.tensor", "2", "--parallelism.token_region", "--parallelism.async_tensor")
    config = load(*run, "--parallelism.cpu_offload", "--roles.teacher.parallelism.sequence", "2")
    assert config.roles["student"].parallelism == config.parallelism
    assert config.roles["teacher"].parallelism == ParallelismConfig(sequence=2, cpu_offload=True)
    config = load(*run, "--roles.teacher.parallelism.tensor", "4", "--roles.student.parallelism.cpu_offload")
    assert config.roles["teacher"].parallelism == replace(config.parallelism, tensor=4)
    assert config.roles["student"].parallelism == replace(config.parallelism, cpu_offload=True)


OLD_ROLE_TABLES = """
[roles.student.optimizer]
lr = 0.0001
betas = "none"
weight_decay = "none"
eps = "none"

[roles.teacher.optimizer]
lr = "none"
betas = "none"
weight_decay = "none"
eps = "none"

[roles.teacher.parallelism]
dp_replicate = "none"
dp_shard = "none"
sequence = "none"
tensor = 2
sequence_method = "none"
token_region = true
reshard_after_forward = "none"
cpu_offload = "none"
"""
"""Tables as version 0.1 wrote them to config.toml."""


def test_role_tables_of_version_0_1_mean_the_same(load: Callable[..., Config]) -> None:
    old = load(replace={"optimizer = { lr = 1e-4 }\n": ""}, append=OLD_ROLE_TABLES)
    assert old == load("--roles.teacher.parallelism.tensor", "2", "--roles.teacher.parallelism.token_region")


ROLE_TABLES = [
    (),
    ("--roles.teacher.parallelism.tensor", "2"),
    ("--roles.teacher.parallelism.tensor", "2", "--roles.teacher.parallelism.token_region"),
    ("--parallelism.dp_shard", "4", "--roles.teacher.parallelism.sequence", "1"),
    ("--parallelism.dp_replicate", "2", "--roles.student.parallelism.dp_replicate", "2"),
    ("--parallelism.tensor", "2", "--parallelism.async_tensor", "--compile.enabled", "--parallelism.token_region",
     "--roles.student.parallelism.sequence", "4", "--roles.teacher.parallelism.token_region", "false"),
    ("--roles.student.optimizer.betas", "0.5,0.6", "--roles.student.parallelism.cpu_offload"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", ROLE_TABLES)
def test_role_tables_read_back(load: Callable[..., Config], tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = load(*overrides)
    resolved = tmp_path / "config.toml"
    resolved.write_text(to_toml(config))
    assert load_config(["--job.config_file", str(resolved)]) == config


SPARSE = ("--roles.student.attention", "sparse")
ERRORS = [
    # (overrides, replacements in the file, what the sentence must contain)
    (["--training.stepz", "5"], {}, ["command line: training.stepz", '"5"', "did you mean training.steps?"]),
    ([], {"steps =": "stepz ="}, ["x.toml: training.stepz = 10 is not known", "did you mean training.steps?"]),
    ([], {"flavor =": "flavour ="}, ['roles.student.flavour = "tiny"', "did you mean roles.student.flavor?"]),
    ([], {"lr = 1e-4": "lrr = 1e-4"}, ["did you mean roles.student.optimizer.lr?"]),
    ([], {"[training]": "[trainnig]"}, ["x.toml: [trainnig] is not known", "did you mean training?"]),
    ([], {"steps = 10": "steps = 10\nweight_decay = 0.1"}, ["did you mean optimizer.weight_decay?"]),
    ([], {"ratio = 3": "ration = 3"}, ["did you mean method_config.ratio?"]),
    ([], {"steps = 10": 'steps = "10"'}, ['x.toml: training.steps = "10" must be an integer']),
    ([], {"steps = 10": "steps = true"}, ["training.steps = true must be an integer"]),
    ([], {"steps = 10": "steps = 10.0"}, ["training.steps = 10.0 must be an integer"]),
    ([], {"steps = 10": "steps = 2024-01-01"}, ["training.steps = 2024-01-01 must be an integer"]),
    ([], {"steps = 10": "steps = 0"}, ["x.toml: training.steps = 0 is out of range; choose at least 1"]),
    ([], {"steps = 10": f"steps = {2**63}"}, ["fits into 64 bits"]),
    (["--training.steps", "0"], {}, ["command line: training.steps = 0 is out of range"]),
    (["--training.steps", "ten"], {}, ['command line: training.steps = "ten" must be an integer']),
    (["--training.max_grad_norm", "nan"], {}, ["training.max_grad_norm", "must be a number"]),
    (["--training.steps"], {}, ["command line: --training.steps needs a value"]),
    (["--training.steps", "--job.dry_run"], {}, ["--training.steps needs a value"]),
    (["--job.dry_run", "maybe"], {}, ['job.dry_run = "maybe" must be true or false']),
    (["training.steps", "5"], {}, ["'training.steps' is not expected here"]),
    (["--trainingz.x.y", "5"], {}, ["command line: [trainingz] is not known", "did you mean training?"]),
    (["--training..steps", "5"], {}, ["is not expected here"]),
    (["--training.steps.x", "5"], {}, ["--training.steps.x goes through training.steps, which is a value"]),
    (["--training", "5"], {}, ['command line: training = "5" must be a table']),
    (["--training.dtype", "bfloat"], {}, ['must be one of "float32", "bfloat16"; did you mean "bfloat16"?']),
    ([], {"trainable = true": 'trainable = true\nattention = "vsa"'}, ['must be one of "dense", "sparse"']),
    (["--sparse_attention.sparsity", "0.5"], {}, ["sparse_attention.sparsity = 0.5 has no effect, because no role"]),
    ([*SPARSE, "--sparse_attention.sparsity", "1"], {}, ["sparse_attention.sparsity = 1.0 is out of range"]),
    ([*SPARSE, "--sparse_attention.crossover", "1.1"], {}, ["sparse_attention.crossover = 1.1 is out of range"]),
    ([*SPARSE, "--sparse_attention.tiles_per_list", "3"], {}, ["tiles_per_list = 3 is out of range; choose"]),
    ([*SPARSE, "--sparse_attention.tile", "3,5,0"], {}, ["sparse_attention.tile = (3, 5, 0) is out of range; choose"]),
    ([*SPARSE, "--sparse_attention.tile", "3,5,9"], {}, ["sparse_attention.tile = [3, 5, 9] has 135 tokens", "128"]),
    ([*SPARSE, "--sparse_attention.tile", "3,5"], {}, ["has 2 items but must be a list of 3"]),
    ([*SPARSE, "--sparse_attention.tile", "3,5,x"], {}, ['sparse_attention.tile[2] = "x" must be an integer']),
    ([*SPARSE, "--sparse_attention.tile", "best"], {}, ['tile = "best" must be "auto" or a list of 3: an integer']),
    ([*SPARSE, "--sparse_attention.tile"], {}, ['sparse_attention.tile must be "auto" or a list of 3']),
    (["--sparse_attention.tile", "3,5,4"], {}, ["sparse_attention.tile = (3, 5, 4) has no effect, because no role"]),
    (["--roles.student.tile", "3,5,4"], {}, ["roles.student.tile = (3, 5, 4) has no effect with attention"]),
    ([*SPARSE, "--sparse_attention.schedule_interval", "2"], {}, ["schedule_interval = 2 has no effect with"]),
    ([*SPARSE, "--sparse_attention.schedule_rate", "0.95"], {}, ["schedule_rate = 0.95 is more than sparsity = 0.9"]),
    (["--optimizer.betas", "0.9"], {}, ["has 1 items but must be a list of 2"]),
    (["--optimizer.betas", "[0.9"], {}, ["must be a list of 2"]),
    (["--optimizer.betas", "[0.9, 1]\nx = 1"], {}, ["must be a list of 2"]),
    (["--optimizer.betas", "0.9,x"], {}, ['command line: optimizer.betas[1] = "x" must be a number']),
    (["--optimizer.betas", "0.9,1"], {}, ["betas = (0.9, 1.0) is out of range; choose at least 0 and below 1"]),
    (["--method_config.guidance=-inf"], {}, ['method_config.guidance = "-inf" must be a finite number']),
    ([], {"ratio = 3": "schedule = [1000, inf]"}, ["x.toml: method_config.schedule[1] = inf must be a finite number"]),
    ([], {"ratio = 3": "weights = { a = nan }"}, ["x.toml: method_config.weights.a = nan must be a finite number"]),
    (["--training.max_grad_norm=-inf"], {}, ["training.max_grad_norm = -inf is out of range; choose above 0"]),
    (["--optimizer.lr", "2"], {}, ["optimizer.lr = 2.0 is out of range; choose above 0 and at most 1"]),
    (["--data.num_workers", "5000"], {}, ["data.num_workers = 5000 is out of range; choose at least 0 and"]),
    (["--comm.init_timeout_seconds", "9999999999"], {}, ["init_timeout_seconds = 9999999999 is out of range"]),
    (["--validation.num_prompts", "9999999999"], {}, ["num_prompts = 9999999999 is out of range"]),
    (["--optimizer.lr", "inf"], {}, ['optimizer.lr = "inf" must be a finite number']),
    ([], {"lr = 1e-4": "lr = -1e-4"}, ["roles.student.optimizer.lr = -0.0001 is out of range; choose above 0"]),
    ([], {'name = "probe"': ""}, ["x.toml: job.name is required but missing; set it to a string"]),
    ([], {'name = "probe"': 'name = "a/b"'}, ["job.name = 'a/b'"]),
    ([], {'method = "config_probe"': ""}, ["x.toml: recipe.method is required but missing"]),
    ([], {"[data]": "", 'path = "data.parquet"': ""}, ["x.toml: data.path is required but missing"]),
    ([], {"trainable = true": ""}, ["x.toml: roles.student.trainable is required but missing"]),
    ([], {'method = "config_probe"': 'method = "config_prob"'}, ["recipe.method = 'config_prob'", "did you mean"]),
    ([], {'family = "config_probe"': 'family = "wam"'}, ["x.toml: recipe.family = 'wam'"]),
    ([], {"ratio = 3": "ratio = 0"}, ["x.toml: method_config.ratio = 0 must be at least 1"]),
    (["--pipeline_config.flow_shift", "0"], {}, ["x.toml: pipeline_config.flow_shift = 0.0 must be positive"]),
    (["--job.imports", "no_such_module"], {}, ["job.imports names 'no_such_module'"]),
    (["--job.imports", "..os"], {}, ["job.imports has '..os', which is no module name"]),
    ([], {'name = "probe"': 'name = "probe"\nconfig_file = "y.toml"'}, ["can only be given on the command line"]),
    ([], {"trainable = false": "trainable = true"}, ["roles.teacher.trainable = true"]),
    ([], {"roles.teacher": "roles.tutor"}, ["needs [roles.teacher]"]),
    ([], {"roles.teacher": 'roles."a/b"'}, ["[roles.'a/b']", "letters, digits"]),
    ([], {'flavor = "tiny"': ""}, ["x.toml: roles.student.path and flavor are both empty"]),
    ([], {'path = "weights/teacher"': 'path = "a"\ninit_from = "b"'}, ["init_from = 'b' contradicts path = 'a'"]),
    ([], {'path = "weights/teacher"': 'path = "a"\nflavor = "14B"'}, ["roles.teacher.flavor = '14B' contradicts path"]),
    (["--roles.teacher.optimizer.lr", "1"], {}, ["roles.teacher.trainable = false", "without effect"]),
    (["--training.local_batch_size", "3"], {}, ["global_batch_size = 8", "local_batch_size = 3; choose 6 or 9"]),
    (["--parallelism.sequence", "0"], {}, ["parallelism.sequence = 0 is out of range"]),
    (["--parallelism.tensor", "2", "--parallelism.async_tensor"], {}, ["async_tensor = true", "compile.enabled"]),
    (["--parallelism.token_region"], {}, ["token_region = true has no effect with tensor = 1"]),
    (["--training.reduce_gradients", "x"], {}, ['training.reduce_gradients = "x" must be one of "last", "every"']),
    (
        ["--parallelism.exchange_groups", "in_turn"], {},
        ["parallelism.exchange_groups = 'in_turn' has no effect", "sequence × tensor = 1", "set it to 'all'"],
    ),
    (
        ["--roles.teacher.parallelism.tensor", "2", "--roles.student.parallelism.exchange_groups", "in_turn"], {},
        ["roles.student.parallelism.exchange_groups = 'in_turn' has no effect", "this role", "set it to 'all'"],
    ),
    (["--roles.student.parallelism.tensor", "0"], {}, ["roles.student.parallelism.tensor = 0 is out of range"]),
    (["--roles.student.parallelism.tensors", "2"], {}, ["did you mean roles.student.parallelism.tensor?"]),
    (["--roles.student.parallelism.async_tensor"], {}, ["command line: ", "async_tensor is not known; the keys of"]),
    (["--roles.student.optimizer.name", "adamw"], {}, ["roles.student.optimizer.name", "are lr, betas, eps"]),
    (["--roles.student.parallelism.tensor", "x"], {}, ['roles.student.parallelism.tensor = "x" must be an integer']),
    (["--roles.student.parallelism.token_region"], {}, ["roles.student.parallelism.token_region = true has no effect"]),
    ([], {"lr = 1\n": "lr = -1\n"}, ["x.toml: optimizer.lr = -1.0 is out of range"]),
    (["--parallelism.dp_shard", "0"], {}, ["parallelism.dp_shard = 0 is out of range"]),
    (["--lr_scheduler.min_lr_ratio", "0.1"], {}, ["lr_scheduler.min_lr_ratio = 0.1 has no effect"]),
    (["--ema.decay", "0.9", "--ema.role", "teacher"], {}, ["'teacher' is not a trained role; choose one of student"]),
    (["--ema.decay", "1"], {}, ["ema.decay = 1.0 is out of range"]),
    (["--profiling.enabled"], {}, ["= 13 is beyond training.steps = 10"]),
    (["--validation.num_videos", "1025"], {}, ["validation.num_videos = 1025 is out of range"]),
    (["--job.name", "\udcff"], {}, ["not valid UTF-8"]),
    (["--größe"], {}, ['command line: --"größe" is not known; the sections are job, ']),
    (["--pipeline_config_path", "a\n\x1bb"], {}, [r"a\n\x1bb (seen from /", "): the file cannot be read"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "replace", "wanted"), ERRORS)
def test_errors(load: Callable[..., Config], overrides: list[str], replace: dict[str, str], wanted: list[str]) -> None:
    message = sentence(load, *overrides, replace=replace)
    for part in wanted:
        assert part in message


def test_a_long_value_hides_neither_place_nor_remedy(load: Callable[..., Config]) -> None:
    message = sentence(load, "--job.name", "/" + "y" * 5000)
    assert len(message) < 1100
    assert message.startswith("command line: job.name = '/yyy") and message.endswith("use a plain name")


def test_unreadable_files(load: Callable[..., Config], tmp_path: Path) -> None:
    assert "is not valid TOML" in sentence(load, append="[x\n") and "line 31" in sentence(load, append="[x\n")
    assert "is not valid TOML" in sentence(load, append="[job]\n")  # declared twice
    assert "is not valid TOML" in sentence(load, append="a = " + "[" * 100_000)
    assert "[training.a] is not known" in sentence(load, "--" + ".".join(["training", *"a" * 5000]), "1")
    for argv in (["--job.config_file", str(tmp_path / "none.toml")], ["--job.config_file", str(tmp_path)]):
        with pytest.raises(ConfigError, match=f"^{re.escape(argv[1])}: the file cannot be read: "):
            load_config(argv)
    with pytest.raises(ConfigError, match=r"--job\.config_file needs a value"):
        load_config(["--job.config_file"])
    with pytest.raises(ConfigError, match=r"^command line: job\.name is required"):
        load_config([])


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    """As editors on Windows write one."""
    for name, encoding in (("plain.toml", "utf-8"), ("marked.toml", "utf-8-sig")):
        (tmp_path / name).write_text(VALID.replace("probe", "größe", 1), encoding=encoding)
    plain, marked = (load_config(["--job.config_file", str(tmp_path / f"{name}.toml")]) for name in ("plain", "marked"))
    assert marked == plain and marked.job.name == "größe"
    (tmp_path / "pipeline.toml").write_text("flow_shift = 2.0\n", encoding="utf-8-sig")
    argv = ["--job.config_file", str(tmp_path / "marked.toml")]
    assert (
        load_config([*argv, "--pipeline_config_path", str(tmp_path / "pipeline.toml")]).pipeline_config.flow_shift == 2
    )


def test_a_missing_import_inside_a_module_is_not_hidden(
    load: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config_probe_broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load("--job.imports", "config_probe_broken")


def test_pipeline_config_from_a_file(load: Callable[..., Config], tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text('flow_shift = 5\nnegative_prompt = "blurry"\n')
    chosen = ["--pipeline_config_path", str(file)]
    config = load(*chosen, "--pipeline_config.flow_shift", "7")
    assert config.pipeline_config == ProbePipelineConfig(flow_shift=7.0, negative_prompt="blurry")
    assert "contradicts [pipeline_config]" in sentence(load, *chosen, append="[pipeline_config]\n")
    file.write_text("flow_shft = 5\n")
    message = sentence(load, *chosen)
    assert message.startswith(f"{file}: pipeline_config.flow_shft = 5") and "pipeline_config.flow_shift?" in message
    file.unlink()
    assert sentence(load, *chosen).startswith(f"{file}: the file cannot be read")


def test_resolved_file_reads_back(load: Callable[..., Config], tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text("flow_shift = 5\n")
    odd = 'quote " backslash \\ newline \n delete \x7f snowman ☃ tab \t'
    config = load(
        *("--pipeline_config_path", str(file), "--pipeline_config.negative_prompt", odd, "--optimizer.lr", "1e-30"),
        *("--training.max_grad_norm", "inf", "--method_config.guidance", "none", "--job.imports", "json"),
        append='[method_config.weights]\n"a.b \\n" = 1\n',
    )
    resolved = tmp_path / "config.toml"
    resolved.write_text(to_toml(config), encoding="utf-8")
    again = load_config(["--job.config_file", str(resolved)])
    assert again == config
    assert again.method_config.weights == {"a.b \n": 1.0} and again.pipeline_config.negative_prompt == odd
    assert to_toml(again) == to_toml(config)


def test_sparse_attention_reads_back(load: Callable[..., Config], tmp_path: Path) -> None:
    values = {"sparsity": 0.8, "schedule_rate": 0.05, "schedule_interval": 3, "crossover": 0.25, "tiles_per_list": 2}
    values["tile"] = (3, 5, 4)
    given = [text for key, value in values.items() for text in (f"--sparse_attention.{key}", str(value).strip("()"))]
    config = load(*SPARSE, *given)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(to_toml(config))
    again = load_config(["--job.config_file", str(resolved)])
    assert again.sparse_attention == SparseAttentionConfig(**values) == config.sparse_attention
    assert again.roles["student"].attention == "sparse"


def test_secrets_are_redacted_everywhere(load: Callable[..., Config]) -> None:
    config = load("--method_config.api_key", "hunter2", "--method_config.tokenizers", "byt5")
    assert config.method_config.api_key == "hunter2"
    assert "hunter2" not in to_toml(config) and "hunter2" not in str(to_dict(config))
    assert to_dict(config)["method_config"]["api_key"] == "<redacted>"
    assert to_dict(config)["method_config"]["tokenizers"] == ["byt5"]
    for key in ("metrics.wandb_api_key", "data.hf_token", "job.password"):
        message = sentence(load, f"--{key}", "hunter2")
        assert "hunter2" not in message and "is not known" in message


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 1, (Degrees(), 4)),
        ([], 4, (Degrees(dp_shard=4), 1)),
        (["--parallelism.dp_replicate", "2"], 4, (Degrees(2, 2), 1)),
        (["--parallelism.dp_shard", "2"], 2, (Degrees(dp_shard=2), 2)),
        (["--parallelism.tensor", "2"], 4, (Degrees(dp_shard=2, tensor=2), 2)),
        (["--parallelism.sequence", "2", "--parallelism.tensor", "2"], 4, (Degrees(sequence=2, tensor=2), 4)),
        (["--parallelism.tensor", "3"], 4, "parallelism.tensor = 3 does not divide the number of ranks, 4; set it to"),
        (
            ["--parallelism.tensor", "4", "--parallelism.sequence", "3"],
            8,
            "sequence 3 × tensor 4 = 12 does not divide the number of ranks, 8",
        ),
        (
            ["--parallelism.sequence", "4", "--roles.teacher.parallelism.tensor", "2"],
            8,
            "roles.teacher.parallelism: sequence × tensor = 2 ranks is not a multiple of the 4 ranks that share",
        ),
        (["--parallelism.dp_replicate", "3"], 8, "3 does not divide the number of ranks, 8; set it to 2 or 4"),
        (["--parallelism.dp_shard", "3"], 4, "run has 4; set dp_shard to 4 or -1, or start 3 ranks"),
        ([], 8, "= 2 × 8 = 16; set it to 16"),
        ([], 3, "= 2 × 3 = 6; set it to 6 or 12"),
    ],
)
def test_resolve_layout(
    load: Callable[..., Config], overrides: list[str], world_size: int, expected: tuple[Degrees, int] | str
) -> None:
    config = load(*overrides)
    if isinstance(expected, tuple):
        resolved = resolve_layout(config, world_size)
        assert (resolved.default, resolved.num_micro_batches) == expected
        assert resolved.default.world_size == world_size
    else:
        with pytest.raises(ValueError, match=re.escape(expected)):
            resolve_layout(config, world_size)


def test_a_role_has_a_layout_of_its_own(load: Callable[..., Config]) -> None:
    config = load("--parallelism.dp_shard", "4", "--roles.teacher.parallelism.tensor", "4")
    assert resolve_layout(config, 4).roles == {"teacher": Degrees(tensor=4), "student": Degrees(dp_shard=4)}


def test_check_paths_names_the_first_missing_one(
    load: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def missing(*overrides: str) -> str:
        with pytest.raises(ValueError) as caught:
            check_paths(load(*overrides))
        return str(caught.value)

    assert "roles.teacher.path = 'weights/teacher' is no existing folder" in missing()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/teacher").write_text("a file")
    assert "roles.teacher.path" in missing()
    (tmp_path / "weights/teacher").unlink()
    (tmp_path / "weights/teacher").mkdir()
    assert "data.path = 'data.parquet'" in missing()
    (tmp_path / "data.parquet").touch()
    check_paths(load("--checkpoint.resume_from", "latest"))
    assert "roles.student.init_from = 'absent'" in missing("--roles.student.init_from", "absent")
    assert "validation.prompts = 'absent'" in missing("--validation.prompts", "absent")
    check_paths(load("--validation.prompts", "absent", "--validation.enabled=false"))
    assert "checkpoint.resume_from = 'absent'" in missing("--checkpoint.resume_from", "absent")


def test_every_key_is_documented_and_in_the_help(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(VALID)
    text = help_text(["--job.config_file", str(tmp_path / "x.toml")])
    sections = {**field_types(Config), "roles.<name>": RoleConfig}
    sections |= {"method_config": ProbeMethodConfig, "pipeline_config": ProbePipelineConfig}
    for section, kind in sections.items():
        for name, meaning in (field_docs(kind) if dataclasses.is_dataclass(kind) else {}).items():
            assert meaning and f"{section}.{name}" in text and meaning.splitlines()[0] in text
        if dataclasses.is_dataclass(kind):
            assert set(field_docs(kind)) == set(field_types(kind))
    assert '--roles.<name>.dtype: one of "auto", "float32", "bfloat16" (default "auto"; resume: refused)' in text
    assert "--training.steps: an integer (required; resume: logged)" in text
    assert "[roles.<name>.optimizer] Keys of [optimizer]" in text and "--roles.<name>.optimizer.lr" not in text
    assert "--method_config.ratio" not in help_text([]) and "--training.steps" in help_text([])
    (tmp_path / "x.toml").write_text(VALID.replace("config_probe", "nothing"))
    with pytest.raises(ConfigError, match=r"recipe\.method = 'nothing'"):
        help_text(["--job.config_file", str(tmp_path / "x.toml")])


def test_loading_does_not_need_a_process_group_or_a_gpu() -> None:
    code = "import sys, titan_distill.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


VALUES = ["0", "-1", "1.5", "true", '"x"', '""', '"none"', "[]", "[1, 2]", "{}", "{a = 1}", "nan", "inf", "1979-05-27"]
VALUES += ["0x" + "f" * 9000, '"' + "y" * 500 + '"', "[[[[]]]]", "'''\n'''", "07:32:00", "9223372036854775808"]
LINES = VALID.splitlines()
FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)


@st.composite
def changed_line(draw: st.DrawFn, line: str) -> str:
    """The line with another value, key or neighbour's key, with stray characters, doubled, or gone."""
    key, _, value = line.partition(" = ")
    value, word = value or "1", draw(WORDS)
    other = draw(st.sampled_from(LINES)).partition(" = ")[0]
    choices = [f"{key} = {draw(st.sampled_from(VALUES))}", f"{key[:3]}{word} = {value}", f"{other} = {value}"]
    return draw(st.sampled_from([*choices, f"{key}{word}{value}", f"{line}\n{line}", ""]))


@st.composite
def mutated_file(draw: st.DrawFn) -> str:
    """VALID with up to three lines changed. The family's stays, because the default one takes seconds to import."""
    lines = list(LINES)
    indices = [index for index, line in enumerate(lines) if not line.startswith("family")]
    for index in draw(st.lists(st.sampled_from(indices), min_size=1, max_size=3)):
        lines[index] = draw(changed_line(lines[index]))
    return "\n".join(lines)


@FUZZ
@given(text=mutated_file())
def test_no_file_does_anything_but_load_or_say_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text, encoding="utf-8")
    try:
        config = load_config(["--job.config_file", str(file)])
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        file.write_text(to_toml(config), encoding="utf-8")
        assert load_config(["--job.config_file", str(file)]) == config


KEYS = ["training.steps", "roles.student.path", "roles", "roles.a.b.c", "optimizer.betas", "job.imports", "x"]
ARGUMENTS = st.lists(st.one_of(st.sampled_from(KEYS).map("--{}".format), st.text(max_size=8)), max_size=6)


@FUZZ
@given(arguments=ARGUMENTS)
def test_no_command_line_does_anything_but_load_or_say_one_sentence(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "x.toml").write_text(VALID)
    try:
        load_config(["--job.config_file", str(tmp_path / "x.toml"), *arguments])
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
