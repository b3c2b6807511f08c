"""Prompt files: which prompts come out, and every file without usable ones is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_run import ASSETS

from titan_distill.config.loading import load_config
from titan_distill.data.prompts import read_prompts
from titan_distill.validation.scorers import check_prompts, validation_prompts


def test_text_and_jsonl_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\n  größe \u2028 ☃ \n".encode())
    (tmp_path / "a.jsonl").write_bytes('\n{"caption": "a cat"}\n{"caption": "größe \u2028 ☃", "x": 1}\n'.encode())
    expected = ["a cat", "größe \u2028 ☃"]
    assert read_prompts(tmp_path / "a.txt", 3) == read_prompts(tmp_path / "a.jsonl", 3) == expected
    assert read_prompts(tmp_path / "a.txt", 1) == ["a cat"]


def test_prompts_of_a_short_file_are_repeated_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a cat\na dog\n")
    job = ("--job.config_file", str(ASSETS / "toy_dmd2.toml"), "--validation.prompts", str(file))
    line = f"warning: validation.num_prompts = 3, but {file} has 2: they are repeated with other noise\n"
    for number, warning in ((2, ""), (3, line)):
        config = load_config([*job, "--validation.num_prompts", str(number)])
        check_prompts(config)
        assert capsys.readouterr().out == warning
        assert validation_prompts(config) == ["a cat", "a dog", "a cat"][:number]


BAD = {
    "empty.txt": (b"", "holds no prompts"),
    "blank.txt": (b" \n\t\n", "holds no prompts"),
    "latin.txt": ("größe".encode("latin-1"), "is not valid UTF-8 .* at byte 2"),
    "wide.txt": ("a cat".encode("utf-16"), "is not valid UTF-8 .* at byte 0"),
    "absent.txt": (None, "cannot be read: No such file"),
    "broken.jsonl": (b'\n\n{"caption": ', "line 3: not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not JSON"),
    "list.jsonl": (b'["a cat"]', "line 1: expected a JSON object with a video and its caption, found"),
    "null.jsonl": (b'{"caption": "x"}\n{"caption": null}', "line 2: expected a non-empty caption"),
    "blank.jsonl": (b'{"caption": " "}', "line 1: expected a non-empty caption"),
    "empty.parquet": (b"", "is not a complete parquet file"),
    "text.parquet": (b"a cat\n", "is not a complete parquet file"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_file_is_named_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / name, 2)
    assert str(error.value).startswith(str(tmp_path / name)) and str(error.value).isprintable()
