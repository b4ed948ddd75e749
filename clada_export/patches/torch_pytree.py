"""What torch takes a registered container apart into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="torch_pytree",
    package="torch",
    made_for="2.13.0",
    reason="torch.export wants dynamic shapes in the form that a container is taken apart into, and says what that is in a "
    "private module only.",
    until="torch has a public module of pytrees",
)


def children(container: Any) -> Sequence[Any]:
    """What a container is made of, one level down.

    Args:
        container: of a type that was registered with torch's pytrees.

    Raises:
        KeyError: it was not.
    """
    found, _ = torch.utils._pytree.SUPPORTED_NODES[type(container)].flatten_fn(container)
    return found
