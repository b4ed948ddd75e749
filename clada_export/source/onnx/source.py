"""An ONNX file with a decoder, or a folder that holds one."""

from __future__ import annotations

from clada_export.errors import BackendError
from clada_export.source.description import digests, folder_tokenizer, license_of
from clada_export.source.model import SourceModel, SourceRequest
from clada_export.source.onnx.files import companions, locate_onnx

_USUAL_NAMES = ("model.onnx", "decoder_model.onnx")


def load_onnx(request: SourceRequest) -> SourceModel:
    """The model of an ONNX file.

    Raises:
        UsageError, UnsupportedModelError, VerificationError: see `clada_export.source.onnx.load.load_decoder`.
        BackendError: ONNX Runtime is missing.
    """
    path = locate_onnx(request.path)
    request.refuse_revision(str(path), "file")
    try:
        from clada_export.source.onnx.load import load_decoder, weight_files_of
    except ImportError as error:
        raise BackendError("an ONNX model as source needs ONNX Runtime: pip install 'clada-export[ort]'") from error
    decoder, folder = load_decoder(path), companions(path)
    # A file is called by what its folder is called, where it has the name that every exporter gives it.
    name = folder.resolve().name if path.name in _USUAL_NAMES else path.stem
    warnings: list[str] = []
    return SourceModel(
        decoder=decoder,
        tokenizer=folder_tokenizer(folder, name, warnings),
        name=name,
        revision=None,
        kind="onnx",
        path=folder,
        files=digests(folder, weight_files_of(path)),
        weights_digest=decoder.weights_digest(),
        license=license_of(folder, decoder.config, warnings),
        source_dtype="float32",
        warnings=warnings,
        graph=path,
    )
