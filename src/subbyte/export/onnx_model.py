"""An ONNX file as a PyTorch module, so that whatever scores a model scores the file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from subbyte.errors import FileError
from subbyte.export.targets import OnnxRuntimeCPU, Target
from subbyte.export.verify import as_arrays


class OnnxModel(nn.Module):
    """Computes in a runtime; takes the file's inputs in their order as positional arguments, or in any order by their names.

    Args:
        path: of the file.
        target: whose runtime runs it.
        threads: processor threads; None takes those of torch.

    Raises:
        FileError: if the file cannot be read, or the runtime refuses it.
        OptionError: if the runtime is not installed.

    Example:
        >>> OnnxModel("missing.onnx")
        Traceback (most recent call last):
        subbyte.errors.FileError: cannot read 'missing.onnx': No such file or directory
    """

    def __init__(self, path: str | os.PathLike[str], target: Target = OnnxRuntimeCPU(), threads: int | None = None) -> None:  # noqa: B008
        super().__init__()
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise FileError(f"cannot read '{path}': {error.strerror}") from error
        self.run = target.open(content, optimized=True, threads=threads or torch.get_num_threads())
        from subbyte.export.runtimes import input_names  # needs packages that `import subbyte` does not

        self.names = input_names(content)
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        """The file's output, any shape, or a tuple of its outputs.

        Args:
            args: what the model takes.
            kwargs: what the model takes.
        """
        given = as_arrays(args) if args else as_arrays(kwargs, self.names)
        outputs = tuple(torch.from_numpy(output) for output in self.run(given))
        return outputs[0] if len(outputs) == 1 else outputs
