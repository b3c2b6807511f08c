"""Data at URLs: the same rows, order and identity as in a local folder, and one sentence for what can't be opened."""

from __future__ import annotations

import pickle
from pathlib import Path

import fsspec
import pytest
import toy_family
from toy_run import toy_trainer

from titan_distill.config.paths import is_url, seen_from
from titan_distill.config.sections import DataConfig
from titan_distill.data.location import RemotePath, location
from titan_distill.data.manifest import DataManifest, check_manifest, read_manifest, write_manifest
from titan_distill.data.parquet import ParquetDataset, extra_names, read_ids
from titan_distill.data.prompts import read_prompts


class Unreachable(fsspec.AbstractFileSystem):
    """A file system whose client has errors of its own, as HTTP clients have."""

    def info(self, path: str, **options: object) -> dict[str, object]:
        raise RuntimeError("no route to host")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, num_rows in (("a", 5), ("b", 40)):
        toy_family.write_data(tmp_path / "data" / f"{name}.parquet", num_rows)
    write_manifest(tmp_path / "data", DataManifest(latents="normalised", vae="a" * 64))
    return tmp_path / "data"


@pytest.fixture(params=["file", "memory"])
def url(folder: Path, request: pytest.FixtureRequest) -> str:
    """The same files on a file system of fsspec."""
    if request.param == "file":
        return f"file://{folder}"
    memory = fsspec.filesystem("memory")
    root = f"/{folder.parent.name}/data"
    for file in folder.iterdir():
        memory.pipe(f"{root}/{file.name}", file.read_bytes())
    return f"memory:/{root}"


def test_rows_and_identity_are_those_of_the_local_folder(folder: Path, url: str) -> None:
    local, remote = ParquetDataset(folder), ParquetDataset(url)
    assert len(remote) == 45 and remote.digest == local.digest and remote.num_files == 2
    for index in (0, 4, 5, 44):
        ours, theirs = local[index], remote[index]
        assert (ours.id, ours.caption) == (theirs.id, theirs.caption)
        assert ours.vae_latent is not None and ours.vae_latent.equal(theirs.vae_latent)
        assert ours.text_embedding.equal(theirs.text_embedding)
    again = pickle.loads(pickle.dumps(remote))
    assert again[44].caption == local[44].caption
    assert ParquetDataset(f"{url}/b.parquet").digest == ParquetDataset(folder / "b.parquet").digest
    assert read_ids(url) == read_ids(folder) and extra_names(url) == extra_names(folder)
    assert read_prompts(url, 7) == read_prompts(folder, 7)


def test_a_manifest_at_a_url(url: str) -> None:
    assert read_manifest(location(url)) == read_manifest(location(f"{url}/a.parquet")) is not None
    with pytest.raises(ValueError, match=rf"{url}/titan_data\.json says that the data was made with the vae"):
        check_manifest(location(url), encoders={"vae": "b" * 64}, sizes=[], needs_latents=True)


def test_a_run_on_a_url_has_the_losses_of_the_local_folder(folder: Path, url: str, tmp_path: Path) -> None:
    def losses(path: str, name: str) -> list[float]:
        trainer = toy_trainer(tmp_path / name, "finetune", "--data.path", path, "--training.steps", "2")
        return [value["loss/student"] for _ in range(2) for part, value in trainer.run_step() if part == "student"]

    (tmp_path / "local").mkdir()
    (tmp_path / "remote").mkdir()
    assert losses(url, "remote") == losses(str(folder), "local")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://nothing/here", "no dataset at memory://nothing/here: expected a parquet file or a folder of them"),
        ("nosuch://bucket/x", "nosuch://bucket/x can't be opened: .*nosuch.*; correct the URL"),
        ("github://x", "github://x can't be opened: .*; correct the URL"),
        ("unreachable://x", "unreachable://x can't be read .*no route to host"),
    ],
)
def test_what_cant_be_opened(path: str, message: str) -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    with pytest.raises(ValueError, match=message):
        ParquetDataset(path)


def test_a_damaged_file_at_a_url_is_named() -> None:
    fsspec.filesystem("memory").pipe("/damaged/x.parquet", b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"memory://damaged/x\.parquet is not a complete parquet file"):
        ParquetDataset("memory://damaged")


def test_which_paths_are_urls() -> None:
    assert [is_url(text) for text in ("s3://b/x", "simplecache::gs://b/x", "data/x", "/data/a:b", "C:\\x", "")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    assert location("data/x") == Path("data/x") and location("s3://b/x") == RemotePath("s3://b/x")
    assert seen_from("s3://b/x") == "" and seen_from("data/x")
    with pytest.raises(ValueError, match=r"is a table at a URL, but videos must be on this machine"):
        DataConfig(path="s3://b/videos.csv")
