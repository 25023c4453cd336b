"""A vision transformer of the transformers library, trained on digits, goes the way of every other model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte.tasks.digits import digits_split

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return digits_split()


@pytest.fixture(scope="module")
def vit(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> nn.Module:
    """Patches of 2 x 2, three pre-norm blocks of 48 channels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)
    model = transformers.ViTForImageClassification(config)
    images, labels, *_ = digits
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(12):
        for batch in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100.0 * float((model(images).logits.argmax(1) == labels).double().mean())


@pytest.mark.parametrize(("weight_bits", "activation_bits", "lost"), [(8, 8, 0.5), (4, 8, 1.5), (4, 4, 8.0)])
def test_a_vision_transformer_keeps_its_accuracy(
    vit: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor], tmp_path: Path, weight_bits: int, activation_bits: int, lost: float
) -> None:
    images, _, test_images, test_labels = digits
    layers = {name for name, module in vit.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    pinned = {"*patch_embeddings.projection": 8, "classifier": 8}
    result = subbyte.quantize(vit, images[:256], widths=subbyte.Widths(weight_bits, activation_bits, pinned=pinned))
    assert result.allocation.keys() == layers
    assert accuracy(result.model, test_images, test_labels) >= accuracy(vit, test_images, test_labels) - lost
    size = result.save(tmp_path / "vit.safetensors")
    again = subbyte.load(tmp_path / "vit.safetensors", into=vit)
    assert size == result.size_bytes
    with torch.no_grad():
        assert torch.equal(again(test_images).logits, result.model(test_images).logits)


@pytest.mark.filterwarnings("ignore:the file is not faster")  # so small a model need not be
def test_its_file_runs_in_int8(vit: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = subbyte.quantize(vit, digits[0][:128], widths=subbyte.Widths(4, 8))
    done = result.export_onnx(tmp_path / "vit.onnx", threads=1)
    assert all(check.agreement is not None and check.agreement >= 99.0 for check in done.verification.checks)
    assert not done.verification.float_layers
    assert done.verification.kernels.keys() == result.allocation.keys()
