"""The fused choice of tokens on a GPU, beside the same in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from kernels.next_token import DETECT, Field, NextToken, Rules, idle_states, new_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# large-v3's places
RULES = Rules(
    n_vocab=51866,
    end=50257,
    no_speech=50363,
    no_timestamps=50364,
    timestamp_begin=50365,
    blank_first=220,
    blank_second=50257,
    language_begin=50259,
    language_end=50359,
    most_initial_timestamp=50,
    most_sampled=224,
    n_ctx=448,
    suppressed=(1, 2, 7, 8, 31, 32, 63, 50258, 50358, 50359, 50360, 50361, 50362, 50363),
)
FLOATS = [Field.TEMPERATURE, Field.SUM_LOGPROB, Field.NO_SPEECH]


def random_states(n: int, temperature: float) -> torch.Tensor:
    rows = [
        new_state(
            [50258, DETECT if i % 3 == 0 else 50259 + i % 90, 50360, 50364][: 4 - i % 2],
            position=i % 5,
            timestamps=i % 2 == 1,
            temperature=temperature if i % 4 else 0.0,
            seed=i,
        )
        for i in range(n)
    ]
    states = torch.tensor(rows, dtype=torch.int32)
    states[n // 2 + 1 :: 7] = idle_states(1, torch.device("cpu"))
    return states


@pytest.mark.parametrize("n", [1, 3, 40, 256])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_it_chooses_what_plain_pytorch_chooses(n: int, temperature: float) -> None:
    generator = torch.Generator("cuda").manual_seed(n)
    choose = NextToken(RULES, torch.device("cuda"), n)
    states = random_states(n, temperature).cuda()
    expected = states.clone()
    for step in range(14):
        logits = torch.randn(n, RULES.n_vocab, device="cuda", generator=generator) * 3
        logits[:, RULES.timestamp_begin :] += [-3.0, 0.0, 3.0, 6.0][step % 4]
        logits[:, RULES.end] += 8.0 if step > 8 else 0.0
        choose(logits, states)
        choose.reference(logits, expected)
        whole = [field for field in Field if field not in FLOATS]
        assert torch.equal(states[:, whole], expected[:, whole]), step
        for field in FLOATS:
            torch.testing.assert_close(
                states.view(torch.float32)[:, field], expected.view(torch.float32)[:, field], rtol=1e-3, atol=1e-3
            )


def test_columns_behind_the_vocabulary_count_for_nothing() -> None:
    choose = NextToken(RULES, torch.device("cuda"), 1)
    state = new_state([50258], position=0, timestamps=False, temperature=0.0, seed=0)
    states = torch.tensor([state], dtype=torch.int32, device="cuda")
    logits = torch.full((1, 51872), 100.0, device="cuda")
    logits[:, : RULES.n_vocab] = 0.0
    logits[:, 50300] = 1.0
    choose(logits, states)
    assert int(states[0, Field.TOKEN]) == 50300
