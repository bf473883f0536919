"""Streams of samples with a header: WAV with its large kin RF64 and BW64, and SoX's own; and headers of our own.

Sizes in headers are hints. A recorder that died leaves 0, a pipe is opened with a largest number, and both have sound
behind them: it is read to the end of the stream, or to a chunk that is no sound.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterator

import numpy as np

from echostream.audio.resample import check_rate
from echostream.errors import AudioError

Reader = Callable[[int], bytes]  # up to so many bytes, as soon as there are some; none at the end

BLOCK = 4096  # bytes asked for at a time; a pipe gives what it has
OPEN_END = 0x7FFFF000  # data size in the header of a WAV whose end is not known; readers take what comes
UNKNOWN = 0x7FFF0000  # from here on sizes in other programs' headers mean the same (SoX at 24 bits: 0x7FFFEFFC)
HEADER_SIZE = 44
MOST_CHANNELS = 1024
LARGEST_HEADER = 64 << 20  # bytes before the sound: more are no header (covers of albums are a few million)
LARGEST_CHUNK = 16 << 20  # bytes of a chunk behind the sound
# Sample types of WAV files: (format tag, bits) -> numpy type, offset, full scale. 24 bits are unpacked to 32.
WAV_TYPES = {
    (1, 8): ("u1", 128, 128),
    (1, 16): ("<i2", 0, 1 << 15),
    (1, 24): ("<i4", 0, 1 << 31),
    (1, 32): ("<i4", 0, 1 << 31),
    (3, 32): ("<f4", 0, 1),
    (3, 64): ("<f8", 0, 1),
}


class PcmStream:
    """Samples behind a header that has been read, or without one.

    Attributes:
        rate, channels: samples per second of each channel.
        kind: key of ``WAV_TYPES``.
        size: bytes of sound by the header; None: to the end.
    """

    def __init__(
        self, more: Reader, head: bytes, kind: tuple[int, int], channels: int, rate: int, size: int | None = None,
        big: bool = False, name: str = "standard input",
    ):  # fmt: skip
        self.more, self.head, self.kind, self.channels, self.rate, self.size = more, head, kind, channels, rate, size
        self.big, self.name = big, name

    @property
    def frame(self) -> int:
        """Bytes of a sample of all channels."""
        return self.kind[1] // 8 * self.channels

    def blocks(self) -> Generator[np.ndarray, None, None]:
        """Mono float32 [n] pieces as they come, channels averaged."""
        held = b""
        for data in self._bytes():
            held += data
            whole = len(held) // self.frame * self.frame
            if whole:
                yield self._samples(held[:whole])
                held = held[whole:]

    def _samples(self, data: bytes) -> np.ndarray:
        dtype, offset, scale = WAV_TYPES[self.kind]
        if self.kind == (1, 24):
            triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
            wide = np.zeros((len(triples), 4), dtype=np.uint8)
            wide[:, 1:] = triples
            data = wide.tobytes()
        values = np.frombuffer(data, dtype.replace("<", ">") if self.big else dtype).reshape(-1, self.channels)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is told where the samples are used
            samples: np.ndarray = ((values.astype(np.float64) - offset) / scale).mean(axis=1).astype(np.float32)
            return samples

    def _bytes(self) -> Iterator[bytes]:
        left = self.size
        if self.head:
            yield self.head
        while left is None or left > 0:
            data = self.more(BLOCK if left is None else min(BLOCK, left))
            if not data:
                return
            left = None if left is None else left - len(data)
            yield data
        # Here the header says the sound ends; what follows is told by its looks.
        assert self.size is not None
        pad = self.size % 2
        rest = read_bytes(self.more, 8 + pad)[pad:]
        if rest[:4] in (b"RIFF", b"RF64") and len(rest) == 8:
            following = wav_stream(self.more, rest[:4], self.name, rest[4:])
            if (following.kind, following.channels, following.rate) != (self.kind, self.channels, self.rate):
                raise AudioError(f"{self.name} goes on with a WAV of another format; send recordings one by one")
            yield from following._bytes()
        elif rest and not _is_chunk(rest):
            yield rest
            while data := self.more(BLOCK):
                yield data


def _is_chunk(data: bytes) -> bool:
    """Eight bytes: the name and the size of a chunk, or sound?"""
    name, size = data[:4], data[4:8]
    if not all(0x20 <= byte < 0x7F for byte in name):
        return False
    return len(size) < 4 or struct.unpack("<I", size)[0] <= LARGEST_CHUNK


def read_bytes(more: Reader, count: int) -> bytes:
    """``count`` bytes, fewer at the end."""
    parts, have = [], 0
    while have < count and (data := more(min(count - have, 1 << 20))):
        parts.append(data)
        have += len(data)
    return b"".join(parts)


def wav_stream(more: Reader, mark: bytes, name: str = "standard input", after: bytes = b"") -> PcmStream:
    """The stream behind a WAV header of which the first four bytes (``mark``), and ``after``, have been read.

    Raises:
        AudioError: it is damaged, or of an unknown sample type or an impossible rate.
    """
    if read_bytes(more, 8 - len(after))[-4:] != b"WAVE":
        raise AudioError(f"{name} starts with {mark.decode()} but is not a WAV stream")
    kind = long_size = None
    channels = rate = align = 0
    room = LARGEST_HEADER
    while True:
        chunk = read_bytes(more, 8)
        if len(chunk) < 8:
            raise AudioError(f"the WAV stream on {name} ends inside its header")
        chunk_name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if chunk_name == b"data":
            break
        room -= 8 + size
        if room < 0:
            raise AudioError(f"the WAV stream on {name} has more than {LARGEST_HEADER >> 20} MB before its sound")
        body = read_bytes(more, min(size + size % 2, 64))
        for skipped in range(len(body), size + size % 2, BLOCK):
            read_bytes(more, min(BLOCK, size + size % 2 - skipped))
        if chunk_name == b"fmt " and len(body) >= 16:
            tag, channels, rate, _, align, bits = struct.unpack("<HHIIHH", body[:16])
            if tag == 0xFFFE and len(body) >= 26:  # WAVE_FORMAT_EXTENSIBLE names the real tag further on
                tag = struct.unpack("<H", body[24:26])[0]
            kind = (tag, bits)
        elif chunk_name == b"ds64" and len(body) >= 16:
            long_size = struct.unpack("<Q", body[8:16])[0]
    if kind not in WAV_TYPES or not 1 <= channels <= MOST_CHANNELS:
        found = "no format" if kind is None else f"format {kind[0]} with {kind[1]} bits and {channels} channels"
        raise AudioError(f"the WAV stream on {name} has {found}; 8 to 32-bit PCM and float are read")
    if align not in (0, kind[1] // 8 * channels):
        raise AudioError(f"the WAV stream on {name} has {align} bytes for {channels} samples of {kind[1]} bits")
    check_rate(rate)
    if size == 0xFFFFFFFF and long_size and long_size < 1 << 62:
        return PcmStream(more, b"", kind, channels, rate, long_size, name=name)
    return PcmStream(more, b"", kind, channels, rate, size if 0 < size < UNKNOWN else None, name=name)


def sox_stream(more: Reader, mark: bytes, name: str = "standard input") -> PcmStream:
    """The same of SoX's own format (``sox -p``), which has signed 32-bit samples.

    Raises:
        AudioError: its header is damaged, or the rate impossible.
    """
    order = "<" if mark == b".SoX" else ">"
    head = read_bytes(more, 28)
    if len(head) < 28:
        raise AudioError(f"the SoX stream on {name} ends inside its header")
    size, _, rate, channels, _ = struct.unpack(order + "IQdII", head)
    if not 28 <= size <= LARGEST_HEADER or not 1 <= channels <= MOST_CHANNELS:
        raise AudioError(f"the SoX stream on {name} has a damaged header")
    read_bytes(more, size - 28)
    check_rate(rate)
    return PcmStream(more, b"", (1, 32), channels, int(rate), big=order == ">", name=name)


def wav_header(rate: int, size: int | None) -> bytes:
    """The header of a mono 16-bit WAV with ``size`` bytes of sound; None: its end is not known yet."""
    size = OPEN_END if size is None else min(size, 0xFFFFFFFF - 36)
    fmt = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    sizes = [struct.pack("<I", number) for number in (size + 36, len(fmt), size)]
    return b"RIFF" + sizes[0] + b"WAVEfmt " + sizes[1] + fmt + b"data" + sizes[2]
