"""The dense model's side of a measurement: what is kept of its logits, and how others are compared with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clada_export.calibration.soundness import bounded
from clada_export.decoder.spool import Pages, Spool

KEEP_LIMIT = 128 * 2**20
"""Bytes of dense logits that are kept in memory between measurements; beyond it they are in a temporary file."""
CHUNK = 2**21
"""Logits that are compared at a time: they fit into a core's cache, which what is made of a whole window would not."""


@dataclass(frozen=True)
class Teacher:
    """Some rows of the dense model: its probabilities, float32 [rows, V], and float32 [rows] each sum p log p, the surprisal of
    the token that followed, and (int64) the most probable token.

    KL(p || q) = sum p log p - sum p z + LSE(z), with z the other model's logits: of these one product of p and one sum of
    exponentials are left to do. The three terms are tens of nats at most, so that rounding leaves about 1e-6 nats.
    """

    p: Tensor
    p_log_p: Tensor
    nll: Tensor
    best: Tensor
    pages: Pages | None = None
    """Of the file that `p` is in, if it is in one."""

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, size: int) -> Teacher:
        """From logits, float32 [rows, V]; otherwise as `of_parts`."""
        return cls.of_parts([(logits, targets)], size)

    @classmethod
    def of_parts(cls, parts: Sequence[tuple[Tensor, Tensor]], size: int) -> Teacher:
        """From the logits, float32 [rows, V], of some rows after others.

        Args:
            parts: logits, and the tokens that followed, int64 [rows].
            size: bytes of all logits that are kept at a time, here and by others.
        """
        shape = sum(len(logits) for logits, _ in parts), parts[0][0].shape[-1]
        spool = None if size <= KEEP_LIMIT else Spool()
        place = torch.empty(shape) if spool is None else spool.take(shape, torch.float32)
        columns: list[Tensor] = []
        done = 0
        for logits, targets in parts:
            for part in chunks(logits):
                log_p = logits[part].log_softmax(-1)
                chosen = -log_p.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
                p = torch.exp(log_p, out=place[done : done + len(log_p)])
                done += len(log_p)
                columns.append(torch.stack(((p * log_p.nan_to_num(neginf=0.0)).sum(-1), chosen, log_p.argmax(-1).float())))
        p_log_p, nll, best = torch.cat(columns, dim=1)
        made = cls(place, p_log_p, nll, best.long(), None if spool is None else spool.pages([place]))
        made.rest()
        return made

    def compare(self, logits: Tensor, targets: Tensor, rows: slice = slice(None)) -> Tensor:
        """Another model's logits [rows, V] against some rows: float32 [4, rows], nll, dense nll, KL, top-1 agreement.

        Args:
            targets: the tokens that followed, int64 [rows].
            rows: which of the teacher's they are.
        """
        p, p_log_p, best = self.p[rows], self.p_log_p[rows], self.best[rows]
        found: list[Tensor] = []
        for part in chunks(logits):
            z = logits[part].float()
            # Products of small numbers stay what they are.
            z = z - z.amax(-1, keepdim=True)
            total = z.exp().sum(-1).log_()
            kl = p_log_p[part] - (p[part] * z).sum(-1) + total
            nll = total - z.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            found.append(torch.stack((bounded(nll), bounded(kl.clamp(min=0.0)), (z.argmax(-1) == best[part]).float())))
        self.rest()
        nll, kl, same = torch.cat(found, dim=1)
        return torch.stack((nll, bounded(self.nll[rows]), kl, same))

    def rest(self) -> None:
        """Give the memory back of what is in a file."""
        if self.pages is not None:
            self.pages.rest()


def chunks(logits: Tensor) -> Iterator[slice]:
    """Rows [rows, V] a few at a time."""
    step = max(1, CHUNK // max(logits.shape[-1], 1))
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def hold(values: Tensor, size: int) -> Tensor:
    """A copy of the values, in memory if it and its like take no more than `KEEP_LIMIT`, else in a file that goes with it.

    Args:
        values: float32.
        size: bytes of all that is held.
    """
    return values.clone() if size <= KEEP_LIMIT else Spool().copy(values)
