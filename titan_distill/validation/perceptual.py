"""Measures of decoded videos by published networks: LPIPS, CLIP score and FVD.

Their weights are local files that the user names, because nothing here uses the network: a file that is missing is an
error before anything is sampled. Files of PyTorch are read as tensors only (`weights_only`), so they run no code.

    LPIPS (1801.03924)        distance of two frames in AlexNet's features, mean over frames; lower is closer
    CLIP score (2104.08718)   100 max(cos(frame, prompt), 0), mean over frames; higher follows the prompt better
    FVD (1812.01717)          Fréchet distance of two sets of videos in features of I3D or VideoMAE; lower is closer

FVD fits a Gaussian to each set. From fewer than some hundred videos it is mostly the error of that fit, and comparable
only between sets of one size.

Shapes: videos are uint8 [T, H, W, 3], on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from titan_distill.checkpoint.complete import check_tensors, library_loads, load_complete
from titan_distill.checkpoint.diffusers_folder import TRANSFORMERS_WEIGHTS_NAME

FVD_FRAMES = 16
"""Frames of a video that FVD reads, from the first one on, as published values do."""
_FRAMES_AT_ONCE = 16


class Lpips:
    """LPIPS with AlexNet. `weights` are torchvision's of AlexNet, as .pth or .safetensors; the weights of the distance
    itself come with torchmetrics.

    Raises ValueError for a missing package, and for a file that is missing or not AlexNet's.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        with _imports("LPIPS"):
            import torchvision  # noqa: F401 (torchmetrics makes AlexNet with it)
            from torchmetrics.functional.image.lpips import _NoTrainLpips

        network = _NoTrainLpips(net="alex", pnet_rand=True)
        stored = _read_tensors(weights)
        # The blocks keep the layers' numbers: `slice2.3.weight` is torchvision's `features.3.weight`.
        names = {name: "features." + name.split(".", 1)[1] for name in network.net.state_dict()}
        expected = {names[name]: tuple(tensor.shape) for name, tensor in network.net.state_dict().items()}
        features = {name: tuple(tensor.shape) for name, tensor in stored.items() if name.startswith("features.")}
        check_tensors(str(weights), expected, features, "take torchvision's weights of AlexNet")
        network.net.load_state_dict({name: stored[source] for name, source in names.items()})
        self._network, self._device = network.to(device), device

    @torch.no_grad()
    def __call__(self, video: Tensor, reference: Tensor) -> float:
        """Returns the distance of two videos of one size."""
        pairs = zip(video.split(_FRAMES_AT_ONCE), reference.split(_FRAMES_AT_ONCE))
        values = [self._network(self._pixels(a), self._pixels(b), normalize=True).flatten() for a, b in pairs]
        return torch.cat(values).mean().item()

    def _pixels(self, frames: Tensor) -> Tensor:
        return frames.to(self._device).permute(0, 3, 1, 2).float() / 255


class ClipScore:
    """CLIP score with the model, tokenizer and image processor in `folder`, as transformers saves them. A prompt that
    is longer than the model reads is cut.

    Raises ValueError for a folder that is missing or incomplete.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPProcessor

        network = load_complete(
            folder,
            lambda: CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True)),
            lambda: CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True),
            weights_name=TRANSFORMERS_WEIGHTS_NAME,
            unused=r"position_ids$",  # buffers that older versions stored
        )
        with library_loads(folder, "tokenizer and preprocessor_config.json"):
            self._process = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self._network, self._device = network.requires_grad_(False).eval().to(device), device

    @torch.no_grad()
    def __call__(self, video: Tensor, prompt: str) -> float:
        """Returns the score of a video, 0 to 100."""
        longest = self._network.config.text_config.max_position_embeddings
        text = self._process(text=[prompt], return_tensors="pt", truncation=True, max_length=longest)
        cosines = []
        for frames in video.cpu().split(_FRAMES_AT_ONCE):
            pixels = self._process(images=list(frames.numpy()), return_tensors="pt")
            found = self._network(**{name: tensor.to(self._device) for name, tensor in {**text, **pixels}.items()})
            cosines.append((found.image_embeds @ found.text_embeds.T).flatten())
        return 100 * torch.cat(cosines).clamp(min=0).mean().item()


class Fvd:
    """FVD through the package cd-fvd. `weights` are those that it publishes: of I3D, or of VideoMAE-v2.

    Raises ValueError for a missing package, and for a file that is missing or of neither network.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        with _imports("FVD"):
            from cdfvd import fvd
        stored = _read_tensors(weights)
        kind = "i3d" if any(name.startswith("Conv3d_1a_7x7.") for name in stored) else "videomae"
        if kind == "videomae" and not {"module", "model"} & stored.keys():
            raise ValueError(f"{weights} holds weights of neither I3D nor VideoMAE; take those that cd-fvd names")
        every = {"n_real": "full", "n_fake": "full"}
        with library_loads(weights, "the weights that cd-fvd names"):
            self._evaluator = fvd.cdfvd(kind, ckpt_path=str(weights), device=str(device), **every)

    def add_reference(self, video: Tensor) -> None:
        """Adds a video to the set that others are compared with. Raises ValueError for fewer than 16 frames."""
        self._evaluator.add_real_stats(_clip(video))

    def add(self, video: Tensor) -> None:
        """Adds a video to the set that `distance` compares. Raises ValueError for fewer than 16 frames."""
        self._evaluator.add_fake_stats(_clip(video))

    def distance(self) -> float:
        """Returns the distance of the two sets, and empties the second one."""
        value = float(self._evaluator.compute_fvd_from_stats())
        self._evaluator.empty_fake_stats()
        return value


def _clip(video: Tensor) -> Any:
    if len(video) < FVD_FRAMES:
        raise ValueError(f"FVD reads {FVD_FRAMES} frames, but a video has {len(video)}; leave --fvd-weights out")
    return video[None, :FVD_FRAMES].cpu().numpy()


@contextmanager
def _imports(measure: str) -> Iterator[None]:
    """Turns errors of importing the extra `eval` into a ValueError, which says how to get it."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build of torch
        raise ValueError(
            f'{measure} needs a package that cannot be imported ({error}); pip install "titan_distill[eval]", with '
            "torchvision of the same build as torch"
        ) from error


def _read_tensors(path: Path) -> dict[str, Any]:
    """Returns the tensors of a file by name. Raises ValueError for a file that is missing or holds anything else."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; docs/evaluation.md says where it comes from")
    with _reads(path):
        stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no tensors by name; copy it again")
    return stored


@contextmanager
def _reads(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of pickle, zip and safetensors, each with its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no file of weights ({reason}); copy it again") from error
