"""`LoadSignal`: what a plan and a manifest say about how surprisal and entropy become a load."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clada_export.errors import UsageError
from clada_export.load.controllers import Values, limited, make_controller


@dataclass(frozen=True)
class LoadSignal:
    """Statistics, weights and controller of the load; surprisal S and entropy H in nats, from raw logits.

    drive = surprisal_weight * (S - surprisal_mean) / surprisal_std + entropy_weight * (H - entropy_mean) / entropy_std, and the
    controller that `rule` names, with its `parameters`, makes the load of it (`clada_export.load.controllers`); `exp`, the
    default, is clip(drive, -4, 4). `momentum` b above 0 lets means and deviations follow the text: mean <- mean + b (value -
    mean). `slope` turns the multiplier that a controller wants into a load; it is the `load_slope` of a layer that follows the
    controller exactly.
    """

    surprisal_mean: float = 0.0
    surprisal_std: float = 1.0
    entropy_mean: float = 0.0
    entropy_std: float = 1.0
    surprisal_weight: float = 1.0
    entropy_weight: float = 0.0
    rule: str = "exp"
    parameters: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.0
    slope: float = 0.25

    @classmethod
    def from_dict(cls, value: dict[str, Any], origin: str) -> LoadSignal:
        """Read what follows the schema. JSON has one kind of number, and 4 is as good as 4.0.

        Args:
            origin: where it came from, for the message.

        Raises:
            UsageError: the controller does not have one of the parameters, or not this value.
        """
        parameters = {name: float(item) for name, item in value.get("parameters", {}).items()}
        numbers = {name: float(item) for name, item in value.items() if name not in ("rule", "parameters")}
        signal = cls(rule=value.get("rule", cls.rule), parameters=parameters, **numbers)
        try:
            make_controller(signal.rule, signal.parameters)
        except ValueError as error:
            raise UsageError(f"{origin}: {error}") from error
        return signal

    def drive(self, surprisal: Values, entropy: Values) -> Values:
        """The weighted sum of standardised signals (in standard deviations from their means), of any shape."""
        return self.surprisal_weight * surprisal + self.entropy_weight * entropy

    def exponential_load(self, surprisal: Values, entropy: Values) -> Values:
        """The load by controller `exp` and the calibrated statistics, in standard deviations, clipped to -4..4.

        Args:
            surprisal, entropy: nats, of any shape.
        """
        drive = self.drive(
            standardised(surprisal, self.surprisal_mean, self.surprisal_std),
            standardised(entropy, self.entropy_mean, self.entropy_std),
        )
        return limited(drive)


def standardised(value: Values, mean: Values | float, deviation: Values | float) -> Values:
    """How many standard deviations a value is above its mean."""
    return (value - mean) / deviation
