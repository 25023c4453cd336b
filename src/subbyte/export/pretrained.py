"""Models of the transformers library: from a folder or a hub's name to a module, and back into a folder.

A folder that `save_pretrained` writes holds what the library's own folders hold, the weights aside:

    config.json, tokenizer.json, ...    as the library writes them
    model.subbyte.safetensors           the packed file
    modules.json                        of a sentence encoder: how token vectors are pooled

so that the library's `AutoConfig` and `AutoTokenizer` read it, and `load_pretrained` gives the quantized model. No code comes out of a
folder: the class is one of the library's own.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from subbyte.errors import FileError, ModelError, OptionError
from subbyte.export.loading import load
from subbyte.model.sentence_encoder import SentenceEncoder
from subbyte.run.files import write_file

PACKED_NAME = "model.subbyte.safetensors"
MODULES = "modules.json"
NORMALIZE = "sentence_transformers.models.Normalize"
POOLING = "sentence_transformers.models.Pooling"


def transformers() -> ModuleType:
    """The library.

    Raises:
        OptionError: if it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise OptionError(f"text models need transformers: pip install 'subbyte[hf]' ({error})") from error


def open_pretrained(source: str | os.PathLike[str]) -> nn.Module:
    """A trained model in float32 and evaluation mode, with the head that its configuration names; pooling behind it, if its folder says so.

    Attention is computed in its eager form, whose products can be quantized, and nothing is cached between forwards.

    Args:
        source: folder, or name on the library's hub.

    Raises:
        OptionError: if transformers is not installed.
        ModelError: if there is no such model, or the library cannot build it.
    """
    library, source = transformers(), os.fspath(source)
    try:
        config = library.AutoConfig.from_pretrained(source)
        kind = _class_of(library, config)
        model: nn.Module = kind.from_pretrained(source, config=_settled(config), dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"transformers cannot open '{source}': {error}") from error
    return _pooled(model, Path(source)).eval()


def open_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model.

    Args:
        source: folder, or name on the library's hub.

    Raises:
        OptionError: if transformers is not installed.
        ModelError: if there is none.
    """
    try:
        return transformers().AutoTokenizer.from_pretrained(os.fspath(source))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"transformers finds no tokenizer in '{source}': {error}") from error


def is_causal(model: nn.Module) -> bool:
    """Whether a model predicts the next token from those before it.

    Args:
        model: any module.
    """
    if not type(model).__module__.startswith("transformers."):
        return False
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return type(model).__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def save_pretrained(model: nn.Module, content: bytes, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write configuration, tokenizer and packed file into a folder.

    Args:
        model: quantized model of the library, or a `SentenceEncoder` around one.
        content: of the packed file.
        folder: is made where it does not exist; files in it that have the same names are replaced.
        tokenizer: of the library, or None.

    Raises:
        ModelError: if the model has no configuration of the library.
        FileError: if something cannot be written.
    """
    config, place = getattr(model, "config", None), Path(folder)
    if not callable(getattr(config, "save_pretrained", None)):
        raise ModelError(f"{type(model).__name__} is no model of transformers; save(path) writes the packed file of any model")
    try:
        place.mkdir(parents=True, exist_ok=True)
        inner = model.encoder if isinstance(model, SentenceEncoder) else model
        config.architectures = [type(inner).__name__]  # type: ignore[union-attr]
        config.save_pretrained(place)  # type: ignore[union-attr]
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
    except OSError as error:
        raise FileError(f"cannot write into '{place}': {error.strerror or error}") from error
    if isinstance(model, SentenceEncoder):
        _write_pooling(model, place)
    write_file(place / PACKED_NAME, content)


def load_pretrained(folder: str | os.PathLike[str]) -> nn.Module:
    """The quantized model of a folder that `save_pretrained` wrote; its outputs are bit-identical to `Result.model`'s.

    Args:
        folder: of the model.

    Raises:
        OptionError: if transformers is not installed.
        FileError: if the folder or its packed file is missing, damaged, or of another model.

    Example:
        >>> load_pretrained("missing")
        Traceback (most recent call last):
        subbyte.errors.FileError: 'missing' holds no 'model.subbyte.safetensors'; Result.save_pretrained writes such a folder
    """
    place = Path(folder)
    if not (place / PACKED_NAME).is_file():
        raise FileError(f"'{place}' holds no '{PACKED_NAME}'; Result.save_pretrained writes such a folder")
    library = transformers()
    try:
        config = library.AutoConfig.from_pretrained(place)
        model = _class_of(library, config)._from_config(_settled(config), dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FileError(f"transformers cannot build the model that '{place}' describes: {error}") from error
    return load(place / PACKED_NAME, into=_pooled(model, place).eval())


def _class_of(library: ModuleType, config: Any) -> Any:
    """The library's class that a configuration names; its plain model where it names none."""
    for name in config.architectures or ():
        kind = getattr(library, name, None)
        if kind is not None:
            return kind
    return library.AutoModel if not config.architectures else _unknown(config.architectures[0])


def _unknown(name: str) -> Any:
    raise ValueError(f"it has no class '{name}' of its own, and code from a model's folder is never run")


def _settled(config: Any) -> Any:
    """A configuration under which forwards neither keep a cache nor return one."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def _pooled(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the pooling that a sentence encoder's folder describes."""
    file = folder / MODULES
    if not file.is_file():
        return model
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        kinds = [module["type"] for module in modules]
        place = next((folder / module["path"] for module in modules if module["type"] == POOLING), None)
        pooling = {} if place is None else json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"'{file}' or the pooling that it names is damaged ({error!r})") from error
    modes = {name for name, used in pooling.items() if name.startswith("pooling_mode") and used}
    if not modes <= {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} or len(modes) != 1 or len(kinds) > 3:
        raise ModelError(f"'{folder}' pools by {sorted(modes)} in {len(kinds)} modules; the mean or the first token is supported")
    return SentenceEncoder(model, first_token="pooling_mode_cls_token" in modes, normalize=NORMALIZE in kinds)


def _write_pooling(model: SentenceEncoder, folder: Path) -> None:
    kinds = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", POOLING)] + [("2_Normalize", NORMALIZE)] * model.normalize
    modules = [{"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in enumerate(kinds)]
    pooling = {
        "word_embedding_dimension": model.config.hidden_size,
        "pooling_mode_cls_token": model.first_token,
        "pooling_mode_mean_tokens": not model.first_token,
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_file(folder / "1_Pooling" / "config.json", json.dumps(pooling, indent=1).encode())
    write_file(folder / MODULES, json.dumps(modules, indent=1).encode())
