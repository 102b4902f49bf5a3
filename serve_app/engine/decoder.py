"""Whisper's decoder over slots: each slot holds one window's encoder state and its self-attention cache.

Cross-attention works on the encoder state itself ("latent cross-attention"): with W_k folded into the query and W_v
applied after the weighted sum,

    softmax(q_h · W_k,h x) W_v,h x  =  W_v,h (softmax((W_k,hᵀ q_h) · x) x),

so a slot keeps one array [1500, d] instead of keys and values for every layer, all layers and heads read the same
bytes, and nothing is projected before decoding starts. Whisper's keys have no bias; the value bias adds at the end,
because the weights of the sum add up to one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.layers import Linear, Mlp, Weights
from serve_app.engine.precision import Compute


class SelfAttention:
    """Causal self-attention with a cache [slots, n_text_ctx, d] for keys and one for values."""

    def __init__(self, weights: Weights, n_head: int, slots: int, n_ctx: int):
        self.n_head = n_head
        self.norm = weights.norm("attn_ln")
        self.qkv = weights.at("attn").fused_qkv()
        self.out = weights.linear("attn.out")
        width = self.out.weight.shape[0]
        compute = weights.compute
        self.keys = torch.zeros(slots, n_ctx, width, device=compute.device, dtype=compute.dtype)
        self.values = torch.zeros_like(self.keys)

    def __call__(self, x: Tensor, rows: slice, positions: Tensor, visible: Tensor) -> Tensor:
        """x: [n, t, d]; positions: [n, t]; visible: [n, 1, t, length], the cache positions each token may look at."""
        n, t, width = x.shape
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        keys, values = self.keys[rows], self.values[rows]
        where = torch.arange(n, device=x.device)[:, None], positions
        keys.index_put_(where, key)
        values.index_put_(where, value)
        length = visible.shape[-1]

        def heads(y: Tensor) -> Tensor:
            return y.view(n, -1, self.n_head, width // self.n_head).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(query), heads(keys[:, :length]), heads(values[:, :length]), attn_mask=visible
        )
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


class CrossAttention:
    """Latent cross-attention: reads the encoder state in place of keys and values."""

    def __init__(self, weights: Weights, n_head: int):
        self.n_head = n_head
        self.norm = weights.norm("cross_attn_ln")
        attention = weights.at("cross_attn")
        self.query, self.out = attention.linear("query"), attention.linear("out")
        width = self.query.weight.shape[0]
        head = width // n_head
        self.scale = head**-0.5
        self.key = attention.product("key.weight").view(n_head, head, width)
        # [heads, d, head]: applied to the weighted sum of encoder states
        self.value = attention.product("value.weight").view(n_head, head, width).transpose(1, 2).contiguous()
        self.value_bias = attention.product("value.bias")

    def __call__(self, x: Tensor, states: Tensor) -> Tensor:
        """x: [n, t, d]; states: [n, 1500, d]."""
        n, t, width = x.shape
        query = self.query(self.norm(x)) * self.scale
        query = query.view(n * t, self.n_head, -1).transpose(0, 1)  # [heads, n·t, head]
        latent = torch.bmm(query, self.key)  # W_kᵀ q: [heads, n·t, d]
        latent = latent.view(self.n_head, n, t, width).permute(1, 0, 2, 3).reshape(n, self.n_head * t, width)
        # the encoder state is both the keys and the values of one attention head as wide as the model
        shared = states[:, None]
        summed = F.scaled_dot_product_attention(latent[:, None], shared, shared, scale=1.0)
        summed = summed.view(n, self.n_head, t, width).transpose(0, 1).reshape(self.n_head, n * t, width)
        mixed = torch.bmm(summed, self.value)  # [heads, n·t, head]
        return self.out(mixed.transpose(0, 1).reshape(n, t, width) + self.value_bias)


class DecoderBlock:
    def __init__(self, weights: Weights, n_head: int, slots: int, n_ctx: int):
        self.self_attention = SelfAttention(weights, n_head, slots, n_ctx)
        self.cross_attention = CrossAttention(weights, n_head)
        self.mlp = Mlp(weights)

    def __call__(self, x: Tensor, states: Tensor, rows: slice, positions: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attention(x, rows, positions, visible)
        x = x + self.cross_attention(x, states)
        return x + self.mlp(x)


class Decoder:
    """Tokens in, logits out, for a fixed number of slots. It knows slots and positions, not requests or queues.

    Work is done on a contiguous range of slots, so that caches and encoder states are read in place; ``move`` keeps
    the range dense when a slot in its middle is done.
    """

    def __init__(self, checkpoint: Checkpoint, compute: Compute, slots: int):
        dims = checkpoint.dims
        self.dims, self.compute, self.slots = dims, compute, slots
        weights = Weights(checkpoint.tensors, compute, "decoder.")
        self.embedding = weights.product("token_embedding.weight")
        self.positions = weights.exact("positional_embedding")
        self.blocks = [
            DecoderBlock(weights.at(f"blocks.{i}"), dims.n_text_head, slots, dims.n_text_ctx)
            for i in range(dims.n_text_layer)
        ]
        self.norm = weights.norm("ln")
        self.vocabulary = Linear(self.embedding, None)
        self.states = torch.zeros(
            slots, dims.n_audio_ctx, dims.n_audio_state, device=compute.device, dtype=compute.dtype
        )

    def load(self, slot: int, state: Tensor) -> None:
        """Puts a window's encoder state [1500, d] into a slot."""
        if state.shape != self.states.shape[1:]:
            raise ValueError(f"an encoder state is {list(self.states.shape[1:])}, got {list(state.shape)}")
        self.states[slot].copy_(state)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a slot's encoder state and the first ``length`` positions of its caches into another slot."""
        self.states[target].copy_(self.states[source])
        for block in self.blocks:
            cache = block.self_attention
            cache.keys[target, :length].copy_(cache.keys[source, :length])
            cache.values[target, :length].copy_(cache.values[source, :length])

    @torch.inference_mode()
    def forward(self, tokens: Tensor, rows: slice, starts: Tensor) -> Tensor:
        """tokens: [n, t] int64, placed at positions starts..starts+t-1 of the n slots in ``rows`` (starts: [n] int64)
        → hidden states [n, t, d] in the compute precision. Positions before ``starts`` must have been computed."""
        t = tokens.shape[1]
        positions = starts[:, None] + torch.arange(t, device=tokens.device)
        length = int(positions.max()) + 1
        if length > self.dims.n_text_ctx:
            raise ValueError(f"{length} tokens do not fit the decoder's context of {self.dims.n_text_ctx}")
        visible = torch.arange(length, device=tokens.device) <= positions[:, None, :, None]
        x = self.embedding[tokens].float() + self.positions[positions]
        for block in self.blocks:
            x = block(x, self.states[rows], rows, positions, visible)
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., d] → float32 logits [..., n_vocab]."""
        return self.vocabulary(hidden).float()
