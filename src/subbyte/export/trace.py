"""From a model to the graph of its operators, by `torch.export`, with the number of samples left open."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from subbyte.errors import ModelError
from subbyte.model.batches import Batch, describe, map_tensors, sample_count, tensors

EXAMPLE_SAMPLES = 3  # 0 and 1 samples would be taken for numbers of the model


def trace(model: nn.Module, batch: Batch) -> GraphModule:
    """The model as a graph of ATen operators without side effects; it takes what the model takes.

    Args:
        model: in evaluation mode, on the CPU.
        batch: an example.

    Returns:
        The graph, executable.

    Raises:
        ModelError: if torch.export cannot follow the model, or not with any number of samples.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(2, 1), nn.ReLU(inplace=True)).eval(), torch.zeros(1, 2))
        >>> [node.target for node in graph.graph.nodes if node.op == "call_function"][-1]
        <OpOverload(op='aten.relu', overload='default')>
    """
    exported = exported_program(model, batch)
    with quiet():
        module = exported.run_decompositions({}).module(check_guards=False)  # without side effects: relu_ becomes relu
    assert isinstance(module, GraphModule)
    return module


def exported_program(model: nn.Module, batch: Batch) -> torch.export.ExportedProgram:
    """The model's program for any number of samples.

    Args:
        model: in evaluation mode, on the CPU.
        batch: an example.

    Raises:
        ModelError: if torch.export cannot follow the model, or not with any number of samples.
    """
    example = _example(batch)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = tuple(example) if isinstance(example, list | tuple) else (example,)
    count = sample_count(example)
    shapes = torch.export.ShapesCollection()
    for x in tensors(example):
        if x.dim() and x.shape[0] == count:
            shapes[x] = {0: torch.export.Dim.DYNAMIC}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs))
    except Exception as error:  # noqa: BLE001 - adds what was being done to the user's model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"torch.export cannot follow this {type(model).__name__} with any number of samples ({describe(example)}): {reason}; take "
            "Python that depends on values or on the number of samples out of its forward"
        ) from error


class Simulated(nn.Module):
    """A graph that computes in float64 and takes and gives float32.

    Args:
        graph: a traced model; its parameters and buffers are converted.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph.double()
        self.training = False

    def forward(self, *args: object, **kwargs: object) -> object:
        """The graph's outputs.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        args, kwargs = map_tensors((args, kwargs), lambda x: x.double() if x.dtype == torch.float32 else x)
        return map_tensors(self.graph(*args, **kwargs), lambda x: x.float() if x.dtype == torch.float64 else x)


@contextmanager
def quiet() -> Iterator[None]:
    """Tracing and translating without the warnings that torch gives about itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        log.setLevel(level)


def _example(batch: Batch) -> Batch:
    """The batch with `EXAMPLE_SAMPLES` samples, its first ones, repeated where it has fewer."""
    count = sample_count(batch)
    index = torch.arange(EXAMPLE_SAMPLES) % count
    return map_tensors(batch, lambda x: x[index.to(x.device)].cpu() if x.dim() and x.shape[0] == count else x.cpu())
