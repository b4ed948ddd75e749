"""The contract as a C++ header without dependencies: `plugins/include/clada/contract_tables.h`.

Types and lists are data; what needs an expression for each entry (conditions, constraints, visiting attributes) is a function.
Names of enumerators are the contract's in camel case: `gelu_tanh` is `Activation::kGeluTanh`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from graph_passes.contract_types import Attribute, Condition, Constraint, Scalar, Tensor, When
from plugins.contract.read import SIZES, TYPES, Contract

_HEAD = """\
// SPDX-License-Identifier: Apache-2.0
// The contract of {domain}::{name}, version {version}, as data. clada/contract.h checks nodes by it.
//
// Made from plugins/sparse_ffn.yaml by `make contract`. Change that file, and run it again; do not edit this one.
#ifndef CLADA_CONTRACT_TABLES_H_
#define CLADA_CONTRACT_TABLES_H_

#include <cstdint>

namespace clada {{

inline constexpr char kDomain[] = "{domain}";
inline constexpr char kOpName[] = "{name}";
inline constexpr int kOpVersion = {version};
inline constexpr char kOpVersionText[] = "{version}";
inline constexpr int kShadowBlock = {shadow_block};  // weights that share one (scale, offset) pair
"""
_FOOT = """\
}  // namespace clada

#endif  // CLADA_CONTRACT_TABLES_H_
"""
_TENSOR_TYPES = """\
// The type of a tensor: W, the one that both weights have; X, float32 or W; or always the same.
enum class TypeRule { kW, kX, kFixed };

// A size of a shape: an axis of a call, or a number. kRows stands for all axes of x but the last.
enum class Size { %s, kNumber };
struct Axis {
  constexpr Axis(Size of = Size::kNumber, int64_t by = 1) : size(of), number(by) {}
  Size size;
  int64_t number;  // what the size is divided by; of kNumber, the number
};
constexpr int kMaxAxes = %d, kMaxShapes = %d;
struct TensorShape {
  int rank = 0;
  Axis axes[kMaxAxes] = {};
};
struct TensorInfo {
  const char* name;
  TypeRule rule;
  ElementType type;  // of kFixed
  int shape_count;
  TensorShape shapes[kMaxShapes];
};
"""
_POINTED = {
    "float32": "float",
    "float16": "uint16_t",
    "bfloat16": "uint16_t",
    "int8": "uint8_t",
    "uint8": "uint8_t",
    "int32": "int32_t",
}
"""What a pointer to a tensor's data points to: 16-bit floats and packed bytes are bits. W and X depend on the call."""
_NAMES = {"bfloat16": "BFloat16"}
_WIDTH = 128


def cpp_text(contract: Contract) -> str:
    """The header's text."""
    head = _HEAD.format(
        domain=contract.domain, name=contract.name, version=contract.version, shadow_block=contract.shadow_block
    )
    other_types = [kind for kind in TYPES if kind not in contract.weight_types]
    tensors = (*contract.inputs, *contract.outputs)
    shapes = [each.shapes for tensor in tensors for each in (tensor, tensor.instead) if each is not None]
    most = max(len(shape) for several in shapes for shape in several), max(map(len, shapes))
    parts = [
        head,
        "// Types of w_in and w_out.\n" + _enum("FloatType", contract.weight_types),
        "// Types of all tensors. Those of weights come first, with the numbers that they have in FloatType.\n"
        + _enum("ElementType", (*contract.weight_types, *other_types, "other"))
        + _names("ElementType", (*contract.weight_types, *other_types, "another type")),
        "\n".join(_enum(_camel(a.name), a.allowed) + _names(_camel(a.name), a.allowed) for a in contract.choices),
        _attributes(contract),
        _visit(contract),
        _constraints(contract),
        _TENSOR_TYPES % (", ".join(_enumerator(size) for size in SIZES), *most),
        _tensors(contract, "Input", contract.inputs),
        f"// The first inputs, and the first outputs, which every node has.\n"
        f"inline constexpr int kRequiredInputs = {contract.required_inputs};\n"
        f"inline constexpr int kRequiredOutputs = {sum(not tensor.when for tensor in contract.outputs)};\n",
        _tensors(contract, "Output", contract.outputs),
        _only_first(contract),
        _instead(contract),
        _FOOT,
    ]
    return "\n".join(parts)


def _camel(name: str) -> str:
    return _NAMES.get(name) or "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _enumerator(name: Scalar) -> str:
    return f"k{_camel(str(name))}"


def _quoted(text: Scalar) -> str:
    return json.dumps(str(text))


def _wrapped(before: str, items: Iterable[str], after: str) -> str:
    """`before items, .. after` in lines of at most 128 columns, the later ones indented by four."""
    lines, line = [], before
    texts = list(items)
    for index, item in enumerate(texts):
        piece = item + ("" if index == len(texts) - 1 else ",")
        last = after if index == len(texts) - 1 else ""
        if len(line) + len(piece) + len(last) + 1 > _WIDTH:
            lines.append(line.rstrip())
            line = "    "
        line += ("" if line.endswith(("{", "    ", "(")) else " ") + piece
    return "\n".join([*lines, line + after]) + "\n"


def _enum(name: str, values: Iterable[Scalar]) -> str:
    return _wrapped(f"enum class {name} {{ ", [_enumerator(value) for value in values], " };").replace("{  k", "{ k")


def _names(name: str, values: Iterable[Scalar]) -> str:
    return _wrapped(f"inline constexpr const char* k{name}Names[] = {{", map(_quoted, values), "};")


def _type(attribute: Attribute) -> str:
    if attribute.type == "string":
        return _camel(attribute.name)
    return "bool" if attribute.is_flag else {"int": "int64_t", "float": "float"}[attribute.type]


def _value(attribute: Attribute, value: Scalar) -> str:
    if attribute.type == "string":
        return f"{_camel(attribute.name)}::{_enumerator(value)}"
    if attribute.is_flag:
        return "true" if value else "false"
    return f"{float(value)!r}f" if attribute.type == "float" else str(value)


def _attributes(contract: Contract) -> str:
    lines = [f"  {_type(a)} {a.name} = {_value(a, a.default)};" for a in contract.attributes]
    return "\n".join(["struct Attributes {", *lines, "};", ""])


def _visit(contract: Contract) -> str:
    def call(attribute: Attribute) -> str:
        if attribute.type == "string":
            return f'  visit.Choice("{attribute.name}", a.{attribute.name}, k{_camel(attribute.name)}Names);'
        kind = "Flag" if attribute.is_flag else attribute.type.capitalize()
        return f'  visit.{kind}("{attribute.name}", a.{attribute.name});'

    return "\n".join(
        [
            "// Hands each attribute to `visit`, in the contract's order: visit.Choice(name, value, names), or .Flag, .Int or",
            "// .Float(name, value). `Values` is Attributes, or const Attributes.",
            "template <class Values, class Visitor>",
            "void VisitAttributes(Values& a, Visitor& visit) {",
            *map(call, contract.attributes),
            "}",
            "",
        ]
    )


def _constraints(contract: Contract) -> str:
    by_name = {attribute.name: attribute for attribute in contract.attributes}
    body = [line for constraint in contract.constraints for line in _constraint(constraint, by_name)]
    return "\n".join(
        [
            "// Calls fail(parts...) with a message in pieces (texts, values) for each constraint that the attributes break.",
            "template <class Fail>",
            "void CheckConstraints(const Attributes& a, const Fail& fail) {",
            *body,
            "}",
            "",
        ]
    )


def _constraint(constraint: Constraint, by_name: dict[str, Attribute]) -> list[str]:
    want = [_condition(each, by_name) for each in constraint.want]
    broken = f"!({' && '.join(want)})" if len(want) > 1 else _negated(want[0])
    if constraint.if_any:
        asked = " || ".join(_condition(each, by_name) for each in constraint.if_any)
        broken = f"({asked}) && {broken}" if len(constraint.if_any) > 1 else f"{asked} && {broken}"
    return [f"  if ({broken})", _wrapped("    fail(", _message(constraint.message, by_name), ");").rstrip("\n")]


def _negated(condition: str) -> str:
    if " " not in condition:
        return condition.removeprefix("!") if condition.startswith("!") else f"!{condition}"
    swapped = {" == ": " != ", " != ": " == "}
    return next((condition.replace(a, b) for a, b in swapped.items() if a in condition), f"!({condition})")


def _message(message: str, by_name: dict[str, Attribute]) -> list[str]:
    """The pieces of a message with attributes in braces, as C++ expressions."""
    pieces = []
    for index, piece in enumerate(message.replace("{", "}").split("}")):
        if index % 2 == 0:
            pieces += [_quoted(piece)] if piece else []
        elif by_name[piece].type == "string":
            pieces.append(f"k{_camel(piece)}Names[static_cast<int>(a.{piece})]")
        else:
            pieces.append(f"a.{piece}")
    return pieces


def _condition(condition: Condition, by_name: dict[str, Attribute]) -> str:
    attribute = by_name[condition.left]
    if attribute.is_flag and condition.compare == "==":
        return f"a.{condition.left}" if condition.right else f"!a.{condition.left}"
    right = f"a.{condition.right}" if condition.right_is_attribute else _value(attribute, condition.right)
    return f"a.{condition.left} {condition.compare} {right}"


def _holds(when: When, contract: Contract) -> str:
    """Whether attributes have (one of) the values, as an expression of `a`."""
    by_name = {attribute.name: attribute for attribute in contract.attributes}

    def one(name: str, values: tuple[Scalar, ...]) -> str:
        either = [_condition(Condition(name, "==", value), by_name) for value in values]
        return either[0] if len(either) == 1 else f"({' || '.join(either)})"

    parts = [one(name, values) for name, values in when.items()]
    return parts[0].strip("()") if len(parts) == 1 else " && ".join(parts)


def _tensors(contract: Contract, kind: str, tensors: tuple[Tensor, ...]) -> str:
    many, name = f"{kind}s", kind.lower()
    pointer = "const " if kind == "Input" else ""
    return "\n".join(
        [
            _enum(kind, [tensor.name for tensor in tensors]).rstrip("\n"),
            _wrapped(
                f"inline constexpr {kind} kAll{many}[] = {{", [f"{kind}::{_enumerator(t.name)}" for t in tensors], "};"
            ).rstrip(),
            f"inline constexpr TensorInfo k{kind}Info[] = {{",
            *(f"    {_info(tensor)}," for tensor in tensors),
            "};",
            f"constexpr const TensorInfo& Info({kind} {name}) {{ return k{kind}Info[static_cast<int>({name})]; }}",
            "",
            f"// Whether a node with these attributes has the {name}.",
            *_switch(f"constexpr bool Has(const Attributes& a, {kind} {name})", kind, _conditions(contract, tensors), "true"),
            "",
            f"// Where the {many.lower()} of a call lie; null where there is none.",
            f"struct {kind}Pointers {{",
            *_aligned([(f"  {pointer}{_pointed(t)}* {t.name} = nullptr;", f"{t.type} {_shapes(t)}") for t in tensors]),
            "};",
            f"inline void Set{kind}({kind}Pointers& p, {kind} {name}, {pointer}void* data) {{",
            f"  switch ({name}) {{",
            *(f"    case {kind}::{_enumerator(t.name)}: p.{t.name} = {_cast(t, pointer)}; return;" for t in tensors),
            "  }",
            "}",
            "",
        ]
    )


def _conditions(contract: Contract, tensors: tuple[Tensor, ...]) -> list[tuple[str, str]]:
    return [(tensor.name, _holds(tensor.when, contract)) for tensor in tensors if tensor.when]


def _only_first(contract: Contract) -> str:
    cases = [(t.name, _holds(t.only_first_when, contract)) for t in contract.inputs if t.only_first_when]
    head = "constexpr bool OnlyFirstShape(const Attributes& a, Input input)"
    return "\n".join(
        [
            "// Whether the first of the input's shapes is the only one with these attributes.",
            *_switch(head, "Input", cases, "false"),
            "",
        ]
    )


def _instead(contract: Contract) -> str:
    tensors = [(tensor, tensor.instead) for tensor in contract.inputs if tensor.instead is not None]
    infos = [
        f"inline constexpr TensorInfo k{_camel(tensor.name)}Instead =\n    "
        + f"{_info(Tensor(tensor.name, instead.type, instead.shapes))};"
        for tensor, instead in tensors
    ]
    cases = [
        f"    case Input::{_enumerator(tensor.name)}: "
        f"return {_holds(instead.unless, contract)} ? Info(input) : k{_camel(tensor.name)}Instead;"
        for tensor, instead in tensors
    ]
    return "\n".join(
        [
            "// The type and shapes that an input has with these attributes.",
            *infos,
            "constexpr const TensorInfo& Info(const Attributes& a, Input input) {",
            "  switch (input) {",
            *cases,
            "    default: return Info(input);",
            "  }",
            "}",
            "",
        ]
    )


def _switch(head: str, kind: str, cases: list[tuple[str, str]], otherwise: str) -> list[str]:
    return [
        f"{head} {{",
        f"  switch ({kind.lower()}) {{",
        *(f"    case {kind}::{_enumerator(name)}: return {expression};" for name, expression in cases),
        f"    default: return {otherwise};",
        "  }",
        "}",
    ]


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    """Lines with their comments in one column."""
    width = max(len(code) for code, _ in lines)
    return [f"{code:<{width}}  // {comment}" for code, comment in lines]


def _pointed(tensor: Tensor) -> str:
    return _POINTED.get(tensor.type, "void")


def _cast(tensor: Tensor, pointer: str) -> str:
    pointed = _pointed(tensor)
    return "data" if pointed == "void" else f"static_cast<{pointer}{pointed}*>(data)"


def _shapes(tensor: Tensor) -> str:
    return " or ".join(f"[{', '.join(map(str, shape))}]" for shape in tensor.shapes)


def _info(tensor: Tensor) -> str:
    rule, kind = (_enumerator(tensor.type), "other") if tensor.type in ("W", "X") else ("kFixed", tensor.type)
    shapes = ", ".join(f"{{{len(shape)}, {{{', '.join(map(_axis, shape))}}}}}" for shape in tensor.shapes)
    return f'{{"{tensor.name}", TypeRule::{rule}, ElementType::{_enumerator(kind)}, {len(tensor.shapes)}, {{{shapes}}}}}'


def _axis(axis: str | int) -> str:
    if isinstance(axis, int):
        return f"{{Size::kNumber, {axis}}}"
    name, _, divisor = axis.partition("/")
    size = f"Size::{_enumerator(name)}"
    return f"{{{size}, {divisor}}}" if divisor else size
