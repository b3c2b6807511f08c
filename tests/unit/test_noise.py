"""Keyed noise: a pure function of its key, with the right law, and the same values tomorrow."""

import inspect
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from toy_run import JOBS, toy_trainer

import titan_distill.train
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.methods.adversarial import AdversarialTraining
from titan_distill.methods.base import TrainingMethod

SHAPE = (4, 2, 3, 3)
KNOWN_UNIFORM = [0.898213502811501, 0.6133643632557904]
KNOWN_INDEX = [2, 3, 2, 1, 1, 0, 0, 3]
KNOWN_NORMAL = [
    [0.9388751983642578, 0.34104543924331665, -1.7337570190429688, 1.2089303731918335],
    [-1.3453123569488525, 0.6569453477859497, -0.1520387977361679, -0.38047507405281067],
]


def normal(noise: KeyedNoise, ids, *, purpose="rollout", step=3, shape=SHAPE, dtype=torch.float32):
    return noise.normal(purpose, step, ids, shape, device="cpu", dtype=dtype)


def test_draws_do_not_depend_on_batch_split_order_or_history():
    ids = list(range(100, 108))
    whole = normal(KeyedNoise(0), ids)
    used = KeyedNoise(0)
    for micro_batch in (1, 2, 4):
        parts = [normal(used, ids[i : i + micro_batch]) for i in range(0, len(ids), micro_batch)]
        assert torch.equal(torch.cat(parts), whole)
    order = ids[:]
    random.Random(1).shuffle(order)
    assert torch.equal(normal(used, order), whole[[ids.index(i) for i in order]])
    assert torch.equal(used.uniform("time", 3, order), used.uniform("time", 3, ids)[[ids.index(i) for i in order]])


@pytest.mark.parametrize("shape", [(), (1,), (15,), (17,), (3, 11), (2, 3, 4, 5)])
def test_an_element_depends_on_key_and_raster_index_only(shape):
    """Not on the batch, the shape, or how many elements there are."""
    ids = [3, 1, 4, 15, 9]
    whole = normal(KeyedNoise(0), ids, shape=(1000,))
    drawn = normal(KeyedNoise(0), ids, shape=shape)
    assert drawn.shape == (5, *shape)
    assert torch.equal(drawn.flatten(1) if shape else drawn[:, None], whole[:, : math.prod(shape)])
    assert torch.equal(torch.cat([normal(KeyedNoise(0), [i], shape=shape) for i in ids]), drawn)


def test_draws_ignore_and_leave_alone_the_global_generator():
    torch.manual_seed(1)
    first, state = normal(KeyedNoise(0), [1]), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(normal(KeyedNoise(0), [1]), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_part_of_the_key_matters():
    variants = {
        "base": normal(KeyedNoise(0), [5]),
        "seed": normal(KeyedNoise(1), [5]),
        "purpose": normal(KeyedNoise(0), [5], purpose="critic"),
        "step": normal(KeyedNoise(0), [5], step=4),
        "sample": normal(KeyedNoise(0), [6]),
        "swapped": normal(KeyedNoise(3), [5], step=0),
        "digits moved": normal(KeyedNoise(0), [5], step=35),
    }
    flat = torch.stack([draw.flatten() for draw in variants.values()])
    assert (torch.cdist(flat, flat) + 10 * torch.eye(len(flat))).min() > 1
    keyed = KeyedNoise(0)
    uniforms = {float(keyed.uniform(purpose, step, [i])) for purpose in "ab" for step in (0, 1) for i in (0, 1)}
    assert len(uniforms) == 8


def test_ids_may_be_tensor_elements():
    assert torch.equal(normal(KeyedNoise(0), list(torch.tensor([7, 8]))), normal(KeyedNoise(0), [7, 8]))


def test_normal_statistics():
    draws = normal(KeyedNoise(0), range(500), shape=(200,)).double()
    assert abs(float(draws.mean())) < 0.01 and abs(float(draws.std()) - 1) < 0.01
    assert float((draws.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.005)
    neighbours = (draws[1:] * draws[:-1]).mean()  # of one element in consecutive sample ids
    assert abs(float(neighbours)) < 0.015
    assert (torch.corrcoef(draws[:40]) - torch.eye(40)).abs().max() < 0.35  # five sigma


def test_neighbouring_keys_are_uncorrelated():
    """Seeds, steps, samples and purposes next to one another: 64 streams, 2016 pairs of them."""
    number = 4096
    draws = torch.cat(
        [
            normal(KeyedNoise(seed), [0, 1], purpose=f"dmd2/student/noise/{index}", step=step, shape=(number,))
            for seed in (0, 1)
            for step in (0, 1, 10, 11)
            for index in range(4)
        ]
    ).double()
    for values in (draws, draws**2 - 1):
        off = torch.corrcoef(values)[~torch.eye(len(draws), dtype=torch.bool)]
        assert off.abs().max() < 5 / number**0.5
        assert float((off**2).mean() * number) == pytest.approx(1, abs=0.15)


def test_uniform_and_index_statistics():
    keyed = KeyedNoise(0)
    draws = keyed.uniform("time", 0, range(4000))
    assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, bins=10, min=0, max=1)
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    exits = torch.bincount(torch.tensor([keyed.index("exit", step, 4) for step in range(4000)]), minlength=4)
    assert len(exits) == 4 and float(((exits - 1000) ** 2 / 1000).sum()) < 16.3  # 3 degrees of freedom
    assert keyed.index("exit", 9, 1) == 0
    with pytest.raises(AssertionError):
        keyed.index("exit", 0, 0)


def test_dtype_rounds_the_same_noise():
    keyed = KeyedNoise(0)
    full = normal(keyed, [1, 2])
    assert torch.equal(normal(keyed, [1, 2], dtype=torch.bfloat16), full.bfloat16())
    assert torch.equal(normal(keyed, [1, 2], dtype=torch.float64), full.double())


def test_an_empty_batch_is_allowed():
    assert normal(KeyedNoise(0), []).shape == (0, *SHAPE)


def test_known_values():
    """Fails when an edit changes what a seed means: every stored result would shift."""
    keyed = KeyedNoise(42)
    assert keyed.uniform("score_time", 7, [0, 123456789]).tolist() == KNOWN_UNIFORM
    assert [keyed.index("exit", step, 4) for step in range(8)] == KNOWN_INDEX
    got = normal(keyed, [0, 1], purpose="rollout/0", step=7, shape=(2, 2, 2, 2, 2)).flatten(1)[:, :4]
    assert got.tolist() == KNOWN_NORMAL  # if one of these changes, NOISE_VERSION must


# --- purposes: two draws of a run never share a key


class DrawnOnce(KeyedNoise):
    """Counts the uses of each key."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.uses: Counter[str] = Counter()

    def _text(self, purpose: str, step: int, sample_id: int | None) -> str:
        key = super()._text(purpose, step, sample_id)
        self.uses[key] += 1
        return key


def check_keys_are_used_once(monkeypatch: pytest.MonkeyPatch, folder: Path, method: str, *overrides: str) -> None:
    monkeypatch.setattr(titan_distill.train, "KeyedNoise", DrawnOnce)
    trainer = toy_trainer(folder, method, *overrides)
    trainer.run()
    noise = trainer.method.noise
    assert isinstance(noise, DrawnOnce) and len(noise.uses) > 8
    again = {key: count for key, count in noise.uses.items() if count > 1}
    assert not again, again


@pytest.mark.parametrize("method", JOBS)
def test_no_key_is_used_twice(method, monkeypatch, tmp_path):
    # By default all segments of a rollout share their exit, on purpose.
    overrides = ["--method_config.same_step_across_blocks", "false"] if method == "self_forcing" else []
    check_keys_are_used_once(monkeypatch, tmp_path, method, *overrides)


@pytest.mark.parametrize(
    "method, owner, name", [("dmd2", TrainingMethod, "normal"), ("adversarial", AdversarialTraining, "_noise")]
)
def test_a_purpose_used_twice_is_caught(method, owner, name, monkeypatch, tmp_path):
    original = getattr(owner, name)
    position = list(inspect.signature(original).parameters).index("purpose" if name == "normal" else "whose")

    def same(*arguments, **named):
        return original(*arguments[:position], "same", *arguments[position + 1 :], **named)

    monkeypatch.setattr(owner, name, same)
    with pytest.raises(AssertionError, match="same"):
        check_keys_are_used_once(monkeypatch, tmp_path, method)
