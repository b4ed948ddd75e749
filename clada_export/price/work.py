"""What an export was asked for, as far as its price depends on it."""

from __future__ import annotations

from clada_export.calibration.choose import AUTO
from clada_export.export_options import ExportOptions, quantises
from clada_export.methods import all_policies, get_policy
from clada_export.price.model import Work


def work_of(options: ExportOptions) -> Work:
    """The work that options which were checked ask for."""
    policies = all_policies(options.settings)
    chosen = list(policies.values()) if options.policy == AUTO else [get_policy(options.policy, options.settings)]
    untrained = sum(not policy.trained for policy in chosen)
    trained = len(chosen) - untrained if options.train or options.policy != AUTO else 0
    return Work(
        target=options.target,
        dtype=options.dtype,
        measured=untrained,
        trained=trained,
        planned=options.plan is not None,
        verified=options.verify,
        context=options.calibration_context,
        workers=options.calibration_workers if options.ray_address is None else 0,
        weights=options.weights if options.weights is not None and quantises(options.weights) else None,
        shadow=any((options.settings.score or policy.scores[0]) == "shadow" for policy in chosen),
    )
