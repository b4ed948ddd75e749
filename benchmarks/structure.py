"""How the code is cut up, side by side with libraries of its kind: sizes, import circles, and how far a change reaches.

    python -m benchmarks.structure                                # print the tables
    python -m benchmarks.structure --page                         # put them at the end of docs/architecture.md
    python -m benchmarks.structure --change attribute=REVISION    # and the files that a commit touched
    python -m benchmarks.structure --change target=a.py,b.py      # and those of a list

Lines are physical lines, docstrings, comments and empty ones among them; of a function from `def` to its end. A circle is a
group of modules each of which imports, by way of others, itself; imports within functions count, those for type checkers alone
do not. How far an addition reaches is seen by one of its kind that is there already: the files that name it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import networkx

from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## Side by side"
GENERATED = "by `make contract`. Change that file"
"""What the files that are made from the contract say: nobody edits them."""
SOURCES = (".py", ".cc", ".cu", ".h", ".yaml")


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: as the table shows it.
        folders: of packages, each inside the folder that its absolute imports start from.
        tops: those starting folders, one for each of `folders`.
    """

    name: str
    folders: tuple[Path, ...]
    tops: tuple[Path, ...]


@dataclass(frozen=True)
class Sizes:
    """Lines of modules or functions."""

    count: int
    median: float
    ninetieth: float
    largest: int

    def __str__(self) -> str:
        return f"{self.median:g} / {self.ninetieth:g} / {self.largest}"


@dataclass(frozen=True)
class Structure:
    """What was found of a subject. `circles` are groups of modules by their dotted names."""

    modules: Sizes
    functions: Sizes
    circles: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Kind:
    """A kind of thing that is added: one that is there, by the word that files name it with, and where to look."""

    what: str
    word: str
    folders: tuple[Path, ...]


def sizes(lines: Sequence[int]) -> Sizes:
    """The median, the 90th percentile (the least value that nine in ten do not exceed) and the largest."""
    if not lines:
        return Sizes(0, 0, 0, 0)
    ordered = sorted(lines)
    return Sizes(len(ordered), statistics.median(ordered), ordered[-(-len(ordered) * 9 // 10) - 1], ordered[-1])


def measure(subject: Subject) -> Structure:
    """Read every module of a subject.

    Raises:
        SyntaxError: a file is no Python.
    """
    trees: dict[str, ast.Module] = {}
    modules: list[int] = []
    for folder, top in zip(subject.folders, subject.tops, strict=True):
        for path in sorted(folder.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            trees[_module_name(path, top)] = ast.parse(text, str(path))
            modules.append(len(text.splitlines()))
    functions = [
        node.end_lineno - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    packages = {_module_name(path, top) for folder, top in _roots(subject) for path in folder.rglob("__init__.py")}
    return Structure(sizes(modules), sizes(functions), circles(trees, packages))


def _roots(subject: Subject) -> Iterator[tuple[Path, Path]]:
    return zip(subject.folders, subject.tops, strict=True)


def _module_name(path: Path, top: Path) -> str:
    parts = path.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(trees: dict[str, ast.Module], packages: set[str]) -> tuple[tuple[str, ...], ...]:
    """The groups of modules that import themselves by way of each other, the largest first.

    Args:
        trees: by the module's dotted name.
        packages: which of them are `__init__` files: relative imports of those start one level lower.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from(trees)
    for name, tree in trees.items():
        base = name if name in packages else name.rpartition(".")[0]
        graph.add_edges_from((name, target) for target in _imported(tree, base, trees) if target != name)
    found = (tuple(sorted(group)) for group in networkx.strongly_connected_components(graph) if len(group) > 1)
    return tuple(sorted(found, key=lambda group: (-len(group), group)))


def _imported(tree: ast.Module, base: str, known: Iterable[str]) -> Iterator[str]:
    """The known modules that a module imports; `from package import name` is one of the submodule if there is one."""
    modules = set(known)
    for node in _run_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                if inner in modules or origin in modules:
                    yield inner if inner in modules else origin


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (inner for part in node.orelse for inner in ast.walk(part))
        else:
            yield node
            yield from _run_nodes(node)


def naming(kind: Kind) -> list[Path]:
    """The files, made ones left out, that name what `kind` looks for, as a word or as a part of one with underscores."""
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(kind.word)}(?![A-Za-z0-9])", re.IGNORECASE)
    found = []
    for folder in kind.folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                if GENERATED not in text and (word.search(text) or word.search(path.stem)):
                    found.append(path)
    return found


def touched(change: str, root: Path = ROOT) -> list[str]:
    """The files of a change: those of a commit, or a list with commas between.

    Raises:
        ValueError: neither a revision nor files that are there.
    """
    files = change.split(",")
    if all((root / file).is_file() for file in files):
        return files
    command = ["git", "-C", str(root), "diff-tree", "--no-commit-id", "--name-only", "-r", change, "--"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"{change!r} is neither a revision nor a list of files in {root}: {result.stderr.strip()}")
    return result.stdout.split()


def installed(module: str, package: str) -> Subject:
    """A part of a library as it is installed.

    Args:
        module: a package's dotted name.
        package: the distribution that it comes from, for the version.
    """
    top_name, _, rest = module.partition(".")
    spec = importlib.util.find_spec(top_name)
    assert spec is not None and spec.submodule_search_locations
    top = Path(spec.submodule_search_locations[0])
    return Subject(f"`{module}` {metadata.version(package)}", (top.joinpath(*rest.split(".")),), (top.parent,))


def subjects() -> list[Subject]:
    """This project and its peers."""
    ours = (ROOT / "clada_export", ROOT / "graph_passes")
    return [
        Subject("`clada_export`, `graph_passes`", ours, (ROOT, ROOT)),
        installed("onnx_ir.passes", "onnx-ir"),
        installed("onnxscript.rewriter", "onnxscript"),
        installed("transformers.exporters", "transformers"),
    ]


def kinds() -> list[tuple[str, Kind]]:
    """Of whom, and one of each kind of thing that is added."""
    package, passes, native = ROOT / "clada_export", ROOT / "graph_passes", ROOT / "plugins"
    peers = {subject.name: subject.folders for subject in subjects()[1:]}
    (onnx_ir, onnx_ir_folders), (rewriter, rewriter_folders), (exporters, exporter_folders) = peers.items()
    return [
        ("this project", Kind("an attribute of the op", "stat_norm", (package, passes, native))),
        ("this project", Kind("a policy", "dejavu", (package, passes))),
        ("this project", Kind("a target", "trt", (package, passes))),
        (onnx_ir, Kind("a pass", "identity_elimination", onnx_ir_folders)),
        (rewriter, Kind("a rewrite rule", "cast_constant_of_shape", rewriter_folders)),
        (exporters, Kind("an exporter", "openvino", exporter_folders)),
    ]


def tables(changes: Sequence[tuple[str, str]] = ()) -> str:
    """The tables as Markdown.

    Args:
        changes: what was added, and its commit or files.
    """
    rows = []
    for subject in subjects():
        found = measure(subject)
        largest = f", the largest of {len(found.circles[0])} modules" if found.circles else ""
        rows.append(
            [
                subject.name,
                str(found.modules.count),
                str(found.modules),
                str(found.functions.count),
                str(found.functions),
                f"{len(found.circles)}{largest}",
            ]
        )
    head = ["", "modules", "lines a module", "functions", "lines a function", "import circles"]
    reach = [[kind.what, owner, f"`{kind.word}`", str(len(naming(kind)))] for owner, kind in kinds()]
    reach += [[what, "this project", f"`{change}`", str(len(touched(change)))] for what, change in changes]
    return "\n\n".join(
        [markdown(head, rows), markdown(["added", "to", "one that is there", "files that name it"], reach, numbers=False)]
    )


def section(changes: Sequence[tuple[str, str]] = ()) -> str:
    """The last section of docs/architecture.md."""
    return f"""{HEADING}

Sizes of this code and of libraries that do a part of the same, as `python -m benchmarks.structure --page` counts them: lines as
median / 90th percentile / largest, docstrings, comments and empty lines among them; imports within functions count for circles.

{tables(changes)}

The files that name one bound from above what another of its kind touches or brings: some only use it. By hand, a new attribute
of the op took 24 files before its contract was data, and six since ([measured](decisions/0012-contract-as-data.md)).
"""


def with_section(page: str, text: str) -> str:
    """The page with the section at its end, in place of an earlier one."""
    return f"{page.partition(HEADING)[0].rstrip()}\n\n{text}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the section of docs/architecture.md")
    parser.add_argument("--change", action="append", default=[], metavar="WHAT=REVISION|FILES", help="count its files too")
    options = parser.parse_args(arguments)
    changes = []
    for change in options.change:
        what, found, value = change.partition("=")
        if not found:
            parser.error(f"--change {change}: want WHAT=REVISION or WHAT=FILE,FILE")
        changes.append((what, value))
    text = section(changes)
    if options.page:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
