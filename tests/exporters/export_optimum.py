"""Export model folders with optimum: run by an environment that has it. FOLDER/NAME becomes OUT/NAME."""

import sys
from pathlib import Path

from optimum.exporters.onnx import main_export


def main(folder: str, out: str, names: list[str]) -> None:
    for name in names:
        main_export(str(Path(folder) / name), str(Path(out) / name), task="text-generation-with-past", do_validation=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
