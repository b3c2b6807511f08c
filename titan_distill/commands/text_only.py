"""`titan-distill data prompts` makes a text-only dataset from a list of prompts.

Methods that sample their own videos, such as DMD2 with simulated rollouts, need only text embeddings. Each prompt is
encoded alone, in float32, so a row does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from titan_distill.config.dtypes import DTYPES
from titan_distill.config.paths import of_key
from titan_distill.config.sections import RecipeConfig
from titan_distill.data.manifest import DataManifest, write_manifest
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.data.prompts import read_prompts
from titan_distill.data.row_groups import parquet_files
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.fault_tolerance.run_lock import RunLock
from titan_distill.models.base import FootageEncoder, TextEncoderFolders, model_family
from titan_distill.observability.progress import tracked
from titan_distill.parallelisms.mesh import named_device

OUTPUT_NAME = "prompts.parquet"


@dataclass(frozen=True, kw_only=True)
class TextOnlyOptions(TextEncoderFolders):
    """Options of `titan-distill data prompts`."""

    file: tyro.conf.Positional[Path]
    """Prompts: .txt (one per line), or a table (.csv, .tsv, .jsonl, .json) with a column prompt, caption or text."""
    out: Path
    """Folder for the parquet file; data.path of the training job."""
    family: str = RecipeConfig.family
    """Model family whose text encoder makes the data; recipe.family of the training job."""
    max_text_tokens: int = 512
    """Longest prompt in tokens; longer ones are cut, with a warning."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Dtype of the stored text embeddings, which are computed in float32."""
    device: str | None = None
    """Device of the text encoder, such as cpu or cuda:1. Default: the GPU, or the CPU where there is none."""


def prepare(options: TextOnlyOptions) -> str:
    """Writes `out/prompts.parquet` and returns what it holds, in one sentence.

    Raises:
        ValueError: prompts or a text encoder that can't be read, output that exists or cannot be written.
    """
    output = options.out / OUTPUT_NAME
    if files := parquet_files(options.out):
        raise ValueError(f"{files[0]} exists; choose another folder for --out")
    if options.max_text_tokens < 1:
        raise ValueError(f"--max-text-tokens {options.max_text_tokens} leaves no text; choose 1 or more")
    with of_key("FILE", options.file):
        prompts = read_prompts(options.file, None)
    device = named_device(options.device)
    probe_folder(options.out, "--out")
    with RunLock(options.out):
        encoder = model_family(options.family).prompt_encoder(options, device)
        write_manifest(options.out, DataManifest().with_encoders(encoder.digests()))
        count = write_rows(output, _rows(options, prompts, encoder))
    return f"{output}: {count} prompts"


def _rows(options: TextOnlyOptions, prompts: Sequence[str], encoder: FootageEncoder) -> Iterator[LatentRow]:
    for index, prompt in enumerate(tracked(prompts, "encoding", len(prompts), "prompts")):
        embedding = encoder.embed_prompt(prompt, options.max_text_tokens).to("cpu", DTYPES[options.dtype])
        yield LatentRow(f"prompt-{index:08d}", prompt, embedding, media_type="text")
