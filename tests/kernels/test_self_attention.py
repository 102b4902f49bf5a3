"""The decoder's self-attention of one step: what can be said of it without a GPU."""

from __future__ import annotations

import torch

from kernels.self_attention import reference


def test_a_slot_sees_its_own_positions_only() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 16, 128, generator=generator) for _ in range(2))
    qkv = torch.randn(2, 3 * 128, generator=generator)
    positions = torch.tensor([3, 9], dtype=torch.int32)
    together = reference(qkv, keys.clone(), values.clone(), positions)
    for i, position in enumerate((3, 9)):
        query, key, value = qkv[i].view(3, 2, 64)
        k = torch.cat([keys[i, :position].view(-1, 2, 64), key[None]])
        v = torch.cat([values[i, :position].view(-1, 2, 64), value[None]])
        weights = torch.einsum("hd,khd->hk", query, k).div(8).softmax(dim=-1)
        torch.testing.assert_close(together[i], torch.einsum("hk,khd->hd", weights, v).reshape(-1))


def test_the_new_position_is_kept() -> None:
    keys, values = torch.zeros(1, 4, 128), torch.zeros(1, 4, 128)
    qkv = torch.arange(3 * 128, dtype=torch.float32)[None]
    reference(qkv, keys, values, torch.tensor([2], dtype=torch.int32))
    assert torch.equal(keys[0, 2], qkv[0, 128:256])
    assert torch.equal(values[0, 2], qkv[0, 256:])
    assert not keys[0, [0, 1, 3]].any()
