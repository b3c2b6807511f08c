"""Pictures to CLIP embeddings, exactly as diffusers' `WanImageToVideoPipeline` makes them.

The image processor scales and normalises, the vision tower runs, and its last layer but one is what image-to-video
models of Wan 2.1 attend to. The tower of a real Wan has 0.6 B parameters; it is loaded at the first picture.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_distill.checkpoint.complete import load_complete
from titan_distill.checkpoint.diffusers_folder import TRANSFORMERS_WEIGHTS_NAME
from titan_distill.models.wan.original import open_part

ENCODER, PROCESSOR = "image_encoder", "image_processor"


class ImageEncoder:
    """CLIP's vision tower from a diffusers pipeline's folder, which has it as image_encoder/ beside image_processor/.

    Raises:
        ValueError: a folder is missing or holds no config or safetensors weights. At the first use: tensors of the
            network are missing, superfluous, misshapen or quantised.
    """

    def __init__(self, pipeline: str | Path, *, device: torch.device | str = "cpu") -> None:
        self._encoder, self._processor = Path(pipeline) / ENCODER, Path(pipeline) / PROCESSOR
        self._device = torch.device(device)
        open_part(self._encoder, "image encoder", TRANSFORMERS_WEIGHTS_NAME)
        if not (self._processor / "preprocessor_config.json").is_file():
            raise ValueError(f"no image processor in {self._processor}: expected preprocessor_config.json")

    @torch.no_grad()
    def embed(self, images_BHW3: Tensor) -> Tensor:
        """Embeddings [B, tokens, D] in fp32 of uint8 pictures."""
        pixels = self._processing(images=list(images_BHW3.cpu().numpy()), return_tensors="pt").pixel_values
        return self._model(pixel_values=pixels.to(self._device), output_hidden_states=True).hidden_states[-2].float()

    @functools.cached_property
    def _processing(self) -> Any:
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor.from_pretrained(self._processor, local_files_only=True)

    @functools.cached_property
    def _model(self) -> Any:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        model = load_complete(
            self._encoder,
            lambda: CLIPVisionModel(CLIPVisionConfig.from_pretrained(self._encoder, local_files_only=True)),
            lambda: CLIPVisionModel.from_pretrained(
                self._encoder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            ),
            weights_name=TRANSFORMERS_WEIGHTS_NAME,
            prefix="vision_model.",  # versions of transformers differ in it, and read either form
            # The text tower and what stands beside the two; and a buffer that older versions stored.
            unused=r"^(text_model|text_projection|visual_projection|logit_scale)\b|position_ids$",
        )
        return model.requires_grad_(False).eval().to(self._device)
