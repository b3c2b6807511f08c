"""Checkpoints: what a run can be continued from, and what it hands on.

``manager.py`` publishes, finds and retains; ``state.py`` says which state a role has; ``convert.py`` turns a
checkpoint into a diffusers folder. Below them: ``manifest.py`` (what a folder must contain), ``discovery.py`` (which
folders are usable), ``storage.py`` (torch.distributed.checkpoint, read without trusting it), ``ranks.py`` (acting as
one over several ranks).
"""
