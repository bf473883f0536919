#!/usr/bin/env python3
"""Speak into a terminal's microphone, hear and read the translation: echostream.client with sounddevice.

pip install 'echostream[client]' sounddevice
echostream serve &
python examples/microphone.py ws://127.0.0.1:8765      # Ctrl-C ends the sentence and the session
"""

from __future__ import annotations

import asyncio
import queue
import sys

import numpy as np
import sounddevice

from echostream.client import Client, sound_of

RATE = 48_000


async def main(url: str) -> None:
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[np.ndarray] = asyncio.Queue()
    spoken: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    rest = np.zeros(0, np.float32)

    def listen(samples: np.ndarray, *_: object) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, samples[:, 0].copy())

    def speak(out: np.ndarray, *_: object) -> None:
        nonlocal rest
        while len(rest) < len(out) and not spoken.empty():
            rest = np.concatenate([rest, spoken.get()])
        now, rest = rest[: len(out)], rest[len(out) :]
        out[: len(now), 0], out[len(now) :] = now, 0

    async with Client(url, RATE, output_rate=RATE, transcript=False) as client:

        async def send() -> None:
            while True:
                await client.send(await heard.get())

        sender = asyncio.create_task(send())
        with (
            sounddevice.InputStream(RATE, channels=1, dtype="int16", blocksize=RATE // 10, callback=listen),
            sounddevice.OutputStream(RATE, channels=1, dtype="float32", callback=speak),
        ):
            loop.add_signal_handler(2, lambda: (sender.cancel(), asyncio.ensure_future(client.finish())))
            async for event in client:
                if event["type"] == "session.output_transcript.delta":
                    print(event["delta"], end="", flush=True)
                elif event["type"] == "session.output_audio.delta":
                    spoken.put(sound_of(event))
                elif event["type"] == "echostream.sentence":
                    print()
            while not spoken.empty():
                await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8765"))
