"""The commands for models that are to run somewhere: how long their layers take there, and their files."""

# ruff: noqa: PLR0913 - a command's parameters are the user's options

from __future__ import annotations

from pathlib import Path

import typer

import subbyte
from subbyte import RelativeSquaredError, RowSampling, Timing, WeightGrids
from subbyte.calibrate.gather import CalibrationSet
from subbyte.cli.budget_options import ActivationChoicesOption, WeightChoicesOption, choices_from
from subbyte.cli.commands import app
from subbyte.cli.export_options import (
    AllowFloatOption,
    ExportedPackedOption,
    FasterOption,
    OnnxOption,
    RunFolderOption,
    TargetName,
    TargetOption,
    TimedSamplesOption,
    target_from,
)
from subbyte.cli.inputs import DataOptions, load_inputs
from subbyte.cli.model_source import opened_model
from subbyte.cli.options import (
    BatchSizeOption,
    ChannelOrderOption,
    DataOption,
    DebugOption,
    ExcludeOption,
    ForceOption,
    GroupSizeOption,
    ImageSizeOption,
    IncludeOption,
    JsonOption,
    KeyOption,
    MaxTokensOption,
    MeanOption,
    ModelOption,
    SamplesOption,
    SeedOption,
    StdOption,
    SymmetricOption,
    ThreadsOption,
    ValueRangeOption,
    check_free,
    check_positive,
    new_folder,
    preprocessing_from,
    set_threads_,
)
from subbyte.cli.show import as_json, exported_data, profile_data, profile_text
from subbyte.export.onnx import Demands, Exportable, export_onnx
from subbyte.model.batches import DEFAULT_BATCH_SIZE, as_batches
from subbyte.model.layers import check_model
from subbyte.report.stored import keep_export
from subbyte.run.terminal import progress

__all__ = ["app"]


@app.command(short_help="Measure how long each layer takes at each of its widths.")
def profile(
    model: ModelOption,
    data: DataOption,
    out: RunFolderOption,
    target: TargetOption = TargetName.ONNXRUNTIME,
    timed_samples: TimedSamplesOption = 1,
    weight_choices: WeightChoicesOption = None,
    activation_choices: ActivationChoicesOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    channel_order: ChannelOrderOption = None,
    value_range: ValueRangeOption = None,
    key: KeyOption = None,
    samples: SamplesOption = DEFAULT_BATCH_SIZE,
    most_tokens: MaxTokensOption = None,
    threads: ThreadsOption = None,
    symmetric: SymmetricOption = False,  # noqa: FBT002
    group_size: GroupSizeOption = None,
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """Measure how long each layer takes at each of its widths, in the target's runtime on this machine, and keep it in a run folder.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the trained model (a torch.nn.Module), which is
    then put into evaluation mode. 'quantize --max-latency' with the same --out reuses what was measured.
    """
    set_threads_(threads)
    timing = Timing(target_from(target), threads, timed_samples, WeightGrids(symmetric, group_size))
    choices = choices_from(subbyte.Choices(), (weight_choices, activation_choices), None, None, include, exclude)
    preprocessing = preprocessing_from(image_size, mean, std, channel_order, value_range)
    bank = subbyte.Bank(new_folder(Path(out)))
    with opened_model(model) as float_model, progress() as observer:
        read = DataOptions(preprocessing, key, samples, samples or DEFAULT_BATCH_SIZE, most_tokens)
        batches = load_inputs(model, float_model, data, read).batches
        found = subbyte.profile(float_model, batches, timing, choices=choices, bank=bank, observer=observer)
    typer.echo(as_json(profile_data(found)) if as_json_object else profile_text(found))


@app.command(short_help="Write a packed file as ONNX, and check it by running it.")
def export(
    model: ModelOption,
    packed: ExportedPackedOption,
    data: DataOption,
    out: OnnxOption,
    target: TargetOption = TargetName.ONNXRUNTIME,
    require_faster: FasterOption = False,  # noqa: FBT002
    allow_float: AllowFloatOption = False,  # noqa: FBT002
    image_size: ImageSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    channel_order: ChannelOrderOption = None,
    value_range: ValueRangeOption = None,
    key: KeyOption = None,
    samples: SamplesOption = None,
    most_tokens: MaxTokensOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    force: ForceOption = False,  # noqa: FBT002
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """Write a packed file as an ONNX file of standard operators, and check it by running it.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the trained model (a torch.nn.Module), which is
    then put into evaluation mode. --data: what it was quantized with; sums and concatenations between layers get 8-bit grids from it, and
    an eighth of it is held out to compare the file with its simulation. The file is written whole or not at all.
    If the packed file lies in the run folder that it was made in, 'report' shows the check.
    """
    chosen, demands = target_from(target), Demands(faster=require_faster, int8=not allow_float, threads=threads)
    check_positive("--batch-size", batch_size)
    set_threads_(threads)
    check_free(out, force=force)
    preprocessing = preprocessing_from(image_size, mean, std, channel_order, value_range)
    with opened_model(model) as float_model:
        check_model(float_model)
        quantized = subbyte.load(packed, into=float_model)
        read = DataOptions(preprocessing, key, samples, batch_size, most_tokens)
        batches = as_batches(load_inputs(model, float_model, data, read).batches)
        calibration = CalibrationSet.drawn(batches, RowSampling().held_out, seed)
        exportable = Exportable(quantized, float_model, calibration, RelativeSquaredError())
        done = export_onnx(exportable, out, chosen, demands)
    keep_export(packed, done)
    typer.echo(as_json(exported_data(done)) if as_json_object else f"{done}\nwrote {out}")
