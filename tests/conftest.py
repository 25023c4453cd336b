"""What holds in every test: examples of hypothesis are fixed, and no forward is left running."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
from greenlet import greenlet
from hypothesis import settings

# A failure is the change's fault, not the day's: examples are derived from the test, and a busy machine is no defect.
settings.register_profile("subbyte", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("subbyte")


@pytest.fixture(autouse=True, scope="session")
def paused_forwards() -> Iterator[Callable[[], list[greenlet]]]:
    """Lists the forwards that have started and not ended."""
    stacks: weakref.WeakSet[greenlet] = weakref.WeakSet()

    class Recorded(greenlet):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            stacks.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subbyte.model.lockstep.greenlet", Recorded)
        yield lambda: [stack for stack in stacks if stack]


@pytest.fixture(autouse=True)
def no_forward_left_running(paused_forwards: Callable[[], list[greenlet]]) -> Iterator[None]:
    """Lockstep ends its forwards, however a test ends."""
    yield
    assert not paused_forwards(), f"{len(paused_forwards())} forwards are still running"
