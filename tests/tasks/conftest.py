"""What the tests of the tasks share."""

from __future__ import annotations

import pytest

from subbyte.tasks import DigitsNet, train_digits_net


@pytest.fixture(scope="session")
def trained_digits_net() -> DigitsNet:
    """Trained once; tests leave it as it is."""
    return train_digits_net(seed=0)
