"""Ranks of a run as forks of the test's process: a second instead of the many that fresh interpreters take to import
torch. Without torchrun, so only for runs that end by themselves."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist


def train_forked(
    num_ranks: int,
    argv: Sequence[str],
    outputs: Path,
    before: Callable[[], None] | None = None,
    main: Callable[[Sequence[str]], int | None] | None = None,
    timeout: float = 120,
) -> list[int | None]:
    """Trains (or runs another `main`) on gloo ranks, after `before` in each. Returns exit codes, None for a rank
    that is killed after `timeout` seconds; outputs are `outputs/rank0.txt` and so on."""
    # As torchrun's agent does, so that it outlives any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    arguments = (num_ranks, store.port, argv, outputs, before, main)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    argv: Sequence[str],
    outputs: Path,
    before: Callable[[], None] | None,
    main: Callable[[Sequence[str]], int | None] | None,
) -> None:
    from titan_distill import train

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.stdout = sys.stderr = (outputs / f"rank{rank}.txt").open("w", buffering=1)
    logging.getLogger().handlers.clear()  # pytest's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        if before is not None:
            before()
        code = (main or train.main)(argv) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
