"""Checks of the frame blocks that causal roles make videos in."""

from __future__ import annotations

from titan_distill.attention.causal import Segmentation
from titan_distill.config.config import Config
from titan_distill.models.wan.latents import TEMPORAL, num_latent_frames
from titan_distill.models.wan.pipeline_config import CAUSAL_KEYS
from titan_distill.parallelisms.compile import check_num_segments


def check_segments(config: Config) -> None:
    """Checks the segments of causal roles, and that nothing is said about segments where there are none.

    Raises ValueError with the nearest lengths that fit.
    """
    pipeline = config.pipeline_config
    if not any(role.attention == "causal" for role in config.roles.values()):
        for name in CAUSAL_KEYS:
            if (value := getattr(pipeline, name)) != getattr(type(pipeline), name):
                raise ValueError(
                    f"pipeline_config.{name} = {value} has no effect, because no role has attention = 'causal'; set it "
                    "for a role or remove the key"
                )
        return
    if pipeline.image_probability:
        raise ValueError(
            f"pipeline_config.image_probability = {pipeline.image_probability} gives first frames, which causal roles "
            "don't take; set it to 0"
        )
    segmentation = pipeline.segmentation
    check_fits(segmentation, pipeline.num_frames, "pipeline_config.num_frames")
    check_num_segments(config.compile, len(segmentation.lengths(num_latent_frames(pipeline.num_frames))))


def check_fits(segmentation: Segmentation, num_frames: int, name: str) -> None:
    """Raises ValueError, naming the nearest numbers of frames, unless whole segments make a video."""
    num_latents = num_latent_frames(num_frames)
    nearest = segmentation.nearest(num_latents)
    if num_latents not in nearest:
        first = "a first block of 1 and then " if segmentation.single_first else ""
        raise ValueError(
            f"{name} = {num_frames} makes {num_latents} latent frames, which {first}blocks of "
            f"pipeline_config.frames_per_block = {segmentation.length} don't fill; set it to "
            f"{' or '.join(str(TEMPORAL * (latents - 1) + 1) for latents in nearest)}"
        )
