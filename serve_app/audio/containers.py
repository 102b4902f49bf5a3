"""Which containers and codecs are taken, and what an upload looks like by its first bytes.

FFmpeg finds the container by content among those allowed here; names of files are never looked at. What is left out
on purpose: playlists and manifests (HLS, DASH, concat), which name other files, and everything that is not audio.
"""

from __future__ import annotations

# FFmpeg's demuxer names.
DEMUXERS = ("aac", "aiff", "amr", "au", "caf", "flac", "matroska", "mov", "mp3", "ogg", "w64", "wav")
CONTAINERS = "AAC, AIFF, AMR, AU, CAF, FLAC, M4A/MP4/MOV, MP3, Ogg, W64, WAV or WebM/Matroska"
TITLES = {
    "aac": "AAC", "aiff": "AIFF", "amr": "AMR", "au": "AU", "caf": "CAF", "flac": "FLAC", "matroska": "Matroska/WebM",
    "mov": "MP4/QuickTime", "mp3": "MP3", "ogg": "Ogg", "w64": "W64", "wav": "WAV",
}  # fmt: skip

# Where the length is in the container and true. Not in WAV and its like, whose headers are often wrong (streams), nor
# in MP3, AAC and AMR, where FFmpeg guesses it from the first frames.
LENGTH_TRUSTED = frozenset({"caf", "flac", "matroska", "mov", "ogg"})

# FFmpeg's decoder names. Decoders of images and video are absent, so that no cover picture or film reaches them.
DECODERS = frozenset({
    "aac", "ac3", "alac", "amrnb", "amrwb", "eac3", "flac", "g722", "gsm", "gsm_ms", "libopencore_amrnb",
    "libopencore_amrwb", "libopus", "mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float", "opus", "speex", "vorbis",
    "wavpack",
    "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_yamaha",
    "pcm_alaw", "pcm_mulaw", "pcm_s8", "pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le",
    "pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be",
})  # fmt: skip

_QUICKTIME_ATOMS = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"})
_AUDIO = {
    b"fLaC": "flac", b"OggS": "ogg", b"\x1aE\xdf\xa3": "matroska", b"caff": "caf", b"FORM": "aiff", b"#!AMR": "amr",
    b".snd": "au", b"riff\x2e\x91\xcf\x11": "w64", b"ID3": "mp3",
}  # fmt: skip
_NOT_AUDIO = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document",
    b"\x1f\x8b": "a gzip archive",
    b"#EXTM3U": "an HLS playlist",
    b"ffconcat": "a concat playlist",
    b"<?xml": "an XML document",
    b"<MPD": "a DASH manifest",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"FLV\x01": "an FLV video",
    b"\x30\x26\xb2\x75": "a Windows Media file",
}


def sniff(head: bytes) -> str | None:
    """The demuxer that the first bytes ask for, or None where they alone do not tell (raw MP3 and AAC frames)."""
    if head[4:8] in _QUICKTIME_ATOMS:
        return "mov"
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "wav"
    return next((name for magic, name in _AUDIO.items() if head.startswith(magic)), None)


def needs_seeking(head: bytes) -> bool:
    """Whether the container may keep its index or its length at the end. All others are decoded as they arrive.

    MP3 could be, but FFmpeg then disregards how much of the last frame is padding, and audio that is not there follows
    the recording.
    """
    return sniff(head) in ("mov", "ogg", "aiff", "caf", "mp3") or head[:1] == b"\xff"


def describe(head: bytes) -> str:
    """What an upload that cannot be decoded seems to be, for the person who sent it."""
    for magic, what in _NOT_AUDIO.items():
        if head.startswith(magic):
            return what
    if head[:4] == b"RIFF" and head[8:12].strip().isalnum():
        return f"a RIFF file of kind {head[8:12].strip().decode('ascii')}"
    if head and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head):
        return "text"
    return "data of an unknown kind"
