"""The packed file: as small as promised, bit-identical when loaded, whole or refused."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import subbyte
from subbyte import FileError, ModelError, Result, Widths
from subbyte.export.bits import packed_size
from subbyte.export.loading import load
from subbyte.export.packed import FORMAT_VERSION, pack_model, read_packed, to_bytes
from subbyte.model.operators import operator_of
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.model.state import structure_of
from subbyte.quantizers.grid import Grid
from subbyte.run.files import write_file

SYMMETRIC = replace(subbyte.rounding(), symmetric_weights=True)
AFFINE = replace(SYMMETRIC, symmetric_weights=False)
RECIPES = [replace(recipe, weight_group=group) for recipe in (SYMMETRIC, AFFINE) for group in (None, 1, 3, 64)]


class Net(nn.Module):
    """Convolutions with and without batch norm and groups, a head, and state that stays as it is."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(1, width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("offset", torch.tensor([3, -1]))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("nothing", torch.zeros(0, 2))
        self.bn.running_mean.normal_()
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.bn(self.stem(x)).relu()
        x = self.norm(x + self.grouped(x))
        return {"logits": self.head(x.mean(dim=(2, 3))), "offset": self.offset}


X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def quantized(net: nn.Module, widths: Widths, recipe: subbyte.Recipe = SYMMETRIC, x: Tensor = X) -> Result:
    return subbyte.quantize(net, x, widths=widths, recipe=recipe)


@pytest.fixture(scope="module")
def result() -> Result:
    torch.manual_seed(0)
    return quantized(Net(), Widths(4, 4, pinned={"head": (3, 8)}))


@pytest.fixture
def path(result: Result, tmp_path: Path) -> Path:
    result.save(tmp_path / "net.subbyte.safetensors")
    return tmp_path / "net.subbyte.safetensors"


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)["logits"]


bits = st.integers(2, 8)
options = st.tuples(bits, st.none() | bits)


@settings(max_examples=25)
@given(st.lists(options, min_size=3, max_size=3), st.sampled_from(RECIPES), st.sampled_from((2, 4, 6)))
def test_size_is_what_is_promised_and_outputs_are_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, layers: list[tuple[int, int | None]], recipe: subbyte.Recipe, width: int
) -> None:
    float_model = Net(width)
    found = quantized(float_model, Widths(pinned=dict(zip(("stem", "grouped", "head"), layers, strict=True))), recipe)
    file = tmp_path_factory.mktemp("packed") / "net.safetensors"
    written = found.save(file)
    assert written == file.stat().st_size == found.size_bytes
    assert f"packed file: {written:,} bytes" in str(found)
    loaded = load(file, into=Net(width))
    assert torch.equal(outputs(loaded), outputs(found.model))
    assert not loaded.training and type(loaded) is Net
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in found.model.state_dict().items())


@given(st.lists(options, min_size=3, max_size=3), st.sampled_from(RECIPES))
@settings(max_examples=10)
def test_layers_rest_and_header_add_up_to_the_file(
    tmp_path_factory: pytest.TempPathFactory, layers: list[tuple[int, int | None]], recipe: subbyte.Recipe
) -> None:
    found = quantized(Net(), Widths(pinned=dict(zip(("stem", "grouped", "head"), layers, strict=True))), recipe)
    file = tmp_path_factory.mktemp("packed") / "net.safetensors"
    size = found.save(file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with safetensors.safe_open(file, framework="pt") as content:
        rest = sum(content.get_tensor(name).nbytes for name in content.keys() if not name.startswith("subbyte."))  # noqa: SIM118
    assert sum(layer.size_bytes for layer in found.layers) + rest + header == size


def test_groups_take_the_bytes_of_their_steps() -> None:
    torch.manual_seed(0)
    x, float_model = torch.randn(16, 100), nn.Sequential(nn.Linear(100, 7)).eval()
    plain, grouped, affine = (
        quantized(float_model, Widths(4, 8), recipe, x=x).layers[0].size_bytes
        for recipe in (SYMMETRIC, replace(SYMMETRIC, weight_group=32), replace(AFFINE, weight_group=32))
    )
    assert (plain, grouped - plain, affine - grouped) == (350 + 7 * 8 + 5, 7 * 3 * 4, 7 * 4 // 2)  # zero-points of 4 bits


def packed_of(inputs: int, outputs: int, grid: Grid, other_bytes: int) -> bytes:
    """The file of one linear layer beside a buffer of some bytes."""
    model, module = nn.Sequential(), nn.Linear(inputs, outputs)
    layer = QuantizedLayer(module, operator_of(module))  # type: ignore[arg-type]
    codes = torch.full((outputs, inputs), grid.lowest, dtype=torch.int16)
    layer.assign_(QuantizedState(codes, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32), torch.zeros(outputs), grid, None))
    model.append(layer)
    model.register_buffer("zzz", torch.zeros(other_bytes, dtype=torch.uint8))
    return to_bytes(pack_model(model, "0" * 32, ()))


@settings(max_examples=40)
@given(st.integers(1, 20_000), st.integers(1, 12), st.booleans(), st.integers(0, 3))
@example(1000, 1, True, 0)  # 250 to 1000 bytes of codes: the digits must not show in the header's length
@example(4, 1, False, 3)
@example(3000, 1, True, 3)
@example(10, 300, False, 0)  # 75 to 300 bytes of zero-points: nor must theirs
def test_two_widths_differ_by_their_codes_and_zero_points_only(inputs: int, outputs: int, symmetric: bool, other_bytes: int) -> None:
    sizes = {bits: len(packed_of(inputs, outputs, Grid(bits, symmetric=symmetric), other_bytes)) for bits in range(2, 9)}
    zero_points = {bits: 0 if symmetric else packed_size(outputs, bits) for bits in sizes}
    beside = {bits: size - packed_size(inputs * outputs, bits) - zero_points[bits] for bits, size in sizes.items()}
    assert len(set(beside.values())) == 1, beside


def test_half_the_bits_are_half_the_codes() -> None:
    torch.manual_seed(0)
    x, float_model = torch.randn(16, 256), nn.Sequential(nn.Linear(256, 256)).eval()
    eight, four, two = (quantized(float_model, Widths(bits, 8), SYMMETRIC, x=x).size_bytes for bits in (8, 4, 2))
    assert (eight - four, four - two) == (32768, 16384)
    assert two < 4 * 256 * 256 / 16 + 4000


def test_the_same_result_is_the_same_file(result: Result, path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    result.save(str(again))
    assert again.read_bytes() == path.read_bytes()
    load(path, into=Net()).eval()
    assert again.read_bytes() == path.read_bytes()


def test_the_float_models_numbers_do_not_matter_and_it_is_not_changed(result: Result, path: Path) -> None:
    other = Net()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(0.5)
    before = copy.deepcopy(other.state_dict())
    other.train()
    loaded = load(path, into=other)
    assert torch.equal(outputs(loaded), outputs(result.model))
    assert other.training and isinstance(other.stem, nn.Conv2d)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_state_that_stays_is_kept_in_its_dtype(path: Path) -> None:
    loaded = load(path, into=Net())
    assert loaded.offset.tolist() == [3, -1] and loaded.offset.dtype == torch.int64
    assert loaded.flag.dtype == torch.bool and bool(loaded.flag)


class Tied(nn.Module):
    """A module under two names, and a head whose weight is the table's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.eval()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.again(self.mix(self.table(ids)).relu()))}


def test_shared_modules_and_tied_weights(tmp_path: Path) -> None:
    ids = torch.randint(0, 7, (16, 5))
    found = quantized(Tied(), Widths(4, 8), x=ids)
    found.save(tmp_path / "tied")
    loaded = load(tmp_path / "tied", into=Tied())
    assert torch.equal(outputs(loaded, ids), outputs(found.model, ids))
    assert loaded.again is loaded.mix
    assert torch.equal(loaded.table.weight, found.model.get_submodule("table").weight)  # type: ignore[arg-type]


class WithTwin(nn.Module):
    """A table that a module in front holds too, which nobody calls, and a head with the same weight: as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.table, self.mix, self.head = (
            nn.Embedding(40, 6),
            nn.Embedding(40, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 40, bias=False),
        )
        self.table.weight = self.head.weight = self.shared.weight
        self.eval()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.mix(self.table(ids)).relu())}


def test_a_weight_that_an_idle_module_holds_too_is_stored_once(tmp_path: Path) -> None:
    ids = torch.randint(0, 40, (16, 5))
    found = quantized(WithTwin(), Widths(4, 8), x=ids)
    assert set(found.allocation) == {"table", "mix", "head"} and not found.left_out and not found.warnings
    size = found.save(tmp_path / "twin")
    packed = read_packed(tmp_path / "twin")
    assert not [name for name in packed.tensors if name.endswith(".weight")], "no weight in float32"
    assert packed.tensors["subbyte.codes"].numel() == (40 * 6 + 36) // 2
    loaded = load(tmp_path / "twin", into=WithTwin())
    assert torch.equal(outputs(loaded, ids), outputs(found.model, ids))
    assert loaded.shared is loaded.table and loaded.head.shares is not None
    assert size == found.size_bytes


class Written(nn.Linear):
    """Computes what a linear layer computes, in words of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear has
        return input @ self.weight.T + self.bias


def test_a_layer_with_a_forward_of_its_own_that_computes_the_same_is_loaded(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), Written(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()

    found = subbyte.quantize(build(), torch.randn(64, 6), widths=Widths(4, 8))
    assert set(found.allocation) == {"0", "1", "4"} and len(found.folds) == 1
    found.save(tmp_path / "own")
    x = torch.randn(9, 6)
    assert torch.equal(load(tmp_path / "own", into=build())(x), found.model(x))


def test_a_budget_counts_a_weight_that_an_idle_module_holds_too_once(tmp_path: Path) -> None:
    ids = torch.randint(0, 40, (64, 5))
    found = subbyte.quantize(WithTwin(), ids, budget=subbyte.Budget(average_bits=4.0))
    assert found.plan is not None and found.save(tmp_path / "twin") == found.plan.allocation.size_bytes


def test_a_model_without_codes_cannot_be_packed() -> None:
    with pytest.raises(ModelError, match="nothing in this model is quantized"):
        pack_model(Net(), "", ())


# What is not a whole, unaltered file of this model is refused.


def test_every_cut_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for size in sorted({0, 1, 7, 8, 9, *range(0, len(content), 37), len(content) - 1}):
        path.write_bytes(content[:size])
        with pytest.raises(FileError, match="net.subbyte.safetensors") as caught:
            load(path, into=Net())
        assert "save it again" in str(caught.value)


def test_bytes_behind_the_end_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FileError, match="save it again"):
        load(path, into=Net())


def altered(path: Path, positions: list[int]) -> list[str]:
    """Flip one bit at each position, one position at a time; what surrounds those flips that are not refused."""
    content, unnoticed, into = path.read_bytes(), [], Net()
    for position in positions:
        for bit in {0, position % 8}:
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                load(path, into=into)
            except FileError:
                continue
            unnoticed.append(f"{position}: {bytes(flipped[max(0, position - 24) : position + 8])!r}")
    return unnoticed


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_every_altered_data_byte_is_refused(path: Path) -> None:
    assert altered(path, list(range(header_end(path), path.stat().st_size, 3))) == []


def test_every_altered_header_byte_is_refused(path: Path) -> None:
    assert altered(path, list(range(header_end(path)))) == []


def rewrite(path: Path, **changes: object) -> None:
    """Write the file again with other metadata and the old checksum, which stands before it."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, text = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["subbyte"]  # noqa: SIM118
    start = text.index("{")
    save_file(tensors, path, {"subbyte": text[:start] + json.dumps({**json.loads(text[start:]), **changes})})


@pytest.mark.parametrize(
    "change",
    [
        {"activation_bits": [5, 4, 8]},
        {"weight_symmetric": [0, 1, 1]},
        {"names": ["grouped", "stem", "head"]},
        {"names": ["stem", "grouped", "nowhere"]},
        {"names": ["stem", "stem", "head"]},
        {"shapes": [[4, 3, 3, 3], [4, 2, 3, 3], [4, 5]]},
        {"channels": [4, 4]},
        {"group": [0, 0, 2]},
        {"group": [0, 0, -1]},
        {"group": [2, 0, 0]},
        {"group": [0, 0]},
        {"bias": [1, 1, 0]},
        {"bias": None},
        {"weight_bits": [4, 4, 9]},
        {"weight_bits": "444"},
        {"folds": []},
        {"folds": [["stem", "norm"]]},
        {"structure": "0" * 32},
        {"library": "another"},
        {"format_version": None},
        {"format_version": "one"},
    ],
    ids=str,
)
def test_altered_metadata_is_refused(path: Path, change: dict[str, object]) -> None:
    rewrite(path, **change)
    with pytest.raises(FileError, match="net.subbyte.safetensors"):
        load(path, into=Net())


def test_a_newer_format_asks_for_a_newer_subbyte(path: Path) -> None:
    rewrite(path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(FileError, match=f"has format {FORMAT_VERSION + 1}.*install a newer subbyte"):
        load(path, into=Net())


def test_an_older_format_asks_to_quantize_again(path: Path) -> None:
    rewrite(path, format_version=1)
    with pytest.raises(FileError, match="has format 1, which no released subbyte wrote or reads; quantize the model again"):
        load(path, into=Net())


def test_a_newer_format_may_look_entirely_different(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path, {"subbyte": "0" * 32 + json.dumps({"format_version": 99})})
    with pytest.raises(FileError, match="has format 99.*install a newer subbyte"):
        load(path, into=Net())


def test_someone_elses_safetensors_are_refused(path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, path, metadata)
        with pytest.raises(FileError, match="not one that subbyte packed"):
            load(path, into=Net())


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", '"text"', "{}"])
@pytest.mark.parametrize("before", ["", "0" * 32], ids=["bare", "behind a checksum"])
def test_metadata_that_is_not_ours_is_refused(path: Path, before: str, text: str) -> None:
    save_file({"weight": torch.zeros(3)}, path, {"subbyte": before + text})
    with pytest.raises(FileError, match="net.subbyte.safetensors"):
        load(path, into=Net())


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.mark, "w")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_and_not_run(path: Path, tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    path.write_bytes(pickle.dumps(Trap(str(mark)), protocol))
    with pytest.raises(FileError):
        load(path, into=Net())
    torch.save({"x": Trap(str(mark))}, path)
    with pytest.raises(FileError):
        load(path, into=Net())
    assert not mark.exists()


def test_a_file_of_another_model_is_refused(path: Path) -> None:
    for other in (Net(width=6), nn.Sequential(nn.Linear(3, 3)), nn.ReLU()):
        with pytest.raises(FileError, match=f"made from another model.*this {type(other).__name__}"):
            load(path, into=other)


def test_a_convolution_of_another_stride_is_another_model(path: Path) -> None:
    other = Net()
    other.stem = nn.Conv2d(3, 4, 3, stride=2, bias=False)
    with pytest.raises(FileError, match="another model"):
        load(path, into=other)


def test_an_already_quantized_model_is_another_model(path: Path) -> None:
    with pytest.raises(FileError, match="another model"):
        load(path, into=load(path, into=Net()))


def test_structure_is_names_shapes_and_dtypes() -> None:
    assert structure_of(Net()) == structure_of(Net())
    assert len({structure_of(model) for model in (Net(), Net(6), Net().half(), nn.ReLU())}) == 4


@pytest.mark.parametrize("missing", ["nothing.safetensors", "no/folder/x", "."])
def test_a_missing_file_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(FileError, match="cannot read"):
        load(tmp_path / missing, into=Net())


# Writing: whole or not at all.


def entries(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    write_file(tmp_path / "a", b"new, longer")
    assert entries(tmp_path) == {"a": b"new, longer"}


@pytest.mark.parametrize("at", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    target = tmp_path / "net.safetensors"
    target.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, at, fail)
    expected = FileError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_file(target, b"new")
    monkeypatch.undo()
    assert entries(tmp_path) == {"net.safetensors": b"old"}
    if expected is FileError:
        assert "net.safetensors" in str(caught.value) and "No space left" in str(caught.value)


def test_paths_that_cannot_be_written_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    for name in ("folder", "no/such/folder/x", "file/x", "x" * 300):
        with pytest.raises(FileError, match="choose a path in a folder that exists and can be written"):
            write_file(tmp_path / name, b"new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FileError, match="cannot write"):
            write_file(tmp_path / "x", b"new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_file(tmp_path / "x", b"new")
    finally:
        assert os.umask(mask) == 0o027
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
