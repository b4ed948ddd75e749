"""Which versions of other packages an export was made with, and whether they are ones that were tested.

The ranges stand once, in `pyproject.toml`, and are read from the installed package's metadata.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = "clada-export"


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed: verification needs some that an export without it does not.

    Args:
        packages: names of distributions, such as `onnx-ir`.
    """
    return {name: version for name in packages if (version := _installed(name)) is not None}


def required_packages(requirements: Iterable[str] | None = None) -> tuple[str, ...]:
    """The packages that no installation goes without, those of extras left out.

    Args:
        requirements: as in `version_ranges`.
    """
    return tuple(found.name for found in map(Requirement, _declared(requirements)) if found.marker is None)


def version_ranges(requirements: Iterable[str] | None = None) -> dict[str, SpecifierSet]:
    """The range of each package that `requirements` names, by its canonical name.

    Args:
        requirements: PEP 508 strings; those of this project by default. What is needed to develop it only (the extra `dev`) is
            left out.
    """
    ranges: dict[str, SpecifierSet] = {}
    for found in map(Requirement, _declared(requirements)):
        if found.marker is None or found.marker.evaluate({"extra": ""}) or not found.marker.evaluate({"extra": "dev"}):
            ranges[canonicalize_name(found.name)] = found.specifier
    return ranges


def untested_versions(versions: dict[str, str], ranges: dict[str, SpecifierSet] | None = None) -> list[str]:
    """A warning for each version outside of the range that was tested.

    Args:
        versions: by name of the distribution. A package without a range is passed over.
        ranges: `version_ranges()` by default.
    """
    ranges = version_ranges() if ranges is None else ranges
    return [
        f"{name} {version} is not a version that this was tested with ({tested}): install one of those if the engine is wrong "
        "or the export fails"
        for name, version in sorted(versions.items())
        if (tested := ranges.get(canonicalize_name(name))) is not None and not tested.contains(version, prereleases=True)
    ]


def _declared(requirements: Iterable[str] | None) -> Iterable[str]:
    return (metadata.requires(PROJECT) or ()) if requirements is None else requirements


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
