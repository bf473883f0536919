#!/usr/bin/env python3
"""Load a server of this machine with clients in real time, and tell how late it answers.

    python scripts/load_test.py --clients 5 10 20 --seconds 60             # starts a server of its own for each count
    python scripts/load_test.py --clients 20 --text-only
    python scripts/load_test.py --clients 16 --flood 200 --abuse           # with those that behave badly beside them
    python scripts/load_test.py --clients 4 --server ws://127.0.0.1:8765 --server-pid 1234

Every client plays recordings one after the other with pauses between them, from a different one on, arrives at random
in the first seconds, speaks OpenAI's dialect and sends 100 ms at a time when they have been spoken. An event says how
much sound it follows; its delay is the time from sending the last of that sound to the event's arrival. More than a
second is late. A client whose text differs from that of a session alone counts as wrong (``--no-check``: it is not
compared).

It talks to 127.0.0.1 or ::1 only, and stops by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from echostream.audio.io import read_audio
from echostream.audio.resample import Resampler
from echostream.audio.stream import to_pcm
from echostream.errors import ConfigError, ServerError, require
from echostream.evaluation.table import markdown
from echostream.files import run_command, write_json

RATE, PIECE_MS = 24_000, 100
PIECE = RATE * PIECE_MS // 1000
LATE_S = 1.0
DEMO = Path(__file__).resolve().parents[1] / "echostream" / "assets" / "demo"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Result:
    """What one client saw."""

    text: str = ""
    delays: list[float] = field(default_factory=list)  # of events while sound was sent, in seconds
    end_s: float = 0.0  # from session.close to session.closed
    speech_s: float = 0.0
    dropped: str = ""  # why it ended early


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4], metavar="N", help="at once; one run for each")
    parser.add_argument("--seconds", type=float, default=30.0, help="of sound each of them sends (default: 30)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two recordings (default: 1)")
    parser.add_argument("--arrive", type=float, default=5.0, help="seconds within which they come (default: 5)")
    parser.add_argument("--recordings", type=Path, nargs="+", metavar="FILE", help="default: the demo's")
    parser.add_argument("--server", metavar="URL", help="one that runs already; default: a server of its own")
    parser.add_argument("--server-pid", type=int, metavar="N", help="its process, for memory and CPU")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="of the own server")
    parser.add_argument("--threads", type=int, default=1, help="of the own server (default: 1)")
    parser.add_argument("--text-only", action="store_true", help="the own server gives no speech")
    parser.add_argument("--flood", type=int, default=0, metavar="N", help="so many clients at once in mid-run")
    parser.add_argument("--abuse", action="store_true", help="one that does not read, one with garbage, one too fast")
    parser.add_argument("--no-check", action="store_true", help="do not compare texts with those of a session alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


class Server:
    """A server to be loaded: its own process, or one that runs already."""

    def __init__(self, args: argparse.Namespace, places: int):
        self.process: subprocess.Popen | None = None
        self.pid = args.server_pid
        if args.server is not None:
            self.url = args.server.rstrip("/")
        else:
            command = [sys.executable, "-m", "echostream", "serve", "--port", "0", "--sessions", str(places)]
            command += ["--threads", str(args.threads)]
            command += ["--checkpoint-dir", str(args.checkpoint_dir)] if args.checkpoint_dir else []
            command += ["--no-speech"] if args.text_only else []
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.pid = self.process.pid
            line = self.process.stdout.readline()  # type: ignore[union-attr]
            found = re.search(r"http(s?://\S+?)/", line)
            if found is None:
                raise ServerError("the server does not start; try: echostream serve --port 0")
            self.url = "ws" + found.group(1)
        host = urlsplit(self.url).hostname
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(f"--server {self.url} is not on this machine; a load test loads 127.0.0.1 only")

    def memory(self) -> float:
        """Resident MB; 0 if the process is not known."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]
        except (OSError, AttributeError):
            return 0.0

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / TICKS
        except (OSError, IndexError):
            return 0.0

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()


def playlists(args: argparse.Namespace) -> list[np.ndarray]:
    """What clients say, int16 [N] at 24 kHz: the recordings in turn with pauses, from each of them on."""
    paths = args.recordings or sorted(DEMO.glob("*.ogg"))
    sounds = []
    for path in paths:
        samples, rate = read_audio(path)
        sounds.append(np.frombuffer(to_pcm(Resampler(rate, RATE).resample(samples)), dtype="<i2"))
    pause, count = np.zeros(round(args.pause * RATE), np.int16), round(args.seconds * RATE)
    lists = []
    for first in range(min(4, len(sounds))):
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < count:
            parts += [sounds[(first + len(parts) // 2) % len(sounds)], pause]
        lists.append(np.concatenate(parts)[:count])
    return lists


def texts_alone(args: argparse.Namespace, lists: list[np.ndarray]) -> list[str]:
    """What a session alone writes for each."""
    from echostream.checkpoint import load_bundle
    from echostream.serve.command import model_directory
    from echostream.streaming import SentenceEnd, StreamingSession

    named = argparse.Namespace(checkpoint_dir=args.checkpoint_dir, backend=None, device="cpu")
    bundle = load_bundle(model_directory(named), threads=args.threads)
    texts = []
    for samples in lists:
        session = StreamingSession(bundle, speech=False)
        events = session.push(samples, RATE) + session.finish()
        texts.append(" ".join(event.text for event in events if isinstance(event, SentenceEnd) and event.text))
    return texts


def append(samples: np.ndarray) -> str:
    audio = base64.b64encode(samples.tobytes()).decode()
    return json.dumps({"type": "session.input_audio_buffer.append", "audio": audio})


async def client(url: str, messages: list[str], delay: float) -> Result:
    """One client in real time."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    result, sent = Result(), [0.0] * (len(messages) + 1)
    await asyncio.sleep(delay)
    try:
        async with connect(f"{url}/v1/realtime/translations?model=any", max_size=None, compression=None) as socket:

            async def speak() -> None:
                began = time.monotonic()
                for i, message in enumerate(messages):
                    await asyncio.sleep(max(0.0, began + (i + 1) * PIECE_MS / 1000 - time.monotonic()))
                    sent[i + 1] = time.monotonic()
                    await socket.send(message)
                sent[0] = time.monotonic()  # of the end
                await socket.send('{"type": "session.close"}')

            speaker = asyncio.create_task(speak())
            async for text in socket:
                now, event = time.monotonic(), json.loads(text)
                kind = event["type"]
                if kind == "session.closed":
                    result.end_s = now - sent[0]
                    break
                if kind == "error":
                    raise ServerError(event["error"]["message"])
                if "elapsed_ms" in event and not sent[0]:
                    piece = min(-(-event["elapsed_ms"] // PIECE_MS), len(messages))
                    result.delays.append(now - sent[piece])
                if kind == "session.output_transcript.delta":
                    result.text += event["delta"]
                elif kind == "session.output_audio.delta":
                    result.speech_s += len(event["delta"]) * 3 / 8 / RATE
            else:
                raise ServerError("the connection was closed")
            await speaker
    except (OSError, WebSocketException, ServerError, TimeoutError) as error:
        result.dropped = str(error).splitlines()[0] if str(error) else type(error).__name__
    return result


async def flood(url: str, count: int, delay: float) -> dict[str, int]:
    """Clients that all come at once; how they were answered."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidStatus

    await asyncio.sleep(delay)
    answers: dict[str, int] = {}

    async def one() -> None:
        try:
            async with connect(f"{url}/v1/realtime/translations", compression=None) as socket:
                answer = "let in"
                await socket.recv()
        except InvalidStatus as error:
            answer = f"{error.response.status_code} Retry-After {error.response.headers.get('Retry-After')}"
        except (OSError, TimeoutError) as error:
            answer = type(error).__name__
        answers[answer] = answers.get(answer, 0) + 1

    await asyncio.gather(*(one() for _ in range(count)))
    return answers


async def abuse(url: str, messages: list[str], delay: float, seconds: float) -> None:
    """One client that never reads, one that sends garbage, one that sends everything at once, for so many seconds."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    await asyncio.sleep(delay)

    async def send(texts: list[str], read: bool, pause: float) -> None:
        try:
            queue = None if read else 1
            async with connect(f"{url}/v1/realtime/translations", max_queue=queue, compression=None) as socket:
                for text in texts:
                    await socket.send(text)
                    await asyncio.sleep(pause)
        except (OSError, WebSocketException, TimeoutError):
            pass

    fast, slow = messages * 20, PIECE_MS / 1000
    kinds = (send(messages, False, slow), send(["garbage"] * 1000, True, 0.0), send(fast, True, 0.0))
    tasks = [asyncio.create_task(kind) for kind in kinds]
    _, running = await asyncio.wait(tasks, timeout=seconds)
    for task in running:
        task.cancel()


async def load(args: argparse.Namespace, server: Server, count: int, lists: list[np.ndarray], texts: list[str]) -> dict:
    """A run with so many clients."""
    chance = random.Random(args.seed)
    coded = [[append(samples[i : i + PIECE]) for i in range(0, len(samples), PIECE)] for samples in lists]
    chosen = [i % len(lists) for i in range(count)]
    tasks = [asyncio.create_task(client(server.url, coded[i], chance.uniform(0, args.arrive))) for i in chosen]
    middle = args.arrive + args.seconds / 3
    others = [asyncio.create_task(flood(server.url, args.flood, middle))] if args.flood else []
    if args.abuse:
        others.append(asyncio.create_task(abuse(server.url, coded[0], args.arrive, args.seconds)))  # type: ignore[arg-type]
    began, cpu, own = time.monotonic(), server.cpu(), time.process_time()
    memory: list[tuple[float, float]] = []
    while not all(task.done() for task in tasks):
        memory.append((time.monotonic() - began, server.memory()))
        await asyncio.wait(tasks, timeout=1)
        if time.monotonic() - began > args.arrive + 3 * args.seconds + 60:
            for task in tasks:
                task.cancel()
    seconds = time.monotonic() - began
    results = [task.result() if not task.cancelled() else Result(dropped="hangs") for task in tasks]
    cpu, own = server.cpu() - cpu, time.process_time() - own
    for other in others:
        other.cancel() if not other.done() else None
    await asyncio.gather(*others, return_exceptions=True)
    delays = np.array([delay for result in results for delay in result.delays] or [float("nan")])
    sound = count * args.seconds
    minute = [m for t, m in memory if t <= 60] or [0.0]
    running = [m for t, m in memory if t <= args.seconds] or [0.0]
    found = {
        "clients": count, "sound_s": sound, "events": len(delays), "late": int((delays > LATE_S).sum()),
        **{f"p{q}_ms": round(float(np.percentile(delays, q)) * 1000, 1) for q in (50, 95, 99)},
        "max_ms": round(float(delays.max()) * 1000, 1),
        "dropped": sorted(result.dropped for result in results if result.dropped),
        "wrong": sum(bool(texts) and r.text != texts[i] and not r.dropped for r, i in zip(results, chosen)),
        "speech_s": round(sum(result.speech_s for result in results), 1),
        "end_p95_ms": round(float(np.percentile([result.end_s for result in results], 95)) * 1000),
        "memory_mb": round(max((m for _, m in memory), default=0.0), 1),
        "growth_mb": round(running[-1] - minute[-1], 1), "memory_mb_each_30_s": [round(m) for _, m in memory[::30]],
        "server_cpu": round(cpu / seconds, 3), "client_cpu": round(own / seconds, 3),
        "cpu_ms_per_s": round(1000 * cpu / sound, 1), "load_average": os.getloadavg()[0],
    }  # fmt: skip
    if args.flood:
        found["flood"] = others[0].result()
    return found


def show(runs: list[dict]) -> str:
    """The runs as a table."""
    rows = [
        [
            str(run["clients"]), *(f"{run[f'p{q}_ms']:.0f}" for q in (50, 95, 99)), str(run["late"]),
            str(len(run["dropped"])), str(run["wrong"]), f"{run['memory_mb']:.0f}", f"{run['growth_mb']:+.0f}",
            f"{run['server_cpu']:.2f}", f"{run['client_cpu']:.2f}", f"{run['cpu_ms_per_s']:.0f}",
        ]
        for run in runs
    ]  # fmt: skip
    head = ["clients", "p50", "p95", "p99 ms", "late", "dropped", "wrong text", "MB", "MB after 1st min", "server CPU",
            "clients' CPU", "CPU ms per s of sound"]  # fmt: skip
    return markdown(head, rows)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server goes, too
    require("websockets", "client")
    lists = playlists(args)
    texts = [] if args.no_check else texts_alone(args, lists)
    runs = []
    for count in args.clients:
        server = Server(args, count + (3 if args.abuse else 0))
        try:
            runs.append(asyncio.run(load(args, server, count, lists, texts)))
        finally:
            server.stop()
        print(json.dumps(runs[-1]), flush=True)
    print(show(runs))
    if args.json is not None:
        write_json(args.json, runs)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
