"""The bank: what a run has found, kept on disk so that a stopped run goes on where it was and another budget starts from it.

An entry is a file of its own, written under a temporary name and then renamed: a process that is killed loses the entry that it was
working on, and nothing else. Its name is a digest of everything that the entry depends on, so that a stale entry is never read.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save as serialize
from torch import Tensor

from subbyte.errors import FileError
from subbyte.run.files import write_file

ENTRIES = "bank"
_PROCESS = secrets.token_hex(8)  # joins digests of objects whose repr is an address: another process must not take them for its own


@dataclass(frozen=True, eq=False)
class Entry:
    """Something worth keeping.

    Args:
        tensors: by name, any dtype and shape.
        facts: numbers and texts that JSON can hold.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Bank:
    """Entries by key: in memory, and in a folder if one is given.

    Args:
        folder: of the run; None keeps everything in memory only.

    Example:
        >>> bank = Bank()
        >>> bank.put(digest("conv1", 4), Entry(facts={"error": 0.5}))
        >>> bank.get(digest("conv1", 4)).facts["error"], bank.get(digest("conv1", 3))
        (0.5, None)
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.run_folder = None if folder is None else Path(folder)
        self.folder = None if folder is None else Path(folder) / ENTRIES
        self._known: dict[str, Entry] = {}

    def get(self, key: str) -> Entry | None:
        """The entry of a key, or None.

        Args:
            key: a digest.

        Raises:
            FileError: if its file cannot be read or is damaged.
        """
        if key not in self._known and self.folder is not None and (path := self._path(key)).is_file():
            self._known[key] = _read(path)
        return self._known.get(key)

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry.

        Args:
            key: a digest of all that it depends on.
            entry: its tensors are not changed by anyone later.

        Raises:
            FileError: if it cannot be written.
        """
        self._known[key] = entry
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FileError(f"cannot write into '{self.folder}': {error.strerror or error}; choose another run folder") from error
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
            write_file(self._path(key), serialize(tensors, {"facts": json.dumps(dict(entry.facts))}))

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def digest(*parts: object) -> str:
    """A key: 32 hexadecimal digits that depend on all parts.

    Args:
        parts: tensors of any shape and dtype, whose numbers count; tuples, lists and mappings of such; of anything else what `repr` says.

    Example:
        >>> digest("a", 1) == digest("a", 1) != digest("a", 2)
        True
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, parts)
    return state.hexdigest()


def _feed(state: Any, part: object) -> None:
    if isinstance(part, Tensor):
        state.update(f"tensor {part.dtype} {tuple(part.shape)} ".encode())
        state.update(part.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    elif isinstance(part, Mapping):
        state.update(b"{")
        for key, value in part.items():
            _feed(state, key)
            _feed(state, value)
        state.update(b"}")
    elif isinstance(part, tuple | list):
        state.update(b"(")
        for item in part:
            _feed(state, item)
        state.update(b")")
    else:
        text = repr(part)
        state.update(f"{text};{_PROCESS if ' at 0x' in text else ''}".encode())


def _read(path: Path) -> Entry:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            facts = json.loads((file.metadata() or {})["facts"])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise FileError(f"'{path}' is damaged ({error}); remove it, and what it held is computed again") from error
    return Entry(tensors, facts)
