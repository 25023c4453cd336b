"""Which values of a layer's output are clipped by what follows: below zero by a ReLU, above six by a ReLU6, however the model writes it.

An error in what is clipped anyway costs nothing. The interval that is read is found from gradients on a few samples, never from names:
every output below it and above it has a gradient of exactly zero. It is believed only if clipping the outputs to it changes no bit of what
the model returns.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.model.batches import Batch, call, tensors
from subbyte.model.layers import Layer

LEAST_SHARE = 0.01  # of outputs that are clipped: fewer are not worth an interval


@dataclass(frozen=True)
class Clip:
    """The interval of a layer's output outside of which nothing is read.

    Args:
        low: outputs below it count as it; minus infinity where all are read.
        high: outputs above it count as it; infinity where all are read.

    Example:
        >>> Clip(0.0, 6.0)(torch.tensor([-1.0, 2.0, 7.0]))
        tensor([0., 2., 6.])
    """

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, outputs: Tensor) -> Tensor:
        """Outputs as what follows sees them.

        Args:
            outputs: float32, any shape.
        """
        return outputs.clamp(self.low, self.high) if self else outputs

    def gradient_(self, gradient: Tensor, outputs: Tensor, out: Tensor) -> None:
        """The gradient for outputs, from that for what is read of them.

        Args:
            gradient: float32, the shape of `outputs`.
            outputs: float32, any shape.
            out: takes the gradient for outputs, float32, their shape.
        """
        if self:
            torch.ops.aten.hardtanh_backward.grad_input(gradient, outputs, self.low, self.high, grad_input=out)
        else:
            out.copy_(gradient)

    def __bool__(self) -> bool:
        """Whether anything is clipped."""
        return self != Clip()


def find_clips(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, Clip]:
    """The clips of a model's layers; layers all of whose outputs are read are left out.

    Args:
        model: float model in evaluation mode, is not changed.
        layers: its layers, from `layers.survey`.
        batches: a few samples.

    Source:
        The error behind the activation function: AdaRound (Nagel et al. 2020, arXiv 2004.10568), section 3.4.

    Example:
        >>> from subbyte.model.layers import survey
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(64, 4)
        >>> {name: clip.high for name, clip in find_clips(net, survey(net, [x])[0].layers, [x]).items()}
        {'0': inf}
    """
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    try:
        read = _read_outputs(model, modules, batches)
    except RuntimeError:  # a model that cannot be differentiated: then every output counts
        return {}
    clips = {name: clip for name, pairs in read.items() if (clip := _clip_of(pairs))}
    return _harmless(model, modules, clips, [(batch, _outputs(model, batch)) for batch in batches])


def _read_outputs(model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Every layer's outputs, and bool, whether the gradient of some mixture of the model's outputs is not zero there."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        seen: list[tuple[str, Tensor, Tensor]] = []
        hooks = {module: _keeping(name, seen) for name, module in modules.items()}
        with torch.inference_mode(mode=False), torch.enable_grad(), _hooked(hooks):
            outputs = [tensor for tensor in tensors(call(model, batch)) if tensor.is_floating_point() and tensor.requires_grad]
            if not outputs or not seen:
                continue
            mixture = torch.stack([(o * torch.randn(o.shape, generator=generator).to(o.device)).sum() for o in outputs]).sum()
            gradients = torch.autograd.grad(mixture, [added for _, _, added in seen], allow_unused=True)
        for (name, output, _), gradient in zip(seen, gradients, strict=True):
            read = torch.ones_like(output, dtype=torch.bool) if gradient is None else gradient != 0
            found[name].append((output.flatten(), read.flatten()))
    return found


def _keeping(name: str, seen: list[tuple[str, Tensor, Tensor]]):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        added = torch.zeros_like(output).requires_grad_()
        seen.append((name, output.detach().clone(), added))
        return output + added

    return hook


def _clip_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Clip | None:
    output, read = torch.cat([output for output, _ in pairs]), torch.cat([read for _, read in pairs])
    if not bool(read.any()):
        return None
    first, last = output[read].min(), output[read].max()
    below, above = output[output < first], output[output > last]
    low = min(float(below.max()), 0.0) if len(below) >= LEAST_SHARE * len(output) else -math.inf
    high = float(above.min()) if len(above) >= LEAST_SHARE * len(output) else math.inf
    clip = Clip(low, high)
    return clip if clip else None


_Expected = Sequence[tuple[Batch, list[Tensor]]]  # batches, and what the model returns for them


def _harmless(model: nn.Module, modules: Mapping[str, nn.Module], clips: Mapping[str, Clip], expected: _Expected) -> dict[str, Clip]:
    """Those clips with which the model returns the same bits: all at once, or else those of either half."""
    if not clips or _changes_nothing(model, {modules[name]: clip for name, clip in clips.items()}, expected):
        return dict(clips)
    if len(clips) == 1:
        return {}
    names, half = list(clips), len(clips) // 2
    halves = ({name: clips[name] for name in some} for some in (names[:half], names[half:]))
    return {name: clip for some in halves for name, clip in _harmless(model, modules, some, expected).items()}


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors(call(model, batch))]


@torch.no_grad()
def _changes_nothing(model: nn.Module, clips: Mapping[nn.Module, Clip], expected: _Expected) -> bool:
    """Whether the model returns the same bits when layers' outputs are clipped."""
    for batch, outputs in expected:
        with _hooked({module: _clipping(clip) for module, clip in clips.items()}):
            given = list(tensors(call(model, batch)))
        if len(outputs) != len(given) or not all(torch.equal(a, b) for a, b in zip(outputs, given, strict=True)):
            return False
    return True


def _clipping(clip: Clip):  # type: ignore[no-untyped-def]
    return lambda module, args, output: clip(output)


@contextlib.contextmanager
def _hooked(hooks: Mapping[nn.Module, Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
