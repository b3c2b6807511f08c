"""Summary of a dataset, from reading all of it: sizes, statistics and every bad row.

Training checks each row when it reads it, which may be hours into a run; this module does the same check in advance. If
the latents are normalised, their mean is near 0 and their standard deviation near 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from titan_distill.data.location import Location
from titan_distill.data.parquet import DTYPE_NAMES, BadRowError, LatentRow, ParquetDataset, extra_names


@dataclass
class DatasetSummary:
    """Contents of a dataset. `titan-distill data inspect` prints its `str()`."""

    path: Location
    num_files: int
    num_rows: int
    bad_rows: list[str] = field(default_factory=list)  # file, row and fault of each
    latents: Counter[str] = field(default_factory=Counter)  # rows by "[C, F, H, W] dtype"
    text_widths: Counter[str] = field(default_factory=Counter)  # rows by "D dtype"
    text_tokens: Counter[int] = field(default_factory=Counter)  # rows by number of tokens
    captions: Counter[str] = field(default_factory=Counter)  # rows by caption
    extra: Counter[str] = field(default_factory=Counter)  # rows by "name [...] dtype" of each further tensor
    _num_values: int = 0
    _sum: float = 0.0
    _sum_of_squares: float = 0.0

    @property
    def latent_mean(self) -> float:
        """Mean over all latent values; 0 if there are none."""
        return self._sum / max(1, self._num_values)

    @property
    def latent_std(self) -> float:
        """Standard deviation over all latent values; 0 if there are none."""
        return max(0.0, self._sum_of_squares / max(1, self._num_values) - self.latent_mean**2) ** 0.5

    def add(self, row: LatentRow) -> None:
        """Adds one good row to the summary."""
        width = row.text_embedding.shape[1]
        self.text_widths[f"{width} {DTYPE_NAMES[row.text_embedding.dtype]}"] += 1
        self.text_tokens[len(row.text_embedding)] += 1
        self.captions[row.caption] += 1
        for name, tensor in row.extra.items():
            self.extra[f"{name} {list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}"] += 1
        if row.vae_latent is not None:
            self._add_latent(row.vae_latent)

    def _add_latent(self, latent: Tensor) -> None:
        self.latents[f"{list(latent.shape)} {DTYPE_NAMES[latent.dtype]}"] += 1
        self._num_values += latent.numel()
        self._sum += latent.double().sum().item()
        self._sum_of_squares += latent.double().square().sum().item()

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.num_rows} rows in {self.num_files} file(s), {len(self.bad_rows)} bad"]
        lines += [f"latents {kind}: {count} rows" for kind, count in self.latents.most_common()]
        if self.latents:
            lines.append(f"latent values: mean {self.latent_mean:.3f}, standard deviation {self.latent_std:.3f}")
        lines += [f"text embeddings of width {kind}: {count} rows" for kind, count in self.text_widths.most_common()]
        if self.text_tokens:
            tokens = f"{min(self.text_tokens)} to {max(self.text_tokens)}"
            lines.append(f"text tokens: {tokens}; {len(self.captions)} distinct captions")
        lines += [f"{kind}: {count} rows" for kind, count in self.extra.most_common()]
        lines += [f"bad: {fault}" for fault in self.bad_rows]
        return "\n  ".join(lines)


def inspect(path: str | Location) -> DatasetSummary:
    """Reads every row of a parquet file or folder and returns its summary.

    Raises:
        ValueError: the path does not exist, or a file is empty, truncated or lacks columns. Bad rows raise nothing; the
            summary lists them.
    """
    dataset = ParquetDataset(path, tensors=extra_names(path))
    summary = DatasetSummary(dataset.path, dataset.num_files, len(dataset))
    for index in range(len(dataset)):
        try:
            summary.add(dataset.read(index))
        except BadRowError as error:
            summary.bad_rows.append(str(error))
    return summary
