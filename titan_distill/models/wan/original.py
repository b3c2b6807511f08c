"""Recognises weights in Wan's original format, and tells how to convert them.

The original repositories hold one folder: a transformer of class `WanModel` with other tensor names, and encoders as
pickled `.pth` files. Diffusers' format, which everything here reads, has a folder per network, each with a
`config.json` of a diffusers or transformers class.
"""

from __future__ import annotations

from pathlib import Path

from titan_distill.checkpoint.diffusers_folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    WEIGHTS_SUFFIXES,
    DiffusersFolder,
    open_folder,
    read_header,
    read_json,
)

ORIGINAL_CLASS = "WanModel"
"""Class of a transformer in the `config.json` of an original repository."""
ORIGINAL_NAME = "blocks.0.self_attn.q."
"""Part of tensor names of original transformers, also of those that other programs repacked."""
_REMEDY = (
    "take the repository of the same name that ends in -Diffusers, or convert the weights with diffusers' script "
    "convert_wan_to_diffusers.py, and name the new folder"
)


def refuse_original(folder: Path) -> None:
    """Raises ValueError, with the conversion, if `folder`, or the one that it is missing from, holds original
    weights."""
    if sign := _sign_of_original(folder if folder.is_dir() else folder.parent):
        raise ValueError(f"{sign}: these are weights in Wan's original format, which is not read; {_REMEDY}")


def _sign_of_original(folder: Path) -> str:
    """Returns what shows that a folder holds original weights; empty if nothing does."""
    config = folder / CONFIG_NAME
    if config.is_file():
        is_original = read_json(config).get("_class_name") == ORIGINAL_CLASS
        return f"{config} is of class {ORIGINAL_CLASS!r}" if is_original else ""
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() == ".pth":
            return f"there is {path}"
        if path.suffix == ".safetensors" and any(ORIGINAL_NAME in name for name in read_header(path)):
            return f"{path} has tensors named {ORIGINAL_NAME}"
    return ""


def open_part(folder: Path, what: str, weights_name: str = WEIGHTS_NAME) -> DiffusersFolder:
    """Opens the folder of an encoder, `what` in messages. Raises ValueError for a missing, damaged, original or pickled
    file."""
    refuse_original(folder)
    if not (folder / CONFIG_NAME).is_file() or not any(path.suffix in WEIGHTS_SUFFIXES for path in folder.iterdir()):
        raise ValueError(f"no {what} in {folder}: expected {CONFIG_NAME} and {weights_name}, or several with an index")
    return open_folder(folder, weights_name=weights_name)
