"""What operations of torch do on CUDA and not on a CPU, for tests that must see the path which CUDA takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def cuda_group_norm() -> Iterator[None]:
    """Within it nn.GroupNorm on a CPU answers as on CUDA: in NCHW whatever its input's layout, in fp32 under autocast.

    torch's native/group_norm.cpp keeps the layout of its input on CPUs, not on CUDA; the list of what autocast runs in
    fp32 (autocast_mode.h) has the operation for CUDA, not for CPUs.
    """

    def forward(self: nn.GroupNorm, seen: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return F.group_norm(seen.float().contiguous(), self.num_groups, self.weight, self.bias, self.eps)
        return F.group_norm(seen.contiguous(), self.num_groups, self.weight, self.bias, self.eps)

    with mock.patch.object(nn.GroupNorm, "forward", forward):
        yield
