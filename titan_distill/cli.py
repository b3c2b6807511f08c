"""``titan-distill``: what one does beside training. Each command is a typed function; tyro makes its options and
``--help``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from titan_distill import generate as generation
from titan_distill import plan as planning
from titan_distill.checkpoint import convert
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.data import preprocess, summary
from titan_distill.dispatch import model_family

EXIT_BAD_INPUT = 2


def export(
    checkpoint: Path,
    out: Path,
    role: str = "student",
    weights: Literal["ema", "raw", "auto"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    pipeline: Path | None = None,
) -> None:
    """Write a role of a checkpoint as a diffusers folder that WanPipeline.from_pretrained loads.

    Args:
        checkpoint: A step folder, or ``outputs/<name>/checkpoints/latest``. out: Folder to write; must not exist. role:
        Role to export. weights: Averaged or raw weights; auto takes the average where there is one. dtype: Type of the
        written weights. pipeline: Diffusers folder whose VAE, text encoder, tokenizer and scheduler are copied beside
        the transformer; the run's
            own pipeline_config.path if not given.
    """
    found = resolve(checkpoint)
    manifest = read_manifest(found)
    use_ema = convert.trained_role(found, manifest, role).has_ema if weights == "auto" else weights == "ema"
    folder = pipeline or (Path(path) if (path := manifest.pipeline_config.get("path")) else None)
    convert.export(
        found,
        role,
        out,
        write_weights=model_family(manifest.family).write_weights,
        use_ema=use_ema,
        dtype=dtype,
        pipeline_folder=folder,
    )
    print(f"{role} of {found} ({'EMA' if use_ema else 'raw'}, {dtype}) is in {out}")


def preprocess_footage(config: tyro.conf.OmitArgPrefixes[preprocess.PreprocessConfig]) -> None:
    """Encode a folder of videos with captions into the parquet file that training reads."""
    print(preprocess.preprocess(config))


def inspect(path: Path) -> None:
    """Print what a parquet file or folder holds, after checking every row.

    Args:
        path: The file or folder.
    """
    print(summary.inspect(path))


COMMANDS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "plan": planning.plan,
    "generate": generation.generate,
    "checkpoint": {"export": export},
    "data": {"preprocess": preprocess_footage, "inspect": inspect},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Bad input is one sentence on stderr and exit code 2."""
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
