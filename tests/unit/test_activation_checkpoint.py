"""Checkpointing changes what is stored and recomputed, and nothing else."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from titan_kernels import reference
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from benchmarks.activation_memory import MODES, peak_bytes
from titan_distill.attention.sparse import SparseAttention
from titan_distill.config.sections import ActivationCheckpointConfig, SparseAttentionConfig
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.observability.flops import block_matmuls, forward_flops, recomputed_share
from titan_distill.parallelisms import activation_checkpoint
from titan_distill.parallelisms.activation_checkpoint import (
    _Policy,
    apply_activation_checkpointing,
    describe,
    register_attention,
)

CONFIGS = {
    "full": ActivationCheckpointConfig(mode="full"),
    "selective 1": ActivationCheckpointConfig(mode="selective", selective_interval=1),
    "selective 2": ActivationCheckpointConfig(mode="selective"),
    "selective 3": ActivationCheckpointConfig(mode="selective", selective_interval=3),
    "selective 1 but hidden": ActivationCheckpointConfig(mode="selective", selective_interval=1, store_hidden=False),
    "full with skip": ActivationCheckpointConfig(mode="full", skip_interval=2),
    "selective with skip": ActivationCheckpointConfig(mode="selective", skip_interval=4),
}
NONE = ActivationCheckpointConfig()


def tiny(config: ActivationCheckpointConfig) -> WanTransformer:
    """A tiny Wan whose gates and head are open, so that every parameter has a gradient."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WanTransformer(FLAVORS["tiny"])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_activation_checkpointing(model.blocks, config, hidden_width=FLAVORS["tiny"].ffn_dim)
    return model


def loss(model: WanTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, 7, 64, generator=generator)
    return model(latents, torch.tensor([500.0]), text).square().mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_bitwise_those_without(name: str) -> None:
    plain, checkpointed = tiny(NONE), tiny(CONFIGS[name])
    loss(plain).backward()
    loss(checkpointed).backward()
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    for (key, expected), (other, found) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert key == other
        assert expected.grad is not None and expected.grad.any() and torch.equal(found.grad, expected.grad), key


@pytest.mark.parametrize(
    ("name", "expected"),
    [("full", [2, 2, 2, 2, 2, 2]), ("full with skip", [2, 1, 2, 1, 2, 1]), ("selective with skip", [2, 2, 2, 1, 2, 2])],
)
def test_skipped_blocks_run_once_and_hooks_of_all_blocks_run_once(name: str, expected: list[int]) -> None:
    model = tiny(CONFIGS[name])
    inside: Counter[int] = Counter()
    outside: Counter[int] = Counter()
    for index, block in enumerate(model.blocks):
        block.norm1.register_forward_pre_hook(lambda *_, index=index: inside.update([index]))
        block.register_forward_pre_hook(lambda *_, index=index: outside.update([index]))  # where FSDP gathers
    loss(model).backward()
    assert [inside[index] for index in range(6)] == expected
    assert [outside[index] for index in range(6)] == [1] * 6


def counted_flops(config: ActivationCheckpointConfig) -> int:
    """Forward and backward, with the fused CPU kernel of attention counted as torch counts its siblings."""

    def attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop(q, k, v)

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop(grad, q, k, v)

    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    model = tiny(config)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counted:
        loss(model).backward()
    return counted.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_share_equals_torchs_own_count(name: str) -> None:
    config, num_tokens, num_text = FLAVORS["tiny"], 2 * 4 * 4, 7
    recomputed = counted_flops(CONFIGS[name]) - counted_flops(NONE)
    share = recomputed_share(config, CONFIGS[name], num_tokens, num_text)
    assert share * forward_flops(config, num_tokens, num_text).total == pytest.approx(recomputed, rel=1e-12)
    assert recomputed > 0 or name == "selective 1"


def test_without_the_hidden_activations_one_product_per_block_is_recomputed() -> None:
    config, checkpointing = FLAVORS["tiny"], CONFIGS["selective 1 but hidden"]
    recomputed = counted_flops(checkpointing) - counted_flops(NONE)
    assert recomputed == config.num_layers * 2 * (2 * 4 * 4) * config.inner_dim * config.ffn_dim


def test_matmuls_of_a_block_add_up_to_the_forward() -> None:
    config = FLAVORS["1.3B"]
    forward, attention = forward_flops(config, 1000, 100), 4 * 1000 * (1000 + 100) * config.inner_dim
    blocks = config.num_layers * (sum(block_matmuls(config, 1000, 100)) + attention)
    assert blocks == forward.total - forward.embeddings


def test_policy_answers_alike_when_asked_again_in_the_recomputation() -> None:
    """PyTorch up to 2.12 asks twice; the second round must not go on counting where the first stopped."""
    policy = _Policy(ActivationCheckpointConfig(mode="selective", selective_interval=2))

    def ask(is_recompute: bool) -> list[CheckpointPolicy]:
        context = SelectiveCheckpointContext(is_recompute=is_recompute)
        return [policy(context, torch.ops.aten.mm.default) for _ in range(5)]

    first, again = ask(False), ask(True)
    assert first == again
    assert [answer is CheckpointPolicy.MUST_SAVE for answer in first] == [False, True, False, True, False]


def test_a_registered_operation_is_kept() -> None:
    num_runs = 0

    @torch.library.custom_op("titan_test::attention", mutates_args=())
    def attention(x: Tensor) -> Tensor:
        nonlocal num_runs
        num_runs += 1
        return x.exp()

    attention.register_autograd(
        lambda ctx, grad: grad * ctx.saved_tensors[0],
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    )

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.titan_test.attention(x).sin()

    for registered, expected in ((False, 2), (True, 1)):
        if registered:
            register_attention(torch.ops.titan_test.attention.default)
        block, num_runs = Block(), 0
        apply_activation_checkpointing([block], CONFIGS["selective 2"])
        block(torch.ones(3, requires_grad=True)).sum().backward()
        assert num_runs == expected


def sparse_tiny(config: ActivationCheckpointConfig) -> WanTransformer:
    """Two of eight tiles are selected, and gates are open."""
    torch.manual_seed(0)
    core = SparseAttention(SparseAttentionConfig(sparsity=0.75))
    with torch.device("meta"):
        model = WanTransformer(replace(FLAVORS["tiny"], num_layers=3, sparse_attention=True), core)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_activation_checkpointing(model.blocks, config, selects=True, hidden_width=FLAVORS["tiny"].ffn_dim)
    return model


def sparse_gradients(model: WanTransformer) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 5, 10, 10, generator=generator)
    model(latents, torch.tensor([500.0]), torch.randn(1, 7, 64, generator=generator)).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class Runs:
    """Counts how often a kernel runs, and gives selections made in a recomputation another outcome."""

    def __init__(self, patch: pytest.MonkeyPatch, *names: str) -> None:
        self.count: Counter[str] = Counter()
        for name in names:
            patch.setattr(reference, name, functools.partial(self.run, name, getattr(reference, name)))

    def run(self, name: str, kernel: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        self.count[name] += 1
        if name == "block_topk" and self.count[name] > 3:  # three blocks have selected already
            x = torch.rand(x.shape, generator=torch.Generator().manual_seed(self.count[name]))
        return kernel(x, *args)


@pytest.mark.parametrize("name", ["none", *CONFIGS])
def test_a_selection_is_made_once_in_every_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sparse_gradients(sparse_tiny(NONE))
    runs = Runs(monkeypatch, "block_topk", "vsa_forward")
    found = sparse_gradients(sparse_tiny(CONFIGS.get(name, NONE)))
    assert runs.count["block_topk"] == 3
    # Coarse and fine branch: three blocks, and those of them that keep no attention again.
    recomputed = {"full": 3, "full with skip": 2}.get(name, 0)
    assert runs.count["vsa_forward"] == 2 * (3 + recomputed)
    assert found.keys() == expected.keys() and len(found) > 3 * 20
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())


def test_a_selection_made_anew_would_change_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sparse_gradients(sparse_tiny(NONE))
    monkeypatch.setattr(activation_checkpoint, "_SELECTIONS", set())
    runs = Runs(monkeypatch, "block_topk")
    found = sparse_gradients(sparse_tiny(CONFIGS["full"]))
    assert runs.count["block_topk"] == 6
    gradient = found["blocks.0.attn1.to_q.weight"] - expected["blocks.0.attn1.to_q.weight"]
    assert gradient.norm() > 1e-2 * expected["blocks.0.attn1.to_q.weight"].norm()


def test_full_checkpointing_of_dense_blocks_looks_at_no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpoint, "_Policy", None)
    loss(tiny(CONFIGS["full"])).backward()
    with pytest.raises(TypeError):
        sparse_gradients(sparse_tiny(CONFIGS["full"]))


def test_peak_memory_falls_from_none_over_selective_to_full() -> None:
    config = WanConfig(
        num_layers=4, num_attention_heads=4, attention_head_dim=16, ffn_dim=256, text_dim=64, freq_dim=64
    )
    peaks = {mode: peak_bytes(config, MODES[mode], grid=(4, 16, 16)) for mode in MODES}
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    assert peaks["full"] < peaks["full, skip 2"] < peaks["none"]


def test_descriptions() -> None:
    assert describe(NONE) == "no activation recomputed"
    assert describe(CONFIGS["full"]) == "full: saves each block's input"
    assert describe(CONFIGS["selective 1"]) == "selective: saves attention outputs and every matmul"
    assert describe(CONFIGS["selective 2"]) == "selective: saves attention outputs and 1 of 2 matmuls"
    assert describe(CONFIGS["selective 1 but hidden"]).endswith("and every matmul but the feed-forward's first")
    assert describe(CONFIGS["selective with skip"]).endswith("1 of 2 matmuls, all of 1 of 4 blocks")
    eleven = ActivationCheckpointConfig(mode="selective", selective_interval=11, skip_interval=23)
    assert describe(eleven).endswith("1 of 11 matmuls, all of 1 of 23 blocks")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"mode": "full", "selective_interval": 2}, 'selective_interval = 2 has no effect with mode = "full"'),
        ({"skip_interval": 2}, 'skip_interval = 2 has no effect with mode = "none"'),
        ({"mode": "full", "store_hidden": False}, 'store_hidden = false has no effect with mode = "full"'),
        ({"mode": "full", "skip_interval": 1}, "leaves all blocks"),
        ({"mode": "selective", "selective_interval": 0}, "selective_interval = 0 is out of range"),
        ({"mode": "full", "skip_interval": -1}, "skip_interval = -1 is out of range"),
    ],
)
def test_options_without_effect_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ActivationCheckpointConfig(**values)
