"""A small network on real data that comes with scikit-learn: 1,797 handwritten digits of 8x8 pixels, nothing to download.

Six layers with weights, batch norm and a residual sum, so that it has what a large network has, and trains in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.errors import DataError

__all__ = ["DigitsNet", "digits_split", "train_digits_net"]

TEST_SAMPLES = 500
EPOCHS = 16
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 1e-2


class DigitsNet(nn.Module):
    """Five convolutions, 16-32-32-32-64 channels, around one residual sum, and a linear layer.

    Takes float32 (batch, 1, 8, 8), ink in 0..1; gives float32 (batch, 10), logits.

    Example:
        >>> DigitsNet().eval()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(32)
        self.conv5 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.bn5 = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 (batch, 10), of digits, float32 (batch, 1, 8, 8)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        out = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(out)) + x)
        x = F.relu(self.bn5(self.conv5(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def digits_split(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits, shuffled and cut into a training and a test part that share no sample.

    Args:
        seed: of the shuffle.

    Returns:
        train_x float32 (1297, 1, 8, 8), ink in 0..1; train_y int64 (1297,), 0 to 9; test_x (500, 1, 8, 8) and test_y (500,) likewise.

    Raises:
        DataError: if scikit-learn is not installed.

    Source: the test part of Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as scikit-learn ships it.

    Example:
        >>> train_x, train_y, test_x, test_y = digits_split(seed=0)
        >>> train_x.shape, test_y.shape
        (torch.Size([1297, 1, 8, 8]), torch.Size([500]))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError('the digits come with scikit-learn, which is not installed; run: pip install "subbyte[demo]"') from error
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # the pixels count ink from 0 to 16
    y = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    return x[train], y[train], x[test], y[test]


def train_digits_net(seed: int = 0) -> DigitsNet:
    """Train a `DigitsNet` on the training part of `digits_split(seed)`, in a few seconds.

    Args:
        seed: of the split, the initial weights and the order of the batches; the same seed gives the same network on the same machine. The
            caller's random state and number of threads are left as they were.

    Returns:
        The network in evaluation mode, right on at least 98 % of the test part.

    Raises:
        DataError: if scikit-learn is not installed.

    Example:
        >>> train_digits_net(seed=0).training
        False
    """
    train_x, train_y, _, _ = digits_split(seed)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        net = DigitsNet()
        steps = EPOCHS * (len(train_x) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
        for _ in range(EPOCHS):
            order = torch.randperm(len(train_x))
            for batch in order.split(BATCH_SIZE)[: len(train_x) // BATCH_SIZE]:  # the few left over come up in another epoch
                optimizer.zero_grad()
                F.cross_entropy(net(train_x[batch]), train_y[batch]).backward()
                optimizer.step()
                schedule.step()
    return net.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread, and wait for it where the machine is busy; nor may sums depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
