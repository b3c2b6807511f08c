"""Float8 matrix products: twice the tensor-core rate of bf16 on Ada, Hopper and later, for two casts per operand.

Weights are stored in fp32 or bf16 under their old names. Inputs, weights and gradients are scaled and cast just before
each product. One scale per *tensor* is fastest; one scale per *row* is robust against single outliers; one scale per
row with weight gradients in high precision is most accurate. Casting reads and writes the operands once more, which
makes small layers slower. Small layers, and layers that compute timesteps and modulation, where accuracy matters, stay
in high precision.

The default backend is `torchao`. It also lets FSDP2 gather weights in float8. Its *emulation* rounds operands the same
way and multiplies in fp32, so it shows float8's numerics on any machine. The backend `transformer_engine` has its own
kernels and is an optional dependency. This project has tested only its error message, not its kernels.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_distill.config.sections import Float8Config
from titan_distill.parallelisms.lora import linear_layers
from titan_distill.parallelisms.pinned import local_storage

ALIGNMENT = 16
"""Divisor of the matrix sizes that float8 kernels accept."""

MIN_CAPABILITY = (8, 9)
"""Lowest CUDA compute capability with float8 tensor cores (Ada)."""


def apply_float8(
    module: nn.Module, config: Float8Config, *, high_precision: Collection[str], device: torch.device
) -> None:
    """Swaps the large linear layers of `module`, in place, for layers that compute in float8.

    Args:
        module: a model that is not sharded yet.
        config: the float8 settings; without `enabled` nothing is changed.
        high_precision: names of submodules, at any depth, that are not changed.
        device: device on which the model will run. `meta` (a dry run) skips the check of the hardware.

    Raises:
        ValueError: this machine cannot run it, or no layer is large enough.
    """
    if not config.enabled:
        return
    if device.type != "meta":
        check_hardware(config, device)
    layers = list(_large_linears(module, config.min_features, high_precision))
    if not layers:
        raise ValueError(
            "float8.enabled = true, but no linear layer has input and output sizes of at least float8.min_features "
            f"= {config.min_features} that {ALIGNMENT} divides; lower it, or set float8.enabled to false"
        )
    swap = _torchao_layer if config.backend == "torchao" else _transformer_engine_layer
    for name, layer in layers:
        module.set_submodule(name, swap(layer, config))


def finish_float8(module: nn.Module, config: Float8Config) -> None:
    """Adds a hook that computes all weight scales in one reduction before each forward, for float8 all-gather under
    FSDP.

    Without it each weight would need its own reduction of its maximum when it is gathered. Scales are computed before
    each forward, and not only after optimizer steps, because EMA swaps and loaded checkpoints change weights, too.

    Raises:
        ValueError: `module` is not sharded.
    """
    if not (config.enabled and config.all_gather):
        return
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError(
            "float8.all_gather = true has no effect in a run without FSDP; start more ranks or set it to false"
        )
    # Before FSDP's own hook, which gathers.
    module.register_forward_pre_hook(
        lambda module, args: precompute_float8_dynamic_scale_for_fsdp(module), prepend=True
    )


def check_hardware(config: Float8Config, device: torch.device) -> None:
    """Raises ValueError unless `config` can run on `device`."""
    if not config.enabled:
        return
    if config.backend == "transformer_engine":
        _transformer_engine()
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    if not (capable or config.emulate):
        remedy = "set float8.emulate to true for a test" if config.backend == "torchao" else "use another machine"
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
        raise ValueError(
            f"float8.enabled = true needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later "
            f"(Ada, Hopper), but this machine has {found}; {remedy}, or set float8.enabled to false"
        )


def describe(config: Float8Config, module: nn.Module) -> str:
    """Returns a phrase for the banner: the number of linear layers that compute in float8, recipe and backend."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) or _is_float8(m)]
    extras = ", gathered in float8" * config.all_gather + ", emulated" * config.emulate
    return (
        f"float8 {config.recipe} by {config.backend} in {sum(map(_is_float8, linears))} of {len(linears)} linear "
        f"layers{extras}"
    )


def _large_linears(
    module: nn.Module, min_features: int, high_precision: Collection[str]
) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in linear_layers(module, high_precision):
        sizes = (layer.in_features, layer.out_features)
        # Exactly nn.Linear: a subclass computes in a way of its own, which a swap would lose.
        if type(layer) is nn.Linear and all(size >= min_features and size % ALIGNMENT == 0 for size in sizes):
            yield name, layer


def _is_float8(module: nn.Module) -> bool:
    return getattr(module, "computes_in_float8", False)


def _torchao_layer(layer: nn.Linear, config: Float8Config) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = replace(
        Float8LinearConfig.from_recipe_name(config.recipe),
        emulate=config.emulate,
        enable_fsdp_float8_all_gather=config.all_gather,
    )
    swapped = convert_to_float8_training(layer, config=recipe)
    swapped.computes_in_float8 = True
    # A bound method, not a partial: the compiler would guard on the identity of that, and compile every layer anew.
    swapped.compute = types.MethodType(_torchao_product, swapped)
    if config.all_gather:
        swapped.register_state_dict_post_hook(_plain_weight)
    return swapped


def _torchao_product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `layer`'s float8 product with the given `weight` and `bias`, e.g. a tensor-parallel shard, which then
    has its own scale."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    product = matmul_with_hp_or_float8_args.apply(x, weight.t(), layer.linear_mm_config, layer.config)
    return product if bias is None else product + bias.to(product.dtype)


def _plain_weight(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook that removes torchao's wrapper from the weight, so that checkpoints and exports contain a plain
    tensor.

    FSDP needs the wrapper around the parameter. Both share their storage, so loading a checkpoint into the state fills
    the parameter.
    """
    weight = state[f"{prefix}weight"]
    local = local_storage(weight)
    if isinstance(weight, DTensor):
        local = DTensor.from_local(
            local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
    state[f"{prefix}weight"] = local


def _transformer_engine() -> Any:
    try:
        import transformer_engine.pytorch as te
    except (ImportError, RuntimeError) as error:  # the latter is how the meta-package says that it is empty
        raise ValueError(
            "float8.backend = 'transformer_engine', but that library cannot be imported "
            f"({type(error).__name__}); run pip install 'titan_distill[transformer-engine]' or set float8.backend to "
            "'torchao'"
        ) from error
    return te


def _transformer_engine_layer(layer: nn.Linear, config: Float8Config) -> nn.Module:
    te = _transformer_engine()
    from transformer_engine.common.recipe import Float8CurrentScaling

    recipe = Float8CurrentScaling()

    class Float8Linear(te.Linear):  # type: ignore[name-defined]
        """te.Linear in float8 with the state dict of an nn.Linear, because current scaling has no history to save."""

        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state
        computes_in_float8 = True

        def forward(self, x: Tensor) -> Tensor:
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                return super().forward(x)

    swapped = Float8Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        params_dtype=layer.weight.dtype,
        device="meta",
    )
    swapped.weight, swapped.bias = layer.weight, layer.bias
    return swapped
