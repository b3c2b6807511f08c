"""Speed of reading training data: `python -m benchmarks.data_loading --out benchmarks/results/data_loading-DATE.json`

Writes small rows with the project's own writer, then reads them twice in this process, with one thread and without
workers, over the same files:

- *plain*: pyarrow reads the row groups from front to end, and each row becomes tensors and a caption, nothing more;
- *ours*: `SampleLoader` gives one epoch of shuffled, checked and padded batches.

Both read a tenth of the rows in turns, so that a machine that drifts hurts both alike. Rates are rows per second of
this process's CPU time, which other processes on the machine disturb less; the files are in the page cache. `ratio`
compares them over the whole epoch and should be at least 0.5; the tenths show whether the speed is steady.
`wall_ratio` compares elapsed time. `start_seconds` is the elapsed time from opening the folder to the first batch and
should be at most 3. Memory: `held_bytes` counts the row groups and footers that the dataset keeps, `resident_bytes` is
the growth of the process, both at the end of each tenth. `longest_batch_seconds` shows the pause at the begin of a
window.

With --folder the files stay there, and the next call reads them again.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.machine import write_result
from titan_distill.config.dtypes import DTYPES
from titan_distill.data.loader import SampleLoader
from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows

NUM_FILES = 50
NUM_PARTS = 10
LATENT_SHAPE = (4, 2, 4, 4)  # 256 bytes in float16
TEXT_SHAPE = (3, 8)  # 48 bytes in float16
TENSORS = ("vae_latent", "text_embedding")
COLUMNS = ["caption", *(f"{name}_{part}" for name in TENSORS for part in ("bytes", "shape", "dtype"))]


def write_data(folder: Path, num_rows: int) -> None:
    """Writes `num_rows` rows of 0.3 KB to `NUM_FILES` files. The caption is the row's number."""
    bounds = [num_rows * number // NUM_FILES for number in range(NUM_FILES + 1)]
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"{number:03d}.parquet"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(end - start, *LATENT_SHAPE, generator=generator).half()
        texts = torch.randn(end - start, *TEXT_SHAPE, generator=generator).half()
        rows = (
            LatentRow(id=f"row-{index}", caption=str(index), text_embedding=text, vae_latent=latent)
            for index, text, latent in zip(range(start, end), texts, latents)
        )
        write_rows(path, rows)


def contents(folder: Path) -> dict[str, int]:
    """Numbers of rows, row groups and bytes of the files."""
    files = [(path, pq.read_metadata(path)) for path in folder.glob("*.parquet")]
    return {
        "num_rows": sum(metadata.num_rows for _, metadata in files),
        "num_row_groups": sum(metadata.num_row_groups for _, metadata in files),
        "file_bytes": sum(path.stat().st_size for path, _ in files),
    }


def plain_rows(folder: Path) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields caption and tensors of every row, in the order of the files."""
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=COLUMNS, use_threads=False)
                columns = [table.column(name).combine_chunks() for name in COLUMNS]
                for record in zip(*columns):
                    yield record[0].as_py(), [_plain_tensor(*record[at : at + 3]) for at in (1, 4)]


def _plain_tensor(data: pa.Scalar, shape: pa.Scalar, dtype: pa.Scalar) -> Tensor:
    return torch.frombuffer(bytearray(data.as_buffer()), dtype=DTYPES[dtype.as_py()]).reshape(shape.as_py())


class Stopwatch:
    """Elapsed time and CPU time of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        """Elapsed time."""
        return time.perf_counter() - self._wall

    def cpu_seconds(self) -> float:
        """CPU time."""
        return time.process_time() - self._cpu


def resident_bytes() -> int:
    """Memory of this process at this moment."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def measure(folder: Path, num_rows: int, batch_size: int) -> dict[str, Any]:
    """Reads one epoch in both ways."""
    before, start = resident_bytes(), Stopwatch()
    dataset = ParquetDataset(folder, for_batches=True, max_bad_rows=0)
    dataset.check_first_rows()
    loader = SampleLoader(
        dataset, global_batch_size=batch_size, data_rank=0, data_world_size=1, seed=0, max_text_tokens=TEXT_SHAPE[0]
    )
    first = next(loader)
    start_seconds, start_cpu_seconds = start.seconds(), start.cpu_seconds()

    seen = [int(caption) for caption in first.captions]
    plain = plain_rows(folder)
    parts: list[dict[str, float]] = []
    for part in range(1, NUM_PARTS + 1):
        num_rows_so_far, end = len(seen), num_rows * part // NUM_PARTS
        ours, longest = Stopwatch(), 0.0
        while len(seen) < end:
            batch = Stopwatch()
            seen += map(int, next(loader).captions)
            longest = max(longest, batch.seconds())
        ours_cpu, ours_wall = ours.cpu_seconds(), ours.seconds()
        other = Stopwatch()
        num_plain = sum(1 for _ in itertools.islice(plain, end - num_rows * (part - 1) // NUM_PARTS))
        plain_cpu, plain_wall = other.cpu_seconds(), other.seconds()
        num_ours = len(seen) - num_rows_so_far
        parts.append(
            {
                "ours_rows_per_second": num_ours / ours_cpu,
                "plain_rows_per_second": num_plain / plain_cpu,
                "ours_rows_per_wall_second": num_ours / ours_wall,
                "plain_rows_per_wall_second": num_plain / plain_wall,
                "longest_batch_seconds": longest,
                "held_bytes": dataset.held_bytes,
                "resident_bytes": resident_bytes() - before,
            }
        )
        print("  ".join(f"{key} {value:,.6g}" for key, value in parts[-1].items()), flush=True)
    rates = {name: _overall(parts, name) for name in parts[0] if "rows_per" in name}
    return {
        "distinct_rows": len(set(seen[:num_rows])),
        "start_seconds": start_seconds,
        "start_cpu_seconds": start_cpu_seconds,
        **rates,
        "ratio": rates["ours_rows_per_second"] / rates["plain_rows_per_second"],
        "wall_ratio": rates["ours_rows_per_wall_second"] / rates["plain_rows_per_wall_second"],
        "max_held_bytes": max(part["held_bytes"] for part in parts),
        "max_resident_bytes": max(part["resident_bytes"] for part in parts),
        "tenths": parts,
    }


def _overall(parts: list[dict[str, float]], name: str) -> float:
    """Rate over all parts, which have equally many rows."""
    return len(parts) / sum(1 / part[name] for part in parts)


def main() -> None:
    """Measures and prints; with --out also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="of the files, which stay; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        write_data(folder, arguments.rows)
        facts = contents(folder)
        if facts["num_rows"] != arguments.rows:
            parser.error(f"{folder} has {facts['num_rows']} rows already, not {arguments.rows}; name another folder")
        result = facts | measure(folder, arguments.rows, arguments.batch_size)
    print("  ".join(f"{key} {value:,.6g}" for key, value in result.items() if key != "tenths"))
    if arguments.out:
        command = f"data_loading --rows {arguments.rows} --batch-size {arguments.batch_size}"
        write_result(arguments.out, {"command": command, **result})


if __name__ == "__main__":
    main()
