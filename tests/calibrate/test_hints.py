import pytest
import torch

from subbyte.calibrate.hints import LEAST_SPREAD, relative_error
from subbyte.model.clipping import Clip
from subbyte.quantizers.pieces import IN_CACHE


@pytest.mark.parametrize("clip", [None, Clip(0.0), Clip(0.0, 6.0)])
@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 4), (5, IN_CACHE // 2)])
def test_the_error_and_its_gradient_are_those_of_the_equation(shape: tuple[int, ...], clip: Clip | None) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = 3 + 4 * torch.randn(shape, generator=generator)
    given = (reference + torch.randn(shape, generator=generator)).requires_grad_()
    low, high = (clip.low, clip.high) if clip else (-torch.inf, torch.inf)
    read, output = reference.double().clamp(low, high), given.double().clamp(low, high)
    centre = read.mean(dim=0) if shape[0] > 1 else 0.0
    expected = (output - read).square().sum() / (read - centre).square().sum()
    (wanted,) = torch.autograd.grad(3 * expected, given)
    found = relative_error(reference, given, clip)
    (gradient,) = torch.autograd.grad(3 * found, given)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-7 * wanted.abs().max().item())


@pytest.mark.parametrize("samples", [2, 3, 32])
def test_what_is_the_same_for_all_samples_is_measured_by_its_size(samples: int) -> None:
    same = torch.linspace(1000.0, 1001.0, 50).expand(samples, 50)
    assert relative_error(same, same * 1.01).item() == pytest.approx(1e-4 / LEAST_SPREAD, rel=1e-3)


def test_no_samples_have_no_error() -> None:
    assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0.0
