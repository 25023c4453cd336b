"""The three commands, each one or two public functions of the library."""

# ruff: noqa: PLR0913 - a command's parameters are the user's options

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from torch import Tensor

import subbyte
from subbyte.cli.evaluation import compared, logits_of
from subbyte.cli.model_source import opened_model
from subbyte.cli.options import (
    ActivationBitsOption,
    BatchSizeOption,
    ChannelOrderOption,
    DataOption,
    DebugOption,
    ExcludeOption,
    FlavourOption,
    ForceOption,
    IncludeOption,
    InputShapeOption,
    JsonOption,
    KeepOption,
    KeyOption,
    LabelsKeyOption,
    LabelsOption,
    MeanOption,
    ModelOption,
    OptionalDataOption,
    OutOption,
    OutputOption,
    PackedOption,
    PinOption,
    RoundingOption,
    SamplesOption,
    SeedOption,
    SizeOption,
    StdOption,
    SymmetricOption,
    ThreadsOption,
    ValueRangeOption,
    WeightBitsOption,
    check_free,
    check_positive,
    preprocessing_from,
    recipe_from,
    set_threads_,
    shape_from,
    widths_from,
)
from subbyte.cli.show import as_json, evaluation_text, result_data, survey_data, survey_text
from subbyte.errors import DataError, OptionError
from subbyte.export.packed import state_bytes
from subbyte.model.batches import DEFAULT_BATCH_SIZE
from subbyte.model.fold import fold_batch_norms_
from subbyte.model.layers import check_model, survey
from subbyte.model.replace import copy_of
from subbyte.run.terminal import progress
from subbyte.tasks import Preprocessing, load_labels, load_samples

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(short_help="Quantize a trained model and write the packed file.")
def quantize(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    weight_bits: WeightBitsOption = 8,
    activation_bits: ActivationBitsOption = "8",
    keep_8bit: KeepOption = None,
    pin: PinOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    size: SizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    channel_order: ChannelOrderOption = None,
    value_range: ValueRangeOption = None,
    key: KeyOption = None,
    samples: SamplesOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    symmetric: SymmetricOption = True,  # noqa: FBT002 - the command line gives it by name
    flavour: FlavourOption = None,
    rounding_only: RoundingOption = False,  # noqa: FBT002
    force: ForceOption = False,  # noqa: FBT002
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002 - read by `program.main`
) -> None:
    """Quantize a trained model with a few hundred unlabeled samples, and write the packed file.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the trained model (a torch.nn.Module), which is
    then put into evaluation mode. Progress goes to stderr, the receipt to stdout. The file is written at the very end, whole or not at all.
    """
    widths = widths_from(weight_bits, activation_bits, keep_8bit, pin, include, exclude)
    recipe = recipe_from(flavour, symmetric=symmetric, rounding_only=rounding_only)
    preprocessing = preprocessing_from(size, mean, std, channel_order, value_range)
    check_positive("--batch-size", batch_size)
    set_threads_(threads)
    check_free(out, force=force)
    with opened_model(model) as float_model, progress() as observer:
        batches = load_samples(data, preprocessing, limit=samples, key=key).split(batch_size)
        result = subbyte.quantize(float_model, batches, widths=widths, recipe=recipe, seed=seed, observer=observer)
        check_free(out, force=force)
        size_bytes = result.save(out)
    if as_json_object:
        typer.echo(as_json(result_data(result, out, size_bytes)))
    else:
        typer.echo(f"{result}\nwrote {out}, {size_bytes:,} bytes")


@app.command(short_help="List the layers, and what is left out and why.")
def inspect(
    model: ModelOption,
    data: OptionalDataOption = None,
    input_shape: InputShapeOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    size: SizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    channel_order: ChannelOrderOption = None,
    value_range: ValueRangeOption = None,
    key: KeyOption = None,
    samples: SamplesOption = DEFAULT_BATCH_SIZE,
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """List the layers that can be quantized, in running order, and what is left out and why.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the model (a torch.nn.Module), which is then
    put into evaluation mode and run on one batch: of --data, or of random numbers of --input-shape.
    """
    if (data is None) == (input_shape is None):
        raise OptionError("give either --data or --input-shape: the layers are found by running the model once")
    preprocessing = preprocessing_from(size, mean, std, channel_order, value_range)
    with opened_model(model) as float_model:
        check_model(float_model)
        if data is not None:
            batch = load_samples(data, preprocessing, limit=samples, key=key)
        else:
            batch = torch.randn(shape_from(input_shape or ""), generator=torch.Generator().manual_seed(0))
        found, _ = survey(float_model, [batch], include or ("*",), exclude or ())
        folds = fold_batch_norms_(copy_of(float_model), found.layers, [batch])
    typer.echo(as_json(survey_data(found, folds)) if as_json_object else survey_text(found, folds))


@app.command(short_help="Score the float model and the quantized one.")
def evaluate(
    model: ModelOption,
    data: DataOption,
    labels: LabelsOption = None,
    packed: PackedOption = None,
    size: SizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    channel_order: ChannelOrderOption = None,
    value_range: ValueRangeOption = None,
    key: KeyOption = None,
    labels_key: LabelsKeyOption = None,
    output: OutputOption = None,
    samples: SamplesOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    threads: ThreadsOption = None,
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """Score the float model and, with --packed, the quantized one: top-1, agreement, KL divergence in nats, bytes.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the trained model (a torch.nn.Module), which is
    then put into evaluation mode. Without --labels there is no top-1.
    """
    if labels is None and packed is None:
        raise OptionError("give --labels, --packed or both: otherwise there is nothing to measure")
    check_positive("--batch-size", batch_size)
    set_threads_(threads)
    preprocessing = preprocessing_from(size, mean, std, channel_order, value_range)
    with opened_model(model) as float_model:
        check_model(float_model)
        quantized = None if packed is None else subbyte.load(packed, into=float_model)
        inputs, wanted = _labelled(data, labels, preprocessing, samples, (key, labels_key))
        reference = logits_of(float_model, inputs, batch_size, output)
        logits = None if quantized is None else logits_of(quantized, inputs, batch_size, output)
    float_bytes = state_bytes(float_model)
    measured = compared(reference, logits, wanted, (float_bytes, None if packed is None else packed.stat().st_size))
    typer.echo(as_json(asdict(measured)) if as_json_object else evaluation_text(measured))


def _labelled(
    data: Path, labels: Path | None, preprocessing: Preprocessing | None, limit: int | None, keys: Sequence[str | None]
) -> tuple[Tensor, Tensor | None]:
    """Samples (samples, ...), and their labels int64 (samples,) if there are any."""
    wanted = None if labels is None else load_labels(labels, keys[1], limit=limit)
    inputs = load_samples(data, preprocessing, limit=limit, key=keys[0])
    if wanted is not None and len(wanted) != len(inputs):
        raise DataError(
            f"'{data}' holds {len(inputs)} samples, but '{labels}' {len(wanted)} labels: they must be as many, in the same order"
        )
    return inputs, wanted
