"""How many floating-point operations the engine's work takes, from a model's sizes (pure). A multiplication and an
addition are two. What is small beside the products (normalisation, softmax, convolution of the input's edges) is left
out: well under 1 %."""

from __future__ import annotations

import math

from serve_app.engine.checkpoint import Dims
from serve_app.engine.constants import N_FFT

BINS = N_FFT // 2 + 1


def features_operations(dims: Dims) -> float:
    """Of one window's log-mel: a real Fourier transform a frame, by the usual 2.5 n log₂ n, and the mel filters as a
    product."""
    frames = 2 * dims.n_audio_ctx
    return frames * (2.5 * N_FFT * math.log2(N_FFT) + 2 * BINS * dims.n_mels)


def encoder_operations(dims: Dims) -> float:
    """Of one window's encoder state: projections and perceptron are 12 d² weights a layer, attention is two products
    of every position with every other."""
    t, d = dims.n_audio_ctx, dims.n_audio_state
    convolutions = 3 * dims.n_mels * d * 2 * t + 3 * d * d * t
    layer = 12 * d * d * t + 2 * t * t * d
    return 2.0 * (convolutions + dims.n_audio_layer * layer)


def step_operations(dims: Dims) -> float:
    """Of one decoding step of one slot, with cross-attention over the encoder state itself: 16 d² weights a layer, each
    head's query with every position twice, and the vocabulary. Self-attention over the few tokens before is left out:
    about 1 % at most."""
    t, d = dims.n_audio_ctx, dims.n_text_state
    layer = 16 * d * d + 2 * dims.n_text_head * t * dims.n_audio_state
    return 2.0 * (dims.n_text_layer * layer + d * dims.n_vocab)
