"""Checkpoints: saves from which a run resumes, and weights from which a role starts.

A save uses `manager.py` (decides when to save), `state.py` (names the tensors of a run's state), `commit.py` (makes a
folder appear only when it is complete), `storage.py` (torch.distributed.checkpoint, with safe reading) and
`manifest.py` (sizes, hashes and description of the folder). An asynchronous save also uses `asynchronous.py` (copies
the state) and `writing_process.py` (writes the copy). `discovery.py` finds usable checkpoints, `resuming.py` compares
one with the run that resumes from it. `initial_weights.py` starts a role from a role of a checkpoint,
`diffusers_folder.py` reads other weights, `complete.py` compares weights with the network that takes them.

`tools/` has the tools that one process runs on a checkpoint, a tensor at a time.
"""
