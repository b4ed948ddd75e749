"""What a sweep shows: a table, and a picture of quality against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clada_export.lab.sweep.cells import Outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as text, failed cells with their reason."""
    head = (
        f"{'policy':<14} {'sparsity':>8} {'skipped':>8} {'KL':>8} {'+1 s.e.':>8} {'ppl':>8} {'top-1':>7} {'bytes':>7} "
        f"{'seconds':>8}  variant, allocation"
    )
    lines = [head]
    for outcome in outcomes:
        start = f"{outcome.cell.policy:<14} {outcome.cell.sparsity:>8g}"
        values = outcome.values
        if values is None:
            lines.append(f"{start}  failed: {outcome.reason}")
            continue
        read = f"x{values['relative_bytes']:.3f}"
        lines.append(
            f"{start} {values['sparsity']:>8.1%} {values['kl']:>8.4f} {values['kl_bound']:>8.4f} "
            f"{values['ppl_increase']:>+8.2%} {values['top1']:>7.1%} {read:>7} {values['seconds']:>8.1f}  "
            f"{values['variant']}, {values['allocation']}"
        )
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> bool:
    """Draw KL and the rise of perplexity against the bytes read, a line for each policy.

    Returns:
        False without matplotlib; then nothing is drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    policies = list(dict.fromkeys(outcome.cell.policy for outcome in outcomes))
    for axis, key, factor, label in (
        (axes[0], "kl", 1.0, "KL(dense, sparse), nats a token"),
        (axes[1], "ppl_increase", 100.0, "rise of perplexity, %"),
    ):
        for number, policy in enumerate(policies):
            points = sorted(
                (o.values["relative_bytes"], o.values[key] * factor, o.cell.sparsity)
                for o in outcomes
                if o.values is not None and o.cell.policy == policy
            )
            if not points:
                continue
            axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", color=f"C{number}", label=policy)
            for x, y, sparsity in points:
                axis.annotate(f"{sparsity:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7, color="0.4")
        axis.set(xlabel="FFN bytes read a token, dense = 1", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True
