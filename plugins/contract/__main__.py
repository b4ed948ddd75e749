"""`python -m plugins.contract [--check]`: write what is made from the contracts in `plugins/`, or say what is behind them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from plugins.contract import quant_matmul
from plugins.contract.cpp_text import cpp_text
from plugins.contract.markdown_text import fill_page
from plugins.contract.python_text import python_text
from plugins.contract.read import ContractFileError, read_contract

ROOT = Path(__file__).parents[2]
SOURCE = Path("plugins") / "sparse_ffn.yaml"
PYTHON = Path("graph_passes") / "contract.py"
HEADER = Path("plugins") / "include" / "clada" / "contract_tables.h"
PAGE = Path("docs") / "sparse-ffn-op.md"
COMMAND = "make contract"


def texts(root: Path) -> Mapping[Path, str]:
    """The text of every file that is made, by its path under `root`.

    Raises:
        ContractFileError: the contract or the page is not as it has to be.
    """
    contract = read_contract(root / SOURCE)
    page = (root / PAGE).read_text(encoding="utf-8")
    sparse_ffn = {PYTHON: python_text(contract), HEADER: cpp_text(contract), PAGE: fill_page(page, contract)}
    return {**sparse_ffn, **quant_matmul.texts(root)}


def stale(root: Path) -> list[Path]:
    """The files that are not what their contract makes, or are not there."""
    return [path for path, text in texts(root).items() if _content(root / path) != text]


def write(root: Path) -> list[Path]:
    """Make all files; one that is right already is left alone, so that nothing is built again for it.

    Returns:
        Those that changed.
    """
    behind = stale(root)
    made = texts(root)
    for path in behind:
        (root / path).write_text(made[path], encoding="utf-8")
    return behind


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The command; 1 if `--check` finds a file behind, or the contract can't be read."""
    parser = argparse.ArgumentParser(prog="python -m plugins.contract", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is behind")
    check: bool = parser.parse_args(arguments).check
    try:
        behind = stale(root) if check else write(root)
    except ContractFileError as error:
        print(error, file=sys.stderr)
        return 1
    for path in behind:
        if check:
            source = SOURCE if path in (PYTHON, HEADER, PAGE) else quant_matmul.SOURCE
            print(f"{path} is not what {source} makes: run `{COMMAND}` and commit it", file=sys.stderr)
        else:
            print(f"wrote {path}")
    return int(check and bool(behind))


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
