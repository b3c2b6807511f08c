"""Text embeddings: those of WanPipeline, to the bit, and a cache that no other encoder can mistake for its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from tiny_media import write_pipeline
from transformers import ByT5Tokenizer, UMT5EncoderModel

from titan_distill.models.wan.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def test_embeddings_equal_the_pipelines(pipeline_folder: Path) -> None:
    prompts = ["a  red\tball &amp; a box", "", "a much longer prompt " * 5]
    pipeline = WanPipeline(
        tokenizer=ByT5Tokenizer.from_pretrained(pipeline_folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(pipeline_folder / "text_encoder"),
        vae=None,
        scheduler=UniPCMultistepScheduler(),
        transformer=None,
    )
    encoder = TextEncoder(pipeline_folder)
    embeddings = encoder.encode(prompts, max_tokens=32)
    assert embeddings.shape == (3, 32, 16)
    assert embeddings.dtype == torch.float32
    for prompt, embedding in zip(prompts, embeddings, strict=True):
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=32)
        assert torch.equal(embedding, expected[0])
    assert (embeddings[1, 1:] == 0).all()
    assert (embeddings[2] != 0).all(dim=-1).all()
    assert torch.equal(encoder.encode(prompts[:1], 32)[0], embeddings[0]), "whatever else is in the call"


def test_a_prompt_that_is_cut_is_reported(pipeline_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    TextEncoder(pipeline_folder).embed("0123456789", max_tokens=11)
    assert not caplog.records
    TextEncoder(pipeline_folder).embed("0123456789", max_tokens=10)
    assert "prompt of 11 tokens cut to 10: 0123456789" in caplog.text


def test_cached_embedding_needs_no_encoder(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TextEncoder(pipeline_folder).cached_embedding("blurry", 32, tmp_path)
    assert torch.equal(first, TextEncoder(pipeline_folder).encode(["blurry"], 32)[0])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", refuse)
    assert torch.equal(TextEncoder(pipeline_folder).cached_embedding("blurry", 32, tmp_path), first)
    for prompt, max_tokens in (("Blurry", 32), ("blurry", 16)):
        with pytest.raises(AssertionError, match="the encoder was loaded"):
            TextEncoder(pipeline_folder).cached_embedding(prompt, max_tokens, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"], "no temporary left"


def test_repeated_prompts_are_encoded_once(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(pipeline_folder)
    encoder.embed("a box", 32).zero_()
    monkeypatch.setattr(encoder._model, "forward", None)
    assert encoder.encode(["a  box "], 32).any(), "the caller's copy is its own"


def test_cached_embedding_is_bound_to_the_weights(pipeline_folder: Path, tmp_path: Path) -> None:
    """Another encoder of the same architecture, so with files of the same names and sizes, is another key."""
    first = TextEncoder(pipeline_folder).cached_embedding("blurry", 32, tmp_path / "cache")
    other = UMT5EncoderModel.from_pretrained(pipeline_folder / "text_encoder")
    with torch.no_grad():
        other.shared.weight.mul_(2)
    other.save_pretrained(tmp_path / "text_encoder")
    encoder = TextEncoder(tmp_path / "text_encoder", pipeline_folder / "tokenizer")
    assert not torch.equal(encoder.cached_embedding("blurry", 32, tmp_path / "cache"), first)


def test_damaged_cache_is_named(pipeline_folder: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(pipeline_folder)
    encoder.cached_embedding("blurry", 32, tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*: remove it"):
        encoder.cached_embedding("blurry", 32, tmp_path)


def test_an_embedding_that_cannot_be_kept_is_computed(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the way stands for a folder of which the user is only a reader, which root writes to all the same."""
    (tmp_path / "run").touch()
    encoder = TextEncoder(pipeline_folder)
    found = [encoder.cached_embedding(prompt, 32, tmp_path / "run" / "cache") for prompt in ("blurry", "grey")]
    assert torch.equal(torch.stack(found), encoder.encode(["blurry", "grey"], 32))
    (line,) = [record.message for record in caplog.records if "not kept" in record.message]
    assert "\n" not in line and str(tmp_path / "run") in line
