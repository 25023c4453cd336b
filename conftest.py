"""What holds in every test and in every example of a docstring: chance is fixed, and arithmetic runs on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_chance() -> None:
    """Whatever ran before, modules that a test builds have the same weights."""
    torch.manual_seed(0)
