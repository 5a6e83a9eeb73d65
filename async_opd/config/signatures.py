"""What classes of an installed package take, read from its source as msgspec types.

The package is not imported: vLLM takes seven seconds for that, and a machine that only submits runs
may lack it. What TOML has no value for, such as a function, is left out of a union; what is not
understood is taken to be anything.
"""

import ast
import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

PLAIN: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "None": None,
    "dict": dict[str, Any],
    "Dict": dict[str, Any],
    "list": list[Any],
    "List": list[Any],
    "set": set[Any],
    "tuple": tuple[Any, ...],
}
SEQUENCES = {"list", "List", "Sequence", "Iterable", "set", "Set", "tuple", "Tuple"}
TABLES = {"dict", "Dict", "Mapping"}
UNWRITABLE = {"Callable", "type", "Type", "torch", "np"}  # no value of TOML
BOUNDS = ("ge", "gt", "le", "lt")


class Unwritable:
    """A type of which TOML has no value."""


class Place(NamedTuple):
    """A name in a module of a package."""

    module: str
    name: str


class Field(NamedTuple):
    """One that a class declares, with its annotation and its default, where it has one."""

    annotation: ast.expr
    default: ast.expr | None
    module: str


def struct_of(place: Place, bounded_as: Iterable[Place] = ()) -> type[Struct] | None:
    """Read what a class is made with: names, types and bounds, where `bounded_as` are classes whose
    fields of these names have bounds that hold for it too. None where the package is absent."""
    if _tree(place.module) is None:
        return None
    more: dict[str, dict[str, float]] = {}
    for other in bounded_as:
        for name, field in _declared(other).items():
            more.setdefault(name, _bounds(field.default))
    return _struct(place, more)


def _struct(place: Place, more: dict[str, dict[str, float]]) -> type[Struct]:
    fields: list[tuple[str, Any, Any]] = []
    for name, field in _declared(place).items():
        if name.startswith("_") or _keyword(field.default, "init") is False:
            continue
        bounds = more.get(name, {}) | _bounds(field.default)
        type_ = _bounded(_type(field.annotation, field.module), bounds)
        default = msgspec.NODEFAULT if field.default is None else None
        fields.append((_keyword(field.default, "alias") or name, type_, default))
    return msgspec.defstruct(place.name, fields, kw_only=True, forbid_unknown_fields=True)


@cache
def _tree(module: str) -> dict[str, ast.stmt] | None:
    """Parse a module into what defines each of its names; None where its package is absent."""
    package, *inner = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(spec.submodule_search_locations[0], *inner)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not file.is_file():
        return {}
    names: dict[str, ast.stmt] = {}
    for statement in _statements(ast.parse(file.read_text(encoding="utf-8")).body):
        for name in _names(statement):
            names.setdefault(name, statement)
    return names


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under `if` and `try` too."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])
        else:
            yield statement


def _names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.ClassDef(name=name):
            return [name]
        case ast.ImportFrom(names=aliases):
            return [alias.asname or alias.name for alias in aliases]
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _home(place: Place) -> tuple[str, ast.stmt] | None:
    """Follow the imports of a name to the module and statement that define it."""
    for _ in range(10):
        statement = (_tree(place.module) or {}).get(place.name)
        if not isinstance(statement, ast.ImportFrom):
            return None if statement is None else (place.module, statement)
        source = statement.module or ""
        if statement.level:
            package = place.module.split(".")
            folder = _is_package(place.module)
            above = package[: len(package) + folder - statement.level]
            source = ".".join([*above, *([source] if source else [])])
        names = {alias.asname or alias.name: alias.name for alias in statement.names}
        place = Place(source, names[place.name])
    return None


def _is_package(module: str) -> bool:
    package, *inner = module.split(".")
    spec = find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return bool(locations) and Path(locations[0], *inner).is_dir()


def _declared(place: Place) -> dict[str, Field]:
    """List the fields of a class, those of its bases first."""
    match _home(place):
        case (module, ast.ClassDef(bases=bases, body=body)):
            fields: dict[str, Field] = {}
            for base in bases:
                if isinstance(base, ast.Name):
                    fields |= _declared(Place(module, base.id))
            for line in body:
                match line:
                    case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=value):
                        if "ClassVar" not in ast.unparse(kind):
                            fields[name] = Field(kind, value, module)
            return fields
    return {}


def _type(node: ast.expr, module: str) -> Any:
    """Turn an annotation into a type that msgspec converts to."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(text)):
            return _type(ast.parse(text, mode="eval").body, module)
        case ast.Name(id=name):
            return PLAIN[name] if name in PLAIN else _type_of_name(Place(module, name))
        case ast.BinOp(left=left, right=right, op=ast.BitOr()):
            return _union([_type(left, module), _type(right, module)])
        case ast.Attribute(value=ast.Name(id=name)) if name in UNWRITABLE:
            return Unwritable
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            return _type_of(name, inner.elts if isinstance(inner, ast.Tuple) else [inner], module)
    return Any


def _type_of(name: str, inner: list[ast.expr], module: str) -> Any:
    """Turn a subscripted annotation into a type."""
    if name == "Literal":
        words = [
            (each.value,) if isinstance(each, ast.Constant) else get_args(_type(each, module))
            for each in inner
        ]
        return Literal[tuple(itertools.chain(*words))] if all(words) else Any
    if name in UNWRITABLE:
        return Unwritable
    types = [_type(each, module) for each in inner if not _is_ellipsis(each)]
    if name in ("Union", "Optional"):
        return _union([*types, *([None] if name == "Optional" else [])])
    if name in ("Annotated", "SkipValidation"):
        return types[0]
    if name in SEQUENCES:
        return list[types[0] if len(types) == 1 else Any]
    return dict[str, types[1]] if name in TABLES else Any


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


@cache
def _type_of_name(place: Place) -> Any:
    """Turn a name of a module into the type it stands for: an alias, an enum by the names and plain
    values of its members, a class by its fields."""
    if place.name in UNWRITABLE:
        return Unwritable
    match _home(place):
        case (module, ast.Assign(value=value)):
            return _type(value, module)
        case (module, ast.AnnAssign(value=ast.expr() as value)):
            return _type(value, module)
        case (module, ast.ClassDef(name=name) as statement):
            bases = {ast.unparse(base) for base in statement.bases}
            if any("Enum" in base for base in bases):
                members = _members(statement)
                return Literal[tuple(members)] if members else Any
            if _declared(Place(module, name)) and _is_data(statement, module):
                return _struct(Place(module, name), {})
    return Any


def _is_data(statement: ast.ClassDef, module: str) -> bool:
    """Tell whether a class is made from its fields: a dataclass, or a model of pydantic's."""
    for base in statement.bases:
        home = _home(Place(module, base.id)) if isinstance(base, ast.Name) else None
        if ast.unparse(base).endswith("BaseModel"):
            return True
        if home and isinstance(home[1], ast.ClassDef) and _is_data(home[1], home[0]):
            return True
    return any(
        word in ast.unparse(decorator)
        for decorator in statement.decorator_list
        for word in ("dataclass", "config")
    )


def _members(statement: ast.ClassDef) -> list[Any]:
    """List what a member of an enum is written as: its name, or its value where that is plain."""
    members: list[Any] = []
    texts = any(ast.unparse(base) in ("str", "StrEnum") for base in statement.bases)
    for line in statement.body:
        match line:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name[0] != "_":
                plain = value.value if isinstance(value, ast.Constant) else None
                members += [name] if not texts else []
                members += [plain] if isinstance(plain, int) or (texts and plain) else []
    return list(dict.fromkeys(members))


def _union(types: list[Any]) -> Any:
    """Join types as far as msgspec can tell them apart: one of texts, of lists and of tables each.
    Those that name what is allowed go before those that do not."""
    flat = [each for type_ in types for each in _alternatives(type_)]
    flat = [each for each in flat if each is not Unwritable]
    if Any in flat or not flat:
        return Any if flat else Unwritable
    values = [v for each in flat if get_origin(each) is Literal for v in get_args(each)]
    named = [each for each in flat if isinstance(each, type) and issubclass(each, Struct)]
    kept: list[Any] = [Literal[tuple(dict.fromkeys(values))]] if values else []
    kept += named[:1]
    for each in flat:
        origin = get_origin(each) or each
        taken = {get_origin(other) or other for other in kept}
        names = (origin is str and any(isinstance(v, str) for v in values)) or (
            origin is int and any(isinstance(v, int) for v in values)
        )
        if not names and origin not in taken | {Literal} and not (origin is dict and named):
            kept += [each] if each not in named else []
    return Union[tuple(kept)]  # noqa: UP007, of as many as there are


def _alternatives(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)


def _bounds(default: ast.expr | None) -> dict[str, float]:
    """Read the bounds that a field's default gives it."""
    numbers = {name: _keyword(default, name) for name in BOUNDS}
    return {name: n for name, n in numbers.items() if isinstance(n, int | float)}


def _bounded(type_: Any, bounds: dict[str, float]) -> Any:
    """Put bounds on the number of a type."""
    if not bounds:
        return type_
    kinds = _alternatives(type_)
    meta: Any = Meta
    bounded = [Annotated[k, meta(**bounds)] if k in (int, float) else k for k in kinds]
    return Union[tuple(bounded)] if len(bounded) > 1 else bounded[0]  # noqa: UP007


def _keyword(call: ast.expr | None, name: str) -> Any:
    """Read a plain value that a call is given by name; None where there is none."""
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None
