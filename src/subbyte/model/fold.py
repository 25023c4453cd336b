"""Fold batch norms into the layers before them, where running the model proves it right.

A batch norm in evaluation mode, `gamma (y - mu) / sqrt(var + eps) + beta`, after `y = W x + b` is one layer with

    W' = W gamma / sqrt(var + eps),      b' = (b - mu) gamma / sqrt(var + eps) + beta

Which batch norm reads which layer's output is found by running: the object that leaves the layer is the object that enters the batch norm.
That nothing else reads it is proved by comparing the model's outputs before and after; a fold that changed them is undone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from subbyte.errors import ModelError
from subbyte.model.batches import Batch, call, probes, tensors
from subbyte.model.layers import Layer
from subbyte.model.operators import operator_of
from subbyte.model.replace import replace_module_

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fold:
    """A batch norm that was folded.

    Args:
        layer: qualified name of the layer.
        batch_norm: qualified name of the batch norm, now an identity.
    """

    layer: str
    batch_norm: str


@dataclass(frozen=True, eq=False)
class NormOutput:
    """What a batch norm makes of a channel, over the data that it was trained on: mean `beta` and standard deviation `|gamma|`.

    Args:
        gamma: gain, float32 (C,); ones where the batch norm has none.
        beta: bias, float32 (C,); zeros where it has none.
        epsilon: what it adds to a variance before it takes the root.
    """

    gamma: Tensor
    beta: Tensor
    epsilon: float


def norm_outputs(model: nn.Module, folds: Sequence[Fold]) -> dict[str, NormOutput]:
    """What the batch norms that were folded made of their layers' outputs, by the layer's name.

    Args:
        model: the float model as it was before the fold.
        folds: what was folded in a copy of it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> norm_outputs(net, [Fold("0", "1")])["0"].beta
        tensor([0., 0., 0.])
    """
    return {fold.layer: _norm_output(model.get_submodule(fold.batch_norm)) for fold in folds}


@torch.no_grad()
def _norm_output(norm: nn.Module) -> NormOutput:
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None
    gamma = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach().clone()
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach().clone()
    return NormOutput(gamma, beta, norm.eps)


def fold_batch_norms_(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> tuple[Fold, ...]:
    """Fold every batch norm that can be folded.

    Args:
        model: float model in evaluation mode; is changed in place.
        layers: its layers, from `layers.survey`.
        batches: what to run it on before and after; two samples of a few batches do.

    Returns:
        What was folded.

    Raises:
        ModelError: if the unchanged model returns something else the second time (it is not deterministic).

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 3.2.

    Example:
        >>> from subbyte.model.layers import survey
        >>> net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), torch.randn(4, 1, 5, 5)
        >>> found, _ = survey(net, [x])
        >>> fold_batch_norms_(net, found.layers, [x])
        (Fold(layer='0', batch_norm='1'),)
        >>> net[1]
        Identity()
    """
    before = outputs_of_those_that_run(model, probes(batches)) or outputs_of_those_that_run(model, batches[:1])
    folds = _readers(model, layers, before[0][0]) if before else []
    undo = [_apply_(model, fold) for fold in folds]
    if same_outputs(model, before):
        return tuple(folds)
    for step in reversed(undo):
        step.back_(model)
    if not same_outputs(model, before):
        raise ModelError("the model returns something else each time it runs on the same batch; switch dropout and other randomness off")
    kept = []
    for fold in folds:  # one of them is wrong: try each alone
        step = _apply_(model, fold)
        if same_outputs(model, before):
            kept.append(fold)
        else:
            step.back_(model)
    return tuple(kept)


@dataclass(frozen=True, eq=False)
class _Undo:
    layer: nn.Module
    weight: Tensor
    bias: Tensor | None
    batch_norm: nn.Module
    identity: nn.Module

    def back_(self, model: nn.Module) -> None:
        self.layer.weight = nn.Parameter(self.weight, requires_grad=False)
        self.layer.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias, requires_grad=False))
        replace_module_(model, self.identity, self.batch_norm)


def _readers(model: nn.Module, layers: Sequence[Layer], batch: Batch) -> list[Fold]:
    """Pairs of a layer and the one batch norm that received the very object which the layer returned, each called once."""
    names = {model.get_submodule(layer.name): layer.name for layer in layers if layer.calls == 1}
    outputs = {layer.name: layer.outputs for layer in layers}
    norms = {module: name for name, module in model.named_modules() if _is_plain_batch_norm(module)}
    left: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    found: list[tuple[str, str]] = []

    def leaves(module: nn.Module, args: object, output: Tensor) -> None:
        left[id(output)] = (names[module], output)

    def enters(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer = left[id(args[0])][0] if args and id(args[0]) in left else ""
        fits = layer and isinstance(module, _BatchNorm) and module.num_features == outputs[layer]
        found.append((layer if fits else "", norms[module]))

    handles = [module.register_forward_hook(leaves) for module in names]
    handles += [module.register_forward_pre_hook(enters) for module in norms]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    layer_names, norm_names = [pair[0] for pair in found], [pair[1] for pair in found]
    return [Fold(*pair) for pair in found if pair[0] and layer_names.count(pair[0]) == 1 and norm_names.count(pair[1]) == 1]


def _is_plain_batch_norm(module: nn.Module) -> bool:
    """Whether a module computes what torch's batch norm does, with running statistics."""
    return isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward and module.running_mean is not None


@torch.no_grad()
def _apply_(model: nn.Module, fold: Fold) -> _Undo:
    layer, norm = model.get_submodule(fold.layer), model.get_submodule(fold.batch_norm)
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    assert isinstance(layer.weight, Tensor)
    weight, bias = layer.weight.detach(), layer.bias.detach() if isinstance(layer.bias, Tensor) else None
    affine = _norm_output(norm)
    factor = affine.gamma / torch.sqrt(norm.running_var + affine.epsilon)
    undo = _Undo(layer, weight, bias, norm, nn.Identity().train(norm.training))
    operator = operator_of(layer, own_forward=True)
    assert operator is not None
    layer.weight = nn.Parameter(weight * operator.per_channel(factor, weight), requires_grad=False)
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    layer.bias = nn.Parameter(affine.beta - mean * factor, requires_grad=False)
    replace_module_(model, norm, undo.identity)
    return undo


def outputs_of_those_that_run(model: nn.Module, batches: Sequence[Batch]) -> list[tuple[Batch, list[Tensor]]]:
    """Batches and the model's outputs. One that the unchanged model does not accept proves nothing: the calibration pass will report it.

    Args:
        model: any module.
        batches: see `batches.as_batches`.

    Returns:
        Batches, and all tensors that the model returned for each, of any shape.
    """
    found = []
    for batch in batches:
        with contextlib.suppress(Exception):
            found.append((batch, _outputs(model, batch)))
    return found


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(call(model, batch)))


def same_outputs(model: nn.Module, before: Sequence[tuple[Batch, list[Tensor]]]) -> bool:
    """Whether the model still returns what it did, up to float32 rounding.

    Args:
        model: any module.
        before: batches and what it returned for them, tensors of any shape.
    """
    for batch, expected in before:
        try:
            now = _outputs(model, batch)
        except Exception:  # noqa: BLE001 - whatever the fold broke, it is not the same
            return False
        if len(now) != len(expected) or not all(_close(a, b) for a, b in zip(now, expected, strict=True)):
            return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and (not b.is_floating_point())
    spread = (b - b.mean()).square().mean().sqrt() + b.abs().mean()
    return bool((a - b).abs().max() <= TOLERANCE * spread) if b.numel() else True
