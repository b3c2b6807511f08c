"""Configuration as text: types in words, `--help`, values in errors, TOML.

All of it comes from the annotations of the config dataclasses and the string literal under each field. Secrets do not
belong in a configuration (they come from the environment), but someone will write one there. In text that leaves
the process, values are therefore redacted by the name of their key, here and nowhere else.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from titan_distill.config.resume import on_resume

NO_VALUE = "none"
"""Text for None, because TOML has no null."""

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_SECRET_KEY = re.compile(r"(api|access|private)_?key|passw|secret|credential|(^|_)(token|auth)$", re.IGNORECASE)
_REDACTED = "<redacted>"


# Schemas ------------------------------------------------------------------------------------------


def field_types(kind: Any) -> dict[str, Any]:
    """Names and types of the fields that a configuration can set."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields_of(kind)}


def fields_of(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that a configuration can set."""
    return [field for field in dataclasses.fields(kind) if field.init]


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether the field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; dataclasses.MISSING if it is required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def field_docs(kind: Any) -> dict[str, str]:
    """Field docstrings: the string literal under each field of a dataclass, read from its source."""
    docs: dict[str, str] = {}
    for cls in [base for base in reversed(kind.__mro__) if "__dataclass_fields__" in vars(base)]:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, literal in itertools.pairwise(definition.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(literal, ast.Expr) and isinstance(literal.value, ast.Constant):
                docs[field.target.id] = inspect.cleandoc(str(literal.value.value))
    return docs


# Descriptions -------------------------------------------------------------------------------------


def describe(kind: Any) -> str:
    """Describes a type in words, for errors and help."""
    if kind in SCALARS:
        return SCALARS[kind]
    if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
        return "a table"
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(toml_value, options)) if len(options) > 1 else toml_value(options[0])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(NO_VALUE if option is types.NoneType else describe(option) for option in options)
    if get_origin(kind) is tuple and options[-1] is not Ellipsis:
        return f"a list of {len(options)}: {', '.join(map(describe, options))}"
    return f"a list, each item {describe(options[0])}"


def schema_help(kind: Any, hints: dict[str, Any], prefix: str = "", sections: Collection[Any] = ()) -> Iterator[str]:
    """Lines of `--help` for all keys of `kind`, single keys before tables: name, type, default, effect on a resume,
    field docstring.

    `hints` are its field types, in which the caller may have replaced Any by a dataclass. A table whose type is in
    `sections` is not spelled out again.
    """
    docs = field_docs(kind)
    for field in sorted(fields_of(kind), key=lambda field: _table_type(hints[field.name]) is not None):
        key, table = f"{prefix}{field.name}", _table_type(hints[field.name])
        if table is None:
            plain = _plain(default_of(field), "", False)
            default = "required" if is_required(field) else f"default {toml_value(plain)}"
            yield f"  --{key}: {describe(hints[field.name])} ({default}; resume: {on_resume(field)})"
            yield textwrap.indent(docs.get(field.name, ""), " " * 8)
            continue
        key = key if table is hints[field.name] else f"{key}.<name>"
        yield from ("", f"[{key}] {docs.get(field.name, '')}")
        if table is Any:
            yield "  Its keys follow from [recipe]; --help with --job.config_file FILE lists them."
        elif table not in sections:
            yield from schema_help(table, field_types(table), f"{key}.", sections or tuple(hints.values()))


def _table_type(hint: Any) -> Any:
    """The dataclass (or Any) of a field that is a table or a table of tables. None for other fields."""
    table = get_args(hint)[1] if get_origin(hint) is dict else hint
    return table if dataclasses.is_dataclass(table) or table is Any else None


def show(key: str, value: Any) -> str:
    """Formats `key = value` on one short line, without secrets."""
    if isinstance(value, dict):
        return f"[{key}]"
    if _SECRET_KEY.search(key.rpartition(".")[2].partition("[")[0]):
        return f"{key} = {_REDACTED}"
    if isinstance(value, list):
        return f"{key} = [{len(value)} items]"
    if isinstance(value, int) and value.bit_length() > 63:
        return f"{key} = (an integer of {value.bit_length()} bits)"
    shown = toml_value(value) if isinstance(value, (bool, int, float, str)) else str(value)
    return f"{key} = {shown if len(shown) <= 80 else shown[:77] + '...'}"


# Files --------------------------------------------------------------------------------------------


def redacted(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the values of secret-looking options replaced."""
    shown, hides = [], False
    for word in words:
        key, has_value, _ = word.partition("=")
        is_key = word.startswith("--")
        secret = is_key and _SECRET_KEY.search(key.rpartition(".")[2]) is not None
        shown.append(_REDACTED if hides and not is_key else f"{key}={_REDACTED}" if secret and has_value else word)
        hides = secret and not has_value
    return shown


def to_dict(config: Any, *, skip_origins: bool = False) -> dict[str, Any]:
    """The configuration as nested dicts and lists of scalars. Strings under secret-looking keys are redacted.

    `skip_origins` leaves out the fields that say where a configuration came from (`compare=False`).
    """
    plain: dict[str, Any] = _plain(config, "", skip_origins)
    return plain


def toml_text(tables: dict[str, Any]) -> str:
    """Writes nested dicts and lists of scalars as TOML."""
    return "\n".join(_toml_lines(tables)).lstrip("\n") + "\n"


def toml_value(value: Any) -> str:
    """Writes a plain value as TOML on one line. None becomes the string "none"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml_key(name)} = {toml_value(item)}' for name, item in value.items())}}}"
    quoted = json.dumps(NO_VALUE if value is None else value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


def _toml_key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else toml_value(name)


def _toml_lines(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    tables = {name: value for name, value in table.items() if isinstance(value, dict)}
    if prefix and (not table or len(tables) < len(table)):
        yield from ("", f"[{prefix}]")
    for name, value in table.items():
        if name not in tables:
            yield f"{_toml_key(name)} = {toml_value(value)}"
    for name, value in tables.items():
        yield from _toml_lines(value, f"{prefix}.{_toml_key(name)}" if prefix else _toml_key(name))


def _plain(value: Any, key: str, skip_origins: bool) -> Any:
    if dataclasses.is_dataclass(value):
        kept = [field.name for field in fields_of(value) if field.compare or not skip_origins]
        return {name: _plain(getattr(value, name), _secret_or(key, name), skip_origins) for name in kept}
    if isinstance(value, dict):
        return {name: _plain(item, _secret_or(key, name), skip_origins) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, key, skip_origins) for item in value]
    return _REDACTED if isinstance(value, str) and value and _SECRET_KEY.search(key) else value


def _secret_or(key: str, name: str) -> str:
    """The key that decides about redaction. Everything inside a secret table is secret."""
    return key if _SECRET_KEY.search(key) else name
