"""Low-rank adapters (LoRA, arXiv 2106.09685): train two thin matrices beside each weight, and leave the weight alone.

A linear layer becomes `W x + s B (A x)` with A [rank, inputs] and B [outputs, rank]; s is alpha / rank. Gradients,
optimizer moments, EMA and checkpoints then contain only the LoRA adapters, at rank 64 about 2 % of a 14B model. The
base weights can be stored in the compute dtype, like any frozen weight. The price is two thin products per layer, a
rounding difference between the model with LoRA adapters and the merged model, and updates of low rank.

The layers are `peft`'s. B starts at zero, so the model first equals its base, bit for bit. The random values of A are
keyed by the parameter's name, so they do not depend on the layout. Dropout is not offered, because its random numbers
would depend on the number of ranks.

`peft` wraps a layer, which renames its weight: `to_q.weight` becomes `to_q.base_layer.weight` beside
`to_q.lora_A.default.weight` and `to_q.lora_B.default.weight`. Only the functions at the end of this file know these
names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from titan_distill.config.role_sections import LoraConfig
from titan_distill.diffusion.noise import keyed_normal

T = TypeVar("T")

BASE, A, B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def apply_lora(module: nn.Module, config: LoraConfig, *, excluded: Collection[str]) -> None:
    """Gives linear layers of `module`, which is on the meta device, fp32 LoRA adapters, and freezes everything else.

    Args:
        module: a model that is not sharded yet.
        config: the LoRA settings; without `enabled` nothing is changed.
        excluded: names of submodules, at any depth, whose layers get no LoRA adapter.

    Raises:
        ValueError: an entry of `target_modules` matches no linear layer.
    """
    if not config.enabled:
        return
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = _targets(module, config.target_modules, excluded)
    adapters = PeftConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,
        target_modules=targets,
        init_lora_weights=False,
    )
    inject_adapter_in_model(adapters, module, low_cpu_mem_usage=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def linear_layers(module: nn.Module, excluded: Collection[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Returns the linear layers by name, except those inside the submodules `excluded`, at any depth."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and set(name.split(".")).isdisjoint(excluded):
            yield name, layer


def initial_adapters(module: nn.Module, seed: int, device: torch.device) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields each parameter of the LoRA adapters with its initial value, unsharded and on `device`.

    A is normal, as in the paper, with the variance of the paper's code, 1 / (3 inputs). B is zero.
    """
    for name, parameter in module.named_parameters():
        if A in name:
            std = 1 / math.sqrt(3 * parameter.shape[1])
            yield parameter, keyed_normal([f"{seed}/{name}"], parameter.shape, device)[0].mul_(std)
        elif B in name:
            yield parameter, torch.zeros(parameter.shape, device=device)


def describe(config: LoraConfig, module: nn.Module) -> str:
    """Returns a phrase for the banner: the number of layers with LoRA adapters and of trained parameters."""
    sizes = [p.numel() for name, p in module.named_parameters() if is_adapter(name)]
    return f"LoRA of rank {config.rank} on {len(sizes) // 2} layers, {sum(sizes) / 1e6:,.1f} M trained"


def is_adapter(name: str) -> bool:
    """Returns whether `name` is that of a LoRA adapter's parameter."""
    return A in name or B in name


def without_adapters(named: Mapping[str, T]) -> dict[str, T]:
    """Yields the base parameters under the names that they have in a model without LoRA adapters."""
    return {name.replace(BASE, "."): value for name, value in named.items() if not is_adapter(name)}


@torch.no_grad()
def merge(name: str, weight: Tensor, adapters: Mapping[str, Tensor], scale: float) -> Tensor:
    """Returns the base tensor `name` with its LoRA adapter added, if it has one.

    The result is fp32, because rounding to a bf16 base would lose small changes.
    """
    layer, _, leaf = name.rpartition(".")
    a, b = (adapters.get(f"{layer}{part}{leaf}") for part in (A, B))
    if a is None or b is None:
        return weight.float()
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def _targets(module: nn.Module, wanted: Collection[str], excluded: Collection[str]) -> list[str]:
    linears = [name for name, _ in linear_layers(module, excluded)]
    for target in wanted:
        if not any(_ends_with(name, target) for name in linears):
            known = sorted({name.removeprefix("blocks.0.") for name in linears if name.startswith("blocks.0.")})
            raise ValueError(
                f"lora.target_modules has {target!r}, which names no linear layer of the blocks; they have "
                f"{', '.join(known)}"
            )
    return [name for name in linears if not wanted or any(_ends_with(name, target) for target in wanted)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
