"""The whole method, top-down: one call a stage."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.loss import check_output
from subbyte.calibrate.models import prepare
from subbyte.calibrate.passes import calibrate_
from subbyte.calibrate.refinement import refine_guarded_
from subbyte.calibrate.rows import held_out_samples
from subbyte.calibrate.whole import Judge, guard_whole_
from subbyte.export.packed import state_bytes, structure_of
from subbyte.model.batches import Batch, as_batches, probes, sample_count
from subbyte.model.clipping import find_clips
from subbyte.model.fold import fold_batch_norms_, norm_outputs
from subbyte.model.layers import check_model, survey
from subbyte.model.replace import copy_of
from subbyte.recipes import Recipe
from subbyte.result import Result, layer_report, still_float, warnings_for
from subbyte.run.events import Observer, Warned, ignore
from subbyte.widths import Widths


@torch.inference_mode(mode=False)  # what is made here may meet a backward pass
def quantize(
    model: nn.Module,
    data: Tensor | Iterable[Batch],
    *,
    widths: Widths = Widths(),  # noqa: B008 - a frozen value
    recipe: Recipe = Recipe(),  # noqa: B008 - a frozen value
    seed: int = 0,
    observer: Observer = ignore,
) -> Result:
    """Quantize a trained model with a few hundred unlabeled samples.

    Args:
        model: float32 model in evaluation mode; is not changed.
        data: calibration samples, a tensor (samples, ...) or an iterable of batches, each a tensor of any shape with samples along
            dimension 0, a tuple (positional arguments) or a mapping (keyword arguments).
        widths: bits of every layer.
        recipe: how to quantize.
        seed: of everything that is drawn at random; the same seed gives the same bits.
        observer: is told what happens.

    Returns:
        The quantized model and its receipt.

    Raises:
        OptionError: if widths or names cannot be served.
        ModelError: if the model cannot be quantized as it is; a `LayerError` names the layer at fault.
        DataError: if the calibration data cannot be used.

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
    check_model(model)
    batches = as_batches(data)
    found, output = survey(model, batches, widths.include, widths.exclude)
    options = widths.of([layer.name for layer in found.layers])
    check_output(output)

    original = copy_of(model)
    folds = fold_batch_norms_(original, found.layers if recipe.fold_batch_norms else (), batches)
    clips = find_clips(original, found.layers, probes(batches))
    models = prepare(original, found.layers, options, clips, norm_outputs(model, folds), symmetric=recipe.symmetric_weights)
    held_out = held_out_samples([sample_count(batch) for batch in batches], recipe.sampling.held_out, seed)
    calibration = CalibrationSet(batches, held_out, seed)

    judged = calibrate_(models, calibration, recipe.method, recipe.flavour, observer)
    judge = Judge.of(models.original, calibration, recipe.loss)
    measured = guard_whole_(models, judged, judge, observer)
    refinements = refine_guarded_(models, recipe.refinements, calibration, judge, measured.loss, observer)

    warnings = warnings_for(found, judged, measured)
    for text in warnings:
        observer(Warned(text))
    return Result(
        model=models.quantized,
        layers=tuple(layer_report(item, judged[item.layer.name], measured) for item in models.layers),
        left_out=still_float(found, folds),
        folds=folds,
        measured=measured,
        refinements=refinements,
        warnings=warnings,
        float_bytes=state_bytes(model),
        structure=structure_of(model),
        widths=widths,
        recipe=recipe,
        seed=seed,
        seconds=time.perf_counter() - started,
    )
