"""What encoder and decoder are made of: weights by name, and three layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.exact(f"{name}.weight"), self.exact(f"{name}.bias"), self.compute.dtype)


class Linear:
    """y = x Wᵀ + b in the precision of the products."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm:
    """float32 in, float32 arithmetic, out in the precision of the products that follow."""

    def __init__(self, weight: Tensor, bias: Tensor, out: torch.dtype):
        self.weight, self.bias, self.out = weight, bias, out

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias).to(self.out)


class Mlp:
    def __init__(self, weights: Weights):
        self.norm = weights.norm("mlp_ln")
        self.up, self.down = weights.linear("mlp.0"), weights.linear("mlp.2")

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))
