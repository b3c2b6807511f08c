"""Recording of trajectories: a teacher's ODE sampling that also returns some of its intermediate states.

A solver visits a fixed list of noise levels, its *grid*, and what it holds there is a state: the latents that the
network is shown. A student that learns trajectories (CausVid 2412.07772, Self-Forcing 2506.08009) is fed the states of
a few levels, so these levels must be on the grid. The nearest state would not do: the student would be told one level
while its input has another, and would learn a wrong map at a loss that looks right. A level that is not on the grid is
therefore an error, raised before any forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_distill.diffusion.sampler import Predictor, Solver, grid_sigmas, sample_ode
from titan_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS

TIMESTEP_TOLERANCE = 0.01
"""Largest difference of two timesteps that count as equal. It allows for timesteps printed with two decimals."""


def grid_indices(sigmas: Sequence[float], *, num_steps: int, shift: float, solver: Solver) -> list[int]:
    """Return which states of a solver have these noise levels; state 0 is the initial noise.

    Raises ValueError, naming the nearest states, for a level that the solver does not visit. The end, level 0, is no
    state that the network is shown.
    """
    grid = grid_sigmas(num_steps, shift, solver)[:-1] * NUM_TRAIN_TIMESTEPS
    indices = []
    for sigma in sigmas:
        distance = (grid - sigma * NUM_TRAIN_TIMESTEPS).abs()
        if distance.min() > TIMESTEP_TOLERANCE:
            nearest = distance.topk(min(2, num_steps), largest=False).indices.sort().values.tolist()
            raise ValueError(
                f"timestep {sigma * NUM_TRAIN_TIMESTEPS:.2f} is not on the grid of {solver} with {num_steps} steps at "
                f"shift {shift:g}, whose nearest are {' and '.join(f'{float(grid[i]):.2f}' for i in nearest)}; choose "
                "these, or another solver or number of steps"
            )
        indices.append(int(distance.argmin()))
    return indices


def sample_trajectory(
    predict_velocity: Predictor, noise: Tensor, indices: Sequence[int], *, num_steps: int, shift: float, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Return the states [B, K, ...] at the ascending grid `indices`, and the end [B, ...], of `sample_ode` from
    `noise`.

    A solver shows the network each of its states once and in order, so watching the network is enough.
    """
    states: list[Tensor] = []
    num_seen = 0

    def watched(x: Tensor, sigma_B: Tensor) -> Tensor:
        nonlocal num_seen
        if num_seen in indices:
            states.append(x)
        num_seen += 1
        return predict_velocity(x, sigma_B)

    x0 = sample_ode(watched, noise, num_steps=num_steps, shift=shift, solver=solver)
    assert len(states) == len(indices)
    return torch.stack(states, 1), x0
