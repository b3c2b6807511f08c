"""Checkpoints: what a run can be continued from, and what it hands on.

``manager.py`` publishes, finds and retains; ``state.py`` says which state a role has; ``convert.py`` turns a
checkpoint into a diffusers folder. Below them: ``manifest.py`` (what a folder must contain), ``discovery.py`` (which
folders are usable), ``storage.py`` (torch.distributed.checkpoint, read without trusting it), ``ranks.py`` (acting as
one over several ranks).

What one process does to a checkpoint, a tensor at a time: ``contents.py`` (open and read), ``inspect.py`` (list and
verify), ``rewrite.py`` (reshard; also writes for ``imports.py``), ``diff.py``. They publish as a run does, with
``publish.py``. ``initial_weights.py`` starts a role, on any layout, from a role of a checkpoint.
"""
