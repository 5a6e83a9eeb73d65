"""Mistakes in a tree of settings, in words: the key's path, the value, what is allowed, the nearest
spelling."""

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import msgspec
from msgspec import Struct, inspect

from async_opd.core.errors import ConfigError
from async_opd.core.suggest import did_you_mean, either, shown, wrong

DEEPEST = 50  # levels of tables and lists; none of ours has more than 4
ASKED_FOR = {  # what is to be said of a setting that is not ours, by the words of its name
    "(?<![_-])key(?![_-])|api_?key|secret|password|(api|auth|access|bearer)_?token|authorization": (
        "no key is written down here: `key_env` of a teacher names the environment's variable that"
        " holds it"
    ),
    "qlora": "QLoRA is out of scope for now: the weights beside an adapter are not quantized",
    "lora|peft": "LoRA is set by student.lora = { rank, alpha, dropout, target_modules }",
    "(sequence|context)_parallel|ulysses": (
        "sequence parallelism is out of scope for now: a rank takes whole sequences"
    ),
    "tools?|turns|multi_?turn": (
        "multi-turn tools are out of scope for now: a rollout is one answer to one prompt"
    ),
}


def refuse_mistakes(tree: Any, kind: type[Struct]) -> None:
    """Raise ConfigError for the first unknown key, missing key, wrong type or value out of bounds,
    in any section."""
    if _depth(tree) > DEEPEST:
        raise ConfigError(f"settings lie in one another {_depth(tree)} deep: must be <= {DEEPEST}")
    fields = msgspec.structs.fields(kind)
    _check(tree, kind, "", {f.name: _sections(f.type) for f in fields if not _named(f.type)})


def refuse_unlike(table: dict[str, Any], kind: type[Struct], path: str) -> None:
    """Raise ConfigError for the first name or value of the table at `path` that `kind` has not."""
    _check(table, kind, path, {})


def _check(tree: Any, kind: type[Struct], path: str, root: dict[str, list[type[Struct]]]) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} = {shown(tree)}: must be {_a_section(path, [kind])}")
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    for name, value in tree.items():
        if name not in fields and name != kind.__struct_config__.tag_field:
            raise ConfigError(_unknown(path, name, value, fields, root))
    for name, field in fields.items():
        key, sections = _joined(path, name), _sections(field.type)
        if name in tree:
            if sections and _named(field.type):
                if not isinstance(tree[name], dict):
                    raise ConfigError(f"{key} = {shown(tree[name])}: must be sections [{key}.NAME]")
                for section, settings in tree[name].items():
                    _check(settings, sections[0], _joined(key, section), root)
            elif sections:
                _check(tree[name], _variant(tree[name], sections, key), key, root)
            elif tree[name] != "" or field.default != "":  # where it stands for none
                _check_value(key, tree[name], field.type)
        elif field.required:
            info = inspect.type_info(field.type)
            allowed = _a_section(key, sections) if sections else _allowed(info)
            raise ConfigError(f"{key}: missing; must be {allowed}")


def _check_value(path: str, value: Any, type_: Any) -> None:
    if isinstance(value, dict) and getattr(type_, "__origin__", type_) is dict:
        for name, inner in value.items():  # whose place is its own
            if not _sound(inner):
                _check_value(_joined(path, name), inner, dict if isinstance(inner, dict) else float)
    info = inspect.type_info(type_)
    if _sound(value) and (value != "" or _may_be_empty(info)):
        with suppress(msgspec.ValidationError):
            msgspec.convert(value, type_)
            return
    if isinstance(info, inspect.UnionType):
        kinds = [each for each in info.types if not isinstance(each, inspect.NoneType)]
        info = kinds[0] if len(kinds) == 1 else info
    if isinstance(info, inspect.LiteralType):
        raise ConfigError(wrong(path, value, info.values))
    raise ConfigError(f"{path} = {shown(value)}: must be {_allowed(info)}")


def _may_be_empty(info: inspect.Type) -> bool:
    """Tell whether a text of that type may be empty: where its bound says so."""
    if isinstance(info, inspect.UnionType):
        return any(map(_may_be_empty, info.types))
    return isinstance(info, inspect.StrType) and info.min_length == 0


def _sound(value: Any) -> bool:
    """Tell whether every number within is finite and of 64 bits, and no text is what Unicode has
    no place for: what goes on the wire, and into config.json."""
    match value:
        case float():
            return math.isfinite(value)
        case int():
            return -(2**63) <= value < 2**63
        case str():
            return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
        case dict():
            return all(_sound(each) for pair in value.items() for each in pair)
        case list():
            return all(map(_sound, value))
    return True


def _depth(value: Any) -> int:
    """Count the levels of tables and lists in one another."""
    depth, level = 0, [value]
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
    return depth


def _sections(type_: Any) -> list[type[Struct]]:
    """List the section a type stands for; several where a tag tells which; none for a plain
    value."""
    types = getattr(type_, "__args__", (type_,))
    return [t for t in types if isinstance(t, type) and issubclass(t, Struct)]


def _named(type_: Any) -> bool:
    """Tell whether a type stands for a table of settings, or of sections, by names that the user
    gives."""
    return getattr(type_, "__origin__", None) is dict


def _variant(tree: Any, sections: list[type[Struct]], path: str) -> type[Struct]:
    """Choose the section that the tree's tag asks for."""
    if len(sections) == 1 or not isinstance(tree, dict):
        return sections[0]
    field = str(sections[0].__struct_config__.tag_field)
    known = {str(section.__struct_config__.tag): section for section in sections}
    if field not in tree:
        raise ConfigError(f"{_joined(path, field)}: missing; must be {either(sorted(known))}")
    if str(tree[field]) not in known:
        raise ConfigError(wrong(_joined(path, field), tree[field], sorted(known)))
    return known[str(tree[field])]


def _unknown(
    path: str, name: str, value: Any, fields: Iterable[str], root: dict[str, list[type[Struct]]]
) -> str:
    """Suggest the same name in another section, and the nearest one in this section."""
    for words, why in ASKED_FOR.items():
        if re.search(f"(^|[_-])({words})([_-]|$)", name.lower()):
            return f"{_joined(path, name)}: {why}"
    key = _joined(path, name)
    homes = [
        _joined(home, name)
        for home, kinds in root.items()
        if any(name in kind.__struct_encode_fields__ for kind in kinds)
    ]
    close = get_close_matches(name.lower(), fields, n=1, cutoff=0.5)
    near = [_joined(path, each) for each in close]
    hint = (
        did_you_mean([home for home in homes if home != key] + near)
        or f"; allowed: {', '.join(fields)}"
    )
    if isinstance(value, dict):
        return f"{key}: no such section{hint}"
    return f"{key} = {shown(value)}: no such setting{hint}"


def _a_section(path: str, sections: list[type[Struct]]) -> str:
    """Put into words a section that is missing."""
    fields = msgspec.structs.fields(sections[0])
    tag = sections[0].__struct_config__.tag_field
    needed = [tag] if tag else [field.encode_name for field in fields if field.required]
    return f"a section [{path}] with {', '.join(needed)}" if needed else f"a section [{path}]"


def _allowed(info: inspect.Type) -> str:
    """Put a type and its bounds into words."""
    match info:
        case inspect.LiteralType(values=values):
            return either(values)
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return "a string that is not empty"
        case inspect.IntType() | inspect.FloatType():
            noun = "an integer" if isinstance(info, inspect.IntType) else "a finite number"
            signs = {">": info.gt, ">=": info.ge, "<": info.lt, "<=": info.le}
            bounds = " and ".join(
                f"{sign} {bound}" for sign, bound in signs.items() if bound is not None
            )
            return f"{noun} {bounds}".rstrip()
        case inspect.TupleType(item_types=items):
            return f"[{', '.join(map(_allowed, items))}]"
        case (
            inspect.VarTupleType(item_type=inspect.AnyType())
            | inspect.ListType(item_type=inspect.AnyType())
        ):
            return "a list"
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return f"a list of {_allowed(item)}"
        case inspect.UnionType(types=types):
            return " or ".join(_allowed(t) for t in types if not isinstance(t, inspect.NoneType))
    return "a table { name = value }"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
