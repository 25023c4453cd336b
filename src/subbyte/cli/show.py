"""What commands print on stdout: columns for people, one JSON object for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subbyte import Exported, Profile, Result
from subbyte.allocate.allocation import Allocation, Market
from subbyte.allocate.sensitivity import option_text
from subbyte.cli.evaluation import Evaluation
from subbyte.model.fold import Fold
from subbyte.model.layers import Layer, Survey
from subbyte.plan import Plan
from subbyte.report.layer import still_float

__all__ = [
    "allocation_text",
    "as_json",
    "evaluation_text",
    "exported_data",
    "frontier_text",
    "plan_data",
    "profile_data",
    "profile_text",
    "result_data",
    "survey_data",
    "survey_text",
]


def as_json(data: Mapping[str, Any]) -> str:
    """One JSON object in one line; numbers that JSON does not know become null.

    Args:
        data: what `dataclasses.asdict` and the functions here give.

    Example:
        >>> as_json({"error": math.inf, "shape": (1, 2)})
        '{"error": null, "shape": [1, 2]}'
    """
    return json.dumps(_plain(data), allow_nan=False)


def result_data(result: Result, out: Path, size_bytes: int) -> dict[str, Any]:
    """A run as data: the receipt and everything that was chosen.

    Args:
        result: of the run.
        out: where the packed file is.
        size_bytes: of the packed file.
    """
    recipe = result.recipe
    return {
        "out": str(out),
        "size_bytes": size_bytes,
        "float_bytes": result.float_bytes,
        "layers": [asdict(layer) for layer in result.layers],
        "left_out": [asdict(left) for left in result.left_out],
        "folds": [asdict(fold) for fold in result.folds],
        "equalized": [{"source": one.source, "readers": one.readers} for one in result.equalized],
        "measured": asdict(result.measured),
        "refinements": [asdict(report) | {"kept": report.kept} for report in result.refinements],
        "loss": result.loss,
        "warnings": list(result.warnings),
        "widths": None if result.widths is None else asdict(result.widths),
        "plan": None if result.plan is None else plan_data(result.plan),
        "recipe": {
            "solver": recipe.solver.name,
            "flavour": recipe.flavour.value,
            "symmetric_weights": recipe.symmetric_weights,
            "weight_group": recipe.weight_group,
            "fold_batch_norms": recipe.fold_batch_norms,
            "refinements": [refinement.name for refinement in recipe.refinements],
        },
        "seed": result.seed,
        "seconds": result.seconds,
    }


def plan_data(plan: Plan) -> dict[str, Any]:
    """How a budget was met, as data.

    Args:
        plan: of the run.
    """
    return {
        "allocation": asdict(plan.allocation),
        "limits": plan.budget.cost_limits(plan.market.costs.float_bytes) | plan.budget.degradations,
        "missed": dict(plan.missed),
        "measured_loss": plan.measured_loss,
        "rounds": [asdict(one) | {"met": one.met} for one in plan.rounds],
        "sensitivity": {
            "loss": plan.sensitivity.loss_name,
            "method": plan.sensitivity.method,
            "losses": {name: {option_text(option): loss for option, loss in row.items()} for name, row in plan.sensitivity.losses.items()},
        },
    }


def allocation_text(allocation: Allocation, market: Market) -> str:
    """An allocation in columns, and what it costs.

    Args:
        allocation: what a budget chose.
        market: what it chose from.
    """
    rows = [("layer", "W", "A", "bytes", "sensitivity")]
    for name, (weight_bits, activation_bits) in allocation.options.items():
        option = (weight_bits, activation_bits)
        inputs = "-" if activation_bits is None else str(activation_bits)
        figures = f"{market.costs.layers[name].bytes(option):,}", f"{market.sensitivity.losses[name][option]:.2g}"
        rows.append((name, str(weight_bits), inputs, *figures))
    size, table = allocation.size_bytes, market.sensitivity
    latency = "" if allocation.latency is None else f"; layers take {1000 * allocation.latency:.3f} ms"
    proof = "proved optimal" if allocation.status == "optimal" else f"at most {allocation.gap:.3g} from the optimum ({allocation.status})"
    return "\n".join(
        [
            *_columns(rows, right=(1, 2, 3, 4)),
            f"packed file: {size:,} bytes, {market.costs.float_bytes / size:.2f} times smaller; "
            f"{allocation.average_bits:.2f} bits{latency}",
            f"predicted {table.loss_name}, not measured: {allocation.predicted:.4g}; {proof} in {allocation.seconds:.2f} s",
        ]
    )


def frontier_text(points: Sequence[Allocation]) -> str:
    """The best allocation for every size, in columns.

    Args:
        points: by increasing size.
    """
    rows = [("bytes", "bits a weight", "predicted", "widths in running order")]
    for point in points:
        widths = " ".join(f"{w}" if w == a else f"{w}/{'-' if a is None else a}" for w, a in point.options.values())
        rows.append((f"{point.size_bytes:,}", f"{point.average_bits:.2f}", f"{point.predicted:.4g}", widths))
    return "\n".join(_columns(rows, right=(0, 1, 2)))


def exported_data(exported: Exported) -> dict[str, Any]:
    """What was found about an exported file, as data.

    Args:
        exported: the file.
    """
    verification = exported.verification
    return asdict(verification) | {
        "out": str(exported.path),
        "speed": verification.speed,
        "float_layers": list(verification.float_layers),
        "quantizers": exported.quantizers,
        "loss_name": exported.loss_name,
        "loss": exported.loss,
        "model_loss": exported.model_loss,
        "predicted_milliseconds": exported.predicted_milliseconds,
        "warnings": list(exported.warnings),
    }


def profile_data(profile: Profile) -> dict[str, Any]:
    """Times of layers as data, in seconds.

    Args:
        profile: what was measured.
    """
    return {
        "target": profile.timing.target.name,
        "runtime": profile.runtime,
        "threads": profile.threads,
        "samples": profile.timing.batch_size,
        "layers": {
            name: {"float": asdict(profile.floats[name])} | {option_text(option): asdict(one) for option, one in row.items()}
            for name, row in profile.times.items()
        },
    }


def profile_text(profile: Profile) -> str:
    """Times of layers in columns, shortest ones in milliseconds, and their sums.

    Args:
        profile: what was measured.
    """
    options = list(dict.fromkeys(option for row in profile.times.values() for option in row))
    rows = [("layer", "float", *(option_text(option) for option in options))]
    for name, row in profile.times.items():
        known = (f"{1000 * row[option].least:.4f}" if option in row else "" for option in options)
        rows.append((name, f"{1000 * profile.floats[name].least:.4f}", *known))
    whole = [option for option in options if all(option in row for row in profile.times.values())]
    sums = (f"{1000 * profile.total(dict.fromkeys(profile.times, option)):.4f}" if option in whole else "" for option in options)
    rows.append(("sum", f"{1000 * sum(one.least for one in profile.floats.values()):.4f}", *sums))
    how = f"{profile.runtime}, {profile.threads} threads, {profile.timing.batch_size} samples"
    return "\n".join(
        [*_columns(rows, right=tuple(range(1, len(rows[0])))), f"milliseconds of each layer alone, shortest of repeated runs ({how})"]
    )


def survey_data(found: Survey, folds: Sequence[Fold]) -> dict[str, Any]:
    """A model's layers as data, in running order.

    Args:
        found: the layers.
        folds: batch norms that will be folded.
    """
    return {
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "input_shape": layer.input_shape,
                "weight_shape": layer.weight_shape,
                "weights": layer.weight_count,
                "macs": layer.macs,
                "calls": layer.calls,
                "other_names": layer.other_names,
                "tied_with": layer.tied_with,
            }
            for layer in found.layers
        ],
        "left_out": [asdict(left) for left in still_float(found, folds)],
        "folds": [asdict(fold) for fold in folds],
        "weights": sum(layer.weight_count for layer in found.layers),
        "macs": sum(layer.macs for layer in found.layers),
    }


def survey_text(found: Survey, folds: Sequence[Fold]) -> str:
    """A model's layers in columns, in running order, and what is left out and why.

    Args:
        found: the layers.
        folds: batch norms that will be folded.
    """
    rows = [("layer", "input", "weight", "weights", "MACs", "calls", "kind")]
    rows += [
        (
            layer.name,
            _shape(layer.input_shape),
            _shape(layer.weight_shape),
            f"{layer.weight_count:,}",
            f"{layer.macs:,}",
            str(layer.calls),
            _kind(layer),
        )
        for layer in found.layers
    ]
    weights, macs = sum(layer.weight_count for layer in found.layers), sum(layer.macs for layer in found.layers)
    rows.append((f"{len(found.layers)} layers", "", "", f"{weights:,}", f"{macs:,}", "", ""))
    lines = _columns(rows, right=(3, 4, 5))
    lines.append("MACs: multiply-accumulate operations for one sample")
    left_out = still_float(found, folds)
    if left_out:
        lines.append("stays in float32:")
        lines += [f"  {left.name} ({left.kind}, {left.parameters:,} parameters): {left.reason}" for left in left_out]
    if folds:
        lines.append(f"batch norms that will be folded: {', '.join(f'{fold.batch_norm} into {fold.layer}' for fold in folds)}")
    return "\n".join(lines)


def evaluation_text(measured: Evaluation) -> str:
    """An evaluation in columns.

    Args:
        measured: what to show.

    Example:
        >>> print(evaluation_text(Evaluation(500, 4000, 99.0, 500, 98.8, 99.4, 0.0123)))
                   top-1 %  agreement %      KL  bytes
        float        99.00                       4,000
        quantized    98.80        99.40  0.0123    500
        500 samples; the packed file is 8.00 times smaller
    """

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    score, form = ("perplexity", ".3f") if measured.float_perplexity is not None else ("top-1 %", ".2f")
    rows = [("", score, "agreement %", "KL", "bytes")]
    of_float = measured.float_top1 if measured.float_perplexity is None else measured.float_perplexity
    of_packed = measured.packed_top1 if measured.packed_perplexity is None else measured.packed_perplexity
    if measured.float_bytes is not None:
        rows.append(("float", number(of_float, form), "", "", f"{measured.float_bytes:,}"))
    last = f"{measured.samples} samples"
    if measured.packed_bytes is not None:
        figures = number(of_packed, form), number(measured.agreement, ".2f"), number(measured.kl, ".4f")
        rows.append(("quantized", *figures, f"{measured.packed_bytes:,}"))
    if measured.float_bytes is not None and measured.packed_bytes is not None:
        last += f"; the packed file is {measured.float_bytes / measured.packed_bytes:.2f} times smaller"
    return "\n".join([*_columns(rows, right=(1, 2, 3, 4)), last])


def _columns(rows: Sequence[tuple[str, ...]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:>{width}}" if column in right else f"{cell:{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _kind(layer: Layer) -> str:
    notes = [f"also {', '.join(layer.other_names)}"] if layer.other_names else []
    notes += [f"shares its weight with {', '.join(layer.tied_with)}"] if layer.tied_with else []
    return "; ".join([layer.kind, *notes])


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
