"""What a tree of config dataclasses declares: keys, types, meanings, and words for them in messages.

config.py reads and writes such trees; this module only looks at their declaration.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


@functools.cache
def kinds(cls: Any) -> dict[str, Any]:
    """The resolved type of each field of a dataclass, by field name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def leaves(cls: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every key below `cls` that holds a value: dotted key, field, type; in the order of the declaration."""
    for field in dataclasses.fields(cls):
        kind = kinds(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, kind


def sections(cls: Any, prefix: str = "") -> Iterator[str]:
    """The dotted key of every section below `cls`."""
    for name, kind in kinds(cls).items():
        if dataclasses.is_dataclass(kind):
            yield f"{prefix}{name}"
            yield from sections(kind, f"{prefix}{name}.")


def kind_of(cls: type, key: str) -> Any:
    """The declared type of a dotted key, None where there is no such key."""
    kind: Any = cls
    for name in key.split("."):
        declared = kinds(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else {}
        if name not in declared:
            return None
        kind = declared[name]
    return kind


def owner_of(cls: type, key: str) -> type:
    """The dataclass that declares the last part of a dotted key."""
    section = key.rpartition(".")[0]
    return kind_of(cls, section) if section else cls


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, by field name, in one line."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, SyntaxError):  # no source at hand, e.g. compiled modules only
        return {}
    found = {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for declared, below in itertools.pairwise(body):
        if (
            isinstance(declared, ast.AnnAssign)
            and isinstance(declared.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[declared.target.id] = " ".join(below.value.value.split())
    return found


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether the field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field that is not required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def nearest(key: str, cls: type) -> str | None:
    """The valid dotted key that a mistyped one most likely means; a section's name yields its first key."""
    valid = [leaf for leaf, _, _ in leaves(cls)]
    below = [leaf for leaf in valid if leaf.startswith(f"{key}.")]
    if below:
        return below[0]
    section, _, name = key.rpartition(".")
    candidates = [*valid, *sections(cls)]
    siblings = {other: other.rpartition(".")[2] for other in candidates if other.rpartition(".")[0] == section}
    same_name = [other for other in valid if other.rpartition(".")[2] == name]
    # The right name in the wrong section, then a near miss in this section, in the whole tree, in both parts.
    near = difflib.get_close_matches(key, same_name, 1, 0.0)
    for names in (siblings, {other: other.rpartition(".")[2] for other in candidates}):
        close = difflib.get_close_matches(name, names.values(), 1, 0.6)
        near = near or [other for other, its_name in names.items() if its_name in close]
    if not siblings:
        near = near or difflib.get_close_matches(key, candidates, 1, 0.6)
    return near[0] if near else None


def unknown_key(key: str, cls: type) -> str:
    """The message for a key that does not exist."""
    near = nearest(key, cls)
    section = key.rpartition(".")[0]
    owner = kind_of(cls, section) if section else cls
    names = list(kinds(owner)) if dataclasses.is_dataclass(owner) else list(kinds(cls))
    return f"unknown key {key}; " + (f"did you mean {near}?" if near else f"valid keys here: {', '.join(names)}")


def type_words(kind: Any) -> str:
    """A type in a sentence: "must be a whole number or null"."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else type_words(a) for a in arguments)
    if origin is list or (origin is tuple and arguments[1:] == (Ellipsis,)):
        return f"a list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} values [{', '.join(type_name(a) for a in arguments)}]"
    return names.get(kind) or type_name(kind)


def type_name(kind: Any) -> str:
    """A type in a table: "int|null"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if origin is Literal:
        return "|".join(str(a) for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return "|".join(type_name(a) for a in arguments)
    if origin in (list, tuple):
        return f"[{', '.join('...' if a is Ellipsis else type_name(a) for a in arguments)}]"
    return getattr(kind, "__name__", str(kind))
