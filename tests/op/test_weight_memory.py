"""Where weights of a file lie while a session lives."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from quant_shells import Case, assert_bits, make_case, make_model, run, run_reference

from clada_export.native.library import ort_library_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere weights stay where they are")
LARGE = make_case(8, n=1024, k=2048)


def save(case: Case, folder: Path, nodes: int = 1) -> Path:
    """A model whose weight is in a file, read by so many nodes."""
    model = make_model(case, constant=True)
    for i in range(1, nodes):
        copy = onnx.NodeProto()
        copy.CopyFrom(model.graph.node[0])
        copy.name, copy.output[:] = f"copy{i}", [f"y{i}"]
        model.graph.node.append(copy)
        model.graph.output.append(helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, None))
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


def opened(path: Path, packed: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.register_custom_ops_library(str(ort_library_path()))
    return ort.InferenceSession(str(path), options)


def mapped(path: Path, field: str = "Rss") -> int:
    """Bytes of the file that this process has in memory, or another sum of /proc/self/smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.with_name("model.data")))
        elif inside and line.startswith(f"{field}:"):
            total += int(line.split()[1]) * 1024
    return total


def anonymous() -> int:
    found: Mapping[str, str] = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(found["RssAnon"].split()[0]) * 1024


@pytest.mark.parametrize("packed", [True, False])
def test_a_weight_of_a_file_is_copied_unless_nothing_is_packed(packed: bool, tmp_path: Path) -> None:
    path, size = save(LARGE, tmp_path), LARGE.weight.nbytes
    session = opened(path, packed)
    assert mapped(path, "Size") >= size, "the runtime maps the file"
    assert_bits(run(session, LARGE), run_reference(LARGE))
    # Pages at both ends are shared with what lies beside the weight.
    assert (mapped(path) < size // 4) if packed else (mapped(path) >= size)


def test_a_copy_lies_in_memory_once_for_all_nodes_of_a_weight(tmp_path: Path) -> None:
    nodes = 24
    path, size = save(LARGE, tmp_path, nodes), LARGE.weight.nbytes
    before = anonymous()
    session = opened(path)
    assert anonymous() - before < nodes * size // 2
    wanted = run_reference(LARGE)
    for y in session.run(None, {"x": LARGE.x}):
        assert_bits(y, wanted)


def test_sessions_come_and_go(tmp_path: Path) -> None:
    """Another file at an address that an earlier one had, while copies of earlier ones live."""
    kept, addresses = [], []
    for seed in range(6):
        other = make_case(8, n=1024, k=2048, seed=seed)
        case = replace(LARGE, weight=other.weight)
        path = save(case, tmp_path / str(seed))
        session = opened(path)
        addresses += re.findall(
            rf"([0-9a-f]+)-.* {re.escape(str(path.with_name('model.data')))}", Path("/proc/self/maps").read_text()
        )
        assert_bits(run(session, case), run_reference(case))
        if seed % 3 == 0:
            kept.append((session, case))
        del session
    assert len(set(addresses)) < len(addresses), "no address came twice: this test has tested nothing"
    for session, case in kept:
        assert_bits(run(session, case), run_reference(case))


def test_memory_of_a_closed_session_is_given_back(tmp_path: Path) -> None:
    path = save(LARGE, tmp_path)
    opened(path)
    before = anonymous()
    for _ in range(40):
        opened(path)
    assert anonymous() - before < 10 * LARGE.weight.nbytes


def test_rows_of_every_count_from_a_copy(tmp_path: Path) -> None:
    """The copy is as the file is, to its last record."""
    odd = make_case(5, n=1000, k=2016, has_offset=True, has_bias=False)
    session = opened(save(odd, tmp_path))
    for count in (1, 3, 70):
        case = replace(odd, x=np.resize(odd.x, (count, odd.x.shape[-1])))
        assert_bits(run(session, case), run_reference(case))
