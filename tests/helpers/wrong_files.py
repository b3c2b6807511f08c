"""Damage to weights, rows and checkpoints, for `wrong_inputs`: each function makes one thing wrong in a folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from titan_distill.checkpoint.manifest import MANIFEST_NAME

Damage = Callable[[Path], object]
ROWS = "rows.parquet"


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # never through a link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def written(name: str, content: bytes) -> Damage:
    """Writes a file, in place of what is there."""
    return lambda folder: _replace(folder / name, content)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def _emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Changes the tensors of a network's only file."""

    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def _file(change: Callable[[bytes], bytes]) -> Damage:
    """Changes the bytes of a network's only file."""

    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        _replace(file, change(file.read_bytes()))

    return damage


def _misshapen(tensors: dict[str, torch.Tensor]) -> None:
    name = max(tensors, key=lambda name: tensors[name].ndim)
    tensors[name] = torch.cat([tensors[name]] * 2)


def _cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if t.ndim > 1})


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Changes the JSON header of a safetensors file."""

    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return changed


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return header[min(name for name in header if name != "__metadata__")]


WEIGHTS: dict[str, Damage] = {
    "a tensor missing": _tensors(lambda tensors: tensors.pop(max(tensors))),
    "a tensor too many": _tensors(lambda tensors: tensors.update(extra=torch.zeros(3))),
    "a tensor misshapen": _tensors(_misshapen),
    "a tensor renamed": _tensors(lambda tensors: tensors.update({"x." + (n := max(tensors)): tensors.pop(n)})),
    "no tensors": _tensors(lambda tensors: tensors.clear()),
    "float8 without scales": _tensors(_cast(torch.float8_e4m3fn)),
    "int8": _tensors(_cast(torch.int8)),
    "cut to nothing": _file(lambda content: b""),
    "cut in the header": _file(lambda content: content[:100]),
    "cut in the middle": _file(lambda content: content[: len(content) // 2]),
    "cut by a byte": _file(lambda content: content[:-1]),
    "garbage for a header": _file(lambda content: content[:8] + b"\xff" * 64 + content[72:]),
    "a header as long as the disk": _file(lambda content: b"\xff" * 7 + b"\x7f" + content[8:]),
    "a header of offsets that overlap": _file(_header(lambda header: _first(header).update(data_offsets=[0, 4]))),
    "a header of unknown dtypes": _file(_header(lambda header: _first(header).update(dtype="F7"))),
    "a pointer in place of the file": _file(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a folder in place of the file": lambda folder: _as_folder(next(folder.glob("*.safetensors"))),
    "the file missing": lambda folder: next(folder.glob("*.safetensors")).unlink(),
}
"""Damage to a folder with a network."""


def _config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | values
        _replace(folder / "config.json", json.dumps(content).encode())

    return damage


def damaged_json(name: str) -> dict[str, Damage]:
    """Damage to a JSON file in a folder."""
    contents = {
        "empty": b"",
        "not JSON": b"{'a': 1}",
        "a list": b"[1, 2]",
        "a number": b"3",
        "null": b"null",
        "cut": b'{"_class_name": "Wan',
        "binary": bytes(range(256)),
        "nested without end": b"[" * 100_000,
    }
    named: dict[str, Damage] = {f"{name} {what}": written(name, content) for what, content in contents.items()}
    named[f"{name} a folder"] = lambda folder: _as_folder(folder / name)
    return named


FOLDERS: dict[str, Damage] = {
    "the folder missing": shutil.rmtree,
    "the folder empty": _emptied,
    "a file in place of the folder": _as_file,
}
CONFIG: dict[str, Damage] = {
    **damaged_json("config.json"),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def _sharded(content: object) -> Damage:
    """An index in place of the one file."""

    def damage(folder: Path) -> None:
        next(folder.glob("*.safetensors")).unlink()
        _replace(folder / INDEX, content if isinstance(content, bytes) else json.dumps(content).encode())

    return damage


def _original(name: str) -> Damage:
    """The names of the original release, which has other ones and no such config.json."""

    def damage(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        (folder / name).write_bytes(b"PK\3\4")

    return damage


TRANSFORMER: dict[str, Damage] = {
    "another class": _config(_class_name="FluxTransformer2DModel"),
    "words for layers": _config(num_layers="two"),
    "more layers than stored": _config(num_layers=3),
    "no layers": _config(num_layers=0),
    "a negative number of heads": _config(num_attention_heads=-2),
    "heads without width": _config(attention_head_dim=0),
    "a width that is no whole number": _config(ffn_dim=32.5),
    "a patch of two sizes": _config(patch_size=[1, 2]),
    "a patch of a word": _config(patch_size="1x2x2"),
    "channels that do not fit": _config(in_channels=17),
    "an unknown norm": _config(qk_norm="layer_norm_of_mine"),
    "an index with a missing shard": _sharded({"weight_map": {"a.weight": "part-1.safetensors"}}),
    "an index that is a list": _sharded([1]),
    "an index without a map": _sharded({"metadata": {}}),
    "an index that leads out": _sharded({"weight_map": {"a.weight": "../../x.safetensors"}}),
    "an index of numbers": _sharded({"weight_map": {"a.weight": 3}}),
    "original names": _original("Wan2.1_VAE.pth"),
    "original text encoder": _original("models_t5_umt5-xxl-enc-bf16.pth"),
    "a pickle": _original("diffusion_pytorch_model.bin"),
}
ENCODER: dict[str, Damage] = {
    "words for layers": _config(num_layers="two"),
    "another width": _config(d_model=96),
    "more layers than stored": _config(num_layers=3),
    "no heads": _config(num_heads=0),
}
VAE: dict[str, Damage] = {
    "words for a width": _config(base_dim="sixteen"),
    "another width": _config(base_dim=32),
    "fewer means than channels": _config(latents_mean=[0.0]),
    "deviations of zero": _config(latents_std=[0.0] * 16),
    "means of words": _config(latents_mean=["0"] * 16),
    "means that are null": _config(latents_mean=None),
}
TOKENIZER: dict[str, Damage] = {
    "an unknown class": written("tokenizer_config.json", b'{"tokenizer_class": "MyTokenizer"}'),
    "a class without its files": written("tokenizer_config.json", b'{"tokenizer_class": "T5Tokenizer"}'),
}


# --- damage to rows


def _cell(name: str, value: Any, row: int = 0) -> Damage:
    return partial(_with_rows, change=lambda rows: rows[row].update({name: value}))


def _with_rows(folder: Path, change: Callable[[list[dict[str, Any]]], object], schema: pa.Schema | None = None) -> None:
    file = folder / ROWS
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema or table.schema), file, row_group_size=2)


def _column(name: str, kind: pa.DataType | None, change: Callable[[Any], Any] = lambda value: value) -> Damage:
    """A column of another type, or none."""

    def damage(folder: Path) -> None:
        schema = pq.read_schema(folder / ROWS)
        index = schema.get_field_index(name)
        schema = schema.remove(index) if kind is None else schema.set(index, pa.field(name, kind))
        _with_rows(folder, lambda rows: [row.update({name: change(row[name])}) for row in rows], schema)

    return damage


def _tensor(name: str, shape: tuple[int, ...], fill: float = 0.5, dtype: str = "float16") -> Damage:
    """Every row with a tensor of another shape or content, written as a correct writer would."""
    content = torch.full(shape, fill, dtype=getattr(torch, dtype)).numpy().tobytes()
    values = {f"{name}_bytes": content, f"{name}_shape": list(shape), f"{name}_dtype": dtype}
    return partial(_with_rows, change=lambda rows: [row.update(values) for row in rows])


def _bytes(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: _replace(folder / ROWS, change((folder / ROWS).read_bytes()))


def _zeroed(content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + bytes(len(content[start:stop])) + content[stop:]


def _halves(shape: list[int]) -> list[float]:
    return [size + 0.5 for size in shape]


LATENT, TEXT = "vae_latent", "text_embedding"
LATENT_SHAPE, TEXT_SHAPE = (16, 5, 12, 12), (32, 64)
DATA: dict[str, Damage] = {
    **{f"caption {value!r}": _cell("caption", value) for value in ("", " \n", None)},
    **{f"{n}_dtype {v!r}": _cell(f"{n}_dtype", v) for n in (LATENT, TEXT) for v in (None, "int8")},
    **{
        f"{n}_shape {str(v)[:30]}": _cell(f"{n}_shape", v)
        for n in (LATENT, TEXT)
        for v in (None, [24], [-16, -5, 12, 12], [2**62, 2**62, 2, 2], [None, 64])
    },
    **{f"{n}_bytes {str(v)[:20]}": _cell(f"{n}_bytes", v) for n in (LATENT, TEXT) for v in (None, bytes(95))},
    **{
        f"no column {name}": _column(name, None)
        for name in ("caption", f"{TEXT}_bytes", f"{TEXT}_shape", f"{LATENT}_dtype")
    },
    "captions of numbers": _column("caption", pa.int64(), len),
    "shapes of words": _column(f"{LATENT}_shape", pa.string(), str),
    "shapes of fractions": _column(f"{TEXT}_shape", pa.list_(pa.float64()), _halves),
    "latents of another size": _tensor(LATENT, (16, 5, 12, 14)),
    "latents of another length": _tensor(LATENT, (16, 4, 12, 12)),
    "latents of more channels": _tensor(LATENT, (48, 5, 12, 12)),
    "latents of fewer axes": _tensor(LATENT, (16, 12, 12)),
    "latents that are nan": _tensor(LATENT, LATENT_SHAPE, math.nan),
    "latents that are inf": _tensor(LATENT, LATENT_SHAPE, math.inf, "float32"),
    "texts of another width": _tensor(TEXT, (32, 4096)),
    "texts without tokens": _tensor(TEXT, (0, 64)),
    "texts that are nan": _tensor(TEXT, TEXT_SHAPE, math.nan),
    "texts that are too long": _tensor(TEXT, (65, 64)),
    "one row of another width": lambda folder: _with_rows(
        folder, lambda rows: rows[1].update({f"{TEXT}_bytes": bytes(2 * 32 * 63), f"{TEXT}_shape": [32, 63]})
    ),
    "no rows": lambda folder: _with_rows(folder, lambda rows: rows.clear()),
    "half of the file": _bytes(lambda content: content[: len(content) // 2]),
    "a footer of zeros": _bytes(lambda content: _zeroed(content, len(content) - 600, len(content) - 8)),
    "a footer longer than the file": _bytes(lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "pages of zeros": _bytes(lambda content: _zeroed(content, 4, len(content) // 2)),
    "only the magic": _bytes(lambda content: b"PAR1PAR1"),
    "an empty folder": lambda folder: (folder / ROWS).unlink(),
    "a folder by its name": lambda folder: _as_folder(folder / ROWS),
    "a good file beside a bad one": written("z.parquet", b"PAR1"),
}
"""Damage to a folder with `rows.parquet`. A method that needs latents reads it."""


# --- damage to runs


def _manifest(change: Callable[[dict[str, Any]], object], right: bool = True) -> Damage:
    """Changes the manifest of the checkpoint; with its digest made right, as somebody with intent would."""

    def damage(folder: Path) -> None:
        file = next(folder.glob(f"run/checkpoints/step-*/{MANIFEST_NAME}"))
        content = json.loads(file.read_text())
        digest = content.pop("digest")
        change(content)
        if right:
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps({**content, "digest": digest}))

    return damage


def _checkpoint(change: Callable[[Path], object]) -> Damage:
    return lambda folder: change(next(folder.glob("run/checkpoints/step-*")))


def _index(change: Callable[[bytes], bytes]) -> Damage:
    return _checkpoint(lambda path: _replace(path / ".metadata", change((path / ".metadata").read_bytes())))


def _shard(change: Callable[[bytes], bytes]) -> Damage:
    def damage(checkpoint: Path) -> None:
        file = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
        file.write_bytes(change(file.read_bytes()))

    return _checkpoint(damage)


def _outside(content: dict[str, Any]) -> None:
    files = content["files"]
    files["../../config.toml"] = files.pop(next(iter(files)))


CHECKPOINT: dict[str, Damage] = {
    "no manifest": _checkpoint(lambda path: (path / MANIFEST_NAME).unlink()),
    **{
        f"manifest {what}": _checkpoint(written(MANIFEST_NAME, content))
        for what, content in {
            "empty": b"",
            "cut": b'{"step": 1',
            "a list": b"[]",
            "null": b"null",
            "binary": bytes(range(256)),
            "without content": b"{}",
            "nested without end": b"[" * 100_000,
        }.items()
    },
    "manifest with a changed step": _manifest(lambda content: content.update(step=7), right=False),
    "manifest with a step of words": _manifest(lambda content: content.update(step="one")),
    "manifest with a negative step": _manifest(lambda content: content.update(step=-1)),
    "manifest without roles": _manifest(lambda content: content.update(trained={})),
    "manifest with roles of numbers": _manifest(lambda content: content.update(trained={"student": 3})),
    "manifest without files": _manifest(lambda content: content.update(files={})),
    "manifest with files of words": _manifest(lambda content: content.update(files="all")),
    "manifest that leads out": _manifest(_outside),
    "manifest of another run": _manifest(lambda content: content.update(run="0" * 32)),
    "manifest of weights only": _manifest(lambda content: content.update(weights_only=True)),
    "index missing": _checkpoint(lambda path: (path / ".metadata").unlink()),
    "index cut": _index(lambda content: content[:99]),
    "index of other bytes": _index(lambda content: b"\x80" * len(content)),
    "shard missing": _checkpoint(lambda path: next(path.glob("*.distcp")).unlink()),
    "shard empty": _shard(lambda content: b""),
    "shard cut": _shard(lambda content: content[:-1]),
    "shard longer": _shard(lambda content: content + b"\0"),
    "shard with another byte": _shard(lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
    "checkpoint empty": _checkpoint(_emptied),
    "checkpoint a file": _checkpoint(_as_file),
}
"""Damage to the checkpoint of `run`, in the case's folder."""
