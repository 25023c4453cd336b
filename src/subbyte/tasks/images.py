"""Pictures from files, by pillow, which is imported only when a picture is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from subbyte.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "file_order", "image_files", "open_image", "read_images", "resize_and_crop", "resize_pictures"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MODES = {1: "L", 3: "RGB"}  # by number of channels


def file_order(name: str) -> tuple[str, str]:
    """Sort key of a file's name: capitals do not count, unless two names differ in nothing else.

    Args:
        name: path within the folder, parts joined by ``/``.

    Returns:
        A pair to compare by.

    Example:
        >>> sorted(["b.png", "C.png", "A.png"], key=file_order)
        ['A.png', 'b.png', 'C.png']
    """
    return name.casefold(), name


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and the folders below it, in `file_order` of their paths within it; hidden files do not count.

    Args:
        folder: where to look for files whose name ends in one of `IMAGE_SUFFIXES`, in capitals or not.

    Returns:
        At least one path.

    Raises:
        DataError: if there is no image.

    Example:
        >>> image_files(Path("absent"))
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent' holds no images; expected files ending in .jpg, .jpeg, .png, .bmp, .webp
    """
    named = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    }
    if not named:
        raise DataError(f"'{folder}' holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return [named[name] for name in sorted(named, key=file_order)]


def open_image(path: Path, channels: int) -> Image.Image:
    """Decode one picture.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey; what the file holds is converted.

    Returns:
        The picture, its mode "RGB" or "L".

    Raises:
        DataError: if pillow is not installed, if the file cannot be decoded, if it has more than 8 bits a channel, or for another
            `channels`.

    Example:
        >>> open_image(Path("absent.png"), 3)
        Traceback (most recent call last):
        subbyte.errors.DataError: cannot read the image 'absent.png': ...
    """
    if channels not in MODES:
        raise DataError(f"pictures have 1 or 3 channels, but mean and std have {channels} numbers")
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # pillow would cut these off at 255 instead of scaling them
                raise DataError(f"the image '{path}' has more than 8 bits a channel; save it with 8")
            # via RGBA where colours of a palette are transparent: pillow warns otherwise
            opaque: Image.Image = (image.convert("RGBA") if "transparency" in image.info else image).convert(MODES[channels])
            return opaque
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError) as error:  # pillow's, by format
        raise DataError(f"cannot read the image '{path}': {error}; remove or replace it") from error


def resize_and_crop(image: Image.Image, height_and_width: tuple[int, int]) -> Image.Image:
    """Scale a picture, its sides in proportion, until it just covers a size, and keep the middle.

    Args:
        image: the picture.
        height_and_width: pixels of the result, positive.

    Returns:
        The picture at that size; bilinear, averaged where it shrinks.

    Example:
        >>> from PIL import Image
        >>> resize_and_crop(Image.new("RGB", (40, 20)), (10, 10)).size
        (10, 10)
    """
    height, width = height_and_width
    if image.size == (width, height):
        return image
    factor = max(height / image.height, width / image.width)
    scaled_width, scaled_height = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    scaled = image.resize((scaled_width, scaled_height), resample=_pillow().Resampling.BILINEAR)
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def read_images(files: Sequence[Path], channels: int, height_and_width: tuple[int, int] | None) -> Tensor:
    """Decode pictures into one tensor.

    Args:
        files: at least one.
        channels: 3 for RGB, 1 for grey.
        height_and_width: pixels to resize and crop to; None if all the pictures have one size.

    Returns:
        uint8 (files, height, width, channels).

    Raises:
        DataError: if a file cannot be decoded, or if `height_and_width` is None and two pictures differ in size.

    Example:
        >>> read_images([Path("absent.png")], 3, None)
        Traceback (most recent call last):
        subbyte.errors.DataError: cannot read the image 'absent.png': ...
    """
    pictures = []
    first_size = None
    for path in files:
        image = open_image(path, channels)
        if height_and_width is not None:
            image = resize_and_crop(image, height_and_width)
        first_size = first_size or image.size
        if image.size != first_size:
            raise DataError(
                f"'{files[0]}' has {first_size[0]}x{first_size[1]} pixels, but '{path}' has {image.width}x{image.height}; "
                "give a size to resize and crop all of them to"
            )
        pictures.append(torch.from_numpy(np.array(image)).view(image.height, image.width, channels))
    return torch.stack(pictures)


def resize_pictures(pictures: Tensor, height_and_width: tuple[int, int]) -> Tensor:
    """`resize_and_crop` for pictures that are decoded already.

    Args:
        pictures: uint8 (samples, height, width, channels), 1, 3 or 4 channels.
        height_and_width: pixels of the result, positive.

    Returns:
        uint8 (samples, *height_and_width, channels).

    Raises:
        DataError: if pillow is not installed.

    Example:
        >>> resize_pictures(torch.zeros(2, 40, 20, 3, dtype=torch.uint8), (10, 10)).shape
        torch.Size([2, 10, 10, 3])
    """
    pillow = _pillow()
    size = (*height_and_width, pictures.shape[-1])
    resized = (resize_and_crop(pillow.fromarray(picture.squeeze(-1).numpy()), height_and_width) for picture in pictures)
    return torch.stack([torch.from_numpy(np.array(image)).view(size) for image in resized])


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError('reading pictures needs pillow, which is not installed; run: pip install "subbyte[images]"') from error
    return Image
