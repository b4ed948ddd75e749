"""Read `plugins/sparse_ffn.yaml` and check that it is whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from graph_passes.contract_types import Attribute, Condition, Constraint, Instead, Scalar, Tensor, When

TYPES = ("float32", "float16", "bfloat16", "int8", "uint8", "int32")
"""Element types of tensors. Another one also needs a line in `cpp_text` and in each shell's conversion."""
SIZES = ("rows", "B", "d", "f", "n", "E", "T", "R", "Q")
OUTPUT_SIZES = ("rows", "B", "d", "f")
"""Sizes that shells know of an output before a call."""


class ContractFileError(ValueError):
    """The file states no contract: says what, where, the value found and what is wanted."""


@dataclass(frozen=True)
class Contract:
    """The whole contract, in the file's order."""

    domain: str
    name: str
    version: int
    shadow_block: int
    weight_types: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    constraints: tuple[Constraint, ...]

    @property
    def choices(self) -> tuple[Attribute, ...]:
        """The attributes that are one of a list of names."""
        return tuple(attribute for attribute in self.attributes if attribute.type == "string")

    @property
    def required_inputs(self) -> int:
        """How many inputs every node has; they come first."""
        return sum(not tensor.when for tensor in self.inputs)


def _of(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def _list(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


_TEXT = {"type": "string", "minLength": 1}
_NAME = {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"}
_NUMBER = {"type": "number"}
_WHEN = {"type": "object", "additionalProperties": _list({"type": ["string", "integer"]}), "minProperties": 1}
_SHAPES = _list(_list({"anyOf": [{"type": "integer"}, {"pattern": f"^({'|'.join(SIZES)})(/[0-9]+)?$"}]}))
_TENSOR = _of(
    {"name": _NAME, "type": {"enum": [*TYPES, "W", "X"]}, "shapes": _SHAPES, "meaning": _TEXT},
    when=_WHEN,
    only_first_when=_WHEN,
    instead=_of({"type": {"enum": TYPES}, "shapes": _SHAPES, "unless": _WHEN}),
)
_ATTRIBUTE = _of(
    {
        "name": _NAME,
        "type": {"enum": ["string", "int", "float"]},
        "default": {"type": ["string", "number"]},
        "meaning": _TEXT,
    },
    allowed=_list({"type": ["string", "integer"]}),
    min=_NUMBER,
    above=_NUMBER,
    below={"anyOf": [_NUMBER, {"type": "string", "pattern": r"^\d+\^\d+$"}]},
    by_reference={"type": "boolean"},
    read_when=_WHEN,
    note=_TEXT,
)
SCHEMA = _of(
    {
        "domain": _TEXT,
        "name": _TEXT,
        "version": {"type": "integer", "minimum": 1},
        "shadow_block": {"type": "integer", "minimum": 2},
        "weight_types": _list({"enum": TYPES}),
        "inputs": _list(_TENSOR),
        "outputs": _list(_TENSOR),
        "attributes": _list(_ATTRIBUTE),
        "constraints": _list(_of({"message": _TEXT}, if_any=_list(_TEXT), want=_list(_TEXT), ranges=_list(_NAME))),
        "size_rules": _list(_TEXT),
    }
)


def read_contract(path: Path) -> Contract:
    """The contract that `path` states.

    Raises:
        ContractFileError: a key that is missing or unknown, or a name or a value that the file does not have.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(document))
    if error is not None:
        raise ContractFileError(f"{path}: {error.json_path}: {error.message}")
    try:
        return _contract(document)
    except ContractFileError as found:
        raise ContractFileError(f"{path}: {found}") from None


def _contract(document: dict[str, Any]) -> Contract:
    entries = {entry["name"]: entry for entry in document["attributes"]}
    attributes = tuple(_attribute(entry) for entry in entries.values())
    known = {attribute.name: attribute for attribute in attributes}
    contract = Contract(
        domain=document["domain"],
        name=document["name"],
        version=document["version"],
        shadow_block=document["shadow_block"],
        weight_types=tuple(document["weight_types"]),
        inputs=tuple(_tensor(entry) for entry in document["inputs"]),
        outputs=tuple(_tensor(entry) for entry in document["outputs"]),
        attributes=attributes,
        constraints=tuple(_constraints(document["constraints"], entries, known)),
    )
    _check(contract, known)
    return contract


def _when(entry: Mapping[str, Any], key: str) -> When:
    return {name: tuple(values) for name, values in entry.get(key, {}).items()}


def _attribute(entry: Mapping[str, Any]) -> Attribute:
    return Attribute(
        name=entry["name"],
        type=entry["type"],
        default=entry["default"],
        allowed=tuple(entry.get("allowed", ())),
        by_reference=entry.get("by_reference", False),
        read_when=_when(entry, "read_when"),
        limits=_limits(entry),
        meaning=entry["meaning"],
        note=entry.get("note", ""),
    )


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    return Tensor(
        name=entry["name"],
        type=entry["type"],
        shapes=_shapes(entry),
        when=_when(entry, "when"),
        only_first_when=_when(entry, "only_first_when"),
        instead=_instead(entry["instead"]) if "instead" in entry else None,
        meaning=entry["meaning"],
    )


def _instead(entry: Mapping[str, Any]) -> Instead:
    return Instead(entry["type"], _shapes(entry), _when(entry, "unless"))


def _shapes(entry: Mapping[str, Any]) -> tuple[tuple[str | int, ...], ...]:
    return tuple(tuple(shape) for shape in entry["shapes"])


_LIMITS = {"min": ("at least", ">="), "above": ("above", ">"), "below": ("below", "<")}


def _limits(entry: Mapping[str, Any]) -> str:
    """The range in words: "at least 1 and below 2^31"."""
    return " and ".join(f"{words} {_shown(entry[key])}" for key, (words, _) in _LIMITS.items() if key in entry)


def _shown(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(entry: Mapping[str, Any]) -> list[Condition]:
    return [Condition(entry["name"], compare, _number(entry[key])) for key, (_, compare) in _LIMITS.items() if key in entry]


def _number(value: Scalar) -> Scalar:
    """A number that may be written as a power: 2^31."""
    if isinstance(value, str):
        base, exponent = value.split("^")
        power: int = int(base) ** int(exponent)
        return power
    return value


def _constraints(
    stated: list[dict[str, Any]], entries: Mapping[str, Any], known: Mapping[str, Attribute]
) -> Iterable[Constraint]:
    """Ranges with a message of their own first, then the file's constraints."""
    told = [name for entry in stated for name in entry.get("ranges", ())]
    for name in told:
        _find(known, name, "constraints")
    for name, entry in entries.items():
        if name not in told and (conditions := _range(entry)):
            message = f"attribute '{name}' is {{{name}}}; it must be {_limits(entry)}"
            yield Constraint((), tuple(conditions), message)
    for entry in stated:
        want = [condition for name in entry.get("ranges", ()) for condition in _range(entries[name])]
        want += [_condition(text, known) for text in entry.get("want", ())]
        if not want:
            raise ContractFileError(f"constraints: {entry['message']!r} wants nothing; state `want` or `ranges`")
        if_any = [_condition(text, known) for text in entry.get("if_any", ())]
        yield Constraint(tuple(if_any), tuple(want), entry["message"])


def _condition(text: str, known: Mapping[str, Attribute]) -> Condition:
    """Read `attribute compare value`; the value may be another number attribute."""
    found = re.fullmatch(r"(\w+) (==|!=|>=|<=|>|<) (\S+)", text)
    if found is None:
        raise ContractFileError(f"constraints: {text!r} is no condition; wanted ATTRIBUTE COMPARISON VALUE, as in load_min > 0")
    left, compare, right = found.groups()
    attribute = _find(known, left, "constraints")
    if attribute.type == "string":
        if compare not in ("==", "!="):
            raise ContractFileError(f"constraints: {text!r} orders names; wanted == or !=")
        _check_value(attribute, right, "constraints")
        return Condition(left, compare, right)
    if right in known:
        return Condition(left, compare, right, right_is_attribute=True)
    try:
        return Condition(left, compare, float(right) if attribute.type == "float" else int(right))
    except ValueError:
        raise ContractFileError(f"constraints: {text!r}: {right!r} is neither a number nor an attribute") from None


def _find(known: Mapping[str, Attribute], name: str, where: str) -> Attribute:
    if name not in known:
        raise ContractFileError(f"{where}: there is no attribute {name!r}; wanted one of {', '.join(known)}")
    return known[name]


def _check_value(attribute: Attribute, value: Scalar, where: str) -> None:
    if attribute.allowed and value not in attribute.allowed:
        allowed = ", ".join(map(str, attribute.allowed))
        raise ContractFileError(f"{where}: attribute {attribute.name!r} can't be {value!r}; allowed: {allowed}")


def _check(contract: Contract, known: Mapping[str, Attribute]) -> None:
    """Names that are used exist, once each, and what the shells rely on holds."""
    for kind in ("inputs", "outputs", "attributes"):
        names = [entry.name for entry in getattr(contract, kind)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ContractFileError(f"{kind}: {twice[0]!r} is there twice")
    for attribute in contract.attributes:
        _check_attribute(attribute, known)
    for tensor in (*contract.inputs, *contract.outputs):
        for when in (tensor.when, tensor.only_first_when, tensor.instead.unless if tensor.instead else {}):
            _check_when(when, known, tensor.name)
    for kind, tensors in (("inputs", contract.inputs), ("outputs", contract.outputs)):
        first = [not tensor.when for tensor in tensors]
        if first != sorted(first, reverse=True):
            raise ContractFileError(f"{kind}: those without `when` must come first, as the runtimes' variadic lists want")
    for tensor in contract.outputs:
        if tensor.instead is not None:
            raise ContractFileError(f"outputs: {tensor.name!r} has `instead`; it is for inputs")
        if len(tensor.shapes) != 1 or (other := [axis for axis in tensor.shapes[0] if axis not in OUTPUT_SIZES]):
            what = "has several shapes" if len(tensor.shapes) != 1 else f"has the axis {other[0]}"
            raise ContractFileError(f"outputs: {tensor.name!r} {what}; wanted one shape of {', '.join(OUTPUT_SIZES)}")


def _check_attribute(attribute: Attribute, known: Mapping[str, Attribute]) -> None:
    where = f"attribute {attribute.name!r}"
    wanted = {"string": str, "int": int, "float": float}[attribute.type]
    if type(attribute.default) is not wanted:
        raise ContractFileError(f"{where}: the default is {attribute.default!r}; wanted a value of type {attribute.type}")
    if attribute.type == "string" and not attribute.allowed:
        raise ContractFileError(f"{where}: a string needs `allowed`")
    if attribute.type == "int" and attribute.allowed not in ((), (0, 1)):
        raise ContractFileError(f"{where}: allowed is {list(attribute.allowed)}; wanted [0, 1], or a range")
    if attribute.by_reference and attribute.type != "float":
        raise ContractFileError(f"{where}: by_reference is for floats; it is of type {attribute.type}")
    _check_value(attribute, attribute.default, where)
    _check_when(attribute.read_when, known, where)


def _check_when(when: When, known: Mapping[str, Attribute], where: str) -> None:
    for name, values in when.items():
        for value in values:
            _check_value(_find(known, name, where), value, where)
