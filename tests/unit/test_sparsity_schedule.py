"""The sparsity schedule reaches what was written in the TOML, and selects no tile too many."""

from __future__ import annotations

from fractions import Fraction

import pytest

from titan_distill.attention.sparse import SparseAttention, SparsitySchedule
from titan_distill.config.sections import SparseAttentionConfig


def schedule(target: float, rate: float, interval: int = 1) -> SparsitySchedule:
    return SparsitySchedule.of(
        SparseAttentionConfig(sparsity=target, schedule_rate=rate, schedule_interval=interval, crossover=0.0)
    )


@pytest.mark.parametrize(
    ("target", "rate", "num_increments"),
    # In floats min(step // interval, ceil or floor of target / rate) * rate misses the first two.
    [(0.95, 0.05, 19), (0.9, 0.1, 9), (0.3, 0.1, 3), (0.7, 0.3, 3), (0.97, 0.01, 97)],
)
def test_reaches_its_target_and_stays(target: float, rate: float, num_increments: int) -> None:
    ramp = schedule(target, rate, interval=10)
    assert ramp.at(10 * num_increments) == ramp.at(10**9) == Fraction(str(target))
    assert ramp.at(10 * num_increments - 1) < Fraction(str(target))
    values = [float(ramp.at(step)) for step in range(0, 10 * num_increments + 10, 10)]
    assert values == sorted(values) and values[-1] == target


def test_grows_by_one_rate_an_interval() -> None:
    ramp = schedule(0.5, 0.1, interval=3)
    assert [float(ramp.at(step)) for step in range(10)] == [0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3]


def test_without_a_rate_it_starts_at_the_target() -> None:
    assert schedule(0.9, 0.0).at(0) == Fraction(9, 10)


@pytest.mark.parametrize(
    ("sparsity", "num_tiles", "selected"),
    # (1 - 0.7) * 10 is 3.0000000000000004 in floats, whose ceiling is 4.
    [(0.7, 10, 3), (0.9, 10, 1), (0.8, 5, 1), (0.95, 1440, 72), (0.9, 624, 63), (0.0, 8, 8), (0.99, 8, 1), (0.5, 7, 4)],
)
def test_selects_the_written_share_of_tiles(sparsity: float, num_tiles: int, selected: int) -> None:
    core = SparseAttention(SparseAttentionConfig(sparsity=sparsity, crossover=0.0))
    assert core.num_selected(num_tiles) == selected


def test_below_the_crossover_everything_is_read() -> None:
    core = SparseAttention(
        SparseAttentionConfig(sparsity=0.9, schedule_rate=0.3, schedule_interval=2, crossover=0.6, tiles_per_list=2)
    )
    reads = []
    for step in (0, 2, 4, 6):
        core.start_step(step)
        reads.append((core.tiles_read(9).num_selected, core.tiles_read(9).num_lists))
    assert reads == [(9, 0), (9, 0), (4, 5), (1, 5)]  # sparsity 0, 0.3 | 0.6, 0.9
