"""Choosing the next token, for many slots at once, on the device: what a slot remembers, and the rules.

The rules are openai-whisper's (``decoding.py``: SuppressBlank, SuppressTokens, ApplyTimestampRules, GreedyDecoder),
restated over what they need of the tokens so far. A slot first takes its start sequence token by token, along with the
others' steps; what is sampled comes after it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum

import torch
from torch import Tensor

from kernels.compile import build
from kernels.launch import Kernel

MOST_STARTS = 4  # tokens of the longest start sequence
MOST_PARTS = 32
"""Into how many pieces a row of logits is cut where there are few rows."""
DETECT = -1
"""In a start sequence: the likeliest language's token goes here."""


class Field(IntEnum):
    """Columns of a slot's state, int32; TEMPERATURE, SUM_LOGPROB and NO_SPEECH hold the bits of a float32."""

    POSITION = 0  # of the input token, in the decoder's context
    TOKEN = 1  # the input token
    STEP = 2  # index of the input token, counted from <|startoftranscript|>
    STARTS = 3  # length of the start sequence
    SAMPLED = 4  # how many tokens were sampled
    FINISHED = 5
    TIMESTAMPS = 6  # decode with timestamps?
    LAST_IS_TIMESTAMP = 7
    BEFORE_IS_TIMESTAMP = 8  # of the token before the last; 1 where there is none
    LAST_TIMESTAMP = 9  # index of the last timestamp token, -1 where there is none
    TEMPERATURE = 10  # 0 takes the likeliest token
    SEED = 11  # of the sampling
    SUM_LOGPROB = 12  # of the sampled tokens
    NO_SPEECH = 13  # probability of <|nospeech|> after <|startoftranscript|>
    START = 14  # the start sequence, in MOST_STARTS columns


FIELDS = Field.START + MOST_STARTS
BUILD = build("next_token.cu", FIELDS=FIELDS, **{field.name: int(field) for field in Field})
BUILDS = (BUILD,)


@dataclass(frozen=True, slots=True)
class Rules:
    """A vocabulary's special tokens and the limits, numbers in the order of the kernel's ``Rules``. The two blanks, a
    space and the end, may not come first; ``language_end`` lies behind the last language. ``suppressed``: tokens that
    are never chosen."""

    n_vocab: int
    end: int
    no_speech: int
    no_timestamps: int
    timestamp_begin: int
    blank_first: int
    blank_second: int
    language_begin: int
    language_end: int
    most_initial_timestamp: int
    most_sampled: int
    n_ctx: int
    suppressed: tuple[int, ...]


def float_bits(value: float) -> int:
    """The bits of a float32, as an int32."""
    return ctypes.c_int.from_buffer(ctypes.c_float(value)).value


def new_state(start: Sequence[int], *, position: int, timestamps: bool, temperature: float, seed: int) -> list[int]:
    """A slot's state before its first step. start: <|startoftranscript|> and what follows it, at most 4 tokens, DETECT
    in the place of a language to detect; position: of <|startoftranscript|>, behind the prompt."""
    if not 1 <= len(start) <= MOST_STARTS:
        raise ValueError(f"a start sequence has 1 to {MOST_STARTS} tokens, not {len(start)}")
    state = [0] * FIELDS
    state[Field.POSITION] = position
    state[Field.TOKEN] = start[0]
    state[Field.STARTS] = len(start)
    state[Field.TIMESTAMPS] = int(timestamps)
    state[Field.BEFORE_IS_TIMESTAMP] = 1
    state[Field.LAST_TIMESTAMP] = -1
    state[Field.TEMPERATURE] = float_bits(temperature)
    state[Field.SEED] = ctypes.c_int(seed & 0xFFFFFFFF).value
    state[Field.START : Field.START + len(start)] = start
    return state


def idle_states(slots: int, device: torch.device) -> Tensor:
    """[slots, FIELDS] int32 of slots that hold nothing: they take part in steps, which leave them as they are."""
    states = torch.zeros(slots, FIELDS, dtype=torch.int32, device=device)
    states[:, Field.FINISHED] = 1
    return states


class NextToken:
    """Chooses, and moves the slots' states on."""

    def __init__(self, rules: Rules, device: torch.device, slots: int):
        self.rules = rules
        self._suppressed = torch.zeros(rules.n_vocab, dtype=torch.bool, device=device)
        self._suppressed[list(rules.suppressed)] = True
        self._tokens = torch.arange(rules.n_vocab, device=device)
        if device.type == "cuda":
            self._kernel = Kernel(BUILD, "next_token", device)
            padded = torch.zeros(-(-rules.n_vocab // 32) * 32, dtype=torch.int64, device=device)
            padded[list(rules.suppressed)] = 1
            words = (padded.view(-1, 32) << torch.arange(32, device=device)).sum(dim=1)
            self._mask = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
            self._parts = torch.empty(slots, MOST_PARTS, 3, 4, device=device)
            self._arrivals = torch.zeros(slots, dtype=torch.int32, device=device)
            self._rules = torch.tensor(astuple(rules)[:-1], dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, states: Tensor) -> None:
        """logits: [n, at least n_vocab] float32; what stands behind n_vocab counts for nothing. states: [n, FIELDS]
        int32, of the same slots, changed in place."""
        n = len(logits)
        if logits.dtype != torch.float32 or logits.stride(1) != 1 or logits.shape[1] < self.rules.n_vocab:
            raise ValueError(f"logits must be float32 [n, {self.rules.n_vocab}], got {list(logits.shape)}")
        if states.shape != (n, FIELDS) or states.dtype != torch.int32 or not states.is_contiguous():
            raise ValueError(f"states must be int32 [{n}, {FIELDS}], got {list(states.shape)}")
        if not logits.is_cuda:
            self.reference(logits[:, : self.rules.n_vocab], states)
            return
        parts = max(1, min(MOST_PARTS, 264 // n))
        self._kernel(
            (n, parts),
            256,
            logits,
            self._mask,
            states,
            self._parts,
            self._arrivals,
            self._rules,
            ctypes.c_int(logits.stride(0)),
        )

    def reference(self, logits: Tensor, states: Tensor) -> None:
        """The same in plain PyTorch."""
        rules = self.rules
        column = {field: states[:, field] for field in Field}
        active = column[Field.FINISHED] == 0
        forced = column[Field.STEP] + 1
        sampling = forced >= column[Field.STARTS]
        index = torch.arange(len(logits), device=logits.device)

        begun = active & (forced == 1)
        if bool(begun.any()):
            no_speech = logits[begun].softmax(dim=-1)[:, rules.no_speech]
            states.view(torch.float32)[begun.nonzero()[:, 0], Field.NO_SPEECH] = no_speech
        next_start = states[index, Field.START + forced.clamp(max=MOST_STARTS - 1)]
        detecting = active & ~sampling & (next_start == DETECT)
        if bool(detecting.any()):
            languages = logits[:, rules.language_begin : rules.language_end].argmax(dim=-1) + rules.language_begin
            next_start = torch.where(detecting, languages.int(), next_start)
            states[detecting.nonzero()[:, 0], Field.START + forced[detecting]] = next_start[detecting]
        column[Field.POSITION].add_(active)
        column[Field.STEP].copy_(torch.where(active, forced, column[Field.STEP]))
        tokens = next_start
        sampled = active & sampling
        if bool(sampled.any()):
            # a filter of idle slots' logits does no harm: nothing of it is kept
            filtered = self.filter(logits, states)
            tokens = torch.where(sampling, self._choose(filtered, states).int(), next_start)
            logprobs = filtered.gather(1, tokens[:, None].long())[:, 0] - filtered.logsumexp(dim=-1)
            self._remember(tokens, logprobs, states, sampled)
        column[Field.TOKEN].copy_(torch.where(active, tokens, column[Field.TOKEN]))

    def filter(self, logits: Tensor, states: Tensor) -> Tensor:
        """logits [n, n_vocab], with -inf for what the slots may not choose."""
        rules = self.rules
        filtered = logits.masked_fill(self._suppressed, -torch.inf)
        first = states[:, Field.SAMPLED] == 0
        if bool(first.any()):
            for blank in (rules.blank_first, rules.blank_second):
                filtered[:, blank].masked_fill_(first, -torch.inf)
        timed = states[:, Field.TIMESTAMPS] != 0
        if not bool(timed.any()):
            return filtered
        text, times = filtered[:, : rules.timestamp_begin], filtered[:, rules.timestamp_begin :]
        last, before = states[:, Field.LAST_IS_TIMESTAMP] != 0, states[:, Field.BEFORE_IS_TIMESTAMP] != 0
        filtered[:, rules.no_timestamps].masked_fill_(timed, -torch.inf)
        # Timestamps come in pairs, except directly before the end: after a pair text must follow, after a lone one
        # no text may.
        unpaired = timed & last & ~before
        if bool(unpaired.any()):
            filtered[:, : rules.end].masked_fill_(unpaired[:, None], -torch.inf)
        # They never decrease, and a segment has a length above zero.
        latest = states[:, Field.LAST_TIMESTAMP]
        lowest = torch.where(latest >= 0, latest + torch.where(unpaired, 0, 1), 0)
        times_index = self._tokens[: times.shape[1]]
        forbidden = (times_index < lowest[:, None]) | (last & before)[:, None]
        # The transcript opens with one, at most one second in.
        opening = timed & first
        if bool(opening.any()):
            text.masked_fill_(opening[:, None], -torch.inf)
            forbidden |= opening[:, None] & (times_index > rules.most_initial_timestamp)
        times.masked_fill_(forbidden & timed[:, None], -torch.inf)
        # Where all timestamps together are likelier than any one token of text, take a timestamp.
        likelier = timed & (times.logsumexp(dim=-1) > text.amax(dim=-1))
        if bool(likelier.any()):
            text.masked_fill_(likelier[:, None], -torch.inf)
        return filtered

    def _choose(self, filtered: Tensor, states: Tensor) -> Tensor:
        temperature = states.view(torch.float32)[:, Field.TEMPERATURE]
        hot = (temperature > 0) & (states[:, Field.FINISHED] == 0)
        if not bool(hot.any()):
            return filtered.argmax(dim=-1)
        scores = filtered.clone()
        for row in hot.nonzero()[:, 0].tolist():
            seed, sampled = int(states[row, Field.SEED]), int(states[row, Field.SAMPLED])
            scores[row] = scores[row] / temperature[row] + gumbel(seed, sampled, self._tokens)
        return scores.argmax(dim=-1)

    def _remember(self, tokens: Tensor, logprobs: Tensor, states: Tensor, sampled: Tensor) -> None:
        rules = self.rules

        def keep(field: Field, value: Tensor | int) -> None:
            column = states[:, field]
            column.copy_(torch.where(sampled, torch.as_tensor(value, device=column.device).to(column.dtype), column))

        floats = states.view(torch.float32)[:, Field.SUM_LOGPROB]
        floats.add_(torch.where(sampled, logprobs, 0.0))
        index = tokens - rules.timestamp_begin
        first = states[:, Field.SAMPLED] == 0
        keep(Field.BEFORE_IS_TIMESTAMP, torch.where(first, 1, states[:, Field.LAST_IS_TIMESTAMP]))
        keep(Field.LAST_IS_TIMESTAMP, index >= 0)
        keep(Field.LAST_TIMESTAMP, torch.where(index >= 0, index, states[:, Field.LAST_TIMESTAMP]))
        keep(Field.SAMPLED, states[:, Field.SAMPLED] + 1)
        full = (states[:, Field.SAMPLED] >= rules.most_sampled) | (states[:, Field.POSITION] >= rules.n_ctx)
        keep(Field.FINISHED, (tokens == rules.end) | full)


def gumbel(seed: int, sampled: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel numbers for the tokens (int64 [n]), from a seed and how many tokens were sampled before.

    The arg-max of logits / temperature plus these is a sample of their softmax. They are the same on every device, so
    that a window decoded again gives the same text, whatever it is batched with.
    """
    word = 0xFFFFFFFF

    def mix(x: Tensor) -> Tensor:
        """murmur3's finaliser over 32 bits."""
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & word
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & word
        return x ^ (x >> 16)

    key = mix(torch.tensor((seed + 0x9E3779B9 * (sampled + 1)) & word, device=tokens.device))
    uniform = ((mix(key ^ ((tokens * 0x9E3779B1) & word)) >> 9).float() + 0.5) * 2**-23
    return -(-uniform.log()).log()
