"""Engine folders that are damaged, and engines that are called with anything: the right answer or an error of ours."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from clada_export.artifact.manifest import MANIFEST_NAME, file_record, read_manifest, write_manifest
from clada_export.errors import BackendError, UsageError
from clada_export.files.check import SMALL_BYTES
from clada_export.load.controllers import CONTROLLERS
from clada_export.load.signal import LoadSignal
from clada_export.native.library import ort_library_path
from clada_export.runtime import Engine, load_engine
from tests.clada_export.runtime.test_runtime import POSITIONS, VOCABULARY, write_export
from tests.fuzz.harness import JSON_VALUES, NUMBERS, damaged, fuzz, hold, mutated

PROMPTS = [[1, 2, 3], [4]]
LARGE = "weights.data"
NAMES = (
    "model.onnx",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "libclada_ort.so",
    LARGE,
)


def write_engine(folder: Path) -> Path:
    """An engine of the hand-made graph with every kind of file beside it; a large one stands for weights."""
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w9"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / LARGE).write_bytes(bytes(range(256)) * (SMALL_BYTES // 256))
    shutil.copyfile(ort_library_path(), folder / "libclada_ort.so")
    return write_export(folder, tokenizer=True, library="libclada_ort.so")


def answers(engine: Engine) -> Any:
    """Everything that an engine can be asked but a chat, as plain values."""
    assert engine.tokenizer is not None
    made = engine.generate(PROMPTS, 5, load="auto", eos_token_id=[])
    return (
        made.tokens,
        made.texts,
        made.loads.tolist(),
        engine.generate("w1 w2", 4).tokens,
        engine.max_positions,
        engine.vocab_size,
        sorted(engine.eos_token_ids),
    )


def chat(engine: Engine) -> list[int]:
    """A template runs in a process of its own, which takes longer than all other answers together."""
    assert engine.tokenizer is not None
    return engine.tokenizer.chat([{"role": "user", "content": "w4"}])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("engines") / "whole")


@pytest.fixture(scope="module")
def engine(whole: Path) -> Engine:
    return load_engine(whole, threads=1)


@pytest.fixture(scope="module")
def wanted(engine: Engine) -> Any:
    return answers(engine)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


# --- damaged folders ---


def zero_half(path: Path) -> None:
    """In place, with the times that it had."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.write(bytes(max(1, before.st_size // 2)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(path: Path) -> None:
    """Another file of the same size and times takes its place."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    shutil.copystat(path, other)
    other.replace(path)


def shorten(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\0")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def lead_out(path: Path) -> None:
    path.rename(path.parent.with_name(f"out-{path.name}"))
    path.symlink_to(path.parent.with_name(f"out-{path.name}"))


def lead_to_the_manifest(path: Path) -> None:
    path.unlink()
    path.symlink_to(MANIFEST_NAME)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path], None], ...] = (
    zero_half,
    swap,
    shorten,
    lengthen,
    loop,
    lead_out,
    lead_to_the_manifest,
    make_folder,
    make_pipe,
    remove,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copy / name)
    error = hold(lambda: load_engine(copy, threads=1))
    assert isinstance(error, BackendError if name.endswith(".so") and damage is remove else UsageError)
    assert name in str(error)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_inside_the_folder_is_followed(copy: Path, name: str, wanted: Any) -> None:
    (copy / "elsewhere").mkdir()
    (copy / name).rename(copy / "elsewhere" / "file")
    (copy / name).symlink_to("elsewhere/file")
    found = load_engine(copy, threads=1)
    assert answers(found) == wanted and chat(found) == [4]


@pytest.mark.parametrize("name", ["extra.so", "sub/lib.so.2", "x.dylib", ".hidden.so", "a b.dll"])
def test_a_library_that_nobody_listed(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"")
    error = hold(lambda: load_engine(copy, threads=1))
    assert isinstance(error, UsageError) and name in str(error)


@pytest.mark.parametrize("gone", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_file_that_nobody_listed_is_not_used(copy: Path, gone: str, wanted: Any) -> None:
    """It stays where it is, with a content that would show."""
    manifest = read_manifest(copy)
    files = {name: record for name, record in manifest.files.items() if name != gone}
    write_manifest(copy, manifest.with_files(files))
    content = {"tokenizer_config.json": '{"chat_template": "w5"}', "chat_template.jinja": "w5", "config.json": "{}"}
    (copy / gone).write_text(content.get(gone, "no tokenizer"))
    found = load_engine(copy, threads=1)
    if gone == "tokenizer.json":
        assert found.tokenizer is None
    elif gone == "config.json":
        assert found.max_positions is None
    elif gone == "chat_template.jinja":
        assert found.tokenizer is not None
        with pytest.raises(UsageError, match="no chat template"):
            chat(found)
    else:
        assert answers(found) == wanted and chat(found) == [4]


def test_fuzz_folders(copy: Path, whole: Path, wanted: Any) -> None:
    """An engine opens as it was exported, or not at all. Sizes alone do not count as a check."""
    contents = {name: (whole / name).read_bytes() for name in (*NAMES, MANIFEST_NAME)}

    def check(case: tuple[str, Any]) -> None:
        name, change = case
        path = copy / name
        try:
            if callable(change):
                change(path)
            else:
                path.write_bytes(change)

            def opened() -> None:
                found = load_engine(copy, threads=1)
                assert answers(found) == wanted
                if name.startswith("chat") or name == "tokenizer_config.json":
                    assert chat(found) == [4]

            error = hold(opened)
            if name != MANIFEST_NAME and not callable(change) and change != contents[name]:
                assert error is not None and name in str(error)
        finally:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                path.rmdir()
            path.write_bytes(contents[name])
            for stray in (copy.with_name(f"out-{name}"), copy / "other"):
                stray.unlink(missing_ok=True)

    small = [name for name in (*NAMES, MANIFEST_NAME) if len(contents[name]) < SMALL_BYTES]
    bytes_changed = st.sampled_from(small).flatmap(lambda name: st.tuples(st.just(name), damaged(contents[name])))
    # Flips in all of the large one take long to draw: one place is as good as many.
    large_changed = st.integers(0, SMALL_BYTES - 1).map(
        lambda place: (LARGE, contents[LARGE][:place] + b"\x02" + contents[LARGE][place + 1 :])
    )
    otherwise = st.tuples(st.sampled_from(NAMES), st.sampled_from(DAMAGES))
    fuzz("engine folders", bytes_changed | large_changed | otherwise, check)


# --- configurations that the manifest lists ---

CONFIG = {
    "max_position_embeddings": POSITIONS,
    "vocab_size": VOCABULARY,
    "text_config": {"max_position_embeddings": 9, "vocab_size": 8},
    "n_positions": 7,
    "eos_token_id": [1, 2],
}


def test_fuzz_configurations(copy: Path) -> None:
    """Files that are listed with the right sha256, and hold anything: the model's author wrote them."""
    manifest = read_manifest(copy)
    bare = manifest.with_files({"model.onnx": manifest.files["model.onnx"]})
    for name in NAMES:
        if name != "model.onnx":
            (copy / name).unlink()
    bare = replace(bare, library=None, tokenizer=False, outputs=bare.outputs[1:])

    def check(case: tuple[Any, Any, int]) -> None:
        config, generation, first = case
        files = dict(bare.files)
        for name, value in (("config.json", config), ("generation_config.json", generation)):
            (copy / name).write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
            files[name] = file_record(copy / name)
        write_manifest(copy, replace(bare, first_position=first, files=files))

        def used() -> None:
            opened = load_engine(copy, threads=1)
            made = opened.generate([[1, 2]], 3)
            assert 1 <= len(made.tokens[0]) <= 3 and np.isfinite(opened.logits([[1]])[0]).all()

        hold(used)

    shuffled = mutated(CONFIG) | JSON_VALUES
    fuzz("engine configurations", st.tuples(shuffled, shuffled, st.sampled_from([0, 0, 2, 24, 2**31 - 1])), check, chunk=20)


# --- calls ---

INTEGERS = (
    st.integers()
    | st.integers(-2, VOCABULARY + 1)
    | st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400])
    | st.just(5000).map(lambda digits: 10**digits)
)
NUMPY = st.sampled_from(
    [
        np.float32(1.5),
        np.float64("nan"),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.array(1),
        np.array([1.5, 2.5]),
        np.array([[1, 2], [3, 4]]),
        np.array([True, False]),
        np.array(["1", "2"]),
        np.array([None, 1], object),
        np.zeros((0,), np.int64),
        np.zeros((2, 0)),
        np.array([1, 2], np.uint8),
        np.float16("inf"),
        np.longdouble("-1e4000"),
        np.datetime64("2020-01-01"),
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | INTEGERS
    | st.floats()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(["auto", "dense", "", "1", "-inf", "w1", "\udcff", b"w1", 1j, object(), ...])
    | st.text(max_size=4)
    | NUMPY
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)
ROWS = st.lists(TOKENS | SCALARS | st.lists(SCALARS, max_size=3), max_size=3)
GOOD_ROWS = st.lists(TOKENS, min_size=1, max_size=3)
TEXTS = st.lists(st.text(max_size=6) | st.sampled_from(["w1 w2", "w3"]), max_size=3) | st.text(max_size=6)
ANYTHING = (
    SCALARS
    | ROWS
    | st.tuples(SCALARS, SCALARS)
    | st.dictionaries(st.text(max_size=2), SCALARS, max_size=2)
    | st.sets(st.integers(0, 3))
)
GOOD_LOADS = st.sampled_from(["auto", "dense", 0.0, -1e39, 1e39, 10**400, -(10**400), -3.4e38, 4, math.inf, -4.0])
LOADS = GOOD_LOADS | SCALARS | ANYTHING
FUNCTIONS = LOADS.map(lambda result: lambda surprisal, entropy: result) | st.sampled_from(
    [
        lambda s, h: s,
        lambda s, h: s * -1e300,
        lambda s, h: h * np.nan,
        lambda s, h: list(s),
        lambda s, h: [10**400] * len(s),
        lambda s, h: s.astype(np.float16) * np.float16(-60000),
        lambda s, h: [None] * len(s),
    ]
)


def held(made: Any) -> None:
    """What no answer may hold: a row that is skipped before it ended, or a load that is no number."""
    assert not np.isnan(made.loads).any()
    for row, tokens in enumerate(made.tokens):
        running = made.loads[: len(tokens) - 1, row]
        assert (running > -math.inf).all() and (made.active[: len(tokens) - 1, row] > 0).all()
        assert all(type(token) is int and 0 <= token < VOCABULARY for token in tokens)


def test_fuzz_calls(engine: Engine, wanted: Any) -> None:
    """One engine takes any calls in any order, and is as it was afterwards."""
    count = 0

    def check(case: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
        nonlocal count
        name, arguments, options = case

        def call() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                made = getattr(engine, name)(*arguments, **options)
            if name == "generate":
                held(made)
                again = engine.generate(made.prompt_tokens, *arguments[1:], **{**options, "load": options.get("load", "auto")})
                if not options.get("temperature"):
                    assert again.tokens == made.tokens
            elif name in ("prefill", "step"):
                assert made.logits.dtype == np.float32 and made.logits.shape[1] == VOCABULARY

        hold(call)
        count += 1
        if count % 50 == 0:
            assert answers(engine) == wanted

    optional = {
        "load": LOADS | FUNCTIONS,
        "temperature": st.sampled_from([0.0, 1.0, 5e-324, 1e308]) | SCALARS,
        "top_k": st.integers(0, 12) | SCALARS,
        "top_p": st.floats(0, 1) | SCALARS,
        "seed": st.integers(0, 2**64 - 1) | SCALARS,
        "eos_token_id": TOKENS | SCALARS | ANYTHING,
    }
    # Most of the time one thing is odd, and the rest is not.
    odd = st.sampled_from(sorted(optional)).flatmap(lambda name: optional[name].map(lambda value: {name: value}))
    generate = st.tuples(
        st.just("generate"),
        st.one_of(
            st.tuples(GOOD_ROWS, st.integers(1, 4)),
            st.tuples(GOOD_ROWS, st.integers(1, 4)),
            st.tuples(ROWS | TEXTS | ANYTHING, st.integers(1, 4)),
            st.tuples(GOOD_ROWS, SCALARS.filter(lambda value: not (isinstance(value, int) and value > 4))),
        ),
        odd | st.fixed_dictionaries({}, optional=optional),
    )
    prefill = st.tuples(st.just("prefill"), st.tuples(GOOD_ROWS | ROWS | ANYTHING, LOADS), st.just({}))
    step = st.tuples(st.just("step"), st.tuples(TOKENS | ANYTHING | st.lists(SCALARS, max_size=2), LOADS | ROWS), st.just({}))
    logits = st.tuples(st.just("logits"), st.tuples(GOOD_ROWS | ROWS | ANYTHING, LOADS), st.just({}))
    score = st.tuples(
        st.just("score"),
        st.tuples(GOOD_ROWS | ROWS | ANYTHING, LOADS | FUNCTIONS),
        st.fixed_dictionaries({}, optional={"prompt_length": st.integers(1, 3) | SCALARS}),
    )
    fuzz("engine calls", generate | prefill | step | logits | score, check)


def test_fuzz_opening(whole: Path, wanted: Any) -> None:
    def check(case: dict[str, Any]) -> None:
        def call() -> None:
            assert answers(load_engine(whole, **case)) == wanted

        hold(call)

    arguments = {
        "threads": st.sampled_from([None, 1, 2]) | SCALARS.filter(lambda value: not (type(value) is int and 2 < value < 1025))
    }
    fuzz("engine opening", st.fixed_dictionaries({}, optional=arguments), check, chunk=50)


# --- rules ---

PARAMETERS = ("low", "high", "window", "history", "percentile", "spread", "momentum", "level")
FLOATS = st.sampled_from([0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1.2e-38, 1e-38, 0.5, 2.0, 10.0, 4096.0, 4097.0, 100.0]) | st.floats(
    allow_nan=False, allow_infinity=False
)


def test_fuzz_rules(copy: Path) -> None:
    """Any load signal that a manifest may hold computes every row of every step."""
    base = {item: getattr(LoadSignal(), item) for item in ("surprisal_mean", "surprisal_std", "entropy_mean", "entropy_std")}

    def check(case: tuple[dict[str, Any], str, dict[str, float]]) -> None:
        numbers, rule, parameters = case

        def used() -> None:
            write_manifest(
                copy, replace(manifest, load_signal=LoadSignal(**{**base, **numbers}, rule=rule, parameters=parameters))
            )
            opened = Engine(copy, read_manifest(copy, check_files=False), session)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                held(opened.generate(PROMPTS, 8, eos_token_id=[]))

        hold(used)

    manifest = read_manifest(copy)
    session = load_engine(copy, threads=1)._session
    fields = (
        "surprisal_mean",
        "surprisal_std",
        "entropy_mean",
        "entropy_std",
        "surprisal_weight",
        "entropy_weight",
        "momentum",
        "slope",
    )
    cases = st.tuples(
        st.dictionaries(st.sampled_from(fields), FLOATS, max_size=3),
        st.sampled_from(sorted(CONTROLLERS)),
        st.dictionaries(st.sampled_from(PARAMETERS), FLOATS, max_size=2),
    )
    fuzz("engine rules", cases, check, chunk=20)


def test_the_fuzzers_have_something_to_find(engine: Engine) -> None:
    """The checks themselves: a skipped row and a NaN would be seen."""
    made = engine.generate(PROMPTS, 4, load="dense", eos_token_id=[])
    held(made)
    for load in (-math.inf, math.nan):
        loads = made.loads.copy()
        loads[1, 0] = load
        with pytest.raises(AssertionError):
            held(replace(made, loads=loads))
