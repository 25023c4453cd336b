"""Adding operators and constants to an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Builder:
    """Collects new nodes; a constant that is asked for twice is stored once.

    Args:
        graph: gets the constants at once, the nodes by `place_`.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._count = 0

    def constant(self, array: npt.NDArray[Any] | np.generic) -> ir.Value:
        """An initialiser.

        Args:
            array: its numbers, any shape.
        """
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self._name()
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)  # type: ignore[union-attr]
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def add(self, operator: str, *inputs: ir.Value | None, **attributes: int | float | Sequence[int]) -> ir.Value:
        """One operator with one output.

        Args:
            operator: of the standard domain.
            inputs: its inputs; None for one that is left out.
            attributes: its attributes.
        """
        return self.add_many(operator, list(inputs), 1, **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes: int | float | Sequence[int]
    ) -> Sequence[ir.Value]:
        """One operator with several outputs.

        Args:
            operator: of the standard domain.
            inputs: its inputs; None for one that is left out.
            outputs: how many.
            attributes: its attributes.
        """
        node = ir.node(operator, inputs, attributes=attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = self._name()
        self.nodes.append(node)
        return node.outputs

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """A value in another type.

        Args:
            value: to convert.
            to: the type.
        """
        return self.add("Cast", value, to=int(to))

    def place_(self, before: ir.Node) -> None:
        """Put the collected nodes into the graph.

        Args:
            before: the node that they come before.
        """
        self.graph.insert_before(before, self.nodes)
        self.nodes = []

    def _name(self) -> str:
        self._count += 1
        return f"subbyte_{self._count}"
