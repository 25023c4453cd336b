"""What the command line reads: samples from a folder of images or a file of arrays, and their labels.

Samples and labels stay aligned without either knowing the other: images come in the order of `file_order`, and a table of labels with a
column ``file`` is sorted the same way. A limit takes samples from all over that order, because sets are often sorted by class:

    chosen_i = floor(i count / limit),      i = 0 .. limit - 1
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from subbyte.errors import DataError, OptionError
from subbyte.tasks.arrays import ARRAY_SUFFIXES, read_array
from subbyte.tasks.images import IMAGE_SUFFIXES, file_order, image_files, read_images, resize_pictures
from subbyte.tasks.preprocessing import ChannelOrder, Preprocessing

__all__ = ["ChannelOrder", "Preprocessing", "load_labels", "load_samples"]


def load_samples(
    path: str | Path, preprocessing: Preprocessing | None = None, *, limit: int | None = None, key: str | None = None
) -> Tensor:
    """Read samples, ready for the model.

    A folder gives its images, those in folders below it included, in `file_order`; with a size, each is scaled until it covers the size and
    cut to the middle. uint8 arrays (samples, height, width, channels) are treated as the same pictures in RGB or grey. Floating-point
    arrays are taken as they are, and if a preprocessing is given, must have the model's range and channel order already and get its `mean`
    and `std`. Other integers, such as token ids, are taken as they are.

    Args:
        path: folder of .jpg, .jpeg, .png, .bmp or .webp images, or a .npy, .npz or .safetensors file.
        preprocessing: None for pictures means RGB, or as many channels as the array has, in 0..1.
        limit: take so many samples only, evenly spaced; None, or as many as there are and more, takes all.
        key: name of the array in a .npz or .safetensors file; needed if it holds several and none is called ``x``.

    Returns:
        float32 (samples, channels, height, width) of pictures; float32 or int64 (samples, ...) of other arrays; at least one sample.

    Raises:
        DataError: if the path is missing, of an unknown kind, empty or damaged; if pictures differ in size and the preprocessing has none;
            if an array does not fit the preprocessing.
        OptionError: if `limit` is not positive, or if `key` is given for a folder.

    Example:
        >>> load_samples("absent.npy")
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent.npy' does not exist
    """
    path = Path(path)
    if path.is_dir():
        if key is not None:
            raise OptionError(f"'{path}' is a folder of images, which have no key; leave out '{key}'")
        preprocessing = preprocessing or Preprocessing()
        files = image_files(path)
        files = [files[index] for index in _evenly_spaced(len(files), limit).tolist()]
        return preprocessing.apply(read_images(files, len(preprocessing.mean), preprocessing.height_and_width))
    _check_suffix(path, f"a folder of images ({', '.join(IMAGE_SUFFIXES)})", *ARRAY_SUFFIXES)
    array = read_array(path, key, preferred="x")
    if limit is not None:
        array = array[_evenly_spaced(len(array), limit)]
    if array.dtype == torch.uint8:
        return _prepare_pictures(path, array, preprocessing)
    return array if preprocessing is None else _prepare_numbers(path, array, preprocessing)


def load_labels(path: str | Path, key: str | None = None, *, limit: int | None = None) -> Tensor:
    """Read class indices, those and in that order in which `load_samples` gives the samples with the same limit.

    Args:
        path: .npy, .npz or .safetensors file of integers (samples,), or a .csv file whose first row names the columns. A column ``file``,
            path of an image within its folder, sorts the rows by `file_order`; without it they stay in the order of the file.
        key: name of the array, needed if a file holds several and none is called ``y``; or of the column, otherwise ``label``.
        limit: take so many labels only, evenly spaced like the samples.

    Returns:
        int64 (samples,), 0 or above.

    Raises:
        DataError: if the file is missing, of an unknown kind, empty or damaged; if labels are not integers of 0 or above, one a sample; if
            a column is missing or names a file twice.
        OptionError: if `limit` is not positive.

    Example:
        >>> load_labels("absent.csv")
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent.csv' does not exist
    """
    path = Path(path)
    _check_suffix(path, *ARRAY_SUFFIXES, ".csv")
    labels = _read_table(path, key or "label") if path.suffix.lower() == ".csv" else read_array(path, key, preferred="y").cpu()
    if labels.is_floating_point() or labels.ndim != 1:
        raise DataError(f"'{path}' holds {labels.dtype} {tuple(labels.shape)}; labels are integers, one a sample")
    if labels.min() < 0:
        raise DataError(f"'{path}' holds the label {int(labels.min())}; labels are class indices from 0")
    return labels.long()[_evenly_spaced(len(labels), limit)]


def _evenly_spaced(count: int, limit: int | None) -> Tensor:
    if limit is not None and limit < 1:
        raise OptionError(f"limit must be at least 1, not {limit}")
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.arange(limit) * count // limit


def _prepare_pictures(path: Path, array: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
        raise DataError(
            f"'{path}' holds uint8 {tuple(array.shape)}, which is read as pictures (samples, height, width, channels); "
            "put the channels last, or save other numbers as float32 or int64"
        )
    if preprocessing is None:
        channels = array.shape[-1]
        preprocessing = Preprocessing(mean=(0.0,) * channels, std=(1.0,) * channels)
    size = preprocessing.height_and_width
    if size is not None and size != tuple(array.shape[1:3]):
        array = resize_pictures(array, size)
    return preprocessing.apply(array)


def _prepare_numbers(path: Path, array: Tensor, preprocessing: Preprocessing) -> Tensor:
    if not array.is_floating_point():
        raise DataError(f"'{path}' holds {array.dtype}; a preprocessing is for pictures, uint8 or floating point")
    size = preprocessing.height_and_width
    if size is not None and size != tuple(array.shape[2:4]):
        raise DataError(f"'{path}' holds {tuple(array.shape)}; floating-point pictures are not resized to {size}, leave out the size")
    return preprocessing.normalise(array)


def _read_table(path: Path, column: str) -> Tensor:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read '{path}': {error}") from error
    if column not in columns:
        raise DataError(f"'{path}' has no column '{column}'; it has: {', '.join(columns) or 'none'}")
    if not rows:
        raise DataError(f"'{path}' has no rows below the names of its columns")
    if "file" in columns:
        names = [row["file"] or "" for row in rows]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"'{path}' names the file '{twice}' twice")
        rows.sort(key=lambda row: file_order(row["file"] or ""))
    return torch.tensor([_read_label(path, row[column]) for row in rows])


def _read_label(path: Path, text: str | None) -> int:
    try:
        return int(text or "")
    except ValueError as error:
        raise DataError(f"'{path}' holds the label {text!r}; labels are class indices from 0") from error


def _check_suffix(path: Path, *known: str) -> None:
    if not path.exists():
        raise DataError(f"'{path}' does not exist")
    if path.suffix.lower() not in known:
        raise DataError(f"'{path}' is of an unknown kind; expected {', '.join(known)}")
