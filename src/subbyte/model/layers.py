"""Find the layers that can be quantized, in the order in which they run, by running the model once. Nothing is traced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from subbyte.errors import LayerError, ModelError, OptionError
from subbyte.model.batches import Batch, call, describe, tensors
from subbyte.model.operators import Convolution, Linear, Lookup, Operator, computes, operator_of, twins_of

EXCLUDED = "excluded by the user"
IDLE_BATCHES = 4  # so many batches without a new layer, and those not yet called are taken to be never called


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer that can be quantized.

    Args:
        name: qualified name in the model; the first one, if it has several.
        other_names: further names of the same module, and of modules that are never called and whose weight is the same tensor, as T5 has
            one beside its embedding.
        operator: its arithmetic.
        kind: the module's class and settings in words.
        weight_shape: shape of the weight.
        has_bias: whether the float layer has a bias.
        outputs: number of output channels, C_out.
        unknowns: number of weights of one output channel, n.
        input_shape: shape of the input in the run that found the layer.
        positions: output positions of one sample, in all calls together.
        macs: multiply-accumulate operations for one sample, in all calls together.
        calls: how often the layer was called in one forward.
        tied_with: names of modules whose weight is the same tensor.
        shares: name of an earlier layer whose codes this one takes, because its weight is the same tensor, laid out alike; or None.
    """

    name: str
    other_names: tuple[str, ...]
    operator: Operator
    kind: str
    weight_shape: tuple[int, ...]
    has_bias: bool
    outputs: int
    unknowns: int
    input_shape: tuple[int, ...]
    positions: int
    macs: int
    calls: int
    tied_with: tuple[str, ...]
    shares: str | None = None

    @property
    def weight_count(self) -> int:
        """Number of weights, bias not counted."""
        return self.outputs * self.unknowns


@dataclass(frozen=True)
class LeftOut:
    """A module with parameters that stays in float32, and why.

    Args:
        name: qualified name.
        kind: the module's class.
        parameters: how many numbers it holds itself, children not counted.
        reason: why it is not quantized.
    """

    name: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True, eq=False)
class Survey:
    """What a model consists of, for quantization.

    Args:
        layers: what can be quantized, in running order.
        left_out: everything else that holds parameters.
    """

    layers: tuple[Layer, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def multiplying(self) -> tuple[Layer, ...]:
        """The layers that multiply their input: all but the tables that rows are looked up in."""
        return tuple(layer for layer in self.layers if layer.operator.multiplies)

    @property
    def shared(self) -> frozenset[str]:
        """Names of the layers that share their codes with others, those that give them included."""
        return frozenset(name for layer in self.layers if layer.shares for name in (layer.name, layer.shares))


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be quantized as it stands, before anything runs.

    Args:
        model: any module.

    Raises:
        ModelError: if it is no eager module, is scripted or compiled, or is in training mode.
        LayerError: if a parameter or buffer is half or double precision, NaN or infinite, or has no numbers yet.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"'{name or type(model).__name__}' is scripted or traced; pass the eager model that it was made from")
        if hasattr(module, "_orig_mod"):
            raise ModelError(f"'{name or type(model).__name__}' is compiled by torch.compile; pass the eager model (its `_orig_mod`)")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(f"'{name or type(model).__name__}' is compiled in place; pass the eager model, before module.compile()")
        if module.training:
            raise ModelError(f"'{name or type(model).__name__}' is in training mode; call model.eval() first")
    _check_numbers(model)


def _check_numbers(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or is_lazy(tensor):
            raise LayerError(name, "has no numbers yet (meta device or lazy module); load the trained weights first")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise LayerError(name, f"is {str(tensor.dtype).removeprefix('torch.')}; convert the model with model.float() first")
        if tensor.is_floating_point() and not torch.isfinite(tensor.detach()).all():
            raise LayerError(name, "holds NaN or infinite numbers; the trained model is damaged, load it again")


def survey(
    model: nn.Module, batches: Sequence[Batch], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> tuple[Survey, object]:
    """Run the model once and list its layers.

    Args:
        model: float model in evaluation mode; left as it was.
        batches: what to run it on, see `batches.as_batches`. The first suffices, unless it skips layers (mixture of experts).
        include: globs over qualified names; only these layers are quantized.
        exclude: globs over qualified names; these layers are not.

    Returns:
        The survey, and what the model returned for the first batch.

    Raises:
        OptionError: if a glob matches no layer.
        ModelError: if the model fails on the batch, or no layer is left to quantize.
        LayerError: if a layer is called with more than its input, or sees NaN or infinite numbers.

    Example:
        >>> found, _ = survey(nn.Sequential(nn.Linear(3, 2)).eval(), [torch.zeros(5, 3)])
        >>> found.layers[0].name, found.layers[0].macs
        ('0', 6)
    """
    candidates = {
        name: (module, operator)
        for name, module in model.named_modules()
        if (operator := operator_of(module, own_forward=True)) and not _is_dressed(module)
    }
    others = _others(model, batches, candidates)
    candidates = {name: some for name, some in candidates.items() if name not in others}
    for pattern in (*include, *exclude) if candidates else ():
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise OptionError(f"no layer matches '{pattern}'; the layers are {', '.join(candidates) or 'none'}")
    calls = _observe(model, batches, {name: module for name, (module, _) in candidates.items()})
    layers: list[Layer] = []
    left_out: list[LeftOut] = []
    for name in [*calls.inputs, *(name for name in candidates if name not in calls.inputs)]:
        module, operator = candidates[name]
        if any(name in layer.other_names for layer in layers):
            continue
        if name not in calls.inputs:
            left_out.append(_left_out(name, module, "never called in a forward"))
        elif not any(fnmatchcase(name, pattern) for pattern in include) or any(fnmatchcase(name, pattern) for pattern in exclude):
            left_out.append(_left_out(name, module, EXCLUDED))
        else:
            idle = {other: candidates[other][0] for other in candidates if other not in calls.inputs}
            layers.append(_layer(name, module, operator, calls.inputs[name], model, twins_of(module, idle)))
    for name, module in model.named_modules():
        if name not in candidates and any(True for _ in module.parameters(recurse=False)):
            left_out.append(_left_out(name, module, _why_not(module)))
    if not layers:
        seen = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        raise ModelError(
            "nothing to quantize: no Linear, convolution or Embedding of torch.nn is called in a forward (or all are excluded); "
            f"modules found: {seen}"
        )
    return Survey(_with_shared(layers), tuple(left_out)), calls.output


def _others(model: nn.Module, batches: Sequence[Batch], candidates: Mapping[str, tuple[nn.Module, Operator]]) -> set[str]:
    """Names of the subclasses of torch's layers with a forward of their own that is not found to compute the same, on the first batch."""
    unproved = {name: some for name, some in candidates.items() if operator_of(some[0]) is None}
    if not unproved:
        return set()
    verdicts: dict[str, bool] = {}

    def check(name: str, module: nn.Module, operator: Operator):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            given = [*args, *kwargs.values()]
            same = len(given) == 1 and isinstance(given[0], Tensor) and computes(operator, module, given[0], output)
            verdicts[name] = verdicts.get(name, True) and same

        return hook

    handles = [module.register_forward_hook(check(name, module, op), with_kwargs=True) for name, (module, op) in unproved.items()]
    try:
        with torch.no_grad(), contextlib.suppress(Exception):  # which the pass that follows meets again, and reports
            call(model, batches[0])
    finally:
        for handle in handles:
            handle.remove()
    return {name for name in unproved if not verdicts.get(name)}


def _with_shared(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers, those that take the codes of an earlier one marked."""
    found: list[Layer] = []
    for layer in layers:
        owners = (earlier for earlier in found if earlier.name in layer.tied_with and earlier.shares is None and _alike(earlier, layer))
        owner = next(owners, None)
        found.append(layer if owner is None else replace(layer, shares=owner.name))
    return tuple(found)


def _alike(one: Layer, other: Layer) -> bool:
    """Whether the same codes and steps serve both: an embedding's rows are a linear layer's output channels."""
    return one.operator == other.operator or {one.operator, other.operator} == {Lookup(), Linear()}


@dataclass(frozen=True, eq=False)
class _Calls:
    inputs: dict[str, list[Tensor]]
    output: object


def _observe(model: nn.Module, batches: Sequence[Batch], modules: dict[str, nn.Module]) -> _Calls:
    """Calls in the first batch, and of layers that it skips in the first batch that does not; the output of the first batch."""
    first = _record_calls(model, batches[0], modules)
    order, inputs, idle = list(first.inputs), dict(first.inputs), 0
    for batch in batches[1:]:
        if len(order) == len(modules) or idle == IDLE_BATCHES:
            break
        later = _record_calls(model, batch, modules).inputs
        idle = 0 if later.keys() - inputs else idle + 1
        order = _merged_order(order, list(later))
        inputs = later | inputs
    return _Calls({name: inputs[name] for name in order}, first.output)


def _record_calls(model: nn.Module, batch: Batch, modules: dict[str, nn.Module]) -> _Calls:
    """Inputs of every call of the given modules (as meta tensors, by name, in running order), and the model's output."""
    inputs: dict[str, list[Tensor]] = {}
    stage = ["before the first layer"]

    def recorder(name: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = layer_input(name, args, kwargs)
            stage[0] = f"in or after layer '{name}' with input {describe(x)}"
            inputs.setdefault(name, []).append(x.to("meta"))

        return record

    handles = [module.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
    versions = [tensor._version for tensor in tensors(batch)]
    try:
        with torch.no_grad():
            output = call(model, batch)
        if versions != [tensor._version for tensor in tensors(batch)]:
            raise ModelError("the model writes into its input (an in-place operation on it); let it work on input.clone()")
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - adds where the user's model failed
        raise ModelError(
            f"the model failed on a calibration batch, {stage[0]}: {error}. The batch was {describe(batch)}: tuples and lists "
            "are passed as positional arguments, mappings as keyword arguments; leave labels out"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _Calls(inputs, output)


def _merged_order(order: list[str], other: list[str]) -> list[str]:
    """`order` with the names that only `other` has, each behind the name that it follows there."""
    merged = list(order)
    for index, name in enumerate(other):
        if name not in merged:
            merged.insert(merged.index(other[index - 1]) + 1 if index else 0, name)
    return merged


def layer_input(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """The one input of a layer's call.

    Args:
        name: the layer's qualified name.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        float32, or the integers that something is looked up by, the shape that the layer was given. It wants no gradient: what the model
        hands on may be a view of a parameter, a learned query for example, and such views want one even where none is taken.

    Raises:
        LayerError: if the call passes anything but one tensor, of integers or of finite float32 numbers.
    """
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        raise LayerError(name, f"is called with {describe(given)}, only one input tensor is supported; exclude the layer to go on")
    x = given[0].detach()
    if x.dtype in (torch.int64, torch.int32):
        return x
    if x.dtype != torch.float32:
        raise LayerError(name, f"receives {describe(x)}, only float32 is supported; switch autocast off or exclude the layer")
    if not math.isfinite(float(x.sum())) and not bool(torch.isfinite(x).all()):
        raise LayerError(name, f"receives NaN or infinite numbers, input {describe(x)}; check the model and the calibration data")
    return x


def _layer(name: str, module: nn.Module, operator: Operator, inputs: list[Tensor], model: nn.Module, twins: Sequence[str]) -> Layer:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    if not name:
        raise ModelError(f"the model is itself one {type(module).__name__}; wrap it, torch.nn.Sequential(model), to have it quantized")
    if operator.multiplies and inputs[0].dim() == (operator.dimensions + 1 if isinstance(operator, Convolution) else 1):
        shape = tuple(inputs[0].shape)
        raise LayerError(name, f"receives one sample without a batch dimension, {shape}; calibration batches are (samples, ...)")
    groups, outputs, unknowns = operator.to_matrix(weight).shape
    positions = sum(operator.count(x)[1] for x in inputs)
    names = [other for other, found in model.named_modules(remove_duplicate=False) if found is module and other != name]
    tied = [other for other, found in model.named_modules() if found is not module and getattr(found, "weight", None) is weight]
    tied = [other for other in tied if other not in twins]
    return Layer(
        name=name,
        other_names=(*names, *twins),
        operator=operator,
        kind=f"{type(module).__name__}({module.extra_repr()})",
        weight_shape=tuple(weight.shape),
        has_bias=bias is not None,
        outputs=groups * outputs,
        unknowns=unknowns,
        input_shape=tuple(inputs[0].shape),
        positions=positions,
        macs=sum(operator.macs(x, weight) for x in inputs),
        calls=len(inputs),
        tied_with=tuple(tied),
    )


def _left_out(name: str, module: nn.Module, reason: str) -> LeftOut:
    count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return LeftOut(name or type(module).__name__, type(module).__name__, count, reason)


def _is_dressed(module: nn.Module) -> bool:
    """Whether hooks or parametrizations hang on a module, which its quantized counterpart would lose."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or is_parametrized(module)


def _why_not(module: nn.Module) -> str:
    if operator_of(module) is not None and is_parametrized(module):
        return "is parametrized; torch.nn.utils.parametrize.remove_parametrizations first, to have it quantized"
    if operator_of(module) is not None:
        return "has forward hooks (weight_norm, spectral_norm or the user's); remove them first, to have it quantized"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "rewrites its weight in every forward (max_norm)"
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding):
        return f"{type(module).__name__} has a forward of its own, which is not torch's"
    return "not a linear or convolutional layer or an embedding"
