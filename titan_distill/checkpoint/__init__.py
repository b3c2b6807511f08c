"""Checkpoints: saves from which a run resumes, and weights from which a role starts.

A save passes `manager.py` (when, and what of it is kept), `state.py` (names of a run's state), `commit.py` (publishes
it in one instant), `storage.py` (torch.distributed.checkpoint, read without trusting it) and `manifest.py` (sizes,
hashes and description of the folder); an asynchronous one also `asynchronous.py`. `discovery.py` finds usable
checkpoints. `initial_weights.py` starts a role from a role of a checkpoint, `diffusers_folder.py` reads other weights.

`tools/` has the tools that one process runs on a checkpoint, a tensor at a time.
"""
