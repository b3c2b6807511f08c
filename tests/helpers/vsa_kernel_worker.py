"""Runs cases of the attention kernels in Triton's interpreter and prints their errors as JSON.

A process of its own, because kernels are compiled or interpreted by what the environment says when they are imported.
Memory that PyTorch hands out uninitialised is filled with NaN: an element that no kernel writes cannot look right.

    python vsa_kernel_worker.py '[{"grid": [5, 4, 4], "heads": 1, ...}, ...]'
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from titan_kernels import reference, tile_layout, tuning
from titan_kernels import vsa_backward as backward
from titan_kernels.vsa_backward import vsa_backward
from titan_kernels.vsa_forward import vsa_forward
from torch import Tensor

_empty = torch.empty


def poisoned(*args: Any, **kwargs: Any) -> Tensor:
    x = _empty(*args, **kwargs)
    return x.fill_(float("nan")) if x.is_floating_point() else x


def errors(case: dict[str, Any], seed: int) -> dict[str, float | bool]:
    """Largest difference from the fp64 twin over the twin's largest value, of each output; and whether runs agree."""
    layout = tile_layout(tuple(case["grid"]), tuple(case.get("tile", (4, 4, 4))))
    run = range(*case["run"]) if "run" in case else None
    q_tiles, kv_tiles = layout.tiles(run, case.get("join", 1)), layout.tiles()
    num_queries, heads = int(q_tiles.length.sum()), case["heads"]
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int, scale: float = 1.0) -> Tensor:
        shape = (case.get("batch", 1), tokens, heads, case["dim"])
        if case.get("strided"):  # heads before tokens, as attention of other libraries has it
            shape = (shape[0], shape[2], shape[1], shape[3])
        x = (torch.randn(shape, generator=generator) * scale).to(getattr(torch, case.get("dtype", "float32")))
        return x.transpose(1, 2) if case.get("strided") else x

    scale = case.get("scale", 1.0)
    q, k, v = draw(num_queries, scale), draw(layout.num_tokens, scale), draw(layout.num_tokens, scale)
    grad = draw(num_queries)
    chooser = torch.randn(q.shape[0], heads, len(q_tiles.start), layout.num_tiles, generator=generator)
    if "unselected" in case:
        chooser[..., case["unselected"]] = -1e9
    lists = reference.block_topk(chooser, case["topk"])

    def kernels() -> tuple[Tensor, ...]:
        out, lse = vsa_forward(q, k, v, lists, q_tiles, kv_tiles)
        return out, lse, *vsa_backward(grad, q, k, v, out, lse, lists, q_tiles, kv_tiles)

    if "candidate" in case:
        tuning.candidates = lambda *args: [tuning.Candidate(4, 2, **case["candidate"])]
    torch.empty = poisoned
    first = kernels()
    second = kernels() if case.get("twice") else None
    orders = {}
    if case.get("orders"):
        longest_first = backward._longest_first
        backward._longest_first = lambda offset: longest_first(offset).flip(-1).contiguous()
        orders["shortest_first"] = all(map(torch.equal, first, kernels()))
        backward._longest_first = lambda offset: torch.zeros_like(longest_first(offset))
        orders["one_tile_only"] = bool(kernels()[3].isnan().any())
        backward._longest_first = longest_first
    torch.empty = _empty

    wide = [x.double() for x in (q, k, v)]
    out, lse = reference.vsa_forward(*wide, lists, q_tiles, kv_tiles)
    gradients = reference.vsa_backward(grad.double(), *wide, out, lse, lists, q_tiles, kv_tiles)
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    result: dict[str, float | bool] = {
        name: float((mine - true).abs().max() / true.abs().max())
        for name, mine, true in zip(names, first, (out, lse, *gradients), strict=True)
    }
    result |= orders
    if second is not None:
        result["repeats"] = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    if "unselected" in case:
        start, length = int(kv_tiles.start[case["unselected"]]), int(kv_tiles.length[case["unselected"]])
        rows = slice(start, start + length)
        result["zeros"] = not first[3][:, rows].any() and not first[4][:, rows].any()
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    original = tuning.candidates
    answers = []
    for number, one in enumerate(json.loads(sys.argv[1])):
        tuning.candidates = original
        answers.append(errors(one, number))
    print(json.dumps(answers))
