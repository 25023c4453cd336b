"""The whole method, top-down: one call a stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from subbyte.assemble import Assembler
from subbyte.budget import Budget
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.kept import Kept, run_digest
from subbyte.calibrate.loss import check_output
from subbyte.calibrate.whole import Judge
from subbyte.export.packed import LIBRARY_VERSION
from subbyte.model.arithmetic import exact_float32
from subbyte.model.attention import add_products_
from subbyte.model.batches import Batch, as_batches, probes
from subbyte.model.clipping import find_clips
from subbyte.model.equalize import Equalized, equalize_, scaled_norms
from subbyte.model.fold import Fold, fold_batch_norms_, norm_outputs
from subbyte.model.layers import Survey, check_model, survey
from subbyte.model.replace import copy_of
from subbyte.model.state import state_bytes, structure_of
from subbyte.plan import asked_for, carry_out
from subbyte.recipes import Recipe
from subbyte.report.layer import layer_report, still_float, warnings_for
from subbyte.report.stored import save_summary
from subbyte.result import Result
from subbyte.run.bank import Bank
from subbyte.run.events import Observer, Warned, ignore
from subbyte.widths import Option, Widths, as_rows, quantizes_inputs


@torch.inference_mode(mode=False)  # what is made here may meet a backward pass
@exact_float32()
def quantize(  # noqa: PLR0913 - the one door: every argument is a value of its own
    model: nn.Module,
    data: Tensor | Iterable[Batch],
    *,
    widths: Widths | None = None,
    budget: Budget | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - a frozen value
    seed: int = 0,
    observer: Observer = ignore,
    bank: Bank | None = None,
) -> Result:
    """Quantize a trained model with a few hundred unlabeled samples.

    Args:
        model: float32 model in evaluation mode; is not changed.
        data: calibration samples, a tensor (samples, ...) or an iterable of batches, each a tensor of any shape with samples along
            dimension 0, a tuple (positional arguments) or a mapping (keyword arguments).
        widths: bits of every layer; without widths and budget, 8 everywhere.
        budget: what to make smallest and what to keep within, in place of widths.
        recipe: how to quantize.
        seed: of everything that is drawn at random; the same seed gives the same bits.
        observer: is told what happens.
        bank: where solutions and sensitivities are kept, so that a stopped run goes on where it was and another budget starts from them;
            None keeps them in memory for this run. A folder also gets what a report needs, as `summary.json`.

    Returns:
        The quantized model and its receipt.

    Raises:
        OptionError: if widths or names cannot be served; an `InfeasibleError` names the limit that cannot be met and the nearest value.
        ModelError: if the model cannot be quantized as it is; a `LayerError` names the layer at fault.
        DataError: if the calibration data cannot be used.
        FileError: if the bank's folder cannot be written.

    Source:
        Hubara et al., arXiv 2006.10518, section 3, with the changes that docs/design.md names.

    Example:
        >>> import torch
        >>> float_model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
        >>> result = quantize(float_model, torch.randn(64, 3, 8, 8), widths=Widths(4, 4, pinned={"0": 8}))
        >>> result.allocation
        {'0': (8, 8), '4': (4, 4)}
    """
    started = time.perf_counter()
    asked, chosen = asked_for(widths, budget, recipe.choices)
    check_model(model)
    batches = as_batches(data)
    found, output = survey(model, batches, chosen.include, chosen.exclude)
    options = as_rows(chosen.of([layer.name for layer in found.layers]))
    check_output(output)

    original, folds, equalized = _float_model(model, found, recipe, options, batches)
    norms = scaled_norms(norm_outputs(model, folds), equalized)
    share = max(recipe.sampling.held_out, budget.held_out if budget is not None and budget.degradations else 0.0)
    calibration = CalibrationSet.drawn(batches, share, seed)
    kept = Kept(Bank() if bank is None else bank, run_digest(original, calibration, recipe.method, LIBRARY_VERSION))
    judge = Judge.of(original, calibration, recipe.loss)
    clips = find_clips(original, found.multiplying, probes(batches)) if recipe.behind_clips else {}
    assembler = Assembler(original, found.layers, clips, norms, calibration, recipe, kept, judge, observer)
    assembled, plan = carry_out(assembler, asked, folds, model)
    judged, measured = assembled.judged, assembled.measured
    result = Result(
        model=assembled.models.quantized,
        layers=tuple(layer_report(item, judged[item.layer.name], measured, found.shared) for item in assembled.models.layers),
        left_out=still_float(found, folds),
        folds=folds,
        equalized=equalized,
        measured=measured,
        refinements=assembled.refinements,
        warnings=_told(warnings_for(found, judged, measured, plan), observer),
        float_bytes=state_bytes(model),
        structure=structure_of(model),
        widths=asked if isinstance(asked, Widths) else None,
        plan=plan,
        recipe=recipe,
        seed=seed,
        seconds=time.perf_counter() - started,
        original=original,
        calibration=calibration,
    )
    _note_summary(result, kept.bank)
    return result


def _note_summary(result: Result, bank: Bank) -> None:
    if bank.run_folder is not None:
        save_summary(bank.run_folder, result.summary())


def _told(warnings: tuple[str, ...], observer: Observer) -> tuple[str, ...]:
    for text in warnings:
        observer(Warned(text))
    return warnings


def _float_model(
    model: nn.Module, found: Survey, recipe: Recipe, options: Mapping[str, Sequence[Option]], batches: Sequence[Batch]
) -> tuple[nn.Module, tuple[Fold, ...], tuple[Equalized, ...]]:
    """A copy that computes the same, with room for everything that the recipe quantizes beside layers; what was folded and equalized."""
    original = copy_of(model)
    if recipe.attention_bits is not None:
        add_products_(original, recipe.attention_bits, batches[0])
    folds = fold_batch_norms_(original, found.multiplying if recipe.fold_batch_norms else (), batches)
    if recipe.equalization is None or not quantizes_inputs(options):
        return original, folds, ()
    return original, folds, equalize_(original, found.multiplying, batches, options, recipe.equalization, recipe.weights)
