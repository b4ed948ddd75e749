"""How much of a calibration is said to be done."""

from __future__ import annotations

from clada_export.calibration.work import WorkCount


def test_done_grows_and_never_passes_the_whole() -> None:
    seen: list[tuple[str, int, int]] = []
    work = WorkCount(lambda what, done, total: seen.append((what, done, total)))
    work.expect("a", 4)
    work.expect("b", 10)
    for _ in range(6):
        work.step("a", "first")
    work.end("a")
    work.step("b", "second", 3)
    work.end("b")
    assert seen[0] == ("first", 1, 14)
    # More than was expected: something of it always seems to be left.
    assert seen[5][1] == 6 and seen[5][2] > 16 - 1
    assert seen[6] == ("second", 9, 16)
    done = [item[1] for item in seen]
    assert done == sorted(done) and all(item[1] <= item[2] for item in seen)
