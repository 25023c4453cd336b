"""From `FILE.py:callable`, `package.module:callable` or `hf:FOLDER` to a model. A model file is code that the user chose to run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch import nn

from subbyte.errors import ModelError, OptionError
from subbyte.export.pretrained import open_pretrained, transformers

__all__ = ["HUB", "opened_model"]

HUB = "hf:"
FILE_MODULE = "subbyte_model_file"  # a name of its own: the user's file may be called like a module that is imported already


@contextlib.contextmanager
def opened_model(source: str) -> Iterator[nn.Module]:
    """The model that a source names, in evaluation mode.

    While the context is open, the model's code can import what lies beside its file (or, for a module, in the current folder), and what it
    prints goes to stderr.

    Args:
        source: ``FILE.py:NAME`` or ``package.module:NAME``; NAME is a function or class that gives an nn.Module when it is called without
            arguments, or an nn.Module. Or ``hf:`` and a folder or name of the transformers library.

    Returns:
        A context manager that gives the model.

    Raises:
        OptionError: if the source has not this form.
        ModelError: if there is no such file, module or name, if it needs arguments, raises, or gives no nn.Module.

    Example:
        >>> with opened_model("torch.nn:Identity") as model:
        ...     opened = model
        >>> opened, opened.training
        (Identity(), False)
    """
    if source.startswith(HUB):
        transformers().utils.logging.disable_progress_bar()  # there is one of our own
        yield open_pretrained(source.removeprefix(HUB))
        return
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise OptionError(
            f"'{source}' names no model; write FILE.py:NAME or package.module:NAME, NAME being a function that returns it, or hf:FOLDER"
        )
    is_file = place.endswith(".py")
    folder = Path(place).resolve().parent if is_file else Path.cwd()
    path = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            with _naming_the_users_line(source, folder):
                model = _built(_loaded_file(Path(place)) if is_file else _imported(place), name, source)
                model.eval()
            yield model
    finally:
        sys.path[:] = path


def _loaded_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ModelError(f"there is no file '{file}'; name the Python file that builds the model")
    spec = importlib.util.spec_from_file_location(FILE_MODULE, file)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE_MODULE] = module  # where dataclasses and pickling look classes up
    spec.loader.exec_module(module)
    return module


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ModelError(f"there is no module '{error.name}'; a file is named with its ending, FILE.py:NAME") from error
        raise


def _built(module: ModuleType, name: str, source: str) -> nn.Module:
    build = getattr(module, name, None)
    if build is None:
        own = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        raise ModelError(f"'{source}': there is no '{name}' there; functions and classes found: {', '.join(own) or 'none'}")
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise ModelError(f"'{source}' is a {type(build).__name__}; name a function that returns the model")
    needed = _needed_arguments(build)
    if needed:
        raise ModelError(
            f"'{source}' needs arguments ({', '.join(needed)}); name a function that returns the model when called without any"
        )
    model = build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"'{source}' returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _needed_arguments(build: object) -> list[str]:
    try:
        parameters = inspect.signature(build).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):  # what is written in C tells nothing
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty and parameter.kind not in variable]


@contextlib.contextmanager
def _naming_the_users_line(source: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (ModelError, OptionError):
        raise
    except SystemExit as error:
        raise ModelError(
            f"'{source}' ended the program{_line(error, folder)}; put what runs as a script under `if __name__ == ...`"
        ) from error
    except Exception as error:  # noqa: BLE001 - adds the line at which the user's code failed
        said = error.msg if isinstance(error, SyntaxError) else error  # which would name the line itself
        raise ModelError(f"'{source}' raised {type(error).__name__}: {said}{_line(error, folder)}") from error


def _line(error: BaseException, folder: Path) -> str:
    """Where in the user's own code an error arose, as far as that can be told."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "site-packages" not in frame.filename and Path(frame.filename).is_relative_to(folder)
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
