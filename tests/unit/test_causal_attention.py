"""The causal transformer: block by block with a KV cache it computes what one masked forward over all blocks computes.

Two oracles. The whole forward (each block with a timestep of its own) is itself checked against bidirectional
attention under a boolean mask by the frame of each token. The outputs of a stream, block after block, must equal the
whole forward on the same clean past, in values and in gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from causal_oracle import DetachedPast
from mutants import is_caught
from titan_kernels import tile_layout
from torch import Tensor

from titan_distill.attention import causal
from titan_distill.attention.causal import CausalAttention, KeysAndValues, KVCache, Segmentation, TextCache
from titan_distill.attention.dense import AttentionCall, dense_attention
from titan_distill.config.sections import ActivationCheckpointConfig, CompileConfig
from titan_distill.models.wan import transformer as transformer_module
from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.layers import CrossAttention
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.activation_checkpoint import apply_activation_checkpointing
from titan_distill.parallelisms.compile import compile_blocks

CONFIG = replace(FLAVORS["tiny"], num_layers=3, causal_attention=True)
FRAMES, HEIGHT, WIDTH = 10, 5, 7
TOKENS = HEIGHT * WIDTH
SEGMENTATIONS = {
    "blocks of 5": Segmentation(5),
    "blocks of 2": Segmentation(2),
    "a frame, then blocks of 3": Segmentation(3, single_first=True),
    "window": Segmentation(2, window=4),
    "window with a sink": Segmentation(3, single_first=True, window=5, sink=2),
}


def causal_model(segmentation: Segmentation, dtype: torch.dtype = torch.float32) -> WanTransformer:
    model = WanTransformer(CONFIG, segmentation=segmentation)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # gates start at zero and would hide everything behind them
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


@dataclass
class Inputs:
    latents: Tensor
    text: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, CONFIG.in_channels, FRAMES, 2 * HEIGHT, 2 * WIDTH, generator=generator)
        return cls(latents.to(dtype), torch.randn(2, 9, CONFIG.text_dim, generator=generator).to(dtype))


def timesteps(start: int, length: int, noisy: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """Per frame: 0 for what is finished, a sample's own level for the block at `start`."""
    t = torch.zeros(2, start + length, dtype=torch.float64)
    t[:, start:] = torch.tensor(noisy, dtype=torch.float64)[:, None]
    return t.to(torch.promote_types(dtype, torch.float32))


def blocks_of(segmentation: Segmentation) -> list[tuple[int, int]]:
    starts, start = [], 0
    for length in segmentation.lengths(FRAMES):
        starts.append((start, length))
        start += length
    return starts


NOISY = (750.0, 333.0)


def by_stream(model: WanTransformer, inputs: Inputs, writes_graph: bool = False) -> list[Tensor]:
    """Each block's velocity at NOISY, given the clean blocks before it, whose context is written block after block."""
    assert model.segmentation is not None
    cache, velocities = KVCache.empty(model.segmentation, CONFIG.num_layers), []
    for start, length in blocks_of(model.segmentation):
        block, text = inputs.latents[:, :, start : start + length], inputs.text
        t = torch.tensor(NOISY, dtype=torch.promote_types(block.dtype, torch.float32))
        velocities.append(model(block, t, text, cache=cache))
        cache = cache.writable()
        with nullcontext() if writes_graph else torch.no_grad():
            model(block, torch.zeros_like(t), text, cache=cache)
        cache = cache.extended()
    return velocities


def by_whole_forwards(model: WanTransformer, inputs: Inputs) -> list[Tensor]:
    """The same from forwards over the video so far, all blocks clean but the last."""
    assert model.segmentation is not None
    velocities = []
    for start, length in blocks_of(model.segmentation):
        video = inputs.latents[:, :, : start + length]
        velocities.append(model(video, timesteps(start, length, NOISY, video.dtype), inputs.text)[:, :, start:])
    return velocities


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_blocks_with_a_cache_equal_the_whole_forward(name: str) -> None:
    inputs = Inputs.make()
    with torch.no_grad():
        model = causal_model(SEGMENTATIONS[name])
        assert largest_difference(by_stream(model, inputs), by_whole_forwards(model, inputs)) <= 1e-5


def test_in_double_precision_they_are_equal_to_its_last_digits() -> None:
    inputs, model = Inputs.make(torch.float64), causal_model(SEGMENTATIONS["window with a sink"], torch.float64)
    with torch.no_grad():
        assert largest_difference(by_stream(model, inputs), by_whole_forwards(model, inputs)) <= 1e-10


def masked_core(segmentation: Segmentation) -> type[CausalAttention]:
    """Bidirectional attention under a mask that says, frame by frame, what a block may read."""
    frame_L = torch.arange(FRAMES * TOKENS) // TOKENS
    allowed = torch.zeros(FRAMES, FRAMES, dtype=torch.bool)
    for start, length in blocks_of(segmentation):
        for frame in range(start + length):
            room = segmentation.window - segmentation.sink
            recent = not segmentation.window or start <= segmentation.window or frame >= start - room
            allowed[start : start + length, frame] = recent or frame < segmentation.sink
    mask_LL = allowed[frame_L[:, None], frame_L]

    class Masked(CausalAttention):
        def mix(self, call: AttentionCall) -> tuple[Tensor, None]:
            heads_first = (x.transpose(1, 2) for x in (call.q_BLHD, call.k_BSHD, call.v_BSHD))
            return F.scaled_dot_product_attention(*heads_first, attn_mask=mask_LL).transpose(1, 2), None

    return Masked


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_the_whole_forward_equals_masked_attention(name: str) -> None:
    """Values, and gradients of all weights, with a timestep of its own for every block."""
    segmentation, inputs = SEGMENTATIONS[name], Inputs.make()
    levels = torch.rand(2, FRAMES, generator=torch.Generator().manual_seed(3)) * 1000
    for start, length in blocks_of(segmentation):
        levels[:, start : start + length] = levels[:, start : start + 1]
    results = []
    for core in (CausalAttention, masked_core(segmentation)):
        model = causal_model(segmentation)
        with patch.object(transformer_module, "CausalAttention", core):
            velocity = model(inputs.latents, levels, inputs.text)
        velocity.square().mean().backward()
        results.append([velocity.detach(), *(p.grad for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm().clamp(min=1e-5)


def test_a_causal_model_of_one_block_is_the_bidirectional_model() -> None:
    inputs, model = Inputs.make(), causal_model(Segmentation(FRAMES))
    dense = WanTransformer(replace(CONFIG, causal_attention=False))
    dense.load_state_dict(model.state_dict())
    t = torch.tensor(NOISY)
    with torch.no_grad():
        expected = dense(inputs.latents, t, inputs.text)
        torch.testing.assert_close(model(inputs.latents, t, inputs.text), expected, rtol=1e-5, atol=1e-5)


# --- gradients


def all_gradients(model: WanTransformer, velocities: list[Tensor]) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    torch.stack([velocity.square().mean() for velocity in velocities]).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_gradients_are_those_of_the_whole_forward(checkpointing: Any) -> None:
    """With the past's graph kept they equal those of a plain forward; without it (as training has it) those of a
    forward whose past is detached. A cache that was extended in the meantime does not disturb what a checkpointed
    block recomputes."""
    segmentation, inputs = SEGMENTATIONS["window with a sink"], Inputs.make()
    model = causal_model(segmentation)
    if checkpointing == "none":
        with_graph = all_gradients(model, by_stream(model, inputs, writes_graph=True))
        assert largest_difference(with_graph, all_gradients(model, by_whole_forwards(model, inputs))) <= 1e-4
    with patch.object(transformer_module, "CausalAttention", DetachedPast):
        expected = all_gradients(model, by_whole_forwards(model, inputs))
    apply_activation_checkpointing(model.blocks, ActivationCheckpointConfig(mode=checkpointing))
    found = all_gradients(model, by_stream(model, inputs))
    assert largest_difference(found, expected) <= 1e-4
    if checkpointing == "none":
        assert largest_difference(found, with_graph) > 1e-2


@pytest.mark.nightly
def test_compiled_blocks_compute_the_same() -> None:
    """One graph without a break for each number of cached segments, with gradient and without, writing or not."""
    inputs, graphs = Inputs.make(), []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = causal_model(Segmentation(5))
    expected = all_gradients(model, by_stream(model, inputs))
    compile_blocks(model.blocks, CompileConfig(enabled=True), backend=count)
    assert largest_difference(all_gradients(model, by_stream(model, inputs)), expected) <= 1e-5
    assert 4 <= len(graphs) <= 6 * 2


# --- cache


def test_the_cache_is_bounded_over_200_blocks() -> None:
    """Bytes as they are stored: views of what is no longer needed would keep it alive."""
    segmentation = Segmentation(2, window=6, sink=1)
    model, inputs = causal_model(segmentation), Inputs.make()
    cache, sizes = KVCache.empty(segmentation, CONFIG.num_layers), []
    with torch.no_grad():
        for _ in range(200):
            cache = cache.writable()
            model(inputs.latents[:, :, :2, :4, :4], torch.zeros(2), inputs.text, cache=cache)
            cache = cache.extended()
            sizes.append(cache.num_bytes)
    frame = CONFIG.num_layers * 2 * 2 * 4 * CONFIG.inner_dim * 4  # keys and values, samples, tokens, width, fp32
    text = CONFIG.num_layers * 2 * 2 * 9 * CONFIG.inner_dim * 4
    assert sizes[0] == 2 * frame + text
    assert all(size == 6 * frame + text for size in sizes[2:])
    assert cache.num_positions == 400 and cache.num_cached == 6
    with pytest.raises(ValueError, match=r"latent frames 1023 to 1025 exceed the model's rotary range of 1024"):
        model(inputs.latents[:, :, :2], torch.zeros(2), inputs.text, cache=replace(cache, num_positions=1023))


def test_text_is_computed_once_without_gradient_and_always_with_it() -> None:
    model, inputs = causal_model(Segmentation(5)), Inputs.make()
    projected: list[bool] = []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: projected.append(torch.is_grad_enabled()))
    with torch.no_grad():
        by_stream(model, inputs)
    assert projected == [False]
    projected.clear()
    by_stream(model, inputs)
    assert projected == [True, False, True]


# --- segments


def test_segments_that_do_not_fill_a_sequence() -> None:
    assert Segmentation(3).lengths(9) == (3, 3, 3)
    assert Segmentation(3, single_first=True).lengths(7) == (1, 3, 3)
    assert Segmentation(3, single_first=True).lengths(1) == (1,)
    for segmentation, length, nearest in (
        (Segmentation(3), 10, "9 or 12"),
        (Segmentation(3), 2, "3"),
        (Segmentation(3), 0, "3"),
        (Segmentation(3, single_first=True), 6, "4 or 7"),
        (Segmentation(3, single_first=True), 0, "1 or 4"),
    ):
        with pytest.raises(ValueError, match=f"make it {nearest}$"):
            segmentation.lengths(length)


def test_how_much_is_read_on_average() -> None:
    assert Segmentation(2).num_keys(6) == (2 * 2 + 2 * 4 + 2 * 6) / 6
    assert Segmentation(2, window=2).num_keys(6) == (2 * 2 + 2 * 4 + 2 * 4) / 6
    assert math.isclose(Segmentation(3).num_keys(21), 12)


# --- mutants: each fails the test named with it


class SeesTheFuture(CausalAttention):
    def mix(self, call: AttentionCall) -> tuple[Tensor, None]:
        return (dense_attention(*call[:3]), None) if self.runs else super().mix(call)


CONTEXT, CACHED = transformer_module.token_context, Segmentation.cached


def _views(k: Tensor, v: Tensor, num_positions: int) -> tuple[KeysAndValues, ...]:
    return tuple(zip(k.chunk(num_positions, 1), v.chunk(num_positions, 1), strict=True))


def _relative_positions(*args: Any) -> Any:
    return CONTEXT(*args[:-1], 0)


def _one_frame_more(self: Segmentation, num_before: int) -> tuple[int, int]:
    sink, first = CACHED(self, num_before)
    return sink, max(sink, first - 1)


def _always_cached(self: CrossAttention, text: Tensor, cache: TextCache | None) -> KeysAndValues:
    assert cache is not None
    cache.keys_and_values = cache.keys_and_values or TEXT(self, text, None)
    return cache.keys_and_values


TEXT = CrossAttention._text_keys_and_values
MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], None]]] = {
    "blocks see the future": (
        lambda: patch.object(transformer_module, "CausalAttention", SeesTheFuture),
        lambda: test_blocks_with_a_cache_equal_the_whole_forward("blocks of 2"),
    ),
    "positions start anew in every block": (
        lambda: patch.object(transformer_module, "token_context", _relative_positions),
        lambda: test_blocks_with_a_cache_equal_the_whole_forward("blocks of 2"),
    ),
    "the window is a frame too long": (
        lambda: patch.object(Segmentation, "cached", _one_frame_more),
        lambda: test_the_whole_forward_equals_masked_attention("window"),
    ),
    "the cache holds views": (
        lambda: patch.object(causal, "by_position", _views),
        lambda: test_the_cache_is_bounded_over_200_blocks(),
    ),
    "text is cached with its first gradient": (
        lambda: patch.object(CrossAttention, "_text_keys_and_values", _always_cached),
        lambda: test_text_is_computed_once_without_gradient_and_always_with_it(),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    plant, check = MUTANTS[name]
    assert is_caught(check, plant())


def test_a_core_of_one_layer_is_a_value() -> None:
    """The cached positions of a core do not change when the cache is extended."""

    def extended(cache: KVCache) -> KVCache:
        cache = cache.writable()
        cache.cores()[0].mix(AttentionCall(*torch.ones(3, 1, 2, 1, 4), tile_layout((1, 1, 2))))
        return cache.extended()

    empty = KVCache.empty(Segmentation(1), 1)
    first = extended(empty)
    (core,) = first.cores()
    second = extended(first)
    assert [len(core.cached), first.num_cached, second.num_cached, empty.num_cached] == [1, 1, 2, 0]
    assert second.layers[0][0] is first.layers[0][0], "caches share what they have in common"
