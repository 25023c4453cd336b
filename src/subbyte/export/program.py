"""A model's computation as data, so that a packed file can be loaded where the model's Python class is not at hand.

The graph that `torch.export` gives, one list for each step: `[operator, [arguments], {keyword arguments}]`, in which `{"step": 3}` is what
step 3 returned and `{"tensor": "fc.scale"}` a tensor of the file. It is JSON and is interpreted, step by step; there is nothing in it that
Python could run. Operators are looked up by name among those that compute something from tensors and change nothing:

    aten.NAME.OVERLOAD    of PyTorch's, tagged "core" or "pointwise" by PyTorch, or listed here; never one that writes into its arguments
    python.NAME           arithmetic and comparisons of sizes, and taking an element
    subbyte.NAME          quantize, weight, bias: see `markers`

`docs/packed-format.md` describes it for other readers.
"""

from __future__ import annotations

import json
import math
import operator as python
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from subbyte.errors import ModelError
from subbyte.export.graph_kinds import ASSERTIONS, BIAS, QUANTIZE, WEIGHT
from subbyte.export.markers import marked, quantize
from subbyte.export.trace import Example, trace
from subbyte.model.batches import Batch

PROGRAM_VERSION = 1
LARGEST_TEXT = 1 << 28  # bytes that a program may be unpacked to
INPUT, OUTPUT = "input", "output"
PYTHON = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "getitem")
LISTED = frozenset(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addmm
    affine_grid_generator alias __and__ arange argmax argsort atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d
    baddbmm batch_norm bilinear block_diag bmm broadcast_to bucketize cartesian_prod cdist celu channel_shuffle chunk clamp_max
    clamp_min clone column_stack concat concatenate contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    cosine_similarity cross cummax cummin cumprod cumsum detach diag diag_embed diagflat diff dropout dsplit dstack einsum elu
    embedding expand_as expand_copy eye feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn
    fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn flatten fliplr flipud full_like gelu glu grid_sampler
    grid_sampler_3d group_norm gru hamming_window hann_window hardsigmoid hardswish hardtanh hsplit hstack im2col inner instance_norm
    isfinite isin istft kron layer_norm leaky_relu lift_fresh_copy linalg_cross linalg_matrix_norm linalg_norm linalg_vector_norm
    linear linspace log_sigmoid log_softmax logcumsumexp logsumexp __lshift__ lstm masked_fill masked_select matmul max_pool1d
    max_pool1d_with_indices max_pool2d max_pool3d mean median meshgrid mish mm moveaxis movedim msort mv nanmean narrow new_full
    new_ones new_zeros norm norm_except_dim numpy_T one_hot ones ones_like __or__ outer pad pairwise_distance permute pixel_shuffle
    pixel_unshuffle prelu quantile ravel relu6 repeat_interleave reshape reshape_as rms_norm rnn_relu rnn_tanh roll rot90 row_stack
    __rshift__ rsub _safe_softmax scaled_dot_product_attention searchsorted select selu silu softmax softplus split split_with_sizes
    square squeeze stack std std_mean stft sum swapaxes swapdims t take take_along_dim tensor_split tensordot tile to _to_copy trace
    transpose tril tril_indices triu triu_indices type_as unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes
    _unsafe_view unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean vdot view view_as view_as_complex
    view_as_real vsplit vstack _weight_norm _weight_norm_interface where __xor__ zeros zeros_like
    """.split()
)
DTYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def program_of(model: nn.Module, batches: Sequence[Batch], stored: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Tensor]]:
    """A quantized model's computation as data.

    Args:
        model: with quantized layers.
        batches: what it is called with.
        stored: tensors of any shape that the file holds anyway, by name.

    Returns:
        JSON, compressed by zlib, and further tensors that it reads, by name.

    Raises:
        ModelError: if torch.export cannot follow the model, or it uses an operator that cannot be stored.
    """
    marking = marked(model)
    graph = trace(marking.model, Example.of(batches))
    extra: dict[str, Tensor] = {}
    numbers: dict[Node, int] = {}
    steps: list[list[Any]] = []
    for node in graph.graph.nodes:
        step = _step(graph, node, numbers, stored, extra)
        if step is not None:
            numbers[node] = len(steps)
            steps.append(step)
    names = list(example_keys(batches[0]) or ())
    about = {"version": PROGRAM_VERSION, "keys": names, "output": _output_structure(graph), "steps": steps}
    return zlib.compress(json.dumps(about, separators=(",", ":"), allow_nan=False).encode(), 9), extra


def example_keys(batch: Batch) -> Sequence[str] | None:
    """Names of keyword arguments; None where a batch has positional ones.

    Args:
        batch: what a model is called with.
    """
    return list(batch) if isinstance(batch, Mapping) else None


def _step(
    graph: GraphModule, node: Node, numbers: Mapping[Node, int], stored: Mapping[str, Tensor], extra: dict[str, Tensor]
) -> list[Any] | None:
    """A node as data; None where it computes nothing of its own."""
    if node.op == "placeholder":
        return [INPUT, [], {}]
    if node.op == "get_attr":
        if all(user.target in (WEIGHT, BIAS) for user in node.users):
            return None  # these are the layer's, and found by its name
        return ["tensor", [_tensor_name(graph, str(node.target), stored, extra)], {}]
    if node.op == "output":
        return [OUTPUT, [_encoded(pytree.tree_leaves(node.args[0]), numbers)], {}]
    if node.op != "call_function" or node.target in ASSERTIONS:
        return None  # guards, and what checks a tensor that it was traced with
    if node.target in (WEIGHT, BIAS):
        return [f"subbyte.{'weight' if node.target is WEIGHT else 'bias'}", [node.args[1]], {}]
    name = _name_of(node.target)
    try:
        _function(name)
    except ValueError as error:
        raise ModelError(f"{error} of this model is none that a packed file's program may call; save it without program") from error
    kwargs = {key: _encoded(value, numbers) for key, value in node.kwargs.items()}
    return [name, [_encoded(value, numbers) for value in node.args], kwargs]


def _tensor_name(graph: GraphModule, target: str, stored: Mapping[str, Tensor], extra: dict[str, Tensor]) -> str:
    value: Any = graph
    for part in target.split("."):
        value = getattr(value, part)
    known = stored.get(target)
    if known is not None and known.dtype == value.dtype and torch.equal(known, value.detach()):
        return target
    name = f"subbyte.constant.{len(extra)}"
    extra[name] = value.detach().cpu().contiguous().clone()
    return name


def _name_of(target: Any) -> str:
    if target is QUANTIZE:
        return "subbyte.quantize"
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    name = getattr(target, "__name__", "")
    return f"python.{name}" if getattr(python, name, None) is target else str(target)


def _encoded(value: Any, numbers: Mapping[Node, int]) -> Any:
    """An argument as JSON."""
    if isinstance(value, Node):
        return {"step": numbers[value]}
    if isinstance(value, list | tuple):
        return [_encoded(item, numbers) for item in value]
    if isinstance(value, slice):
        return {"slice": [_encoded(item, numbers) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}  # that of the inputs
    if isinstance(value, torch.layout | torch.memory_format):
        return None if value is torch.strided else {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ModelError(f"this model gives an operator {value!r}, which a packed file does not store; save it without program")


def _output_structure(graph: GraphModule) -> Any:
    """What the model returns, with the number of the output in place of each tensor."""
    spec = graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    return _plain(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _plain(item) for key, item in value.items()}}
    if is_dataclass(value):
        return {"mapping": {field.name: _plain(getattr(value, field.name)) for field in fields(value)}}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_plain(item) for item in value]}
    return value


def _function(name: str) -> Callable[..., Any]:
    """The function of an operator that a program may call.

    Raises:
        ValueError: if it may not, or there is none.
    """
    family, _, rest = name.partition(".")
    if name == "subbyte.quantize":
        return quantize
    if family == "python" and rest in PYTHON:
        found: Callable[..., Any] = getattr(python, rest)
        return found
    if family == "aten":
        base, _, overload = rest.partition(".")
        found = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)  # type: ignore[assignment]
        if isinstance(found, torch._ops.OpOverload) and not found._schema.is_mutable:
            if base in LISTED or {torch.Tag.core, torch.Tag.pointwise} & set(found.tags):
                return found
    raise ValueError(f"the operator '{name[:80]}'")


class Program(nn.Module):
    """Computes what a packed file's program says.

    Args:
        content: compressed JSON.
        tensors: of the file, any dtype and shape, by name.
        weights: weights and biases of the quantized layers, float32, by layer name.

    Raises:
        ValueError: if the program is damaged or calls something that it may not.
    """

    def __init__(self, content: bytes, tensors: Mapping[str, Tensor], weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        about = _parsed(content)
        self.keys, self.structure = tuple(about["keys"]), about["output"]
        self._steps = [(str(name), tuple(args), dict(kwargs)) for name, args, kwargs in about["steps"]]
        self._functions = [
            None if name in (INPUT, OUTPUT) else self._prepared(name, args, tensors, weights) for name, args, _ in self._steps
        ]
        self._last_use: list[list[int]] = [[] for _ in self._steps]
        last: dict[int, int] = {}
        for index, (_, args, kwargs) in enumerate(self._steps):
            for used in _references([args, kwargs]):
                if not 0 <= used < index:
                    raise ValueError(f"step {index} reads step {used}")
                last[used] = index
        for used, index in last.items():
            self._last_use[index].append(used)
        self.eval()

    def _prepared(
        self, name: str, args: Sequence[Any], tensors: Mapping[str, Tensor], weights: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Callable[..., Any] | str:
        """What a step calls, or the name of the buffer that it gives."""
        if name not in ("tensor", "subbyte.weight", "subbyte.bias"):
            return _function(name)
        buffer = f"{name}:{args[0]}".replace(".", "/")
        if buffer not in self._buffers:
            value = tensors[args[0]] if name == "tensor" else weights[args[0]][name == "subbyte.bias"]
            self.register_buffer(buffer, value.clone())
        return buffer

    def forward(self, *args: object, **kwargs: object) -> Any:
        """What the model returns; a dataclass comes as a mapping.

        Args:
            args: positional arguments of the model, tensors of any shape.
            kwargs: keyword arguments of the model, likewise.

        Raises:
            ModelError: if the program has no end.
        """
        given = list(args) if args else [kwargs[key] for key in self.keys]
        device = next((value.device for value in given if isinstance(value, Tensor)), torch.device("cpu"))
        values: dict[int, Any] = {}
        for index, ((name, arguments, keywords), function) in enumerate(zip(self._steps, self._functions, strict=True)):
            if name == INPUT:
                values[index] = given.pop(0)
            elif isinstance(function, str):
                values[index] = self._buffers[function]
            elif name == OUTPUT:
                return _structured(self.structure, _decoded(arguments[0], values, device))
            else:
                assert function is not None
                decoded = _decoded(list(arguments), values, device), _decoded_items(keywords, values, device)
                values[index] = function(*decoded[0], **decoded[1])
            for used in self._last_use[index]:
                del values[used]
        raise ModelError("this program returns nothing")


def _parsed(content: bytes) -> dict[str, Any]:
    """The JSON of a program, unpacked and checked as far as its outline goes."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(content, LARGEST_TEXT)
    except zlib.error as error:
        raise ValueError(f"its program: {error}") from error
    if unpacker.unconsumed_tail:
        raise ValueError(f"a program of more than {LARGEST_TEXT} bytes")
    about = json.loads(text)
    if about["version"] != PROGRAM_VERSION:
        raise ValueError(f"a program of version {about['version']}, and this subbyte knows {PROGRAM_VERSION}")
    return dict(about)


def _references(value: Any) -> list[int]:
    """Steps that an argument reads."""
    if isinstance(value, list | tuple):
        return [used for item in value for used in _references(item)]
    if not isinstance(value, Mapping):
        return []
    return [int(value["step"])] if set(value) == {"step"} else [used for item in value.values() for used in _references(item)]


def _decoded(value: Any, values: Mapping[int, Any], device: torch.device) -> Any:
    """An argument from JSON."""
    if isinstance(value, list):
        return [_decoded(item, values, device) for item in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "step":
        return values[content]
    if kind == "slice":
        return slice(*_decoded(content, values, device))
    if kind == "device":
        return device
    if kind == "dtype":
        return DTYPES[content]
    if kind == "float":
        return float(content)
    if kind == "memory_format":
        return {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}[content]
    raise ValueError(f"an argument of kind '{kind}'")


def _decoded_items(keywords: Mapping[str, Any], values: Mapping[int, Any], device: torch.device) -> dict[str, Any]:
    return {key: _decoded(value, values, device) for key, value in keywords.items()}


def _structured(structure: Any, outputs: Sequence[Any]) -> Any:
    """The outputs in the arrangement of what the model returned."""
    if not isinstance(structure, Mapping):
        return outputs[structure] if isinstance(structure, int) else structure
    ((kind, items),) = structure.items()
    if kind == "mapping":
        return {key: _structured(item, outputs) for key, item in items.items()}
    return (list if kind == "list" else tuple)(_structured(item, outputs) for item in items)
