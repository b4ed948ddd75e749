"""What `generation_config.json` of an export says of how its tokens are to be chosen: defaults, and arguments win."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clada_export.artifact.manifest import Manifest
from clada_export.errors import UsageError, shown
from clada_export.runtime.limits import GENERATION_FILE, listed_names, read_object
from clada_export.runtime.sampling import SamplingSettings

_SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""What counts only where tokens are drawn, and its value where nobody says one."""


@dataclass(frozen=True)
class GenerationDefaults:
    """`values` are the file's, as they stand there; they are checked when they are used. `place` is the file."""

    values: dict[str, Any] = field(default_factory=dict)
    place: Path = Path(GENERATION_FILE)

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> GenerationDefaults:
        """Those of an export; none if it has no such file.

        Raises:
            UsageError: the file can't be read.
        """
        place = folder / GENERATION_FILE
        return cls(read_object(place, listed_names(manifest)), place)

    def sampling(
        self,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> SamplingSettings:
        """How tokens are chosen: by the arguments, and where one is None by the file.

        Greedy, unless sampling is asked for: by `do_sample`, by a temperature, or else by the file's `do_sample`.

        Raises:
            UsageError: a value out of range, of the arguments or of the file, or arguments that contradict each other.
        """
        given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        given["repetition_penalty"] = repetition_penalty
        settings = SamplingSettings(seed=seed, **{name: value for name, value in given.items() if value is not None})
        if do_sample is not None and not isinstance(do_sample, bool):
            raise UsageError(f"do_sample is {shown(do_sample)}; it must be True or False")
        if do_sample is not None and temperature is not None and do_sample != (settings.temperature > 0):
            raise UsageError(
                f"do_sample is {do_sample} and temperature is {temperature}; 0 is greedy, and a positive number samples"
            )
        if do_sample is None:
            do_sample = settings.temperature > 0 if temperature is not None else self._do_sample()
        penalty = self._value("repetition_penalty", 1.0) if repetition_penalty is None else repetition_penalty
        if not do_sample:
            return SamplingSettings(seed=seed, repetition_penalty=penalty)
        drawn = {name: self._value(name, usual) if given[name] is None else given[name] for name, usual in _SAMPLED.items()}
        return SamplingSettings(seed=seed, repetition_penalty=penalty, **drawn)

    def _do_sample(self) -> bool:
        value = self.values.get("do_sample")
        if value is not None and not isinstance(value, bool):
            raise UsageError(f"{self.place}: do_sample is {shown(value)}; true or false is wanted")
        return bool(value)

    def _value(self, name: str, usual: float) -> Any:
        """The file's, held to what the setting takes."""
        value = self.values.get(name)
        if value is None:
            return usual
        try:
            SamplingSettings(**{name: value})
        except UsageError as error:
            raise UsageError(f"{self.place}: {error}; a value given as an argument takes its place") from error
        return value
