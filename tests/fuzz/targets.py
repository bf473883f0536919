"""What is done with a damaged input: what a user would do with a good one, up to translated speech.

A target is a function of a random source and a scratch directory. It may raise ``EchoStreamError``; ``Wrong`` says that
nothing was raised where something is not as it should be.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from echostream.errors import EchoStreamError
from tests.fuzz import mutate
from tests.fuzz.material import Material, noise


class Wrong(AssertionError):
    """No error came, and the outcome is wrong."""


EXPORT_S = 20.0  # of computing: what tracing the small model takes, damaged or not


class Targets:
    """One worker's targets, by kind, with what they share.

    Attributes:
        allowed_s: seconds of computing that the last case may take besides, for work that does not depend on its input.
    """

    def __init__(self, material: Material) -> None:
        from echostream.checkpoint import load_bundle

        self.material = material
        self.bundles = {path: load_bundle(path) for path in (material.bundle, *material.exports)}
        self.kinds: dict[str, Callable[[random.Random, Path], None]] = {
            "recording": self.recording, "bundle": self.bundle, "export": self.export, "archive": self.archive,
            "schedule": self.schedule, "batch": self.batch, "corpus": self.corpus,
        }  # fmt: skip

    def run(self, kind: str, number: int, scratch: Path) -> None:
        """One case; the same kind and number are the same case."""
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.allowed_s = 0.0
        self.kinds[kind](random.Random(f"{kind} {number}"), scratch)

    # ---- recordings --------------------------------------------------------------------------------------------

    def recording(self, rng: random.Random, scratch: Path) -> None:
        """A damaged recording as file and as pipe, heard by a session."""
        from echostream.audio.stream import open_file, open_pipe

        suffix = rng.choice(sorted(self.material.recordings))
        data = mutate.bytes_of(self.material.recordings[suffix], rng)
        if suffix.startswith("wav") and rng.random() < 0.4:
            data = self._header(self.material.recordings[suffix], rng)
        if rng.random() < 0.5:
            path = scratch / f"talk.{rng.choice((suffix, 'wav', 'mp3', 'raw', 'ogg'))}"
            path.write_bytes(data)
            source = open_file(str(path))
        else:
            source = open_pipe(io.BytesIO(data), 16_000, 1)
        session = self._session(rng)
        try:
            heard = 0.0
            for samples in source.blocks:
                session.push(samples, source.rate)
                heard = session.source_time_s
                if heard > 20:
                    break
            session.finish()
        finally:
            source.close()

    @staticmethod
    def _header(data: bytes, rng: random.Random) -> bytes:
        """A number of a WAV header replaced: format, channels, rate, bytes a second, block, bits, sizes."""
        at, size = rng.choice(((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2), (40, 4)))
        number = rng.choice((0, 1, 2, 3, 7, 8, 16, 24, 255, 8000, 44_100, 95_971, 767_999, 0x7FFFEFFC, 0xFFFFFFFF))
        return data[:at] + (number % 256**size).to_bytes(size, "little") + data[at + size :]

    # ---- directories -------------------------------------------------------------------------------------------

    def bundle(self, rng: random.Random, scratch: Path) -> None:
        """A checkpoint directory with one damaged file, loaded, translated with, and sometimes exported."""
        from echostream.export.directory import export_directory

        directory = self._damaged(self.material.bundle, rng, scratch)
        self._use(directory, rng)
        if rng.random() < 0.1:
            self.allowed_s = EXPORT_S
            export_directory(directory, scratch / "exported")

    def export(self, rng: random.Random, scratch: Path) -> None:
        """The same of an exported directory."""
        self._use(self._damaged(rng.choice(self.material.exports), rng, scratch), rng)

    def _use(self, directory: Path, rng: random.Random) -> None:
        from echostream.checkpoint import load_bundle
        from echostream.streaming import StreamingSession

        bundle = load_bundle(directory)
        session = StreamingSession(bundle, beam=rng.choice((None, 2)))
        events = session.push(noise(1.2, rng.randrange(3))) + session.finish()
        for event in events:
            if hasattr(event, "samples") and not np.isfinite(event.samples).all():
                raise Wrong("the speech holds NaN")

    def _damaged(self, good: Path, rng: random.Random, scratch: Path) -> Path:
        directory = scratch / "es-en"
        shutil.copytree(good, directory)
        for _ in range(rng.choice((1, 1, 1, 2))):
            self._damage(directory, rng)
        if rng.random() < 0.6 and any((directory / f"config.{suffix}").is_file() for suffix in ("yaml", "json")):
            self._sign(directory)
        return directory

    def _damage(self, directory: Path, rng: random.Random) -> None:
        # Never a link: what is damaged through it would be a file of somebody else.
        files = [file for file in sorted(directory.rglob("*")) if file.is_file() and not file.is_symlink()]
        path = rng.choice([file for file in files if not file.name.endswith(".md")])
        what = rng.random()
        if what < 0.05:
            path.unlink()
        elif what < 0.08:
            outside = directory.parent / "outside"
            path.rename(outside)
            path.symlink_to(rng.choice((str(outside), path.name, "/", "nowhere", files[0].name)))
        elif what < 0.1:
            path.unlink()
            path.mkdir()
        elif what < 0.14:
            shutil.copyfile(rng.choice([file for file in files if file != path]), path)
        elif what < 0.4 or not self._rewrite(path, rng):
            path.write_bytes(mutate.bytes_of(path.read_bytes(), rng))

    def _rewrite(self, path: Path, rng: random.Random) -> bool:
        """Damage that the format survives; False where there is none for this kind of file."""
        text = {".yaml": yaml.safe_load, ".json": json.loads}
        try:
            if path.suffix in text:
                values = mutate.tree(text[path.suffix](path.read_text(encoding="utf-8")), rng)
                if path.suffix == ".yaml":
                    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
                else:
                    path.write_text(json.dumps(values), encoding="utf-8")
            elif path.suffix in (".txt", ".tsv"):
                path.write_text(mutate.lines(path.read_text(encoding="utf-8"), rng), encoding="utf-8")
            elif path.suffix == ".npz":
                self._arrays(path, rng)
            elif path.suffix == ".pt":
                self._weights(path, rng)
            else:
                return False
        except Exception:  # whatever a reader of theirs says: the file is damaged already, or cannot be written so
            return False
        return True

    @staticmethod
    def _arrays(path: Path, rng: random.Random) -> None:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if not arrays:
            return
        name = rng.choice(sorted(arrays))
        what = rng.randrange(8)
        if what == 0:
            del arrays[name]
        elif what == 1:
            arrays[f"{name}x"] = arrays.pop(name)
        else:
            arrays[name] = mutate.array(arrays[name], rng)
        (np.savez_compressed if rng.random() < 0.2 else np.savez)(path, **arrays)
        if rng.random() < 0.1:  # a header that promises more than there is
            with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("bomb.npy", bytes(50_000_000))

    @staticmethod
    def _weights(path: Path, rng: random.Random) -> None:
        import torch

        content = torch.load(path, weights_only=True)
        state = content.get("model") or content.get("generator")
        name = rng.choice(sorted(state))
        tensor, what = state[name], rng.randrange(10)
        if what == 0:
            tensor.reshape(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf")))
        elif what == 1:
            state[name] = torch.zeros(1).expand(rng.choice((10, 10**6, 10**9)), rng.choice((1, 10**3)))
        elif what == 2:
            state[name] = tensor.new_zeros(rng.choice(((), (0,), (3, 3), (*tensor.shape, 1))))
        elif what == 3:
            del state[name]
        elif what == 4:
            state[rng.choice(("other", "", 7, f"{name}.weight"))] = state.pop(name)
        elif what == 5:
            state[name] = rng.choice((None, "text", [1.0], 3, {}))
        elif what == 6:
            state[name] = rng.choice((tensor.to_sparse(), tensor.to(torch.complex64), tensor.bool(), tensor.int()))
        elif what == 7:
            content[rng.choice(("format", "model", "generator"))] = rng.choice((None, 7, "x", [], {}))
        elif what == 8:
            content = rng.choice(([], {}, 7, "x", state, tensor))
        else:
            state[name] = tensor.float() * 1e4
        torch.save(content, path)

    @staticmethod
    def _sign(directory: Path) -> None:
        """Let the configuration name the files as they are now, as whoever makes a hostile directory would."""
        from echostream.checkpoint.layout import GRAPHS, config_path, sha256
        from echostream.tensor_file import WEIGHTS

        try:
            path = config_path(directory)
            if path.is_symlink():
                return
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            for name in values["digests"]:
                values["digests"][name] = sha256(directory / name)
            model = [directory / WEIGHTS, *(directory / "onnx" / f"{name}.onnx" for name in GRAPHS)]
            if "digest" in values:
                values["digest"] = sha256(*(file for file in model if file.exists()))
            # JSON is YAML, too
            path.write_text(json.dumps(values, indent=2), encoding="utf-8")
        except (OSError, TypeError, KeyError, AttributeError, ValueError, yaml.YAMLError):
            pass  # too damaged to be signed

    # ---- saved sessions ----------------------------------------------------------------------------------------

    def archive(self, rng: random.Random, scratch: Path) -> None:
        """A damaged saved session, gone on from; refused, it must leave the session usable."""
        from echostream.streaming import StreamingSession

        saved = rng.choice(self.material.saved)
        bundle = self.bundles[self.material.bundle if saved.name.startswith("torch") else self.material.exports[0]]
        path = scratch / "saved.npz"
        if rng.random() < 0.3:
            path.write_bytes(mutate.bytes_of(saved.read_bytes(), rng))
        else:
            shutil.copyfile(saved, path)
            for _ in range(rng.choice((1, 1, 2))):
                with suppress(Exception):  # what is damaged already cannot always be damaged more
                    (self._arrays if rng.random() < 0.5 else self._saved_header)(path, rng)
        session = StreamingSession(bundle)
        try:
            session.restore(path)
        except EchoStreamError:
            session.push(noise(0.5))
            session.finish()
            raise
        if session.finished:
            return
        session.push(noise(1.0, 5), rng.choice((16_000, 16_000, 8_000)))
        session.finish()

    @staticmethod
    def _saved_header(path: Path, rng: random.Random) -> None:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if "header" not in arrays:
            return
        values = json.loads(arrays["header"].tobytes())
        fixed = {key: values.pop(key) for key in ("format", "model", "policy", "segmenter", "settings")}
        text = json.dumps({**fixed, **mutate.tree(values, rng)})
        arrays["header"] = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        np.savez(path, **arrays)

    # ---- schedules ---------------------------------------------------------------------------------------------

    def _session(self, rng: random.Random, **options: Any) -> Any:
        from echostream.streaming import StreamingSession

        bundle = self.bundles[rng.choice((self.material.bundle, *self.material.exports))]
        return StreamingSession(bundle, **options)

    def schedule(self, rng: random.Random, scratch: Path) -> None:
        """Calls of one session in any order with any arguments."""
        policy = rng.choice((None, "ctc", "wait-k", "local-agreement", "alignatt", "sentence"))
        session = self._session(rng, policy=policy, segmenter=rng.choice((None, "none", "punctuation")))
        typed, saved = 0, scratch / "saved.npz"
        for _ in range(rng.randrange(1, 12)):
            call: Callable[[], object] = rng.choice((
                lambda: session.push(*_push(rng)), lambda: session.push(*_push(rng)), lambda: session.push(*_push(rng)),
                session.finish, session.reset, lambda: session.save(saved), lambda: session.restore(saved),
            ))  # fmt: skip
            try:
                call()
            except EchoStreamError:
                typed += 1
        session.reset()
        session.push(noise(0.7))
        session.finish()
        if typed:
            raise EchoStreamError(f"{typed} calls were refused")

    def batch(self, rng: random.Random, scratch: Path) -> None:
        """The same of a batch: streams join, leave and end in any order."""
        from echostream.streaming import SessionBatch

        batch = SessionBatch(self.bundles[rng.choice((self.material.bundle, *self.material.exports))], capacity=3)
        numbers, typed = [0], 0
        for _ in range(rng.randrange(1, 12)):
            some = [rng.choice(numbers) for _ in range(rng.randrange(3))]
            call: Callable[[], object] = rng.choice((
                lambda: numbers.append(batch.join()), lambda: batch.leave(rng.choice(numbers)),
                lambda: batch.finish(*some), lambda: batch.push({n: _push(rng)[0] for n in some}),
                lambda: batch.push({n: noise(0.4) for n in some}, rng.choice((16_000, 8_000, 44_100))),
            ))  # fmt: skip
            try:
                call()
            except EchoStreamError:
                typed += 1
        if typed:
            raise EchoStreamError(f"{typed} calls were refused")

    # ---- corpora -----------------------------------------------------------------------------------------------

    def corpus(self, rng: random.Random, scratch: Path) -> None:
        """A corpus directory with one damaged file: configuration, subwords, manifest, k-means."""
        from echostream.data.config import DataConfig
        from echostream.data.manifest import read_manifest, read_text_pairs
        from echostream.data.source import load_features
        from echostream.units.kmeans import load_kmeans

        data = scratch / "data"
        shutil.copytree(self.material.data, data, ignore=shutil.ignore_patterns("*.vocab"))
        np.save(data / "u0.npy", np.zeros((9, 80), np.float32))
        self._damage(data, rng)
        config = DataConfig.load(data)
        for part in (config.source, config.target):
            part.decode(part.encode("Hola, amigo."))
        config.check_units()
        config.cmvn.apply(np.zeros((3, 80), np.float32))
        read_text_pairs(data / "train.tsv")
        for row in read_manifest(data / "train.tsv"):
            if os.path.isabs(row.audio):
                raise Wrong(f"the manifest leads to {row.audio}")
        load_kmeans(data / "kmeans.npz").units(np.zeros((4, 5), np.float32))
        load_features(data, "u0.npy")


def _push(rng: random.Random) -> tuple[Any, ...]:
    """Arguments of a push: mostly sound of odd lengths, at times what nobody should push."""
    size = rng.choice((0, 1, 2, 159, 160, 161, 5119, 5120, 5121, 16_000, rng.randrange(30_000)))
    samples: Any = noise(size / 16_000 + 0.001, rng.randrange(4))[:size]
    what = rng.randrange(14)
    if what == 0 and size:
        samples[rng.randrange(size)] = rng.choice((np.nan, np.inf, 1e15, 3e38, -1e20))
    elif what == 1:
        samples = (samples * 32767).astype(rng.choice(("i2", "i4", "u1", "f8", "f2", "c8", "?")))
    elif what == 2:
        samples = rng.choice((None, [], [0.0, 0.1], [[0.1], [0.1, 0.2]], "sound", b"sound", 7, samples[:, None], {}))
    elif what == 3:
        samples = rng.choice((samples.astype(">f4"), samples[::-1], samples[::2], samples.tolist(), samples * 1e4))
    if rng.random() < 0.2:
        return samples, rng.choice((8_000, 44_100, 48_000, 11_025, 0, -1, 999, 1_000, 768_000, 16_000.5, None, "16000"))
    return (samples,)
