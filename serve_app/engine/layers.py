"""What encoder and decoder are made of: weights by name, and three layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear
from kernels.gelu import bias_gelu
from kernels.layer_norm import add_layer_norm
from serve_app.engine.precision import Compute


class Weights:
    """Looks up a checkpoint's tensors under a prefix and brings them where and how they are computed with."""

    def __init__(self, tensors: dict[str, Tensor], compute: Compute, prefix: str = ""):
        self.tensors, self.compute, self.prefix = tensors, compute, prefix

    def at(self, name: str) -> Weights:
        return Weights(self.tensors, self.compute, f"{self.prefix}{name}.")

    def product(self, name: str) -> Tensor:
        """An operand of a matrix product."""
        return self.tensors[self.prefix + name].to(self.compute.device, self.compute.dtype).contiguous()

    def exact(self, name: str) -> Tensor:
        """A tensor that float32 arithmetic uses: normalisation, positions."""
        return self.tensors[self.prefix + name].to(self.compute.device, torch.float32).contiguous()

    def linear(self, name: str) -> Linear:
        bias = f"{self.prefix}{name}.bias"
        return Linear(self.product(f"{name}.weight"), self.product(f"{name}.bias") if bias in self.tensors else None)

    def fused_qkv(self) -> Linear:
        """Query, key and value of self-attention as one product [3d, d]. Whisper's keys have no bias."""
        query, value = self.product("query.bias"), self.product("value.bias")
        weight = torch.cat([self.product(f"{name}.weight") for name in ("query", "key", "value")])
        return Linear(weight, torch.cat([query, torch.zeros_like(query), value]))

    def norm(self, name: str) -> AddNorm:
        return AddNorm(self.exact(f"{name}.weight"), self.exact(f"{name}.bias"), self.compute)


MANY_ROWS = 1024
"""From so many rows on, products are our own kernel's, which does what follows them too: an encoder's window has 1,500
rows. A decoding step has one a slot, and its products are the library's."""


class Linear:
    """y = x Wᵀ + b in the precision of the products."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        # the kernel's tiles are 64 wide: the first convolution over 80 mel bands, 240 numbers a row, is the library's
        fits = weight.dtype == torch.float16 and all(size % 64 == 0 for size in weight.shape)
        self._has_kernel = fits and linear.available(weight.device)

    @property
    def known_bias(self) -> Tensor:
        assert self.bias is not None
        return self.bias

    def _fuses(self, x: Tensor) -> bool:
        return self._has_kernel and x.numel() >= MANY_ROWS * x.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        if self._fuses(x):
            return linear.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product."""
        if self._fuses(x):
            return linear.linear(x, self.weight, self.bias, gelu=True)
        y = F.linear(x, self.weight, self.bias)
        return bias_gelu(y, out=y) if y.is_cuda and y.dtype == torch.float16 else F.gelu(y)

    def into(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """Adds the product to the residual stream (float32, in place) where its kernel can; else returns it, for the
        ``AddNorm`` that follows."""
        if self._fuses(x):
            linear.linear(x, self.weight, self.bias, residual=residual)
            return None
        return F.linear(x, self.weight, self.bias)


class AddNorm:
    """Adds a layer's result to the residual stream, and normalises the sum for the next layer: float32 arithmetic, out
    in the precision of the products that follow."""

    def __init__(self, weight: Tensor, bias: Tensor, compute: Compute):
        self.weight, self.bias, self.compute = weight, bias, compute

    def __call__(self, residual: Tensor, y: Tensor | None) -> Tensor:
        """residual: [..., d] float32, changed in place where there is a y: [..., d] → [..., d]."""
        if self.compute.has_kernels:
            return add_layer_norm(residual, y, self.weight, self.bias)
        if y is not None:
            residual += y
        return F.layer_norm(residual, self.weight.shape, self.weight, self.bias).to(self.compute.dtype)


class Mlp:
    def __init__(self, weights: Weights):
        self.up, self.down = weights.linear("mlp.0"), weights.linear("mlp.2")

    def into(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """As ``Linear.into``."""
        return self.down.into(residual, self.up.gelu(x))
