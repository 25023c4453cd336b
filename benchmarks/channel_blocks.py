"""Convolutions whose channels are no multiple of what ONNX Runtime's int8 kernels work in: as they are, and filled up with zeros.

    python benchmarks/channel_blocks.py

One thread, one sample, 4-bit weights and 8-bit inputs, random numbers; each layer between two pointwise ones, as it stands in a network, or
first; files take turns, the shortest of the runs, milliseconds of the whole file. Kernels of 7x7 are left as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import subbyte
from subbyte.export.layout import Layout
from subbyte.export.verify import in_turns


@dataclasses.dataclass(frozen=True)
class Unfilled(subbyte.OnnxRuntimeCPU):
    """ONNX Runtime with channels as they are."""

    layout = Layout(channels_last=True)


def first(channels: int, outputs: int, kernel: int, stride: int) -> nn.Module:
    """A first layer, and a pointwise one."""
    return nn.Sequential(nn.Conv2d(channels, outputs, kernel, stride, kernel // 2), nn.ReLU(), nn.Conv2d(outputs, 32, 1), nn.ReLU(), *end())


def inner(channels: int, kernel: int, stride: int, *, depthwise: bool) -> nn.Module:
    """A layer between two pointwise ones."""
    middle = nn.Conv2d(channels, channels if depthwise else 64, kernel, stride, kernel // 2, groups=channels if depthwise else 1)
    behind = nn.Conv2d(middle.out_channels, 32, 1)
    return nn.Sequential(nn.Conv2d(16, channels, 1), nn.ReLU(), middle, nn.ReLU(), behind, nn.ReLU(), *end())


def end() -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    nets = [
        ("first", channels, size, first(channels, 32, k, s))
        for channels, k, s, size in ((3, 3, 2, 224), (3, 5, 2, 224), (3, 7, 2, 224), (1, 3, 1, 64), (3, 3, 1, 32))
    ]
    nets += [
        ("depthwise", channels, size, inner(channels, 3, 1, depthwise=True))
        for channels, size in ((8, 56), (24, 56), (40, 28), (72, 28), (120, 14))
    ]
    nets += [
        ("dense", channels, size, inner(channels, 3, 1, depthwise=False)) for channels, size in ((6, 56), (18, 28), (30, 28), (62, 14))
    ]
    print("| layer | channels | size | as they are | filled up | times faster |\n|---|---|---|---|---|---|")
    for kind, channels, size, net in nets:
        data = torch.randn(8, channels if kind == "first" else 16, size, size)
        result = subbyte.quantize(net.eval(), data, widths=subbyte.Widths(4, 8), recipe=subbyte.rounding())
        runs = []
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for target in (Unfilled(), subbyte.OnnxRuntimeCPU()):
                path = Path(folder) / "m.onnx"
                result.export_onnx(path, target, threads=options.threads)
                runs.append(target.open(path.read_bytes(), optimized=True, threads=options.threads))
        plain, filled = (1000.0 * min(seconds) for seconds in in_turns(runs, [data[:1].numpy()], options.runs))
        print(f"| {kind} | {channels} | {size} | {plain:.3f} | {filled:.3f} | {plain / filled:.2f} |", flush=True)


if __name__ == "__main__":
    main()
