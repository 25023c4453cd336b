"""Paused forwards: bit-identical outputs, one at a time, nothing kept alive and no forward left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

from subbyte.errors import LayerError, ModelError
from subbyte.model.batches import call
from subbyte.model.lockstep import Forward, Lockstep


class Net(nn.Module):
    """Two convolutions with a branch between them, and a head; `between` runs before each layer."""

    def __init__(self, between: Callable[[str, Tensor], object] = lambda name, x: None) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.between = between
        self.eval()

    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
        self.between("conv1", x)
        x = self.conv1(x * scale).relu()
        self.between("conv2", x)
        x = x + self.conv2(x)
        self.between("fc", x)
        y = self.fc(x.mean(dim=(2, 3)))
        self.between("end", y)
        return {"logits": y}


ORDER = ("conv1", "conv2", "fc")


def forwards(model: nn.Module, batches: Sequence[Any], names: Sequence[str] = ORDER) -> list[Forward]:
    layers = {name: model.get_submodule(name) for name in names}
    return [Forward(model, batch, layers) for batch in batches]


def check_nothing_left(model: nn.Module) -> None:
    """That no forward is left either is checked after every test, see conftest."""
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


BATCHES: dict[str, list[Any]] = {
    "tensors": [torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(i)) for i in range(3)],
    "a smaller last batch": [torch.ones(4, 3, 7, 7), torch.ones(1, 3, 7, 7) * 2],
    "tuples": [(torch.ones(2, 3, 7, 7), 0.5), (torch.ones(2, 3, 7, 7), torch.tensor(2.0))],
    "lists": [[torch.ones(2, 3, 7, 7), 0.5]],
    "mappings": [{"x": torch.ones(2, 3, 7, 7), "scale": 3.0}, {"scale": 0.5, "x": torch.ones(1, 3, 7, 7)}],
    "different sizes": [torch.ones(1, 3, 5, 7), torch.ones(1, 3, 9, 6)],
    "one": [torch.ones(1, 3, 7, 7)],
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_outputs_are_bit_identical_to_plain_forwards(batches: list[Any]) -> None:
    model = Net()
    with torch.no_grad():
        expected = [call(model, batch) for batch in batches]
    with Lockstep(forwards(model, batches), ORDER, keep_outputs=True) as lockstep:
        stops = [(stop.layer, sorted(stop.runs)) for stop in lockstep]
    assert stops == [(name, list(range(len(batches)))) for name in ORDER]
    for given, reference in zip(lockstep.outputs(), expected, strict=True):
        assert torch.equal(given["logits"], reference["logits"])
        assert not given["logits"].requires_grad
    check_nothing_left(model)


def test_inputs_are_what_the_layer_receives() -> None:
    model, x = Net(), torch.randn(2, 3, 7, 7)
    seen: dict[str, Tensor] = {}
    for name in ORDER:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    model(x)
    with Lockstep(forwards(model, [x]), ORDER) as lockstep:
        for stop in lockstep:
            assert torch.equal(stop.input(0), seen[stop.layer])


def test_a_layer_changed_while_paused_is_what_goes_on() -> None:
    model, x = Net(), torch.randn(2, 3, 7, 7)
    with Lockstep(forwards(model, [x, x]), ORDER, keep_outputs=True) as lockstep:
        for stop in lockstep:
            if stop.layer == "conv2":
                with torch.no_grad():
                    model.conv2.weight.mul_(2)
    with torch.no_grad():
        assert torch.equal(lockstep.outputs()[0]["logits"], model(x)["logits"])


def test_two_models_pause_together() -> None:
    one, two, x = Net(), Net(), torch.randn(2, 3, 7, 7)
    with Lockstep(forwards(one, [x]) + forwards(two, [x]), ORDER) as lockstep:
        assert [(stop.layer, sorted(stop.runs)) for stop in lockstep] == [(name, [0, 1]) for name in ORDER]


def test_a_model_in_two_forwards_keeps_them_apart() -> None:
    model = Net()
    batches = [torch.full((1, 3, 7, 7), float(i)) for i in range(4)]
    with Lockstep(forwards(model, batches), ORDER) as lockstep:
        for stop in lockstep:
            if stop.layer == "conv1":
                assert [float(stop.input(i).mean()) for i in range(4)] == [0, 1, 2, 3]


def test_a_layer_that_is_not_named_is_passed() -> None:
    model = Net()
    with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)], ["fc"]), ["fc"]) as lockstep:
        assert [stop.layer for stop in lockstep] == ["fc"]


def test_other_forwards_of_the_same_model_are_not_paused() -> None:
    model, x = Net(), torch.ones(1, 3, 7, 7)
    with Lockstep(forwards(model, [x]), ORDER) as lockstep:
        for _ in lockstep:
            assert model(x)["logits"].shape == (1, 5)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self.step(x).relu()))


def test_a_layer_called_twice_makes_two_stops() -> None:
    model = Twice().eval()
    with Lockstep(forwards(model, [torch.ones(2, 4), torch.ones(1, 4)], ["step", "head"]), ["step", "head"]) as lockstep:
        assert [(stop.layer, len(stop.runs)) for stop in lockstep] == [("step", 2), ("step", 2), ("head", 2)]


class Experts(nn.Module):
    """The sign of a batch decides which experts it meets, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        sign, x = float(x.sum()), self.stem(x)
        if sign > 0:
            x = self.a(x)
        elif sign < 0:
            x = self.b(x)
        else:
            x = self.a(self.b(x))
        return self.head(x)


def test_a_layer_that_some_batches_skip_stops_only_the_others() -> None:
    model, names = Experts().eval(), ("stem", "a", "b", "head")
    batches = [torch.ones(1, 4), -torch.ones(1, 4), torch.ones(1, 4)]
    with Lockstep(forwards(model, batches, names), names, keep_outputs=True) as lockstep:
        assert [(stop.layer, sorted(stop.runs)) for stop in lockstep] == [
            ("stem", [0, 1, 2]),
            ("a", [0, 2]),
            ("b", [1]),
            ("head", [0, 1, 2]),
        ]
    with torch.no_grad():
        assert all(torch.equal(given, model(batch)) for given, batch in zip(lockstep.outputs(), batches, strict=True))


def test_a_batch_that_runs_layers_in_another_order_goes_through() -> None:
    model, names = Experts().eval(), ("stem", "a", "b", "head")
    batches = [torch.ones(1, 4), torch.zeros(1, 4)]
    with Lockstep(forwards(model, batches, names), names, keep_outputs=True) as lockstep:
        stops = [(stop.layer, sorted(stop.runs)) for stop in lockstep]
    assert sorted(stops) == sorted([("stem", [0, 1]), ("a", [0]), ("b", [1]), ("a", [1]), ("head", [0, 1])])
    with torch.no_grad():
        assert all(torch.equal(given, model(batch)) for given, batch in zip(lockstep.outputs(), batches, strict=True))


def test_only_one_forward_runs_at_any_time() -> None:
    running = threading.Lock()

    def alone(name: str, x: Tensor) -> None:
        assert running.acquire(blocking=False), "another forward runs"
        time.sleep(0.002)
        running.release()

    model = Net(alone)
    with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)] * 6), ORDER) as lockstep:
        for _ in lockstep:
            assert running.acquire(blocking=False), "a forward runs beside the caller"
            time.sleep(0.002)
            running.release()


def test_gradient_mode_of_the_caller_does_not_matter() -> None:
    with torch.enable_grad(), Lockstep(forwards(Net(), [torch.ones(1, 3, 7, 7)]), ORDER) as lockstep:
        for stop in lockstep:
            assert not stop.input(0).requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("keep", [True, False])
def test_modes_that_a_model_sets_around_its_layers_stay_its_own(keep: bool) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def modes(*_: object) -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                x = self.a(x)
                seen.append(modes())
            x = x.clone()
            with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cpu"):
                self.b(x)
                seen.append(modes())
            seen.append(modes())
            return self.c(x)

    model, names = Moody().eval(), ("a", "b", "c")
    with torch.set_grad_enabled(keep):
        before = modes()
        with Lockstep(forwards(model, [torch.ones(1, 4)] * 3, names), names) as lockstep:
            for _ in lockstep:
                assert modes() == before
        assert modes() == before
    expected = [(False, True, False), (True, False, True), (False, False, False)]
    assert sorted(seen) == sorted(expected * 3)


def test_modes_survive_an_early_end() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode(), torch.autocast("cpu"):
                return self.a(x)

    model = Moody().eval()
    with Lockstep(forwards(model, [torch.ones(1, 4)] * 3, ["a"]), ["a"]) as lockstep:
        next(iter(lockstep))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def test_no_thread_is_started() -> None:
    model, before = Net(), threading.active_count()
    with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)] * 4), ORDER) as lockstep:
        assert all(threading.active_count() == before for _ in lockstep)


def test_a_stop_keeps_no_tensor_alive() -> None:
    model, stops, inputs = Net(), [], []
    with Lockstep(forwards(model, [torch.randn(1, 3, 7, 7) for _ in range(3)]), ORDER) as lockstep:
        for stop in lockstep:
            assert all(reference() is None for reference in inputs), "the input of an earlier layer is still alive"
            stops.append(stop)
            inputs = [weakref.ref(stop.input(index)) for index in stop.runs if stop.layer != "conv1"]
    assert all(reference() is None for reference in inputs)
    assert len(stops) == 3


def test_inputs_are_released_when_the_context_is_left_early() -> None:
    model = Net()
    with Lockstep(forwards(model, [torch.randn(1, 3, 7, 7)]), ORDER) as lockstep:
        for stop in lockstep:
            if stop.layer == "conv2":
                reference = weakref.ref(stop.input(0))
                break
    assert reference() is None
    check_nothing_left(model)


def failing_at(where: str, which: float) -> Net:
    def fail(name: str, x: Tensor) -> None:
        if name == where and (name != "conv1" or float(x.mean()) == which):
            raise RuntimeError("boom")

    return Net(fail)


def test_a_failure_before_the_first_layer_says_so() -> None:
    model = failing_at("conv1", 2.0)
    with pytest.raises(ModelError, match=r"float32 \(1, 3, 7, 7\).*before it reached its first layer: boom") as caught:
        with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7), 2 * torch.ones(1, 3, 7, 7)]), ORDER) as lockstep:
            list(lockstep)
    assert not isinstance(caught.value, LayerError)
    assert isinstance(caught.value.__cause__, RuntimeError)
    check_nothing_left(model)


@pytest.mark.parametrize(("where", "layer"), [("conv2", "conv1"), ("fc", "conv2"), ("end", "fc")])
def test_a_failure_after_a_layer_names_it(where: str, layer: str) -> None:
    model = failing_at(where, 0)
    with pytest.raises(LayerError, match="after this layer: boom") as caught:
        with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)] * 3), ORDER) as lockstep:
            list(lockstep)
    assert caught.value.layer == layer
    check_nothing_left(model)


def test_a_failure_in_a_layer_names_it_once() -> None:
    model = Net()
    batches = [torch.ones(1, 3, 7, 7), torch.ones(1, 3, 7, 7), torch.ones(1, 2, 7, 7)]  # the third has too few channels
    with pytest.raises(LayerError, match=r"float32 \(1, 2, 7, 7\).* in this layer") as caught:
        with Lockstep(forwards(model, batches), ORDER) as lockstep:
            list(lockstep)
    assert caught.value.layer == "conv1"
    assert str(caught.value).count("layer 'conv1'") == 1
    check_nothing_left(model)


def test_an_input_that_is_not_finite_names_the_layer() -> None:
    model = Net(lambda name, x: x.fill_(float("nan")) if name == "conv2" else None)
    with pytest.raises(LayerError, match="NaN or infinite") as caught:
        with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)]), ORDER) as lockstep:
            list(lockstep)
    assert caught.value.layer == "conv2"
    check_nothing_left(model)


def test_a_model_that_exits_does_not_go_unnoticed() -> None:
    def leave(name: str, x: Tensor) -> None:
        if name == "fc":
            sys.exit("the model gives up")

    model = Net(leave)
    with pytest.raises((SystemExit, ModelError)):
        with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)] * 2), ORDER) as lockstep:
            list(lockstep)
    check_nothing_left(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("layer", ORDER)
def test_an_error_in_the_callers_loop_ends_every_forward(
    error: type[BaseException], layer: str, paused_forwards: Callable[[], list[greenlet]]
) -> None:
    model = Net()
    with pytest.raises(error):
        with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)] * 4), ORDER) as lockstep:
            for stop in lockstep:
                if stop.layer == layer:
                    assert len(paused_forwards()) == 4
                    raise error("stop")
    check_nothing_left(model)


def test_leaving_the_loop_ends_every_forward() -> None:
    model = Net()
    with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)] * 4), ORDER) as lockstep:
        next(iter(lockstep))
    check_nothing_left(model)
    with Lockstep(forwards(model, [torch.ones(1, 3, 7, 7)]), ORDER):
        pass
    check_nothing_left(model)


INTERRUPTED = """
import gc, os, signal, time
import torch
from greenlet import getcurrent, greenlet
from torch import nn
from subbyte.model.lockstep import Forward, Lockstep

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with the signal ignored

class Interrupting(nn.Sequential):
    def forward(self, x):
        x = self[0](x)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        return self[1](x)

model = Interrupting(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
layers = {"0": model[0], "1": model[1]}
try:
    with Lockstep([Forward(model, torch.ones(1, 4), layers) for _ in range(3)], list(layers)) as lockstep:
        list(lockstep)
except KeyboardInterrupt:
    running = [stack for stack in gc.get_objects() if type(stack) is greenlet and stack and stack is not getcurrent()]
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    print("interrupted", lockstep._runs[0].layer, len(running), len(hooks))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_a_forward_runs_ends_every_forward() -> None:
    """In a process of its own: signals of the one that runs the tests are the test runner's."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted 0 0 0\n", "")


def test_a_model_that_swallows_exceptions_can_be_cancelled() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.fc(x)
            except Exception:  # noqa: BLE001 - what this test is about
                return self.other(x)

    model = Stubborn().eval()
    with Lockstep(forwards(model, [torch.ones(1, 4)] * 2, ["fc", "other"]), ["fc", "other"]) as lockstep:
        next(iter(lockstep))
    check_nothing_left(model)
