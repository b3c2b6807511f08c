"""Noise as a function, not a stream.

A random generator with a position is the usual reason why a run on eight ranks differs from the same run on one: what a
sample gets depends on how many draws came before it on its rank. Here each draw is a pure function of
(seed, step, global sample id, purpose). Ranks, meshes, micro-batches and resumed jobs then see the same noise with
nothing to broadcast, save or restore. The price is a hash and a freshly seeded generator a draw (microseconds), and one
discipline: two draws that must differ need two purposes.

Two limits. (1) CPU and CUDA have different generators, so a key names different noise on the two, and CUDA's kernels
spread one stream over as many threads as the GPU holds, so GPU models may differ too: compare runs on one kind of
device. (2) The key has 63 bits, which CUDA uses; the CPU's Mersenne Twister reads 32 of them, so among n normal draws
about n² / 2³³ pairs coincide. Two unrelated samples then share their noise, which is harmless in training. Uniforms and
indices come from the hash itself: the same on every device and in every version.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


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
        rows = torch.empty(len(sample_ids), *shape, device=device, dtype=torch.float32)
        for row, sample_id in zip(rows, sample_ids, strict=True):
            generator = torch.Generator(device).manual_seed(self._key(purpose, step, sample_id))
            row.normal_(generator=generator)
        return rows.to(dtype)

    def uniform(self, purpose: str, step: int, sample_ids: Sequence[int]) -> Tensor:
        """Return uniform draws in [0, 1), float64 [B] on the CPU, with 53 random bits each."""
        draws = [(self._key(purpose, step, sample_id) >> 10) * 2.0**-53 for sample_id in sample_ids]
        return torch.tensor(draws, dtype=torch.float64)

    def index(self, purpose: str, step: int, count: int) -> int:
        """Return an index in [0, count), one draw for the whole global batch and so the same on every rank."""
        assert count > 0, f"no index in a range of {count}"
        return self._key(purpose, step, None) % count

    def _key(self, purpose: str, step: int, sample_id: int | None) -> int:
        """Hash a key to 63 bits. `purpose` comes last, as the only part that could contain the separator."""
        whose = "batch" if sample_id is None else str(int(sample_id))
        text = f"{self.seed}:{int(step)}:{whose}:{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
