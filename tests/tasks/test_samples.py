"""Every kind of file that the command line reads, and every way in which one can be wrong."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from subbyte.errors import DataError, OptionError
from subbyte.tasks import ChannelOrder, Preprocessing, load_labels, load_samples

CAFFE = Preprocessing(mean=(104, 117, 123), channel_order=ChannelOrder.BGR, value_range=255.0)
GREY = Preprocessing(mean=(0.0,), std=(1.0,))


def write_image(path: Path, colour: tuple[int, int, int] = (255, 0, 51), size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# --- folders of images


def test_images_come_sorted_scaled_and_channels_first(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", (0, 0, 0))
    write_image(tmp_path / "A.PNG", (255, 0, 51))
    write_image(tmp_path / "c.bmp", (51, 51, 51))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._b.png").write_text("a file that some systems leave behind")
    samples = load_samples(tmp_path, None)
    assert samples.shape == (3, 3, 4, 6)
    assert samples.dtype == torch.float32
    assert samples[:, 0, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert samples[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_a_limit_spreads_over_samples_and_labels_alike(tmp_path: Path) -> None:
    for index in range(10):
        write_image(tmp_path / f"{index}.png", (index, index, index))
    np.savez(tmp_path / "data.npz", x=np.arange(10.0), y=np.arange(10))
    for limit, expected in [(1, [0]), (3, [0, 3, 6]), (4, [0, 2, 5, 7]), (10, list(range(10))), (11, list(range(10)))]:
        assert (load_samples(tmp_path, limit=limit)[:, 0, 0, 0] * 255).round().tolist() == expected
        assert load_samples(tmp_path / "data.npz", limit=limit).tolist() == expected
        assert load_labels(tmp_path / "data.npz", limit=limit).tolist() == expected


def test_folders_below_are_read_too(tmp_path: Path) -> None:
    for index, name in enumerate(["dog/1.png", "Cat/2.png", "cat/1.png"]):
        write_image(tmp_path / name, (index, index, index))
    assert (load_samples(tmp_path)[:, 0, 0, 0] * 255).round().tolist() == [2, 1, 0]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "bmp", "webp"])
def test_every_image_kind(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"image.{suffix}", (200, 100, 50), size=(16, 16))
    assert (load_samples(tmp_path)[0, :, 8, 8] * 255).tolist() == pytest.approx([200, 100, 50], abs=4)


def test_channel_order_mean_and_range_are_the_models(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (255, 0, 51))
    assert load_samples(tmp_path, CAFFE)[0, :, 0, 0].tolist() == pytest.approx([51 - 104, -117, 255 - 123])
    tensorflow = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert load_samples(tmp_path, tensorflow)[0, :, 0, 0].tolist() == pytest.approx([1, -1, -0.6])


def test_size_scales_the_shorter_side_and_crops_the_middle(tmp_path: Path) -> None:
    picture = np.zeros((20, 60, 3), dtype=np.uint8)
    picture[:, 20:40] = 255  # a white middle third
    Image.fromarray(picture).save(tmp_path / "wide.png")
    write_image(tmp_path / "tall.png", size=(10, 30))
    square = load_samples(tmp_path, Preprocessing(size=10))
    assert square.shape == (2, 3, 10, 10)
    assert square[1].min() > 0.8  # the edge takes up a little of the black beside it
    assert load_samples(tmp_path, Preprocessing(size=(8, 16))).shape == (2, 3, 8, 16)


def test_grey_and_colour_are_converted_to_what_mean_asks_for(tmp_path: Path) -> None:
    write_image(tmp_path / "colour.png", (255, 255, 255))
    Image.new("L", (6, 4), 51).save(tmp_path / "grey.png")
    assert load_samples(tmp_path, GREY)[:, 0, 0, 0].tolist() == pytest.approx([1, 0.2])
    assert load_samples(tmp_path).shape == (2, 3, 4, 6)
    two_channels = Preprocessing(mean=(0.0, 0.0), std=(1.0, 1.0))
    with pytest.raises(DataError, match="1 or 3 channels"):
        load_samples(tmp_path, two_channels)


def test_transparent_palettes_lose_their_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 51])
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert load_samples(tmp_path)[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_images_of_different_sizes_name_two_files_and_the_remedy(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", size=(7, 4))
    with pytest.raises(DataError, match=r"a\.png' has 6x4 pixels, but .*b\.png' has 7x4; give a size"):
        load_samples(tmp_path)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"cannot read the image .*b\.png"):
        load_samples(tmp_path)
    (tmp_path / "b.png").write_text("no image at all")
    with pytest.raises(DataError, match=r"cannot read the image .*b\.png"):
        load_samples(tmp_path)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 60_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png' has more than 8 bits"):
        load_samples(tmp_path)


def test_an_empty_folder_lists_what_it_may_hold(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no images; expected files ending in \.jpg, \.jpeg, \.png, \.bmp, \.webp"):
        load_samples(tmp_path)


def test_without_pillow_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install \"subbyte\[images\]\""):
        load_samples(tmp_path)


# --- arrays


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float32), (torch.int32, torch.int64)],
)
def test_numbers_are_taken_as_they_are(tmp_path: Path, kind: str, stored: torch.dtype, expected: torch.dtype) -> None:
    array = torch.arange(12).view(4, 3).to(stored)
    path = write_arrays(tmp_path / f"data.{kind}", anything=array)
    samples = load_samples(path)
    assert samples.dtype == expected
    assert torch.equal(samples, array.to(expected))


def write_arrays(path: Path, **arrays: torch.Tensor) -> Path:
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    else:
        np.save(path, next(iter(arrays.values())).numpy())
    return path


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_key_chooses_and_x_and_y_are_preferred(tmp_path: Path, kind: str) -> None:
    path = write_arrays(tmp_path / f"data.{kind}", x=torch.ones(2, 3), y=torch.tensor([0, 4]), z=torch.zeros(2, 3))
    assert load_samples(path).sum() == 6
    assert load_samples(path, key="z").sum() == 0
    assert load_labels(path).tolist() == [0, 4]
    with pytest.raises(DataError, match="no array 'w'; it holds: x, y, z"):
        load_samples(path, key="w")
    path = write_arrays(tmp_path / f"other.{kind}", a=torch.ones(2, 3), b=torch.zeros(2, 3))
    with pytest.raises(DataError, match="choose one with a key out of: a, b"):
        load_samples(path)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_byte_arrays_are_pictures(tmp_path: Path, kind: str) -> None:
    pictures = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    pictures[..., 0], pictures[..., 2] = 255, 51
    path = write_arrays(tmp_path / f"data.{kind}", x=pictures)
    assert load_samples(path).shape == (2, 3, 4, 6)
    assert load_samples(path)[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert load_samples(path, CAFFE)[0, :, 0, 0].tolist() == pytest.approx([51 - 104, -117, 255 - 123])
    assert load_samples(path, Preprocessing(size=3)).shape == (2, 3, 3, 3)


def test_byte_arrays_and_files_of_the_same_pictures_give_the_same_samples(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    np.save(tmp_path / "all.npy", pictures)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    preprocessing = Preprocessing(size=(10, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), channel_order=ChannelOrder.BGR)
    assert torch.equal(load_samples(tmp_path / "all.npy", preprocessing), load_samples(tmp_path, preprocessing))


def test_byte_arrays_of_one_and_four_channels(tmp_path: Path) -> None:
    grey = write_arrays(tmp_path / "grey.npy", x=torch.full((2, 4, 6, 1), 51, dtype=torch.uint8))
    assert load_samples(grey, Preprocessing(mean=(0.2,), std=(1.0,), size=2)).abs().max() < 1e-6
    assert load_samples(grey).shape == (2, 1, 4, 6)
    with pytest.raises(DataError, match="have 1 channels, but mean and std have 3"):
        load_samples(grey, Preprocessing())
    four = write_arrays(tmp_path / "four.npy", x=torch.zeros(2, 4, 6, 4, dtype=torch.uint8))
    assert load_samples(four).shape == (2, 4, 4, 6)
    with pytest.raises(DataError, match="have 4 channels, but mean and std have 3"):
        load_samples(four, Preprocessing())


def test_floating_point_pictures_get_mean_and_std_only(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "data.npy", x=torch.full((2, 3, 4, 6), 5.0))
    preprocessing = Preprocessing(mean=(1.0, 3.0, 5.0), std=(2.0, 2.0, 2.0), value_range=255.0)
    assert load_samples(path, preprocessing)[1, :, 3, 5].tolist() == [2, 1, 0]
    with pytest.raises(DataError, match="leave out the size"):
        load_samples(path, Preprocessing(size=5))
    with pytest.raises(DataError, match="have 3 channels, but mean and std have 1"):
        load_samples(path, GREY)
    rows = write_arrays(tmp_path / "rows.npy", x=torch.ones(2, 3))
    with pytest.raises(DataError, match="channels, height, width"):
        load_samples(rows, Preprocessing())
    tokens = write_arrays(tmp_path / "tokens.npy", x=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(DataError, match="a preprocessing is for pictures"):
        load_samples(tokens, Preprocessing())


def test_arrays_that_cannot_be_samples(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    for array, message in [
        (np.zeros((0, 3), dtype=np.float32), r"empty array of shape \(0, 3\)"),
        (np.float32(1), "single number"),
        (np.array([1.0, np.nan, np.inf]), "2 numbers that are NaN"),
        (np.array([1e300]), "too large for float32"),
        (np.array([True, False]), "holds bool"),
        (np.array(["a", "b"]), "holds <U1"),
        (np.array([1j]), "holds complex128"),
        (np.zeros((2, 5), dtype=np.uint8), "read as pictures"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), "put the channels last"),
    ]:
        np.save(path, array)
        with pytest.raises(DataError, match=message):
            load_samples(path)


class Exploding:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("an object was unpickled",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([Exploding()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([Exploding()], dtype=object))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Exploding()))
    for name in ("objects.npy", "objects.npz", "pickle.npy"):
        with pytest.raises(DataError, match=rf"{name}.*Python objects"):
            load_samples(tmp_path / name)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 100, -20])
def test_damaged_files_are_named(tmp_path: Path, kind: str, kept: int) -> None:
    path = write_arrays(tmp_path / f"data.{kind}", x=torch.ones(50))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"cannot read .*data\.{kind}"):
        load_samples(path)


def test_paths_and_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent' does not exist"):
        load_samples(tmp_path / "absent")
    (tmp_path / "data.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"unknown kind; expected a folder of images .*\.npy, \.npz, \.safetensors"):
        load_samples(tmp_path / "data.txt")
    path = write_arrays(tmp_path / "data.npy", x=torch.ones(2, 2))
    with pytest.raises(OptionError, match="limit"):
        load_samples(path, limit=0)
    with pytest.raises(DataError, match="leave out the key 'x'"):
        load_samples(path, key="x")
    with pytest.raises(OptionError, match="leave out 'x'"):
        load_samples(tmp_path, key="x")


# --- labels


def test_labels_of_a_table_follow_the_order_of_the_images(tmp_path: Path) -> None:
    for name, shade in [("b.png", 20), ("A.png", 10), ("c/d.png", 30)]:
        write_image(tmp_path / "images" / name, (shade, shade, shade))
    table = tmp_path / "labels.csv"
    table.write_text("label,file\n30,c/d.png\n20,b.png\n10,A.png\n", encoding="utf-8-sig")
    shades = (load_samples(tmp_path / "images")[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(load_labels(table), shades)


def test_labels_of_a_table_without_files_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("class,label\n7,3\n8,1\n")
    assert load_labels(tmp_path / "labels.csv").tolist() == [3, 1]
    assert load_labels(tmp_path / "labels.csv", key="class").tolist() == [7, 8]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_labels_of_arrays_are_int64(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    labels = load_labels(write_arrays(tmp_path / f"labels.{kind}", y=torch.tensor([2, 0, 1], dtype=dtype)))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'label'; it has: none"),
        ("file,class\na,1\n", "no column 'label'; it has: file, class"),
        ("file,label\n", "no rows"),
        ("file,label\na,1\na,2\n", "names the file 'a' twice"),
        ("label\ncat\n", "label 'cat'"),
        ("file,label\na\n", "label None"),
        ("label\n-1\n", "label -1"),
    ],
)
def test_tables_that_cannot_be_labels(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_labels(tmp_path / "labels.csv")


def test_files_that_cannot_be_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_labels(tmp_path / "absent.npy")
    (tmp_path / "labels.txt").write_text("1")
    with pytest.raises(DataError, match=r"unknown kind; expected \.npy, \.npz, \.safetensors, \.csv"):
        load_labels(tmp_path / "labels.txt")
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00label")
    with pytest.raises(DataError, match="cannot read"):
        load_labels(tmp_path / "labels.csv")
    for labels in (torch.ones(3), torch.ones(3, 2, dtype=torch.int64)):
        with pytest.raises(DataError, match="labels are integers, one a sample"):
            load_labels(write_arrays(tmp_path / "labels.npy", y=labels))


# --- the preprocessing itself


@pytest.mark.parametrize(
    "options",
    [
        {"mean": (), "std": ()},
        {"mean": (0.0,)},
        {"mean": (float("nan"), 0.0, 0.0)},
        {"std": (1.0, 0.0, 1.0)},
        {"value_range": -1.0},
        {"size": 0},
        {"size": (4, -1)},
        {"mean": (0.0,), "std": (1.0,), "channel_order": ChannelOrder.BGR},
    ],
)
def test_a_preprocessing_that_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Preprocessing(**options)  # type: ignore[arg-type]


def test_apply_refuses_what_are_no_byte_pictures() -> None:
    with pytest.raises(DataError, match="expected uint8"):
        Preprocessing().apply(torch.zeros(1, 4, 4, 3))


def test_a_preprocessing_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(CAFFE)) == CAFFE
