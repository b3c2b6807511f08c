"""Peak activation memory by checkpointing mode: `python -m benchmarks.activation_memory --out FILE`.

PyTorch's profiler records every allocation and release of CPU memory during a forward and backward; the highest sum of
what is alive, above what was alive before, is the peak. Weights and gradients exist before, so that what is left is
activations, their gradients and temporary buffers. Allocations do not depend on time or load: the figures repeat. On a
GPU they would differ where kernels need other workspaces, not where activations are kept or dropped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import write_result
from titan_distill.config.sections import ActivationCheckpointConfig
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.activation_checkpoint import apply_activation_checkpointing

MODES = {
    "none": ActivationCheckpointConfig(),
    "selective": ActivationCheckpointConfig(mode="selective"),
    "full, skip 2": ActivationCheckpointConfig(mode="full", skip_interval=2),
    "full": ActivationCheckpointConfig(mode="full"),
}

WIDE = WanConfig(num_layers=6, num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, text_dim=256)

NUM_TEXT_TOKENS = 64
MIB = 2**20


def peak_bytes(config: WanConfig, checkpointing: ActivationCheckpointConfig, grid: tuple[int, int, int]) -> int:
    """Peak of live bytes above weights and gradients in one forward and backward of one sample, fp32.

    `grid` counts latents: frames, height, width.
    """
    model = WanTransformer(config)
    apply_activation_checkpointing(model.blocks, checkpointing)
    latents = torch.zeros(1, config.in_channels, *grid)
    text = torch.zeros(1, NUM_TEXT_TOKENS, config.text_dim)

    def step() -> None:
        model(latents, torch.zeros(1), text).sum().backward()

    step()  # gradients and cached phases come into being
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return max(accumulate(_allocations(profiler)))


def _allocations(profiler: profile) -> list[int]:
    """Bytes allocated (released where negative), in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def main() -> None:
    """Measures and prints; with --out also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = {"tiny": (FLAVORS["tiny"], (5, 12, 12)), "512 wide": (WIDE, (5, 24, 24))}
    print(f"{'':<10}" + "".join(f"{mode:>18}" for mode in MODES))
    results = {}
    for name, (config, grid) in sizes.items():
        peaks = {mode: peak_bytes(config, checkpointing, grid) for mode, checkpointing in MODES.items()}
        cells = (f"{peak / MIB:8.1f} MiB {peak / peaks['none']:4.0%}" for peak in peaks.values())
        print(f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells))
        num_tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
        results[name] = {"num_tokens": num_tokens, "layers": config.num_layers, "peak_bytes": peaks}
    if arguments.out:
        write_result(arguments.out, {"command": "activation_memory", "dtype": "float32", "models": results})


if __name__ == "__main__":
    main()
