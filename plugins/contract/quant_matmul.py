"""The tables of `com.clada::QuantMatMul`, from `plugins/quant_matmul.yaml`.

Apart from those of SparseFFN: that op's generator is about enumerations, types that follow each other and inputs that hang on
them. This op has four integers, and its data are the layout of a record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from plugins.contract.read import ContractFileError

SOURCE = Path("plugins") / "quant_matmul.yaml"
PYTHON = Path("graph_passes") / "quant" / "contract.py"
HEADER = Path("plugins") / "include" / "clada" / "quant_matmul_tables.h"
PAGE = Path("docs") / "quant-matmul-op.md"

_TEXT = {"type": "string", "minLength": 1}
_INT = {"type": "integer"}


def _of(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


_TENSOR = _of({"name": _TEXT, "type": _TEXT, "shape": _list(_TEXT), "meaning": _TEXT}, when=_TEXT)
_ATTRIBUTE = _of({"name": _TEXT, "meaning": _TEXT}, default=_INT, allowed=_list(_INT), min=_INT, below=_TEXT)
SCHEMA = _of(
    {
        "domain": _TEXT,
        "name": _TEXT,
        "version": {"type": "integer", "minimum": 1},
        "layout": _of({name: {"type": "integer", "minimum": 1} for name in ("block", "tile_rows", "step", "high_bits")}),
        "least_exponent": _INT,
        "inputs": _list(_TENSOR),
        "outputs": _list(_TENSOR),
        "attributes": _list(_ATTRIBUTE),
    }
)


@dataclass(frozen=True)
class Format:
    """What a record of codes of `bits` bits holds, in bytes."""

    bits: int
    low_bits: int
    high: int
    low: int
    scales: int

    @property
    def bytes(self) -> int:
        """Without offsets, which take as much as the scales."""
        return self.high + self.low + self.scales


def texts(root: Path) -> Mapping[Path, str]:
    """The text of every file that is made, by its path under `root`.

    Raises:
        ContractFileError: the contract or the page is not as it has to be.
    """
    contract = read(root / SOURCE)
    page = (root / PAGE).read_text(encoding="utf-8")
    return {PYTHON: _python(contract), HEADER: _header(contract), PAGE: _fill(page, contract)}


def read(path: Path) -> Mapping[str, Any]:
    """The document, whole.

    Raises:
        ContractFileError: a key that is missing or unknown, or a value that is not allowed.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(document))
    if error is not None:
        raise ContractFileError(f"{path}: {error.json_path}: {error.message}")
    names = [attribute["name"] for attribute in document["attributes"]]
    for tensor in (*document["inputs"], *document["outputs"]):
        if "when" in tensor and tensor["when"] not in names:
            raise ContractFileError(f"{path}: {tensor['name']!r} hangs on {tensor['when']!r}; wanted one of {', '.join(names)}")
    high = document["layout"]["high_bits"]
    for bits in _allowed_bits(document):
        if bits < high or (bits > high and 8 % (bits - high)):
            raise ContractFileError(f"{path}: codes of {bits} bits have no low plane that fills bytes, above {high} bits")
    checked: Mapping[str, Any] = document
    return checked


def formats(contract: Mapping[str, Any]) -> list[Format]:
    """What each width of codes takes in a record."""
    layout = contract["layout"]
    rows, block, high = layout["tile_rows"], layout["block"], layout["high_bits"]
    return [
        Format(bits, bits - high, rows * block * high // 8, rows * block * (bits - high) // 8, rows * 2)
        for bits in _allowed_bits(contract)
    ]


def _allowed_bits(contract: Mapping[str, Any]) -> list[int]:
    return next(list(a["allowed"]) for a in contract["attributes"] if a["name"] == "bits")


_PYTHON_HEAD = '''"""The contract of `{domain}::{name}`, version {version}, as data. `graph_passes.quant.op` reads it.

Made from `plugins/quant_matmul.yaml` by `make contract`. Change that file, and run it again; do not edit this one.
"""

from __future__ import annotations

DOMAIN = "{domain}"
OP_TYPE = "{name}"
OP_VERSION = {version}

'''


def _python(contract: Mapping[str, Any]) -> str:
    bits = ", ".join(map(str, _allowed_bits(contract)))
    return _PYTHON_HEAD.format(**contract) + "\n".join(
        [
            *(f"{name.upper()} = {value}" for name, value in contract["layout"].items()),
            f"LEAST_AMAX = 2.0**{contract['least_exponent']}",
            f"BITS = ({bits})",
            f"MOST_FEATURES = {_power(_attribute(contract, 'out_features')['below'])}",
            '"""`out_features` is below it."""',
            "",
            f"INPUTS = {_names(contract['inputs'])}",
            f"OUTPUTS = {_names(contract['outputs'])}",
            f"ATTRIBUTES = {_names(contract['attributes'])}",
            "",
        ]
    )


def _names(entries: list[Mapping[str, Any]]) -> str:
    names = ", ".join(f'"{entry["name"]}"' for entry in entries)
    return f"({names}{',' if len(entries) == 1 else ''})"


def _power(text: str) -> int:
    base, exponent = text.split("^")
    power: int = int(base) ** int(exponent)
    return power


def _attribute(contract: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(each for each in contract["attributes"] if each["name"] == name)
    return found


_HEADER = """\
// SPDX-License-Identifier: Apache-2.0
// The contract of {domain}::{name}, version {version}, as data: names, and the layout of a record.
//
// Made from plugins/quant_matmul.yaml by `make contract`. Change that file, and run it again; do not edit this one.
#ifndef CLADA_QUANT_MATMUL_TABLES_H_
#define CLADA_QUANT_MATMUL_TABLES_H_

#include <cstdint>

namespace clada::quant {{

inline constexpr char kOpName[] = "{name}";
inline constexpr char kOpVersionText[] = "{version}";

constexpr int64_t kBlock = {block};     // neighbouring weights of a row that share a scale
constexpr int64_t kTileRows = {tile_rows};  // rows of the matrix that lie together
constexpr int64_t kStep = {step};       // neighbouring weights of a row that lie together
constexpr int kHighBits = {high_bits};      // of a code, in the high plane
constexpr int kLeastExponent = {least_exponent};  // of 2: a block of x below it is zeros
constexpr int64_t kMostFeatures = {most_features};

constexpr int kFormats = {count};
constexpr int kFormatBits[kFormats] = {{{bits}}};
inline constexpr char kFormatList[] = "{bits}";

// The bytes of a record: a block of each row of a tile. Its parts follow each other in this order.
constexpr int64_t PlaneBytes(int bits) {{ return kTileRows * kBlock * bits / 8; }}
constexpr int64_t kHighBytes = PlaneBytes(kHighBits);
constexpr int64_t LowBytes(int bits) {{ return PlaneBytes(bits - kHighBits); }}
constexpr int64_t kScaleBytes = kTileRows * 2;
constexpr int64_t RecordBytes(int bits, bool has_offset) {{
  return kHighBytes + LowBytes(bits) + kScaleBytes * (has_offset ? 2 : 1);
}}
{checks}

struct Attributes {{
  int64_t out_features = 0;
{defaults}
}};

constexpr int kRequiredInputs = {required};
inline constexpr const char* kInputNames[] = {{{inputs}}};

}}  // namespace clada::quant

#endif  // CLADA_QUANT_MATMUL_TABLES_H_
"""


def _header(contract: Mapping[str, Any]) -> str:
    checks = [
        f"static_assert(RecordBytes({each.bits}, false) == {each.bytes} && RecordBytes({each.bits}, true) == "
        f'{each.bytes + each.scales}, "as documented");'
        for each in formats(contract)
    ]
    defaults = []
    for attribute in contract["attributes"]:
        if "default" in attribute:
            is_flag = attribute["allowed"] == [0, 1]
            value = ("true" if attribute["default"] else "false") if is_flag else attribute["default"]
            defaults.append(f"  {'bool' if is_flag else 'int64_t'} {attribute['name']} = {value};")
    return _HEADER.format(
        **contract["layout"],
        domain=contract["domain"],
        name=contract["name"],
        version=contract["version"],
        least_exponent=contract["least_exponent"],
        most_features=_power(_attribute(contract, "out_features")["below"]),
        count=len(formats(contract)),
        bits=", ".join(map(str, _allowed_bits(contract))),
        checks="\n".join(checks),
        defaults="\n".join(defaults),
        required=sum("when" not in tensor for tensor in contract["inputs"]),
        inputs=", ".join(f'"{tensor["name"]}"' for tensor in contract["inputs"]),
    )


_MARKED = re.compile(r"(<!-- contract: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _fill(page: str, contract: Mapping[str, Any]) -> str:
    parts = {
        "inputs": _tensor_rows(contract["inputs"]),
        "outputs": _tensor_rows(contract["outputs"]),
        "attributes": _attribute_rows(contract),
        "formats": _format_rows(contract),
    }
    found = [match["name"] for match in _MARKED.finditer(page)]
    if sorted(found) != sorted(parts):
        raise ContractFileError(f"the page has the parts {', '.join(found) or '(none)'}; wanted {', '.join(parts)} once each")
    return _MARKED.sub(lambda match: match[1] + "".join(f"{line}\n" for line in parts[match["name"]]) + match[3], page)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def _tensor_rows(tensors: list[Mapping[str, Any]]) -> list[str]:
    rows = []
    for tensor in tensors:
        shape = ", ".join(".." if axis == "rows" else axis for axis in tensor["shape"])
        when = f"`{tensor['when']}` = 1" if "when" in tensor else "always"
        rows.append((f"`{tensor['name']}`", f"{tensor['type']} [{shape}]", when, tensor["meaning"]))
    return _table(("name", "type, shape", "there when", "meaning"), rows)


def _attribute_rows(contract: Mapping[str, Any]) -> list[str]:
    rows = []
    for each in contract["attributes"]:
        allowed = ", ".join(map(str, each.get("allowed", ()))) or f"at least {each['min']} and below {each['below']}"
        rows.append((f"`{each['name']}`", str(each.get("default", "none")), allowed, each["meaning"]))
    return _table(("name", "default", "allowed", "meaning"), rows)


def _format_rows(contract: Mapping[str, Any]) -> list[str]:
    weights = contract["layout"]["tile_rows"] * contract["layout"]["block"]
    rows = [
        (str(f.bits), str(f.low_bits), str(f.high), str(f.low), str(f.scales), str(f.bytes), f"{8 * f.bytes / weights:g}")
        for f in formats(contract)
    ]
    return _table(("bits", "low bits", "high plane", "low plane", "scales", "record", "bits a weight"), rows)
