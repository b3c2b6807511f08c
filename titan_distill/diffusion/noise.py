"""Random noise as a function of keys, instead of a generator with a position.

With a random generator, the noise of a sample depends on the number of earlier draws on its rank, so a run on eight
ranks differs from the same run on one. Here each draw is a pure function of (seed, step, global sample id, purpose).
Any number of ranks, any layout, micro-batches and resumed jobs then get the same noise, and no state is broadcast or
saved. The price: two draws that must differ need different purposes.

Normal noise comes from a counter-based generator (`titan_kernels.philox`): CPUs and GPUs of any kind draw the same
numbers, to the last bit. 128 bits of the key's hash choose a stream of 2^64 Philox calls, and a sample's elements are
numbered in raster order. Uniforms and indices are the hash itself.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

import torch
from titan_kernels import philox_normal
from torch import Tensor

from titan_distill.diffusion.transfer import to_device

NOISE_VERSION = 2
"""Version of the noise; it increases when the same key gives different noise. Checkpoints record it. Version 1 used
PyTorch's generators, which differ between CPUs and GPUs."""


class KeyedNoise:
    """Random draws keyed by (seed, step, global sample id, purpose).

    `purpose` is a short name such as "student/score_time"; `step` counts training steps; sample ids are unique over
    the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)

    def normal(
        self,
        purpose: str,
        step: int,
        sample_ids: Sequence[int],
        shape: Sequence[int],
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return standard normal noise [B, *shape], row i belonging to sample_ids[i] alone.

        It is drawn in float32 and then cast, so that a run in another dtype sees the same noise rounded.
        """
        keys = [self._text(purpose, step, sample_id) for sample_id in sample_ids]
        return keyed_normal(keys, shape, device).to(dtype)

    def uniform(self, purpose: str, step: int, sample_ids: Sequence[int]) -> Tensor:
        """Return uniform draws in [0, 1), float64 [B] on the CPU, with 53 random bits each."""
        draws = [(self._key(purpose, step, sample_id) >> 10) * 2.0**-53 for sample_id in sample_ids]
        return torch.tensor(draws, dtype=torch.float64)

    def index(self, purpose: str, step: int, count: int) -> int:
        """Return an index in [0, count), one draw for the whole global batch and so the same on every rank."""
        assert count > 0, f"no index in a range of {count}"
        return self._key(purpose, step, None) % count

    def _key(self, purpose: str, step: int, sample_id: int | None) -> int:
        """Hash a key to 63 bits."""
        text = self._text(purpose, step, sample_id)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def _text(self, purpose: str, step: int, sample_id: int | None) -> str:
        """Returns a key as text. `purpose` is last, because only it could contain the separator."""
        whose = "batch" if sample_id is None else str(int(sample_id))
        return f"{self.seed}:{int(step)}:{whose}:{purpose}"


class FixedNoise(KeyedNoise):
    """Keyed noise that is the same at every step, for the held-out loss. `draw` counts the draws of one sample.

    No key is one of training's, so both draw independently, also from equal seeds, sample ids and purposes.
    """

    def __init__(self, seed: int, draw: int) -> None:
        super().__init__(seed)
        self.draw = draw

    def _text(self, purpose: str, step: int, sample_id: int | None) -> str:
        return super()._text(f"held out {self.draw}/{purpose}", 0, sample_id)


def keyed_generator(key: str) -> torch.Generator:
    """Returns a CPU generator that depends only on `key`, not on rank, layout or earlier draws."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_normal(keys: Sequence[str], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Returns standard normal numbers, fp32 [len(keys), *shape], drawn on `device`.

    Each row depends on its own key alone, and its element i in raster order on the key and i: the same bits on CPUs and
    GPUs, and no host wait. 128 bits of the key's hash choose the stream (`titan_kernels.philox`).
    """
    digests = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys]
    streams = [struct.unpack(">qq", digest) for digest in digests]
    streams_B2 = torch.tensor(streams, dtype=torch.int64, device="cpu").view(len(keys), 2)
    return philox_normal(to_device(streams_B2, device), math.prod(shape)).view(len(keys), *shape)
