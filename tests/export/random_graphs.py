"""Random small networks: convolutions of every kind, residual sums, concatenation, pooling, widths 2 to 8. Used by the tests, and by
`benchmarks/onnx_random.py` for many more of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte


@dataclass(frozen=True)
class Step:
    """One step of a network: what it does to the running tensor."""

    kind: str
    layer: int | None = None
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)


class RandomNet(nn.Module):
    """Steps in a row, drawn by a seed, then perhaps a classifier."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.inputs = draw.choice([1, 3, 4])
        self.size = draw.choice([6, 8, 9])
        self.width = self.size  # of the running tensor, never more than its height
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        channels = self.inputs
        for index in range(draw.randint(1, 4)):
            kind = draw.choice(["conv", "conv", "residual", "concat", "pool"]) if index else "conv"
            channels = getattr(self, f"_add_{kind}")(draw, channels)
        self.tail = draw.choice(["mean", "max", "none"])
        self.linear = nn.Linear(channels, draw.choice([2, 5])) if self.tail != "none" else None
        self.eval()

    def _conv(self, draw: random.Random, channels: int, outputs: int, *, same: bool) -> int:
        groups = draw.choice([g for g in (1, 2, 4, channels) if channels % g == 0 and outputs % g == 0])
        kernel, dilation = draw.choice([(1, 1), (3, 1), (3, 2)])
        reach = dilation * (kernel - 1)
        stride = 1 if same else draw.choice([1, 1, 2])
        padding = (reach // 2,) * 4 if same else draw.choice([(reach // 2,) * 4, (0, reach, 0, reach), (reach, 0, reach, reach)])
        self.width = (self.width + padding[0] + padding[1] - reach - 1) // stride + 1
        conv = nn.Conv2d(channels, outputs, kernel, stride, dilation=dilation, groups=groups, bias=draw.random() < 0.8)
        self.layers.append(conv)
        self.steps.append(Step("conv", len(self.layers) - 1, padding))
        return outputs

    def _clip(self, draw: random.Random) -> None:
        kind = draw.choice(["relu", "relu", "relu6", "none"])
        if kind != "none":
            self.steps.append(Step(kind))

    def _add_conv(self, draw: random.Random, channels: int) -> int:
        channels = self._conv(draw, channels, draw.choice([2, 4, 6, 8, 16]), same=False)
        self._clip(draw)
        return channels

    def _add_residual(self, draw: random.Random, channels: int) -> int:
        self.steps.append(Step("push"))
        self._conv(draw, channels, channels, same=True)
        self._clip(draw)
        self.steps.append(Step("add"))
        self._clip(draw)
        return channels

    def _add_concat(self, draw: random.Random, channels: int) -> int:
        self.steps.append(Step("push"))
        outputs = self._conv(draw, channels, draw.choice([2, 4]), same=True)
        self._clip(draw)
        self.steps.append(Step("cat"))
        return channels + outputs

    def _add_pool(self, draw: random.Random, channels: int) -> int:
        step = Step(draw.choice(["maxpool", "avgpool"]))
        if self.width > 1:  # what is left of a small input cannot be pooled
            self.steps.append(step)
            self.width -= 1
        return self._add_conv(draw, channels)

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for step in self.steps:
            x, kept = self._step(step, x, kept)
        if self.linear is None:
            return x
        pooled = x.mean((2, 3)) if self.tail == "mean" else x.amax((2, 3))
        return self.linear(pooled)

    def _step(self, step: Step, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        if step.kind == "push":
            return x, x
        if step.layer is not None:
            x = self.layers[step.layer](F.pad(x, step.padding) if any(step.padding) else x)
        elif step.kind == "add":
            x = x + kept
        elif step.kind == "cat":
            x = torch.cat([kept, x], dim=1)
        elif step.kind in ("maxpool", "avgpool"):
            x = (F.max_pool2d if step.kind == "maxpool" else F.avg_pool2d)(x, 2, stride=1)
        else:
            x = {"relu": torch.relu, "relu6": F.relu6}[step.kind](x)
        return x, kept


class Several(nn.Module):
    """Independent networks side by side, each with an input and an output of its own: traced and exported in one go."""

    def __init__(self, nets: list[RandomNet]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(net(x) for net, x in zip(self.nets, inputs, strict=True))


def random_nets(seed: int, count: int) -> list[RandomNet]:
    """Networks of consecutive seeds, without those in which a layer is fed a constant (all its inputs clipped)."""
    found: list[RandomNet] = []
    while len(found) < count:
        torch.manual_seed(seed)
        net = RandomNet(seed)
        if _is_alive(net, samples_for(net, 24)):
            found.append(net)
        seed += 1
    return found


def samples_for(net: RandomNet, count: int) -> Tensor:
    """Random inputs, float32 (count, channels, size, size)."""
    return torch.randn(count, net.inputs, net.size, net.size)


def quantized_nets(
    seed: int, count: int, *, symmetric: bool = False, activation_bits: int = 8
) -> tuple[subbyte.Result, tuple[Tensor, ...]]:
    """Random networks at random widths, and samples that they were not calibrated on."""
    model = Several(random_nets(seed, count))
    draw = random.Random(seed + 1)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    bits = {name: (draw.randint(2, 8), activation_bits) for name in names}
    recipe = replace(subbyte.rounding(), symmetric_weights=symmetric)
    batch = tuple(samples_for(net, 24) for net in model.nets)
    result = subbyte.quantize(model, [batch], widths=subbyte.Widths(8, 8, pinned=bits), recipe=recipe, seed=seed)
    return result, tuple(samples_for(net, 16) for net in model.nets)


def _is_alive(net: RandomNet, x: Tensor) -> bool:
    """Whether no layer sees the same number nearly everywhere."""
    shares: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: shares.append(float((args[0] > args[0].min() + 1e-3).float().mean())))
        for module in net.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return min(shares) > 0.1
