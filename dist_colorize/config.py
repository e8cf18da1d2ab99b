"""YAML files and dotted overrides into trees of frozen dataclasses, and back.

Each room of the package declares its own settings as a dataclass beside the code that they govern; this module only
knows how to fill such a tree, how to name what is wrong with an input, and how to write a tree down again:

    recipe = load(Recipe, "configs/quickstart.yaml", ["train.steps=1000", "data.root=/photos"])
    text = dump(recipe)         # YAML that `load` reads back to an equal object
    print(describe(Recipe))     # every key with its type, default and meaning
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from dist_colorize import schema
from dist_colorize.errors import UserError

T = TypeVar("T")


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file and apply overrides `section.key=value`, each value written as in YAML.

    Raises UserError, which names the file and line or the override, the dotted key, and what would be right.
    """
    text = _read(path)
    mapping, lines = _parse(text, str(path))
    sources: dict[str, str] = {}
    for override in overrides:
        key = _apply(cls, mapping, override)
        sources[key] = f"override {override}"
    try:
        return _section(cls, mapping, "")
    except _Wrong as wrong:
        raise UserError(f"{_where(wrong.key, sources, lines, str(path))}: {wrong.message}") from None


def build(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """An instance of the dataclass `cls` from a plain mapping; `source` says in errors where the mapping is from."""
    try:
        return _section(cls, mapping, "")
    except _Wrong as wrong:
        raise UserError(f"{source}: {wrong.message}") from None


def dump(config: Any) -> str:
    """YAML text which `build` and `load` read back to an equal object; keys in the order of the declaration."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, nested as the dataclasses are; what `build` takes."""
    plain: dict[str, Any] = _plain(config)
    return plain


def describe(cls: type) -> str:
    """One block per key, for --help: `section.key: type = default` and the meaning of the key below it."""
    blocks = []
    for key, field, kind in schema.leaves(cls):
        default = "(required)" if schema.is_required(field) else f"= {_inline(_plain(schema.default_of(field)))}"
        blocks.append(f"{key}: {schema.type_name(kind)} {default}")
        meaning = schema.meanings(schema.owner_of(cls, key)).get(field.name)
        if meaning:
            blocks.append(textwrap.fill(meaning, 116, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(blocks)


class _Wrong(Exception):
    """A value that does not fit: its dotted key, and a message that names it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message


@dataclasses.dataclass(frozen=True)
class _Override:
    """The text right of `=`, which stands for itself where YAML's reading of it does not fit (`run.name=2024`)."""

    text: str


# ---------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """A SafeLoader which refuses a key that is given twice; plain YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f'"{key.value}" is given twice', key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper which escapes the line breaks that only Unicode knows; PyYAML reads them back as spaces."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a YAML text file: byte {error.start} is not UTF-8") from None
    except FileNotFoundError:
        folder = Path(path).parent
        near = difflib.get_close_matches(Path(path).name, [p.name for p in folder.glob("*.y*ml")], 1)
        raise UserError(
            f"no config file {path}" + (f"; did you mean {folder / near[0]}?" if near else "; check the path")
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None


def _parse(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML text, and the line (from 1) of each dotted key."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            mapping = {} if node is None else loader.construct_document(node)
            lines = dict(_lines(node, "", set()))
        finally:
            loader.dispose()
    except RecursionError:
        raise UserError(f"{source}: nested too deeply to be a config file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        hint = "; YAML is indented with spaces, never tabs" if mark and "\t" in _line(text, mark.line) else ""
        raise UserError(f"{source}{line}: not valid YAML: {problem}{hint}") from None
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict):
        raise UserError(f"{source}: a config file is a list of `key: value` lines, got {_shown(mapping)}")
    return mapping, lines


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number] if number < len(lines) else ""


def _lines(node: yaml.Node | None, prefix: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:  # an alias may lead back to its own parent
        return
    seen.add(id(node))
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _lines(value, f"{dotted}.", seen)


def _where(key: str, sources: Mapping[str, str], lines: Mapping[str, int], path: str) -> str:
    """The override or the line of the file that set `key`, or the nearest section above it."""
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    for length in range(len(parts), 0, -1):
        dotted = ".".join(parts[:length])
        if dotted in sources:
            return sources[dotted]
        if dotted in lines:
            return f"{path}, line {lines[dotted]}"
    return path


def _apply(cls: type, mapping: dict[str, Any], override: str) -> str:
    """Put one `a.b=value` into the mapping; returns its key."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals:
        near = schema.nearest(key, cls)
        raise UserError(f'override "{override}": write it as key=value, e.g. {near or "section.key"}=VALUE')
    kind = schema.kind_of(cls, key)
    if kind is None:
        raise UserError(f"override {override}: {schema.unknown_key(key, cls)}")
    if dataclasses.is_dataclass(kind):
        raise UserError(
            f"override {override}: {key} is a section; give one of its keys, e.g. {schema.nearest(key, cls)}=VALUE"
        )
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(mapping.get(section), dict):
            if mapping.get(section) is not None:
                break  # not a section in the file: building it will say so
            mapping[section] = {}
        mapping = mapping[section]
    else:
        mapping[name] = _Override(value)
    return key


# ---------------------------------------------------------------- building


def _section(cls: Any, mapping: Any, prefix: str, root: type | None = None) -> Any:
    """Build one dataclass; `prefix` is its dotted key with a dot at the end, or empty for the root."""
    root = root or cls
    key = prefix.rstrip(".")
    if not isinstance(mapping, Mapping):
        raise _Wrong(key, f"{key} must be a section of `key: value` lines, got {_shown(mapping)}")
    kinds = schema.kinds(cls)
    for name in mapping:
        if name not in kinds:
            raise _Wrong(f"{prefix}{name}", schema.unknown_key(f"{prefix}{name}", root))
    values = {}
    for field in dataclasses.fields(cls):
        dotted = f"{prefix}{field.name}"
        if field.name in mapping:
            value = mapping[field.name]
            if dataclasses.is_dataclass(kinds[field.name]) and value is None:
                value = {}  # `train:` with nothing below it
            values[field.name] = _convert(kinds[field.name], value, dotted, root)
        elif schema.is_required(field):
            raise _Wrong(key, f"{dotted} is required and missing")
    try:
        return cls(**values)
    except ValueError as error:
        message = str(error)
        first = re.match(r"\w*", message)
        name = first.group() if first else ""
        # "crop must be ..." becomes "data.crop must be ..."
        raise _Wrong(f"{prefix}{name}", f"{prefix}{message}" if name in kinds else f"{key}: {message}") from None


def _convert(kind: Any, value: Any, key: str, root: type) -> Any:
    """`value` as the type `kind`, or _Wrong. Only lossless readings: 1 is a float; true is no int, nor is 1.5."""
    if isinstance(value, _Override):
        return _convert_override(kind, value.text, key, root)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        others = [a for a in arguments if a is not type(None)]
        for other in others:
            try:
                return _convert(other, value, key, root)
            except _Wrong:
                if len(others) == 1:
                    raise
    elif origin is Literal:
        for allowed in arguments:
            if type(allowed) is type(value) and allowed == value:
                return allowed
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], 1)
        raise _Wrong(
            key,
            f"{key} must be one of {', '.join(str(a) for a in arguments)}, got {_shown(value)}"
            + (f"; did you mean {near[0]}?" if near else _quoting(value)),
        )
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        several = origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
        if several or len(value) == len(arguments):
            kinds = [arguments[0]] * len(value) if several else arguments
            return origin(
                _convert(k, v, f"{key}[{i}]", root) for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    elif dataclasses.is_dataclass(kind):
        return _section(kind, value, f"{key}.", root)
    elif kind is float and (number := _as_float(value)) is not None:
        if number != number:
            raise _Wrong(key, f"{key} must be a number, got .nan, which is none")
        return number
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is kind:
        return value
    hint = _quoting(value) if kind in (str, Path) else ""
    raise _Wrong(key, f"{key} must be {schema.type_words(kind)}, got {_shown(value)}{hint}")


def _convert_override(kind: Any, text: str, key: str, root: type) -> Any:
    """YAML's reading of the text where it fits the type, else the bare text where that fits."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    try:
        return _convert(kind, value, key, root)
    except _Wrong:
        try:
            return _convert(kind, text.strip(), key, root)
        except _Wrong:
            pass
        raise


def _as_float(value: Any) -> float | None:
    """A YAML number as a float. YAML 1.1 takes `1e-3` (no dot) for a string; everybody else takes it for a number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return None
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return None


# ---------------------------------------------------------------- words


def _shown(value: Any) -> str:
    """A value as the user wrote it, with its kind where that is the trouble."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, str):
        return f'the text "{value}"'
    if isinstance(value, (list, tuple)):
        return f"the list {_inline(value)}"
    return _inline(value)


def _quoting(value: Any) -> str:
    """YAML reads no, on, 2024-01-01 and the like as something else than text."""
    return "" if value is None or isinstance(value, (str, list, tuple, Mapping)) else "; put text in quotes"


def _inline(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True).split("\n...")[0].strip()
    )


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as the dicts, lists and strings that YAML has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
