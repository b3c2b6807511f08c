"""Checks that the files of a network hold all its tensors and no others, before and after loading.

Loading libraries fill a missing tensor at random and only warn. Here names, shapes and stored types are compared from
the file headers, before any value is read, and a difference is one sentence. `load_complete` then loads with the
library and compares a row or two of every tensor with the file, because versions of transformers are known that left
an embedding empty although its file was complete (https://github.com/huggingface/transformers/pull/43880).

Values are not checked for NaN: that would read all of a network. A loss that is not finite stops a run anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from titan_distill.checkpoint.diffusers_folder import CONFIG_NAME, WEIGHTS_NAME, DiffusersFolder, open_folder

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types that mean the numbers themselves. Float8 and integers need scales."""
_NUM_SHOWN = 3

Network = TypeVar("Network", bound=nn.Module)


def check_tensors(
    source: str, needed: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]], remedy: str = "copy it again"
) -> None:
    """Raises ValueError, in one sentence, unless `stored` has the tensors `needed` and no others, by name and shape.

    `source` names what was read, as the beginning of the sentence.
    """
    missing, extra = sorted(needed.keys() - stored.keys()), sorted(stored.keys() - needed.keys())
    misshapen = [
        f"{name} ({list(stored[name])} instead of {list(shape)})"
        for name, shape in sorted(needed.items())
        if name in stored and tuple(stored[name]) != tuple(shape)
    ]
    faults = [
        f"{verb} {_listed(names)}"
        for verb, names in (
            (f"lacks {len(missing)} of the {len(needed)} tensors of its network:", missing),
            (f"has {len(extra)} that the network does not have:", extra),
            (f"has {len(misshapen)} of another shape:", misshapen),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{source} {', and '.join(faults)}; {remedy}")


def check_dtypes(found: DiffusersFolder, names: Sequence[str]) -> None:
    """Raises ValueError, in one sentence, if tensors are stored in float8 or as integers, whose scales are not
    applied."""
    if coded := sorted(name for name in names if found.dtypes[name] not in FLOATS):
        kinds = ", ".join(sorted({found.dtypes[name] for name in coded}))
        raise ValueError(
            f"{found.files[coded[0]]} is quantised: {len(coded)} of {len(names)} tensors are stored as {kinds} "
            f"({_listed(coded)}), and scales are not applied; take the weights in bf16, fp16 or fp32"
        )


def load_complete(
    folder: Path,
    build: Callable[[], nn.Module],
    load: Callable[[], Network],
    *,
    weights_name: str = WEIGHTS_NAME,
    prefix: str = "",
    tied: Sequence[str] = (),
    unused: str = "",
) -> Network:
    """Loads a network of another library, and proves that each of its tensors is the one in the folder.

    Args:
        folder: of the network, with its `config.json`.
        build: builds the network, without weights; it is called with the meta device as default.
        load: loads the network with the library.
        weights_name: file name of unsharded weights.
        prefix: beginning of tensor names that some versions of the library leave out.
        tied: names of one and the same tensor, of which the file needs only one.
        unused: regular expression of stored tensors that the network does not need.

    Raises:
        ValueError: missing, unexpected, misshapen or quantised tensors, or a missing or damaged file.
    """
    found = open_folder(folder, weights_name=weights_name)
    own = {name.removeprefix(prefix): name for name in found.shapes if not (unused and re.search(unused, name))}
    if present := next((name for name in tied if name in own), None):
        own |= {name: own[present] for name in tied if name not in own}
    with torch.device("meta"), library_loads(folder):
        needed = {name.removeprefix(prefix): tensor.shape for name, tensor in build().state_dict().items()}
    check_tensors(str(found.source), needed, {name: found.shapes[stored] for name, stored in own.items()})
    check_dtypes(found, sorted(set(own.values())))
    with library_loads(folder):
        network = load()
    for name, tensor in network.state_dict().items():
        _check_loaded(name, tensor, found, own[name.removeprefix(prefix)])
    return network


@contextmanager
def library_loads(folder: Path, files: str = f"{CONFIG_NAME} and index") -> Iterator[None]:
    """Turns errors of a library about a file that says what it does not expect into one sentence."""
    try:
        yield
    except Exception as error:
        of_machine = isinstance(error, (RuntimeError, MemoryError, ImportError, AssertionError))
        if of_machine and not isinstance(error, RecursionError):  # a file can be nested too deeply
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {reason}); copy it again, with {files}"
        ) from error


def _check_loaded(name: str, tensor: torch.Tensor, found: DiffusersFolder, stored: str) -> None:
    """Raises ValueError unless the first and the last row of a tensor are those in the file."""
    for row in (slice(0, 1), slice(len(tensor) - 1, None)) if tensor.ndim else ():
        expected = found.read_part(stored, (row,)).to(tensor.dtype)
        if not torch.equal(torch.nan_to_num(tensor[row].cpu()), torch.nan_to_num(expected)):
            raise ValueError(
                f"the library that loads {found.path} did not take {name} from {found.files[stored].name}; install "
                "the versions of transformers and diffusers in constraints.txt"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
