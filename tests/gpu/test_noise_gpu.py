"""Noise on a GPU: the CPU's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from philox_kernel import check_bits, check_published_words

from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.transformer import WanTransformer

WAN_720P_LATENTS = (16, 21, 90, 160)


def test_random_words_are_the_published_ones():
    check_published_words("cuda")


@pytest.mark.parametrize("num_elements", [0, 1, 2, 3, 6, 2048, 2051, 1_000_003])
def test_normals_equal_the_twins_bit_for_bit(num_elements):
    check_bits(num_elements, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keyed_noise_is_the_cpus(dtype):
    drawn = [
        KeyedNoise(3).normal("test", 7, [0, 12345678901], WAN_720P_LATENTS, device=device, dtype=dtype).cpu()
        for device in ("cuda", "cpu")
    ]
    assert torch.equal(*drawn)


def test_drawing_makes_the_host_wait_for_nothing():
    KeyedNoise(0).normal("test", 0, [1, 2], (16, 21, 60, 104), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        KeyedNoise(0).normal("test", 1, [1, 2], (16, 21, 60, 104), device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_beyond_31_bits_of_elements():
    """The last elements of a row with more than 2**31 of them, and those of the row behind it."""
    from titan_kernels import philox_normal

    num_elements = 2**31 + 5
    if 3 * 4 * num_elements > torch.cuda.get_device_properties("cuda").total_memory:
        pytest.skip("needs 26 GB of GPU memory")
    keys = torch.tensor([[1, 2], [3, 4]], device="cuda")
    drawn, start = philox_normal(keys, num_elements), philox_normal(keys, 1000)
    assert torch.equal(drawn[:, :1000], start)
    assert not torch.equal(drawn[0, -1000:], drawn[1, -1000:]) and abs(float(drawn[0, -(10**6) :].mean())) < 0.005


def test_random_weights_are_the_cpus():
    """Drawn where they live, and on the GPU for parameters on the host."""

    def model(device: str, drawn_on: str | None) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            made = WanTransformer(FLAVORS["tiny"])
        made.to(torch.bfloat16).to_empty(device=device).reset_parameters(5, drawn_on and torch.device(drawn_on))
        return {name: value.cpu() for name, value in made.state_dict().items()}

    expected = model("cpu", None)
    for found in (model("cuda", None), model("cpu", "cuda")):
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
