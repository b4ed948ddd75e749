"""The script that measures how code is cut up, on packages whose numbers are known."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import structure
from benchmarks.structure import Kind, Subject, measure, naming, sizes, touched, with_section

FILES = {
    "shop/__init__.py": "",
    "shop/till.py": "import typing\nif typing.TYPE_CHECKING:\n    from shop import door\n\ndef pay() -> int:\n    return 1\n",
    "shop/door.py": "from shop.till import pay\nimport shop.shelf\n",
    "shop/shelf.py": "def take() -> None:\n    from . import door\n\n    def inner() -> None:\n        pass\n",
    "shop/stock/__init__.py": "from .box import lid\n",
    "shop/stock/box.py": "from . import tape\nlid = 1\n",
    "shop/stock/tape.py": "from ..till import pay\nimport json\n",
}


@pytest.fixture
def shop(tmp_path: Path) -> Subject:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Subject("shop", (tmp_path / "shop",), (tmp_path,))


def test_modules_and_functions_are_counted_with_all_their_lines(shop: Subject) -> None:
    found = measure(shop)
    assert (found.modules.count, found.modules.largest) == (7, 6)
    # `pay` of two lines, `take` of five, and `inner` within it of two.
    assert (found.functions.count, found.functions.median, found.functions.largest) == (3, 2, 5)


def test_a_circle_through_a_function_is_one_and_one_for_type_checkers_is_none(shop: Subject) -> None:
    # door -> shelf -> door; till imports door for type checkers only; a package imports its own module.
    assert measure(shop).circles == (("shop.door", "shop.shelf"),)


def test_relative_imports_and_packages_are_followed(shop: Subject, tmp_path: Path) -> None:
    (tmp_path / "shop" / "stock" / "tape.py").write_text("from .. import stock\n", encoding="utf-8")
    assert ("shop.stock", "shop.stock.box", "shop.stock.tape") in measure(shop).circles


@pytest.mark.parametrize(
    ("lines", "shown"), [([1], "1 / 1 / 1"), (list(range(1, 11)), "5.5 / 9 / 10"), (list(range(1, 12)), "6 / 10 / 11")]
)
def test_the_90th_percentile_is_the_least_that_nine_in_ten_do_not_exceed(lines: list[int], shown: str) -> None:
    assert str(sizes(lines)) == shown


def test_the_files_that_name_a_thing(shop: Subject, tmp_path: Path) -> None:
    (tmp_path / "shop" / "made.py").write_text(f"# {structure.GENERATED}\ntape = 1\n", encoding="utf-8")
    (tmp_path / "shop" / "tapestry.py").write_text("tapes = 1\n", encoding="utf-8")
    (tmp_path / "shop" / "red_tape.h").write_text("", encoding="utf-8")
    names = {path.name for path in naming(Kind("a thing", "tape", shop.folders))}
    assert names == {"box.py", "tape.py", "red_tape.h"}


def test_the_files_of_a_change_by_list_and_by_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("", encoding="utf-8")
    git("add", "a.py")
    git("commit", "-m", "first")
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    git("add", "a.py", "b.py")
    git("commit", "-m", "second")
    assert touched("HEAD", tmp_path) == ["a.py", "b.py"]
    assert touched("a.py", tmp_path) == ["a.py"]
    with pytest.raises(ValueError, match=r"c\.py.* is neither"):
        touched("a.py,c.py", tmp_path)


def test_the_section_replaces_itself_at_the_end_of_the_page() -> None:
    once = with_section("# Title\n\nText.\n", f"{structure.HEADING}\n\nold\n")
    assert with_section(once, f"{structure.HEADING}\n\nnew\n") == f"# Title\n\nText.\n\n{structure.HEADING}\n\nnew\n"


def test_every_kind_that_is_looked_for_is_there() -> None:
    for owner, kind in structure.kinds():
        assert naming(kind), f"{owner} has no {kind.word!r} any more"


def test_the_table_names_this_project_and_its_peers() -> None:
    text = structure.tables([("a page", "README.md")])
    for name in (
        "clada_export",
        "onnx_ir.passes",
        "onnxscript.rewriter",
        "transformers.exporters",
        "| a page | this project |",
    ):
        assert name in text
