"""The decoder's whole step in one kernel on a GPU, beside float64 on the CPU."""

from __future__ import annotations

import os
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from kernels.persistent_step import ENCODED, HEAD, SLOTS, WIDTHS, Layer, PersistentStep, available, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not available(torch.device("cuda")), reason="needs a Hopper GPU"
    ),
]

CONTEXT = 448
VOCABULARY = 3001  # no multiple of what a block takes at once
REPEATS = int(os.environ.get("REPEATS", "50"))  # sanitize.sh has fewer: a step takes seconds under racecheck


def layer(width: int, slots: int, generator: torch.Generator) -> Layer:
    """Random, on the CPU, as a model has it: outputs of about the size of their inputs."""

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + around

    products = {"qkv": (3 * width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    tensors = {}
    for name in (field.name for field in fields(Layer)):
        of, _, kind = name.rpartition("_")
        rows, columns = products.get(of, (width, width))
        if of.endswith("norm"):
            tensors[name] = normal(width, scale=0.1, around=float(kind == "weight"))
        elif kind == "weight":
            tensors[name] = normal(rows, columns, scale=columns**-0.5).half()
        elif kind == "bias":
            tensors[name] = normal(rows, scale=0.1).half()
        else:
            shape = (width // HEAD, ENCODED, HEAD) if of == "cross" else (CONTEXT, width)
            tensors[name] = normal(slots, *shape).half()
    return Layer(**tensors)


def each(of: Layer, **to: torch.dtype | str) -> Layer:
    """Its tensors, converted or on a device."""
    return replace(of, **{f.name: getattr(of, f.name).to(**to) for f in fields(of)})


@pytest.mark.parametrize("position", [0, 17, 250, CONTEXT - 2])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_equals_the_reference(width: int, slots: int, position: int) -> None:
    generator = torch.Generator().manual_seed(width + slots + position)
    layers = [layer(width, slots, generator) for _ in range(2)]
    table = torch.randn(VOCABULARY, width, generator=generator).mul(width**-0.5).half()
    places = torch.randn(CONTEXT, width, generator=generator) * 0.1
    norm = torch.randn(width, generator=generator) * 0.1 + 1, torch.randn(width, generator=generator) * 0.1
    exact = [each(one, dtype=torch.float64) for one in layers]
    ours = [each(one, device="cuda") for one in layers]
    step = PersistentStep(ours, table.cuda(), places.cuda(), norm[0].cuda(), norm[1].cuda(), slots)
    doubles = table.double(), places.double(), norm[0].double(), norm[1].double()
    for further in range(3):  # the last one may lie behind the context's end
        tokens = torch.randint(0, VOCABULARY, (slots,), generator=generator, dtype=torch.int32)
        positions = torch.arange(slots, dtype=torch.int32) + position + further  # slots at different places
        expected = reference(exact, *doubles, tokens, positions)
        logits = step(tokens.cuda(), positions.cuda()).cpu()
        assert float((logits - expected).norm() / expected.norm()) < 5e-3
    for one, right in zip(ours, exact, strict=True):
        assert float((one.self_keys.cpu() - right.self_keys).norm() / right.self_keys.norm()) < 2e-3
        assert float((one.self_values.cpu() - right.self_values).norm() / right.self_values.norm()) < 2e-3


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("width", [384, 1280])
def test_steps_repeat_to_the_bit(width: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(width)
    layers = [each(layer(width, slots, generator), device="cuda") for _ in range(3)]
    table = torch.randn(VOCABULARY, width, generator=generator).mul(width**-0.5).half().cuda()
    places, ones, zeros = torch.zeros(CONTEXT, width).cuda(), torch.ones(width).cuda(), torch.zeros(width).cuda()
    step = PersistentStep(layers, table, places, ones, zeros, slots)
    tokens, positions = (
        torch.arange(slots, dtype=torch.int32).cuda(),
        torch.full((slots,), 40, dtype=torch.int32).cuda(),
    )
    first = step(tokens, positions)
    for _ in range(REPEATS):
        assert torch.equal(step(tokens, positions), first)
