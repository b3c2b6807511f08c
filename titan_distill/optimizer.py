"""AdamW and its learning-rate schedule for one role."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from titan_distill.config.role_sections import OptimizerConfig
from titan_distill.config.sections import LrSchedulerConfig


def build_optimizer(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Builds a fused AdamW for `parameters`, plain or sharded."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: LrSchedulerConfig, num_updates: int) -> LambdaLR:
    """Builds a schedule: linear warm-up, then constant, linear or cosine decay to `min_lr_ratio` at the last update."""

    def scale(update: int) -> float:
        if update < config.warmup_steps:
            return (update + 1) / config.warmup_steps
        remaining = max(1, num_updates - 1 - config.warmup_steps)
        progress = min(1.0, (update - config.warmup_steps) / remaining)
        if config.decay == "constant":
            return 1.0
        shape = 1.0 - progress if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape

    return LambdaLR(optimizer, scale)


def set_rates(scheduler: LambdaLR) -> None:
    """Sets the optimizer's learning rates to what the schedule says at its position, which a resume has set."""
    scales = [scale(scheduler.last_epoch) for scale in scheduler.lr_lambdas]
    scheduler._last_lr = [peak * scale for peak, scale in zip(scheduler.base_lrs, scales, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
