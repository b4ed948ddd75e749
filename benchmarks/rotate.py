"""Write a *rotated* copy of a Llama or Qwen2 model: the same function, with weights that lie on no quantisation grid.

A model that was dequantised from 4-bit blocks is an easy case for a method that keeps 4-bit copies of weights. So the scale
of each RMSNorm is folded into the linear layers after it, the LM head gets weights of its own, and the residual stream is
multiplied by one random orthogonal matrix. RMSNorm without a scale commutes with it, so the logits stay what they were; that
is checked.

    python -m benchmarks.rotate model.gguf build/rotated
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from clada_export.calibration.text import default_text
from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import CladaError, UnsupportedModelError, UsageError, VerificationError
from clada_export.source.load import load_source

PPL_TOLERANCE = 3e-6
"""Largest relative change of perplexity: ten times what float32 rounding makes of it."""
LOGIT_TOLERANCE = 1e-4
"""Largest change of a logit, relative to the largest logit."""
CHECKED_TOKENS = 256
ROTATED = LlamaForCausalLM | Qwen2ForCausalLM
"""What it knows: RMSNorms before linear layers on one residual stream, and nothing else on it."""


@dataclass(frozen=True)
class RotationCheck:
    """The rotated model against the original: perplexities, and the largest change of a logit over the largest logit."""

    ppl: float
    rotated_ppl: float
    logit_error: float

    @property
    def ppl_error(self) -> float:
        """Relative change of perplexity."""
        return abs(self.rotated_ppl / self.ppl - 1.0)

    def require(self) -> None:
        """Accept the rotation.

        Raises:
            VerificationError: the function has changed.
        """
        # `not <=`, so that a NaN fails.
        if not self.ppl_error <= PPL_TOLERANCE or not self.logit_error <= LOGIT_TOLERANCE:
            raise VerificationError(
                f"the rotated model is another function: perplexity {self.rotated_ppl:.8g} against {self.ppl:.8g} (relative "
                f"{self.ppl_error:.1e}, allowed {PPL_TOLERANCE:.0e}), logits differ by {self.logit_error:.1e} of the largest "
                f"(allowed {LOGIT_TOLERANCE:.0e})"
            )


@torch.no_grad()
def rotate(model: PreTrainedModel, tokens: Tensor, seed: int = 0) -> RotationCheck:
    """Rotate a model in place and check that its function has not changed.

    Args:
        model: float32, one of `ROTATED`, in eval mode.
        tokens: int64 [1, n], what it is checked on; n of at least 2.
        seed: of the orthogonal matrix.

    Raises:
        UnsupportedModelError: another model; its norms or residual paths may be others than this knows.
        VerificationError: the logits have changed; the model is then of no use.
    """
    if not isinstance(model, ROTATED):
        known = " and ".join(kind.__name__ for kind in get_args(ROTATED))
        raise UnsupportedModelError(f"rotate knows {known} and not {type(model).__name__}")
    before: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    _rotate(model, seed)
    after: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    check = RotationCheck(
        _perplexity(before, tokens[0]),
        _perplexity(after, tokens[0]),
        float((after - before).abs().max() / before.abs().max()),
    )
    check.require()
    return check


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix (uniform over all of them), float64 [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    # QR alone fixes the signs of the columns by its algorithm.
    result: Tensor = q * r.diagonal().sign()
    return result


def _rotate(model: ROTATED, seed: int) -> None:
    turn = orthogonal(model.config.hidden_size, seed)
    _untie(model)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    _set(embedding, embedding.weight.double() @ turn)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            _set(linear, _folded(linear, layer.input_layernorm) @ turn)
        for linear in (mlp.gate_proj, mlp.up_proj):
            _set(linear, _folded(linear, layer.post_attention_layernorm) @ turn)
        for linear in (attention.o_proj, mlp.down_proj):
            _set(linear, turn.T @ linear.weight.double())
            if linear.bias is not None:
                linear.bias.copy_(linear.bias.double() @ turn)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1.0)
    _set(model.lm_head, _folded(model.lm_head, model.model.norm) @ turn)
    model.model.norm.weight.fill_(1.0)


def _untie(model: ROTATED) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _folded(linear: nn.Module, norm: nn.Module) -> Tensor:
    """The weight of a linear layer with the scale of the norm before it, float64."""
    assert isinstance(linear.weight, Tensor) and isinstance(norm.weight, Tensor)
    return linear.weight.double() * norm.weight.double()


def _set(module: nn.Module, weight: Tensor) -> None:
    assert isinstance(module.weight, Tensor)
    module.weight.copy_(weight)


def _perplexity(logits: Tensor, tokens: Tensor) -> float:
    return math.exp(float(nn.functional.cross_entropy(logits[:-1].double(), tokens[1:])))


def write_rotated(source: str, output: Path, seed: int = 0) -> RotationCheck:
    """Load a model, rotate it and write it as a safetensors folder with its tokenizer.

    Raises:
        UsageError: the output exists, or the model can't be loaded.
        UnsupportedModelError, VerificationError: as `rotate`.
    """
    if output.exists():
        raise UsageError(f"{output} exists")
    loaded = load_source(source)
    decoder = require_torch(loaded.decoder, "a rotation")
    check = rotate(decoder.model, _tokens(loaded.tokenizer, decoder.vocab_size), seed)
    # A rename at the end: a run that is cut off leaves nothing that looks like a model.
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    decoder.model.save_pretrained(part)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(part)
    part.rename(output)
    return check


def _tokens(tokenizer: object, vocab_size: int) -> Tensor:
    if callable(tokenizer):
        ids = tokenizer(default_text()[: 16 * CHECKED_TOKENS], add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([ids[:CHECKED_TOKENS]])
    return torch.randint(0, vocab_size, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a Llama or Qwen2: a .gguf file, a folder or a Hub id")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the orthogonal matrix (default: 0)")
    options = parser.parse_args(arguments)
    try:
        check = write_rotated(options.model, options.output, options.seed)
    except CladaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: perplexity {check.rotated_ppl:.6f} against {check.ppl:.6f}, relative {check.ppl_error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
