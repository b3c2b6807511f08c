"""The command line `titan-distill`: everything but training. Each command is a typed function, from which tyro makes
options and `--help`."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from titan_distill.fault_tolerance.signals import leave_at_once
from titan_distill.fault_tolerance.utf8 import restart_in_utf8

if __name__ == "__main__" or Path(sys.argv[0]).name == "titan-distill":
    restart_in_utf8()
    signal.signal(signal.SIGINT, leave_at_once)  # until `main`: imports take seconds

import tyro
from tyro.conf import Positional

from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, TRANSFORMER_2, open_folder
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.tools import diff as comparison
from titan_distill.checkpoint.tools import inspect as checkpoints
from titan_distill.checkpoint.tools import rewrite
from titan_distill.commands import evaluate as evaluation
from titan_distill.commands import export as exporting
from titan_distill.commands import generate as generation
from titan_distill.commands import index as indexing
from titan_distill.commands import ode_pairs as pairs
from titan_distill.commands import plan as planning
from titan_distill.commands import preprocess, text_only
from titan_distill.commands import report as reporting
from titan_distill.commands.inspect_data import write_sheet
from titan_distill.config.paths import of_key
from titan_distill.config.sections import RecipeConfig
from titan_distill.data import summary
from titan_distill.data.latents import Form
from titan_distill.fault_tolerance.exit_codes import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from titan_distill.models.base import model_family
from titan_distill.observability.quiet import quiet_libraries
from titan_distill.parallelisms.mesh import is_main_process

EXIT_DIFFERENT = 1


def list_checkpoints(run: Positional[Path]) -> None:
    """List the checkpoints of a run: step, age, size, samples, roles, layout, and whether each is complete.

    Args:
        run: Folder of the run, or its `checkpoints`.
    """
    with of_key("RUN", run):
        print(checkpoints.describe_folder(run))


def verify(checkpoint: Positional[Path]) -> None:
    """Read every byte of a checkpoint; exit with 2, naming the file, when one is not as it was published.

    Args:
        checkpoint: Folder of a step, or of a run, which means its latest.
    """
    with of_key("CHECKPOINT", checkpoint):
        print(checkpoints.verify(checkpoint))


def import_weights(
    folder: Positional[Path], out: Path | None = None, family: str = RecipeConfig.family, role: str = "student"
) -> None:
    """Print the TOML line that starts a role from a diffusers folder, which training reads itself.

    Args:
        folder: Diffusers transformer, or a pipeline that has one.
        out: Has no effect, because the command writes no file.
        family: Model family of the weights.
        role: Role that starts from the weights.
    """
    model_family(family)
    with of_key("FOLDER", folder):
        for module in (TRANSFORMER, TRANSFORMER_2):
            open_folder(folder, module)
    print("No import is needed, and nothing is written: each rank reads only its slices of a diffusers folder.")
    print(f'Write in the job\'s TOML:\n\n[roles.{role}]\npath = "{folder}"')


def reshard(checkpoint: Positional[Path], out: Path, num_files: int) -> None:
    """Rewrite a checkpoint, with all its values, in another number of files.

    Args:
        checkpoint: Folder of a step, or of a run, which means its latest.
        out: Checkpoint folder to write; must not exist.
        num_files: Number of data files, of about equal size.
    """
    with of_key("CHECKPOINT", checkpoint):
        step = resolve(checkpoint)
    rewrite.reshard(step, out, num_files)
    print(f"{checkpoint} is in {out}, in {num_files} files")


def diff(a: Positional[Path], b: Positional[Path]) -> None:
    """Compare two checkpoints value by value; exit with 0 when they are equal, 1 when not, 2 for bad input.

    Args:
        a: Folder of a step, or of a run, which means its latest.
        b: Another.
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
    """Encode a folder of videos with captions into the parquet files that training reads."""
    report = preprocess.preprocess(config)
    if is_main_process():
        print(report)


def make_index(options: tyro.conf.OmitArgPrefixes[indexing.IndexOptions]) -> None:
    """Make one table of a folder of videos and its captions, for training, `data preprocess` and validation."""
    print(indexing.index(options))


def encode_prompts(options: tyro.conf.OmitArgPrefixes[text_only.TextOnlyOptions]) -> None:
    """Encode a list of prompts into a text-only dataset, for methods that need no videos."""
    print(text_only.prepare(options))


def make_ode_pairs(options: tyro.conf.OmitArgPrefixes[pairs.OdePairsOptions]) -> None:
    """Record sampling trajectories of a frozen teacher as parquet, for recipe.method = "knowledge_distillation"."""
    print(pairs.ode_pairs(options))


def evaluate(options: tyro.conf.OmitArgPrefixes[evaluation.EvaluateOptions]) -> None:
    """Measure videos of checkpoints, exported folders and folders of videos beside those of the teacher."""
    evaluation.evaluate(options)


def inspect(
    path: Positional[Path],
    sheet: Path | None = None,
    vae: Path | None = None,
    rows: int = 8,
    family: str = RecipeConfig.family,
    latents: Form | None = None,
) -> None:
    """Print what a parquet file or folder holds, after checking every row: sizes, lengths, statistics, bad rows.

    Args:
        path: The file or folder.
        sheet: PNG file to write, a contact sheet of decoded rows.
        vae: With --sheet: the VAE's diffusers folder, or the pipeline folder that has it as vae/.
        rows: Rows on the sheet, evenly spread.
        family: Model family of the VAE.
        latents: With --sheet: form of the latents, where their statistics do not tell it.
    """
    if (sheet is None) != (vae is None):
        raise ValueError("--sheet and --vae need each other; give both, or neither")
    if latents is not None and sheet is None:
        raise ValueError(f"--latents {latents} has no effect without --sheet; leave it out")
    if sheet is not None and vae is not None:
        print(write_sheet(path, sheet, vae, family, rows, latents))
    with of_key("PATH", path):
        print(summary.inspect(path))


COMMANDS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "plan": planning.plan,
    "generate": generation.generate,
    "evaluate": evaluate,
    "report": reporting.report,
    "checkpoint": {
        "list": list_checkpoints,
        "verify": verify,
        "export": exporting.export,
        "import": import_weights,
        "reshard": reshard,
        "diff": diff,
    },
    "data": {
        "preprocess": preprocess_footage,
        "index": make_index,
        "prompts": encode_prompts,
        "ode-pairs": make_ode_pairs,
        "inspect": inspect,
    },
}
"""Commands by name. Each takes what it reads as arguments without a name (a job's TOML, a run, a checkpoint, data), and
what it writes as --out."""

EARLIER_NAMES = {("generate",): "--checkpoint", ("checkpoint", "export"): "--checkpoint", ("data", "inspect"): "--path"}
"""Options of earlier versions for what follows the command now; they still work."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Bad input is one sentence on stderr and exit code 2, Ctrl-C is exit code 130."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    quiet_libraries()
    arguments = _without_earlier_names(sys.argv[1:] if argv is None else list(argv))
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        if arguments[:1] == ["--version"]:
            print(f"titan-distill {importlib.metadata.version('titan_distill')}")
        elif isinstance(command, dict):
            tyro.extras.subcommand_cli_from_dict(command, args=arguments[1:], prog=f"titan-distill {arguments[0]}")
        elif command is planning.plan:  # what tyro does not know are overrides of the job's configuration
            plan = f"titan-distill {arguments[0]}"
            planning.plan(*tyro.cli(planning.PlanOptions, args=arguments[1:], prog=plan, return_unknown_args=True))
        elif command is not None:
            tyro.cli(command, args=arguments[1:], prog=f"titan-distill {arguments[0]}")
        else:
            known = "\n".join(f"  {line}" for line in _command_lines())
            is_asked = bool(arguments) and arguments[0] in ("-h", "--help")
            usage = f"usage: titan-distill COMMAND [--help], or titan-distill --version\n\n{known}"
            print(usage, file=sys.stdout if is_asked else sys.stderr)
            sys.exit(0 if is_asked else EXIT_BAD_INPUT)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as leaving:
        if leaving.code == EXIT_BAD_INPUT:  # a table says what
            program = " ".join(["titan-distill", *(arguments[:1] if command else [])])
            print(f"error: wrong arguments, as shown above; {program} --help lists the right ones", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _without_earlier_names(arguments: list[str]) -> list[str]:
    """Returns the arguments with the path of an option in `EARLIER_NAMES` right after the command."""
    for command, option in EARLIER_NAMES.items():
        size = len(command)
        head, rest = arguments[:size], arguments[size:]
        if tuple(head) != command:
            continue
        for index, word in enumerate(rest):
            if word == option and rest[index + 1 :]:
                return [*head, rest[index + 1], *rest[:index], *rest[index + 2 :]]
            if word.startswith(f"{option}="):
                return [*head, word.partition("=")[2], *rest[:index], *rest[index + 1 :]]
    return arguments


def _command_lines() -> list[str]:
    lines = []
    for name, command in COMMANDS.items():
        for inner, function in command.items() if isinstance(command, dict) else [("", command)]:
            lines.append(f"{name} {inner}".strip().ljust(20) + (function.__doc__ or "").strip().splitlines()[0])
    return lines


if __name__ == "__main__":
    main()
