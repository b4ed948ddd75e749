"""Balanced k-means: group a layer's neurons into experts of equal size by the direction of their input weights.

MoEfication (arXiv 2110.01786) clusters the L2-normalised rows of W_1; D2DMoE (arXiv 2310.04361) takes the gate's rows where an
FFN is gated, since the gate decides whether a neuron fires.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clada_export.errors import UsageError

UNBALANCED = 5
"""Updates of the centres before sizes are made equal: on real layers this matters more than anything that comes after."""
ITERATIONS = 20
"""Most updates of the centres with experts of equal size."""
EXCHANGES = 100
"""Most rounds of swaps between two updates; a round swaps one pair of neurons for up to E/2 pairs of experts."""
TOLERANCE = 1e-4
"""Stop when an update lowers the summed squared distance by less than this share."""


def cluster_neurons(w_in: Tensor, granule: int, seed: int = 0, *, name: str = "FFN") -> np.ndarray:
    """Order the neurons so that each `granule` neighbours are an expert.

    Lloyd's algorithm on normalised rows: a k-means++ start, a few plain updates, then updates with experts of equal size. The
    balanced assignment gives each neuron the nearest centre that has room, the neurons with most to lose first, and then lets
    neurons of two experts change places while that lowers the summed squared distance (own derivation; the papers use exact
    solvers). So the result is a local optimum of balanced k-means, not a global one.

    Args:
        w_in: float32 [f, n, d], neuron-major; row 0 of a neuron is its gate row, or its up row in a plain FFN.
        granule: neurons an expert, g.
        seed: of the k-means++ start; the result is the same for the same seed and weights.
        name: of the layer, for errors.

    Returns:
        int64 [f], a permutation: expert e is `order[e * g : (e + 1) * g]`, ascending, experts ordered by their first neuron.

    Raises:
        UsageError: `granule` does not divide f, or a weight is not finite.
    """
    f = w_in.shape[0]
    if granule < 1 or f % granule:
        divisors = ", ".join(str(g) for g in (8, 16, 32, 64, 128) if f % g == 0) or "none of 8, 16, 32, 64, 128"
        raise UsageError(f"{name}: {f} neurons can't be split into experts of {granule}; sizes that fit: {divisors}")
    if not bool(torch.isfinite(w_in).all()):
        raise UsageError(f"{name}: its weights are not finite")
    if granule in (1, f):
        return np.arange(f, dtype=np.int64)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(w_in[:, 0].float(), dim=-1)
        members = _balanced_kmeans(rows, f // granule, torch.Generator().manual_seed(seed))
    members = members.sort(dim=1).values
    return members[members[:, 0].argsort()].flatten().numpy().astype(np.int64)


def within_distance(w_in: Tensor, order: np.ndarray, granule: int) -> float:
    """The mean squared distance of the normalised rows to their expert's mean: what balanced k-means makes small (0 to 1)."""
    rows = torch.nn.functional.normalize(w_in[:, 0].float(), dim=-1)[torch.from_numpy(order)]
    groups = rows.reshape(-1, granule, rows.shape[-1])
    return float((groups - groups.mean(1, keepdim=True)).square().sum(-1).mean())


def _balanced_kmeans(rows: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """The members of every expert, int64 [E, g]."""
    centres = _spread_centres(rows, experts, generator)
    for _ in range(UNBALANCED):
        nearest = _cost(rows, centres).argmin(1)
        sizes = torch.bincount(nearest, minlength=experts).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    members = _first_assignment(_cost(rows, centres))
    before = float("inf")
    for _ in range(ITERATIONS):
        cost = _cost(rows, rows[members].mean(1))
        # Swaps alone stay near the assignment they begin with; a fresh one sometimes ends lower.
        choices = [_exchange(cost, members), _exchange(cost, _first_assignment(cost))]
        totals = [_total(cost, choice) for choice in choices]
        members = choices[totals.index(min(totals))]
        if min(totals) >= before * (1.0 - TOLERANCE):
            break
        before = min(totals)
    return members


def _total(cost: Tensor, members: Tensor) -> float:
    """The summed squared distance of unit rows to their expert's centre."""
    return float((cost.gather(1, _owners(members).unsqueeze(1)).double() + 1.0).sum())


def _cost(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [f, E] less the rows' own squared length, which no assignment changes."""
    return torch.addmm(centres.square().sum(-1).unsqueeze(0), rows, centres.t(), alpha=-2.0)


def _spread_centres(rows: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a row, drawn in proportion to its squared distance from the nearest centre so far."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    lengths = rows.square().sum(-1)
    nearest = torch.full((len(rows),), float("inf"))
    for _ in range(experts - 1):
        last = chosen[-1]
        distance = (lengths + lengths[last] - 2.0 * (rows @ rows[last])).clamp(min=0.0)
        distance[last] = 0.0
        nearest = torch.minimum(nearest, distance)
        # Equal rows have no distance left; any of them will do then.
        weight = nearest if bool(nearest.any()) else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return rows[torch.tensor(chosen)]


def _first_assignment(cost: Tensor) -> Tensor:
    """Members [E, g]: the nearest expert with room, neurons that lose most by their second choice first."""
    f, experts = cost.shape
    best = cost.topk(2, dim=1, largest=False).values
    values = cost.numpy().copy()
    room = np.full(experts, f // experts)
    members: list[list[int]] = [[] for _ in range(experts)]
    for neuron in (best[:, 0] - best[:, 1]).argsort(stable=True).tolist():
        expert = int(values[neuron].argmin())
        members[expert].append(neuron)
        room[expert] -= 1
        if room[expert] == 0:
            values[:, expert] = np.inf
    return torch.tensor(members)


def _owners(members: Tensor) -> Tensor:
    """The expert of every neuron, int64 [f]."""
    experts, granule = members.shape
    owners = torch.empty(members.numel(), dtype=torch.int64)
    owners[members.flatten()] = torch.arange(experts).repeat_interleave(granule)
    return owners


def _exchange(cost: Tensor, members: Tensor) -> Tensor:
    """Swap pairs of neurons between experts while that lowers the summed cost."""
    members = members.clone()
    experts, granule = members.shape
    everyone = torch.arange(experts)
    # What the expert's best mover would gain by going to each other expert, and which mover that is: [E, E].
    moves = cost[members]
    moves = moves[everyone[:, None], torch.arange(granule)[None], everyone[:, None]].unsqueeze(-1) - moves
    gain, mover = moves.max(dim=1)
    for _ in range(EXCHANGES):
        both = gain + gain.t()
        both.fill_diagonal_(0.0)
        value, partner = both.max(dim=1)
        # A pair is swapped if each is the other's best, so that no expert takes part twice in a round.
        swap = (value > 1e-6) & (partner[partner] == everyone) & (everyone < partner)
        first = everyone[swap]
        if not len(first):
            break
        second = partner[swap]
        i, j = mover[first, second], mover[second, first]
        members[first, i], members[second, j] = members[second, j], members[first, i]
        changed = torch.cat((first, second))
        moves = cost[members[changed]]
        own = moves.gather(2, changed.view(-1, 1, 1).expand(-1, granule, 1))
        gain[changed], mover[changed] = (own - moves).max(dim=1)
    return members
