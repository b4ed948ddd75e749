"""How tokens are chosen, against transformers' logits processors, and what an export's generation_config.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from clada_export.artifact.manifest import file_record, write_manifest
from clada_export.errors import UsageError
from clada_export.runtime import Engine, load_engine
from clada_export.runtime.generation_defaults import GenerationDefaults
from clada_export.runtime.sampling import Sampler, SamplingSettings, candidates
from tests.clada_export.runtime.test_runtime import EOS, expected_logits, make_graph, make_manifest, write_export

SIZE = 40


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.1, 5),
    st.integers(0, 12),
    st.sampled_from([1.0, 0.95, 0.6, 0.05]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_filters_are_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=SIZE)
    warpers = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    scores = LogitsProcessorList(warpers)(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits[None]))
    tokens, weights = candidates(logits, SamplingSettings(temperature, top_k, top_p, min_p=min_p))
    found = np.zeros(SIZE)
    found[tokens] = weights / weights.sum()
    np.testing.assert_array_equal(np.sort(tokens), np.flatnonzero(scores[0].isfinite()))
    np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 3), st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=12))
def test_the_penalty_is_that_of_transformers(seed: int, penalty: float, prompt: list[int]) -> None:
    """Greedy, over several tokens: what was chosen counts as the prompt does."""
    random = np.random.default_rng(seed)
    sampler = Sampler(SamplingSettings(repetition_penalty=penalty), 2, [prompt, prompt[:1]])
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    rows = [list(prompt), list(prompt[:1])]
    for _ in range(6):
        logits = random.normal(scale=2, size=(2, SIZE)).astype(np.float32)
        chosen = sampler.choose(logits)
        for row, token in enumerate(chosen):
            scores = processor(torch.tensor([rows[row]]), torch.from_numpy(logits[row : row + 1]))[0]
            assert scores[token] == pytest.approx(float(scores.max()), rel=1e-5)
            rows[row].append(int(token))


@pytest.mark.parametrize("penalty", [1e-300, 5e-324, 1e300, 1.5])
def test_penalties_keep_what_is_possible(penalty: float) -> None:
    logits = np.array([[-3e38, 3e38, -np.inf, np.nan, -1.0]], np.float32)
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingSettings(temperature, seed=1, repetition_penalty=penalty), 1, [[0, 1, 2, 3, 4, 99]])
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            assert sampler.choose(logits)[0] in (0, 1, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_p": -0.1}, r"min_p is -0\.1"),
        ({"min_p": 1.1}, r"min_p is 1\.1"),
        ({"min_p": None}, "min_p is None"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"repetition_penalty": "1"}, "repetition_penalty is '1'"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SamplingSettings(**changes)


# --- generation_config.json ---

FILE = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": [EOS]}


@pytest.mark.parametrize(
    ("values", "arguments", "wanted"),
    [
        ({}, {}, SamplingSettings()),
        ({}, {"do_sample": True}, SamplingSettings(1.0)),
        ({}, {"temperature": 0.5}, SamplingSettings(0.5)),
        (FILE, {}, SamplingSettings(0.7, 20, 0.8, repetition_penalty=1.05)),
        (FILE, {"seed": 3}, SamplingSettings(0.7, 20, 0.8, 3, repetition_penalty=1.05)),
        (FILE, {"do_sample": False}, SamplingSettings(repetition_penalty=1.05)),
        (FILE, {"temperature": 0}, SamplingSettings(repetition_penalty=1.05)),
        (FILE, {"temperature": 0.0, "repetition_penalty": 1}, SamplingSettings()),
        (FILE, {"temperature": 1.5, "top_k": 0}, SamplingSettings(1.5, 0, 0.8, repetition_penalty=1.05)),
        (FILE, {"top_p": 1.0, "min_p": 0.1}, SamplingSettings(0.7, 20, 1.0, min_p=0.1, repetition_penalty=1.05)),
        # Values without do_sample are for those who sample.
        ({"temperature": 0.6, "top_k": 5}, {}, SamplingSettings()),
        ({"temperature": 0.6, "top_k": 5}, {"do_sample": True}, SamplingSettings(0.6, 5)),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.9}, SamplingSettings(0.9)),
        ({"do_sample": None, "top_k": None, "min_p": 0.2}, {"do_sample": True}, SamplingSettings(1.0, min_p=0.2)),
        ({"do_sample": True, "temperature": 0.0}, {}, SamplingSettings()),
    ],
)
def test_defaults_and_arguments(values: dict[str, Any], arguments: dict[str, Any], wanted: SamplingSettings) -> None:
    assert GenerationDefaults(values).sampling(**arguments) == wanted


@pytest.mark.parametrize(
    ("values", "arguments", "said"),
    [
        ({"do_sample": 1}, {}, r"generation_config\.json: do_sample is 1; true or false is wanted"),
        ({"do_sample": True, "top_k": -1}, {}, r"generation_config\.json: top_k is -1; .* takes its place"),
        ({"repetition_penalty": "x"}, {}, r"generation_config\.json: repetition_penalty is 'x'"),
        ({"temperature": []}, {"do_sample": True}, r"generation_config\.json: temperature is \[\]"),
        ({}, {"do_sample": 1}, "do_sample is 1; it must be True or False"),
        ({}, {"do_sample": True, "temperature": 0}, "do_sample is True and temperature is 0"),
        ({}, {"do_sample": False, "temperature": 0.5}, r"do_sample is False and temperature is 0\.5"),
        ({}, {"top_k": -1}, "^top_k is -1"),
    ],
)
def test_defaults_that_are_refused(values: dict[str, Any], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GenerationDefaults(values).sampling(**arguments)


def with_generation(folder: Path, values: dict[str, Any]) -> Engine:
    write_export(folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    files = {path.name: file_record(path) for path in folder.iterdir() if path.name != "clada.json"}
    write_manifest(folder, make_manifest(make_graph().graph).with_files(files))
    return load_engine(folder, threads=1)


def test_an_engine_heeds_its_file(tmp_path: Path) -> None:
    plain = load_engine(write_export(tmp_path / "plain"), threads=1)
    given: dict[str, Any] = {"temperature": 9.0, "top_k": 5, "repetition_penalty": 3.0}
    engine = with_generation(tmp_path / "sampled", {**given, "do_sample": True, "eos_token_id": [EOS]})
    for seed in range(4):
        wanted = plain.generate([[1, 2]], 8, seed=seed, **given).tokens
        assert engine.generate([[1, 2]], 8, seed=seed).tokens == wanted
        assert engine.stream([1, 2], 8, seed=seed).finish is None
        assert [piece.token for piece in engine.stream([1, 2], 8, seed=seed)] == wanted[0]
    greedy = plain.generate([[1, 2]], 8).tokens
    assert engine.generate([[1, 2]], 8, do_sample=False, repetition_penalty=1).tokens == greedy
    assert engine.generate([[1, 2]], 8, temperature=0, repetition_penalty=1.0).tokens == greedy
    # The penalty changes what is greedy, and it sees the prompt.
    penalised = engine.generate([[1, 2]], 8, temperature=0).tokens[0]
    logits = expected_logits([1, 2])[-1]
    logits[[1, 2]] = np.where(logits[[1, 2]] < 0, logits[[1, 2]] * 3, logits[[1, 2]] / 3)
    assert penalised[0] == logits.argmax()
    assert len(set(penalised)) == len(penalised) > 3 and len(set(greedy[0])) < len(greedy[0])


def test_a_file_that_makes_no_sense_is_named_when_it_is_used(tmp_path: Path) -> None:
    engine = with_generation(tmp_path / "x", {"do_sample": True, "temperature": -1})
    with pytest.raises(UsageError, match=r"x/generation_config\.json: temperature is -1"):
        engine.generate([[1]], 2)
    assert engine.generate([[1]], 2, temperature=0).tokens
