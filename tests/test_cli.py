"""The command line, as a stranger meets it: an own model file, every command, every exit code, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import subbyte
from subbyte.cli import main
from subbyte.cli.model_source import opened_model

NET = """
print("a model file may print")
import torch
from torch import nn
import torch.nn.functional as F
from beside import CLASSES


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.hardswish(x + self.norm(self.grouped(x)))


class Net(nn.Module):
    def __init__(self, classes=CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = Block(8)
        self.spare = nn.Linear(2, 2)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        print("so may a forward")
        features = F.silu(self.block(F.relu(self.stem(x)))).mean((2, 3))
        return {"logits": self.head(F.dropout(features, training=self.training)), "count": torch.tensor(len(x))}


def build():
    return Net()


class TwoOutputs(Net):
    def forward(self, x):
        given = super().forward(x)
        return {**given, "again": given["logits"] * 2}


class Plain(Net):
    def forward(self, x):
        return self.head(F.relu(self.stem(x)).mean((2, 3)))


def half():
    return Net().half()


def broken():
    net = Net()
    net.head.weight.data[0, 0] = float("nan")
    return net


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(2, 2)))


def fails():
    return torch.zeros(2) @ torch.zeros(3)


def leaves():
    raise SystemExit(0)


def text():
    return "no module"


def needs(depth):
    return Net()


number = 3
ready = Net()
"""


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """Its stdout as the one JSON object that it must be."""
        found: dict[str, Any] = json.loads(self.out)
        return found


Run = Callable[..., Done]
QUANTIZE = "quantize --model net.py:build --data data.npz"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "beside.py").write_text("CLASSES = 5\n")
    chance = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=chance.normal(size=(48, 3, 8, 8)).astype("f4"), y=chance.integers(0, 5, 48))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(line: str) -> Done:
        path, modules = list(sys.path), set(sys.modules)
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        assert sys.path == path
        for name in set(sys.modules) - modules:
            if name in ("net", "beside"):
                del sys.modules[name]
        return Done(int(str(ended.value.code)), *capsys.readouterr())

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def test_an_own_model_becomes_a_file_of_exactly_the_promised_size(run: Run, folder: Path) -> None:
    before = names(folder)
    done = run(f"{QUANTIZE} --weight-bits 4 --activation-bits 4 --keep-8bit stem --pin head=6,none --batch-size 20 --out own.safetensors")
    assert done.code == 0, done.err
    assert names(folder) - before == {"own.safetensors"}
    size = (folder / "own.safetensors").stat().st_size
    assert f"packed file: {size:,} bytes" in done.out and done.out.endswith(f"wrote own.safetensors, {size:,} bytes\n")
    assert "spare" in done.out and "never called" in done.out
    assert "print" not in done.out and "a model file may print" in done.err
    assert "calibrate 3/3 head: error" in done.err and "s left" in done.err

    with opened_model("net.py:build") as model:
        samples = torch.from_numpy(np.load("data.npz")["x"])
        widths = subbyte.Widths(4, 4, pinned={"stem": 8, "head": (6, None)})
        result = subbyte.quantize(model, samples.split(20), widths=widths)
        assert result.allocation == {"stem": (8, 8), "block.grouped": (4, 4), "head": (6, None)}
        result.save("library.safetensors")
        assert (folder / "own.safetensors").read_bytes() == (folder / "library.safetensors").read_bytes()
        loaded = subbyte.load("own.safetensors", into=model)
        assert torch.equal(loaded(samples)["logits"], result.model(samples)["logits"])


def test_quantize_as_json(run: Run, folder: Path) -> None:
    done = run(f"{QUANTIZE} --symmetric --flavour parallel --samples 24 --seed 3 --exclude head --activation-bits none --json --out a.st")
    assert done.code == 0, done.err
    data = done.data
    assert data["out"] == "a.st" and data["size_bytes"] == (folder / "a.st").stat().st_size
    assert [layer["name"] for layer in data["layers"]] == ["stem", "block.grouped"]
    assert {left["name"]: left["reason"] for left in data["left_out"]}["head"] == "excluded by the user"
    assert data["folds"] == [{"layer": "block.grouped", "batch_norm": "block.norm"}]
    assert data["recipe"]["flavour"] == "parallel" and data["recipe"]["symmetric_weights"] is True
    assert (data["measured"]["samples"], data["seed"]) == (24, 3)
    assert data["widths"]["activation_bits"] is None and data["layers"][0]["activation_bits"] is None


def test_a_group_size_gives_linear_layers_groups(run: Run, folder: Path) -> None:
    done = run(f"{QUANTIZE} --group-size 2 --json --out a.st")
    assert done.code == 0, done.err
    assert done.data["recipe"]["weight_group"] == 2
    assert {layer["name"]: layer["weight_group"] for layer in done.data["layers"]} == {"stem": None, "block.grouped": None, "head": 2}
    assert done.data["size_bytes"] == (folder / "a.st").stat().st_size
    refused = run(f"{QUANTIZE} --group-size 0 --out b.st")
    assert refused.code == 2 and "--group-size is at least 1, not 0" in refused.err


def test_the_recipe_rounding_rounds(run: Run) -> None:
    done = run(f"{QUANTIZE} --recipe rounding --weight-bits 4 --json --out a.st")
    assert {layer["solver"] for layer in done.data["layers"]} == {"RoundToNearest"}
    assert done.data["recipe"] == {
        "solver": "RoundToNearest",
        "flavour": "parallel",
        "symmetric_weights": False,
        "weight_group": None,
        "fold_batch_norms": True,
        "refinements": [],
    }


def test_an_existing_file_stays_unless_forced_and_the_model_is_not_even_run(run: Run, folder: Path) -> None:
    (folder / "a.st").write_text("precious")
    done = run(f"{QUANTIZE} --out a.st")
    assert (done.code, done.out) == (5, "")
    assert "--force" in done.err and "a model file may print" not in done.err
    assert (folder / "a.st").read_text() == "precious"
    assert run(f"{QUANTIZE} --force --out a.st").code == 0
    assert subbyte.load("a.st", into=_model()).training is False


def test_a_file_that_appears_meanwhile_is_not_replaced(run: Run, folder: Path) -> None:
    (folder / "beside.py").write_text("from pathlib import Path\nCLASSES = Path('a.st').write_text('precious') - 3\n")
    assert run(f"{QUANTIZE} --out a.st").code == 5
    assert (folder / "a.st").read_text() == "precious"


def test_images_are_prepared_as_the_options_say(run: Run, folder: Path) -> None:
    (folder / "images").mkdir()
    chance = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(chance.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / "images" / f"{index}.png")
    done = run(
        "quantize --model net.py:ready --data images --image-size 8x10 --mean 104,117,123 --std 50,50,50 --channel-order bgr "
        "--value-range 255 "
        "--out a.st"
    )
    assert done.code == 0, done.err
    pictures = subbyte.tasks.load_samples(
        folder / "images",
        subbyte.tasks.Preprocessing((8, 10), (104.0, 117.0, 123.0), (50.0, 50.0, 50.0), subbyte.tasks.ChannelOrder.BGR, 255.0),
    )
    subbyte.quantize(_model(), pictures).save("b.st")
    assert (folder / "a.st").read_bytes() == (folder / "b.st").read_bytes()


def test_inspect_lists_layers_in_running_order(run: Run) -> None:
    done = run("inspect --model net.py:build --input-shape 2x3x8x8")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["layer", "stem", "block.grouped", "head", "3"]
    assert lines[1].split()[1:6] == ["2x3x8x8", "8x3x3x3", "216", "3,456", "1"]
    assert "  spare (Linear, 6 parameters): never called in a forward" in lines
    assert lines[-1] == "batch norms that will be folded: block.norm into block.grouped"

    data = run("inspect --model net.py:build --data data.npz --samples 2 --exclude head --json").data
    assert [layer["name"] for layer in data["layers"]] == ["stem", "block.grouped"]
    assert data["layers"][1]["weight_shape"] == [8, 2, 3, 3] and data["layers"][1]["macs"] == 8 * 2 * 9 * 16
    assert {left["name"] for left in data["left_out"]} == {"spare", "head"}
    assert (data["weights"], data["macs"]) == (216 + 144, 3456 + 2304)


def test_a_module_is_found_in_the_current_folder(run: Run) -> None:
    done = run("inspect --model net:Net --input-shape 1,3,8,8")
    assert done.code == 0, done.err


def test_evaluate_with_and_without_labels_and_packed_file(run: Run, folder: Path) -> None:
    assert run(f"{QUANTIZE} --weight-bits 2 --out a.st").code == 0
    evaluate = "evaluate --model net.py:build --data data.npz"
    both = run(f"{evaluate} --labels data.npz --packed a.st --json").data
    with opened_model("net.py:build") as model, torch.no_grad():
        samples, labels = torch.from_numpy(np.load("data.npz")["x"]), torch.from_numpy(np.load("data.npz")["y"])
        reference, logits = model(samples)["logits"], subbyte.load("a.st", into=model)(samples)["logits"]
        float_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    p = reference.double().softmax(-1)
    assert both == {
        "samples": 48,
        "float_bytes": float_bytes,
        "float_top1": pytest.approx(100 * (reference.argmax(-1) == labels).double().mean().item()),
        "packed_bytes": (folder / "a.st").stat().st_size,
        "packed_top1": pytest.approx(100 * (logits.argmax(-1) == labels).double().mean().item()),
        "agreement": pytest.approx(100 * (reference.argmax(-1) == logits.argmax(-1)).double().mean().item()),
        "kl": pytest.approx((p * (p.log() - logits.double().log_softmax(-1))).sum(-1).mean().item(), abs=1e-6),
        "float_perplexity": None,
        "packed_perplexity": None,
    }
    unlabelled = run(f"{evaluate} --packed a.st --json").data
    assert unlabelled == {**both, "float_top1": None, "packed_top1": None}
    only_float = run(f"{evaluate} --labels data.npz --samples 12 --json").data
    assert (only_float["samples"], only_float["agreement"], only_float["kl"], only_float["packed_bytes"]) == (12, None, None, None)
    table = run(f"{evaluate} --labels data.npz --packed a.st")
    assert [line.split()[0] for line in table.out.splitlines()] == ["top-1", "float", "quantized", "48"]

    several = run("evaluate --model net.py:TwoOutputs --data data.npz --labels data.npz")
    assert several.code == 3 and "--output" in several.err
    again = run("evaluate --model net.py:TwoOutputs --data data.npz --labels data.npz --output again --json")
    assert again.data["float_top1"] == both["float_top1"]


def test_widths_of_a_classifier_are_chosen_by_kl_divergence(folder: Path, run: Run) -> None:
    tables = []
    for given in ("", "--classifier"):
        done = run(f"{QUANTIZE} --average-bits 4 --recipe rounding {given} --out {len(tables)}/ --json")
        assert done.code == 0, done.err
        tables.append(json.loads(done.out)["plan"]["allocation"]["predicted"])
    assert tables[0] != tables[1]
    without = run(f"{QUANTIZE} --weight-bits 4 --classifier --out a.st")
    assert without.code == 2 and "--classifier" in without.err


def test_a_budget_and_another_one_from_its_run_folder(folder: Path, run: Run) -> None:
    budget = "--average-bits 4 --activation-choices 8 --pin head=8 --recipe rounding"
    done = run(f"{QUANTIZE} {budget} --out run/ --json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    allocation, packed = answer["plan"]["allocation"], folder / "run" / "model.subbyte.safetensors"
    assert packed.stat().st_size == answer["size_bytes"] == allocation["size_bytes"]
    assert allocation["average_bits"] <= 4 and allocation["options"]["head"] == [8, 8]
    solved = json.loads(run("solve run/ --average-bits 3 --json").out)
    assert solved["average_bits"] <= 3 and solved["size_bytes"] < answer["size_bytes"] and solved["status"] == "optimal"
    assert "proved optimal" in run("solve run --average-bits 3").out
    points = json.loads(run("solve run --frontier --json").out)["frontier"]
    assert [p["size_bytes"] for p in points] == sorted(p["size_bytes"] for p in points)
    limit = points[len(points) // 2]["predicted"] * 1.000001
    assert json.loads(run(f"solve run --max-predicted {limit} --json").out)["predicted"] <= limit
    again = run(f"{QUANTIZE} --average-bits 3 --activation-choices 8 --pin head=8 --recipe rounding --out run --force --json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["size_bytes"] == solved["size_bytes"]
    assert run("solve run").code == 2


@pytest.mark.filterwarnings("ignore::subbyte.ExportWarning")  # so small a network is neither smaller nor faster
def test_reports_of_a_run_with_its_exports(folder: Path, run: Run) -> None:
    quantize = "quantize --model net.py:Plain --data data.npz --recipe rounding"
    done = run(f"{quantize} --weight-bits 4 --out run/ --report first.html")
    assert done.code == 0 and done.out.endswith("bytes\nwrote first.html\n"), done.err
    shown = run("report run/")
    assert shown.code == 0 and shown.out == f"wrote run/report.html, {(folder / 'run' / 'report.html').stat().st_size:,} bytes\n", shown.err
    assert (folder / "run" / "report.html").read_text("utf-8") == (folder / "first.html").read_text("utf-8")
    refused = run("report run --json")
    assert refused.code == 5 and "'run/report.html' exists" in refused.data["error"]["message"]
    assert run(f"{quantize} --average-bits 5 --out run --report first.html").code == 5
    again = run(f"{quantize} --average-bits 5 --out run --report first.html --force --json")
    assert again.data["report"] == "first.html" and "proved optimal" in (folder / "first.html").read_text("utf-8")
    pytest.importorskip("onnxruntime")
    assert run("export --model net.py:Plain --data data.npz --packed run/model.subbyte.safetensors --out a.onnx --threads 1").code == 0
    assert run("report run --out second.html --json").data == {"out": "second.html", "bytes": (folder / "second.html").stat().st_size}
    assert "a.onnx" in (folder / "second.html").read_text("utf-8") and "a.onnx" not in (folder / "first.html").read_text("utf-8")


BAD = [
    (2, "quantize", "Missing option"),
    (2, "nonsense", "No such command"),
    (2, f"{QUANTIZE} --out a.st --nonsense", "No such option"),
    (2, f"{QUANTIZE} --out a.st --weight-bits 9", "weight_bits.*2 to 8.*9"),
    (2, f"{QUANTIZE} --out a.st --weight-bits four", "--weight-bits"),
    (2, f"{QUANTIZE} --out a.st --activation-bits few", "--activation-bits.*'few'"),
    (2, f"{QUANTIZE} --out a.st --activation-bits 1", "activation_bits.*2 to 8"),
    (2, f"{QUANTIZE} --out a.st --size 12", "share of the float model's bytes"),
    (2, f"{QUANTIZE} --out a.st --size 0.5 --weight-bits 4", "a budget chooses the widths"),
    (2, f"{QUANTIZE} --out a.st --size 0.5 --weight-choices 4,many", "--weight-choices.*'many'"),
    (2, f"{QUANTIZE} --out a.st --minimize speed --size 0.5", "--minimize"),
    (2, f"{QUANTIZE} --out a.st --bytes 10", "no allocation has bytes within 10; the least is"),
    (5, f"{QUANTIZE} --size 0.9 --out missing/run/", "cannot make the folder 'missing/run'"),
    (5, "solve images --size 0.1", "holds no 'market.json'"),
    (5, "report images", "holds no 'summary.json'"),
    (5, f"{QUANTIZE} --out new.st --report missing/report.html", "there is no folder 'missing'"),
    (2, f"{QUANTIZE} --out a.st --keep-8bit stemm", "stemm.*stem, block.grouped, head"),
    (2, f"{QUANTIZE} --out a.st --pin stem", "NAME=W"),
    (2, f"{QUANTIZE} --out a.st --pin stem=none", "--exclude"),
    (2, f"{QUANTIZE} --out a.st --pin stem=11", "stem.*2 to 8"),
    (2, f"{QUANTIZE} --out a.st --include nothing*", "nothing"),
    (2, f"{QUANTIZE} --out a.st --flavour sideways", "--flavour"),
    (2, f"{QUANTIZE} --out a.st --image-size 8by8", "--image-size.*8by8"),
    (2, f"{QUANTIZE} --out a.st --mean a,b", "--mean.*'a,b'"),
    (2, f"{QUANTIZE} --out a.st --mean 1,2 --std 1", "mean and std"),
    (2, f"{QUANTIZE} --out a.st --batch-size 0", "--batch-size"),
    (2, f"{QUANTIZE} --out a.st --samples 0", "at least 1"),
    (2, f"{QUANTIZE} --out a.st --threads 0", "--threads"),
    (2, "quantize --model net.py --data data.npz --out a.st", "FILE.py:NAME"),
    (2, "inspect --model net.py:build", "--input-shape"),
    (2, "inspect --model net.py:build --input-shape 1,2 --data data.npz", "either"),
    (2, "inspect --model net.py:build --input-shape 0,3", "--input-shape '0,3'"),
    (2, "evaluate --model net.py:build --data data.npz", "--labels, --packed"),
    (2, "evaluate --model net.py:build --data data.npz --labels data.npz --output nowhere", "nowhere.*logits"),
    (3, "inspect --model absent.py:build --input-shape 1,2", "no file 'absent.py'"),
    (3, "inspect --model absent.module:build --input-shape 1,2", "no module 'absent'"),
    (3, "inspect --model net.py:buidl --input-shape 1,2", "no 'buidl'.*build"),
    (3, "inspect --model net.py:number --input-shape 1,2", "is a int"),
    (3, "inspect --model net.py:needs --input-shape 1,2", r"needs arguments \(depth\)"),
    (3, "inspect --model net.py:text --input-shape 1,2", "returned str"),
    (3, "inspect --model net.py:fails --input-shape 1,2", r"net.py, line \d+: return torch.zeros\(2\) @ torch.zeros\(3\)"),
    (3, "inspect --model net.py:leaves --input-shape 1,2", "ended the program"),
    (3, "inspect --model wrong.py:build --input-shape 1,2", r"IndentationError: expected[^(]*\(wrong.py, line 2\)$"),
    (3, "inspect --model needy.py:build --input-shape 1,2", r"not_installed.*\(needy.py, line 1: import not_installed\)"),
    (3, "inspect --model net.py:build --input-shape 1,4,8,8", "stem.*4"),
    (3, "inspect --model net.py:build --input-shape 1,3,8,8 --exclude *", "nothing to quantize"),
    (3, "inspect --model net.py:scripted --input-shape 1,2", "scripted"),
    (3, "quantize --model net.py:half --data data.npz --out a.st", "float16.*float()"),
    (3, "quantize --model net.py:broken --data data.npz --out a.st", "head.weight.*NaN"),
    (3, "evaluate --model net.py:build --data flat.npy --labels data.npz", "failed on a batch"),
    (4, "quantize --model net.py:build --data absent.npz --out a.st", "absent.npz"),
    (4, "quantize --model net.py:build --data net.py --out a.st", "unknown kind"),
    (4, "quantize --model net.py:build --data empty.npy --out a.st", "empty"),
    (4, "quantize --model net.py:build --data nan.npy --out a.st", "NaN"),
    (4, "quantize --model net.py:build --data data.npz --key z --out a.st", "'z'.*x, y"),
    (4, "evaluate --model net.py:build --data data.npz --labels few.npy", "48 samples.*3 labels"),
    (4, "evaluate --model net.py:build --data data.npz --labels large.npy", "labels up to 7"),
    (5, f"{QUANTIZE} --out net.py", "exists.*--force"),
    (5, f"{QUANTIZE} --out images --force", "is a folder"),
    (5, f"{QUANTIZE} --out nowhere/a.st", "no folder 'nowhere'"),
    (5, f"{QUANTIZE} --out {'a' * 300}.st", "cannot write"),
    (5, "evaluate --model net.py:build --data data.npz --packed absent.st", "no such file"),
    (5, "evaluate --model net.py:build --data data.npz --packed data.npz", "safetensors"),
]


@pytest.mark.parametrize(("code", "line", "message"), BAD, ids=[line for _, line, _ in BAD])
def test_bad_input_is_one_clear_error_and_nothing_is_written(run: Run, folder: Path, code: int, line: str, message: str) -> None:
    (folder / "wrong.py").write_text("def build():\nreturn 1\n")
    (folder / "needy.py").write_text("import not_installed\n")
    (folder / "images").mkdir()
    np.save(folder / "empty.npy", np.zeros((0, 3, 8, 8), dtype="f4"))
    np.save(folder / "nan.npy", np.full((4, 3, 8, 8), np.nan, dtype="f4"))
    np.save(folder / "flat.npy", np.zeros((48, 7), dtype="f4"))
    np.save(folder / "few.npy", np.zeros(3, dtype="i8"))
    np.save(folder / "large.npy", np.full(48, 7))
    before = names(folder)
    done = run(f"{line} --json")
    assert done.code == code, done.err
    assert names(folder) == before
    assert "Traceback" not in done.err
    (error,) = [text for text in done.err.splitlines() if text.startswith("error: ")]
    told = done.data["error"]
    assert told["kind"] == {2: "option", 3: "model", 4: "data", 5: "file"}[code]
    assert error == f"error: {told['message']}".splitlines()[0]
    assert re.search(message, told["message"], re.DOTALL), told["message"]


def test_an_error_of_a_layer_names_it_for_machines_too(run: Run) -> None:
    assert run("quantize --model net.py:broken --data data.npz --out a.st --json").data["error"]["layer"] == "head.weight"


def test_debug_shows_the_traceback(run: Run) -> None:
    done = run("inspect --model net.py:fails --input-shape 1,2 --debug")
    assert done.code == 3 and "Traceback" in done.err and "torch.zeros(2) @" in done.err


def test_a_defect_has_a_code_of_its_own(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(subbyte, "quantize", defective)
    before = names(folder)
    done = run(f"{QUANTIZE} --out a.st --json")
    assert (done.code, done.data["error"]["kind"]) == (1, "defect")
    assert "on purpose" in done.err and "Traceback" not in done.err and names(folder) == before


def test_help_version_and_no_command(run: Run) -> None:
    assert run("--version") == Done(0, f"subbyte {subbyte.cli.program.version('subbyte')}\n", "")
    for line in ("", "--help"):
        done = run(line)
        assert done.code == 0 and "Exit codes: 0 done;" in done.out and "quantize" in done.out
    help_text = " ".join(run("quantize --help").out.split())
    assert "is Python code, and it is run" in help_text and "--keep-8bit" in help_text


def test_threads_are_what_the_user_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    assert run(f"{QUANTIZE} --threads 3 --out a.st").code == 0
    assert given[:1] == [3]


def _accept_ctrl_c() -> None:
    """A shell starts jobs in the background with the signal ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_the_library_is_imported_prints_no_traceback() -> None:
    slow = (
        "import sys, time, types; torch = types.ModuleType('torch'); torch.__getattr__ = lambda name: (print('importing'), time.sleep(60))"
    )
    program = [sys.executable, "-uc", f"{slow}; sys.modules['torch'] = torch; import subbyte_program; subbyte_program.main()"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, **pipes, text=True, preexec_fn=_accept_ctrl_c) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait(timeout=20) == -signal.SIGINT


def test_the_package_itself_is_the_program_too() -> None:
    done = subprocess.run([sys.executable, "-m", "subbyte", "quantize", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--model" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_at_once_and_leaves_nothing(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import time\nimport torch\nfrom torch import nn\n\n\nclass Slow(nn.Sequential):\n    def forward(self, x):\n"
        "        for layer in self:\n            time.sleep(0.01)\n            x = layer(x)\n        return x\n\n\n"
        "def build():\n    return Slow(*(nn.Linear(4, 4) for _ in range(20)))\n"
    )
    np.save(folder / "slow.npy", np.random.default_rng(0).normal(size=(64, 4)).astype("f4"))
    before = names(folder)
    program = [sys.executable, "-m", "subbyte_program"]
    arguments = "quantize --model slow.py:build --data slow.npy --batch-size 8 --threads 1 --out a.st".split()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*program, *arguments], **pipes, text=True, preexec_fn=_accept_ctrl_c) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line.startswith("calibrate 2/20"):
                break
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest, result = process.stderr.read(), process.stdout.read()
        assert process.wait(timeout=20) == 130
    assert time.monotonic() - sent < 60
    assert "error: stopped before the end" in rest and "Traceback" not in rest
    assert result == "" and names(folder) == before


def _model() -> torch.nn.Module:
    with opened_model("net.py:build") as model:
        return model


@pytest.mark.filterwarnings("ignore::subbyte.ExportWarning")  # so small a network is neither smaller nor faster
def test_export_writes_a_file_that_evaluate_reads(folder: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    assert run("quantize --model net.py:Plain --data data.npz --recipe rounding --weight-bits 3 --out a.st").code == 0
    done = run("export --model net.py:Plain --data data.npz --packed a.st --out a.onnx --threads 1 --json")
    assert done.code == 0, done.err
    assert done.data["kernels"] == {"stem": "QLinearConv", "head": "QGemm"} and done.data["float_layers"] == []
    assert done.data["size_bytes"] == (folder / "a.onnx").stat().st_size
    scored = run("evaluate --model net.py:Plain --data data.npz --packed a.onnx --json").data
    packed = run("evaluate --model net.py:Plain --data data.npz --packed a.st --json").data
    assert scored["packed_bytes"] == done.data["size_bytes"]
    assert abs(scored["agreement"] - packed["agreement"]) < 5 and abs(scored["kl"] - packed["kl"]) < 0.01
    alone = run("evaluate --data data.npz --labels data.npz --packed a.onnx --json")
    beside = run("evaluate --model net.py:Plain --data data.npz --labels data.npz --packed a.onnx --json").data
    assert alone.code == 0 and "a model file may print" not in alone.err
    assert alone.data == beside | {"float_bytes": None, "float_top1": None, "agreement": None, "kl": None}
    assert "float" not in run("evaluate --data data.npz --labels data.npz --packed a.onnx").out
    assert "holds its program" in run("evaluate --data data.npz --labels data.npz --packed a.st").err
    assert run("evaluate --data data.npz --packed a.onnx").code == run("evaluate --data data.npz --labels data.npz").code == 2
    refused = run("export --model net.py:Plain --data data.npz --packed a.st --out a.onnx --json")
    assert refused.code == 5 and "exists" in refused.data["error"]["message"]


@pytest.mark.parametrize("name", ["light", "advanced", "relaxed", "weight-only"])
def test_recipes_by_name(run: Run, name: str) -> None:
    done = run(f"{QUANTIZE} --recipe {name} --weight-bits 4 --json --out a.st")
    assert done.code == 0, done.err
    assert {layer["activation_bits"] for layer in done.data["layers"]} == {None if name == "weight-only" else 8}
    wanted = ["BatchNormTuning"] if name == "light" else ["BatchNormTuning", "BiasTuning"]
    assert done.data["recipe"]["refinements"] == wanted
    assert done.data["loss"] <= done.data["measured"]["loss"]


def test_the_recipe_s_choices_are_a_budget_s_unless_given(run: Run) -> None:
    done = run(f"{QUANTIZE} --recipe relaxed --average-bits 6 --json --out a.st")
    assert done.code == 0, done.err
    assert all(layer["weight_bits"] == layer["activation_bits"] for layer in done.data["layers"])
    done = run(f"{QUANTIZE} --recipe relaxed --average-bits 6 --weight-choices 5,6 --json --out b.st")
    assert {layer["weight_bits"] for layer in done.data["layers"]} <= {5, 6}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_latency_is_measured_once_and_limits_a_budget(folder: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    done = run("profile --model net.py:Plain --data data.npz --weight-choices 4,8 --threads 1 --out run/ --json")
    assert done.code == 0, done.err
    layers = done.data["layers"]
    assert (done.data["target"], done.data["threads"], done.data["samples"]) == ("OnnxRuntimeCPU", 1, 1)
    assert list(layers) == ["stem", "head"] and list(layers["stem"]) == ["float", "W4A8", "W8A8"]
    text = run("profile --model net.py:Plain --data data.npz --weight-choices 4,8 --threads 1 --out run/").out.splitlines()
    assert text[0].split() == ["layer", "float", "W4A8", "W8A8"] and text[3].startswith("sum") and "1 threads, 1 samples" in text[4]
    assert [float(cell) for cell in text[1].split()[1:]] == [
        round(1000 * layers["stem"][column]["least"], 4) for column in ("float", "W4A8", "W8A8")
    ]  # from the bank
    budget = "--max-latency 1000 --target onnxruntime --weight-choices 4,8 --recipe rounding --threads 1"
    done = run(f"quantize --model net.py:Plain --data data.npz {budget} --out run/ --json")
    assert done.code == 0, done.err
    allocation = done.data["plan"]["allocation"]
    chosen = {name: f"W{option[0]}A{option[1]}" for name, option in allocation["options"].items()}
    assert allocation["latency"] == pytest.approx(sum(layers[name][option]["least"] for name, option in chosen.items()))
    assert run("solve run --max-latency 1000 --json").data["latency"] == pytest.approx(allocation["latency"])
    assert "layers take" in run("solve run --max-latency 1000").out
    assert "the least is" in run("solve run --max-latency 0").err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{QUANTIZE} --max-latency 1 --out a.st", "a latency is measured in a runtime"),
        (f"{QUANTIZE} --minimize latency --max-kl 1 --out a.st", "a latency is measured in a runtime"),
        (f"{QUANTIZE} --size 0.9 --pin head=4 --target openvino --out a.st", "OpenVINOCPU does not run; .*it runs .2, 8."),
        (f"{QUANTIZE} --pin head=4 --target onnxruntime --out a.st", "OnnxRuntimeCPU does not run the widths .4, 4. of 'head'"),
        ("profile --model net.py:build --data data.npz --timed-samples 0 --out run/", "at least 1"),
    ],
)
def test_what_a_target_cannot_run_is_said(run: Run, line: str, message: str) -> None:
    done = run(line)
    assert done.code == 2 and re.search(message, done.err), done.err
