"""A network with its calibration samples and its test set, as one value: what a method is tried on.

`TASKS` names the builders. All but `digits` read weights and pictures from a folder that does not come with the package, because the
pictures may be used for research but not passed on.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from subbyte.errors import DataError, OptionError
from subbyte.tasks.arrays import read_array
from subbyte.tasks.cifar_resnet import CifarResNet
from subbyte.tasks.digits import digits_split, train_digits_net
from subbyte.tasks.images import image_files, open_image
from subbyte.tasks.mobilenet_v1 import MobileNetV1
from subbyte.tasks.preprocessing import ChannelOrder, Preprocessing
from subbyte.tasks.samples import load_labels, load_samples
from subbyte.tasks.scoring import Preprocess, top1
from subbyte.tasks.squeezenet import SqueezeNet11

__all__ = ["TASKS", "Task", "default_data_root", "digits", "mobilenet_v1", "resnet20", "resnet56", "squeezenet"]

CIFAR_PREPROCESSING = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
MOBILENET_PREPROCESSING = Preprocessing(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5), value_range=255.0)
SQUEEZENET_PREPROCESSING = Preprocessing(mean=(104.0, 117.0, 123.0), channel_order=ChannelOrder.BGR, value_range=255.0)
IMAGENET_PIXELS = 224
IMAGENET_BATCH = 16  # what a layer gives then stays near the processor's cache: on two cores 2.5 times as fast as 250


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network, unlabeled samples to calibrate on, and labelled samples to score on.

    Attributes:
        name: key in `TASKS`.
        model: the float network, in evaluation mode, on the CPU.
        calibration: float32 (samples, channels, height, width), ready for the model.
        test_inputs: what `preprocess` takes, such as uint8 (samples, height, width, channels), a quarter of the bytes of float32; or what
            the model takes itself.
        test_labels: int64 (samples,), class indices, perhaps sorted by class: to score on fewer, take every n-th sample, not the first
            ones.
        first_and_last: qualified names of the first and the last layer with weights, which low-bit methods keep at 8 bits.
        preprocess: turns a batch of `test_inputs` into what the model takes, on the same device; None if they are that already.
        batch_size: samples a forward pass when scoring.

    Example:
        >>> samples, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
        >>> task = Task("mine", nn.Identity().eval(), samples, samples, labels, first_and_last=("first", "last"))
        >>> task.score(task.model)
        75.0
    """

    name: str
    model: nn.Module
    calibration: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    first_and_last: tuple[str, str]
    preprocess: Preprocess | None = None
    batch_size: int = 250

    def score(self, model: nn.Module) -> float:
        """Top-1 of a model on the test set.

        Args:
            model: takes and gives what `self.model` does; in evaluation mode, on any device.

        Returns:
            Percent, 0 to 100.

        Raises:
            ModelError: if the model is in training mode.

        Example:
            >>> task = Task("mine", nn.Identity(), torch.eye(2), torch.eye(2), torch.tensor([0, 1]), ("first", "last"))
            >>> task.score(nn.Softmax(-1).eval())
            100.0
        """
        return top1(model, self.test_inputs, self.test_labels, batch_size=self.batch_size, preprocess=self.preprocess)


def default_data_root() -> Path | None:
    """The folder ``shared/data`` next to the checkout of subbyte that the current directory, or else this file, lies in.

    Returns:
        The folder, or None if there is no such checkout or no such folder.

    Example:
        >>> root = default_data_root()
        >>> root is None or root.is_dir()
        True
    """
    here = (Path.cwd(), Path(__file__).resolve())
    checkouts = (folder for start in here for folder in (start, *start.parents) if _is_checkout(folder))
    return next((data for checkout in checkouts if (data := checkout.parent / "shared" / "data").is_dir()), None)


def _is_checkout(folder: Path) -> bool:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):  # none, or one that belongs to something else
        return False
    return bool(project.get("name") == "subbyte")


def resnet20(*, samples: int = 256, seed: int = 0, data: Path | None = None) -> Task:
    """ResNet-20 on CIFAR-10: 0.27 M parameters, 10,000 test pictures.

    Args:
        samples: calibration samples, up to 2,048 pictures of the training set.
        seed: chooses which of them.
        data: folder with ``cifar10/``; None takes `default_data_root`.

    Returns:
        The task; its calibration is float32 (samples, 3, 32, 32).

    Raises:
        DataError: if the data is absent or damaged.
        OptionError: if there are not so many calibration samples.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2; weights of
    akamaster/pytorch_resnet_cifar10.

    Example:
        >>> resnet20(data=Path("absent"))
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent/cifar10/resnet20.safetensors' does not exist...
    """
    return _cifar_task("resnet20", CifarResNet(20), samples, seed, data)


def resnet56(*, samples: int = 256, seed: int = 0, data: Path | None = None) -> Task:
    """ResNet-56 on CIFAR-10: 0.86 M parameters, 10,000 test pictures.

    Args:
        samples: calibration samples, up to 2,048 pictures of the training set.
        seed: chooses which of them.
        data: folder with ``cifar10/``; None takes `default_data_root`.

    Returns:
        The task; its calibration is float32 (samples, 3, 32, 32).

    Raises:
        DataError: if the data is absent or damaged.
        OptionError: if there are not so many calibration samples.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2; weights of
    akamaster/pytorch_resnet_cifar10.

    Example:
        >>> resnet56(data=Path("absent"))
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent/cifar10/resnet56.safetensors' does not exist...
    """
    return _cifar_task("resnet56", CifarResNet(56), samples, seed, data)


def mobilenet_v1(*, samples: int = 256, seed: int = 0, data: Path | None = None) -> Task:
    """MobileNetV1 of width 0.75 on 2,278 validation pictures of ImageNet: 2.6 M parameters.

    Args:
        samples: calibration samples, up to 512 pictures of the training set.
        seed: chooses which of them.
        data: folder with ``imagenet/``; None takes `default_data_root`.

    Returns:
        The task; its calibration is float32 (samples, 3, 224, 224), its test inputs uint8 (2278, 224, 224, 3), in `file_order`.

    Raises:
        DataError: if the data is absent or damaged, or if pillow is not installed.
        OptionError: if there are not so many calibration samples.

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017.

    Example:
        >>> mobilenet_v1(data=Path("absent"))
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent/imagenet/mobilenet_v1_075.safetensors' does not exist...
    """
    root = _data_root(data)
    model = _with_weights(MobileNetV1(width=0.75), root / "imagenet" / "mobilenet_v1_075.safetensors")
    calibration, test_inputs, test_labels = _imagenet(root / "imagenet", samples, seed)
    preprocess = MOBILENET_PREPROCESSING.apply
    first_and_last = ("stem.conv", "classifier")
    return Task("mobilenet_v1", model, preprocess(calibration), test_inputs, test_labels, first_and_last, preprocess, IMAGENET_BATCH)


def squeezenet(*, samples: int = 256, seed: int = 0, data: Path | None = None) -> Task:
    """SqueezeNet 1.1 on 2,278 validation pictures of ImageNet: 1.2 M parameters, no batch norm.

    Args:
        samples: calibration samples, up to 512 pictures of the training set.
        seed: chooses which of them.
        data: folder with ``imagenet/``; None takes `default_data_root`.

    Returns:
        The task; its calibration is float32 (samples, 3, 224, 224), its test inputs uint8 (2278, 224, 224, 3), in `file_order`.

    Raises:
        DataError: if the data is absent or damaged, or if pillow is not installed.
        OptionError: if there are not so many calibration samples.

    Source: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016; weights of
    microsoft/Windows-Machine-Learning.

    Example:
        >>> squeezenet(data=Path("absent"))
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent/imagenet/squeezenet_1_1.safetensors' does not exist...
    """
    root = _data_root(data)
    model = _with_weights(SqueezeNet11(), root / "imagenet" / "squeezenet_1_1.safetensors")
    calibration, test_inputs, test_labels = _imagenet(root / "imagenet", samples, seed)
    preprocess = SQUEEZENET_PREPROCESSING.apply
    return Task("squeezenet", model, preprocess(calibration), test_inputs, test_labels, ("conv1", "conv10"), preprocess, IMAGENET_BATCH)


def digits(*, samples: int = 256, seed: int = 0, data: Path | None = None) -> Task:
    """A small network on the digits of scikit-learn, trained here in a few seconds: 0.04 M parameters, 500 test pictures, nothing to
    download.

    Args:
        samples: calibration samples, up to the 1,297 training digits.
        seed: chooses which of them; the network and the split are the same for every seed.
        data: not used: the digits come with scikit-learn. It is here so that every builder can be called alike.

    Returns:
        The task; its calibration is float32 (samples, 1, 8, 8), its test inputs (500, 1, 8, 8).

    Raises:
        DataError: if scikit-learn is not installed.
        OptionError: if there are not so many calibration samples.

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as scikit-learn ships it.

    Example:
        >>> digits(samples=2000)
        Traceback (most recent call last):
        subbyte.errors.OptionError: there are 1 to 1297 calibration samples to choose, not 2000
    """
    train_x, _, test_x, test_y = digits_split(seed=0)
    calibration = train_x[_chosen(len(train_x), samples, seed)]
    return Task("digits", train_digits_net(seed=0), calibration, test_x, test_y, ("conv1", "linear"))


TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "mobilenet_v1": mobilenet_v1,
    "squeezenet": squeezenet,
}


def _cifar_task(name: str, model: nn.Module, samples: int, seed: int, data: Path | None) -> Task:
    root = _data_root(data) / "cifar10"
    _with_weights(model, root / f"{name}.safetensors")
    calibration = load_samples(root / "calibration.npz", CIFAR_PREPROCESSING)
    return Task(
        name=name,
        model=model,
        calibration=calibration[_chosen(len(calibration), samples, seed)],
        test_inputs=read_array(root / "test.npz", key=None, preferred="x"),
        test_labels=load_labels(root / "test.npz"),
        first_and_last=("conv1", "linear"),
        preprocess=CIFAR_PREPROCESSING.apply,
    )


def _imagenet(root: Path, samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration pictures, test pictures, both uint8 (count, 224, 224, 3) RGB, and test labels, int64 (count,)."""
    files = image_files(root / "calibration")
    calibration = _imagenet_pictures([files[index] for index in _chosen(len(files), samples, seed).tolist()])
    return calibration, _imagenet_pictures(image_files(root / "val")), load_labels(root / "val.csv")


def _imagenet_pictures(files: Sequence[Path]) -> Tensor:
    pictures = torch.empty(len(files), IMAGENET_PIXELS, IMAGENET_PIXELS, 3, dtype=torch.uint8)
    for picture, path in zip(pictures, files, strict=True):
        decoded = torch.from_numpy(np.array(open_image(path, channels=3)))
        margin = (len(decoded) - IMAGENET_PIXELS) // 2  # those of 227 pixels lose one row before and two after
        picture.copy_(decoded[margin : margin + IMAGENET_PIXELS, margin : margin + IMAGENET_PIXELS])
    return pictures


def _chosen(available: int, samples: int, seed: int) -> Tensor:
    if not 1 <= samples <= available:
        raise OptionError(f"there are 1 to {available} calibration samples to choose, not {samples}")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]


def _data_root(data: Path | None) -> Path:
    root = default_data_root() if data is None else data
    if root is None:
        raise DataError(
            "the weights and pictures of this task do not come with the package; pass their folder as `data`, or take the task 'digits'"
        )
    return root


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load weights, of any precision, into a float32 model, and put it into evaluation mode."""
    if not path.is_file():
        raise DataError(f"'{path}' does not exist; pass the folder that holds it as `data`, or take the task 'digits'")
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"'{path}' does not hold the weights of this network: {error}") from error
    return model.eval()
