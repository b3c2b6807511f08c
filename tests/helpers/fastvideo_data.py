"""Datasets as FastVideo's preprocessing writes them: its columns, raw latents, files in folders of workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

FACTS = {
    "file_name": pa.string(),
    "caption": pa.string(),
    "media_type": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "num_frames": pa.int64(),
    "duration_sec": pa.float64(),
    "fps": pa.float64(),
}


def columns(name: str) -> dict[str, pa.DataType]:
    return {f"{name}_bytes": pa.binary(), f"{name}_shape": pa.list_(pa.int64()), f"{name}_dtype": pa.string()}


def schema(*tensors: str, facts: Sequence[str] = tuple(FACTS)) -> pa.Schema:
    kinds = {name: kind for tensor in tensors for name, kind in columns(tensor).items()}
    return pa.schema({"id": pa.string(), **kinds, **{name: FACTS[name] for name in facts}})


T2V = schema("vae_latent", "text_embedding")
I2V = schema("vae_latent", "text_embedding", "clip_feature", "first_frame_latent", "pil_image")
TEXT_ONLY = schema("text_embedding", facts=("caption",))
TRAJECTORIES = schema(
    "text_embedding", "trajectory_latents", "trajectory_timesteps", facts=("file_name", "caption", "media_type")
)


def record(name: str, caption: str, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """One row. `num_frames` counts latent frames, and tensors that are None are empty, as FastVideo has them."""
    row: dict[str, Any] = {"id": name, "file_name": name, "caption": caption, "media_type": "video"}
    for key, tensor in tensors.items():
        array = None if tensor is None else tensor.float().numpy()
        row[f"{key}_bytes"] = b"" if array is None else array.tobytes()
        row[f"{key}_shape"] = [] if array is None else list(array.shape)
        row[f"{key}_dtype"] = "" if array is None else str(array.dtype)
    if (latent := tensors.get("vae_latent")) is not None:
        row |= {"width": 96, "height": 64, "num_frames": latent.shape[1], "duration_sec": 1.0, "fps": 16.0}
    return row


def write(
    folder: Path, records: Sequence[dict[str, Any]], kind: pa.Schema, *, rows_per_file: int, workers: int
) -> Path:
    """Writes `worker_0/data_chunk_0.parquet` and so on, in order; with no worker all into `folder`."""
    files = [records[start : start + rows_per_file] for start in range(0, len(records), rows_per_file)]
    per_worker = -(-len(files) // workers) if workers else len(files)
    for number, rows in enumerate(files):
        where = folder / f"worker_{number // per_worker}" if workers else folder
        where.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows, kind)
        pq.write_table(table, where / f"data_chunk_{number % per_worker}.parquet", compression="zstd")
    return folder
