"""What a decoding process says to the process that asked: frames of kind (1 byte), length (4), payload."""

from __future__ import annotations

import enum
import struct

HEADER = struct.Struct("<BI")
MAX_PAYLOAD_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 16  # on the control socket


class Kind(enum.IntEnum):
    SAMPLES = 0  # int16, little endian
    END = 1  # all was decoded; the three below end a recording too, with a message for a person in UTF-8
    INVALID = 2
    TOO_LARGE = 3
    FAULT = 4
