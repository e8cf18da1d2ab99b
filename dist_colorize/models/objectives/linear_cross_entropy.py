"""Cross entropy of a linear layer's logits, without ever holding all the logits.

Chunk by chunk the forward pass computes the logits, the loss and at once all three gradients; the backward pass only
scales them. Memory is that of one chunk of logits and of the gradients. Products and sums are fp32, under autocast as
well: a sum over a million pixels is rounded to 3 digits in bf16, and infinite in fp16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2048, "cuda": 65536}
"""Rows whose logits exist at a time, by device type: 2.6 MB, which stay in a CPU's cache, or 80 MB on a GPU."""


def linear_cross_entropy(
    rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, shares: Tensor, row_weights: Tensor
) -> Tensor:
    """Sum over rows n of row_weights[n] * -sum_k shares[n, k] * log_softmax(rows @ weight.T + bias)[n, labels[n, k]].

    Args: rows [N, C] fp32, bf16 or fp16. weight [K, C] and bias [K], fp32. labels int64 [N, S].
    shares fp32 [N, S], of sum 1 in each row: all 1 for S = 1, the usual hard label. row_weights fp32 [N].
    Returns a 0-dim fp32 tensor. Differentiable once, with respect to rows, weight and bias.
    """
    with torch.autocast(rows.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(rows, weight, bias, labels, shares, row_weights)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, shares: Tensor, row_weights: Tensor
    ) -> Tensor:
        chunk = min(CHUNK[rows.device.type], len(rows))
        scratch = rows.new_empty(chunk, len(weight), dtype=torch.float32)
        loss = rows.new_zeros((), dtype=torch.float32)
        # fp32 also for fp16 rows: until the backward pass nothing has scaled these gradients into fp16's range
        rows_gradient = torch.empty_like(rows, dtype=torch.float32)
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        for first in range(0, len(rows), chunk):
            part = slice(first, first + chunk)
            x, label, share, w = rows[part].float(), labels[part], shares[part], row_weights[part]
            logits = torch.addmm(bias, x, weight.T, out=scratch[: len(x)])
            expected = (logits.gather(1, label) * share).sum(dim=1)
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=1)
            loss += torch.dot(w, total.log() + largest[:, 0] - expected)
            if any(ctx.needs_input_grad):
                # d loss / d logits = w (softmax - target), in place of the logits
                gradient = exponentials.mul_((w / total)[:, None]).scatter_add_(1, label, -w[:, None] * share)
                torch.mm(gradient, weight, out=rows_gradient[part])
                weight_gradient.addmm_(gradient.T, x)
                bias_gradient += gradient.sum(dim=0)
        ctx.save_for_backward(rows_gradient, weight_gradient, bias_gradient)
        ctx.dtype = rows.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = (saved * gradient for saved in ctx.saved_tensors)
        return rows.to(ctx.dtype), weight, bias, None, None, None
