"""What an export costs, said before it is made: seconds, memory, disk."""

from __future__ import annotations

from clada_export.price.machine import Machine, measure_machine
from clada_export.price.model import Price, StagePrice, Work, price
from clada_export.price.size import ModelSize
from clada_export.price.work import work_of

__all__ = ["Machine", "ModelSize", "Price", "StagePrice", "Work", "measure_machine", "price", "work_of"]
