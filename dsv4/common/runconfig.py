"""A run is a TOML file plus dotted overrides, read into frozen dataclasses; nothing is dropped silently.

Unknown keys fail with the nearest known name, values of the wrong type with both types. ``resolved`` writes a config
back as TOML, which is what a run folder keeps beside its checkpoints.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load(kind: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Reads `path` as a `kind` (a dataclass, nested ones as tables); `overrides` are ``table.key=value`` strings whose
    values are TOML (bare words are taken as strings). ValueError names the file and the key."""
    try:
        tree = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"no recipe at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        _override(tree, override)
    return parse(kind, tree, where=str(path))


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {override!r} is not of the form table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, leaf = key.strip().split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {table} is a value, not a table")
    tree[leaf] = value


def parse(kind: type[T], tree: dict[str, Any], where: str = "config") -> T:
    """A dict tree -> `kind`. Raises ValueError with the dotted path for unknown, missing or mistyped keys."""
    assert dataclasses.is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    values = {name: _value(hints[name], tree[name], f"{where}: {name}") for name in fields if name in tree}
    for name, field in fields.items():
        if name not in tree and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: {name} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = [a for a in arguments if a is not types.NoneType]  # only `X | None` is used; TOML has no null
        return _value(hint, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return parse(typing.cast(type, hint), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}; known: {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _value(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    plain = origin or hint
    if type(value) is not plain:  # `type is`, so that `true` is not taken for 1
        raise ValueError(f"{where} must be {plain.__name__}, got {value!r}")
    return value


def resolved(config: Any) -> str:
    """The dataclass as TOML; ``load`` reads it back to an equal object. None is left out (it is the default)."""
    lines: list[str] = []

    def table(tree: dict[str, Any], path: tuple[str, ...]) -> None:
        plain = {k: v for k, v in tree.items() if v is not None and not isinstance(v, dict)}
        if path and (plain or not tree):
            lines.extend(([""] if lines else []) + [f"[{'.'.join(path)}]"])
        lines.extend(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in plain.items())
        for key, value in tree.items():
            if isinstance(value, dict):
                table(value, (*path, key))

    table(dataclasses.asdict(config), ())
    return "\n".join(lines) + "\n"
