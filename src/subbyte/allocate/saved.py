"""The market as a JSON document, so that another budget can be answered without the model, the data or any measuring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subbyte.allocate.allocation import Market
from subbyte.allocate.cost import Costs, LayerSize
from subbyte.allocate.sensitivity import Sensitivity
from subbyte.errors import FileError
from subbyte.run.files import write_file
from subbyte.widths import Option

MARKET_FILE = "market.json"


def save_market(folder: Path, market: Market) -> None:
    """Write a market into a run folder, whole or not at all.

    Args:
        folder: of the run.
        market: what there is to choose from.

    Raises:
        FileError: if it cannot be written.
    """
    write_file(folder / MARKET_FILE, json.dumps(market_data(market), indent=1).encode())


def load_market(folder: Path) -> Market:
    """The market of a run folder.

    Args:
        folder: of the run.

    Raises:
        FileError: if it holds none, or a damaged one.

    Example:
        >>> load_market(Path("missing"))
        Traceback (most recent call last):
        subbyte.errors.FileError: 'missing' holds no 'market.json'; 'subbyte quantize --size ... --out missing/' makes one
    """
    path = folder / MARKET_FILE
    if not path.is_file():
        raise FileError(f"'{folder}' holds no '{MARKET_FILE}'; 'subbyte quantize --size ... --out {folder}/' makes one")
    try:
        return market_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"'{path}' is damaged ({error!r}); remove it and quantize again, from the bank") from error


def market_data(market: Market) -> dict[str, Any]:
    """A market as numbers and texts.

    Args:
        market: what there is to choose from.
    """
    table, costs = market.sensitivity, market.costs
    return {
        "loss": table.loss_name,
        "method": table.method,
        "sensitivity": {name: _rows(row) for name, row in table.losses.items()},
        "layers": {name: asdict(size) for name, size in costs.layers.items()},
        "constant_bytes": costs.constant_bytes,
        "float_bytes": costs.float_bytes,
        "seconds": None if costs.seconds is None else {name: _rows(row) for name, row in costs.seconds.items()},
        "options": {name: [list(option) for option in row] for name, row in market.options.items()},
        "groups": [list(group) for group in market.groups],
    }


def market_from(data: Mapping[str, Any]) -> Market:
    """The inverse of `market_data`.

    Args:
        data: numbers and texts.
    """
    losses = {name: _row(rows) for name, rows in data["sensitivity"].items()}
    seconds = None if data["seconds"] is None else {name: _row(rows) for name, rows in data["seconds"].items()}
    sizes = {name: LayerSize(**size) for name, size in data["layers"].items()}
    options = {name: tuple(_option(option) for option in row) for name, row in data["options"].items()}
    costs = Costs(sizes, data["constant_bytes"], data["float_bytes"], seconds)
    return Market(Sensitivity(losses, data["loss"], data["method"]), costs, options, tuple(tuple(group) for group in data["groups"]))


def _rows(row: Mapping[Option, float]) -> list[list[Any]]:
    return [[*option, value] for option, value in row.items()]


def _row(rows: list[list[Any]]) -> dict[Option, float]:
    return {_option(numbers[:2]): float(numbers[2]) for numbers in rows}


def _option(numbers: list[Any]) -> Option:
    weight_bits, activation_bits = numbers
    return int(weight_bits), None if activation_bits is None else int(activation_bits)
