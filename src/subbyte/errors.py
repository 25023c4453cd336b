"""The one family of errors: every error that subbyte raises on purpose is a `SubbyteError` and says what to do about it.

SubbyteError
  OptionError       an argument or command-line option that cannot be served
    InfeasibleError ... because no allocation is within a limit; it says what the nearest value is
  ModelError        a model that cannot be quantized as it is
    LayerError      ... because of one layer, which `layer` names
  DataError         calibration data that the model or the method cannot use
  FileError         a file that cannot be read, is damaged, or cannot be written
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SubbyteError(Exception):
    """Base of every error that subbyte raises on purpose; its text names the cause and the remedy.

    Example:
        >>> issubclass(DataError, SubbyteError)
        True
    """


class OptionError(SubbyteError, ValueError):
    """An argument or option is outside what subbyte can do.

    Example:
        >>> import subbyte
        >>> subbyte.Widths(weight_bits=9)
        Traceback (most recent call last):
        subbyte.errors.OptionError: weight_bits: a grid has 2 to 8 bits, not 9
    """


class InfeasibleError(OptionError):
    """No allocation of widths is within a limit, or none was found whose measured degradation is.

    `limit` is the binding limit's name, `wanted` its value, `nearest` the nearest value that can be had, `where` what else it depends on;
    None where there is no such number.

    Example:
        >>> InfeasibleError("bytes", 1000, 1234.0).nearest
        1234.0
    """

    def __init__(self, limit: str, wanted: float | None, nearest: float | None, where: str = "") -> None:
        beside = f" {where}" if where else ""
        if wanted is None or nearest is None:
            text = f"no allocation is within the limits on {limit} together; raise one of them"
        else:
            text = f"no allocation has {limit} within {wanted:.6g}{beside}; the least is {nearest:.6g}"
        super().__init__(text)
        self.limit, self.wanted, self.nearest, self.where = limit, wanted, nearest, where


class ModelError(SubbyteError):
    """The model cannot be quantized as it is.

    Example:
        >>> import subbyte, torch
        >>> subbyte.quantize(torch.nn.Linear(1, 1), torch.zeros(2, 1))
        Traceback (most recent call last):
        subbyte.errors.ModelError: 'Linear' is in training mode; call model.eval() first
    """


class LayerError(ModelError):
    """One layer is at fault.

    `layer` is its qualified name in the model, str.

    Example:
        >>> LayerError("conv1", "holds NaN").layer
        'conv1'
    """

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(f"layer '{layer}': {message}")
        self.layer = layer


class DataError(SubbyteError, ValueError):
    """The calibration data cannot be used.

    Example:
        >>> import subbyte, torch
        >>> subbyte.quantize(torch.nn.Linear(1, 1).eval(), [])
        Traceback (most recent call last):
        subbyte.errors.DataError: the calibration set is empty; a few hundred unlabeled samples are wanted, one is the least
    """


class FileError(SubbyteError, OSError):
    """A file cannot be read, is damaged, belongs to something else, or cannot be written.

    Example:
        >>> import subbyte, torch
        >>> subbyte.load("missing.safetensors", into=torch.nn.Linear(1, 1))
        Traceback (most recent call last):
        subbyte.errors.FileError: cannot read 'missing.safetensors': there is no such file
    """


@contextmanager
def naming_layer(layer: str, shapes: str = "") -> Iterator[None]:
    """Re-raise whatever fails inside the block as a `LayerError` that names the layer and its shapes.

    Args:
        layer: qualified name of the layer in the model.
        shapes: what to say about the tensors at hand, for example ``"input (8, 3, 32, 32)"``.

    Raises:
        LayerError: for any exception of the block that is not a `SubbyteError` already.

    Example:
        >>> with naming_layer("conv1"):
        ...     raise RuntimeError("singular matrix")
        Traceback (most recent call last):
        subbyte.errors.LayerError: layer 'conv1': singular matrix
    """
    try:
        yield
    except SubbyteError:
        raise
    except Exception as error:  # noqa: BLE001 - the one broad except: it only adds the layer's name
        detail = f"{error} ({shapes})" if shapes else str(error)
        raise LayerError(layer, detail) from error
