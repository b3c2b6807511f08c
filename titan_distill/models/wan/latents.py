"""The latent space of a run, and the grids that follow from it.

Wan has two VAEs: 16 channels at 4 × 8 × 8 (frames × height × width) for 2.1 and the A14B, 48 channels at 4 × 16 × 16
for 2.2 TI2V-5B. Everything counted in latents or tokens follows from the VAE: the shape of a sample, the token grid,
the sizes that a video may have. So it is asked in one place. The VAE's own config answers where there is one; a plan or
a dry run has no files and believes the number of channels that the networks work on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_distill.config.parsing import nearest_multiples
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.tokens import Grid, token_grid

SIZE_KEYS = ("pipeline_config.num_frames", "pipeline_config.height", "pipeline_config.width")
_PATCH = WanConfig.patch_size[1]  # of all published sizes, along height as along width


@dataclass(frozen=True)
class LatentSpace:
    """The latents of one VAE; compressions are pixels, or frames, per latent."""

    channels: int
    temporal: int
    spatial: int

    def shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latents (C, F, H, W) of a video in frames and pixels."""
        return self.channels, (num_frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    def token_grid(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along (frames, height, width) of a video in frames and pixels."""
        return token_grid(self.shape(num_frames, height, width)[1:], WanConfig.patch_size)

    def check_size(self, num_frames: int, height: int, width: int, names: Sequence[str] = SIZE_KEYS) -> None:
        """Raises ValueError, with the option of that size in `names`, unless whole latents and whole tokens make up
        such a video."""
        multiple = self.spatial * _PATCH
        for name, size in zip(names[1:], (height, width), strict=True):
            if size < multiple or size % multiple:
                raise ValueError(
                    f"{name} = {size} must be a multiple of {multiple} (a VAE that compresses by {self.spatial}, "
                    f"patches of {_PATCH}); set it to {nearest_multiples(size, multiple)}"
                )
        if num_frames < 1 or (num_frames - 1) % self.temporal:
            nearest = max(0, num_frames - 1) // self.temporal * self.temporal + 1
            raise ValueError(
                f"{names[0]} = {num_frames} must be {self.temporal} n + 1 for this VAE; set it to "
                f"{nearest} or {nearest + self.temporal}"
            )

    def check_channels(self, role: str, channels: int) -> None:
        """Raises ValueError where a role's network works on other latents."""
        if channels != self.channels:
            raise ValueError(
                f"roles.{role} works on latents of {channels} channels, but the VAE of the run makes {self.channels}; "
                f"choose another model for it, or another pipeline_config.path"
            )


PUBLISHED = {space.channels: space for space in (LatentSpace(16, 4, 8), LatentSpace(48, 4, 16))}


def find_latent_space(pipeline: str, channels: Callable[[], int]) -> LatentSpace:
    """The latent space of the VAE in the folder `pipeline`; without a config there, the published one with as many
    `channels`.

    Raises ValueError for a config that can't be read, and for channels that no published VAE has.
    """
    file = Path(pipeline) / "vae" / "config.json"
    if pipeline and file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            # Diffusers' own defaults, for the keys that a config leaves out.
            defaults = {"z_dim": 16, "scale_factor_temporal": 4, "scale_factor_spatial": 8}
            return LatentSpace(*(int(config.get(key, default)) for key, default in defaults.items()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no configuration of a VAE ({error}); copy it again") from error
    num_channels = channels()
    if num_channels not in PUBLISHED:
        raise ValueError(
            f"the roles work on latents of {num_channels} channels, which no published Wan VAE makes "
            f"({', '.join(map(str, PUBLISHED))}); set pipeline_config.path to a folder with their vae"
        )
    return PUBLISHED[num_channels]


TEMPORAL = 4
"""Frames that every latent frame but the first stands for, in all of Wan's VAEs."""


def num_latent_frames(num_frames: int) -> int:
    """Latent frames of a video. Raises ValueError unless it has 4 n + 1 frames."""
    if num_frames < 1 or num_frames % TEMPORAL != 1:
        nearest = max(1, round((num_frames - 1) / TEMPORAL) * TEMPORAL + 1)
        raise ValueError(f"num_frames = {num_frames} must be {TEMPORAL} n + 1 for the VAE; the nearest is {nearest}")
    return (num_frames - 1) // TEMPORAL + 1
