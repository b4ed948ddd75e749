"""The commands that load an exported engine with its plugin, for the manifest and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clada_export.artifact.manifest import TensorSpec
from clada_export.artifact.profiles import Profile


def commands(record: Mapping[str, Any], inputs: Sequence[TensorSpec], profiles: Sequence[Profile]) -> dict[str, str]:
    """Shell commands by tool, to be run in the export's folder.

    Args:
        record: the manifest's `engine` as far as it is known.
    """
    rtx = record["backend"] == "tensorrt_rtx"
    engine = record["files"][0]["file"]
    plugin = record["plugin"]
    library = None if plugin is None or plugin["embedded"] else plugin["file"]
    tool = "tensorrt_rtx" if rtx else "trtexec"
    shapes = ",".join(f"{spec.name}:{'x'.join(map(str, profiles[0].shapes(spec)[1]))}" for spec in inputs)
    loads = f" --dynamicPlugins=./{library}" if library else ""
    return {
        tool: f"{tool} --loadEngine={engine}{loads} --useProfile=0 --shapes={shapes}",
        "polygraphy": _polygraphy(record["backend"], engine, library, len(profiles) - 1),
    }


def _polygraphy(module: str, engine: str, library: str | None, profile: int) -> str:
    """Polygraphy's own `--plugins` only opens a library; registering it takes one call before its tool starts."""
    setting = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if module == "tensorrt_rtx" else ""
    tool = "polygraphy"
    if library is not None:
        register = f"import sys, {module} as trt; trt.get_plugin_registry().load_library('./{library}')"
        tool = f'python -c "{register}; from polygraphy.tools import main; sys.exit(main())"'
    return (
        f"{setting}{tool} run {engine} --trt --optimization-profile {profile} "
        "--load-inputs verify/inputs.json --load-outputs verify/outputs.json"
    )
