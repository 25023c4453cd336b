"""The whole package in a minute: train a small network, quantize it at several widths, write the packed file, load it back; then let a
budget choose the widths, write an ONNX file, and an HTML report that shows all of it.

    python -m subbyte.tasks.demo          (or `make demo`)

Everything that is printed is measured in this run: accuracy on digits that neither training nor calibration has seen, and bytes of the file
as it lies on the disk.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import subbyte
from subbyte.model.batches import tensors
from subbyte.tasks.task import Task, digits

__all__ = ["main"]

FOLDER = Path("demo")
SAMPLES = 256
WIDTHS = (8, 4, 3, 2)
SHARE = 0.125
SHOWN = 4  # the width whose receipt and file are shown


def main(folder: Path = FOLDER) -> None:
    """Run the demo and print what it finds.

    Args:
        folder: where the files go; is made if it does not exist.

    Raises:
        DataError: if scikit-learn is not installed.
        FileError: if a file cannot be written.
    """
    torch.set_num_threads(1)  # layers of 8x8 pixels: more threads only wait for each other, for minutes on a busy machine
    print("Training a convolutional network with batch norm on 1,297 handwritten digits (a few seconds) ...")
    task = digits(samples=SAMPLES)
    float_accuracy = task.score(task.model)
    print(f"Quantizing it with {SAMPLES} unlabeled digits; below 8 bits its first and last layer keep 8. Scored on 500 other digits:\n")
    print("weights  inputs   float %   rounding %   subbyte %   float bytes   packed bytes   smaller")
    shown = None
    for bits in WIDTHS:
        rounded, result = quantized(task, bits, subbyte.rounding()), quantized(task, bits, subbyte.Recipe())
        size, before = result.size_bytes, result.float_bytes
        scores = f"{float_accuracy:>7.1f}   {task.score(rounded.model):>10.1f}   {task.score(result.model):>9.1f}"
        print(f"{bits:>5} b  {bits:>4} b   {scores}   {before:>11,}   {size:>12,}   {before / size:>5.1f} x")
        shown = result if bits == SHOWN else shown
    assert shown is not None
    print(f"\nrounding: every number to its nearest code.\n\nThe receipt of the {SHOWN}-bit run:\n\n{shown}\n")
    write_and_load_back(task, shown, folder)
    within_a_budget(task, folder)


def within_a_budget(task: Task, folder: Path) -> None:
    """An eighth of float32 with inputs of 8 bits, widths by integer programme, as an ONNX file that is run before it is written, and as a
    report.

    Args:
        task: model and calibration samples.
        folder: where the files go.

    Raises:
        FileError: if the file cannot be written.
    """
    budget = subbyte.Budget(size=SHARE, choices=subbyte.Choices(activation_bits=(8,)))
    result = subbyte.quantize(task.model, task.calibration, budget=budget)
    widths = ", ".join(f"{name} {weight_bits}" for name, (weight_bits, _) in result.allocation.items())
    share = result.size_bytes / result.float_bytes
    print(f"\nA budget of {SHARE:g} of float32, inputs of 8 bits: the integer programme gives weights these bits: {widths}.")
    before, after = task.score(task.model), task.score(result.model)
    print(f"{result.size_bytes:,} bytes, {share:.4f} of float32; accuracy {after:.1f} % (float {before:.1f} %).")
    exported = onnx_file(result, folder / f"{task.name}.onnx")
    page = folder / "report.html"
    result.write_report(page, exported, scores={f"accuracy on {len(task.test_inputs)} other digits, %": (before, after)})
    print(f"\nWrote {page}: widths, errors, frontier, proof and checks of this run; open it in a browser.")


def onnx_file(result: subbyte.Result, path: Path) -> tuple[subbyte.Exported, ...]:
    """Write an ONNX file for ONNX Runtime, and print what its check found; without the packages for it, print what is missing.

    Args:
        result: what to write.
        path: of the file.

    Returns:
        What the check found, if there is a file.

    Raises:
        FileError: if the file cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", subbyte.ExportWarning)  # what it says is printed below
            exported = result.export_onnx(path, subbyte.OnnxRuntimeCPU())
    except subbyte.OptionError as error:
        print(f"No ONNX file: {error}")
        return ()
    print(f"\nWrote {path}, checked in ONNX Runtime:\n{exported}")
    print("(On 8x8 pixels the time goes into starting operators; docs/results.md has networks of a usual size.)")
    return (exported,)


def quantized(task: Task, bits: int, recipe: subbyte.Recipe) -> subbyte.Result:
    """The task's model at one width, its first and last layer at 8 bits.

    Args:
        task: model and calibration samples.
        bits: of weights and inputs.
        recipe: how.
    """
    widths = subbyte.Widths(bits, bits, pinned=dict.fromkeys(task.first_and_last, 8))
    return subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe)


def write_and_load_back(task: Task, result: subbyte.Result, folder: Path) -> None:
    """Write the packed file, load it into the float model, and compare size and outputs.

    Args:
        task: with the float model.
        result: what to write.
        folder: where to.

    Raises:
        FileError: if the file cannot be written, or is not what was promised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}-w{SHOWN}a{SHOWN}.subbyte.safetensors"
    result.save(path)
    size = path.stat().st_size
    loaded = subbyte.load(path, into=task.model)
    with torch.no_grad():
        pairs = zip(tensors(loaded(task.test_inputs)), tensors(result.model(task.test_inputs)), strict=True)
        identical = all(torch.equal(mine, theirs) for mine, theirs in pairs)
    if size != result.size_bytes or not identical:
        raise subbyte.FileError(f"'{path}' has {size} bytes for {result.size_bytes} promised; outputs identical: {identical}")
    print(f"Wrote {path}: {size:,} bytes, to the byte what the receipt says.")
    print(f"Loaded it back into the float network: outputs on {len(task.test_inputs)} digits are bit-identical.")


if __name__ == "__main__":
    main()
