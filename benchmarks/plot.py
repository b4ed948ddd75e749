"""The picture of a result: speed against perplexity rise, and how sparse each layer is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], path: Path, say: Callable[[str], None] = lambda text: None) -> bool:
    """Draw a result; without matplotlib nothing is drawn, and that is said."""
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is missing (pip install 'clada-export[eval]')")
        return False
    matplotlib.use("Agg")
    # The same result gives the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "clada"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 1.3), layout="constrained")
    for number, contestant in enumerate(result["contestants"]):
        look = {"color": f"C{number}", "label": contestant["name"]}
        speed, quality = contestant["speed"]["speedup"]["decode"], contestant["quality"]["all"]
        x, y = 100 * quality["ppl_increase"], speed["median"]
        bars = [[y - speed["low"]], [speed["high"] - y]]
        left.errorbar(x, y, bars, 100 * quality["ppl_increase_error"] or None, fmt="o", capsize=3, **look)
        layers = quality["layer_sparsity"]
        if layers:
            right.plot(range(len(layers)), [100 * share for share in layers], marker=".", **look)
    left.axhline(1.0, color="0.7", zorder=0)
    left.set(xlabel="perplexity rise on held-out text, %", ylabel="decode speed, peer = 1", title="Speed against quality")
    right.set(xlabel="layer", ylabel="FFN neurons skipped, %", ylim=(0, 100), title="Sparsity of each layer while decoding")
    left.legend(fontsize=8)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    figure.suptitle(f"{result['model']['name']} on {result['machine']['cpu']}, threads: {result['machine']['threads']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return True
