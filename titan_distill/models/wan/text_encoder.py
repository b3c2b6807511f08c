"""Prompts to text embeddings, exactly as diffusers' `WanPipeline` makes them.

A prompt is cleaned, tokenised to `max_tokens`, encoded with the attention mask, and what stands after its true length
is replaced by zeros: Wan's cross-attention runs over all positions *without* a mask, so the zeros are part of what the
transformer was trained on. Prompts are encoded one at a time. That costs throughput on a GPU, but makes an embedding a
function of its prompt alone: no bit of it depends on what else was in the call.

The encoder of a real Wan is 22 GB in fp32, and most runs need it only before the first step, for the negative prompt
and the prompts of validation. So weights are loaded at the first prompt that no cache knows, `TextEncoder.release`
drops them, and `TextEncoder.cached_embedding` keeps embeddings on disk between runs.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from titan_distill.checkpoint.complete import library_loads, load_complete
from titan_distill.checkpoint.diffusers_folder import TRANSFORMERS_WEIGHTS_NAME
from titan_distill.fault_tolerance.files import atomic, fingerprint, with_umask_mode
from titan_distill.models.wan.original import open_part

logger = logging.getLogger(__name__)

_MAX_CACHED_PROMPTS = 256
_DIGEST_BYTES = 2**16


class TextEncoder:
    """UMT5 and its tokenizer from a diffusers folder; weights are loaded at the first use.

    Args:
        text_encoder: folder of the encoder, or the pipeline folder that has it as `text_encoder/`.
        tokenizer: folder of the tokenizer; `tokenizer/` beside the encoder if None.
        offload: keep weights in host memory, each layer's on `device` only while it runs.
        dtype: of the weights and the computation. Embeddings come back as fp32 in any case.

    Raises:
        ValueError: a folder is missing or holds no config or safetensors weights. At the first use: tensors of the
            network are missing, superfluous, misshapen or quantised.
    """

    def __init__(
        self,
        text_encoder: str | Path,
        tokenizer: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> None:
        folder = Path(text_encoder)
        self._folder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
        self._tokenizer_folder = Path(tokenizer) if tokenizer else self._folder.parent / "tokenizer"
        self._dtype = dtype
        self._device = torch.device(device)
        self._offload = offload
        self._can_store = True
        open_part(self._folder, "text encoder", TRANSFORMERS_WEIGHTS_NAME)
        if not self._tokenizer_folder.is_dir():
            raise ValueError(
                f"no tokenizer folder {self._tokenizer_folder}: name it if it is not beside the text encoder"
            )
        self._cached = functools.lru_cache(_MAX_CACHED_PROMPTS)(self._compute)

    def embed(self, prompt: str, max_tokens: int) -> Tensor:
        """Embedding `[num_tokens, D]` of one prompt in fp32 on the CPU, without padding, num_tokens <= max_tokens."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return self._cached(prompt_clean(prompt), max_tokens).clone()

    def encode(self, prompts: Sequence[str], max_tokens: int) -> Tensor:
        """Embeddings `[B, max_tokens, D]` in fp32 on the CPU, zero after each prompt's true length."""
        return torch.stack([padded(self.embed(prompt, max_tokens), max_tokens) for prompt in prompts])

    def cached_embedding(self, prompt: str, max_tokens: int, cache_dir: str | Path) -> Tensor:
        """`encode([prompt], max_tokens)[0]`, from a safetensors file in `cache_dir` if it has been computed before.

        The file's name is a digest of the prompt and of the encoder and tokenizer files (names, sizes, both ends of
        each), so another encoder never finds it, and of a word: earlier versions, which loaded incomplete encoders,
        stored embeddings under other names. It appears complete or not at all: any number of ranks may call this. A
        file that cannot be written is only warned of.

        Raises:
            ValueError: the cached file is damaged.
        """
        key = f"complete\0{prompt}\0{max_tokens}\0{self._dtype}\0{self.files_digest}"
        file = Path(cache_dir) / f"text-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if not os.path.isfile(file):  # False also for a folder that may not be entered
            embedding = self.embed(prompt, max_tokens)
            self._store(embedding, file)
            return padded(embedding, max_tokens)
        try:
            return padded(load_file(file)["embedding"], max_tokens)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): remove it, and it will be computed again") from error

    def release(self) -> int:
        """Drops the weights and returns their bytes; 0 if none are loaded. The next prompt loads them again."""
        model = self.__dict__.pop("_model", None)
        if model is None:
            return 0
        released = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        del model
        gc.collect()  # modules refer to each other in circles
        torch.cuda.empty_cache()  # training cannot use blocks of the encoder's sizes
        return released

    def _store(self, embedding: Tensor, file: Path) -> None:
        """Writes a cached embedding. The first one that can't be written, for example in a folder of which the user is
        only a reader, is warned of."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(file) as temporary, with_umask_mode(temporary):
                save_file({"embedding": embedding}, temporary)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            if self._can_store:
                logger.warning("text embeddings are not kept for the next run: %s", error)
            self._can_store = False

    def _compute(self, prompt: str, max_tokens: int) -> Tensor:
        num_tokens = len(self._tokenizer(prompt).input_ids)
        if num_tokens > max_tokens:
            logger.warning("prompt of %d tokens cut to %d: %.60s...", num_tokens, max_tokens, prompt)
        tokens = self._tokenizer(
            prompt, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        with torch.no_grad():
            hidden_1LD = self._model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embedding_LD = hidden_1LD[0, : min(num_tokens, max_tokens)].float().cpu()
        if not embedding_LD.isfinite().all():
            raise ValueError(f"the text encoder in {self._folder} makes values that are not finite of {prompt[:60]!r}")
        return embedding_LD

    @functools.cached_property
    def files_digest(self) -> str:
        """Digest of the files of encoder and tokenizer, from their names, sizes and both ends."""
        return "\0".join(self.digests.values())

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """The digests in `files_digest` by the name of the part."""
        folders = {"text_encoder": self._folder, "tokenizer": self._tokenizer_folder}
        return {name: fingerprint(folder, _DIGEST_BYTES) for name, folder in folders.items()}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with library_loads(self._tokenizer_folder, "tokenizer_config.json"):
            folder = self._tokenizer_folder
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            vocabularies = tokenizer.vocab_files_names.values()  # without any, the library knows special tokens only
            if vocabularies and not any((folder / name).is_file() for name in vocabularies):
                raise ValueError(f"there is none of {', '.join(vocabularies)}")
        return tokenizer

    @functools.cached_property
    def _model(self) -> Any:
        from accelerate import cpu_offload
        from transformers import UMT5Config, UMT5EncoderModel
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        model = load_complete(
            self._folder,
            lambda: UMT5EncoderModel(UMT5Config.from_pretrained(self._folder, local_files_only=True)),
            lambda: UMT5EncoderModel.from_pretrained(
                self._folder, dtype=self._dtype, local_files_only=True, use_safetensors=True
            ),
            weights_name=TRANSFORMERS_WEIGHTS_NAME,
            tied=("shared.weight", "encoder.embed_tokens.weight"),
            unused=r"^(decoder|lm_head)\.",  # of the whole model, of which this is the first half
        )
        model.requires_grad_(False).eval()
        return cpu_offload(model, self._device) if self._offload else model.to(self._device)


def padded(embedding_LD: Tensor, max_tokens: int) -> Tensor:
    """Returns an embedding with zeros after its last token, [max_tokens, D]."""
    return pad(embedding_LD, (0, 0, 0, max_tokens - len(embedding_LD)))
