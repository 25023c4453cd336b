"""One array from a .npy, .npz or .safetensors file; nothing is ever unpickled."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subbyte.errors import DataError

__all__ = ["ARRAY_SUFFIXES", "read_array"]

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")
_DAMAGED_NUMPY = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)  # as numpy raises them


def read_array(path: Path, key: str | None, preferred: str) -> Tensor:
    """Read one array of numbers.

    Args:
        path: file ending in one of `ARRAY_SUFFIXES`.
        key: name of the array in a file of several; None takes the only one, or the one called `preferred`.
        preferred: the name to take where there are several and `key` is None.

    Returns:
        Tensor of the array's shape, at least one dimension and one number: uint8 as it is, other integers as int64, floating point as
        float32.

    Raises:
        DataError: if the file is missing, damaged, or holds Python objects; if `key` is not in it, or is needed; if the array is empty, a
            single number, neither integer nor floating point, or holds NaN or infinity.

    Example:
        >>> read_array(Path("absent.npz"), key=None, preferred="x")
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent.npz' does not exist
    """
    if not path.is_file():
        raise DataError(f"'{path}' does not exist")
    tensor = _read_safetensors(path, key, preferred) if path.suffix.lower() == ".safetensors" else _read_numpy(path, key, preferred)
    if tensor.ndim == 0:
        raise DataError(f"'{path}' holds a single number; the first dimension must count the samples")
    if tensor.numel() == 0:
        raise DataError(f"'{path}' holds an empty array of shape {tuple(tensor.shape)}")
    if tensor.is_floating_point():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise DataError(f"'{path}' holds {bad} numbers that are NaN, infinite, or too large for float32; remove those samples")
    return tensor


def _read_numpy(path: Path, key: str | None, preferred: str) -> Tensor:
    try:
        with path.open("rb") as file:  # opened here because numpy leaves a damaged archive open
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                return _from_numpy(path, loaded[_choose(path, loaded.files, key, preferred)])
    except DataError:
        raise
    except _DAMAGED_NUMPY as error:
        raise DataError(
            f"cannot read '{path}': {error} (the file is damaged, or holds Python objects; save plain numbers with numpy.save)"
        ) from error
    if key is not None:
        raise DataError(f"'{path}' holds one array without a name; leave out the key '{key}'")
    return _from_numpy(path, loaded)


def _from_numpy(path: Path, array: npt.NDArray[np.generic]) -> Tensor:
    match array.dtype.kind:
        case "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused as such
                return torch.from_numpy(array.astype(np.float32))
        case "u" if array.dtype.itemsize == 1:
            return torch.from_numpy(array.astype(np.uint8))
        case "i" | "u":
            return torch.from_numpy(array.astype(np.int64))
        case _:
            raise DataError(f"'{path}' holds {array.dtype}; expected floating point, integers, or uint8 pictures")


def _read_safetensors(path: Path, key: str | None, preferred: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(_choose(path, file.keys(), key, preferred))
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read '{path}': {error} (the file is damaged)") from error
    if tensor.is_floating_point():
        return tensor.float()
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise DataError(f"'{path}' holds {tensor.dtype}; expected floating point, integers, or uint8 pictures")
    return tensor if tensor.dtype == torch.uint8 else tensor.long()


def _choose(path: Path, names: Collection[str], key: str | None, preferred: str) -> str:
    listed = ", ".join(sorted(names)) or "none"
    if key is not None:
        if key not in names:
            raise DataError(f"'{path}' holds no array '{key}'; it holds: {listed}")
        return key
    if len(names) == 1:
        return next(iter(names))
    if preferred in names:
        return preferred
    raise DataError(f"'{path}' holds several arrays or none; choose one with a key out of: {listed}")
