"""Encoder, network and objective against torchvision's own modules and float64 by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import DEVICES

from dist_colorize.color.gamut import BINS, Gamut, bin_centers
from dist_colorize.errors import UserError
from dist_colorize.models import ModelConfig, TrainingModule, build, initialise, restore
from dist_colorize.models.encoder import Encoder
from dist_colorize.models.objectives import RebalancedCrossEntropy

TINY = ModelConfig(width=0.125, encoder="scratch")


def random_lightness(batch: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 100


@pytest.fixture(scope="module")
def vgg16_bn() -> torchvision.models.VGG:
    """torchvision's network with statistics and affine parameters that are not the identity."""
    torch.manual_seed(3)
    network = torchvision.models.vgg16_bn(weights=None).features
    for layer in network:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(layer.weight, 0.5, 2)
            torch.nn.init.normal_(layer.bias, 0, 0.3)
    return network.eval()


@pytest.mark.parametrize("device", DEVICES)
def test_folded_encoder_equals_torchvision_at_every_stride(vgg16_bn: torch.nn.Sequential, device: str) -> None:
    encoder = Encoder()
    encoder.load_vgg16_bn({f"features.{k}": v for k, v in vgg16_bn.state_dict().items()}, "test")
    image = torch.randn(1, 3, 48, 64)
    expected, x = [], image
    with torch.no_grad():
        for layer in vgg16_bn:
            if isinstance(layer, torch.nn.MaxPool2d):
                expected.append(x)
            x = layer(x)
        found = encoder.to(device)(image.to(device))
    assert encoder.channels == (128, 256, 512, 512)
    for stride, ours, theirs in zip((2, 4, 8, 16), found, expected[1:], strict=True):
        assert ours.shape[-2:] == (48 // stride, 64 // stride)
        # cuDNN sums thousands of products in another order
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4 if device == "cpu" else 1e-3)


def test_pretrained_weights_come_from_a_file(vgg16_bn: torch.nn.Sequential, tmp_path: Path) -> None:
    file = tmp_path / "vgg.pth"
    torch.save({f"features.{k}": v for k, v in vgg16_bn.state_dict().items()}, file)
    config = ModelConfig(encoder=str(file))
    network = build(config)
    initialise(network, config, random_lightness())
    # nothing of a frozen encoder is trained, and train() cannot change that
    network.train()
    assert not any(p.requires_grad for p in network.encoder.parameters())
    features = network.features(random_lightness())
    features.sum().backward()
    assert all(p.grad is None for p in network.encoder.parameters())
    assert all(p.grad is not None for p in network.decoder.parameters())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), (b"not a checkpoint", "not a PyTorch state dict"), ({}, "0 BatchNorm"), ([1], "a list")],
)
def test_bad_weights_are_named(content: object, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    config = ModelConfig(encoder=str(file))
    with pytest.raises(UserError, match=complaint) as error:
        initialise(build(config), config, random_lightness())
    assert "weights.pth" in str(error.value)


def test_weights_out_of_reach_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = ModelConfig(encoder="imagenet")
    with pytest.raises(UserError, match=r"copy it to .*model.encoder=FILE.*model.encoder=scratch"):
        initialise(build(config), config, random_lightness())


def test_pretrained_weights_need_full_width(vgg16_bn: torch.nn.Sequential, tmp_path: Path) -> None:
    file = tmp_path / "vgg.pth"
    torch.save({f"features.{k}": v for k, v in vgg16_bn.state_dict().items()}, file)
    config = ModelConfig(encoder=str(file), width=0.5)
    with pytest.raises(UserError, match=r"model\.width=1"):
        initialise(build(config), config, random_lightness())


def test_calibration_is_batch_norm_folded() -> None:
    """The oracle: the same convolutions with torch's own BatchNorm in training mode, layer after layer."""
    torch.manual_seed(0)
    encoder = Encoder(0.125)
    raw = [(c.weight.clone(), c.bias.clone()) for c in encoder.convolutions()]
    image = torch.randn(4, 3, 32, 32)
    encoder.calibrate(image)
    x, layer = image, 0
    for number, block in enumerate(encoder.blocks):
        x = F.max_pool2d(x, 2) if number else x
        for _ in block:
            weight, bias = raw[layer]
            x = F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, training=True))
            layer += 1
    torch.testing.assert_close(encoder(image)[-1], x, rtol=1e-3, atol=1e-4)


def test_network_has_output_stride_two_and_313_logits() -> None:
    network = build(TINY)
    assert network.features(random_lightness(2, 48)).shape == (2, 64, 24, 24)
    assert network(random_lightness(2, 48)).shape == (2, BINS, 24, 24)
    with pytest.raises(ValueError, match="multiples of 16"):
        network.features(random_lightness(1, 40))


def test_loss_equals_plain_weighted_cross_entropy_in_float64() -> None:
    torch.manual_seed(1)
    network = build(TINY)
    torch.nn.init.normal_(network.head.weight)
    weights = torch.rand(BINS) * 3 + 0.1
    module = TrainingModule(network, RebalancedCrossEntropy(weights))
    lightness, ab = random_lightness(), torch.randn(2, 2, 32, 32) * 25
    loss, weight = module(lightness, ab)
    loss.backward()

    # labels by brute force over the 2 x 2 means
    means = ab.double().reshape(2, 2, 16, 2, 16, 2).mean(dim=(3, 5)).permute(0, 2, 3, 1).reshape(-1, 1, 2)
    labels = (means - torch.from_numpy(bin_centers().copy())).square().sum(-1).argmin(-1)
    reference = build(TINY).double()
    reference.load_state_dict(network.state_dict())
    logits = reference(lightness.double()).permute(0, 2, 3, 1).reshape(-1, BINS)
    expected = F.cross_entropy(logits, labels, weights.double(), reduction="sum")
    expected.backward()
    assert weight.item() == pytest.approx(weights[labels].sum().item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        # float32 through 16 layers: relative to the largest gradient of the tensor
        assert (ours.grad - theirs.grad).abs().max() <= 2e-3 * theirs.grad.abs().max() + 1e-6, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_of_losses_is_single_precision_under_autocast(dtype: torch.dtype, device: str) -> None:
    """25600 pixels at log 313 each: infinite in fp16, rounded to 3 digits in bf16."""
    network = build(TINY).to(device)
    objective = RebalancedCrossEntropy(torch.ones(BINS)).to(device)
    features, lightness, ab = (torch.rand(1, c, s, s, device=device) for c, s in ((64, 160), (1, 320), (2, 320)))
    ab = 40 * (ab - 0.5)
    exact, _ = objective(features, network.head, lightness, ab)
    with torch.autocast(device, dtype):
        loss, weight = objective(features.to(dtype), network.head, lightness, ab)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.item() == 25600
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert network.head.weight.grad is not None and network.head.weight.grad.isfinite().all()


def test_restore_takes_the_moving_average_and_refuses_another_architecture() -> None:
    network, average = build(TINY), build(TINY)
    state = {"config": {"model": {"width": 0.125, "encoder": "scratch"}}, "model": network.state_dict()}
    restored = restore(state | {"ema": average.state_dict()})
    assert torch.equal(restored.head.weight, average.head.weight) and not restored.training
    assert torch.equal(restore(state | {"ema": None}).head.weight, network.head.weight)
    narrow = {"config": {"model": {"width": 0.25, "encoder": "scratch"}}, "model": network.state_dict()}
    with pytest.raises(UserError, match=r"encoder.blocks.0.0.weight is \[8, 3, 3, 3\] instead of \[16, 3, 3, 3\]"):
        restore(narrow)
    with pytest.raises(UserError, match="was not written by"):
        restore({"step": 3})


def test_gamut_tables_follow_the_module() -> None:
    objective = RebalancedCrossEntropy(torch.ones(BINS))
    assert isinstance(objective.gamut, Gamut) and not objective.state_dict()
