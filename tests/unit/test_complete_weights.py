"""No network runs with a tensor that its file did not have: encoders of other libraries, damaged in every way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, TINY_WAN, tiny_argv
from safetensors.torch import load_file, save_file
from tiny_media import write_pipeline
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

from titan_distill.checkpoint.complete import load_complete
from titan_distill.models.wan.image_encoder import ImageEncoder
from titan_distill.models.wan.state_dict import check_weights, load_weights, read_config
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.models.wan.vae import encode_video, load_vae
from titan_distill.train import main

TEXT, IMAGE, VAE, TRANSFORMER = "text_encoder", "image_encoder", "vae", "transformer"
PARTS = (TEXT, IMAGE, VAE, TRANSFORMER)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose four networks have random weights, written by their own libraries."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    torch.manual_seed(1)
    clip = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(clip).save_pretrained(folder / IMAGE)
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**sizes).save_pretrained(folder / "image_processor")
    shutil.copytree(TINY_WAN / TRANSFORMER, folder / TRANSFORMER)
    return folder


@pytest.fixture
def pipeline(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "pipeline"))


def use(pipeline: Path, part: str) -> Tensor:
    """What the network of a part makes."""
    if part == TEXT:
        return TextEncoder(pipeline).embed("a red box", 16)
    if part == IMAGE:
        return ImageEncoder(pipeline).embed(torch.full((1, 28, 28, 3), 99, dtype=torch.uint8))
    if part == VAE:
        return encode_video(load_vae(pipeline, "cpu"), torch.full((1, 5, 16, 16, 3), 99, dtype=torch.uint8))
    model = WanTransformer(read_config(pipeline / part))
    load_weights(model, pipeline / part)
    return model.proj_out.weight.detach()


def weights(pipeline: Path, part: str) -> Path:
    (file,) = (pipeline / part).glob("*.safetensors")
    return file


def edit(edit_tensors: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def inflict(file: Path) -> None:
        tensors = load_file(file)
        edit_tensors(tensors)
        save_file(tensors, file, {"format": "pt"})

    return inflict


def split(file: Path) -> None:
    """Two shards with an index, of which the second is gone."""
    tensors = load_file(file)
    names = [f"{file.stem}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    halves = [dict(sorted(tensors.items())[index::2]) for index in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, file.with_name(name), {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half},
    }
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
    file.unlink()
    file.with_name(names[1]).unlink()


def replace_last(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors.update({max(tensors): change(tensors[max(tensors)])}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one missing": (edit(lambda x: x.pop(max(x))), r"safetensors lacks [12] of the \d+ tensors of its network: \S+"),
    "many missing": (edit(lambda x: [x.pop(name) for name in sorted(x)[::2]]), r"lacks \d+ of .* and \d+ more;"),
    "one more": (edit(lambda x: x.update(lora=torch.ones(2))), "safetensors has 1 that the network does not have: lor"),
    "another shape": (replace_last(lambda _: torch.ones(3, 7)), r"has \d of another shape: \S+ \(\[3, 7\] instead of"),
    "float8": (replace_last(lambda x: x.to(torch.float8_e4m3fn)), r"safetensors is quantised: 1 of \d+ .* F8_E4M3 \("),
    "integers": (replace_last(lambda x: x.to(torch.int8)), r"safetensors is quantised: 1 of \d+ .* I8 \("),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "safetensors is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "safetensors is damaged"),
    "pointer": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "a missing shard": (split, "00002-of-00002.safetensors does not exist"),
    "pickled": (lambda file: file.rename(file.with_name("x.bin")), r"does not exist; save x\.bin, which the folder ha"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_network_is_refused_in_one_sentence(pipeline: Path, part: str, damage: str) -> None:
    inflict, message = DAMAGES[damage]
    inflict(weights(pipeline, part))
    with pytest.raises(ValueError, match=message) as error:
        use(pipeline, part)
    assert str(pipeline / part) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", PARTS)
def test_a_complete_network_is_loaded_whole_or_in_shards(pipeline: Path, part: str) -> None:
    expected = use(pipeline, part)
    assert torch.equal(use(pipeline, part), expected)
    file = weights(pipeline, part)
    saved = load_file(file)
    split(file)
    missing = dict(sorted(saved.items())[1::2])
    save_file(missing, file.with_name(f"{file.stem}-00002-of-00002.safetensors"), {"format": "pt"})
    assert torch.equal(use(pipeline, part), expected)


def test_what_a_library_does_not_expect_is_one_sentence(pipeline: Path) -> None:
    config = pipeline / TEXT / "config.json"
    text = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(text | {"d_model": "wide"}), encoding="utf-8")
    with pytest.raises(ValueError, match="text_encoder cannot be loaded") as error:
        use(pipeline, TEXT)
    assert "\n" not in str(error.value)


def rename(tensors: dict[str, Tensor], name: Callable[[str], str]) -> None:
    renamed = {name(old): value for old, value in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


LEGITIMATE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "the embedding under its other name": (
        TEXT, edit(lambda x: rename(x, lambda n: "encoder.embed_tokens.weight" if n == "shared.weight" else n))
    ),
    "the embedding under both names": (
        TEXT, edit(lambda x: x.update({"encoder.embed_tokens.weight": x["shared.weight"].clone()}))
    ),
    "the whole model": (TEXT, edit(lambda x: x.update({"decoder.x": torch.ones(1), "lm_head.weight": torch.ones(1)}))),
    "the vision tower's prefix": (IMAGE, edit(lambda x: rename(x, lambda n: f"vision_model.{n}"))),
    "stored positions": (IMAGE, edit(lambda x: x.update({"embeddings.position_ids": torch.arange(5)}))),
    "an unused norm": (TRANSFORMER, edit(lambda x: x.update({"blocks.0.attn2.norm_added_q.weight": torch.ones(1)}))),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGITIMATE)
def test_what_libraries_accept_is_accepted(pipeline: Path, case: str) -> None:
    part, change = LEGITIMATE[case]
    expected = use(pipeline, part)
    change(weights(pipeline, part))
    assert torch.equal(use(pipeline, part), expected)


def test_a_published_configuration_does_not_tie_the_embedding(pipeline: Path) -> None:
    """Published Wan encoders say so, and versions of transformers then left the encoder's embedding empty."""
    expected, config = use(pipeline, TEXT), pipeline / TEXT / "config.json"
    text = json.loads(config.read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    config.write_text(json.dumps(text), encoding="utf-8")
    assert torch.equal(use(pipeline, TEXT), expected)


def test_a_library_that_leaves_a_tensor_out_is_found(pipeline: Path) -> None:
    folder = pipeline / TEXT

    def load() -> UMT5EncoderModel:
        model = UMT5EncoderModel.from_pretrained(folder)
        torch.nn.init.normal_(model.encoder.block[1].layer[0].SelfAttention.o.weight)
        return model

    def build() -> UMT5EncoderModel:
        return UMT5EncoderModel(UMT5EncoderModel.config_class.from_pretrained(folder))

    names = {"weights_name": "model.safetensors", "tied": ("shared.weight", "encoder.embed_tokens.weight")}
    load_complete(folder, build, lambda: UMT5EncoderModel.from_pretrained(folder), **names)
    with pytest.raises(ValueError, match=r"did not take encoder\.block\.1\.layer\.0\.SelfAttention\.o\.weight"):
        load_complete(folder, build, load, **names)


def test_an_embedding_that_is_not_finite_is_not_cached(pipeline: Path, tmp_path: Path) -> None:
    edit(lambda x: x["encoder.final_layer_norm.weight"].fill_(torch.inf))(weights(pipeline, TEXT))
    with pytest.raises(ValueError, match="not finite of 'blurry'"):
        TextEncoder(pipeline).cached_embedding("blurry", 16, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_gates_of_a_sparse_model_may_be_missing_but_nothing_else(pipeline: Path) -> None:
    edit(lambda x: x.pop("proj_out.bias"))(weights(pipeline, TRANSFORMER))
    with torch.device("meta"):
        model = WanTransformer(read_config(pipeline / TRANSFORMER))
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ tensors of its network: proj_out.bias"):
        check_weights(model, pipeline / TRANSFORMER)


@pytest.mark.parametrize("part", [TEXT, VAE, TRANSFORMER])
def test_check_finds_damage_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """Relative to the working directory, which the sentence names with the key."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_WAN, tmp_path / "weights")
    file = weights(tmp_path / "weights", part)
    file.write_bytes(file.read_bytes()[:-1])
    argv = tiny_argv(
        "finetune", tmp_path / "run", "--check", "--pipeline_config.path", "weights", "--roles.student.path", "weights",
        "--data.path", str(REPOSITORY / "tests/assets/tiny_shapes/latents.parquet"),
    )  # fmt: skip
    assert main(argv) == 2
    error = capsys.readouterr().err
    key = "roles.student.path" if part == TRANSFORMER else "pipeline_config.path"
    assert f"{key} = 'weights' (seen from {tmp_path}): weights file weights/{part}/" in error
    assert error.count("\n") == 1


ORIGINAL: dict[str, Callable[[Path], object]] = {
    "the class of its configuration": lambda folder: (folder / "config.json").write_text('{"_class_name": "WanModel"}'),
    "its encoders": lambda folder: (folder / "Wan2.1_VAE.pth").write_bytes(b"pickle"),
    "its text encoder": lambda folder: (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"pickle"),
    "its tensor names": lambda folder: save_file(
        {"blocks.0.self_attn.q.weight": torch.ones(2)}, folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    ),
}


@pytest.mark.parametrize("sign", ORIGINAL)
def test_the_original_format_is_recognised(tmp_path: Path, sign: str) -> None:
    ORIGINAL[sign](tmp_path)
    loaders: tuple[Callable[[Path], object], ...] = (
        read_config, TextEncoder, ImageEncoder, lambda folder: load_vae(folder, "cpu"),
    )  # fmt: skip
    for load in loaders:
        with pytest.raises(ValueError, match=r"original format.*ends in -Diffusers.*convert_wan_to_diffusers\.py"):
            load(tmp_path)
