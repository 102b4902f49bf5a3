"""WAV files of plain 16-bit samples, the one kind of recording that needs no decoder.

A header of some dozen bytes says where the samples lie. Reading it takes a page of Python, in which no file can do any
harm, where a process of its own (``audio.decode``) costs as much as voice activity over the whole recording. Whatever
is in any way unusual is left to that: it knows all kinds of WAV, and what to say of damaged ones.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from serve_app.audio.samples import Int16, Limits, blocks_of
from serve_app.errors import InvalidAudio
from serve_app.settings import AudioSettings

HEAD_BYTES = 4096
"""The samples must begin within: some programs write a table of pages of metadata before them."""

MOST_CHANNELS = 2
PLAIN = 1  # the format's tag
_FORMAT = struct.Struct("<HHIIHH")  # tag, channels, Hz, bytes a second, bytes of all channels' samples, bits


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a file's samples lie: ``frames`` of ``channels`` samples each, from byte ``begin`` on."""

    channels: int
    rate: int
    begin: int
    frames: int

    @property
    def frame_bytes(self) -> int:
        return 2 * self.channels


def layout(head: bytes, size: int) -> Layout | None:
    """What a file's first bytes say, if it is of this kind and as long as it says (pure). size: of the file, bytes."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    said: tuple[int, ...] | None = None
    at = 12
    while at + 8 <= len(head):
        name, length, body = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little"), at + 8
        if name == b"fmt ":
            if said is not None or length < _FORMAT.size or body + _FORMAT.size > len(head):
                return None
            said = _FORMAT.unpack_from(head, body)
        elif name == b"data":
            if said is None:
                return None
            tag, channels, rate, _, frame_bytes, bits = said
            is_plain = tag == PLAIN and bits == 16 and 1 <= channels <= MOST_CHANNELS and frame_bytes == 2 * channels
            if not is_plain or rate == 0 or length == 0 or length % frame_bytes or body + length > size:
                return None
            return Layout(channels, rate, body, length // frame_bytes)
        at = body + length + length % 2  # chunks begin at even bytes
    return None


async def plain(source: bytes | BinaryIO, settings: AudioSettings) -> AsyncGenerator[Int16, None] | None:
    """The blocks of a recording of this kind, as ``AudioDecoder.decode`` gives them; None for any other.

    source: the file's bytes, or a binary file, read in a thread from where it stands and not closed.

    Raises AudioTooLarge and InvalidAudio where a cap is passed; while iterating, InvalidAudio where the file has become
    shorter meanwhile.
    """
    if isinstance(source, bytes):
        start, size, head = 0, len(source), source[:HEAD_BYTES]
    elif source.seekable():
        start, size, head = await asyncio.to_thread(_look, source)
    else:
        return None
    found = layout(head, size)
    if found is None:
        return None
    limits = Limits.of(settings)
    limits.check_upload(size)
    limits.check_format(found.channels, found.rate)
    limits.check_seconds(found.frames / found.rate)
    limits.check_decoded(found.frames * found.frame_bytes)

    def read(first: int, count: int) -> Int16:
        at, length = found.begin + first * found.frame_bytes, count * found.frame_bytes
        if isinstance(source, bytes):
            samples = np.frombuffer(source, "<i2", length // 2, at)
        else:
            source.seek(start + at)
            data = source.read(length)
            if len(data) < length:
                raise InvalidAudio("The file has become shorter while it was read.")
            samples = np.frombuffer(data, "<i2")
        return samples.astype(np.int16, copy=False).reshape(-1, found.channels)

    return blocks_of(read, found.frames, found.rate)


def _look(file: BinaryIO) -> tuple[int, int, bytes]:
    """Where it stands, how many bytes there are from there on, and the first of them; it stands there afterwards."""
    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    head = file.read(HEAD_BYTES)
    file.seek(start)
    return start, size, head
