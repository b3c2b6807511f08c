"""The latent space of a run, and the grids that follow from it.

Wan has two VAEs: 16 channels at 4 × 8 × 8 (frames × height × width) for 2.1 and the A14B, 48 channels at 4 × 16 × 16
for 2.2 TI2V-5B. The VAE determines the shape of a sample, the token grid and the valid sizes of a video, which are all
computed here. The values come from the VAE's config if there is one. A plan or a dry run has no files, so it uses the
published VAE with the channels of the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_distill.config.parsing import nearest_multiples
from titan_distill.fault_tolerance.files import parse_json
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.tokens import Grid, token_grid

SIZE_NAMES = ("num_frames", "height", "width")
SIZE_KEYS = tuple(f"pipeline_config.{name}" for name in SIZE_NAMES)
_PATCH = WanConfig.patch_size[1]  # of all published sizes, along height as along width


@dataclass(frozen=True)
class LatentSpace:
    """Latent space of one VAE. Compressions are in pixels or frames per latent."""

    channels: int
    temporal: int
    spatial: int

    def shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the shape (C, F, H, W) of the latents of a video, whose size is in frames and pixels."""
        return self.channels, (num_frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    def token_grid(self, num_frames: int, height: int, width: int) -> Grid:
        """Returns the tokens along (frames, height, width) of a video, whose size is in frames and pixels."""
        return token_grid(self.shape(num_frames, height, width)[1:], WanConfig.patch_size)

    def check_size(self, num_frames: int, height: int, width: int, names: Sequence[str] = SIZE_KEYS) -> None:
        """Raises ValueError if a video of this size is not a whole number of latents and tokens. `names` are the
        options of the three sizes."""
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
        """Raises ValueError if a role's network has another number of latent channels."""
        if channels != self.channels:
            raise ValueError(
                f"roles.{role} works on latents of {channels} channels, but the VAE of the run makes {self.channels}; "
                f"choose another model for it, or another pipeline_config.path"
            )


PUBLISHED = {space.channels: space for space in (LatentSpace(16, 4, 8), LatentSpace(48, 4, 16))}


def find_latent_space(pipeline: str, channels: Callable[[], int]) -> LatentSpace:
    """Returns the latent space of the VAE in the folder `pipeline`. Without a config there, it is the published one
    with `channels` channels.

    Raises ValueError for a config that can't be read, and for a number of channels that no published VAE has.
    """
    file = Path(pipeline) / "vae" / "config.json"
    if pipeline and file.is_file():
        try:
            config = parse_json(file.read_text(encoding="utf-8"))
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
"""Video frames per latent frame in all of Wan's VAEs. Only the first latent frame stands for one video frame."""


def num_latent_frames(num_frames: int) -> int:
    """Returns the number of latent frames of a video. Raises ValueError unless the video has 4 n + 1 frames."""
    if num_frames < 1 or num_frames % TEMPORAL != 1:
        nearest = max(1, round((num_frames - 1) / TEMPORAL) * TEMPORAL + 1)
        raise ValueError(f"num_frames = {num_frames} must be {TEMPORAL} n + 1 for the VAE; the nearest is {nearest}")
    return (num_frames - 1) // TEMPORAL + 1
