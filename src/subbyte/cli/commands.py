"""The commands, each one or two public functions of the library."""

# ruff: noqa: PLR0913 - a command's parameters are the user's options

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from torch import nn

import subbyte
from subbyte import Choices
from subbyte.allocate.allocation import allocate
from subbyte.allocate.frontier import frontier
from subbyte.allocate.saved import load_market
from subbyte.budget import Quantity
from subbyte.cli.budget_options import (
    PACKED_NAME,
    ActivationChoicesOption,
    AverageBitsOption,
    BestEffortOption,
    BytesOption,
    ClassifierOption,
    FrontierOption,
    MaxErrorOption,
    MaxKLOption,
    MaxLatencyOption,
    MaxPredictedOption,
    MinAgreementOption,
    MinimizeOption,
    RunArgument,
    SizeOption,
    WeightChoicesOption,
    budget_from,
    choices_from,
    is_run_folder,
    seconds_of,
)
from subbyte.cli.evaluation import compared, compared_tokens, logits_of
from subbyte.cli.export_options import RunsOnOption, target_from, widths_on
from subbyte.cli.inputs import DataOptions, load_inputs, wanted_labels
from subbyte.cli.model_source import HUB, opened_model
from subbyte.cli.options import (
    ActivationBitsOption,
    AttentionBitsOption,
    BatchSizeOption,
    ChannelOrderOption,
    DataOption,
    DebugOption,
    ExcludeOption,
    FlavourOption,
    ForceOption,
    GroupSizeOption,
    ImageSizeOption,
    IncludeOption,
    InputShapeOption,
    JsonOption,
    KeepOption,
    KeyOption,
    LabelsKeyOption,
    LabelsOption,
    MaxTokensOption,
    MeanOption,
    ModelOption,
    OptionalDataOption,
    OptionalModelOption,
    OutOption,
    OutputOption,
    PackedOption,
    PinOption,
    ReportOption,
    SamplesOption,
    SeedOption,
    StdOption,
    SymmetricOption,
    ThreadsOption,
    ValueRangeOption,
    WeightBitsOption,
    check_free,
    check_positive,
    new_folder,
    preprocessing_from,
    set_threads_,
    shape_from,
    widths_from,
)
from subbyte.cli.recipe_names import RecipeName, RecipeOption, inputs_of, recipe_from
from subbyte.cli.show import allocation_text, as_json, evaluation_text, frontier_text, result_data, survey_data, survey_text
from subbyte.errors import OptionError
from subbyte.export.onnx_model import OnnxModel
from subbyte.export.pretrained import is_causal, open_tokenizer
from subbyte.model.batches import DEFAULT_BATCH_SIZE
from subbyte.model.fold import fold_batch_norms_
from subbyte.model.layers import check_model, survey
from subbyte.model.replace import copy_of
from subbyte.model.state import state_bytes
from subbyte.run.terminal import progress

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(short_help="Quantize a trained model and write the packed file.")
def quantize(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    weight_bits: WeightBitsOption = None,
    activation_bits: ActivationBitsOption = None,
    keep_8bit: KeepOption = None,
    pin: PinOption = None,
    size: SizeOption = None,
    bytes_limit: BytesOption = None,
    average_bits: AverageBitsOption = None,
    max_kl: MaxKLOption = None,
    min_agreement: MinAgreementOption = None,
    max_error: MaxErrorOption = None,
    max_latency: MaxLatencyOption = None,
    minimize: MinimizeOption = None,
    target: RunsOnOption = None,
    weight_choices: WeightChoicesOption = None,
    activation_choices: ActivationChoicesOption = None,
    classifier: ClassifierOption = False,  # noqa: FBT002
    best_effort: BestEffortOption = False,  # noqa: FBT002
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
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
    symmetric: SymmetricOption = False,  # noqa: FBT002 - the command line gives it by name
    group_size: GroupSizeOption = None,
    attention_bits: AttentionBitsOption = None,
    flavour: FlavourOption = None,
    recipe_name: RecipeOption = RecipeName.DEFAULT,
    report: ReportOption = None,
    force: ForceOption = False,  # noqa: FBT002
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002 - read by `program.main`
) -> None:
    """Quantize a trained model with a few hundred unlabeled samples, and write the packed file.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the trained model (a torch.nn.Module), which is
    then put into evaluation mode. Progress goes to stderr, the receipt to stdout. Files are written at the very end, whole or not at all.
    """
    recipe = recipe_from(recipe_name, flavour, (group_size, attention_bits), symmetric=symmetric)
    choices = choices_from(recipe.choices, (weight_choices, activation_choices), keep_8bit, pin, include, exclude)
    limits = {"size": size, "bytes": bytes_limit, "average_bits": average_bits, "kl": max_kl, "agreement": min_agreement}
    limits |= {"relative_error": max_error, "latency": seconds_of(max_latency)}
    runs_on = None if target is None else target_from(target)
    budget = budget_from(limits, minimize, choices, runs_on, best_effort=best_effort, classifier=classifier)
    if budget is not None and (weight_bits is not None or activation_bits is not None):
        raise OptionError("a budget chooses the widths; --weight-choices and --activation-choices say among which, --pin fixes a layer's")
    inputs = inputs_of(recipe) if activation_bits is None else activation_bits
    widths = widths_from(weight_bits, inputs, keep_8bit, pin, include, exclude) if budget is None else None
    if widths is not None and runs_on is not None:
        widths_on(widths, runs_on)
    preprocessing = preprocessing_from(image_size, mean, std, channel_order, value_range)
    check_positive("--batch-size", batch_size)
    set_threads_(threads)
    run = Path(out) if is_run_folder(out) else None
    packed = Path(out) if run is None else new_folder(run) / PACKED_NAME
    outputs = [packed] if report is None else [packed, report]
    for path in outputs:
        check_free(path, force=force)
    with opened_model(model) as float_model, progress() as observer:
        batches = load_inputs(model, float_model, data, DataOptions(preprocessing, key, samples, batch_size, most_tokens)).batches
        bank = subbyte.Bank(run)
        result = subbyte.quantize(
            float_model, batches, widths=widths, budget=budget, recipe=recipe, seed=seed, observer=observer, bank=bank
        )
        for path in outputs:
            check_free(path, force=force)
        size_bytes = result.save(packed)
        if report is not None:
            result.write_report(report)
        if run is not None and model.startswith(HUB):
            result.save_pretrained(run, open_tokenizer(model.removeprefix(HUB)))
    if as_json_object:
        typer.echo(as_json(result_data(result, packed, size_bytes) | {"report": None if report is None else str(report)}))
    else:
        typer.echo(f"{result}\nwrote {packed}, {size_bytes:,} bytes" + ("" if report is None else f"\nwrote {report}"))


@app.command(short_help="Answer another budget from a run's measurements.")
def solve(
    run: RunArgument,
    size: SizeOption = None,
    bytes_limit: BytesOption = None,
    average_bits: AverageBitsOption = None,
    max_latency: MaxLatencyOption = None,
    max_predicted: MaxPredictedOption = None,
    minimize: MinimizeOption = None,
    list_frontier: FrontierOption = False,  # noqa: FBT002
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """Answer another budget from a run's measurements, in seconds: which widths, how many bytes, what degradation is predicted.

    Nothing is measured: 'quantize' with the same --model, --data and --out RUN/ and the new budget makes the model, and reuses what the run
    has solved and measured.
    """
    market = load_market(run)
    if list_frontier:
        points = frontier(market)
        typer.echo(as_json({"frontier": [asdict(point) for point in points]}) if as_json_object else frontier_text(points))
        return
    limits: dict[str, float | None] = {"size": size, "bytes": bytes_limit, "average_bits": average_bits}
    limits["latency"] = seconds_of(max_latency)
    if max_predicted is not None and all(limit is None for limit in limits.values()):
        limits["size"] = 1.0
        minimize = minimize or Quantity.SIZE
    budget = budget_from(limits, minimize, Choices(), market.costs.seconds, best_effort=False)
    if budget is None:
        raise OptionError("give a budget, such as --size 0.1, or --frontier to list them all")
    allocation = allocate(market, budget, max_predicted)
    typer.echo(as_json(asdict(allocation)) if as_json_object else allocation_text(allocation, market))


@app.command(short_help="List the layers, and what is left out and why.")
def inspect(
    model: ModelOption,
    data: OptionalDataOption = None,
    input_shape: InputShapeOption = None,
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
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """List the layers that can be quantized, in running order, and what is left out and why.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the model (a torch.nn.Module), which is then
    put into evaluation mode and run on one batch: of --data, or of random numbers of --input-shape.
    """
    if (data is None) == (input_shape is None):
        raise OptionError("give either --data or --input-shape: the layers are found by running the model once")
    preprocessing = preprocessing_from(image_size, mean, std, channel_order, value_range)
    with opened_model(model) as float_model:
        check_model(float_model)
        if data is not None:
            read = DataOptions(preprocessing, key, samples, samples or DEFAULT_BATCH_SIZE, most_tokens)
            batch = load_inputs(model, float_model, data, read).batches[0]
        else:
            batch = torch.randn(shape_from(input_shape or ""), generator=torch.Generator().manual_seed(0))
        found, _ = survey(float_model, [batch], include or ("*",), exclude or ())
        folds = fold_batch_norms_(copy_of(float_model), found.multiplying, [batch])
    typer.echo(as_json(survey_data(found, folds)) if as_json_object else survey_text(found, folds))


@app.command(short_help="Score the float model and the quantized one.")
def evaluate(
    data: DataOption,
    model: OptionalModelOption = None,
    labels: LabelsOption = None,
    packed: PackedOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    channel_order: ChannelOrderOption = None,
    value_range: ValueRangeOption = None,
    key: KeyOption = None,
    labels_key: LabelsKeyOption = None,
    output: OutputOption = None,
    samples: SamplesOption = None,
    most_tokens: MaxTokensOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    threads: ThreadsOption = None,
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """Score the float model and, with --packed, the quantized one: top-1, agreement, KL divergence in nats, bytes.

    SOURCE is Python code, and it is run: NAME in it is called without arguments and returns the trained model (a torch.nn.Module), which is
    then put into evaluation mode. An .onnx file holds its program and is scored without --model, by its --labels. Without --labels there is
    no top-1.
    """
    if model is None and (packed is None or packed.suffix != ".onnx"):
        raise OptionError("only an .onnx file holds its program; give --model, the Python code that builds the float model")
    if labels is None and (packed is None or model is None) and not (model or "").startswith(HUB):
        raise OptionError("give --labels, --packed or both, without --model --labels: otherwise there is nothing to measure")
    check_positive("--batch-size", batch_size)
    set_threads_(threads)
    preprocessing = preprocessing_from(image_size, mean, std, channel_order, value_range)
    with contextlib.ExitStack() as stack:
        float_model = None if model is None else stack.enter_context(opened_model(model))
        if float_model is not None:
            check_model(float_model)
        quantized = None if packed is None else _opened(packed, float_model)
        scored = quantized if float_model is None else float_model
        assert scored is not None
        inputs = load_inputs(model or "", scored, data, DataOptions(preprocessing, key, samples, batch_size, most_tokens))
        sizes = (None if float_model is None else state_bytes(float_model), None if packed is None else packed.stat().st_size)
        wanted = wanted_labels(labels, labels_key, samples, len(inputs.order))
        if float_model is not None and is_causal(float_model):
            measured = compared_tokens(float_model, quantized, inputs, sizes)
        else:
            reference, logits = (None if one is None else logits_of(one, inputs, output) for one in (float_model, quantized))
            measured = compared(reference, logits, wanted, sizes)
    typer.echo(as_json(asdict(measured)) if as_json_object else evaluation_text(measured))


def _opened(file: Path, float_model: nn.Module | None) -> nn.Module:
    """The model of an ONNX file, or of a packed file, which needs the float model."""
    if float_model is None or file.suffix == ".onnx":
        return OnnxModel(file)
    return subbyte.load(file, into=float_model)
