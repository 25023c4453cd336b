"""What holds in every test: chance is fixed, arithmetic runs on one thread, and no forward is left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A failure is the change's fault, not the day's: examples are derived from the test, and a busy machine is no defect.
settings.register_profile("subbyte", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("subbyte")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_chance() -> None:
    """Modules that a test builds have the same weights every time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_forward_left_running() -> Iterator[None]:
    """Lockstep ends its threads, however a test ends."""
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "subbyte-forward"]
    assert not left, f"{len(left)} forwards are still running"
