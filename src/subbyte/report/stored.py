"""A summary as JSON, and back: in a run folder, so that a report can be written later, and inside the report itself.

JSON has no NaN and no infinity: they become the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subbyte.errors import FileError
from subbyte.export.onnx import Exported
from subbyte.report.summary import FileReport, Summary
from subbyte.run.files import write_file

SUMMARY_FILE = "summary.json"
_ODD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def save_summary(folder: Path, summary: Summary) -> None:
    """Write a summary into a run folder, whole or not at all.

    Args:
        folder: of the run; is made if it is not there.
        summary: of the run.

    Raises:
        FileError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder '{folder}': {error.strerror or error}; choose another run folder") from error
    write_file(folder / SUMMARY_FILE, json.dumps(as_data(summary), allow_nan=False, indent=1).encode())


def load_summary(folder: Path) -> Summary:
    """The summary of the last run that ended in a run folder.

    Args:
        folder: of the run.

    Raises:
        FileError: if it holds none, or a damaged one.

    Example:
        >>> load_summary(Path("missing"))
        Traceback (most recent call last):
        subbyte.errors.FileError: 'missing' holds no 'summary.json'; 'subbyte quantize ... --out missing/' makes one when it is done
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise FileError(f"'{folder}' holds no '{SUMMARY_FILE}'; 'subbyte quantize ... --out {folder}/' makes one when it is done")
    try:
        found: Summary = from_data(Summary, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"'{path}' is damaged or of another version ({error!r}); remove it and quantize again, from the bank") from error
    return found


def keep_export(packed: Path, exported: Exported) -> None:
    """Note an ONNX file in the summary of the run that its packed file is from, in place of one of the same name.

    Args:
        packed: file of a run folder; of one in another folder, or of another run, nothing is noted.
        exported: what `export_onnx` returned for it.

    Raises:
        FileError: if the folder's summary is damaged, or cannot be written.
    """
    if not (packed.parent / SUMMARY_FILE).is_file():
        return
    summary, made = load_summary(packed.parent), FileReport.of(exported)
    if packed.stat().st_size == summary.size_bytes:
        others = tuple(file for file in summary.files if file.name != made.name)
        save_summary(packed.parent, dataclasses.replace(summary, files=(*others, made)))


def as_data(value: Any, digits: int | None = None) -> Any:
    """A value of frozen dataclasses, tuples, mappings, numbers and texts as JSON knows it.

    Args:
        value: to be written.
        digits: of every number that is not whole; None: all of them.

    Example:
        >>> from subbyte.report.planned import Point
        >>> as_data((Point(100, 2.5, math.inf), None))
        [{'size_bytes': 100, 'average_bits': 2.5, 'predicted': 'Infinity'}, None]
    """
    if dataclasses.is_dataclass(value):
        return {field.name: as_data(getattr(value, field.name), digits) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_data(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def from_data(kind: Any, data: Any) -> Any:
    """The inverse of `as_data`.

    Args:
        kind: type that is expected: a frozen dataclass, a tuple of any length, a mapping from texts, a number, a text, or any of these or
            None.
        data: as JSON gives it.

    Raises:
        TypeError: if the data is something else.
        KeyError: if a field is missing.

    Example:
        >>> from subbyte.report.planned import Point
        >>> from_data(tuple[Point, ...], [{"size_bytes": 100, "average_bits": 2.5, "predicted": "Infinity"}])
        (Point(size_bytes=100, average_bits=2.5, predicted=inf),)
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else from_data(next(one for one in inside if one is not type(None)), data)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: from_data(hints[field.name], data[field.name]) for field in dataclasses.fields(kind)})  # type: ignore[operator]
    if origin is tuple and isinstance(data, list):
        return tuple(from_data(inside[0], item) for item in data)
    if origin is Mapping and isinstance(data, dict):
        return {str(key): from_data(inside[1], item) for key, item in data.items()}
    if kind is float and not isinstance(data, bool):
        return _ODD[data] if isinstance(data, str) else float(data)
    if kind in (int, str, bool) and type(data) is kind:
        return data
    raise TypeError(f"expected {kind}, found {type(data).__name__}")
