"""Whisper's encoder: log-mel → encoder state.

The architecture is that of openai/whisper ``model.py``; weights come in its names. Query, key and value projections
are one product, and the residual stream stays in float32 whatever the precision of the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.encoder_attention import encoder_attention
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.graphs import SizedGraphs
from serve_app.engine.layers import Linear, Mlp, Weights
from serve_app.engine.precision import Compute

GRAPHED = 4
"""Batches of up to so many windows are CUDA Graphs."""


class Convolution:
    """A convolution over three positions, and GELU, as one product: its rows are three neighbouring positions."""

    def __init__(self, weights: Weights, name: str, stride: int):
        weight = weights.product(f"{name}.weight")  # [out, in, 3]
        self._product = Linear(weight.permute(0, 2, 1).flatten(1).contiguous(), weights.product(f"{name}.bias"))
        self._stride = stride

    def __call__(self, x: Tensor) -> Tensor:
        """x: [batch, positions, in] → [batch, positions / stride, out]."""
        batch, positions, width = x.shape
        padded = F.pad(x, (0, 0, 1, 1))
        shape = batch, positions // self._stride, 3 * width
        rows = padded.as_strided(shape, (padded.stride(0), self._stride * width, 1)).contiguous()
        return self._product.gelu(rows)


class EncoderBlock:
    def __init__(self, weights: Weights, n_head: int):
        self.n_head = n_head
        self._has_kernels = weights.compute.has_kernels
        self.attention_norm = weights.norm("attn_ln")
        self.qkv = weights.at("attn").fused_qkv()
        self.out = weights.linear("attn.out")
        self.mlp_norm = weights.norm("mlp_ln")
        self.mlp = Mlp(weights)

    def attention(self, x: Tensor) -> Tensor:
        batch, positions, width = x.shape
        qkv = self.qkv(x).view(batch, positions, 3, self.n_head, width // self.n_head)
        if self._has_kernels:
            return encoder_attention(qkv, self.n_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(batch, positions, width)

    def __call__(self, residual: Tensor, y: Tensor | None) -> Tensor | None:
        """Adds y, the block before's last result, to the residual stream; returns this one's, if it is yet to be
        added."""
        y = self.out.into(residual, self.attention(self.attention_norm(residual, y)))
        return self.mlp.into(residual, self.mlp_norm(residual, y))


class Encoder:
    """log-mel [batch, n_mels, 3000] float32 → encoder state [batch, 1500, n_audio_state] in the compute precision."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute, full: int = GRAPHED):
        """full: windows of the batches that will be run the most, which are a CUDA Graph too."""
        self.dims, self.compute = checkpoint.dims, compute
        weights = Weights(checkpoint.tensors, compute, "encoder.")
        self.convolutions = Convolution(weights, "conv1", stride=1), Convolution(weights, "conv2", stride=2)
        self.positions = weights.exact("positional_embedding")
        self.blocks = [
            EncoderBlock(weights.at(f"blocks.{i}"), self.dims.n_audio_head) for i in range(self.dims.n_audio_layer)
        ]
        self.norm = weights.norm("ln_post")

        if compute.has_kernels:
            self._capture(full)

    def _capture(self, full: int) -> None:
        """Small batches are replayed: there the host's launches take longer than the GPU's work. So are full ones: a
        larger batch keeps the GPU busy while the host launches, unless that must wait for the interpreter, hundreds of
        times. A graph for each size between would only cost memory."""
        self._graphed = {*range(1, GRAPHED + 1), full}
        most = max(self._graphed)
        shape = most, self.dims.n_mels, 2 * self.dims.n_audio_ctx
        self._input = torch.zeros(shape, device=self.compute.device, dtype=self.compute.dtype)
        shape = most, self.dims.n_audio_ctx, self.dims.n_audio_state
        self._output = torch.empty(shape, device=self.compute.device, dtype=self.compute.dtype)

        def work(n: int) -> None:
            self._output[:n].copy_(self._encode(self._input[:n]))

        with torch.inference_mode():
            self._replay = SizedGraphs(work, sorted(self._graphed))

    @torch.inference_mode()
    def __call__(self, log_mel: Tensor) -> Tensor:
        expected = (self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        if log_mel.ndim != 3 or log_mel.shape[1:] != expected:
            raise ValueError(f"log-mel must be [batch, {expected[0]}, {expected[1]}], got {list(log_mel.shape)}")
        n = len(log_mel)
        if not self.compute.has_kernels or n not in self._graphed:
            return self._encode(log_mel.to(self.compute.device, self.compute.dtype))
        self._input[:n].copy_(log_mel, non_blocking=True)
        self._replay(n)
        return self._output[:n].clone()

    def _encode(self, x: Tensor) -> Tensor:
        """x: log-mel on the device, in the compute precision."""
        x = x.transpose(1, 2)
        for convolution in self.convolutions:
            x = convolution(x)
        residual = x.float() + self.positions
        y = None
        for block in self.blocks:
            y = block(residual, y)
        return self.norm(residual, y)
