"""Generate text with an exported engine: the smallest use of the Python runtime (no torch, no transformers).

python samples/generate.py build/quickstart/smollm2 "The capital of France is"
"""

from __future__ import annotations

import sys

from clada_export.runtime import load_engine


def main() -> int:
    """The command."""
    folder, prompt = sys.argv[1:3]
    engine = load_engine(folder)

    # `load` is the knob: "auto" follows the text, "dense" computes everything, a number is a fixed load (higher is denser).
    for load in ("dense", "auto", -2.0):
        made = engine.generate(prompt, max_new_tokens=32, load=load)
        print(f"[load {load}] {prompt}{made.texts[0] if made.texts else made.tokens[0]}")

        # How many neurons each decode step ran, in each layer: [steps, batch, layers].
        if made.active is not None and made.active.size:
            widths = [layer["intermediate_size"] for layer in engine.manifest.plan["layers"]]
            print(f"    {1 - (made.active / widths).mean():.0%} of the neurons skipped, {len(made.tokens[0])} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
