"""From a model to the graph of its operators, by `torch.export`, with the number of samples left open, and the length of sequences."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from subbyte.errors import ModelError
from subbyte.model.batches import Batch, describe, map_tensors, sample_count, tensors

EXAMPLE_SAMPLES = 3  # 0 and 1 samples would be taken for numbers of the model


@dataclass(frozen=True, eq=False)
class Example:
    """A batch to trace a model with, and the dimensions that the trace leaves open.

    Args:
        batch: `EXAMPLE_SAMPLES` samples, on the CPU.
        varying: by index of a tensor and dimension, those that must stay open: the samples, and where calibration batches differ in size.
        lengths: likewise, those that stay open if the model lets them: dimension 1 of whole numbers (samples, length), which are tokens.

    Example:
        >>> example = Example.of([{"ids": torch.zeros(2, 4, dtype=torch.int64)}, {"ids": torch.zeros(1, 7, dtype=torch.int64)}])
        >>> example.batch["ids"].shape, sorted(example.varying), sorted(example.lengths)
        (torch.Size([3, 7]), [(0, 0), (0, 1)], [(0, 1)])
    """

    batch: Batch
    varying: frozenset[tuple[int, int]]
    lengths: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Example:
        """An example of calibration batches: the largest one, cut to a few samples.

        Args:
            batches: what the model is called with, all of one structure.

        Raises:
            ModelError: if the batches are not of one structure.
        """
        largest = max(batches, key=lambda batch: sum(x[:1].numel() for x in tensors(batch) if x.dim()))
        shapes = [[tuple(x.shape) for x in tensors(in_order(batch, largest))] for batch in batches]
        if any([len(shape) for shape in other] != [len(shape) for shape in shapes[0]] for other in shapes):
            raise ModelError(
                "the calibration batches are not of one structure, so that no graph takes them all; export with one kind of batch"
            )
        batch = _few(largest)
        count = sample_count(batch)
        varying, lengths = set(), set()
        for index, x in enumerate(tensors(batch)):
            for dimension, size in enumerate(x.shape):
                if dimension == 0 and size == count or len({other[index][dimension] for other in shapes}) > 1:
                    varying.add((index, dimension))
            if x.dim() == 2 and x.shape[0] == count and not x.is_floating_point():
                lengths.add((index, 1))
        return cls(batch, frozenset(varying), frozenset(lengths))

    def shapes(self) -> torch.export.ShapesCollection:
        """The open dimensions as `torch.export` takes them."""
        shapes = torch.export.ShapesCollection()
        for index, x in enumerate(tensors(self.batch)):
            sizes = {
                dimension: torch.export.Dim.DYNAMIC if (index, dimension) in self.varying else torch.export.Dim.AUTO
                for dimension in range(x.dim())
                if (index, dimension) in self.varying | self.lengths
            }
            if sizes:
                shapes[x] = sizes
        return shapes


def in_order(batch: Batch, like: Batch) -> Batch:
    """A mapping with its keys in the order of another one; anything else as it is.

    Args:
        batch: what a model is called with.
        like: another one of the same structure.

    Raises:
        ModelError: if the mappings have different keys.

    Example:
        >>> list(in_order({"b": 1, "a": 2}, {"a": 3, "b": 4}))
        ['a', 'b']
    """
    if not isinstance(batch, Mapping) or not isinstance(like, Mapping):
        return batch
    if set(batch) != set(like):
        raise ModelError(f"calibration batches have different inputs, {sorted(batch)} and {sorted(like)}; give the same ones in each")
    return {key: batch[key] for key in like}


def trace(model: nn.Module, example: Example) -> GraphModule:
    """The model as a graph of ATen operators without side effects; it takes what the model takes.

    Args:
        model: in evaluation mode, on the CPU.
        example: what to call it with.

    Returns:
        The graph, executable.

    Raises:
        ModelError: if torch.export cannot follow the model, or not with any number of samples.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(2, 1), nn.ReLU(inplace=True)).eval(), Example.of([torch.zeros(1, 2)]))
        >>> [node.target for node in graph.graph.nodes if node.op == "call_function"][-1]
        <OpOverload(op='aten.relu', overload='default')>
    """
    exported = exported_program(model, example)
    with quiet():
        module = exported.run_decompositions({}).module(check_guards=False)  # without side effects: relu_ becomes relu
    assert isinstance(module, GraphModule)
    return module


def exported_program(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """The model's program for any number of samples; of a causal language model without the keys and values for tokens to come.

    Args:
        model: in evaluation mode, on the CPU.
        example: what to call it with.

    Raises:
        ModelError: if torch.export cannot follow the model, or not with any number of samples.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    batch = example.batch
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        args = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    try:
        with quiet(), torch.no_grad(), _without_cache(model):
            shapes = example.shapes().dynamic_shapes(model, args, kwargs)
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # noqa: BLE001 - adds what was being done to the user's model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"torch.export cannot follow this {type(model).__name__} with any number of samples ({describe(batch)}): {reason}; take "
            "Python that depends on values or on the number of samples out of its forward"
        ) from error


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A model of the transformers library returns no keys and values for tokens to come, which torch.export cannot follow."""
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if config is None or not cached:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = cached


class Simulated(nn.Module):
    """A graph that computes in float64 and takes and gives float32.

    Args:
        graph: a traced model; its parameters, buffers and numbers that it makes are converted.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        for node in graph.graph.nodes:
            node.args = map_aggregate(node.args, _widened)
            node.kwargs = map_aggregate(node.kwargs, _widened)
        graph.recompile()
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


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


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


def _few(batch: Batch) -> Batch:
    """The batch with `EXAMPLE_SAMPLES` samples, its first ones, repeated where it has fewer."""
    count = sample_count(batch)
    index = torch.arange(EXAMPLE_SAMPLES) % count
    return map_tensors(batch, lambda x: x[index.to(x.device)].cpu() if x.dim() and x.shape[0] == count else x.cpu())
