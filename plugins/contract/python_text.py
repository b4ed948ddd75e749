"""The contract as a Python module: `graph_passes/contract.py`, in the layout that `ruff format` gives it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from graph_passes.contract_types import Attribute, Condition, Constraint, Tensor
from plugins.contract.read import Contract

_HEAD = '''"""The contract of `{domain}::{name}`, version {version}, as data. `graph_passes.op` reads and checks nodes by it.

Made from `plugins/sparse_ffn.yaml` by `make contract`. Change that file, and run it again; do not edit this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from graph_passes.contract_types import Attribute, Condition, Constraint, Instead, Tensor

DOMAIN = {quoted_domain}
OP_TYPE = {quoted_name}
OP_VERSION = {version}

'''


def python_text(contract: Contract) -> str:
    """The module's text."""
    head = _HEAD.format(
        domain=contract.domain,
        name=contract.name,
        version=contract.version,
        quoted_domain=_literal(contract.domain),
        quoted_name=_literal(contract.name),
    )
    lists = {f"{attribute.name.upper()}S": attribute.allowed for attribute in contract.choices}
    lists["WEIGHT_TYPES"] = contract.weight_types
    return "\n".join(
        [
            head + "\n".join(f"{name} = {_literal(values)}" for name, values in lists.items()),
            "",
            f"SHADOW_BLOCK = {contract.shadow_block}",
            '"""Weights that share one (scale, offset) pair in the 4-bit shadow. `hidden_size` must be a multiple of it."""',
            "",
            "",
            "@dataclass(frozen=True)",
            "class AttributeValues:",
            '    """The attributes of one node, unchecked. Defaults are those of the op."""',
            "",
            *(f"    {a.name}: {_python_type(a)} = {_default(a)}" for a in contract.attributes),
            "",
            "",
            *_table("ATTRIBUTES", "Attribute", [_attribute(attribute) for attribute in contract.attributes]),
            *_table("INPUTS", "Tensor", [_tensor(tensor) for tensor in contract.inputs]),
            *_table("OUTPUTS", "Tensor", [_tensor(tensor) for tensor in contract.outputs]),
            *_table("CONSTRAINTS", "Constraint", [_constraint(constraint) for constraint in contract.constraints]),
        ]
    )


def _python_type(attribute: Attribute) -> str:
    return "bool" if attribute.is_flag else {"string": "str", "int": "int", "float": "float"}[attribute.type]


def _default(attribute: Attribute) -> str:
    return str(bool(attribute.default)) if attribute.is_flag else _literal(attribute.default)


def _table(name: str, kind: str, rows: list[str]) -> list[str]:
    return [f"{name}: tuple[{kind}, ...] = (", *(f"    {row}," for row in rows), ")", ""]


def _attribute(attribute: Attribute) -> str:
    parts = [_literal(attribute.name), _literal(attribute.type), _literal(attribute.default)]
    if attribute.allowed:
        named = attribute.type == "string"
        parts.append(f"allowed={attribute.name.upper()}S" if named else f"allowed={_literal(attribute.allowed)}")
    if attribute.by_reference:
        parts.append("by_reference=True")
    if attribute.read_when:
        parts.append(f"read_when={_literal(attribute.read_when)}")
    return f"Attribute({', '.join(parts)})"


def _tensor(tensor: Tensor) -> str:
    parts = [_literal(tensor.name), _literal(tensor.type), _literal(tensor.shapes)]
    for key in ("when", "only_first_when"):
        if when := getattr(tensor, key):
            parts.append(f"{key}={_literal(when)}")
    if tensor.instead is None:
        return f"Tensor({', '.join(parts)})"
    other = tensor.instead
    parts.append(f"instead=Instead({', '.join(_literal(part) for part in (other.type, other.shapes, other.unless))})")
    return f"Tensor({', '.join(parts)})"


def _constraint(constraint: Constraint) -> str:
    lines = [_conditions(constraint.if_any), _conditions(constraint.want), f"        {_literal(constraint.message)},"]
    return "\n".join(["Constraint(", *lines, "    )"])


def _conditions(conditions: tuple[Condition, ...]) -> str:
    if len(conditions) < 2:
        return f"        ({''.join(f'{_condition(each)},' for each in conditions)}),"
    return "\n".join(["        (", *(f"            {_condition(each)}," for each in conditions), "        ),"])


def _condition(condition: Condition) -> str:
    parts = [_literal(part) for part in (condition.left, condition.compare, condition.right)]
    parts += ["right_is_attribute=True"] if condition.right_is_attribute else []
    return f"Condition({', '.join(parts)})"


def _literal(value: object) -> str:
    """The value as source; strings in double quotes."""
    if isinstance(value, tuple):
        items = [_literal(item) for item in value]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value) if isinstance(value, str) else repr(value)
