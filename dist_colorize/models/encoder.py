"""The encoder: the thirteen convolutions of VGG16 with their BatchNorms folded in, tapped at strides 2, 4, 8 and 16.

BatchNorm with fixed statistics is an affine map of each channel, so it folds exactly into the convolution before it
(w' = w gamma / std, b' = (b - mean) gamma / std + beta): fewer passes over memory, no statistics that drift, and no
dependence on how a batch is cut over ranks. It has two sources:

* pretrained VGG16-BN: folded on loading and frozen, without an autograd graph;
* from scratch: gamma = 1, beta = 0 and statistics measured once, on the first photographs of the data order, then
  folded and trained on (data-dependent initialisation: Kraehenbuehl et al. 2016; LSUV, Mishkin and Matas 2016).
  BatchNorm with live statistics would make a step depend on world size and accumulation; this does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.errors import UserError

PLAN: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's convolutions, block by block; a 2 x 2 max pool lies between blocks."""


class Encoder(nn.Module):
    """VGG16's convolutions with BatchNorm folded: RGB normalised as for ImageNet -> features at strides 2, 4, 8, 16."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = 3
        for plan in PLAN:
            block = nn.ModuleList()
            for planned in plan:
                out = max(8, round(planned * width / 8) * 8)
                block.append(nn.Conv2d(channels, out, 3, padding=1))
                channels = out
            self.blocks.append(block)
        for convolution in self.convolutions():
            assert convolution.bias is not None
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)

    def convolutions(self) -> list[nn.Conv2d]:
        return [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the features at strides 2, 4, 8, 16."""
        return tuple(list(block.children())[-1].out_channels for block in list(self.blocks)[1:])  # type: ignore[misc]

    def freeze(self) -> None:
        """Fixes the weights: forward then builds no autograd graph, and DDP sends nothing for them."""
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W], H and W multiples of 16 -> features [B, C, H/s, W/s] at strides s = 2, 4, 8, 16."""
        frozen = not image.requires_grad and not any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = []
            for number, block in enumerate(self.blocks):
                if number:
                    image = F.max_pool2d(image, 2)
                for convolution in block.children():
                    image = F.relu(convolution(image), inplace=frozen)
                features.append(image)
        return features[1:]

    @torch.no_grad()
    def calibrate(self, image: Tensor) -> None:
        """Folds in BatchNorms whose statistics are those of `image` [B, 3, H, W], layer after layer."""
        for number, block in enumerate(self.blocks):
            if number:
                image = F.max_pool2d(image, 2)
            for convolution in block.children():
                assert isinstance(convolution, nn.Conv2d)
                assert convolution.bias is not None
                response = convolution(image)
                variance, mean = torch.var_mean(response, dim=(0, 2, 3), correction=0)
                scale = (variance + 1e-5).rsqrt()
                # [C] -> [C, 1, 1, 1]
                convolution.weight.mul_(scale.view(-1, 1, 1, 1))
                convolution.bias.sub_(mean).mul_(scale)
                image = F.relu(convolution(image))

    @torch.no_grad()
    def load_vgg16_bn(self, state: Mapping[str, Tensor], source: str) -> None:
        """Folds torchvision's VGG16-BN state dict into the convolutions. Raises UserError where it does not fit."""
        layers = [key.split(".")[1] for key in state if key.startswith("features.") and key.endswith(".running_var")]
        convolutions = self.convolutions()
        if len(layers) != len(convolutions):
            raise UserError(
                f"model.encoder: {source} holds {len(layers)} BatchNorm layers under features.*, VGG16-BN has "
                f"{len(convolutions)}; give a state dict of torchvision's vgg16_bn"
            )
        for layer, convolution in zip(layers, convolutions, strict=True):
            norm = {
                k: state[f"features.{layer}.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var")
            }
            before = f"features.{int(layer) - 1}"
            weight, bias = state[f"{before}.weight"].double(), state[f"{before}.bias"].double()
            if weight.shape != convolution.weight.shape:
                raise UserError(
                    f"model.encoder: {before}.weight of {source} has shape {tuple(weight.shape)}, model.width asks for "
                    f"{tuple(convolution.weight.shape)}; pretrained weights need model.width=1"
                )
            scale = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
            # [C] -> [C, 1, 1, 1]
            convolution.weight.copy_(weight * scale.view(-1, 1, 1, 1))
            assert convolution.bias is not None
            convolution.bias.copy_((bias - norm["running_mean"]) * scale + norm["bias"])


def pretrained_vgg16_bn(encoder: str) -> tuple[Mapping[str, Tensor], str]:
    """The state dict that `model.encoder` names ("imagenet" or a file) and what to call it in messages.

    Raises UserError when torchvision's weights are neither cached nor to be downloaded, or the file is not readable.
    """
    from torchvision.models import VGG16_BN_Weights

    if encoder == "imagenet":
        weights = VGG16_BN_Weights.IMAGENET1K_V1
        try:
            return weights.get_state_dict(progress=False, check_hash=True), str(weights)
        except (OSError, RuntimeError) as error:
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise UserError(
                f"model.encoder=imagenet: torchvision's VGG16-BN weights could not be had ({error}); download "
                f"{weights.url} on a connected machine and copy it to {file}, or give the file as model.encoder=FILE, "
                "or train the encoder as well with model.encoder=scratch"
            ) from None
    try:
        state = torch.load(encoder, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.encoder={encoder}: no such file (imagenet, scratch, or a state dict file)") from None
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.encoder={encoder}: not a PyTorch state dict ({reason}); give one of vgg16_bn") from None
    if not isinstance(state, Mapping):
        raise UserError(f"model.encoder={encoder}: holds a {type(state).__name__}, not a state dict of vgg16_bn")
    return state, encoder
