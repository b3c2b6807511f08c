"""``titan-distill``: what one does beside training. Each command is a typed function; tyro makes its options and
``--help``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, TRANSFORMER_2, open_folder
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.checkpoint.tools import diff as comparison
from titan_distill.checkpoint.tools import export as exporting
from titan_distill.checkpoint.tools import inspect as checkpoints
from titan_distill.checkpoint.tools import rewrite
from titan_distill.commands import generate as generation
from titan_distill.commands import ode_pairs as pairs
from titan_distill.commands import plan as planning
from titan_distill.commands import preprocess
from titan_distill.data import summary
from titan_distill.fault_tolerance.exit_codes import EXIT_BAD_INPUT
from titan_distill.models.base import model_family
from titan_distill.observability.quiet import quiet_libraries

EXIT_DIFFERENT = 1


def list_checkpoints(folder: Positional[Path]) -> None:
    """List the checkpoints of a run: step, age, size, samples, roles, layout, and whether each is complete.

    Args:
        folder: Folder of the run, or its `checkpoints`.
    """
    print(checkpoints.describe_folder(folder))


def verify(path: Positional[Path]) -> None:
    """Read every byte of a checkpoint; exit with 2, naming the file, when one is not as it was published.

    Args:
        path: Folder of a step, or `outputs/<name>/checkpoints/latest`.
    """
    print(checkpoints.verify(path))


def export(
    checkpoint: Path,
    out: Path,
    role: str = "student",
    weights: Literal["ema", "raw", "auto"] = "auto",
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored",
    pipeline: Path | None = None,
) -> None:
    """Write a role of a checkpoint as a diffusers folder that WanPipeline.from_pretrained loads.

    Args:
        checkpoint: Folder of a step, or `outputs/<name>/checkpoints/latest`.
        out: Folder to write; must not exist.
        role: Role to export.
        weights: Averaged or raw weights; auto takes the average where there is one.
        dtype: Dtype of the written weights; stored keeps that of the checkpoint.
        pipeline: Diffusers folder whose VAE, text encoder, tokenizer and scheduler are copied beside the transformer.
            Default: the run's pipeline_config.path.
    """
    found = resolve(checkpoint)
    manifest = read_manifest(found)
    use_ema = exporting.trained_role(found, manifest, role).has_ema if weights == "auto" else weights == "ema"
    family, path = model_family(manifest.family), manifest.pipeline_config.get("path")
    exporting.export(
        found,
        role,
        out,
        write_weights=family.write_weights,
        pipeline_index=family.pipeline_index,
        use_ema=use_ema,
        dtype=None if dtype == "stored" else dtype,
        pipeline_folder=pipeline or (Path(path) if path else None),
    )
    print(f"{role} of {found} ({'EMA' if use_ema else 'raw'}, {dtype}) is in {out}")


def import_weights(
    folder: Positional[Path], out: Path | None = None, family: str = "wan", role: str = "student"
) -> None:
    """Print the TOML line that starts a role from a diffusers folder: nothing has to be imported.

    Args:
        folder: Diffusers transformer, or a pipeline that has one.
        out: No effect: nothing is written.
        family: Model family of the weights.
        role: Role that starts from the weights.
    """
    model_family(family)
    for module in (TRANSFORMER, TRANSFORMER_2):
        open_folder(folder, module)
    print("No import is needed, and nothing is written: each rank reads only its slices of a diffusers folder.")
    print(f'Write in the job\'s TOML:\n\n[roles.{role}]\npath = "{folder}"')


def reshard(path: Positional[Path], out: Path, num_files: int) -> None:
    """Rewrite a checkpoint, with all its values, in another number of files.

    Args:
        path: Folder of a step, or `outputs/<name>/checkpoints/latest`.
        out: Checkpoint folder to write; must not exist.
        num_files: Number of data files, of about equal size.
    """
    rewrite.reshard(path, out, num_files)
    print(f"{path} is in {out}, in {num_files} files")


def diff(a: Positional[Path], b: Positional[Path]) -> None:
    """Compare two checkpoints value by value; exit with 0 when they are equal, 1 when not, 2 for bad input.

    Args:
        a: Folder of a step, or `outputs/<name>/checkpoints/latest`.
        b: Folder of another.
    """
    num_differences = 0
    for line in comparison.diff(a, b):
        print(line)
        num_differences += 1
    if num_differences:
        print(f"{num_differences} values differ")
        sys.exit(EXIT_DIFFERENT)
    print("no difference")


def preprocess_footage(config: tyro.conf.OmitArgPrefixes[preprocess.PreprocessConfig]) -> None:
    """Encode a folder of videos with captions into the parquet file that training reads."""
    print(preprocess.preprocess(config))


def make_ode_pairs(options: tyro.conf.OmitArgPrefixes[pairs.OdePairsOptions]) -> None:
    """Record sampling trajectories of a frozen teacher as parquet, for recipe.method = "knowledge_distillation"."""
    print(pairs.ode_pairs(options))


def inspect(path: Path) -> None:
    """Print what a parquet file or folder holds, after checking every row.

    Args:
        path: The file or folder.
    """
    print(summary.inspect(path))


COMMANDS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "plan": planning.plan,
    "generate": generation.generate,
    "checkpoint": {
        "list": list_checkpoints,
        "verify": verify,
        "export": export,
        "import": import_weights,
        "reshard": reshard,
        "diff": diff,
    },
    "data": {"preprocess": preprocess_footage, "ode-pairs": make_ode_pairs, "inspect": inspect},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Bad input is one sentence on stderr and exit code 2."""
    quiet_libraries()
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        if isinstance(command, dict):
            tyro.extras.subcommand_cli_from_dict(command, args=arguments[1:], prog=f"titan-distill {arguments[0]}")
        elif command is planning.plan:  # what tyro does not know are overrides of the job's configuration
            plan = f"titan-distill {arguments[0]}"
            planning.plan(*tyro.cli(planning.PlanOptions, args=arguments[1:], prog=plan, return_unknown_args=True))
        elif command is not None:
            tyro.cli(command, args=arguments[1:], prog=f"titan-distill {arguments[0]}")
        else:
            known = "\n".join(f"  {line}" for line in _command_lines())
            print(f"usage: titan-distill COMMAND [--help]\n\n{known}", file=sys.stderr)
            sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else EXIT_BAD_INPUT)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def _command_lines() -> list[str]:
    lines = []
    for name, command in COMMANDS.items():
        for inner, function in command.items() if isinstance(command, dict) else [("", command)]:
            lines.append(f"{name} {inner}".strip().ljust(20) + (function.__doc__ or "").strip().splitlines()[0])
    return lines


if __name__ == "__main__":
    main()
