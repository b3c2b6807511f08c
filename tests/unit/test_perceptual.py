"""Measures by networks: real libraries with small random weights in local files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from titan_distill.validation.perceptual import ClipScore, Fvd, Lpips

CPU = torch.device("cpu")


def noise(seed: int, frames: int = 3, size: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of two small towers, with a tokenizer that knows letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 12, **ends},
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_mean_cosine_of_frames_and_prompt(clip_folder: Path) -> None:
    video, prompt = noise(1, frames=20), "a red fox"
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(prompt, return_tensors="pt")
    pixels = ((video.float() / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073]))
              / torch.tensor([0.26862954, 0.26130258, 0.27577711])).permute(0, 3, 1, 2)  # fmt: skip
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(pixels).pooler_output)
        text = model.text_projection(model.text_model(**tokens).pooler_output)
    cosines = torch.nn.functional.cosine_similarity(images, text)
    assert cosines.max() > 0
    found = ClipScore(clip_folder, CPU)(video, prompt)
    assert found == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=1e-3)
    assert math.isfinite(ClipScore(clip_folder, CPU)(video, "a prompt of more tokens than the model reads"))


def test_a_clip_folder_without_all_its_tensors_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        ClipScore(tmp_path / "missing", CPU)
    for file in clip_folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"weights file .*model\.safetensors does not exist"):
        ClipScore(tmp_path, CPU)


@pytest.mark.parametrize(("measure", "package"), [(Lpips, "torchvision"), (Fvd, "cdfvd")])
def test_a_missing_package_is_one_sentence(
    measure: type, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.fvd"):
        monkeypatch.setitem(sys.modules, name, None)  # imports as if it were not installed
    with pytest.raises(ValueError, match=rf'needs a package .*{package}.*; pip install "titan_distill\[eval\]"'):
        measure(tmp_path / "weights.pth", CPU)


def torchvision_or_skip() -> None:
    """The CPU build of torch that the tests have goes with no torchvision of PyPI, whose import then fails."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs torchvision of the same build as torch: {error}")


@pytest.mark.nightly
class TestLpips:
    @pytest.fixture(autouse=True)
    def weights(self, tmp_path: Path) -> Path:
        torchvision_or_skip()
        from torchvision.models import alexnet

        torch.manual_seed(0)
        self.features = alexnet(weights=None).features.eval()
        tensors = {f"features.{name}": tensor for name, tensor in self.features.state_dict().items()}
        torch.save(tensors | {"classifier.6.bias": torch.zeros(3)}, tmp_path / "alexnet.pth")
        return tmp_path / "alexnet.pth"

    def test_distance_of_features(self, weights: Path) -> None:
        """The published formula: unit features, squared differences, weights per channel, mean over places, sum over
        layers."""
        import torchmetrics

        folder = Path(torchmetrics.__file__).parent / "functional/image/lpips_models"
        linear = torch.load(folder / "alex.pth", "cpu", weights_only=True)
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        video, other = noise(1, size=64), noise(2, size=64)
        a, b = (((2 * v.double() / 255 - 1) - shift) / scale for v in (video, other))
        a, b = (x.permute(0, 3, 1, 2).float() for x in (a, b))
        expected = torch.zeros(3)
        with torch.no_grad():
            for number, layer in enumerate(self.features):
                a, b = layer(a), layer(b)
                if number in (1, 4, 7, 9, 11):
                    index = (1, 4, 7, 9, 11).index(number)
                    unit_a, unit_b = (x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt() for x in (a, b))
                    weight = linear[f"lin{index}.model.1.weight"]
                    expected += ((unit_a - unit_b).square() * weight).sum(1).mean((1, 2))
        measure = Lpips(weights, CPU)
        assert measure(video, other) == pytest.approx(expected.mean().item(), rel=1e-4)
        assert measure(video, video) == 0

    def test_other_weights_are_refused(self, weights: Path, tmp_path: Path) -> None:
        torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
        with pytest.raises(ValueError, match="lacks 9 of the 10 tensors"):
            Lpips(tmp_path / "vgg.pth", CPU)
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(ValueError, match="is damaged or no file of weights"):
            Lpips(tmp_path / "text.pth", CPU)
        with pytest.raises(ValueError, match=r"there is no file .*missing\.pth"):
            Lpips(tmp_path / "missing.pth", CPU)


@pytest.mark.nightly
def test_fvd_is_the_frechet_distance_of_features(tmp_path: Path) -> None:
    torchvision_or_skip()
    pytest.importorskip("cdfvd")
    import scipy.linalg
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
    from cdfvd.third_party.i3d.utils import preprocess_i3d

    torch.manual_seed(0)
    network = InceptionI3d(400, in_channels=3)
    torch.save(network.state_dict(), tmp_path / "i3d.pt")
    videos = [noise(seed, frames=17, size=32) for seed in range(4)]
    measure = Fvd(tmp_path / "i3d.pt", CPU)
    for video in videos[:2]:
        measure.add_reference(video)
    for video in videos[2:]:
        measure.add(video)
    with torch.no_grad():
        features = [network.eval()(preprocess_i3d(v[None, :16].numpy())).double().numpy()[0] for v in videos]
    a, b = np.stack(features[:2]), np.stack(features[2:])
    sigma_a, sigma_b = (np.cov(x, rowvar=False, bias=True) for x in (a, b))
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sigma_a + sigma_b - 2 * root.real)
    assert measure.distance() == pytest.approx(expected, rel=1e-2)
    for video in videos[:2]:
        measure.add(video)
    assert measure.distance() == pytest.approx(0, abs=expected * 1e-2)  # the second set begins anew
    with pytest.raises(ValueError, match="FVD reads 16 frames, but a video has 9"):
        measure.add(noise(0, frames=9))


@pytest.mark.nightly
def test_weights_of_neither_network_are_refused(tmp_path: Path) -> None:
    torchvision_or_skip()
    pytest.importorskip("cdfvd")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="weights of neither I3D nor VideoMAE"):
        Fvd(tmp_path / "other.pt", CPU)
