"""What makes an FFN unfit for a policy."""

from __future__ import annotations

from collections.abc import Sequence

from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError


def check_score(name: str, scores: Sequence[str], wanted: str | None) -> None:
    """Refuse a score that the policy does not have.

    Raises:
        UsageError: lists those it has.
    """
    if wanted is not None and wanted not in scores:
        raise UsageError(f"policy {name!r} has no score {wanted!r}; its scores: {', '.join(scores)}")


def check_rank(name: str, ffns: Sequence[EagerFFN], rank: int | None) -> None:
    """Refuse a rank that is larger than the matrices that it is for.

    Raises:
        UsageError: names the layer, its sizes and the rank.
    """
    narrow = next((ffn for ffn in ffns if rank is not None and rank > min(ffn.hidden_size, ffn.intermediate_size)), None)
    if narrow is not None:
        raise UsageError(
            f"policy {name!r}: --rank {rank} is more than {narrow.name} can use, which is {narrow.hidden_size} x "
            f"{narrow.intermediate_size}; give at most {min(narrow.hidden_size, narrow.intermediate_size)}"
        )


def check_granule(name: str, ffns: Sequence[EagerFFN], granule: int) -> None:
    """Refuse experts that do not divide an FFN.

    Raises:
        UsageError: names the layer, its width and the granule.
    """
    misfit = next((ffn for ffn in ffns if granule < 1 or ffn.intermediate_size % granule), None)
    if misfit is not None:
        raise UsageError(
            f"policy {name!r}: {misfit.name} has {misfit.intermediate_size} neurons, which experts of {granule} do not divide; "
            "choose another --granule"
        )
