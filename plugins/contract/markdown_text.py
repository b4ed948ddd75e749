"""The contract's tables in a page, each between two comments: `<!-- contract: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from graph_passes.contract_types import Attribute, Scalar, Tensor, When
from plugins.contract.read import Contract, ContractFileError

_MARKED = re.compile(r"(<!-- contract: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_page(page: str, contract: Contract) -> str:
    """The page with its marked parts made anew; the rest stays.

    Raises:
        ContractFileError: a part is not there, or is marked by a name that has no table.
    """
    found = [match["name"] for match in _MARKED.finditer(page)]
    if sorted(found) != sorted(_PARTS):
        raise ContractFileError(f"the page has the parts {', '.join(found) or '(none)'}; wanted {', '.join(_PARTS)} once each")
    return _MARKED.sub(
        lambda match: match[1] + "".join(f"{line}\n" for line in _PARTS[match["name"]](contract)) + match[3], page
    )


def _types(contract: Contract) -> list[str]:
    *others, last = contract.weight_types
    return [f"W is {', '.join(others)} or {last}, one type for both weights. X is float32 or W."]


def _tensors(tensors: tuple[Tensor, ...]) -> list[str]:
    rows = [(_code(t.name), _form(t), _condition(t.when) or "always", t.meaning) for t in tensors]
    return _table(("name", "type, shape", "there when", "meaning"), rows)


def _attributes(contract: Contract) -> list[str]:
    rows = [(_code(a.name), _value(a.default), _allowed(a), a.meaning) for a in contract.attributes]
    return _table(("name", "default", "allowed", "meaning"), rows)


_PARTS: Mapping[str, Callable[[Contract], list[str]]] = {
    "inputs": lambda contract: _tensors(contract.inputs),
    "types": _types,
    "outputs": lambda contract: _tensors(contract.outputs),
    "attributes": _attributes,
}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [_row(head), _row(("---",) * len(head)), *map(_row, rows)]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text}`"


def _value(value: Scalar) -> str:
    return _code(value) if isinstance(value, str) else f"{value:g}"


def _form(tensor: Tensor) -> str:
    plain = f"{tensor.type} {_shapes(tensor.shapes)}"
    if tensor.instead is None:
        return plain
    return f"{plain}; {tensor.instead.type} {_shapes(tensor.instead.shapes)} unless {_condition(tensor.instead.unless)}"


def _shapes(several: Sequence[Sequence[str | int]]) -> str:
    shapes = [", ".join(".." if axis == "rows" else str(axis) for axis in shape) for shape in several]
    return " or ".join(f"[{shape}]" for shape in shapes)


def _condition(when: When) -> str:
    return " and ".join(
        f"{name} {', '.join(map(_value, values))}" if isinstance(values[0], str) else f"{_code(name)} = {_value(values[0])}"
        for name, values in when.items()
    )


def _allowed(attribute: Attribute) -> str:
    allowed = ", ".join(map(_value, attribute.allowed)) or attribute.limits or "finite"
    notes = [attribute.note] if attribute.note else []
    notes += [f"read with {_condition(attribute.read_when)}"] if attribute.read_when else []
    return "; ".join([allowed, *notes])
