"""The options that several commands share, and how their text becomes the library's values."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from subbyte import Flavour, Widths
from subbyte.errors import FileError, OptionError
from subbyte.tasks import ChannelOrder, Preprocessing
from subbyte.widths import Option

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SOURCE",
        help="FILE.py:NAME or package.module:NAME: code, and it is run; see above. Or hf:FOLDER, of transformers.",
    ),
]
OptionalModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="SOURCE", help="FILE.py:NAME or package.module:NAME, code that is run. An .onnx file needs none."),
]
DATA_HELP = "Folder of images, a .npy, .npz or .safetensors file, samples first; or texts, .txt, .jsonl or .tsv, for hf:FOLDER."
DataOption = Annotated[Path, typer.Option("--data", metavar="PATH", help=DATA_HELP)]
OptionalDataOption = Annotated[Path | None, typer.Option("--data", metavar="PATH", help=DATA_HELP)]
KeyOption = Annotated[
    str | None, typer.Option("--key", metavar="NAME", help="Array in a file of several, otherwise 'x'; entry or column of texts.")
]
SamplesOption = Annotated[int | None, typer.Option("--samples", metavar="N", help="Use so many samples, evenly spaced; otherwise all.")]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="Texts: cut longer ones. Default what the model takes.")
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples in one forward.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", metavar="N", help="Processor threads; otherwise what torch takes.")]
ImageSizeOption = Annotated[
    str | None, typer.Option("--image-size", metavar="N|HxW", help="Images: scale to cover this size, cut to the middle.")
]
MeanOption = Annotated[str | None, typer.Option("--mean", metavar="A,B,C", help="Images: subtracted, one number a channel. Default 0.")]
StdOption = Annotated[str | None, typer.Option("--std", metavar="A,B,C", help="Images: divided by, one number a channel. Default 1.")]
ChannelOrderOption = Annotated[
    ChannelOrder | None, typer.Option("--channel-order", help="Images: order that the model takes. Default rgb.")
]
ValueRangeOption = Annotated[
    float | None, typer.Option("--value-range", metavar="1|255", help="Images: brightest value before mean and std. Default 1.")
]
IncludeOption = Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="Quantize only these layers; repeatable.")]
ExcludeOption = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Leave these layers in float32; repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, also for errors.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

WeightBitsOption = Annotated[int | None, typer.Option("--weight-bits", metavar="2..8", help="Bits of the weights. Default 8.")]
ActivationBitsOption = Annotated[
    str | None,
    typer.Option(
        "--activation-bits",
        metavar="2..8|none",
        help="Bits of the layers' inputs; 'none' leaves them in float32. Default 8, of the recipe weight-only none.",
    ),
]
KeepOption = Annotated[list[str] | None, typer.Option("--keep-8bit", metavar="NAME", help="Give this layer 8 bits; repeatable, globs too.")]
PinOption = Annotated[
    list[str] | None,
    typer.Option("--pin", metavar="NAME=W[,A]", help="Other widths for a layer; repeatable, globs too, the last one wins."),
]
SymmetricOption = Annotated[
    bool, typer.Option("--symmetric/--affine", help="Weights without zero-points, or up to 6 bits with one for each step.")
]
GroupSizeOption = Annotated[
    int | None,
    typer.Option("--group-size", metavar="N", help="Linear layers: one weight step for every N inputs, such as 64; otherwise for all."),
]
AttentionBitsOption = Annotated[
    int | None, typer.Option("--attention-bits", metavar="2..8", help="hf: models: bits of attention's factors; otherwise float32.")
]
FlavourOption = Annotated[
    Flavour | None,
    typer.Option(
        "--flavour",
        help="Calibrate on what the quantized layers before give, or on float inputs; hybrid: codes on these. Default sequential.",
    ),
]


SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of everything random; the same seed gives the same bits.")]
OutOption = Annotated[
    str,
    typer.Option("--out", metavar="FILE|RUN/", help="The packed file, usually NAME.subbyte.safetensors; or a run folder, 'run/'."),
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Also write an HTML page that shows the run, usually report.html.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]

LabelsOption = Annotated[
    Path | None,
    typer.Option("--labels", metavar="PATH", help=".npy, .npz or .safetensors of class indices; .csv, .tsv or .jsonl with 'label'."),
]
LabelsKeyOption = Annotated[
    str | None,
    typer.Option("--labels-key", metavar="NAME", help="Array or column of the labels; otherwise the only array or 'y', 'label'."),
]
PackedOption = Annotated[
    Path | None, typer.Option("--packed", metavar="FILE", help="Compare with this packed file of the model, or with this .onnx file.")
]
OutputOption = Annotated[
    str | None, typer.Option("--output", metavar="NAME", help="Entry of the model's output that holds the logits, if it returns several.")
]
InputShapeOption = Annotated[
    str | None, typer.Option("--input-shape", metavar="1,3,224,224", help="Run on random numbers of this shape instead of --data.")
]


def widths_from(
    weight_bits: int | None,
    activation_bits: str,
    keep: Sequence[str] | None,
    pins: Sequence[str] | None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Widths:
    """Widths of what the options say; `--pin` wins over `--keep-8bit`.

    Args:
        weight_bits: as given; None: 8.
        activation_bits: a number or ``none``.
        keep: names or globs of layers at 8 bits.
        pins: ``NAME=W`` or ``NAME=W,A``.
        include: globs of the only layers to quantize; None or none means all.
        exclude: globs of layers to leave out.

    Raises:
        OptionError: if a text cannot be read, or a width is outside 2 to 8.

    Example:
        >>> widths_from(4, "none", ["conv1"], ["fc=8,6", "up=3"]).pinned
        {'conv1': (8, None), 'fc': (8, 6), 'up': (3, None)}
    """
    activation = bits_or_none("--activation-bits", activation_bits)
    pinned = pins_from(keep, pins, float_inputs=activation is None)
    return Widths(8 if weight_bits is None else weight_bits, activation, pinned, include=include or ("*",), exclude=exclude or ())


def pins_from(keep: Sequence[str] | None, pins: Sequence[str] | None, *, float_inputs: bool) -> dict[str, int | Option]:
    """Pinned widths by name or glob.

    Args:
        keep: names or globs of layers at 8 bits.
        pins: ``NAME=W`` or ``NAME=W,A``.
        float_inputs: whether inputs stay in float32 where a pin does not say otherwise.

    Raises:
        OptionError: if a text cannot be read.

    Example:
        >>> pins_from(["conv1"], ["fc=4,8"], float_inputs=False)
        {'conv1': (8, 8), 'fc': (4, 8)}
    """
    pinned: dict[str, int | Option] = {name: (8, None if float_inputs else 8) for name in keep or ()}
    for pin in pins or ():
        name, _, text = pin.rpartition("=")
        weight, _, inputs = text.partition(",")
        if not name or not weight:
            raise OptionError(f"--pin '{pin}' is not NAME=W or NAME=W,A, such as fc=8 or fc=8,none")
        bits = bits_or_none(f"--pin '{pin}'", weight)
        if bits is None:
            raise OptionError(f"--pin '{pin}': weights have 2 to 8 bits; --exclude leaves a layer in float32")
        same = None if float_inputs else bits
        pinned.pop(name, None)  # so that the last one wins over globs before it, too
        pinned[name] = (bits, bits_or_none(f"--pin '{pin}'", inputs) if inputs else same)
    return pinned


def preprocessing_from(
    size: str | None, mean: str | None, std: str | None, channel_order: ChannelOrder | None, value_range: float | None
) -> Preprocessing | None:
    """What becomes of images before the model sees them; None if no option says anything.

    Args:
        size: ``N`` or ``HxW``.
        mean: numbers between commas.
        std: numbers between commas.
        channel_order: as given.
        value_range: as given.

    Raises:
        OptionError: if a text cannot be read, or the numbers do not fit together.

    Example:
        >>> preprocessing_from("32x24", "0.5", None, None, None)
        Preprocessing(size=(32, 24), mean=(0.5,), std=(1.0,), channel_order=<ChannelOrder.RGB: 'rgb'>, value_range=1.0)
    """
    if size is None and mean is None and std is None and channel_order is None and value_range is None:
        return None
    plain = Preprocessing()
    means, stds = _floats("--mean", mean), _floats("--std", std)
    return Preprocessing(
        size=None if size is None else _size(size),
        mean=means or (0.0,) * len(stds or plain.mean),
        std=stds or (1.0,) * len(means or plain.std),
        channel_order=channel_order or plain.channel_order,
        value_range=plain.value_range if value_range is None else value_range,
    )


def shape_from(text: str) -> tuple[int, ...]:
    """A shape of whole numbers between commas or ``x``.

    Args:
        text: for example ``1,3,224,224``.

    Raises:
        OptionError: if it is none.

    Example:
        >>> shape_from("1x3x8x8")
        (1, 3, 8, 8)
    """
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)*", text):
        raise OptionError(f"--input-shape '{text}' is no shape; write for example 1,3,224,224, samples first")
    return tuple(int(part) for part in re.split("[,x]", text))


def check_free(path: Path, *, force: bool) -> None:
    """Refuse an output file that could not be written later on, or that would replace another.

    Args:
        path: of the file to come.
        force: whether it may replace a file.

    Raises:
        FileError: if it exists and `force` is not set, if it is a folder, or if its folder does not exist or cannot be written.

    Example:
        >>> check_free(Path("missing/model.subbyte.safetensors"), force=False)
        Traceback (most recent call last):
        subbyte.errors.FileError: cannot write 'missing/model.subbyte.safetensors': there is no folder 'missing'; create it first
    """
    try:
        if path.is_dir():
            raise FileError(f"cannot write '{path}': it is a folder; name a file")
        if not path.parent.is_dir():
            raise FileError(f"cannot write '{path}': there is no folder '{path.parent}'; create it first")
        if path.exists() and not force:
            raise FileError(f"'{path}' exists; choose another path, or replace it with --force")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot write '{path}': {error.strerror or error}; choose a path in a folder that can be written") from error


def new_folder(folder: Path) -> Path:
    """A run folder, made if it is not there.

    Args:
        folder: of the run; the folder around it exists.

    Raises:
        FileError: if it cannot be made.

    Example:
        >>> new_folder(Path("missing/run"))
        Traceback (most recent call last):
        subbyte.errors.FileError: cannot make the folder 'missing/run': No such file or directory
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder '{folder}': {error.strerror or error}") from error
    return folder


def check_positive(option: str, number: int | None) -> None:
    """Refuse a count below 1.

    Args:
        option: its name, for the message.
        number: as given; None passes.

    Raises:
        OptionError: if it is below 1.

    Example:
        >>> check_positive("--batch-size", 0)
        Traceback (most recent call last):
        subbyte.errors.OptionError: --batch-size is at least 1, not 0
    """
    if number is not None and number < 1:
        raise OptionError(f"{option} is at least 1, not {number}")


def set_threads_(threads: int | None) -> None:
    """Let torch use so many processor threads, from now on.

    Args:
        threads: None leaves torch as it is.

    Raises:
        OptionError: if it is below 1.
    """
    check_positive("--threads", threads)
    if threads is not None:
        torch.set_num_threads(threads)


def bits_or_none(option: str, text: str) -> int | None:
    """Bits, or None for ``none``.

    Args:
        option: its name, for the message.
        text: as given.

    Raises:
        OptionError: if it is neither.

    Example:
        >>> bits_or_none("--activation-bits", "none"), bits_or_none("--activation-bits", "4")
        (None, 4)
    """
    if text.strip().lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"{option} is a number from 2 to 8 or 'none', not '{text}'") from None


def _floats(option: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{option} is numbers between commas, such as 0.485,0.456,0.406, not '{text}'") from None


def _size(text: str) -> int | tuple[int, int]:
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if sides is None:
        raise OptionError(f"--image-size is pixels, N or HxW such as 224 or 192x256, not '{text}'")
    return int(sides[1]) if sides[2] is None else (int(sides[1]), int(sides[2]))
