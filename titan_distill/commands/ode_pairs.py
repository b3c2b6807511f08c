"""`titan-distill data ode-pairs` records a frozen teacher's sampling trajectories, for a student to learn.

Each pair starts from noise of its own and follows the teacher's guided ODE. A row stores the states at a few levels,
the end, the caption and its embedding. Its id is the key of the initial noise (`initial_noise` draws it again, on the
CPU and so the same everywhere), which is also stored as a state where level 1 is asked for.

One batch makes one parquet file. Data groups of ranks take files in turn, a file appears whole or not at all, and a job
that was stopped goes on with the ids that no file has. A file depends on the ids in it and on nothing else, so any
number of ranks writes the same ones. The teacher is laid out as the job's configuration says, which makes each of its
forwards a collective: all data groups run equally many, and the last ones may repeat a batch that they do not write.

Beside the files, `ode_pairs.json` stores their identity (`pair_identity.py`): pairs of another identity are refused in
the same folder.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from tqdm import tqdm

from titan_distill.commands.pair_identity import check_identity, digest_of_prompts, identity, publish_identity
from titan_distill.config.config import Config
from titan_distill.config.degrees import needs_group, role_degrees
from titan_distill.config.dtypes import DTYPES
from titan_distill.config.loading import load_config
from titan_distill.config.paths import of_key
from titan_distill.config.role_sections import RoleConfig
from titan_distill.data.loader import collate
from titan_distill.data.manifest import DataManifest, read_manifest, write_manifest
from titan_distill.data.parquet import LatentRow, ParquetDataset, RowCheck, read_ids, write_rows
from titan_distill.data.prompts import read_prompts
from titan_distill.data.row_groups import parquet_files
from titan_distill.data.tables import is_table
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import TrajectoryRequest, check_options
from titan_distill.diffusion.schedule import few_step_sigmas, timestep
from titan_distill.diffusion.trajectory import grid_indices, sample_trajectory
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.fault_tolerance.run_lock import RunLock
from titan_distill.methods.base import method_class
from titan_distill.models.base import Adapter, Guidance, ModelFamily, model_family
from titan_distill.parallelisms.mesh import Layouts, World, is_main_process, num_ranks, start_world
from titan_distill.resolve import spell_out_references
from titan_distill.roles import RoleHandle, RoleManager

_ROW_DIMS = 4  # of a dataset's latents


@dataclass(frozen=True)
class OdePairsOptions:
    """Options of `titan-distill data ode-pairs`. Start it with torchrun to share the pairs among ranks."""

    config: tyro.conf.Positional[Path]
    """TOML of a job with the role `teacher`: its weights, layout, numbers and pipeline are used."""
    prompts: Path
    """Prompts: parquet with text embeddings, or .txt (one per line) or a table (.csv, .tsv, .jsonl, .json), which are
    encoded."""
    out: Path
    """Folder of the parquet files; files that are there stay, and missing ones are added."""
    teacher: Path | None = None
    """Diffusers folder of the teacher, instead of the job's or where the job has none."""
    num_pairs: int | None = None
    """Pairs to make. Default: one per prompt. With more pairs than prompts, prompts are repeated from other noise."""
    times: tuple[float, ...] = ()
    """Timesteps of the stored states, final (not warped), each on the solver's grid. Default: those of the job's
    method."""
    num_steps: int | None = None
    """Steps of the solver. Default: those of the job's method."""
    solver: Literal["euler", "unipc"] | None = None
    """ODE solver. Default: that of the job's method."""
    guidance_scale: float | None = None
    """Classifier-free guidance, standard form u + w (c - u). Default: that of the job's method."""
    batch_size: int = 8
    """Pairs per batch of a rank, and rows per file."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Data type of the stored latents; sampling runs in float32 around the teacher's own numbers."""
    seed: int = 0
    """Seed of the initial noise."""


def ode_pairs(options: OdePairsOptions) -> str:
    """Make the pairs that are missing in `options.out`. Returns a sentence about the folder.

    Raises:
        ValueError: a timestep that is not on the solver's grid (before anything is built or computed), a job that says
            too little, a folder with other pairs, prompts or weights that can't be read.
    """
    check_options(options.num_steps, options.guidance_scale, options.seed)
    config = with_teacher(load_config(["--job.config_file", str(options.config)]), options.teacher)
    shift = config.pipeline_config.flow_shift
    request = trajectory_request(config, options)
    # Before any weight is read: raises for a level that the solver does not visit.
    indices = grid_indices(request.sigmas, num_steps=request.num_steps, shift=shift, solver=request.solver)
    if options.batch_size < 1 or (options.num_pairs is not None and options.num_pairs < 1):
        raise ValueError(f"--batch-size {options.batch_size} and --num-pairs {options.num_pairs} must be at least 1")
    is_list = options.prompts.suffix.lower() == ".txt" or is_table(options.prompts)
    with of_key("--prompts", options.prompts):
        prompts = read_prompts(options.prompts, None) if is_list else ParquetDataset(options.prompts)
    num_pairs = options.num_pairs or len(prompts)
    config = spell_out_references(config, ["teacher"])
    role, family = config.roles["teacher"], model_family(config.recipe.family)(config)
    own = {"seed": options.seed, "dtype": options.dtype}
    settings = identity(config, family, request, options.prompts, digest_of_prompts(prompts), **own)
    batches = missing_batches(options.out, settings, num_pairs, options)
    num_missing = sum(map(len, batches))
    if not num_missing:
        return f"{options.out}: all {num_pairs} pairs are there"

    degrees = role_degrees(config, "teacher", num_ranks())
    family.check_layouts({"teacher": degrees})
    if isinstance(prompts, ParquetDataset):
        _check_first_prompt(options.prompts, prompts, family.row_checks())
    if is_main_process():
        probe_folder(options.out, "--out")
    with _world(config) as world, RunLock(options.out) if world.is_main else nullcontext():
        layouts = Layouts(world, degrees, {"teacher": degrees})
        if world.is_main:
            publish_identity(options.out, settings)
            write_manifest(options.out, _manifest(family, None if is_list else options.prompts))
        modules = family.build_modules("teacher", role, layouts.role("teacher"), world.device)
        handle = RoleHandle("teacher", modules, trainable=False)
        adapter = family.build_adapter(world.device, layouts)
        adapter.start_step(RoleManager([handle]), config.training.steps)  # sparse attention at its schedule's end
        maker = PairMaker(config, options, request, indices, adapter, handle, prompts)
        is_writer = world.rank % layouts.data_group == 0
        _run(batches, layouts, lambda batch, is_ours: maker.make(batch, write=is_ours and is_writer))
    return f"{options.out}: {num_pairs} pairs, {num_missing} of them made now"


def _manifest(family: ModelFamily, embedded: Path | None) -> DataManifest:
    """Returns the manifest of the pairs. `embedded` is the data with the text embeddings; None if the run made them."""
    encoders, size = family.encoder_digests(), family.video_size()
    if embedded is not None:
        source = read_manifest(embedded) or DataManifest()
        encoders |= {"text_encoder": source.text_encoder, "tokenizer": source.tokenizer}
    return DataManifest(latents="normalised", sizes=() if size is None else (size,)).with_encoders(encoders)


def _check_first_prompt(path: Path, prompts: ParquetDataset, checks: Sequence[RowCheck]) -> None:
    """Raises ValueError for text embeddings of another encoder, before the teacher's weights are read."""
    row = prompts[0]
    try:
        for check in checks:
            check(LatentRow(row.id, row.caption, row.text_embedding))  # whatever latents there are, they are not read
    except ValueError as error:
        raise ValueError(f"--prompts {path}: {error}") from error


@contextmanager
def _world(config: Config) -> Iterator[World]:
    """All ranks, from when each has seen what is there until each has written its last file."""
    world = start_world(config.comm.init_timeout_seconds, force_group=needs_group(config))
    try:
        ranks = Ranks()
        ranks.wait()
        yield world
        ranks.wait()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def with_teacher(config: Config, teacher: Path | None) -> Config:
    """Returns the configuration with the folder `teacher` as weights of the role `teacher`. Raises ValueError if
    neither names a teacher."""
    if teacher is None and "teacher" not in config.roles:
        raise ValueError(f"{config.job.config_file} has no [roles.teacher]; add it, or name its folder by --teacher")
    roles = dict(config.roles)
    if teacher is not None:
        roles["teacher"] = RoleConfig(
            trainable=False, path=str(teacher), optimizer=config.optimizer, parallelism=config.parallelism
        )
    return dataclasses.replace(config, roles=roles)


def trajectory_request(config: Config, options: OdePairsOptions) -> TrajectoryRequest:
    """The sampling that the options ask for; settings that they leave out are those of the job's method. Raises
    ValueError."""
    shift = config.pipeline_config.flow_shift
    own = method_class(config.recipe.method).teacher_trajectory(config.method_config, shift)
    given = {
        "sigmas": tuple(few_step_sigmas(options.times, shift, warp=False).tolist()) if options.times else None,
        "num_steps": options.num_steps,
        "solver": options.solver,
        "guidance_scale": options.guidance_scale,
    }
    settings = (dataclasses.asdict(own) if own else {}) | {name: x for name, x in given.items() if x is not None}
    if missing := [name for name in given if name not in settings]:
        names = ", ".join("--" + {"sigmas": "times"}.get(name, name).replace("_", "-") for name in missing)
        raise ValueError(
            f"recipe.method = {config.recipe.method!r} of {options.config} does not train on trajectories and says "
            f"nothing about them; give {names}"
        )
    return TrajectoryRequest(**settings)


def pair_id(seed: int, index: int) -> str:
    """Returns the id of a row, which is the key of its initial noise."""
    return f"{seed}-{index:06d}"


def initial_noise(row_id: str, shape: Sequence[int]) -> Tensor:
    """Returns the noise [*shape] from which a row's trajectory started, float32 on the CPU."""
    seed, index = map(int, row_id.split("-"))
    return KeyedNoise(seed).normal("ode_pairs/noise", 0, [index], shape, device="cpu")[0]


def missing_batches(out: Path, settings: dict[str, Any], num_pairs: int, options: OdePairsOptions) -> list[list[int]]:
    """Returns the indices of the pairs that no file in `out` contains, one list per file to write. Raises ValueError if
    `out` contains other data."""
    check_identity(out, settings)
    found = set(read_ids(out)) if parquet_files(out) else set()
    starts = range(0, num_pairs, options.batch_size)
    files = (range(start, min(start + options.batch_size, num_pairs)) for start in starts)
    batches = ([index for index in indices if pair_id(options.seed, index) not in found] for indices in files)
    return [batch for batch in batches if batch]


@dataclass(frozen=True)
class PairMaker:
    """Samples the pairs of a batch and writes their file."""

    config: Config
    options: OdePairsOptions
    request: TrajectoryRequest
    grid_indices: list[int]
    adapter: Adapter
    teacher: RoleHandle
    prompts: list[str] | ParquetDataset
    """Prompts, which are encoded, or rows with their embeddings. They repeat where there are more pairs."""

    def make(self, indices: list[int], *, write: bool) -> None:
        """Samples the pairs of one batch. Every rank of a data group computes, one of them writes."""
        rows = [self._text_row(index) for index in indices]
        ids = [pair_id(self.options.seed, index) for index in indices]
        states_BK, x0 = self._sample(indices, ids, rows)
        if not write:
            return
        dtype = DTYPES[self.options.dtype]
        timesteps_K = timestep(torch.tensor(self.request.sigmas, dtype=torch.float64))
        pairs = [
            dataclasses.replace(
                row,
                id=row_id,
                vae_latent=_in_row_dims(end.to("cpu", dtype)),
                extra={"trajectory": states_K.to("cpu", dtype), "trajectory_timesteps": timesteps_K},
            )
            for row, row_id, states_K, end in zip(rows, ids, states_BK, x0, strict=True)
        ]
        write_rows(self.options.out / f"pairs-{indices[0]:06d}-{indices[-1]:06d}.parquet", pairs)

    def _text_row(self, index: int) -> LatentRow:
        prompt = self.prompts[index % len(self.prompts)]
        if isinstance(prompt, LatentRow):
            return LatentRow("", prompt.caption, prompt.text_embedding)
        (embedding_LD,) = self.adapter.embed_prompts([prompt])
        return LatentRow("", prompt, embedding_LD.to(DTYPES[self.options.dtype]))

    def _sample(self, indices: list[int], ids: list[str], rows: list[LatentRow]) -> tuple[Tensor, Tensor]:
        adapter, request = self.adapter, self.request
        batch = adapter.prepare_batch(collate(indices, rows, self.config.data.max_text_tokens))
        condition, guidance = adapter.text_condition(batch), Guidance(request.guidance_scale)
        velocity = partial(adapter.guided_velocity, self.teacher, condition=condition, guidance=guidance)
        noise = torch.stack([initial_noise(row_id, adapter.latent_shape) for row_id in ids])
        return sample_trajectory(
            velocity,
            noise.to(batch.text_embeddings.device),
            self.grid_indices,
            num_steps=request.num_steps,
            shift=adapter.flow_shift,
            solver=request.solver,
        )


def _run(batches: list[list[int]], layouts: Layouts, make: Callable[[list[int], bool], None]) -> None:
    """Hands out batches to data groups in rounds. In the last round some groups repeat a batch, which another one
    writes."""
    group, num_groups = layouts.data_rank, layouts.num_data_groups
    for first in tqdm(range(0, len(batches), num_groups), unit="round", disable=None if group == 0 else True):
        mine = first + group
        make(batches[min(mine, len(batches) - 1)], mine < len(batches))


def _in_row_dims(latent: Tensor) -> Tensor:
    """Returns a latent with the four dims of a dataset. Missing dims get size 1."""
    return latent.reshape(*latent.shape, *itertools.repeat(1, _ROW_DIMS - latent.ndim))
