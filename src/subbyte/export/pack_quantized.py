"""Models whose quantized layers are linear, in the layout "pack-quantized" of compressed-tensors, which transformers and vLLM read.

A folder with `config.json`, whose `quantization_config` says which layers have how many bits, and `model.safetensors`:

    NAME.weight_packed      int32 (O, ceil(n b / 32))   stored codes of a row: code i in bits i b to i b + b - 1, lowest first
    NAME.weight_scale       float32 (O, K)              K column groups, one without them
    NAME.weight_shape       int64 (2,)                  O, n
    NAME.weight_zero_point  int32 (ceil(O b / 32), K)   of affine weights, packed likewise along the channels
    NAME.bias               float32 (O,)                where the float layer has one

and everything else under its own name. Stored codes are those of the packed file. At 2, 4 and 8 bits no code crosses a word, as older
readers expect it; at 3, 5, 6 and 7 they do, as compressed-tensors 0.20 reads and writes them.

Source:
    compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from subbyte.calibrate.whole import Judge
from subbyte.errors import FileError, LayerError, ModelError
from subbyte.export.bits import pack
from subbyte.export.onnx import Exportable
from subbyte.export.packed import PREFIX, pack_model
from subbyte.model.attention import products_of
from subbyte.model.fold import Fold
from subbyte.model.operators import Linear
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.model.replace import copy_of
from subbyte.quantizers.grid import Grid
from subbyte.run.files import write_file

TENSORS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


@dataclass(frozen=True)
class CompressedTensors:
    """A folder that was written, and what was measured.

    Args:
        folder: where it is.
        size_bytes: of `model.safetensors`.
        without_bias: layers whose bias had to go, because the float model's have none.
        with_zero_points: layers whose weights have zero-points. The layout holds them, but transformers 5.23 does not read them from it,
            nor from files that the compressed-tensors package (0.20) wrote itself.
        loss_name: what the losses measure.
        loss: of what was written, on held-out samples, from the float model.
        model_loss: of the quantized model with all its biases, likewise.

    Example:
        >>> CompressedTensors(Path("folder"), 1000, (), (), "KLDivergence", 0.1, 0.1).size_bytes
        1000
    """

    folder: Path
    size_bytes: int
    without_bias: tuple[str, ...]
    with_zero_points: tuple[str, ...]
    loss_name: str
    loss: float
    model_loss: float

    def __str__(self) -> str:
        """The figures in lines."""
        lines = [f"{self.folder}: {self.size_bytes:,} bytes"]
        if self.without_bias:
            lines.append(f"without the biases that calibration gave to {', '.join(self.without_bias)}: the float model has none there")
        if self.with_zero_points:
            lines.append(
                f"weights of {', '.join(self.with_zero_points)} have zero-points, which transformers does not read from this layout: "
                "quantize with symmetric_weights=True (--symmetric) for it"
            )
        losses = f"{self.loss:.4g}, with all biases {self.model_loss:.4g}"
        return "\n".join([*lines, f"{self.loss_name} from the float model on held-out samples: {losses}"])


def export_compressed_tensors(models: Exportable, folder: str | os.PathLike[str], folds: Sequence[Fold]) -> CompressedTensors:
    """Write a model whose quantized layers are linear.

    Args:
        models: what to export.
        folder: is made if it is not there; its `config.json` and `model.safetensors` are replaced.
        folds: batch norms that were folded.

    Raises:
        ModelError: if nothing is quantized, batch norms were folded, or products of attention are quantized.
        LayerError: if a layer is no linear layer, or has a quantized input.
        FileError: if the folder cannot be written.
    """
    if folds:
        raise ModelError("batch norms were folded, for which compressed-tensors has no place; quantize with Recipe(fold_batch_norms=False)")
    if products_of(models.quantized):
        raise ModelError("products of attention are quantized, for which compressed-tensors has no place; quantize without them")
    model = copy_of(models.quantized)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer) and module.is_quantized}
    others = {name: tensor for name, tensor in pack_model(model, "", ()).tensors.items() if not name.startswith(PREFIX)}
    gone, tensors = [], _each_once(model, others)
    for name, layer in layers.items():
        has_bias = isinstance(models.original.get_submodule(name).bias, Tensor)
        tensors |= {f"{name}.{part}": tensor for part, tensor in _tensors(name, layer, has_bias=has_bias).items()}
        if not has_bias and layer.bias is not None and bool(layer.bias.any()):
            gone.append(name)
            layer.bias = torch.zeros_like(layer.bias)
    content = serialize(tensors, {"format": "pt"})
    path = Path(folder)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder '{path}': {error.strerror or error}") from error
    write_file(path / TENSORS_FILE, content)
    write_file(path / CONFIG_FILE, json.dumps(_config(model, layers), indent=2, default=str).encode())
    judge = Judge.of(models.original, models.calibration, models.loss)
    losses = judge.loss_of(model), judge.loss_of(models.quantized)
    affine = tuple(name for name, layer in layers.items() if not layer.state().weight_grid.symmetric)
    return CompressedTensors(path, len(content), tuple(gone), affine, type(models.loss).__name__, *losses)


def _tensors(name: str, layer: QuantizedLayer, *, has_bias: bool) -> dict[str, Tensor]:
    state = layer.state()
    if not isinstance(layer.operator, Linear) or layer.operator.transposed:
        raise LayerError(name, "is no torch.nn.Linear, and this layout packs no others; exclude it")
    if state.activation is not None:
        raise LayerError(name, "has a quantized input, which this layout does not hold; quantize with activation_bits=None")
    bits, group = state.weight_grid.bits, state.weight_grid.group
    if group is not None and state.codes.shape[1] % group:
        raise LayerError(name, f"has {state.codes.shape[1]} inputs, which this layout cannot cut into groups of {group}")
    tensors = {
        "weight_packed": _packed_rows(_stored(state), bits),
        "weight_scale": state.scale.cpu().view(len(state.scale), -1).clone(),
        "weight_shape": torch.tensor(state.codes.shape),
    }
    if not state.weight_grid.symmetric:
        zero = state.zero_point.cpu().view(len(state.scale), -1).to(torch.uint8)
        tensors["weight_zero_point"] = _packed_rows(zero.mT.contiguous(), bits).mT.contiguous()
    return tensors | ({"bias": state.bias.cpu().clone()} if has_bias and state.bias is not None else {})


def _stored(state: QuantizedState) -> Tensor:
    """Codes from 0, uint8 (O, n)."""
    return (state.codes.cpu().to(torch.int16) - state.weight_grid.lowest).to(torch.uint8)


def _packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Each row dense in words of 32 bits; uint8 (rows, n) to int32 (rows, ceil(n bits / 32))."""
    rows, count = codes.shape
    whole = -(-count // 32) * 32  # 32 codes fill a whole number of words at any width
    padded = np.zeros((rows, whole), np.uint8)
    padded[:, :count] = codes.numpy()
    words = pack(padded.ravel(), bits).view("<i4").reshape(rows, whole * bits // 32)
    return torch.from_numpy(words[:, : -(-count * bits // 32)].astype(np.int32))


def _each_once(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands in the model under several names, under the first."""
    owners: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors:
            owners.setdefault(id(tensor), name)
    return {name: tensors[name] for name in owners.values()}


def _config(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, Any]:
    """The model's own configuration, if it has one as transformers' models do, and how it is quantized."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config: dict[str, Any] = dict(to_dict()) if callable(to_dict) else {}
    if config and not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    groups: dict[Grid, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[layer.state().weight_grid].append(name)
    return config | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{index}": _group(grid, names) for index, (grid, names) in enumerate(groups.items())},
            "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        }
    }


def _group(grid: Grid, names: Sequence[str]) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if grid.group is None else {"strategy": "group", "group_size": grid.group}
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False}
    return {"targets": list(names), "weights": weights | strategy}
