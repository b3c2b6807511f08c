"""Summary of a dataset, from reading all of it: sizes, statistics and every bad row.

Training checks each row when it reads it, which may be hours into a run; this module does the same check in advance. If
the latents are normalised, their mean is near 0 and their standard deviation near 1, also channel by channel.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
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
    clips: Counter[str] = field(default_factory=Counter)  # rows by size in frames and pixels, where it is known
    seconds: list[float] = field(default_factory=list)  # shortest, longest and total duration of clips, if it is known
    _num_values: int = 0
    _sum: float = 0.0
    _sum_of_squares: float = 0.0
    _of_channels: dict[int, Tensor] = field(default_factory=dict)  # [count, sum, sum of squares] by number of channels

    @property
    def latent_mean(self) -> float:
        """Mean over all latent values; 0 if there are none."""
        return self._sum / max(1, self._num_values)

    @property
    def latent_std(self) -> float:
        """Standard deviation over all latent values; 0 if there are none."""
        return max(0.0, self._sum_of_squares / max(1, self._num_values) - self.latent_mean**2) ** 0.5

    def channel_statistics(self, num_channels: int) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation [C] of the values of each channel of the latents with `num_channels`."""
        count, total, squares = self._of_channels[num_channels]
        mean = total / count
        return mean, (squares / count - mean**2).clamp(min=0).sqrt()

    def add(self, row: LatentRow) -> None:
        """Adds one good row to the summary."""
        width = row.text_embedding.shape[1]
        self.text_widths[f"{width} {DTYPE_NAMES[row.text_embedding.dtype]}"] += 1
        self.text_tokens[len(row.text_embedding)] += 1
        self.captions[row.caption] += 1
        for name, tensor in row.extra.items():
            self.extra[f"{name} {list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}"] += 1
        if row.num_frames and row.height and row.width:
            self.clips[f"{row.num_frames} frames of {row.height} × {row.width} pixels"] += 1
        if (duration := row.duration_sec) > 0:
            shortest, longest, total = self.seconds or (duration, duration, 0.0)
            self.seconds = [min(shortest, duration), max(longest, duration), total + duration]
        if row.vae_latent is not None:
            self._add_latent(row.vae_latent)

    def _add_latent(self, latent: Tensor) -> None:
        self.latents[f"{list(latent.shape)} {DTYPE_NAMES[latent.dtype]}"] += 1
        self._num_values += latent.numel()
        self._sum += latent.double().sum().item()
        self._sum_of_squares += latent.double().square().sum().item()
        values_CN = latent.double().flatten(1)
        sums = [torch.full((len(latent),), values_CN.shape[1]).double(), values_CN.sum(1), values_CN.square().sum(1)]
        self._of_channels[len(latent)] = self._of_channels.get(len(latent), 0) + torch.stack(sums)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.num_rows} rows in {self.num_files} file(s), {len(self.bad_rows)} bad"]
        lines += [f"latents {kind}: {count} rows" for kind, count in self.latents.most_common()]
        if self.latents:
            lines.append(f"latent values: mean {self.latent_mean:.3f}, standard deviation {self.latent_std:.3f}")
        for num_channels in sorted(self._of_channels):
            for name, values in zip(("means", "standard deviations"), self.channel_statistics(num_channels)):
                lines.append(f"{name} of {num_channels} channels: {' '.join(f'{value:.3f}' for value in values)}")
        lines += [f"clips of {size}: {count} rows" for size, count in self.clips.most_common()]
        if self.seconds:
            shortest, longest, total = self.seconds
            lines.append(f"clips last {shortest:.3g} to {longest:.3g} seconds, {total / 3600:.3g} hours in all")
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
