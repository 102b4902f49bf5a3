"""Whisper's fixed numbers, derived from each other so that a reader sees why each is what it is.

Source: openai/whisper, ``audio.py`` and ``decoding.py``.
"""

from __future__ import annotations

SAMPLE_RATE = 16_000
N_FFT = 400
HOP_LENGTH = 160
WINDOW_SECONDS = 30
WINDOW_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE  # 480,000
WINDOW_FRAMES = WINDOW_SAMPLES // HOP_LENGTH  # 3,000 log-mel frames
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # 100
TIMESTAMP_SECONDS = (
    0.02  # what one timestamp token advances: two frames, the stride of the encoder's second convolution
)
MAX_INITIAL_TIMESTAMP = round(1.0 / TIMESTAMP_SECONDS)  # the first timestamp token is at most 1 s
