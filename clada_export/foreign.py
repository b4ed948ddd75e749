"""Where errors of other people's libraries become ours: one line each kind of input that a stranger may have written.

transformers, tokenizers, jinja2, onnx-ir and NumPy raise what they like on input that makes no sense to them: every kind of
exception, and exceptions that are no `Exception`. A call into one of them on such input stands in `with reading(KIND, place):`,
alone, so that a fault of our own code is not taken for one of the input. What comes out is a `CladaError`: exit code 1 means a
fault of this project and nothing else.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clada_export.errors import BackendError, CladaError, UnsupportedModelError, UsageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MESSAGE_LIMIT = 300


@dataclass(frozen=True)
class InputKind:
    """A kind of input: what is said of one that can't be read, and the error's class."""

    fault: str
    error: type[CladaError] = UsageError


CONFIG = InputKind("not a configuration that transformers can read")
GENERATION_CONFIG = InputKind("not a generation configuration that transformers can read")
WEIGHTS = InputKind("the weights can't be read")
MODEL = InputKind("transformers can't build the model")
GGUF = InputKind("not a GGUF file that can be read")
GGUF_ARCHITECTURE = InputKind("it can't be read", UnsupportedModelError)
MODEL_CARD = InputKind("its YAML header can't be read")
TOKENIZER = InputKind("not a tokenizer that can be read")
TEXT = InputKind("the tokenizer fails on this text")
TOKENS = InputKind("the tokenizer fails on these tokens")
CHAT_TEMPLATE = InputKind("the chat template can't be applied")
ONNX = InputKind("damaged, or no ONNX model")
ONNX_GRAPH = InputKind("the graph can't be prepared", UnsupportedModelError)
ONNX_NODE = InputKind("not what its operator allows")
ONNX_RUN = InputKind("ONNX Runtime does not run this graph", UnsupportedModelError)
TOKEN_FILE = InputKind("not a file of token ids")
PLAN_ARRAYS = InputKind("not a safetensors file that can be read")
ENGINE = InputKind("TensorRT can't read the engine", BackendError)
OP_LIBRARY = InputKind("can't load the custom-op library (build or install clada-export for this machine)", BackendError)
PLUGIN_LIBRARY = InputKind("can't load the plugin library", BackendError)
ENGINE_GRAPH = InputKind("can't load the graph", BackendError)
ENGINE_RUN = InputKind("fails in the graph", BackendError)


@contextmanager
def reading(kind: InputKind, place: str | Path) -> Iterator[None]:
    """Errors of the libraries that read an input become the user's.

    Args:
        kind: what is being read.
        place: where it is, for the message.

    Raises:
        CladaError: of `kind.error` for whatever the libraries raise; a BackendError for a package that is missing. Errors that
            are ours already, a full disk, Ctrl-C and the like pass as they are.
    """
    try:
        yield
    except CladaError:
        raise
    except ImportError as error:
        raise BackendError(f"{place}: reading it needs another package: {one_line(error)}") from error
    except MemoryError as error:
        raise UsageError(f"{place}: {kind.fault}: it asks for more memory than there is") from error
    except RecursionError as error:
        raise kind.error(f"{place}: {kind.fault}: it is nested too deeply, or refers to itself") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise kind.error(f"{place}: {kind.fault}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # the libraries name no base of what they raise
        raise kind.error(f"{place}: {kind.fault}: {one_line(error)}") from error
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise kind.error(f"{place}: {kind.fault}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an exception says, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_LIMIT else text[:_MESSAGE_LIMIT] + "..."


def _is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a library in Rust: PyO3's exception for that derives from BaseException alone."""
    return type(error).__name__ == "PanicException"
