"""What a file or stream is, by its first bytes: which kind of sound, or something that is none."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

HEAD = 64  # bytes that ``sniff`` wants to see first
MPEG_HEAD = 16_384  # bytes that it takes to know MPEG audio without a tag by two frames in a row


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: for messages, with its article.
        reader: what reads it from a pipe: ``pcm`` (``wav.PcmStream``), ``ogg`` or ``libsndfile``, ``ffmpeg``; empty if
            it is no sound.
    """

    name: str
    reader: str = ""


MP3 = Format("an MP3", "libsndfile")
# Place of the first bytes that tell, these bytes, the format. The first that fits holds.
SIGNATURES: tuple[tuple[int, bytes, Format], ...] = (
    (0, b"RIFF", Format("a WAV", "pcm")),  # or no WAV: the header's reader says so
    (0, b"RF64", Format("an RF64", "pcm")),
    (0, b"BW64", Format("a BW64", "pcm")),
    (0, b".SoX", Format("a SoX stream", "pcm")),
    (0, b"XoS.", Format("a SoX stream", "pcm")),
    (0, b"OggS", Format("an Ogg", "ogg")),
    (0, b"fLaC", Format("a FLAC", "libsndfile")),
    (0, b"ID3\x02", MP3),
    (0, b"ID3\x03", MP3),
    (0, b"ID3\x04", MP3),
    (0, b".snd", Format("an AU", "libsndfile")),
    (0, b"dns.", Format("an AU", "libsndfile")),
    (8, b"AIFF", Format("an AIFF", "libsndfile")),
    (8, b"AIFC", Format("an AIFF-C", "libsndfile")),
    (0, b"riff\x2e\x91\xcf\x11", Format("a W64", "libsndfile")),
    (0, b"RIFX", Format("a big-endian WAV", "libsndfile")),
    (0, b"caff", Format("a CAF", "libsndfile")),
    (0, b"Creative Voice File\x1a", Format("a VOC", "libsndfile")),
    (0, b"NIST_1A", Format("a NIST SPHERE", "libsndfile")),
    (8, b"8SVX", Format("an 8SVX", "libsndfile")),
    (0, b"\x64\xa3\x01\x00", Format("an IRCAM", "libsndfile")),
    (0, b"\x64\xa3\x02\x00", Format("an IRCAM", "libsndfile")),
    (0, b"\x64\xa3\x03\x00", Format("an IRCAM", "libsndfile")),
    (0, b"\x64\xa3\x04\x00", Format("an IRCAM", "libsndfile")),
    (0, b"\x7f\xfe\x80\x01", Format("a DTS", "ffmpeg")),
    (4, b"ftyp", Format("an MPEG-4 (m4a, mp4)", "ffmpeg")),
    (0, b"\x1a\x45\xdf\xa3", Format("a WebM or Matroska", "ffmpeg")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Format("a WMA", "ffmpeg")),
    (0, b"FLV\x01", Format("an FLV", "ffmpeg")),
    (0, b"wvpk", Format("a WavPack", "ffmpeg")),
    (0, b"MAC ", Format("a Monkey's Audio", "ffmpeg")),
    (0, b"TTA1", Format("a True Audio", "ffmpeg")),
    (0, b"#!AMR", Format("an AMR", "ffmpeg")),
    (0, b"DSD ", Format("a DSF", "ffmpeg")),
    (0, b"FRM8", Format("a DSDIFF", "ffmpeg")),
    (0, b"\x00\x00\x01\xba", Format("an MPEG programme stream", "ffmpeg")),
    (0, b"\x89PNG", Format("a PNG picture")),
    (0, b"\xff\xd8\xff\xe0", Format("a JPEG picture")),
    (0, b"\xff\xd8\xff\xe1", Format("a JPEG picture")),
    (0, b"GIF8", Format("a GIF picture")),
    (0, b"%PDF", Format("a PDF document")),
    (0, b"PK\x03\x04", Format("a ZIP archive")),
    (0, b"\x1f\x8b\x08", Format("gzip data")),
    (0, b"BZh9", Format("bzip2 data")),
    (0, b"\xfd7zXZ\x00", Format("xz data")),
    (0, b"\x28\xb5\x2f\xfd", Format("zstd data")),
    (0, b"7z\xbc\xaf", Format("a 7z archive")),
    (0, b"\x7fELF", Format("a program")),
    (0, b"\x80\x02}", Format("a pickle")),
    (0, b"\x93NUMPY", Format("a numpy array")),
    (0, b"MThd", Format("a MIDI, which holds notes and no sound")),
)
# What ffmpeg may take a file for: formats that hold their sound themselves. Play lists and scripts name other files.
FFMPEG_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,asf,flv,avi,mpeg,mpegts,aac,ac3,eac3,amr,amrnb,amrwb,ape,wv,tta,tak,dsf,iff,"
    "caf,mp3,ogg,flac,wav,w64,aiff,au,sox,voc,rm,shn,qcp,gsm,mpc,mpc8,dts,truehd,mlp,loas,ast,oma,aea,xwma,mmf"
)


def sniff(head: bytes) -> Format | None:
    """The format that begins with ``head``; None if nothing tells, as with raw PCM.

    ``HEAD`` bytes are enough, unless ``wants_more``.
    """
    for place, mark, form in SIGNATURES:
        if head[place : place + len(mark)] == mark:
            return form
    if head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G":
        return Format("an MPEG transport stream", "ffmpeg")
    if _adts_length(head) and _adts_length(head[_adts_length(head) :]):
        return Format("an AAC", "ffmpeg")
    length = _mpeg_length(head)
    if length and _mpeg_length(head[length:]):
        return MP3
    if head[:2] == _AC3 and (second := head.find(_AC3, 2)) > 0 and head[2 * second : 2 * second + 2] == _AC3:
        return Format("an AC-3", "ffmpeg")
    return _text(head[:HEAD]) if len(head) >= HEAD else None


def wants_more(head: bytes) -> bool:
    """Could ``head`` be MPEG audio? Then ``MPEG_HEAD`` bytes tell."""
    return bool(_adts_length(head) or _mpeg_length(head) or head[:2] == _AC3 or head[:1] == b"G")


def mp3_length(head: bytes) -> tuple[int, int | None]:
    """Bytes of an MP3 that it takes to tell its length, and that length (None: it does not say).

    It stands in a frame without sound (Xing's) behind the tag.
    """
    start = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
    frame = head[start : start + 200]
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags = frame[place + 4 : place + 8] if place > 0 else b""
    if len(flags) < 4 or not flags[3] & 2:
        return start + 200, None
    return start + 200, start + int.from_bytes(frame[place + 8 + 4 * (flags[3] & 1) :][:4], "big")


def next_mp3(data: bytes) -> int | None:
    """Where in ``data``, which follows an MP3, another one begins; before it may be tags and padding."""
    for place, byte in enumerate(data):
        if byte in (0xFF, 0x49) and sniff(data[place:]) is MP3:
            return place
    return None


_AC3 = b"\x0b\x77"


def _text(head: bytes) -> Format | None:
    """Half a kilobyte a second of printable letters is no sound."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        body = head[2:]
        return Format("text in UTF-16") if 0 in body and not any(body[i] and body[i ^ 1] for i in range(32)) else None
    try:
        letters = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return None
    if not all(letter.isprintable() or letter in "\t\r\n\f" for letter in letters) or len(set(letters)) < 5:
        return None
    start = letters.lstrip().lower()
    return Format("an HTML page" if start.startswith(("<!doctype html", "<html")) else "text")


def _adts_length(head: bytes) -> int:
    """Bytes of the AAC frame that ``head`` begins with, 0 if it does not."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return 0
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return length if length > 7 else 0


_KBPS = {  # by MPEG-1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mpeg_length(head: bytes) -> int:
    """Bytes of the MPEG audio frame (ISO 11172-3, 13818-3) that ``head`` begins with, 0 if it does not."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version, layer, bitrate, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return 0
    first = version == 3
    bits = 1000 * _KBPS[first, layer][bitrate - 1]
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    padding = head[2] >> 1 & 1
    if layer == 1:
        return (12 * bits // hertz + padding) * 4
    return (144 if first or layer == 2 else 72) * bits // hertz + padding
