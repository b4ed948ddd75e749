"""What an engine takes for loads, tokens, prompts and settings, and that nothing else passes for them."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clada_export.artifact.manifest import CacheTensor, TensorSpec
from clada_export.errors import BackendError, CladaError, UsageError
from clada_export.load.controllers import CONTROLLERS, make_controller
from clada_export.load.signal import LoadSignal
from clada_export.load.tracker import LoadTracker
from clada_export.load.values import LARGEST, in_float32, load_array, one_load
from clada_export.runtime import Engine, load_engine
from clada_export.runtime.opening import MOST_THREADS
from clada_export.runtime.sampling import LARGEST_SEED, Sampler, SamplingSettings
from clada_export.runtime.tokens import token_ids
from tests.clada_export.runtime.test_runtime import EOS, POSITIONS, SIGNAL, VOCABULARY, make_manifest, write_export
from tests.processes import error_in_a_fork


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(write_export(tmp_path_factory.mktemp("export") / "tiny"), threads=1)


# --- loads ---

TOO_SMALL = [-1e39, -1e308, -(10**39), -(10**400), np.float64(-1e300), -float(LARGEST)]


@pytest.mark.parametrize("load", TOO_SMALL)
def test_a_load_that_float32_does_not_hold_is_not_a_row_that_is_skipped(engine: Engine, load: Any) -> None:
    """-inf means skip: it can be said, and does not come about."""
    made = engine.generate([[1, 2]], 4, load=load, eos_token_id=[])
    assert made.active is not None
    assert (made.active > 0).all() and np.isfinite(made.loads).all()
    engine.prefill([[1]])
    output = engine.step([2], load)
    assert output.active is not None and (output.active > 0).all()
    engine.logits([[1, 2]], load)
    engine.score([[1, 2]], load)
    engine.prefill([[1]], load)


def test_loads_that_are_in_float32_stay_as_they_are() -> None:
    values = np.array([0.0, -0.0, 1.5, -4.0, np.inf, -np.inf, np.nan, LARGEST, 1e39, -1e300, 1e-60])
    wanted = np.array([0, 0, 1.5, -4, np.inf, -np.inf, np.nan, LARGEST, LARGEST, -LARGEST, 0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(in_float32(values), wanted)
    assert one_load("dense") == math.inf and one_load(10**400) == LARGEST
    assert load_array([10**30, -(10**400)], "x").tolist() == [np.float32(1e30), -LARGEST]


@pytest.mark.parametrize(
    "load", [None, True, "1", "-inf", [1.0], np.array([1.0, 2.0]), 1j, b"1", {}, np.bool_(True), math.nan, -math.inf]
)
def test_what_is_no_load_for_a_text(engine: Engine, load: Any) -> None:
    for call in (engine.logits, engine.prefill, lambda ids, load: engine.generate(ids, 1, load=load)):
        with pytest.raises(UsageError, match="load is"):
            call([[1, 2]], load)
    with pytest.raises(UsageError, match="load is"):
        engine.score([[1, 2]], load)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (None, "no array of numbers"),
        (True, "the load is bool"),
        ([True], "the load is bool"),
        (["1"], "the load is"),
        ([[1.0], [1.0, 2.0]], "no array of numbers"),
        ([1.0, 2.0], "one"),
        ([[1.0]], "one"),
        (1j, "complex"),
        ([None], "no array of numbers"),
        ([math.nan], "NaN"),
        ([10**30, None], "no array of numbers"),
    ],
)
def test_what_is_no_load_for_a_step(engine: Engine, load: Any, said: str) -> None:
    engine.prefill([[1]])
    with pytest.raises(UsageError, match=said):
        engine.step([1], load)
    assert engine.step([1], 0.5).logits.shape == (1, VOCABULARY)


@pytest.mark.parametrize(
    "signal",
    [
        replace(SIGNAL, rule="rank", parameters={"spread": 1e38}),
        replace(SIGNAL, rule="rank", parameters={"spread": -float(LARGEST)}),
        replace(SIGNAL, rule="sigmoid", slope=1.2e-38),
        replace(SIGNAL, rule="affine", slope=1.2e-38),
        replace(SIGNAL, rule="affine", slope=1.2e-38, parameters={"low": 1e-38, "high": 1e38}),
        replace(SIGNAL, rule="affine", slope=1e38, surprisal_std=1.2e-38, surprisal_weight=float(LARGEST)),
    ],
)
def test_rules_that_overflow_skip_nothing(tmp_path: Path, signal: LoadSignal) -> None:
    engine = load_engine(write_export(tmp_path / "x", load_signal=signal), threads=1)
    made = engine.generate([[1, 2]], 8, eos_token_id=[])
    assert made.active is not None and (made.active > 0).all()
    assert not np.isnan(made.loads).any() and not np.isneginf(made.loads).any()


FINITE = st.floats(-float(LARGEST), float(LARGEST), width=32)
POSITIVE = st.floats(1.2e-38, float(LARGEST))
NATS = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=2, max_size=2)


@given(st.data())
def test_no_rule_gives_nan_or_minus_infinity(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONTROLLERS)))
    parameters = data.draw(
        st.dictionaries(
            st.sampled_from(["low", "high", "window", "history", "percentile", "spread", "level", "momentum"]), FINITE
        )
    )
    try:
        make_controller(name, parameters)
    except ValueError:
        parameters = {}
    signal = LoadSignal(
        data.draw(FINITE),
        data.draw(POSITIVE),
        data.draw(FINITE),
        data.draw(POSITIVE),
        data.draw(FINITE),
        data.draw(FINITE),
        name,
        parameters,
        data.draw(st.floats(0, 1)),
        data.draw(POSITIVE),
    )
    tracker = LoadTracker(signal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loads = tracker.step(data.draw(NATS), data.draw(NATS))
            assert not np.isnan(loads).any() and not np.isneginf(loads).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 10**400, True, "1", None, [1.0]])
@pytest.mark.parametrize(
    ("rule", "parameter"), [("sigmoid", "high"), ("rank", "spread"), ("refresh", "level"), ("gate", "window")]
)
def test_parameters_that_are_no_numbers(rule: str, parameter: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{parameter} is not a number"):
        make_controller(rule, {parameter: value})


@pytest.mark.parametrize("result", [None, "x", [True, False], [1.0], [[1.0, 2.0]], [1.0, "2"], [[1], [1, 2]], [np.nan, 1], 1j])
def test_what_is_no_load_from_outside(engine: Engine, result: Any) -> None:
    with pytest.raises(UsageError, match="load: "):
        engine.generate([[1], [2]], 3, load=lambda s, h: result, eos_token_id=[])


def test_a_load_from_outside_is_held_to_float32(engine: Engine) -> None:
    made = engine.generate([[1], [2]], 3, load=lambda s, h: [-1e300, -(10**400)], eos_token_id=[])
    assert (made.loads[0] == -LARGEST).all() and not np.isneginf(made.loads).any()
    assert made.active is not None and (made.active > 0).all()


# --- tokens and prompts ---

NO_TOKENS: list[Any] = [
    [1.7],
    [1.0],
    ["1"],
    "1",
    b"1",
    [True],
    [np.True_],
    np.array([True]),
    np.array([1.0]),
    np.array(["1"]),
    np.array([[1]]),
    np.array(1),
    [None],
    [[1]],
    [1, [2]],
    None,
    7,
    {1: 2},
    {1},
    [b"1"],
    [1j],
    [np.float32(1)],
    iter([1]),
]


@pytest.mark.parametrize("tokens", NO_TOKENS, ids=[repr(item)[:20] for item in NO_TOKENS])
def test_what_is_no_token(engine: Engine, tokens: Any) -> None:
    engine.prefill([[1]])
    with pytest.raises(UsageError, match="not a list of token ids"):
        engine.step(tokens)
    for call in (engine.prefill, engine.logits, engine.score):
        with pytest.raises(UsageError):
            call([[1, 2], tokens])  # type: ignore[operator]
    with pytest.raises(UsageError):
        engine.generate([[1, 2], tokens], 1)
    # The batch is still the one that was begun.
    assert engine.step([2]).logits.shape == (1, VOCABULARY)


@pytest.mark.parametrize(
    "token", [-1, VOCABULARY, 2**31, 2**63, 2**64, 10**400, pytest.param(10**5000, id="long"), np.uint64(2**64 - 1)]
)
def test_tokens_out_of_range(engine: Engine, token: Any) -> None:
    engine.prefill([[1]])
    for call in (lambda: engine.step([token]), lambda: engine.prefill([[1, token]]), lambda: engine.generate([[token]], 1)):
        with pytest.raises(UsageError, match=r"token id .* is out of range; the model has ids 0 to 10"):
            call()


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint8, np.uint64])
def test_whole_numbers_of_all_kinds_are_tokens(engine: Engine, kind: type) -> None:
    wanted = engine.prefill([[1, 2]]).logits
    for tokens in (np.array([1, 2], kind), [kind(1), kind(2)], (1, kind(2)), range(1, 3)):
        np.testing.assert_array_equal(engine.prefill([tokens]).logits, wanted)
    np.testing.assert_array_equal(engine.prefill(np.array([[1, 2]], kind)).logits, wanted)
    engine.step(np.array([3], kind))
    assert token_ids(np.array([], np.float64), "x", 3) == []


@pytest.mark.parametrize("prompts", [None, 5, b"text", [], {}, set(), np.array(3), [[]], [5], [None], [1.5], object()])
def test_what_is_no_batch(engine: Engine, prompts: Any) -> None:
    for call in (engine.prefill, engine.logits, engine.score, lambda batch: engine.generate(batch, 1)):
        with pytest.raises(UsageError):
            call(prompts)  # type: ignore[operator]


@pytest.mark.parametrize("text", ["\udcff", "a\ud800b", "\udc80" * 9])
def test_a_prompt_that_is_no_utf8(engine: Engine, text: str) -> None:
    with pytest.raises(UsageError, match=r"prompt 1 is no UTF-8 text: character . is half of a surrogate pair"):
        engine.generate(["fine", text], 1)


@pytest.mark.parametrize("ends", [1.5, True, "7", [1.5], ["7"], [None], {}, [-1], -1, 2**31, [[1]]])
def test_what_is_no_end_of_a_text(engine: Engine, ends: Any) -> None:
    with pytest.raises(UsageError, match="eos_token_id"):
        engine.generate([[1]], 1, eos_token_id=ends)


def test_ends_of_a_text(engine: Engine) -> None:
    for ends in (EOS, [EOS], np.int64(EOS), np.array([EOS]), (EOS,)):
        assert engine._ends(ends) == {EOS}
    assert engine._ends([]) == frozenset()


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": LARGEST_SEED + 1}, "seed is 18446744073709551616"),
        ({"seed": 10**5000}, "seed is a value of type int that is too long"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"seed": True}, "seed is True"),
        ({"seed": "1"}, "seed is '1'"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": 1.5}, r"top_k is 1\.5"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": None}, "top_k is None"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": None}, "top_p is None"),
        ({"top_p": "1"}, "top_p is '1'"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SamplingSettings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 5e-324},
        {"temperature": 1.7e308},
        {"temperature": 1, "top_k": 10**30},
        {"temperature": 1.0, "top_p": 5e-324},
        {"temperature": 1.0, "seed": LARGEST_SEED},
        {"temperature": np.float32(0.5), "top_k": np.int64(2)},
    ],
)
def test_settings_at_their_bounds(changes: dict[str, Any]) -> None:
    logits = np.array([[1.0, 3.4e38, -3.4e38, -np.inf, np.nan, 0.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = Sampler(SamplingSettings(**changes), 1).choose(logits)
    assert 0 <= chosen[0] < 6 and np.isfinite(logits[0, chosen[0]])


@pytest.mark.parametrize(
    "threads", [0, -1, MOST_THREADS + 1, 10_000_000_000, pytest.param(10**5000, id="long"), 1.5, True, "2"]
)
def test_threads_out_of_range(tmp_path: Path, threads: Any) -> None:
    with pytest.raises(UsageError, match=r"threads is .*; it must be a whole number from 1 to 1024"):
        load_engine(tmp_path, threads=threads)


@pytest.mark.long
def test_as_many_threads_as_there_may_be(tmp_path: Path) -> None:
    engine = load_engine(write_export(tmp_path / "x"), threads=MOST_THREADS)
    assert len(engine.generate([[1]], 2, eos_token_id=[]).tokens[0]) == 2


@pytest.mark.parametrize("count", [0, 1.5, True, "3", None, pytest.param(-(10**5000), id="long")])
def test_counts_of_new_tokens(engine: Engine, count: Any) -> None:
    with pytest.raises(UsageError, match="max_new_tokens is"):
        engine.generate([[1]], count)


@pytest.mark.parametrize("length", [0, -1, 2, 1.0, True, "1", None, pytest.param(10**5000, id="long")])
def test_lengths_of_prompts_to_score(engine: Engine, length: Any) -> None:
    with pytest.raises(UsageError, match="prompt_length is"):
        engine.score([[1, 2]], prompt_length=length)


# --- the files beside the graph ---


def written(folder: Path, config: Any, generation: Any = None, **changes: Any) -> Path:
    """An export with these files, whose logits have no width in the manifest."""
    folder.mkdir()
    write_export(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    from clada_export.artifact.manifest import file_record, write_manifest

    files = {path.name: file_record(path) for path in folder.iterdir() if path.name != "clada.json"}
    write_manifest(folder, make_manifest(**changes).with_files(files))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "limit", "ends"),
    [
        ({"max_position_embeddings": -1}, {}, None, set()),
        ({"max_position_embeddings": 0, "n_positions": 9}, {}, 9, set()),
        ({"max_position_embeddings": True}, {"eos_token_id": True}, None, set()),
        ({"max_position_embeddings": 10**300}, {"eos_token_id": [1, True, 2.0, "3", None]}, None, {1}),
        ({"text_config": [1]}, {"eos_token_id": {}}, None, set()),
        ({"text_config": {"max_position_embeddings": 12}}, {"eos_token_id": 5}, 12, {5}),
        ({"text_config": "x", "eos_token_id": 4}, {}, None, {4}),
        ({"max_position_embeddings": "many"}, {"eos_token_id": [[1]]}, None, set()),
    ],
)
def test_odd_configurations(tmp_path: Path, config: Any, generation: Any, limit: int | None, ends: set[int]) -> None:
    engine = load_engine(written(tmp_path / "x", config, generation), threads=1)
    assert (engine.max_positions, engine.eos_token_ids) == (limit, ends)
    assert engine.generate([[1, 2]], 3).tokens


@pytest.mark.parametrize("config", [[], "x", 5, None])
def test_a_configuration_that_is_no_object(tmp_path: Path, config: Any) -> None:
    with pytest.raises(UsageError, match=r"config\.json: a JSON object is wanted"):
        load_engine(written(tmp_path / "x", config), threads=1)


def test_more_positions_for_the_graph_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"24 positions, and the manifest's first_position is 24: none is left"):
        load_engine(written(tmp_path / "x", {"max_position_embeddings": POSITIONS}, first_position=POSITIONS), threads=1)


def test_files_that_the_manifest_does_not_list_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_export(folder)
    listed = load_engine(folder, threads=1)
    (folder / "config.json").unlink()
    (folder / "generation_config.json").unlink()
    write_export_of_the_graph(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 3, "vocab_size": 2}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    (folder / "tokenizer.json").write_text("no tokenizer at all")
    (folder / "chat_template.jinja").write_text("{{ never }}")
    engine = load_engine(folder, threads=1)
    assert listed.max_positions == POSITIONS and engine.max_positions is None
    assert engine.eos_token_ids == frozenset()
    assert engine.tokenizer is None
    with pytest.raises(UsageError, match="no tokenizer"):
        engine.generate("text", 1)


def write_export_of_the_graph(folder: Path) -> None:
    from clada_export.artifact.manifest import file_record, write_manifest

    files = {"model.onnx": file_record(folder / "model.onnx")}
    write_manifest(folder, make_manifest().with_files(files))


# --- a manifest that says other things than the graph ---

CACHE = make_manifest().cache


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ([replace(CACHE[0], dtype="float16"), CACHE[1]], r"key' is tensor\(float\); tensor\(float16\) is wanted"),
        ([replace(CACHE[0], dtype="bfloat16"), CACHE[1]], "bfloat16"),
        ([replace(CACHE[0], shape=("batch", 1, "past", 7)), CACHE[1]], "the manifest's cache says"),
        ([replace(CACHE[0], shape=("batch", 2**31 - 1, "past", 6)), CACHE[1]], "the manifest's cache says"),
        ([replace(CACHE[0], shape=("batch", 1, "past")), CACHE[1]], "the manifest's cache says"),
        ([replace(CACHE[0], shape=()), CACHE[1]], "the manifest's cache says"),
        ([replace(CACHE[0], shape=("batch", "heads", "past", 6)), CACHE[1]], "the manifest's cache says"),
        ([replace(CACHE[0], past="load"), CACHE[1]], "neither a known one"),
        ([replace(CACHE[0], present="logits"), replace(CACHE[1], present="nothing")], "no input or output 'nothing'"),
    ],
)
def test_a_cache_that_is_not_the_graphs(tmp_path: Path, cache: list[CacheTensor], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_engine(write_export(tmp_path / "x", cache=tuple(cache)), threads=1)


@pytest.mark.parametrize(
    ("shape", "runs"),
    [(("batch", 1, 5, WIDTH := 6), False), (("batch", 1, "anything", 6), True), (("batch", 1, 2**31 - 1, 6), False)],
)
def test_sizes_that_the_graph_leaves_open(tmp_path: Path, shape: tuple[Any, ...], runs: bool) -> None:
    """They are the manifest's word alone: whatever it says, the engine answers or gives an error of ours."""
    engine = load_engine(write_export(tmp_path / "x", cache=tuple(replace(item, shape=shape) for item in CACHE)), threads=1)
    try:
        engine.generate([[1, 2]], 3)
    except CladaError:
        assert not runs
    else:
        assert runs


def test_more_tokens_in_the_manifest_than_in_the_graph(tmp_path: Path) -> None:
    outputs = (TensorSpec("logits", "float32", ("batch", "sequence", 2**31 - 1)),)
    engine = load_engine(write_export(tmp_path / "x", outputs=outputs), threads=1)
    with pytest.raises(BackendError, match="fails in the graph"):
        engine.prefill([[VOCABULARY + 3]])
    assert engine.prefill([[1]]).logits.shape == (1, VOCABULARY)


def test_a_fork_has_no_engine(engine: Engine) -> None:
    """ONNX Runtime's threads stay behind in a fork: a call there would never return."""
    error = error_in_a_fork(lambda: engine.prefill([[1]]))
    assert error.startswith("UsageError") and "the engine was loaded in another process" in error
