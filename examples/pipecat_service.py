#!/usr/bin/env python3
"""EchoStream in a Pipecat pipeline: speech comes in, text and speech of the translation go on.

pip install 'echostream[client]' pipecat-ai
echostream serve &
python examples/pipecat_service.py talk.wav -o english.wav      # a recording, as fast as it was spoken

``EchoStreamService`` is what a pipeline of one's own takes, between a transport's input and its output. Made with
Pipecat 1.4; a session of the server survives broken connections, and what it pushes is never taken back.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
import soundfile
from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
    StartFrame,
    TranslationFrame,
    TTSAudioRawFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.ai_service import AIService
from pipecat.services.settings import ServiceSettings
from pipecat.utils.time import time_now_iso8601
from pipecat.workers.runner import WorkerRunner

from echostream.client import Client, sound_of


class EchoStreamService(AIService):
    """``InputAudioRawFrame`` in; ``TranslationFrame`` (a few letters or words, spaces included) and
    ``TTSAudioRawFrame`` (mono int16 at the pipeline's output rate) out. The sound that came in does not go on.

    Args:
        url: of ``echostream serve``, ``ws://host:port``.
        options: of the stream: ``policy``, its knobs, ``speech``; and of ``echostream.client.Client``: ``token``.
    """

    def __init__(self, url: str = "ws://127.0.0.1:8765", **options: object):
        super().__init__(settings=ServiceSettings(model="echostream"))
        self.url, self.options = url, options

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        self.out_rate = frame.audio_out_sample_rate
        self.client = Client(
            self.url, frame.audio_in_sample_rate, output_rate=self.out_rate, transcript=False, **self.options
        )
        await self.client.__aenter__()
        self.listener = self.create_task(self.listen(), "listen")

    async def stop(self, frame: EndFrame) -> None:
        await self.client.finish()  # what was heard is translated before the pipeline ends
        await self.listener
        await self.client.__aexit__(None, None, None)
        await super().stop(frame)

    async def cancel(self, frame: CancelFrame) -> None:
        await self.cancel_task(self.listener)
        await self.client.__aexit__(None, None, None)
        await super().cancel(frame)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)  # calls start, stop, cancel
        if isinstance(frame, InputAudioRawFrame):
            samples = np.frombuffer(frame.audio, "<i2").reshape(-1, frame.num_channels)
            await self.client.send(samples.mean(axis=1).astype(np.int16))
        else:
            await self.push_frame(frame, direction)

    async def listen(self) -> None:
        async for event in self.client:
            if event["type"] == "session.output_transcript.delta":
                await self.push_frame(TranslationFrame(event["delta"], "", time_now_iso8601()))
            elif event["type"] == "session.output_audio.delta":
                pcm = (np.clip(sound_of(event), -1, 1) * 32767).astype("<i2")
                await self.push_frame(TTSAudioRawFrame(pcm.tobytes(), self.out_rate, 1))


class Listener(FrameProcessor):
    """The end of the example's pipeline: shows the text, keeps the speech."""

    def __init__(self) -> None:
        super().__init__()
        self.speech = bytearray()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, TranslationFrame):
            print(frame.text, end="", flush=True)
        elif isinstance(frame, TTSAudioRawFrame):
            self.speech += frame.audio
        await self.push_frame(frame, direction)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording")
    parser.add_argument("-o", "--output", default="english.wav")
    parser.add_argument("--url", default="ws://127.0.0.1:8765")
    args = parser.parse_args()
    samples, rate = soundfile.read(args.recording, dtype="int16", always_2d=True)
    listener = Listener()
    params = PipelineParams(audio_in_sample_rate=rate, audio_out_sample_rate=24_000)
    worker = PipelineWorker(Pipeline([EchoStreamService(args.url), listener]), params=params)

    async def speak() -> None:
        size = rate // 50  # 20 ms, as transports give it
        for at in range(0, len(samples), size):
            part = samples[at : at + size]
            await worker.queue_frame(InputAudioRawFrame(part.tobytes(), rate, part.shape[1]))
            await asyncio.sleep(0.02)
        await worker.queue_frame(EndFrame())

    await asyncio.gather(WorkerRunner().run(worker), speak())
    print()
    soundfile.write(args.output, np.frombuffer(bytes(listener.speech), "<i2"), 24_000)


if __name__ == "__main__":
    asyncio.run(main())
