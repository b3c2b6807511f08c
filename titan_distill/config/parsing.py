"""Parsing: from TOML and dotted overrides to frozen, typed dataclasses. It knows no key of the configuration.

The annotations of the dataclasses are the schema. `convert` walks them beside the parsed TOML and is strict: true is
not an integer, 3 is a number, "3" is neither. A command-line value arrives as text. It enters the same tree as a `Text`
leaf, and the type of its field reads it, so `--job.name 12` stays a string, and both sources share one set of rules and
errors. Every problem is a ConfigError of one sentence, and the first one ends the parse.

tyro builds the subcommands of `cli.py`, but not this: it needs the whole schema as one type before it reads a word.
Here the file decides about `[roles.<name>]` tables, a value in it types `[method_config]`, and an error says which
file, key and nearest key it means.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import operator
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from titan_distill.config.paths import seen_from
from titan_distill.config.text import BARE_KEY, NO_VALUE, SCALARS, describe, field_types, fields_of, is_required, show

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMAND_LINE = "command line"
_LONGEST_MESSAGE = 1000
_LIMITS = {
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


class ConfigError(ValueError):
    """A configuration that cannot be used. The message is one sentence for the user, on one printable line."""

    def __init__(self, message: str) -> None:
        # A terminal obeys control characters, and nobody finds a fault behind a screenful of one value.
        line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        super().__init__(line if len(line) <= _LONGEST_MESSAGE else f"{line[:700]} ... {line[-250:]}")


@dataclass(frozen=True)
class Text:
    """A command-line value before its type is known. None for an option without a value."""

    text: str | None


class CommandLineTable(dict[str, Any]):
    """A table of which every key comes from the command line."""


@dataclass(frozen=True)
class Place:
    """Position of a value: file (or command line) and dotted key. `root` is the schema in which errors search for
    similar keys. `may_be_infinite` says whether inf is a value for this key."""

    source: str
    key: str
    root: type
    may_be_infinite: bool = False

    def child(self, name: str, value: Any) -> Place:
        """The place of `value` under the key `name` of this table."""
        name = name if BARE_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)
        source = COMMAND_LINE if isinstance(value, (Text, CommandLineTable)) else self.source
        return Place(source, f"{self.key}.{name}" if self.key else name, self.root)

    def fail(self, value: Any, problem: str) -> NoReturn:
        """Raises ConfigError with source, key, value and problem."""
        shown = f"--{self.key}" if value == Text(None) else show(self.key, plain_text(value))
        raise ConfigError(f"{self.source}: {shown} {problem}")


# Reading ------------------------------------------------------------------------------------------


def read_toml(path: str) -> dict[str, Any]:
    """Parses a TOML file, with or without a byte-order mark. Raises ConfigError when it is missing, unreadable or not
    TOML (with the line)."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        problem = "cannot be read" if isinstance(error, OSError) else "is not valid TOML"
        hint = _hint_of_file(Path(path)) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path or repr(path)}{seen_from(path)}: the file {problem}: {reason}{hint}") from error


def _hint_of_file(missing: Path) -> str:
    near = difflib.get_close_matches(missing.name, [path.name for path in missing.parent.glob("*.toml")], n=1)
    return f"; did you mean {missing.parent / near[0]}?" if near else ""


def parse_overrides(argv: Sequence[str]) -> list[tuple[str, Text]]:
    """Splits `--key value`, `--key=value` and the lone `--key` of a switch into pairs, in order."""
    overrides: list[tuple[str, Text]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        key, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not all(key.split(".")):
            raise ConfigError(f"{COMMAND_LINE}: {word!r} is not expected here; write overrides as --section.key VALUE")
        is_switch = not has_value and (not words or words[0].startswith("--"))
        text = None if is_switch else value if has_value else words.pop(0)
        if any("\ud800" <= character <= "\udfff" for character in f"{key}{text}"):
            raise ConfigError(f"{COMMAND_LINE}: {word!r} or its value is not valid UTF-8")
        overrides.append((key, Text(text)))
    return overrides


def apply_overrides(raw: dict[str, Any], overrides: Sequence[tuple[str, Text]]) -> None:
    """Lays overrides into the parsed TOML, in place. A later override wins."""
    for key, text in overrides:
        *names, last = key.split(".")
        table = raw
        for depth, name in enumerate(names):
            table = table.setdefault(name, CommandLineTable())
            if not isinstance(table, dict):
                path = ".".join(names[: depth + 1])
                raise ConfigError(f"{COMMAND_LINE}: --{key} goes through {path}, which is a value; give it as --{path}")
        table[last] = text


# Converting ---------------------------------------------------------------------------------------


def convert(kind: Any, value: Any, at: Place) -> Any:
    """Converts `value` (parsed TOML or Text) to `kind`: a dataclass, scalar, Literal, X | None, Literal | tuple,
    tuple, list or dict[str, X]. Raises ConfigError with place, value and allowed values.

    Numbers are finite, because no check of a range notices nan, and inf passes most. A dataclass names the fields in
    which inf has a meaning in `may_be_infinite`.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(kind, value, at)
    if value == Text(None) and kind is not bool:
        raise ConfigError(f"{at.source}: --{at.key} needs a value after it: {describe(kind)}")
    if dataclasses.is_dataclass(kind):
        return _convert_table(kind, value, at)
    if origin is Literal:
        return _convert_literal(kind, value, at)
    if origin in (tuple, list):
        return _convert_sequence(kind, value, at)
    if origin is dict:
        return _convert_dict(kind, value, at)
    return _convert_scalar(kind, value, at)


def reject_unknown_keys(names: Sequence[str], raw: Mapping[str, Any], at: Place) -> None:
    """Raises ConfigError for the first key that is not among `names`, with the nearest key."""
    for name, value in raw.items():
        if name not in names:
            known = f"keys of [{at.key}]" if at.key else "sections"
            nearest = _nearest_key(name, names, at)
            hint = f"; did you mean {nearest}?" if nearest else ""
            at.child(name, value).fail(value, f"is not known; the {known} are {', '.join(names) or '(none)'}{hint}")


def _convert_table(kind: Any, value: Any, at: Place) -> Any:
    if not isinstance(value, Mapping):
        at.fail(value, f"must be {describe(kind)}; set one of {', '.join(field_types(kind))} in it")
    hints = field_types(kind)
    reject_unknown_keys(list(hints), value, at)
    infinite = getattr(kind, "may_be_infinite", ())
    values = {
        name: convert(hints[name], item, dataclasses.replace(at.child(name, item), may_be_infinite=name in infinite))
        for name, item in value.items()
    }
    for field in fields_of(kind):
        if field.name in values or not is_required(field):
            continue
        if not dataclasses.is_dataclass(hints[field.name]):
            key = at.child(field.name, None).key
            raise ConfigError(f"{at.source}: {key} is required but missing; set it to {describe(hints[field.name])}")
        values[field.name] = convert(hints[field.name], {}, at.child(field.name, None))
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(_located(str(error), kind, value, at)) from error


def _located(message: str, kind: Any, table: Mapping[str, Any], at: Place) -> str:
    """Returns a section's error with file and section put before the field name that starts its message."""
    name = message.partition(" ")[0]
    if name in field_types(kind):
        place = at.child(name, table.get(name))
        return f"{place.source}: {place.key}{message.removeprefix(name)}"
    return f"{at.source}: [{at.key}] {message}"


def _convert_union(kind: Any, value: Any, at: Place) -> Any:
    options, text = get_args(kind), plain_text(value)
    if types.NoneType in options and text == NO_VALUE:
        return None
    *words, last = [option for option in options if option is not types.NoneType]
    assert all(get_origin(word) is Literal for word in words), f"{at.key}: the type {kind} is not supported"
    for word in words:
        if text in get_args(word):
            return text
    if words and not (isinstance(value, list) or (isinstance(value, Text) and "," in (value.text or ""))):
        at.fail(value, f"must be {describe(kind)}")
    return convert(last, value, at)


def _convert_literal(kind: Any, value: Any, at: Place) -> Any:
    for option in get_args(kind):
        if value == Text(str(option)) or (value == option and type(value) is type(option)):
            return option
    text, words = plain_text(value), [str(option) for option in get_args(kind)]
    near = difflib.get_close_matches(text, words, n=1) if isinstance(text, str) else []
    at.fail(value, f"must be {describe(kind)}" + (f"; did you mean {json.dumps(near[0])}?" if near else ""))


def _convert_sequence(kind: Any, value: Any, at: Place) -> Any:
    items = _items_from_text(value.text or "") if isinstance(value, Text) else value
    if not isinstance(items, list):
        at.fail(value, f"must be {describe(kind)}")
    options = get_args(kind)
    is_fixed = get_origin(kind) is tuple and options[-1] is not Ellipsis
    if is_fixed and len(items) != len(options):
        at.fail(value, f"has {len(items)} items but must be {describe(kind)}")
    kinds = options if is_fixed else itertools.repeat(options[0])
    places = (dataclasses.replace(at, key=f"{at.key}[{index}]") for index in itertools.count())
    return get_origin(kind)(convert(*triple) for triple in zip(kinds, items, places, strict=False))


def _items_from_text(text: str) -> Any:
    """Returns the items of `0.0,0.999` as Text, and those of `[0.0, 0.999]` as TOML reads them. None for any other
    text."""
    if not text.startswith("["):
        return [Text(item.strip()) for item in text.split(",")] if text.strip() else []
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return None
    return parsed["value"] if len(parsed) == 1 else None


def _convert_dict(kind: Any, value: Any, at: Place) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        at.fail(value, f"must be {describe(kind)}")
    return {name: convert(get_args(kind)[1], item, at.child(name, item)) for name, item in value.items()}


def _convert_scalar(kind: Any, value: Any, at: Place) -> Any:
    assert kind in SCALARS, f"{at.key}: configuration fields of type {kind} are not supported"
    raw = _scalar_from_text(kind, value.text) if isinstance(value, Text) else value
    if isinstance(raw, int) and raw.bit_length() > 63:
        at.fail(value, f"must be {describe(kind)} that fits into 64 bits")
    if kind is float and type(raw) is int:
        raw = float(raw)
    if type(raw) is not kind:
        at.fail(value, f"must be {describe(kind)}")
    if isinstance(raw, float) and not (math.isfinite(raw) or (at.may_be_infinite and math.isinf(raw))):
        at.fail(value, f"must be {describe(kind) if at.may_be_infinite else 'a finite number'}")
    return raw


def _scalar_from_text(kind: Any, text: str | None) -> Any:
    """Returns the value that TOML would read for this kind, or the text itself."""
    if kind is bool:
        return {None: True, "true": True, "false": False}.get(text and text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _dotted_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in field_types(kind).items():
        values = get_args(hint)[1:] if get_origin(hint) is dict else (hint,)
        key = f"{prefix}{name}.<name>" if get_origin(hint) is dict else f"{prefix}{name}"
        if dataclasses.is_dataclass(values[0]):
            yield from _dotted_keys(values[0], f"{key}.")
        else:
            yield key


def _nearest_key(name: str, siblings: Sequence[str], at: Place) -> str | None:
    """Returns the closest key of the same table, else a key of that name elsewhere, else the closest dotted key."""
    if near := difflib.get_close_matches(name, siblings, n=1):
        return at.child(near[0], None).key
    everywhere = list(_dotted_keys(at.root))
    same_name = sorted((key for key in everywhere if key.rpartition(".")[2] == name), key=lambda key: key.count("."))
    near = same_name or difflib.get_close_matches(f"{at.key}.{name}", everywhere, n=1)
    return near[0] if near else None


def plain_text(value: Any) -> Any:
    """Returns the text of a command-line value, and any other value unchanged."""
    return value.text if isinstance(value, Text) else value


# Checking -----------------------------------------------------------------------------------------


def check_range(section: Any, *names: str, **limits: float) -> None:
    """Raises ValueError unless each named field is within the given limits `least`, `most`, `above` and `below`.

    The limits hold for every item of a tuple. A field that is None passes.
    """
    allowed = " and ".join(f"{_LIMITS[limit][1]} {bound}" for limit, bound in limits.items())
    for name in names:
        value = getattr(section, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(_LIMITS[limit][0](number, bound) for number in numbers for limit, bound in limits.items()):
            raise ValueError(f"{name} = {value} is out of range; choose {allowed}")


def check_no_effect(section: Any, *names: str, given: str) -> None:
    """Raises ValueError for the first named field that is not at its default, although it has no effect with the
    present value of the field `given`."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name in names and value != field.default:
            present = show(given, getattr(section, given))
            raise ValueError(f"{show(field.name, value)} has no effect with {present}; remove it or change {given}")


def nearest_multiples(value: int, unit: int) -> str:
    """Returns the multiples of `unit` nearest to `value`, for an error: "8 or 12"."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def nearest_divisors(value: int, whole: int) -> str:
    """Returns the divisors of `whole` nearest to `value`, for an error: "2 or 4"."""
    divisors = [number for number in range(1, whole + 1) if whole % number == 0]
    below = [number for number in divisors if number <= value]
    above = [number for number in divisors if number > value]
    return " or ".join(map(str, below[-1:] + above[:1]))
