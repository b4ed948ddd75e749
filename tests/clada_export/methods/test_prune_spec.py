"""What `--prune` reads and refuses, and how many weights a share is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clada_export.errors import UsageError
from clada_export.methods.static import PruneSpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("wanda=0.5", PruneSpec("wanda", "unstructured", 0.5)),
        ("sparsegpt=.25", PruneSpec("sparsegpt", "unstructured", 0.25)),
        (" wanda = 2:4 ", PruneSpec("wanda", "2:4", 0.5)),
        ("sparsegpt=3:8", PruneSpec("sparsegpt", "3:8", 0.625)),
        ("wanda=neurons:0.25", PruneSpec("wanda", "neurons", 0.25)),
    ],
)
def test_forms(text: str, spec: PruneSpec) -> None:
    assert PruneSpec.parse(text) == spec
    assert PruneSpec.parse(str(spec)) == spec


_SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.sampled_from(["wanda", "sparsegpt"]), st.sampled_from(["unstructured", "neurons"]), _SHARES)
def test_shares_survive_text(method: str, pattern: str, sparsity: float) -> None:
    spec = PruneSpec(method, pattern, sparsity)
    assert PruneSpec.parse(str(spec)) == spec


@given(st.sampled_from(["wanda", "sparsegpt"]), st.integers(1, 9998), st.data())
def test_groups_survive_text(method: str, n: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(n + 1, 9999))
    spec = PruneSpec.parse(f"{method}={n}:{m}")
    assert spec.group == (n, m)
    assert PruneSpec.parse(str(spec)) == spec


@given(st.text(alphabet="wandasprgte=neuro:0123456789.-+ %", max_size=24))
def test_other_text_is_a_usage_error(text: str) -> None:
    try:
        spec = PruneSpec.parse(text)
    except UsageError:
        return
    assert PruneSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("magnitude=0.5", "METHOD is wanda or sparsegpt"),
        ("wanda", "METHOD=0.5"),
        ("wanda=half", "METHOD=neurons:0.25"),
        ("wanda=0", "above 0 and below 1"),
        ("wanda=1", "above 0 and below 1"),
        ("wanda=neurons:1.5", "above 0 and below 1"),
        ("wanda=-0.5", "not understood"),
        ("wanda=nan", "not understood"),
        ("wanda=4:4", "n must be below m"),
        ("wanda=0:4", "not understood"),
        ("wanda=neurons:2:4", "not understood"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PruneSpec.parse(text)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "said"),
    [("2:4", 0.4, "is sparsity 0.5, not 0.4"), ("rows", 0.5, "'rows' is not known"), ("neurons", float("nan"), "out of range")],
)
def test_a_spec_that_contradicts_itself(pattern: str, sparsity: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PruneSpec("wanda", pattern, sparsity)


@given(_SHARES, st.integers(1, 20_000))
def test_counts(sparsity: float, size: int) -> None:
    count = PruneSpec("wanda", "unstructured", sparsity).removed(size)
    assert 0 <= count < size
    assert abs(count - sparsity * size) <= 1


def test_counts_mean_what_is_written() -> None:
    assert PruneSpec("wanda", "unstructured", 0.29).removed(100) == 29
