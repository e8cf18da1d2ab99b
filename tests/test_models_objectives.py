"""Every method: its loss against float64 by the book, sums that add up, the same step at any world size, resume."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKOUT, DEVICES

from dist_colorize import config
from dist_colorize.color.gamut import BINS, bin_centers
from dist_colorize.color.lab import AB_SCALE
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build, initialise
from dist_colorize.models.objectives import Perceptual
from dist_colorize.models.objectives.linear_cross_entropy import CHUNK, linear_cross_entropy
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.stages import decode_and_run, load_preset
from dist_colorize.recipe import Recipe
from dist_colorize.resources import resource

WORKER = Path(__file__).parent / "workers" / "methods.py"
SIZE = 32


def photographs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """L and ab of smooth random pictures, mostly inside the gamut."""
    generator = torch.Generator().manual_seed(7)
    small = torch.randn(batch, 3, 4, 4, generator=generator)
    image = F.interpolate(small, SIZE, mode="bilinear", align_corners=False)
    return image[:, :1] * 8 + 50, image[:, 1:] * 15


def module(method: str, seed: int = 0) -> TrainingModule:
    torch.manual_seed(seed)
    model = ModelConfig(method=method, width=0.125, encoder="scratch", skips=method.startswith("final"))
    network = build(model)
    initialise(network, model, photographs(4)[0])
    # a regressor's outputs are times AB_SCALE: colours that exist
    torch.nn.init.normal_(network.head.weight, std=0.1 if METHODS[method].outputs == BINS else 0.02)
    weights = torch.rand(BINS, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    return TrainingModule(network, METHODS[method](weights))


def labels_and_targets(ab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By brute force in float64: nearest bin [n], and the Gaussian over the 5 nearest as a dense [n, 313]."""
    means = ab.double().unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)).movedim(1, -1).reshape(-1, 1, 2)
    distance = (means - torch.tensor(bin_centers())).square().sum(-1)
    nearest = distance.topk(5, dim=1, largest=False)
    shares = torch.exp(-nearest.values / (2 * 5.0**2))
    dense = torch.zeros_like(distance).scatter_(1, nearest.indices, shares / shares.sum(1, keepdim=True))
    return distance.argmin(-1), dense


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["classification", "final", "final_soft"])
def test_classification_losses_equal_dense_cross_entropy(method: str, device: str) -> None:
    one = module(method).to(device)
    lightness, ab = photographs()
    loss, weight = one(lightness.to(device), ab.to(device))
    loss.backward()
    labels, targets = labels_and_targets(ab)
    reference = build(
        ModelConfig(method=method, width=0.125, encoder="scratch", skips=method != "classification")
    ).double()
    reference.load_state_dict(one.network.state_dict())
    logits = reference(lightness.double()).permute(0, 2, 3, 1).reshape(-1, BINS)
    weights = torch.rand(BINS, generator=torch.Generator().manual_seed(1)).double() * 3 + 0.1
    weights = torch.ones(BINS).double() if method == "classification" else weights
    each = F.cross_entropy(logits, targets if method == "final_soft" else labels, reduction="none")
    expected = (weights[labels] * each).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert weight.item() == pytest.approx(weights[labels].sum().item(), rel=1e-5)
    for ours, theirs in zip(one.network.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad.cpu() - theirs.grad).abs().max() <= 3e-3 * theirs.grad.abs().max() + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bins", "count", "chunk"), [(1, 1000, 256), (5, 1000, 300), (5, 1, 64), (1, 64, 64)])
def test_linear_cross_entropy_equals_the_dense_one_in_float64(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, bins: int, count: int, chunk: int
) -> None:
    monkeypatch.setitem(CHUNK, device, chunk)
    random = torch.Generator().manual_seed(3)
    rows = torch.randn(count, 64, generator=random).to(dtype)
    weight, bias = 0.3 * torch.randn(BINS, 64, generator=random), torch.randn(BINS, generator=random)
    labels = torch.stack([torch.randperm(BINS, generator=random)[:bins] for _ in range(count)])
    shares = torch.rand(count, bins, generator=random).add_(0.1)
    shares /= shares.sum(dim=1, keepdim=True)
    row_weights = 3 * torch.rand(count, generator=random)

    ours = [tensor.to(device, copy=True).requires_grad_() for tensor in (rows, weight, bias)]
    with torch.autocast(device, torch.bfloat16):  # must not reach the products inside
        loss = linear_cross_entropy(*ours, labels.to(device), shares.to(device), row_weights.to(device))
    (loss / 7).backward()

    exact = [tensor.double().requires_grad_() for tensor in (rows, weight, bias)]
    targets = torch.zeros(count, BINS).double().scatter_(1, labels, shares.double())
    each = F.cross_entropy(exact[0] @ exact[1].T + exact[2], targets, reduction="none")
    expected = (row_weights.double() * each).sum()
    (expected / 7).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype == one.dtype
        # what the loss computes in fp32 is rounded to the dtype of the rows at the end
        error = 1e-6 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        assert (one.grad.cpu() - other.grad).abs().max() <= error * max(1.0, other.grad.abs().max().item())


def test_linear_cross_entropy_survives_logits_beyond_the_range_of_exp() -> None:
    rows, weight = torch.tensor([[300.0], [-300.0]]), torch.tensor([[1.0], [-1.0], [0.0]]).requires_grad_()
    labels, ones = torch.tensor([[1], [1]]), torch.ones(2, 1)
    loss = linear_cross_entropy(rows, weight, torch.zeros(3), labels, ones, torch.ones(2))
    loss.backward()
    assert loss.item() == 600.0  # the first row is certain of bin 0, the second of bin 1
    assert weight.grad is not None and torch.equal(weight.grad, torch.tensor([[300.0], [-300.0], [0.0]]))


def test_fp16_features_whose_unscaled_gradient_leaves_its_range_are_exact_after_scaling() -> None:
    random = torch.Generator().manual_seed(4)
    rows = torch.randn(50, 64, generator=random).half().requires_grad_()
    weight, labels = 100 * torch.randn(BINS, 64, generator=random), torch.zeros(50, 1, dtype=torch.int64)
    loss = linear_cross_entropy(rows, weight, torch.zeros(BINS), labels, torch.ones(50, 1), torch.full((50,), 1e4))
    (loss * 1e-6).backward()
    exact = rows.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.double().T, labels[:, 0], reduction="sum").mul(1e4 * 1e-6).backward()
    assert rows.grad is not None and exact.grad is not None
    torch.testing.assert_close(rows.grad.double(), exact.grad, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_squared_error_is_that_of_the_decoded_colours(device: str) -> None:
    one = module("mse").to(device)
    lightness, ab = (tensor.to(device) for tensor in photographs())
    loss, weight = one(lightness, ab)
    head = one.network.head
    with torch.no_grad():
        features = one.network.features(lightness)
        stages, confidence = decode_and_run(
            load_preset("final"), TorchBackend(device), features, head.weight.flatten(1), head.bias
        )
    means = ab.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
    assert weight == 2 * 16 * 16
    expected = ((stages[0][1] - means).double() / AB_SCALE).square().mean().item()
    assert loss.item() / weight.item() == pytest.approx(expected, rel=1e-5)
    assert (confidence == 1).all() and all(torch.equal(ab, stages[0][1]) for _, ab in stages)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_decoded_regression_is_finite_whatever_the_network_says(poison: float) -> None:
    features = torch.zeros(1, 64, 4, 4)
    features[0, 0, 1, 1] = poison
    stages, _ = decode_and_run(load_preset("none"), TorchBackend(), features, torch.ones(2, 64), torch.zeros(2))
    ab = stages[0][1]
    assert ab.isfinite().all() and ab.abs().max() <= 128 and ab.shape == (1, 2, 4, 4) and ab.is_contiguous()
    assert (ab[0, :, 0, 0] == 0).all()


def test_perceptual_loss_is_zero_for_the_truth_and_falls_towards_it() -> None:
    objective = Perceptual(torch.ones(BINS))
    torch.manual_seed(0)
    model = ModelConfig(method="perceptual", width=0.125, encoder="scratch")
    network = build(model)
    initialise(network, model, photographs(4)[0])
    objective.attach(network)
    lightness, _ = photographs()
    head = torch.nn.Conv2d(2, 2, 1, bias=False)
    # features that are the colours themselves, flat so that interpolation is exact
    truth = torch.tensor([0.2, -0.1]).view(1, 2, 1, 1).expand(2, 2, SIZE // 2, SIZE // 2)
    ab = (truth * AB_SCALE).repeat_interleave(2, -1).repeat_interleave(2, -2)
    losses = []
    for share in (0.0, 0.5, 0.9, 1.0):
        torch.nn.init.dirac_(head.weight)
        head.weight.data *= share
        loss, weight = objective(truth, head, lightness, ab)
        losses.append(loss.item() / weight.item())
    assert losses == sorted(losses, reverse=True) and losses[0] > 0.01 and losses[-1] < 1e-9
    # the gradient of the colours by central differences
    head.weight.data *= 0.5
    head.weight.grad = None
    objective(truth, head, lightness, ab)[0].backward()
    assert head.weight.grad is not None
    step, found = 1e-2, []
    for sign in (1, -1):
        moved = torch.nn.Conv2d(2, 2, 1, bias=False)
        moved.weight.data = head.weight.data.clone()
        moved.weight.data[0, 0] += sign * step
        found.append(objective(truth, moved, lightness, ab)[0].item())
    assert head.weight.grad[0, 0].item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.05)


def test_the_judge_is_frozen_and_kept_only_where_the_encoder_learns() -> None:
    learning = module("perceptual")
    before = {name: value.clone() for name, value in learning.objective.state_dict().items()}
    assert before and not any(p.requires_grad for p in learning.objective.parameters())
    loss, _ = learning(*photographs())
    loss.backward()
    with torch.no_grad():
        for parameter in learning.network.parameters():
            assert parameter.grad is not None
            parameter -= 1e-4 * parameter.grad
    assert all(torch.equal(value, before[name]) for name, value in learning.objective.state_dict().items())
    # a resumed run judges by what its checkpoint holds, not by a copy of the trained encoder
    resumed = module("perceptual", seed=5)
    resumed.load_state_dict(learning.state_dict())
    again = TrainingModule(resumed.network, METHODS["perceptual"](torch.ones(BINS)))
    assert not torch.equal(again.objective.state_dict()["copy.blocks.0.0.weight"], before["copy.blocks.0.0.weight"])
    again.objective.load_state_dict(before)
    assert again(*photographs())[0].item() == pytest.approx(learning(*photographs())[0].item())
    frozen = build(ModelConfig(method="perceptual", width=0.125, encoder="weights.pth"))
    shared = TrainingModule(frozen, METHODS["perceptual"](torch.ones(BINS)))
    assert shared.objective.judge is frozen.encoder and not shared.objective.state_dict()
    shared(*photographs())[0].backward()
    assert frozen.head.weight.grad is not None and all(p.grad is None for p in frozen.encoder.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_on_a_gpu_are_those_of_the_cpu(method: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        one = module(method).to(device)
        loss, weight = one(*(tensor.to(device) for tensor in photographs()))
        loss.backward()
        found.append((loss.item(), weight.item(), {name: p.grad.cpu() for name, p in one.network.named_parameters()}))
    (loss, weight, gradients), (gpu_loss, gpu_weight, gpu_gradients) = found
    assert gpu_loss == pytest.approx(loss, rel=1e-4) and gpu_weight == pytest.approx(weight, rel=1e-6)
    for name, gradient in gradients.items():
        apart = (gpu_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert apart < 1e-2, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_weights_of_parts_add_up(method: str, device: str) -> None:
    """Sums over a batch are the sums of its parts', so the global mean is one division."""
    one = module(method).to(device)
    lightness, ab = (tensor.to(device) for tensor in photographs(3))
    whole = torch.stack(one(lightness, ab)).detach()
    parts = sum(torch.stack(one(lightness[part], ab[part])).detach() for part in (slice(0, 1), slice(1, 3)))
    # a GPU may choose other algorithms for other sizes of batch
    tolerance = 2e-5 if device == "cpu" else 1e-4
    np.testing.assert_allclose(parts.cpu().numpy(), whole.cpu().numpy(), rtol=tolerance)


@pytest.mark.bits
def test_without_skips_only_the_deepest_features_count() -> None:
    network = build(ModelConfig(method="mse", width=0.125, encoder="scratch", skips=False))
    assert not any("skip" in name for name, _ in network.named_parameters())
    features = [
        torch.randn(1, c, 64 // s, 64 // s) for c, s in zip(network.encoder.channels, (2, 4, 8, 16), strict=True)
    ]
    with torch.no_grad():
        found = network.decoder(features)
        assert torch.equal(network.decoder([torch.zeros_like(f) for f in features[:-1]] + features[-1:]), found)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_recipe(method: str) -> None:
    recipe = config.load(Recipe, resource("configs", "methods") / f"{method}.yaml")
    assert recipe.model.method == method and recipe.model.encoder == "imagenet" and recipe.model.width == 1
    assert recipe.model.skips == method.startswith("final")


def test_the_final_method_has_a_short_name() -> None:
    assert (CHECKOUT / "configs" / "final.yaml").readlink() == Path("methods/final.yaml")


@pytest.mark.slow
def test_steps_of_every_method_do_not_depend_on_the_world_size(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    found: list[dict[str, Any]] = []
    for ranks in (1, 2):
        result = tmp_path / f"{ranks}.pt"
        done = torchrun(ranks, WORKER, result)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(result, weights_only=True))
    for method in METHODS:
        one, two = (f[method] for f in found)
        assert one["losses"] == pytest.approx(two["losses"], rel=1e-4), method
        for name, value in one["model"].items():
            # Adam divides by the gradient's size: a weight may move by lr in the direction of rounding noise
            assert (value - two["model"][name]).abs().max() < 5e-4, (method, name)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.bits
def test_every_method_trains_on_two_ranks_is_cut_off_and_resumes_to_the_bit(
    method: str, torchrun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    small = ["data.root=sample-photographs", "data.val_root=sample-photographs", "data.crop=32", "train.global_batch=4"]
    small += ["model.encoder=scratch", "model.width=0.0625", "train.steps=4", "train.warmup=1", "checkpoint.every=2"]
    small += ["train.precision=fp32", "train.log_every=1", "evaluate.pictures=0", "distributed.device=cpu"]
    recipe = ["--config", resource("configs", "methods") / f"{method}.yaml", *small]

    def train(run: Path) -> tuple[dict[str, Any], list[float]]:
        done = torchrun(2, "-m", "dist_colorize.train", *recipe, f"run.dir={run}", env=environment, timeout=400)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)
        return state, [line["loss"] for line in lines]

    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    whole, losses = train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    (tmp_path / "cut" / "checkpoints" / "step-00000004.pt").unlink()
    cut, losses_of_both = train(tmp_path / "cut")
    assert len(losses) == 4 and losses_of_both == losses
    for part in ("model", "ema", "objective"):
        assert whole[part].keys() == cut[part].keys()
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part]), part
    for name, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, cut["optimizer"]["state"][name][key]) for key, value in moments.items()), name
