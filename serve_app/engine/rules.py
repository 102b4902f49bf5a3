"""Choosing the next token, for many slots at once, on the device.

The rules are openai-whisper's (``decoding.py``: SuppressBlank, SuppressTokens, ApplyTimestampRules, GreedyDecoder),
restated over vectors: what they need of the tokens so far is carried along in ``RuleState``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine.constants import MAX_INITIAL_TIMESTAMP
from serve_app.engine.tokens import Vocabulary


class RuleState:
    """What the rules remember of each slot's sampled tokens: arrays of [slots]."""

    def __init__(self, slots: int, device: torch.device):
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, dtype=dtype, device=device)

        self.sampled = zeros(torch.int64)  # how many tokens were sampled
        self.last_is_timestamp = zeros(torch.bool)
        self.before_is_timestamp = zeros(torch.bool)  # of the token before the last; true where there is none
        self.last_timestamp = zeros(torch.int64)  # index of the last timestamp token, -1 where there is none
        self.timestamps = zeros(torch.bool)  # decode with timestamps?
        self.temperature = zeros(torch.float32)

    def start(self, slot: int, *, timestamps: bool, temperature: float) -> None:
        self.sampled[slot] = 0
        self.last_is_timestamp[slot] = False
        self.before_is_timestamp[slot] = True
        self.last_timestamp[slot] = -1
        self.timestamps[slot] = timestamps
        self.temperature[slot] = temperature

    def move(self, source: int, target: int) -> None:
        for array in vars(self).values():
            array[target] = array[source]


class Rules:
    """Filters logits and chooses tokens."""

    def __init__(self, vocabulary: Vocabulary, n_vocab: int, device: torch.device):
        self.vocabulary = vocabulary
        self.suppressed = torch.zeros(n_vocab, device=device)
        self.suppressed[list(vocabulary.suppressed)] = -torch.inf
        self.blank = torch.tensor(vocabulary.blank, device=device)
        self.timestamp_index = torch.arange(n_vocab - vocabulary.timestamp_begin, device=device)
        self.languages = torch.tensor(list(vocabulary.languages.values()), device=device)

    def filter(self, logits: Tensor, state: RuleState, rows: slice) -> None:
        """Sets to -inf, in place, what may not be chosen. logits: [n, n_vocab] float32, of the slots ``rows``."""
        v = self.vocabulary
        logits += self.suppressed
        first = state.sampled[rows] == 0
        if bool(first.any()):
            logits[first.nonzero(), self.blank] = -torch.inf
        timed = state.timestamps[rows]
        text, times = logits[:, : v.timestamp_begin], logits[:, v.timestamp_begin :]
        if not bool(timed.any()):
            return
        last, before = state.last_is_timestamp[rows], state.before_is_timestamp[rows]
        logits[:, v.no_timestamps].masked_fill_(timed, -torch.inf)
        # Timestamps come in pairs, except directly before the end: after a pair text must follow, after a lone one
        # no text may.
        unpaired = timed & last & ~before
        if bool(unpaired.any()):
            logits[:, : v.end].masked_fill_(unpaired[:, None], -torch.inf)
        # They never decrease, and a segment has a length above zero.
        lowest = state.last_timestamp[rows] + torch.where(unpaired, 0, 1)
        lowest = torch.where(state.last_timestamp[rows] >= 0, lowest, 0)
        forbidden = (self.timestamp_index < lowest[:, None]) | (last & before)[:, None]
        # The transcript opens with one, at most one second in.
        opening = timed & first
        if bool(opening.any()):
            text.masked_fill_(opening[:, None], -torch.inf)
            forbidden |= opening[:, None] & (self.timestamp_index > MAX_INITIAL_TIMESTAMP)
        times.masked_fill_(forbidden & timed[:, None], -torch.inf)
        # Where all timestamps together are likelier than any one token of text, take a timestamp.
        likelier = timed & (times.logsumexp(dim=-1) > text.amax(dim=-1))
        if bool(likelier.any()):
            text.masked_fill_(likelier[:, None], -torch.inf)

    def choose(
        self, logits: Tensor, state: RuleState, rows: slice, generators: list[torch.Generator | None]
    ) -> tuple[Tensor, Tensor]:
        """Filtered choice for the slots ``rows``: (tokens [n] int64, their log-probabilities [n] float32).

        Arg-max where the temperature is 0, else a sample from softmax(logits / temperature) drawn with the slot's own
        generator, so that a repeated decode gives the same text whatever it is batched with.
        """
        self.filter(logits, state, rows)
        scores = logits
        if any(g is not None for g in generators):
            scores = logits.clone()
            for row, generator in enumerate(generators):
                if generator is not None:
                    # the exponential race: arg-max of p / e with e ~ Exp(1) is a sample of p
                    race = torch.empty(logits.shape[1], device=logits.device).exponential_(generator=generator)
                    scores[row] = scores[row] / state.temperature[rows][row] - race.log()
        tokens = scores.argmax(dim=-1)
        logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
        self._advance(tokens, state, rows)
        return tokens, logprobs

    def _advance(self, tokens: Tensor, state: RuleState, rows: slice) -> None:
        index = tokens - self.vocabulary.timestamp_begin
        is_timestamp = index >= 0
        first = state.sampled[rows] == 0
        state.before_is_timestamp[rows] = torch.where(first, True, state.last_is_timestamp[rows])
        state.last_is_timestamp[rows] = is_timestamp
        state.last_timestamp[rows] = torch.where(is_timestamp, index, state.last_timestamp[rows])
        state.sampled[rows] += 1

    def detect_language(self, logits: Tensor) -> list[str]:
        """logits: [n, n_vocab] after <|startoftranscript|> alone → the likeliest language's code for each row."""
        codes = list(self.vocabulary.languages)
        return [codes[i] for i in logits[:, self.languages].argmax(dim=-1).tolist()]
