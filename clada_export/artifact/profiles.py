"""Optimisation profiles of a TensorRT engine: for which sizes it was built, and which one fits a run.

Plain data and arithmetic, for the compiler and the runtime alike; nothing here needs TensorRT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clada_export.artifact.manifest import TensorSpec
from clada_export.errors import UsageError

Range = tuple[int, int, int]
"""(least, the size to optimise for, greatest)."""

DECODE, PROMPT = "decode", "prompt"
DEFAULT_SEQUENCE, DEFAULT_PAST = 512, 2048


@dataclass(frozen=True)
class Profile:
    """Sizes of one profile: sequences, new tokens of each, and tokens of the cache before them."""

    name: str
    batch: Range
    sequence: Range
    past: Range

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """The (least, optimal, greatest) shape of a graph input."""
        total = tuple(past + new for past, new in zip(self.past, self.sequence, strict=True))
        sizes = {
            "batch_size": self.batch,
            "sequence_length": self.sequence,
            "past_sequence_length": self.past,
            "total_sequence_length": total,
        }
        unknown = [axis for axis in spec.shape if isinstance(axis, str) and axis not in sizes]
        if unknown:
            raise UsageError(f"input {spec.name!r} has an axis {unknown[0]!r} that a profile does not know")
        return tuple(tuple(sizes[axis][place] if isinstance(axis, str) else axis for axis in spec.shape) for place in range(3))

    def fits(self, batch: int, sequence: int, past: int) -> bool:
        """Whether a run of these sizes is within the profile."""
        pairs = ((batch, self.batch), (sequence, self.sequence), (past, self.past))
        return all(span[0] <= size <= span[2] for size, span in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Profile:
        """Read what `to_dict` made."""
        return cls(value["name"], *((tuple(value[key])) for key in ("batch", "sequence", "past")))


def make_profiles(max_batch: int, max_sequence: int | None, max_past: int | None, limit: int | None) -> tuple[Profile, Profile]:
    """The profiles of an engine: `decode` (one new token) and `prompt` (up to `max_sequence`, after any past).

    Args:
        max_sequence: None takes 512, or what the model takes.
        max_past: None takes 2048, or what the model takes less the token that comes after it.
        limit: the longest sequence that the model takes, or None if it does not say.

    Raises:
        UsageError: more than the model takes.
    """
    longest = limit if limit is not None else DEFAULT_PAST + 1
    sequence = min(DEFAULT_SEQUENCE, longest) if max_sequence is None else max_sequence
    past = max(1, min(DEFAULT_PAST, longest - 1)) if max_past is None else max_past
    if limit is not None and sequence > limit:
        raise UsageError(f"--max-sequence {sequence} is more than the model takes: {limit} tokens")
    if limit is not None and past >= limit:
        raise UsageError(f"--max-past {past} leaves no place for a token after it: the model takes {limit} tokens")
    batch = (1, max_batch, max_batch)
    return (
        Profile(DECODE, batch, (1, 1, 1), (0, past // 2, past)),
        Profile(PROMPT, batch, (1, max(1, sequence // 2), sequence), (0, 0, past)),
    )


def choose_profile(profiles: Sequence[Profile], batch: int, sequence: int, past: int) -> int:
    """The index of the first profile that takes a run of these sizes.

    Raises:
        UsageError: none does; says which size is too large, the engine's greatest, and the option that sets it.
    """
    for index, profile in enumerate(profiles):
        if profile.fits(batch, sequence, past):
            return index
    greatest = {key: max(getattr(profile, key)[2] for profile in profiles) for key in ("batch", "sequence", "past")}
    sizes = {"batch": batch, "sequence": sequence, "past": past}
    words = {"batch": "sequences in a batch", "sequence": "new tokens in one run", "past": "tokens in the cache"}
    for key, size in sizes.items():
        if size > greatest[key]:
            raise UsageError(
                f"{size} {words[key]} are more than this engine takes: {greatest[key]}; export again with --max-{key} {size}"
            )
    raise UsageError(f"no profile of this engine takes {batch} sequences, {sequence} new tokens and {past} tokens in the cache")
