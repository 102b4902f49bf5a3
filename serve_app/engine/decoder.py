"""Whisper's decoder over slots: each slot holds one window's encoder state and its self-attention cache.

Cross-attention works on the encoder state itself ("latent cross-attention"): with W_k folded into the query and W_v
applied after the weighted sum,

    softmax(q_h · W_k,h x) W_v,h x  =  W_v,h (softmax((W_k,hᵀ q_h) · x) x),

so a slot keeps one array [1500, d] instead of keys and values for every layer, all layers and heads read the same
bytes, and nothing is projected before decoding starts. Whisper's keys have no bias; the value bias adds at the end,
because the weights of the sum add up to one, and so goes into the output's bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import embedding, latent_attention, persistent_step, self_attention
from kernels.persistent_step import PersistentStep
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.layers import Linear, Mlp, Weights
from serve_app.engine.precision import Compute
from serve_app.engine.states import Bits, Latent, SlotStates


class SelfAttention:
    """Causal self-attention. keys, values: its caches [slots, n_text_ctx, d]."""

    def __init__(self, weights: Weights, n_head: int, keys: Tensor, values: Tensor):
        self.n_head, self.keys, self.values = n_head, keys, values
        self.norm = weights.norm("attn_ln")
        self.qkv = weights.at("attn").fused_qkv()
        self.out = weights.linear("attn.out")
        compute = weights.compute
        width = keys.shape[2]
        self._attend = (
            self_attention.SelfAttention(width, compute.device) if compute.has_kernels else self_attention.reference
        )

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [n, d] and positions: [n] int32, of one token in each of the first n slots."""
        n = len(x)
        return self.out(self._attend(self.qkv(x), self.keys[:n], self.values[:n], positions))

    def prefill(self, x: Tensor, slot: int) -> Tensor:
        """x: [t, d], the first t tokens of a slot."""
        t, width = x.shape
        query, key, value = self.qkv(x).view(t, 3, self.n_head, width // self.n_head).unbind(1)
        self.keys[slot, :t] = key.reshape(t, width)
        self.values[slot, :t] = value.reshape(t, width)
        query, key, value = (y.transpose(0, 1)[None] for y in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)[0]
        return self.out(mixed.transpose(0, 1).reshape(t, width))


class CrossAttention:
    """Latent cross-attention: reads the encoder state in place of keys and values."""

    def __init__(self, weights: Weights, n_head: int, bits: Bits):
        self.n_head = n_head
        self.norm = weights.norm("cross_attn_ln")
        attention = weights.at("cross_attn")
        self.query = attention.linear("query")
        width = self.query.weight.shape[0]
        head = width // n_head
        self.key = attention.product("key.weight").view(n_head, head, width)
        # [heads, d, head]: applied to the weighted sum of encoder states
        self.value = attention.product("value.weight").view(n_head, head, width).transpose(1, 2)
        if not weights.compute.has_kernels:
            self.value = self.value.contiguous()  # a CPU's products are slower without
        out = attention.exact("out.weight") @ attention.exact("value.bias") + attention.exact("out.bias")
        compute = weights.compute
        self.out = Linear(attention.product("out.weight"), out.to(compute.dtype))
        self._kernel = (
            latent_attention.LatentAttention(width, compute.device, bits=bits) if compute.has_kernels else None
        )

    def step(self, x: Tensor, states: Latent) -> Tensor:
        """x: [n, d], of a token in each of n slots; states: theirs."""
        latent = self._latent(x)
        if self._kernel is None:
            return self._out(latent_attention.reference(latent, states.numbers))
        sums = torch.empty_like(latent)  # with its strides
        self._kernel(latent, states.numbers, sums, scales=states.scales)
        return self._out(sums)

    def prefill(self, x: Tensor, state: Tensor) -> Tensor:
        """x: [t, d], of tokens of one window; state: [1500, d]."""
        latent = self._latent(x)
        return self._out(latent_attention.reference(latent.reshape(1, -1, x.shape[1]), state[None]).view_as(latent))

    def _latent(self, x: Tensor) -> Tensor:
        """Queries of the state itself, W_kᵀ q: [n, d] → [n, heads, d]."""
        query = self.query(x).view(len(x), self.n_head, -1).transpose(0, 1)  # [heads, n, head]
        return torch.bmm(query, self.key).transpose(0, 1)

    def _out(self, sums: Tensor) -> Tensor:
        """Weighted sums of states [n, heads, d] → [n, d]."""
        n, _, width = sums.shape
        mixed = sums.new_empty(n, width)
        by_head = mixed.view(n, self.n_head, -1).transpose(0, 1)  # [heads, n, head]
        torch.bmm(sums.transpose(0, 1), self.value, out=by_head)
        return self.out(mixed)

    def ready(self, state: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fills keys and values, [heads, 1500, head] each, of a window's state; the value bias is in the output's."""
        each = state.expand(self.n_head, *state.shape)
        torch.bmm(each, self.key.transpose(1, 2), out=keys)
        torch.bmm(each, self.value, out=values)


class DecoderBlock:
    def __init__(self, weights: Weights, n_head: int, keys: Tensor, values: Tensor, bits: Bits):
        self.self_attention = SelfAttention(weights, n_head, keys, values)
        self.cross_attention = CrossAttention(weights, n_head, bits)
        self.mlp_norm = weights.norm("mlp_ln")
        self.mlp = Mlp(weights)

    def step(self, residual: Tensor, y: Tensor | None, states: Latent, positions: Tensor) -> Tensor | None:
        """Adds y, the block before's last result, to the residual stream; returns this one's, if it is yet to be
        added."""
        y = self.self_attention.step(self.self_attention.norm(residual, y), positions)
        y = self.cross_attention.step(self.cross_attention.norm(residual, y), states)
        return self.mlp.into(residual, self.mlp_norm(residual, y))

    def tensors(self, cross_keys: Tensor, cross_values: Tensor) -> persistent_step.Layer:
        mine, cross, mlp = self.self_attention, self.cross_attention, self.mlp
        qkv, out, query, cross_out = mine.qkv, mine.out, cross.query, cross.out
        return persistent_step.Layer(
            self_norm_weight=mine.norm.weight,
            self_norm_bias=mine.norm.bias,
            qkv_weight=qkv.weight,
            qkv_bias=qkv.known_bias,
            self_out_weight=out.weight,
            self_out_bias=out.known_bias,
            self_keys=mine.keys,
            self_values=mine.values,
            cross_norm_weight=cross.norm.weight,
            cross_norm_bias=cross.norm.bias,
            query_weight=query.weight,
            query_bias=query.known_bias,
            cross_keys=cross_keys,
            cross_values=cross_values,
            cross_out_weight=cross_out.weight,
            cross_out_bias=cross_out.known_bias,
            mlp_norm_weight=self.mlp_norm.weight,
            mlp_norm_bias=self.mlp_norm.bias,
            up_weight=mlp.up.weight,
            up_bias=mlp.up.known_bias,
            down_weight=mlp.down.weight,
            down_bias=mlp.down.known_bias,
        )

    def prefill(self, residual: Tensor, y: Tensor | None, state: Tensor, slot: int) -> Tensor | None:
        y = self.self_attention.prefill(self.self_attention.norm(residual, y), slot)
        y = self.cross_attention.prefill(self.cross_attention.norm(residual, y), state)
        return self.mlp.into(residual, self.mlp_norm(residual, y))


class Decoder:
    """Tokens in, logits out, for a fixed number of slots. It knows slots and positions, not requests or queues.

    Steps work on the first n slots, so that caches and encoder states are read in place; ``move`` keeps the occupied
    ones dense when one in their middle is done.
    """

    def __init__(self, checkpoint: Checkpoint, compute: Compute, slots: int, state_bits: Bits = 16):
        """state_bits: of the numbers of the slots' encoder states (``SlotStates``)."""
        dims = checkpoint.dims
        self.dims, self.compute, self.slots = dims, compute, slots
        weights = Weights(checkpoint.tensors, compute, "decoder.")
        # rows of zeros at its end: the library's fast products want a multiple of eight
        self.embedding = F.pad(weights.product("token_embedding.weight"), (0, 0, 0, -dims.n_vocab % 8))
        self.positions = weights.exact("positional_embedding")
        self._embed = embedding.embed if compute.has_kernels else embedding.reference
        shape = dims.n_text_layer, 2, slots, dims.n_text_ctx, dims.n_text_state
        self.caches = torch.zeros(shape, device=compute.device, dtype=compute.dtype)
        self.blocks = [
            DecoderBlock(weights.at(f"blocks.{i}"), dims.n_text_head, keys, values, state_bits)
            for i, (keys, values) in enumerate(self.caches)
        ]
        self.norm = weights.norm("ln")
        self.states = SlotStates(slots, dims.n_audio_ctx, dims.n_audio_state, compute, state_bits)
        self._few: dict[int, PersistentStep] = {}
        if compute.has_kernels and persistent_step.available(compute.device):
            self._prepare_few()

    def _prepare_few(self) -> None:
        """For one or two windows a step is one kernel, and cross-attention has ready keys and values."""
        dims, few = self.dims, max(persistent_step.SLOTS)
        heads = dims.n_text_head
        shape = dims.n_text_layer, 2, few, heads, dims.n_audio_ctx, dims.n_text_state // heads
        self._ready = torch.zeros(shape, device=self.compute.device, dtype=self.compute.dtype)
        layers = [block.tensors(*ready) for block, ready in zip(self.blocks, self._ready, strict=True)]
        for slots in (n for n in persistent_step.SLOTS if n <= self.slots):
            self._few[slots] = PersistentStep(
                layers, self.embedding[: dims.n_vocab], self.positions, self.norm.weight, self.norm.bias, slots
            )

    @property
    def few(self) -> int:
        """Up to so many slots there is ``step_few``."""
        return max(self._few, default=0)

    @torch.inference_mode()
    def ready(self, slot: int) -> None:
        """Makes a loaded state's keys and values for ``step_few``."""
        state = self.states.all.exact(slot)
        for block, (keys, values) in zip(self.blocks, self._ready, strict=True):
            block.cross_attention.ready(state, keys[slot], values[slot])

    @torch.inference_mode()
    def step_few(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As ``step``, for up to ``few`` slots that are ``ready``."""
        return self._few[len(tokens)](tokens, positions)

    @torch.inference_mode()
    def load(self, slots: Sequence[int], states: Sequence[Tensor]) -> None:
        """Puts windows' encoder states [1500, d] into slots."""
        self.states.load(slots, states)

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copies a slot's encoder state and the first ``length`` positions of its caches into another slot."""
        self.states.move(source, target)
        self.caches[:, :, target, :length].copy_(self.caches[:, :, source, :length])

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> None:
        """Computes the first positions of a slot, whose encoder state is loaded, all at once."""
        if len(tokens) > self.dims.n_text_ctx:
            raise ValueError(f"{len(tokens)} tokens do not fit the decoder's context of {self.dims.n_text_ctx}")
        index = torch.tensor(tokens).to(self.compute.device)
        residual = self.embedding[index].float() + self.positions[: len(tokens)]
        state, y = self.states.all.exact(slot), None
        for block in self.blocks:
            y = block.prefill(residual, y, state, slot)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens: [n] int32, one for each of the first n slots, at positions: [n] int32; the positions before must have
        been computed → float32 logits [n, n_vocab]."""
        residual = self._embed(self.embedding, self.positions, tokens, positions)
        states, y = self.states.all.first(len(tokens)), None
        for block in self.blocks:
            y = block.step(residual, y, states, positions)
        return self._logits(self.norm(residual, y))

    def _logits(self, x: Tensor) -> Tensor:
        n_vocab = self.dims.n_vocab
        if self.compute.has_kernels:
            # NOTES: rounded to FP16 the best two of 51,866 logits would often be equal
            return torch.mm(x, self.embedding.T, out_dtype=torch.float32)[:, :n_vocab]
        return F.linear(x, self.embedding)[:, :n_vocab].float()
