"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from subbyte.errors import FileError


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name beside it, then renamed.

    Args:
        path: of the file; one that exists is replaced.
        content: of the file.

    Raises:
        FileError: if the folder does not exist or cannot be written.
    """
    path = Path(path)
    temporary = ""
    try:
        if path.is_dir():
            raise IsADirectoryError(f"'{path}' is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"cannot write '{path}': {reason}; choose a path in a folder that exists and can be written") from error
    finally:
        if temporary:
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
