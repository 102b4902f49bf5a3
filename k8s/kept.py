"""What a leader leaves to the next one: the policy's state, and what it last asked for (pure).

An hour of learning should not go with a pod. It is some 3 kB in an annotation of the Lease, which the leader writes
anyway.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.policy import State
from serve_app.scaling.readings import Stage

MOST_CHARACTERS = 128 * 1024
"""All annotations of an object together have 256 KiB at most."""
MOST_BYTES = 1024 * 1024
"""Unpacked. Whoever may write the Lease must not fill the controller's memory."""


@dataclass(frozen=True, slots=True)
class Kept:
    """at: Unix time. config: what the state was made with. targets: replicas last asked for."""

    at: float
    config: ScalingSettings
    targets: Mapping[Stage, int]
    state: State


_KEPT = TypeAdapter(Kept)


def pack(kept: Kept) -> str:
    """Raises ValueError where it is too large to keep."""
    text = base64.b64encode(zlib.compress(_KEPT.dump_json(kept), 9)).decode()
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the policy's state takes {len(text)} characters, more than {MOST_CHARACTERS}")
    return text


def unpack(text: str) -> Kept:
    """Raises ValueError where this is not what ``pack`` gave, such as another version's."""
    try:
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        if not unpacker.eof:
            raise ValueError("longer than any state, or cut off")
        return _KEPT.validate_json(packed)
    except (binascii.Error, zlib.error, ValidationError) as error:
        raise ValueError(str(error)) from None
