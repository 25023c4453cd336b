"""The HTML report: a `Summary` in one file that loads nothing else, for any browser, dark and light, paper too.

The templates beside this file are the page: `page.html` says in which order things come, `charts.html` draws, `page.css` and `page.js` go
into the page as they are. Whatever comes from a model or a user is escaped; the browser runs the one script whose digest the page names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from subbyte.report.frontier_chart import frontier_chart
from subbyte.report.layer_charts import HeatCell, bits_chart, bytes_chart, error_chart, heat_map
from subbyte.report.stored import as_data
from subbyte.report.summary import Summary

DIGITS = 6  # of the numbers in the page's JSON
QUANTITIES = {
    "bytes": "bytes of the packed file",
    "size": "bytes of the packed file",
    "average_bits": "bits a weight on average",
    "bit_operations": "bit operations of one sample",
    "latency": "seconds, summed over the layers",
    "kl": "KL divergence on held-out samples",
    "relative_error": "relative squared error on held-out samples",
    "agreement": "predictions as the float model's, percent of held-out ones",
    "accuracy_drop": "fall of the given score",
    "degradation": "predicted loss",
}


def page(summary: Summary) -> str:
    """The page.

    Args:
        summary: of a run.

    Example:
        >>> import subbyte, torch
        >>> float_model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> result = subbyte.quantize(float_model, torch.randn(64, 8), widths=subbyte.Widths(4, 4))
        >>> page(result.summary())[:15]
        '<!DOCTYPE html>'
    """
    planned = summary.planned
    return (
        _environment()
        .get_template("page.html")
        .render(
            summary=summary,
            bits=bits_chart(summary.layers),
            sizes=bytes_chart(summary.layers),
            errors=error_chart(summary.layers),
            frontier=None if planned is None else frontier_chart(planned),
            heat=None if planned is None else heat_map(planned),
            shares=shares([step.loss for step in summary.steps]),
            json=embedded(summary),
        )
    )


def embedded(summary: Summary) -> Markup:
    """A summary as JSON that can stand inside a script element: nothing in it can end the element.

    Args:
        summary: of a run.
    """
    text = json.dumps(as_data(summary, DIGITS), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def count(value: float) -> str:
    """A whole number.

    Args:
        value: to be written.

    Example:
        >>> count(171920), count(math.nan)
        ('171,920', 'not known')
    """
    return f"{value:,.0f}" if math.isfinite(value) else "not known"


def figure(value: float | None, digits: int = 4) -> str:
    """A number as the receipt has it.

    Args:
        value: to be written; None is written as a dash.
        digits: that count.

    Example:
        >>> figure(0.00112812), figure(None), figure(math.inf)
        ('0.001128', '–', '∞')
    """
    if value is None:
        return "–"
    return "∞" if value == math.inf else "NaN" if math.isnan(value) else f"{value:,.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def shares(values: Sequence[float]) -> list[float]:
    """Numbers as parts of the largest finite one; what is not finite is as long as that.

    Args:
        values: not negative.

    Example:
        >>> shares([2.0, 1.0, math.nan])
        [1.0, 0.5, 1.0]
    """
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    return [value / largest if math.isfinite(value) and largest > 0 else float(not math.isfinite(value)) for value in values]


def quantity(name: str) -> str:
    """What a limit's name means.

    Args:
        name: of a limit, or of what is made smallest.

    Example:
        >>> quantity("average_bits")
        'bits a weight on average'
    """
    return QUANTITIES.get(name, name)


def cells_by_level(cells: Sequence[HeatCell], height: float) -> dict[int, str]:
    """One path for all cells of a level, so that a thousand layers make no larger a page than they must.

    Args:
        cells: of a heat map.
        height: of each.

    Example:
        >>> from subbyte.report.layer_charts import Column
        >>> cells_by_level([HeatCell(Column(84.0, 89.0, 10.0, ""), 14.0, 2, False, "")], 24.0)
        {2: 'M84 14h10v24h-10z'}
    """
    found: dict[int, list[str]] = {}
    for cell in cells:
        found.setdefault(cell.level, []).append(
            f"M{cell.column.left:g} {cell.top:g}h{cell.column.width:g}v{height:g}h-{cell.column.width:g}z"
        )
    return {level: "".join(parts) for level, parts in sorted(found.items())}


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("subbyte.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"count": count, "figure": figure, "quantity": quantity}
    style, script = (resources.files("subbyte.report").joinpath("templates", name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {"style": Markup(style), "script": Markup(script), "digest": digest, "cells_by_level": cells_by_level}  # noqa: S704
    return made
