"""What torch is set to while a model is quantized, and after."""

import pytest
import torch
from torch import nn

from subbyte.model.arithmetic import exact_float32

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def as_they_were():
    """A test's settings end with it."""
    precision, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32 = convolutions


def test_old_and_new_settings_say_the_same_inside_and_are_restored():
    torch.set_float32_matmul_precision("high")
    with exact_float32():
        assert (cudnn.allow_tf32, matmul.allow_tf32, torch.get_float32_matmul_precision()) == (False, False, "highest")
        assert cudnn.deterministic
        assert not cudnn.benchmark
    assert (cudnn.allow_tf32, matmul.allow_tf32, torch.get_float32_matmul_precision()) == (True, True, "high")
    assert not cudnn.deterministic


@pytest.mark.skipif(not hasattr(cudnn, "conv"), reason="precisions by operator came with torch 2.9")
def test_precisions_by_operator_that_a_user_has_set_are_restored():
    cudnn.conv.fp32_precision = "ieee"
    with exact_float32():
        assert cudnn.allow_tf32 is False
        assert {owner.fp32_precision for owner in (cudnn.conv, cudnn.rnn, matmul)} == {"ieee"}
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")


def test_a_model_can_be_exported_inside():
    with exact_float32():
        program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval(), (torch.zeros(2, 3, 8, 8),))
    assert len(list(program.graph.nodes)) > 3


def test_settings_are_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert cudnn.allow_tf32 is True
