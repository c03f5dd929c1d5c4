"""Settings of a recipe by their dotted names, such as `optim.lr`, and recipes as JSON.

A recipe is a tree: fields of dataclasses by name, entries of tuples by number, those of dicts by key. Changes are made
on its JSON, and the recipe is built anew from it: so the declared types and the recipe's own checks have the last word,
after all changes, in whatever order they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import SequenceMatcher
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from u4d.errors import UserError
from u4d.train.recipe import Recipe

SCALARS = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}  # what JSON may hold for each
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}


def change(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with settings such as "optim.lr=3e-4", "phases.1.steps=500" or "data.sources.0.path=/x".

    Values are read as the field's type wants: numbers, text, true or false, "none" where a field may have no value,
    "0.9,0.95" for a tuple, JSON for whole dicts and lists. What has no value yet (`start`) is made by setting its
    fields.

    Raises:
        UserError: not NAME=VALUE, an unknown name (the nearest is told, and its value now), a value of another type,
            or a recipe that makes no sense.
    """
    tree = json.loads(to_json(recipe))
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise UserError(f"settings: expected NAME=VALUE such as optim.lr=3e-4, got {setting!r}")
        assign(tree, name, text)
    changed: Recipe = build(Recipe, tree, "")
    return changed


def to_json(recipe: Recipe) -> str:
    """The recipe as it stands in a run's recipe.json."""
    return json.dumps(asdict(recipe), indent=1)


def from_json(text: str) -> Recipe:
    """The recipe that `to_json` wrote; a field that is not there has its default.

    Raises:
        UserError: no JSON, a field that this version does not know, or a value that makes no sense.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"recipe: expected JSON, got {error}") from error
    recipe: Recipe = build(Recipe, tree, "")
    return recipe


def assign(tree: dict[str, Any], name: str, text: str) -> None:
    """Set one entry of a recipe's JSON.

    Raises:
        UserError: no such setting, or a text that is no value of its type.
    """
    *path, last = name.split(".")
    kind: Any = Recipe
    node: Any = tree
    for part in path:
        kind, key = entry(kind, node, part) or unknown(tree, name)
        if node[key] is None and is_dataclass(without_none(kind)):
            node[key] = {}
        node = node[key]
    kind, key = entry(kind, node, last) or unknown(tree, name)
    if is_dataclass(kind) or (is_dataclass(without_none(kind)) and text.lower() != "none"):
        parts = ", ".join(f"{name}.{field.name}" for field in fields(without_none(kind)))
        raise UserError(f"{name}: expected one of its settings, {parts}, got {text!r} for the whole")
    node[key] = parse(text, kind, name)


def entry(kind: Any, node: Any, part: str) -> tuple[Any, str | int] | None:
    """Type and key of one step down from a node of that type; None where there is no such step."""
    kind = without_none(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if part not in hints:
            return None
        node.setdefault(part, None)  # a dataclass that is only now being made
        return hints[part], part
    if get_origin(kind) is dict:
        return get_args(kind)[1], part
    if get_origin(kind) is tuple and node is not None and part.isdecimal() and int(part) < len(node):
        return item_kind(kind, int(part)), int(part)
    return None


def parse(text: str, kind: Any, name: str) -> Any:
    """The JSON value of a text by the type that is declared.

    Raises:
        UserError: it is none.
    """
    for member in members(kind):
        if member is NoneType and text.lower() == "none":
            return None
        if member is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if member is str:
            return text
        try:
            if member in (int, float):
                return member(text)
            if get_origin(member) is tuple and not text.startswith("["):
                return json.loads(f"[{text}]")
            if get_origin(member) in (dict, tuple):
                return json.loads(text)
        except ValueError:
            continue
    raise UserError(f"{name}: expected {in_words(kind)}, got {text!r}")


def build(kind: Any, value: Any, name: str) -> Any:
    """The value of a declared type from its JSON.

    Raises:
        UserError: it has another type, or a dataclass refuses its fields.
    """
    if is_dataclass(kind) and isinstance(value, dict):
        return build_dataclass(kind, value, name)
    if get_origin(kind) in (Union, UnionType):
        return build_union(kind, value, name)
    if get_origin(kind) is dict and isinstance(value, dict):
        keys, values = get_args(kind)
        built = {key: build(values, part, join(name, key)) for key, part in value.items()}
        return {parse(key, keys, f"{name}: keys") if isinstance(key, str) else key: part for key, part in built.items()}
    if get_origin(kind) is tuple and isinstance(value, list) and fits_length(kind, value):
        return tuple(build(item_kind(kind, index), part, join(name, index)) for index, part in enumerate(value))
    if kind not in SCALARS or type(value) not in SCALARS[kind]:
        raise UserError(f"{name or 'recipe'}: expected {in_words(kind)}, got {value!r}")
    return value


def build_dataclass(kind: Any, value: dict[str, Any], name: str) -> Any:
    """The same of a dataclass: what it does not know is refused, what is missing has its default."""
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise UserError(f"{join(name, key)}: no such field; {name or 'a recipe'} has {', '.join(hints)}")
    for field in fields(kind):
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(
                f"{join(name, field.name)}: expected {in_words(hints[field.name])}, got nothing; give it, too"
            )
    parts = {key: build(hints[key], part, join(name, key)) for key, part in value.items()}
    try:
        return kind(**parts)
    except UserError as error:  # it knows its fields' names, and we know where it stands
        raise UserError(join(name, str(error))) from error


def build_union(kind: Any, value: Any, name: str) -> Any:
    """The same of `A | B` and `A | None`: the first type that takes the value."""
    candidates = [member for member in members(kind) if (member is NoneType) == (value is None)]
    if len(candidates) == 1:
        return None if value is None else build(candidates[0], value, name)
    for member in candidates:
        try:
            return build(member, value, name)
        except UserError:
            continue
    raise UserError(f"{name}: expected {in_words(kind)}, got {value!r}")


def members(kind: Any) -> list[Any]:
    """The types of a union, text last since it takes everything; any other type alone."""
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    return sorted(get_args(kind), key=lambda member: member is str)


def without_none(kind: Any) -> Any:
    """The type of an optional value that is there."""
    left = [member for member in members(kind) if member is not NoneType]
    return left[0] if len(left) == 1 else kind


def item_kind(kind: Any, index: int) -> Any:
    """The type of a tuple's entry."""
    kinds = get_args(kind)
    return kinds[0] if kinds[-1] is Ellipsis else kinds[index]


def fits_length(kind: Any, value: Sequence[Any]) -> bool:
    """Whether a tuple of that type may have so many entries."""
    kinds = get_args(kind)
    return kinds[-1] is Ellipsis or len(kinds) == len(value)


def in_words(kind: Any) -> str:
    """A type as people say it."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        count = "a list" if kinds[-1] is Ellipsis else f"{len(kinds)} values"
        return f"{count}, each {in_words(kinds[0])}"
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        return f"JSON from {in_words(keys)} to {in_words(values)}"
    if is_dataclass(kind):
        return "JSON with the fields " + ", ".join(field.name for field in fields(kind))
    return " or ".join(WORDS[member] if member in WORDS else in_words(member) for member in members(kind))


def join(name: str, part: object) -> str:
    """A dotted name one step longer."""
    return f"{name}.{part}" if name else str(part)


def unknown(tree: dict[str, Any], name: str) -> Any:
    """Raise UserError with the setting that is most like a name that is none."""
    known = dict(leaves(Recipe, tree, ""))

    def likeness(path: str) -> float:
        ends = SequenceMatcher(None, path.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return ends + SequenceMatcher(None, path, name).ratio()

    nearest = max(known, key=likeness)
    raise UserError(f"{name}: no such setting; the nearest is {nearest}, which is {json.dumps(known[nearest])} now")


def leaves(kind: Any, node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All settings by their full names, with their values now; those of what is not there are None."""
    kind = without_none(kind)
    if is_dataclass(kind):
        for part, hint in get_type_hints(kind).items():
            yield from leaves(hint, (node or {}).get(part), join(name, part))
    elif get_origin(kind) is tuple and node and is_dataclass(item_kind(kind, 0)):
        for index, part in enumerate(node):
            yield from leaves(item_kind(kind, index), part, join(name, index))
    elif get_origin(kind) is dict and node:
        for key, part in node.items():
            yield from leaves(get_args(kind)[1], part, join(name, key))
    else:
        yield name, node
