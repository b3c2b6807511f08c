"""Broken configurations, and what may become of them: a checked run, or one sentence that says where the fault is.

A mutation starts from a shipped TOML and does what people, editors, file systems and merge conflicts do: it drops,
doubles, renames, retypes and nests lines, swaps sections, sets keys that contradict each other, and damages bytes. Some
keys go to the command line, broken likewise. `outcome` then does all that happens before a process group exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch.distributed as dist
from hypothesis import strategies as st
from runs import REPOSITORY

from titan_distill.config.config import Config
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import in_one_sentence, load_config, to_toml
from titan_distill.config.parsing import ConfigError
from titan_distill.config.text import field_types
from titan_distill.methods.base import method_class
from titan_distill.models.base import model_family
from titan_distill.train import CHECK, main

SHIPPED = sorted((REPOSITORY / "train_configs").glob("*.toml"))
NUM_RANKS = (1, 2, 3, 4, 8, 64)
FILE = "mutant.toml"
MAX_CPU_SECONDS = 10
MAX_SECONDS = 300
MAX_BYTES = 2**32

VALUES = [
    *("true", "false", "0", "1", "-1", "2", "3", "7", "0.5", "-0.5", "1.0", "1e308", "5e-324", "inf", "-inf", "nan"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 400, "0x10", "1_000", "1e3", "007"),
    *('""', "''", '"none"', '"latest"', '"auto"', '"student"', '"teacher"', '"full"', '"selective"', '"sparse"'),
    *('"bfloat16"', '"tiny"', '"1.3B"', '"dmd2"', '"finetune"', '"wan"', '"x"', '"10"', '"."', '"/"', '"~"', '"a/b"'),
    *('"\\u0000"', '"\\n"', '"a\\nb"', '"\\u2028"', '"\\u001b[31m"', '"\\u202e"', '"\\ud800"', '"größe ☃ 𝄞"', "'\\'"),
    *(f'"{"y" * 300}"', f'"{"z" * 5000}"', f'"{"a/" * 2500}"', '"""\nx\n"""', "'''\n'''"),
    *(
        "[]",
        "[[]]",
        "[[[[]]]]",
        "[1]",
        "[1, 2]",
        "[1.0, 0.5, 0.25]",
        '["student"]',
        '["json"]',
        '["x", 1]',
        "[0.9, inf]",
    ),
    *("{}", "{ a = 1 }", "{ lr = 1e-4 }", "{ tensor = 2 }", "{ a = { b = { c = [] } } }", "[{}]", "[{ a = 1 }]"),
    *("2026-11-21", "07:32:00", "2026-11-21T07:32:00Z", "", "=", "1 2", "[", '"', "{ a = 1", "none", "None", "yes"),
]
"""TOML values of every type and size, some of them none."""

FITTING: dict[Any, list[str]] = {
    bool: ["true", "false"],
    int: ["0", "1", "2", "4", "16", "17", "96", "1048576", "2147483648", "9223372036854775792"],
    float: ["0", "1", "0.5", "0.9", "3.0", "999.0", "1e300", "5e-324", "inf", "-1.5"],
    str: [
        *('"tests/assets/tiny_wan"', '"tests/assets/tiny_shapes/latents.parquet"', '"none"', '"x"', '""', '"größe 𝄞"'),
        *(f'"{"z" * 5000}"', '"a\\nb"', '"a\\u0000b"', '"/dev/null"', '"tests/assets/tiny_shapes/prompts.parquet"'),
    ],
}

CONTRADICTIONS = [
    *("roles.student.flavor=tiny", "roles.student.init_from=x", "roles.teacher.trainable=true"),
    *("roles.teacher.optimizer.lr=1.0", "roles.student.trainable=false", "roles.extra.trainable=true"),
    *("ema.decay=0.9 ema.role=teacher", "ema.decay=1.0", "compile.mode=max-autotune-no-cudagraphs"),
    *("float8.recipe=rowwise", "float8.enabled=true float8.backend=transformer_engine float8.emulate=true"),
    *("float8.enabled=true float8.emulate=true float8.roles=['nobody']", "parallelism.async_tensor=true"),
    *("parallelism.tensor=3 parallelism.sequence=5", "parallelism.dp_shard=2 parallelism.dp_replicate=2"),
    *("parallelism.token_region=true", "roles.student.parallelism.sequence_method=ulysses parallelism.sequence=3"),
    *("training.global_batch_size=7", "training.steps=1 training.local_batch_size=3", "validation.num_videos=9999"),
    *("profiling.enabled=true profiling.start_step=9999999", "lr_scheduler.min_lr_ratio=0.5", "recipe.method=dmd3"),
    *("activation_checkpoint.mode=full activation_checkpoint.skip_interval=1", "job.config_file=y.toml"),
    *("activation_checkpoint.selective_interval=2", "data.max_bad_rows=-1", "pipeline_config_path=y.toml"),
    *("method_config.min_step=980.0 method_config.max_step=20.0", "method_config.denoising_steps=[250.0,1000.0]"),
    *("pipeline_config.num_frames=16", "pipeline_config.height=8", "sparse_attention.sparsity=0.5"),
]
"""Settings that contradict one another, their section or most files."""

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)


def _keys(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in field_types(kind).items():
        inner = get_args(hint)[1] if get_origin(hint) is dict else hint
        for own in ("student", "teacher") if get_origin(hint) is dict else ("",):
            key = f"{prefix}{name}.{own}".rstrip(".")
            if inner is not Any:  # typed by the method or the family
                yield from _keys(inner, f"{key}.") if dataclasses.is_dataclass(inner) else [(key, inner)]


KEYS: dict[str, Any] = {
    **dict(_keys(Config, "")),
    **dict(_keys(method_class("finetune").config_class, "method_config.")),
    **dict(_keys(method_class("dmd2").config_class, "method_config.")),
    **dict(_keys(model_family("wan").pipeline_config_class, "pipeline_config.")),
}
del KEYS["job.dry_run"]  # builds the whole job, which takes seconds
"""Every dotted key that the shipped methods and the family read, with its type."""


def _fitting(kind: Any) -> list[str]:
    """Values of a key's own type, sensible and extreme."""
    if get_origin(kind) in (tuple, list):
        return [f"[{value}]" for value in _fitting(get_args(kind)[0])] + ["[0.9, 0.5]", "[]"]
    if get_origin(kind) is Literal:
        return [json.dumps(option) for option in get_args(kind)]
    if kind in FITTING:
        return FITTING[kind]
    return [value for option in get_args(kind) if option in FITTING or get_origin(option) for value in _fitting(option)]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A configuration as a user gives it."""

    origin: str
    content: bytes
    overrides: tuple[str, ...]


def sweep() -> list[Mutant]:
    """Every key with every value of its own type, in a job that runs on this machine."""
    files = {"method_config.": "tiny_wan_finetune.toml", "sparse_attention.": "tiny_wan_dmd2_sparse.toml"}
    dmd2 = {f"method_config.{name}" for name in field_types(method_class("dmd2").config_class)}
    swept = []
    for key, kind in KEYS.items():
        other = next((name for prefix, name in files.items() if key.startswith(prefix)), None)
        file = "tiny_wan_dmd2.toml" if other is None or key in dmd2 else other
        lines = (REPOSITORY / "train_configs" / file).read_text(encoding="utf-8").splitlines()
        for value in _fitting(kind):
            swept.append(Mutant(file, "\n".join(with_key(lines, key, value)).encode(), ()))
    return swept


@st.composite
def mutants(draw: st.DrawFn) -> Mutant:
    """A shipped file with one to four faults in its lines, or damaged bytes, or a broken command line."""
    file = draw(st.sampled_from(SHIPPED))
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        lines = change(draw, lines)
    content = "\n".join(lines).encode("utf-8")
    if draw(st.integers(0, 7)) == 0:
        content = _damaged(draw, content)
    overrides = draw(st.lists(_overrides(), max_size=2)) if draw(st.integers(0, 3)) == 0 else []
    return Mutant(file.name, content, tuple(word for words in overrides for word in words))


def _changed_line(draw: st.DrawFn, lines: list[str]) -> list[str]:
    """A line dropped, doubled, or with another key or value."""
    if not lines:
        return lines
    index = draw(st.integers(0, len(lines) - 1))
    key, _, value = lines[index].partition(" = ")
    value = value.partition("#")[0].strip() or "1"
    word, other = draw(WORDS), draw(st.sampled_from(sorted(KEYS))).rpartition(".")[2]
    choices = [
        [],
        [lines[index]] * 2,
        *([f"{new} = {value}"] for new in (other, f'"{word}"', f"{key[:-1]}", f"{key}{key[-1:]}", f"{key}.{key}")),
        *([f"{key} = {new}"] for new in (f"{{ {key} = {value} }}", f"[{value}]", f'"{value}"', f"-{value}")),
        [f"{key} = {draw(st.sampled_from(VALUES))}"],
        [f"{key} = {value}{word}"],
        [f"{key}{word} {value}"],
    ]
    if value.replace(".", "").isdigit():
        choices += [
            [f"{key} = {scaled}"] for scaled in (f"{value}0", f"{value}1", value[:-1], f"1{value}", f"{value}e2")
        ]
    return [*lines[:index], *draw(st.sampled_from(choices)), *lines[index + 1 :]]


def _new_line(draw: st.DrawFn, lines: list[str]) -> list[str]:
    """A key of the schema with a value that fits its type, or with any."""
    key = draw(st.sampled_from(sorted(KEYS)))
    value = draw(st.sampled_from(_fitting(KEYS[key]) if draw(st.booleans()) else VALUES))
    return with_key(lines, key, value)


def _contradiction(draw: st.DrawFn, lines: list[str]) -> list[str]:
    for setting in draw(st.sampled_from(CONTRADICTIONS)).split():
        key, _, value = setting.partition("=")
        is_text = KEYS.get(key) is str or get_origin(KEYS.get(key)) is Literal
        lines = with_key(lines, key, json.dumps(value) if is_text else value)
    return lines


def with_key(lines: list[str], dotted_key: str, value: str) -> list[str]:
    """The file with one key set, in place of its line, else in its section, which may be new."""
    section, _, key = dotted_key.rpartition(".")
    header = f"[{section}]"
    if not section:
        return [f"{key} = {value}", *lines]
    if header not in lines:
        return [*lines, header, f"{key} = {value}"]
    start = lines.index(header) + 1
    end = next((index for index in range(start, len(lines)) if lines[index].startswith("[")), len(lines))
    kept = [line for line in lines[start:end] if line.partition(" ")[0] != key]
    return [*lines[:start], f"{key} = {value}", *kept, *lines[end:]]


def _changed_section(draw: st.DrawFn, lines: list[str]) -> list[str]:
    """A section renamed, nested, doubled or gone, or two sections under each other's name."""
    headers = [index for index, line in enumerate(lines) if line.startswith("[")]
    if not headers:
        return lines
    index, other = draw(st.sampled_from(headers)), draw(st.sampled_from(headers))
    name = lines[index].strip("[]")
    renamed = [
        f"[{name}{name[-1:]}]",
        f"[{name}.{name}]",
        f"[[{name}]]",
        f"[{name[1:]}]",
        f"[{name}",
        f"[{name.upper()}]",
    ]
    new = draw(st.sampled_from([*renamed, lines[other], "", f'["{draw(WORDS)}"]']))
    lines = list(lines)
    lines[other] = draw(st.sampled_from([lines[other], lines[index]]))
    lines[index] = new
    return lines


def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The file cut short, with bytes flipped or inserted, empty, or written in another encoding."""
    at = draw(st.integers(0, len(content)))
    flipped = bytearray(content)
    for position in draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=3)):
        flipped[position : position + 1] = bytes([draw(st.integers(0, 255))])
    text = content.decode()
    encodings = ("utf-16", "utf-8-sig", "utf-32-le", "cp037")
    choices = [content[:at], bytes(flipped), content[:at] + draw(st.binary(max_size=8)) + content[at:], b""]
    choices += [text.encode(name, "replace") for name in encodings]
    choices += [content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r"), b"\0" * 4096, content * 2]
    return draw(st.sampled_from(choices))


CHANGES = (_new_line, _new_line, _new_line, _changed_line, _contradiction, _changed_section)


def _overrides() -> st.SearchStrategy[list[str]]:
    """`--key value` as the shell hands it over: any key, or one with a typo, and any value, or none."""
    fitting = st.sampled_from(
        [f"--{key}={value.strip(chr(34))}" for key, kind in KEYS.items() for value in _fitting(kind)]
    )
    typo = st.tuples(st.sampled_from(sorted(KEYS)), st.integers(0, 30)).map(lambda pair: _without(*pair))
    key = st.one_of(st.sampled_from(sorted(KEYS)), st.sampled_from(sorted(KEYS)), typo, st.text(max_size=6)).map(
        "--{}".format
    )
    shell_values = [value.strip("\"'").replace("\\u0000", "") for value in VALUES]
    value = st.one_of(st.sampled_from(shell_values), st.sampled_from(VALUES), st.text(max_size=6))
    words = st.one_of(st.tuples(key, value), st.tuples(key), st.tuples(fitting))
    return words.map(list)


def _without(word: str, index: int) -> str:
    return word[: index % len(word)] + word[index % len(word) + 1 :]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Makes failures of what computes for MAX_CPU_SECONDS, waits for MAX_SECONDS or takes MAX_BYTES more memory.

    The seconds of waiting are many because a machine that is busy with other tests lets everybody wait.
    """

    def hang(*_: object) -> None:
        raise AssertionError("still busy: it hangs")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = {number: signal.signal(number, hang) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(mutant: Mutant, folder: Path, num_ranks: int) -> Config | str:
    """Takes a mutant through everything that runs before a process group: the configuration, or the one sentence.

    Fails on any other exception, a sentence that does not say where, and a configuration that `to_toml` changes.
    """
    file = folder / FILE
    file.write_bytes(mutant.content)
    argv = ["--job.config_file", str(file), *mutant.overrides]
    with bounded():
        _check_exit(argv, num_ranks)
        try:
            config = load_config(argv)
            _check_reads_back(config, folder)
            check_layouts(config)
        except ValueError as error:
            assert_sentence(str(error))
            return str(error)
        finally:
            assert not dist.is_initialized()
    return config


def check_layouts(config: Config) -> None:
    """The checks of `--check` without `check_paths`: no real weights are on this machine."""
    for num_ranks in NUM_RANKS:
        try:
            with in_one_sentence(FILE):
                layout = resolve_layout(config, num_ranks)
            if all(role.flavor for role in config.roles.values()):
                model_family(config.recipe.family)(config).check_layouts(layout.roles)
        except ValueError as error:
            assert_sentence(str(error))


def _check_exit(argv: Sequence[str], num_ranks: int) -> None:
    stderr = io.StringIO()
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(num_ranks)
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            code = main([*argv, CHECK])
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before
    shown = stderr.getvalue()
    assert code in (0, 2)
    if code == 2:
        assert shown.startswith("error: ") and shown.endswith("\n")
        assert_sentence(shown.removeprefix("error: ").removesuffix("\n"))
    else:
        assert not shown


def _check_reads_back(config: Config, folder: Path) -> None:
    resolved = folder / "resolved.toml"
    resolved.write_text(to_toml(config), encoding="utf-8")
    try:
        again = load_config(["--job.config_file", str(resolved)])
    except ConfigError as error:
        raise AssertionError("the resolved configuration does not load") from error
    assert again == config


def assert_sentence(message: str) -> None:
    """One printable line of bearable length that names where the fault is: a file or the command line, and a key."""
    assert message.isprintable(), f"not one line, or control characters that would reach the terminal: {message!r}"
    assert len(message) < 1500, message
    place, _, fault = message.partition(": ")
    names_place = place == "command line" or Path(place).name == FILE or fault.startswith("the file ")
    # What the model family says about layouts, and the machine about float8, names the key but no file.
    assert names_place or re.match(r"roles\.\w+: |\w+\.\w+ = ", message), f"no place: {message!r}"
    names_key = re.search(r"[\w\"]\.[\w\"]|\" = |--|\[.+\]|\w+ = |at line|end of document|codec|the file", message)
    assert names_key, f"no key: {message!r}"
