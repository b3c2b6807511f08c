"""The GPU suite: correctness, speed and training on one GPU, the most important measurements first.

    python -m benchmarks.gpu_suite --out DIR [--budget SECONDS] [--cache FILE] [--rehearse]

GPU time is scarce, so nothing that is measured may be lost. Every row is one line of `DIR/rows.jsonl`, written and
synced to disk as soon as it is known; `DIR/summary.md` is rewritten after every part and on SIGTERM, SIGINT and
SIGUSR1. Work is cut into parts, and a part into cases. They run in worker processes: a case that raises, crashes, hangs
or runs out of memory costs its own row and nothing else, because the supervisor starts a new worker at the case that
follows. The supervisor itself imports neither torch nor anything that could fail with it.

Parts run in order of importance (`plan.py`). The first tier, whose results could lead to a fix, fits into 400 seconds;
all parts fit into 540. The estimates are checked against `docs/kernels.md`. `--rehearse` runs every part at toy sizes
on a CPU, through the same code.

Files of DIR: `rows.jsonl`, `summary.md`, `junit.xml` of the GPU tests, `profile.json.gz` of one training step, and
`logs.tar.gz` with the output of every worker.

Exit codes: 0, 1 when a part failed or the first tier did not finish, 2 for wrong input or no GPU, 128 + N after
signal N.
"""
