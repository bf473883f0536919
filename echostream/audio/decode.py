"""Compressed and rarer formats from pipes: by libsndfile, and by ffmpeg for all that it does not know.

Nothing is kept but a window of the stream, so that it may be as long as it likes.
"""

from __future__ import annotations

import functools
import io
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from echostream.audio.formats import FFMPEG_FORMATS, MP3, MPEG_HEAD, Format, mp3_length, next_mp3
from echostream.audio.wav import PcmStream, Reader, read_bytes, wav_stream
from echostream.errors import AudioError

if TYPE_CHECKING:
    import soundfile

WINDOW = 16 << 20  # bytes that stay behind (libsndfile steps back a little) and that it may look ahead
LENGTH = 1 << 40  # what it is told the stream's length is
BLOCK_S = 0.1


def open_forward(source: Any) -> soundfile.SoundFile:
    """A ``SoundFile`` (of a path in bytes, a number or a file object) that is read from its beginning to its end.

    The package otherwise seeks after every read, to where it is; that fails behind the last sample of a FLAC that does
    not know its length.
    """
    return _forward_class()(source)


@functools.cache
def _forward_class() -> type:
    import soundfile  # brings libsndfile: kept out of `import echostream.audio`

    class Forward(soundfile.SoundFile):  # type: ignore[misc]  # the package has no types
        def seekable(self) -> bool:
            return False

    return Forward


def file_blocks(file: soundfile.SoundFile, name: str, block_s: float = BLOCK_S) -> Iterator[np.ndarray]:
    """Mono float32 [n] pieces of an opened file, channels averaged, however long its header says it is.

    Raises:
        AudioError: it cannot be read to its end.
    """
    size = max(1, min(int(file.samplerate * block_s), (1 << 20) // file.channels))
    done = 0
    try:
        while len(samples := file.read(size, dtype="float32", always_2d=True)):
            done += len(samples)
            yield samples.mean(axis=1, dtype=np.float32)
    except (RuntimeError, OSError) as error:
        raise AudioError(f"{name} cannot be read beyond {done / file.samplerate:.1f} s: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """The last part of libsndfile's message: the rest names the object that it reads from."""
    return (str(error).splitlines() or [""])[0].rpartition(": ")[2] or type(error).__name__


class Window:
    """A pipe as a file that seems endless: libsndfile may step within ``WINDOW`` bytes, beyond there is silence."""

    def __init__(self, head: bytes, more: Reader, length: int = LENGTH):
        self.length = length
        self.held, self.start, self.place, self.more = bytearray(head), 0, 0, more
        self.error: Exception | None = None  # of the pipe: it cannot pass through libsndfile

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def write(self, data: bytes) -> int:
        return 0

    def read(self, size: int) -> bytes:
        end = self.start + len(self.held)
        if self.place > end + WINDOW:
            self.place += size
            return bytes(size)
        while end < self.place + size and (data := self._more(min(1 << 16, self.place + size - end))):
            self.held += data
            end += len(data)
            if len(self.held) > 2 * WINDOW:
                self.start += len(self.held) - WINDOW
                del self.held[:-WINDOW]
        if self.place < self.start:
            return b""
        data = bytes(self.held[self.place - self.start : self.place - self.start + size])
        self.place += len(data)
        return data

    def behind(self) -> bytes:
        """All that has been read behind the length, a little more than that if there is more."""
        self.place = self.length
        self.read(MPEG_HEAD)
        return bytes(self.held[max(0, self.length - self.start) :])

    def _more(self, count: int) -> bytes:
        try:
            return b"" if self.error else self.more(count)
        except Exception as error:
            self.error = error
            return b""


class Decoder:
    """A pipe read by libsndfile in a thread of its own: there it may wait for the pipe and be left alone.

    Attributes:
        rate: samples per second.

    Raises:
        AudioError: it is not what it seems to be.
    """

    def __init__(self, form: Format, head: bytes, more: Reader, name: str):
        self.form, self.head, self.more, self.name = form, head, more, name
        self.found: queue.Queue[Any] = queue.Queue(maxsize=8)
        self.closed = False
        self.error: Exception | None = None
        threading.Thread(target=self._work, daemon=True).start()
        self.rate: int = self._next()

    def blocks(self) -> Iterator[np.ndarray]:
        while (samples := self._next()) is not None:
            yield samples

    def close(self) -> None:
        self.closed = True
        with suppress(queue.Empty):
            while True:
                self.found.get_nowait()

    def _next(self) -> Any:
        found = self.found.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _work(self) -> None:
        source: Any = None
        try:
            try:
                # libsndfile reads Ogg in order only from what it knows to be a pipe, and other formats from no pipe.
                source = self._pipe() if self.form.reader == "ogg" else self._window()
                file = open_forward(source)
            except (RuntimeError, TypeError, OSError) as error:
                raise AudioError(
                    f"{self.name} begins like {self.form.name} but cannot be read as one: {reason_of(error)}"
                ) from None
            self.found.put(file.samplerate)
            while file is not None:
                with file:
                    for samples in file_blocks(file, self.name):
                        self.found.put(samples)
                        if self.closed:
                            return
                source, file = self._next_file(source, file.samplerate)
            self.found.put(self._wrong(source))
        except BaseException as error:
            self.found.put(self._wrong(source) or error)

    def _next_file(self, source: Any, rate: int) -> tuple[Any, soundfile.SoundFile | None]:
        """The MP3 behind the one that was read: one that tells its length ends there, also where others follow."""
        if self.form is not MP3 or source.length == LENGTH:
            return source, None
        rest = source.behind()
        place = next_mp3(rest[:MPEG_HEAD])
        if place is None:
            return source, None
        self.head = rest[place:]
        following = self._window()
        try:
            file = open_forward(following)
        except (RuntimeError, TypeError, OSError):
            return source, None  # it only looked like one
        if file.samplerate != rate:
            file.close()
            raise AudioError(f"{self.name} goes on at {file.samplerate} Hz after {rate} Hz; give its parts one by one")
        return following, file

    def _wrong(self, source: Any) -> Exception | None:
        """What went wrong with the pipe, if anything."""
        return source.error if isinstance(source, Window) else self.error

    def _window(self) -> Window:
        length = None
        if self.form is MP3:  # it compares, and complains on standard error
            wanted, _ = mp3_length(self.head)
            self.head += read_bytes(self.more, min(wanted, WINDOW) - len(self.head))
            _, length = mp3_length(self.head)
        return Window(self.head, self.more, length or LENGTH)

    def _pipe(self) -> int:
        reading, writing = os.pipe()

        def pump() -> None:
            with suppress(OSError), open(writing, "wb", buffering=0) as file:
                data = self.head
                try:
                    while data:
                        file.write(data)
                        data = self.more(4096)
                except AudioError as error:
                    self.error = error

        threading.Thread(target=pump, daemon=True).start()
        return reading


def find_ffmpeg() -> str | None:
    """The program ffmpeg, or that of the package imageio-ffmpeg; None if there is neither."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


class Ffmpeg:
    """A file or pipe decoded by ffmpeg.

    Attributes:
        rate: samples per second.

    Args:
        source: path, or the bytes that a pipe began with.
        more: the rest of that pipe.

    Raises:
        AudioError: ffmpeg is not there, or cannot decode it.
    """

    def __init__(self, source: str | Path | bytes, more: Reader | None, name: str, form: Format | None):
        program = find_ffmpeg()
        if program is None:
            what = "is of a format that libsndfile does not know" if form is None else f"is {form.name}"
            raise AudioError(
                f"{name} {what}; reading it needs ffmpeg (apt-get install ffmpeg, or pip install 'echostream[formats]')"
            )
        piped = isinstance(source, bytes)
        where = "pipe:0" if piped else b"file:" + os.fsencode(os.path.abspath(source))
        self.name, self.said, self.given = name, b"", 0
        self.process = subprocess.Popen(
            [program, "-nostdin", "-hide_banner", "-v", "error", "-threads", "1",
             "-protocol_whitelist", "pipe" if piped else "file", "-format_whitelist", FFMPEG_FORMATS, "-i", where,
             "-map", "0:a:0", "-vn", "-sn", "-dn", "-map_metadata", "-1", "-f", "wav", "-c:a", "pcm_f32le", "pipe:1"],
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C ends the source, not ffmpeg
        )  # fmt: skip
        heard, said = cast(io.BufferedReader, self.process.stdout), cast(io.BufferedReader, self.process.stderr)
        self.listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self.listener.start()
        if piped:
            threading.Thread(target=self._feed, args=(self.process.stdin, source, more), daemon=True).start()
        try:
            mark = read_bytes(heard.read1, 4)
            if mark != b"RIFF":
                raise AudioError(f"{name} cannot be read as audio: {self._reason()}")
            self.stream: PcmStream = wav_stream(heard.read1, mark, name)
        except BaseException:
            self.close()
            raise
        self.rate = self.stream.rate

    def blocks(self) -> Iterator[np.ndarray]:
        done = 0
        for samples in self.stream.blocks():
            done += len(samples)
            yield samples
        if self.process.wait() > 0:
            raise AudioError(f"{self.name} cannot be read beyond {done / self.rate:.1f} s: {self._reason()}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError, ValueError):
                    pipe.close()

    def _reason(self) -> str:
        self.process.wait()
        self.listener.join(timeout=5)
        lines = [line for line in self.said.decode("utf-8", "replace").split("\n") if line.strip()]
        # The first line tells what is wrong, those behind it what followed from that.
        return (lines or ["ffmpeg says nothing"])[0].split("] ")[-1].strip()

    def _listen(self, pipe: io.BufferedReader) -> None:
        while data := pipe.read1(4096):
            if len(self.said) < 4096:
                self.said += data
        pipe.close()

    @staticmethod
    def _feed(pipe: io.BufferedWriter, head: bytes, more: Reader) -> None:
        with suppress(OSError, ValueError):
            data = head
            while data:
                pipe.write(data)
                pipe.flush()
                data = more(4096)
        with suppress(OSError, ValueError):
            pipe.close()
