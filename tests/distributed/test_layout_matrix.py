"""The first idea of this project: the same TOML gives the same curve on any layout.

Every row trains six steps from the same weights and is compared with one process: losses, gradient norms and, at the
end, every parameter. Rows with as many ranks share a launch. `docs/parity.md` lists the differences; with
`--write-parity` this file writes it, without it compares it.

A row whose option did nothing would be equal to one process, too. So every row is also watched: forwards that were
recomputed, graphs that were compiled, parameters that were gathered or offloaded; and rounding must show.

Rows with a sparse student have a reference of their own. Its gates are open from the start, or the coarse branch would
count for nothing, and its sparsity changes at every step until the fourth: 0, by dense attention, 1/4, 1/2, 3/4.

Methods differ in what they ask of a layout (weights averaged in the midst of a step, a derivative in forward mode), so
each runs on shared weights and on shared tokens; the rest is asked of two of them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_data import BUCKETS, write_buckets
from layout_mutants import MUTANTS
from mutants import is_caught
from runs import HELPERS, REPOSITORY, TINY_WAN, largest, read_metrics, record_pairs, run_worker, tiny_argv
from safetensors.torch import load_file
from titan_kernels.layout import DEFAULT_TILE

from titan_distill.models.wan.state_dict import WEIGHTS_NAME, read_config, save_folder

STEPS = 6
GLOBAL_BATCH = 4
EXACT = 1e-5
# bf16 keeps 8 bits: a product is off by up to 2^-9 = 0.2 %, and errors of a forward's some hundred products partly add
# up. Six steps of training with them move the curve by percents, not by more.
ROUNDED = 5e-2
# float8 (e4m3) keeps 4 bits: 3 % a product, scaled a tensor at a time.
COARSE = 2e-1
# Rows in few bits differ by percents; exact ones by a millionth.
SEEN_ROUNDING = 1e-3


def num_steps(method: str) -> int:
    """Enough for every update to follow every other."""
    return STEPS if method in ("dmd2", "finetune", "buckets") else 3


@dataclass(frozen=True)
class Row:
    name: str
    ranks: int
    overrides: str
    tolerance: float = EXACT
    local_batch: int = 4
    least: float = 0
    """The smallest difference that shows its option to be on."""
    forwards: float = 1
    """Forwards of a sample's or micro-batch's blocks, recomputed ones included, for one forward of one process."""
    methods: tuple[str, ...] = ("dmd2", "finetune")
    nightly: tuple[str, ...] = ()
    """Methods that are left to the nightly tier: by the rows around it, this one says little with them."""
    mutant: str | None = None
    sparse: bool = False
    tile: tuple[int, int, int] = DEFAULT_TILE

    @property
    def reference(self) -> Row:
        if self.tile != DEFAULT_TILE:
            return SHORT_REFERENCE
        return SPARSE_REFERENCE if self.sparse else REFERENCE

    def arguments(self, method: str, output: Path) -> list[str]:
        weights, tile = output.parent / SPARSE_WEIGHTS[self.tile], ("--sparse_attention.tile", str(list(self.tile)))
        sparse = ("--roles.student.path", str(weights), *SPARSE, *tile) if self.sparse else ()
        return tiny_argv(
            JOBS.get(method, method), output,
            "--training.steps", str(num_steps(method)), "--checkpoint.enabled", "false",
            "--training.global_batch_size", str(GLOBAL_BATCH), "--training.local_batch_size", str(self.local_batch),
            *self.overrides.split(), *sparse, *OPTIONS.get(method, "").format(folder=output.parent).split(),
        )  # fmt: skip


JOBS = {"buckets": "finetune"}
"""Job of a method that has no file of its own."""
P = "--parallelism."
TEACHER, STUDENT, CRITIC = (f"--roles.{role}.parallelism." for role in ("teacher", "student", "critic"))
EVERY, IN_TURN = "--training.reduce_gradients every", "exchange_groups in_turn"
DMD2, FINETUNE = ("dmd2",), ("finetune",)
# The last one is dmd2 with two experts in a role; here the student also has low-rank adapters.
METHODS = ("dmd2", "finetune", "kd", "cm", "scm", "rcm", "dmd2_gan", "self_forcing", "a14b")
SELF_FORCING, ODE_INIT, BUCKETED = ("self_forcing",), ("ode_init",), ("buckets",)
# Schedules of real length would not get anywhere in these steps.
OPTIONS = {
    "kd": "--data.path {folder}/pairs --method_config.teacher_steps 4",
    "cm": "--ema.start_step 1",
    "scm": "--method_config.tangent_warmup 2 --method_config.derivative_step 0",
    "rcm": "--method_config.tangent_warmup 1 --method_config.update_ratio 2",
    "dmd2_gan": "--method_config.adversarial_weight 1 --method_config.f_divergence jensen_shannon",
    "self_forcing": "--roles.student.init_from tests/assets/tiny_wan/transformer --method_config.context_noise 50 "
    "--method_config.same_step_across_blocks false --method_config.denoising_steps [1000.0,500.0] "
    "--pipeline_config.num_frames 9",
    "ode_init": "--data.path {folder}/pairs --method_config.teacher_steps 4",
    "buckets": f"--data.path {{folder}}/buckets {BUCKETS}",
    # A micro-batch of one sample leaves an expert without any; so may the last one of all ranks.
    "a14b": "--pipeline_config.num_frames 9 --pipeline_config.width 32 --ema.start_step 1 "
    "--training.local_batch_size 1 --roles.student.lora.rank 4 --roles.student.lora.alpha 8",
}
REFERENCE = Row("one process", 1, "", methods=METHODS + ODE_INIT, nightly=BUCKETED)
SPARSE = (
    "--roles.student.attention", "sparse", "--sparse_attention.sparsity", "0.75",
    "--sparse_attention.schedule_rate", "0.25", "--sparse_attention.crossover", "0.2",
)  # fmt: skip
SHORT_TILE = (3, 5, 4)
SPARSE_WEIGHTS = {DEFAULT_TILE: "sparse_wan", SHORT_TILE: "sparse_wan_3x5x4"}
SPARSE_REFERENCE = Row("one process, sparse", 1, "", sparse=True)
SHORT_REFERENCE = Row("one process, 3 × 5 × 4", 1, "", methods=(), nightly=FINETUNE, sparse=True, tile=SHORT_TILE)
CHECKPOINT = "--activation_checkpoint.mode "
DENSE_ROWS = (
    Row("accumulation 4", 1, "", local_batch=1, forwards=4, methods=DMD2, nightly=FINETUNE),
    Row("full checkpointing", 1, f"{CHECKPOINT}full", forwards=2, methods=DMD2, nightly=FINETUNE + SELF_FORCING),
    Row("selective checkpointing", 1, f"{CHECKPOINT}selective", forwards=2, methods=FINETUNE, nightly=DMD2),
    Row(
        "block skip", 1, f"{CHECKPOINT}full --activation_checkpoint.skip_interval 2", forwards=1.5,
        methods=FINETUNE, nightly=DMD2,
    ),
    Row("compile", 1, "--compile.enabled", methods=FINETUNE, nightly=DMD2),
    Row(
        "float8, emulated", 1, "--float8.enabled --float8.emulate --float8.min_features 16", COARSE,
        least=SEEN_ROUNDING, methods=FINETUNE, nightly=DMD2,
    ),
    Row("fsdp 2", 2, "", local_batch=2, methods=METHODS, nightly=ODE_INIT + BUCKETED),
    Row(
        "bf16, fsdp 2", 2, "--training.dtype bfloat16", ROUNDED, local_batch=2, least=SEEN_ROUNDING,
        methods=DMD2, nightly=FINETUNE,
    ),
    Row("cpu offload, fsdp 2", 2, f"{P}cpu_offload", local_batch=2, methods=FINETUNE, nightly=DMD2),
    Row("no resharding, fsdp 2", 2, f"{P}reshard_after_forward false", local_batch=2, methods=DMD2, nightly=FINETUNE),
    Row("tensor 2", 2, f"{P}tensor 2", nightly=BUCKETED),
    Row(
        "tensor 2, token region", 2, f"{P}tensor 2 {P}token_region",
        methods=FINETUNE, nightly=(*DMD2, *SELF_FORCING, "dmd2_gan"),
    ),
    Row("sequence 2", 2, f"{P}sequence 2", methods=METHODS, nightly=ODE_INIT + BUCKETED),
    Row("teacher tensor 2, students fsdp 2", 2, f"{TEACHER}tensor 2", local_batch=2, methods=DMD2),
    Row("teacher sequence 2, students fsdp 2", 2, f"{TEACHER}sequence 2", local_batch=2, methods=DMD2),
    Row(
        "student tensor 2, data fsdp 2", 2, f"{STUDENT}tensor 2", local_batch=2,
        methods=DMD2, nightly=FINETUNE + SELF_FORCING,
    ),
    Row("fsdp 2, accumulation 2", 2, "", local_batch=1, forwards=2, methods=FINETUNE, nightly=DMD2),
    Row(
        "fsdp 2, accumulation 2, every", 2, EVERY, local_batch=1, forwards=2,
        methods=DMD2, nightly=(*FINETUNE, *SELF_FORCING, "rcm", "dmd2_gan", "a14b"),
    ),
    Row(
        "bf16, fsdp 2, accumulation 2, every", 2, f"--training.dtype bfloat16 {EVERY}", ROUNDED, local_batch=1,
        forwards=2, least=SEEN_ROUNDING, methods=(), nightly=FINETUNE + DMD2,
    ),
    Row(
        "cpu offload, fsdp 2, accumulation 2, every", 2, f"{P}cpu_offload {EVERY}", local_batch=1, forwards=2,
        methods=(), nightly=FINETUNE + DMD2,
    ),
    Row(
        "tensor 2, accumulation 4, every", 2, f"{P}tensor 2 {EVERY}", local_batch=1, forwards=4,
        methods=(), nightly=FINETUNE + DMD2,
    ),
    Row(
        "teacher tensor 2 in turn, students fsdp 2", 2, f"{TEACHER}tensor 2 {TEACHER}{IN_TURN}", local_batch=2,
        methods=DMD2, nightly=SELF_FORCING,
    ),
    Row(
        "teacher sequence 2 in turn, students fsdp 2", 2, f"{TEACHER}sequence 2 {TEACHER}{IN_TURN}", local_batch=2,
        methods=(), nightly=DMD2,
    ),
    Row(
        "student tensor 2 in turn, data fsdp 2", 2, f"{STUDENT}tensor 2 {STUDENT}{IN_TURN}", local_batch=2, forwards=2,
        methods=FINETUNE, nightly=("scm",),
    ),
    Row(
        "student, critic tensor 2 in turn, data fsdp 2, accumulation 2, every", 2,
        f"{STUDENT}tensor 2 {CRITIC}tensor 2 {P}{IN_TURN} {EVERY}", local_batch=1, forwards=4,
        methods=(), nightly=DMD2 + SELF_FORCING,
    ),
    Row("sequence 3, all-gather", 3, f"{P}sequence 3", methods=FINETUNE, nightly=DMD2),
    Row("fsdp 4", 4, "", local_batch=1, methods=DMD2, nightly=FINETUNE),
    Row("hsdp 2 × 2", 4, f"{P}dp_replicate 2", local_batch=1, methods=DMD2, nightly=FINETUNE + BUCKETED),
    Row("tensor 2 × sequence 2", 4, f"{P}tensor 2 {P}sequence 2", methods=DMD2, nightly=FINETUNE),
    Row(
        "tensor 2 × sequence 2, token region", 4, f"{P}tensor 2 {P}sequence 2 {P}token_region",
        methods=FINETUNE, nightly=DMD2,
    ),
    Row("fsdp 2 × tensor 2", 4, f"{P}tensor 2", local_batch=2, methods=FINETUNE, nightly=DMD2),
    Row("fsdp 2 × sequence 2", 4, f"{P}sequence 2", local_batch=2, methods=DMD2, nightly=FINETUNE),
    Row(
        "hsdp 2 × sequence 2, accumulation 2", 4, f"{P}dp_replicate 2 {P}sequence 2", local_batch=1, forwards=2,
        methods=(), nightly=FINETUNE + DMD2,
    ),
    Row(
        "hsdp 2 × sequence 2, accumulation 2, every", 4, f"{P}dp_replicate 2 {P}sequence 2 {EVERY}", local_batch=1,
        forwards=2, methods=FINETUNE, nightly=DMD2,
    ),
    Row(
        "cpu offload, hsdp 2 × sequence 2, accumulation 2, every", 4,
        f"{P}cpu_offload {P}dp_replicate 2 {P}sequence 2 {EVERY}", local_batch=1, forwards=2,
        methods=(), nightly=FINETUNE,
    ),
    Row(
        "teacher tensor 2 × sequence 2 in turn, students fsdp 4", 4, f"{TEACHER}tensor 2 {TEACHER}sequence 2 "
        f"{TEACHER}{IN_TURN}", local_batch=1, methods=(), nightly=DMD2,
    ),
)  # fmt: skip
SPARSE_ROWS = (
    Row(
        "sparse, accumulation 4, full checkpointing", 1, f"{CHECKPOINT}full", local_batch=1, forwards=8,
        methods=FINETUNE, sparse=True,
    ),
    Row(
        "sparse, fsdp 2, selective checkpointing", 2, f"{CHECKPOINT}selective", local_batch=2, forwards=2,
        methods=FINETUNE, sparse=True,
    ),
    Row(
        "sparse, tensor 2, token region, full checkpointing", 2, f"{P}tensor 2 {P}token_region {CHECKPOINT}full",
        forwards=2, methods=FINETUNE, sparse=True,
    ),
    Row("sparse, sequence 2", 2, f"{P}sequence 2", methods=FINETUNE, sparse=True),
    Row("sparse student tensor 2, data fsdp 2", 2, f"{STUDENT}tensor 2", local_batch=2, methods=DMD2, sparse=True),
    Row("sparse, sequence 3, all-gather", 3, f"{P}sequence 3", methods=FINETUNE, sparse=True),
    Row("sparse, hsdp 2 × 2", 4, f"{P}dp_replicate 2", local_batch=1, methods=FINETUNE, sparse=True),
    Row("sparse, tensor 2 × sequence 2", 4, f"{P}tensor 2 {P}sequence 2", methods=FINETUNE, sparse=True),
)  # fmt: skip
ROWS = (
    *DENSE_ROWS,
    *SPARSE_ROWS,
    # Every layout with a sparse student, too. Rounding also picks other tiles where two are nearly as good: in bf16
    # single gradient norms are off by 15 % with three quarters of the tiles left out, by 2 % with none.
    *(
        replace(
            row, name=f"sparse student, {row.name}", sparse=True, methods=(),
            tolerance=EXACT if row.tolerance == EXACT else COARSE,
            nightly=FINETUNE if "finetune" in row.methods + row.nightly else DMD2,
        )
        for row in DENSE_ROWS
    ),
    *(
        replace(row, name=f"3 × 5 × 4, {row.name}", methods=(), nightly=FINETUNE, tile=SHORT_TILE)
        for row in SPARSE_ROWS
        if row.methods == FINETUNE
    ),
)  # fmt: skip
MUTATED = (
    Row("mutant: noise keyed by rank", 2, f"{P}sequence 2", methods=FINETUNE, mutant="noise_keyed_by_rank"),
    Row("mutant: sequence gradients", 2, f"{P}sequence 2", methods=FINETUNE, mutant="sequence_gradients_not_divided"),
    Row("mutant: local norm", 2, f"{P}tensor 2", methods=FINETUNE, mutant="norm_over_local_width"),
    Row("mutant: tangents", 2, f"{P}sequence 2", methods=("scm",), mutant="tangents_stay_where_they_are"),
    Row("mutant: features", 2, f"{P}sequence 2", methods=("dmd2_gan",), mutant="features_averaged_by_rank"),
    Row("mutant: equal noise", 2, "", local_batch=2, methods=FINETUNE, mutant="equal_noise_on_data_ranks"),
    Row("mutant: mean of means", 2, f"{P}sequence 2", methods=FINETUNE, mutant="mean_of_means"),
    Row(
        "mutant: replicated gradient", 2, f"{P}tensor 2 {P}token_region", methods=FINETUNE,
        mutant="replicated_gradient_not_reduced",
    ),
    Row(
        "mutant: coarse rows", 2, f"{P}sequence 2", methods=FINETUNE, mutant="coarse_rows_of_the_next_tile",
        sparse=True,
    ),
    Row(
        "mutant: gate outside", 2, f"{P}tensor 2", methods=FINETUNE, mutant="gate_outside_of_the_region", sparse=True,
    ),
)  # fmt: skip
NIGHTLY = (pytest.mark.nightly, pytest.mark.timeout(1800))  # the first case waits for all of them to be trained
CASES = [
    pytest.param(row, method, id=f"{row.name}-{method}", marks=NIGHTLY if method in row.nightly else ())
    for row in ROWS
    for method in (*row.methods, *row.nightly)
]


@dataclass(frozen=True)
class Differences:
    """Largest relative differences from one process."""

    losses: float
    gradient_norms: float
    parameters: float

    @property
    def largest(self) -> float:
        return largest((self.losses, self.gradient_norms, self.parameters))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rows write: each its run, and its weights at the end."""
    folder = tmp_path_factory.mktemp("matrix")
    for tile, name in SPARSE_WEIGHTS.items():
        _open_gates(folder / name, tile)
    record_pairs(folder / "pairs", num_pairs=GLOBAL_BATCH, num_steps=4)
    write_buckets(folder / "buckets")
    return folder


Run = Callable[[Row, str], Path]
Compare = Callable[[Row, str], Differences]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Run:
    """The run of a row with a method; the first one trains all rows of as many ranks and of its tier."""

    @functools.cache
    def launch(num_ranks: int, nightly: bool) -> None:
        rows = [
            {"name": _file_name(row, method), "arguments": row.arguments(method, folder / _file_name(row, method)),
             "mutant": row.mutant}
            for row in (REFERENCE, SPARSE_REFERENCE, SHORT_REFERENCE, *ROWS, *MUTATED) if row.ranks == num_ranks
            for method in (row.nightly if nightly else row.methods)
        ]  # fmt: skip
        _launch(f"{num_ranks}{'-nightly' * nightly}", num_ranks, rows, folder)

    def trained(row: Row, method: str) -> Path:
        launch(1, False)
        launch(row.ranks, method in row.nightly)
        return folder / _file_name(row, method)

    return trained


@pytest.fixture(scope="module")
def compare(trained: Run) -> Compare:
    """The differences between a row and one process."""
    return lambda row, method: _differences(trained(row.reference, method), trained(row, method), num_steps(method))


def _open_gates(folder: Path, tile: tuple[int, int, int]) -> None:
    """The weights of the small Wan as those of a sparse model whose coarse branch counts."""
    dense = TINY_WAN / "transformer"
    config = replace(read_config(dense), sparse_attention=True, vsa_tile=tile)
    generator = torch.Generator().manual_seed(0)
    gates = {
        f"blocks.{index}.to_gate_compress.{leaf}": 0.02 * torch.randn(shape, generator=generator)
        for index in range(config.num_layers)
        for leaf, shape in (("weight", (config.inner_dim, config.inner_dim)), ("bias", (config.inner_dim,)))
    }
    save_folder(load_file(dense / WEIGHTS_NAME) | gates, config, folder)


def _file_name(row: Row, method: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in f"{row.name}-{method}")


def _launch(name: str, num_ranks: int, rows: list[dict[str, Any]], folder: Path) -> None:
    table = folder / f"{name}.json"
    table.write_text(json.dumps(rows))
    run_worker(num_ranks, HELPERS / "matrix_worker.py", table, folder, timeout=1700)


def _differences(reference: Path, run: Path, steps: int) -> Differences:
    expected, found = read_metrics(reference), read_metrics(run)
    assert len(expected) == len(found) == steps
    found_at: dict[str, list[float]] = defaultdict(list)
    for line, other in zip(expected, found, strict=True):
        for key, value in line.items():
            kind = key.partition("/")[0]
            if kind in ("loss", "grad_norm", "dmd", "scm"):
                found_at[kind].append(abs(other[key] - value) / abs(value))
    weights, others = load_file(f"{reference}.safetensors"), load_file(f"{run}.safetensors")
    assert weights.keys() == others.keys()
    distance = sum((weights[name] - others[name]).double().square().sum() for name in weights)
    size = sum(tensor.double().square().sum() for tensor in weights.values())
    assert isinstance(distance, torch.Tensor)
    norms = largest(found_at.pop("grad_norm"))
    losses = largest(itertools.chain(*found_at.values()))
    return Differences(losses, norms, float((distance / size).sqrt()))


def check(found: Differences, bound: float, least: float = 0) -> None:
    assert least <= found.largest <= bound


@pytest.mark.parametrize(("row", "method"), CASES)
def test_layout_does_not_change_training(compare: Compare, row: Row, method: str) -> None:
    check(compare(row, method), row.tolerance, row.least)


@pytest.mark.parametrize(("row", "method"), CASES)
def test_the_option_is_on(trained: Run, row: Row, method: str) -> None:
    """By what the run did: by its numbers, an option that does nothing would pass."""
    found, reference = (json.loads(Path(f"{trained(each, method)}.json").read_text()) for each in (row, row.reference))
    if "--compile.enabled" in row.overrides:
        assert found["graphs"] > 0
    elif method != "a14b":  # which has micro-batches of one sample on any layout
        assert found["graphs"] == 0
        assert found["forwards"] == row.forwards * reference["forwards"] > 0
    assert (found["offloaded"] > 0) == ("cpu_offload" in row.overrides)
    if "reshard_after_forward false" in row.overrides:
        resharded = json.loads(Path(f"{trained(_named('fsdp 2', row.sparse), method)}.json").read_text())
        assert 0 < found["gathers"] < resharded["gathers"]
    assert (found["early_reductions"] > 0) == (EVERY in row.overrides)
    assert (found["broadcasts"] > 0) == (IN_TURN in row.overrides)


def test_the_sparse_student_follows_its_schedule_and_trains_another_curve(
    trained: Run,
) -> None:
    dense, sparse = (read_metrics(trained(row, "finetune")) for row in (REFERENCE, SPARSE_REFERENCE))
    assert [line["vsa_sparsity"] for line in sparse] == [0, 0.25, 0.5, 0.75, 0.75, 0.75]
    for line, other in zip(dense, sparse, strict=True):
        assert abs(other["loss/student"] - line["loss/student"]) > 100 * EXACT * line["loss/student"]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_another_tile_trains_another_curve(trained: Run) -> None:
    whole, short = (read_metrics(trained(row, "finetune")) for row in (SPARSE_REFERENCE, SHORT_REFERENCE))
    for line, other in zip(whole[1:], short[1:], strict=True):
        assert abs(other["loss/student"] - line["loss/student"]) > 10 * EXACT * line["loss/student"]


@pytest.mark.parametrize("row", MUTATED, ids=[row.mutant for row in MUTATED])
def test_the_matrix_catches(compare: Compare, row: Row) -> None:
    (method,) = row.methods
    found = compare(row, method)
    assert is_caught(lambda: check(found, 10 * EXACT))


def test_every_mutant_is_run() -> None:
    assert {row.mutant for row in MUTATED} == MUTANTS.keys()


PARITY = REPOSITORY / "docs" / "parity.md"
COMMAND = "pytest -m distributed tests/distributed/test_layout_matrix.py --write-parity"
STALE = f"docs/parity.md is stale; write it again: {COMMAND}"
HEADER = ("layout", "ranks", "method", "losses", "gradient norms", "parameters", "bound")
INTRODUCTION = f"""# Layout parity

A layout does not change training: in fp32 the differences are rounding. For each row the test trains the tiny Wan from
the same weights with this layout and on one process, and compares the two: {STEPS} steps of {GLOBAL_BATCH} samples per
step for dmd2 and finetune, {num_steps("kd")} steps for other methods. The one process always computes in fp32, so the
rows bf16 and float8 show the rounding of these types. The sparse rows are compared with one process whose student is
sparse, too. Nightly tests repeat them with tiles of 3 × 5 × 4 tokens, against one process with such tiles, within the
same bounds.

The columns hold the largest relative differences: of losses and of gradient norms over all roles and steps, and of all
final parameters together (L2). The last column is the largest difference that the test allows.

- A method NAME is the job `train_configs/tiny_wan_NAME.toml`.
- *fsdp N*, *tensor N*, *sequence N*: `dp_shard`, `tensor` or `sequence` is N; *hsdp 2 × 2*: `dp_replicate` and
  `dp_shard` are 2; *all-gather*: attention gathers keys and values, because 3 does not divide the number of heads.
- *students*: student and critic; *data fsdp 2*: the data and the roles without a layout of their own have fsdp 2.
- *accumulation N*: N micro-batches of one sample per rank; *full checkpointing*, *selective checkpointing*:
  `activation_checkpoint.mode`; *block skip*: full, with `skip_interval = 2`.
- *every*: `reduce_gradients = "every"`, otherwise "last"; *in turn*: `exchange_groups = "in_turn"`, otherwise "all".
- *token region*: `token_region = true`; *no resharding*: `reshard_after_forward = false`.

This command writes the page. Without `--write-parity` the test checks that the page agrees with what it measures:

```
{COMMAND}
```
"""


def line_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def listed() -> dict[str, list[float]]:
    """Numbers of the page by the first three cells of their line: losses, gradient norms, parameters, bound."""
    cells = [line[2:-2].split(" | ") for line in PARITY.read_text().splitlines() if line.startswith("| ")]
    assert tuple(cells[0]) == HEADER, STALE
    return {line_of(row[:3]): [float(cell) for cell in row[3:]] for row in cells[1:]}


ROWS_OF_THE_PAGE = {
    line_of((row.name, str(row.ranks), method)): (row, method) for row in ROWS for method in row.methods
}


def test_the_page_has_all_rows_within_their_bounds() -> None:
    assert PARITY.read_text().startswith(INTRODUCTION), STALE
    rows = listed()
    assert {start: row.tolerance for start, (row, _) in ROWS_OF_THE_PAGE.items()} == {
        start: bound for start, (*_, bound) in rows.items()
    }, STALE
    assert not [start for start, (*values, bound) in rows.items() if not largest(values) <= bound]


def test_the_page_has_what_is_measured(compare: Compare, request: pytest.FixtureRequest) -> None:
    """Within a factor of 30: machines round differently, but not by orders of magnitude."""
    measured = {start: compare(*case) for start, case in ROWS_OF_THE_PAGE.items()}
    if request.config.getoption("write_parity"):
        lines = [INTRODUCTION, line_of(HEADER), "|---" * len(HEADER) + "|"]
        for start, found in measured.items():
            # One digit, so that the page changes when a difference does and not with every run.
            values = (found.losses, found.gradient_norms, found.parameters, ROWS_OF_THE_PAGE[start][0].tolerance)
            lines.append(start + line_of("0" if value == 0 else f"{value:.0e}" for value in values)[1:])
        PARITY.write_text("\n".join(lines) + "\n")
    rows = listed()
    assert rows.keys() == measured.keys(), STALE
    for start, found in measured.items():
        values = (found.losses, found.gradient_norms, found.parameters)
        assert all(value <= max(30 * old, EXACT / 10) for value, old in zip(values, rows[start])), (STALE, start, found)


def _named(name: str, sparse: bool) -> Row:
    """The dense row of this name, or its like with a sparse student."""
    return next(row for row in ROWS if row.name == f"{'sparse student, ' * sparse}{name}")
