"""``echostream serve`` on loopback: both protocols by their own clients, admission, abuse, and nothing lost."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
websockets = pytest.importorskip("websockets")

import httpx  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from echostream.audio.stream import to_pcm  # noqa: E402
from echostream.checkpoint import load_bundle  # noqa: E402
from echostream.cli import build_parser  # noqa: E402
from echostream.client import Client, Translation, sound_of, translate  # noqa: E402
from echostream.errors import ConfigError, ServerError  # noqa: E402
from echostream.serve.app import Access, Server  # noqa: E402
from echostream.serve.command import listen, serve  # noqa: E402
from echostream.serve.limits import Limits  # noqa: E402
from echostream.serve.rows import Rows  # noqa: E402
from echostream.streaming import SentenceEnd, StreamingSession, TargetText, Waveform  # noqa: E402
from tests.live_server import LiveServer, serving  # noqa: E402
from tests.test_streaming import speech  # noqa: E402

FAST = Limits(sessions=4, speed=1000.0, resume_s=20.0)
SECONDS = 2.5


@dataclass
class Expected:
    """What a session alone makes of a recording."""

    text: str
    samples: np.ndarray


def alone(bundle: Any, samples: np.ndarray, rate: int = 16_000, **options: Any) -> Expected:
    session = StreamingSession(bundle, **options)
    events = session.push(samples, rate) + session.finish()
    sentences = [event.text for event in events if isinstance(event, SentenceEnd)]
    sound = [event.samples for event in events if isinstance(event, Waveform)]
    return Expected(" ".join(sentences), np.concatenate([np.zeros(0, np.float32), *sound]))


def heard(samples: np.ndarray) -> np.ndarray:
    """What is left of a recording after 16 bits."""
    return np.frombuffer(to_pcm(samples), dtype="<i2")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Any:
    return load_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    return [heard(speech(SECONDS, seed=seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def expected(bundle: Any, recordings: list[np.ndarray]) -> list[Expected]:
    found = [alone(bundle, samples) for samples in recordings]
    assert all(len(e.text) > 20 and len(e.samples) > 16_000 for e in found)
    return found


@pytest.fixture(scope="module")
def live(bundle: Any) -> Iterator[LiveServer]:
    with serving(bundle, FAST) as server:
        yield server


def run(live: LiveServer, samples: np.ndarray, rate: int = 16_000, **options: Any) -> Any:
    async def work() -> Any:
        async with Client(live.ws, rate, output_rate=16_000, **options) as client:
            return await translate(client, samples)

    return asyncio.run(work())


def events_of(socket: Any, until: str) -> list[dict[str, Any]]:
    """What a raw WebSocket gets up to an event of this type."""
    found: list[dict[str, Any]] = []
    while not found or found[-1].get("type") != until:
        found.append(json.loads(socket.recv(timeout=20)))
    return found


def append(samples: np.ndarray) -> str:
    audio = base64.b64encode(samples.tobytes()).decode()
    return json.dumps({"type": "session.input_audio_buffer.append", "audio": audio})


def idle_again(live: LiveServer) -> None:
    """Until no session is left."""
    deadline = time.monotonic() + 10
    while live.server.hub.sessions and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not live.server.hub.sessions and live.server.hub.taken == 0


# Protocols.


def test_the_openai_package_completes_a_session(live, bundle):
    openai = pytest.importorskip("openai")
    pcm = heard(speech(1.5, 24_000))
    client = openai.OpenAI(api_key="any", base_url=f"{live.http}/v1")
    events = []
    with client.realtime.translations.connect(model="gpt-realtime-translate") as connection:
        connection.session.update(
            session={"audio": {"input": {"transcription": {"model": "any"}}, "output": {"language": "en"}}}
        )
        for i in range(0, len(pcm), 4800):
            audio = base64.b64encode(pcm[i : i + 4800].tobytes()).decode()
            connection.session.input_audio_buffer.append(audio=audio)
        connection.session.close()
        for event in connection:
            events.append(event)
            if event.type == "session.closed":
                break
    kinds = [event.type for event in events]
    assert kinds[:2] == ["session.created", "session.updated"] and kinds[-1] == "session.closed"
    assert set(kinds[2:-1]) == {
        "session.input_transcript.delta", "session.output_transcript.delta", "session.output_audio.delta",
    }  # fmt: skip
    assert len({event.event_id for event in events}) == len(events)
    session = StreamingSession(bundle)
    translated = [e for e in session.push(pcm, 24_000) + session.finish() if isinstance(e, SentenceEnd)]
    assert "".join(e.delta for e in events if "output_transcript" in e.type) == " ".join(e.text for e in translated)
    spoken = "".join(e.delta for e in events if "input_transcript" in e.type)
    assert spoken.split() == " ".join(e.source_text for e in translated).split()
    sounds = [e for e in events if "audio" in e.type]
    assert all((e.sample_rate, e.channels, e.format) == (24_000, 1, "pcm16") and e.elapsed_ms > 0 for e in sounds)
    got = sum(len(base64.b64decode(e.delta)) for e in sounds) // 2
    assert abs(got - sum(len(e.waveform) for e in translated) * 1.5) <= len(translated)
    assert not any(hasattr(e, "sequence") or e.type.startswith("echostream") for e in events)


def test_what_the_model_cannot_do_is_an_error_and_the_session_goes_on(live):
    cases = [
        ({"audio": {"output": {"language": "fr"}}}, "unsupported_language", "session.audio.output.language"),
        ({"audio": {"input": {"noise_reduction": {"type": "near_field"}}}}, "unsupported_parameter",
         "session.audio.input.noise_reduction"),
        ({"voice": "alloy"}, "unknown_parameter", "session.voice"),
        ({"echostream": {}}, "unknown_parameter", "session.echostream"),
        ("english", "invalid_value", "session"),
    ]  # fmt: skip
    with connect(f"{live.ws}/v1/realtime/translations?model=x") as socket:
        for i, (asked, code, param) in enumerate(cases):
            socket.send(json.dumps({"type": "session.update", "event_id": f"mine{i}", "session": asked}))
            error = events_of(socket, "error")[-1]["error"]
            assert (error["code"], error["param"], error["event_id"]) == (code, param, f"mine{i}")
            assert error["type"] == "invalid_request_error"
        sound = '{"type": "session.input_audio_buffer.append", "audio": "%s"}'
        for text in ("{", "[]", sound % "?", sound % "AAAA", '{"type": "response.create"}'):
            socket.send(text)
            assert events_of(socket, "error")[-1]["error"]["type"] == "invalid_request_error"
        socket.send(json.dumps({"type": "session.update", "session": {"audio": {"output": {"language": "en-US"}}}}))
        assert events_of(socket, "session.updated")[-1]["session"]["audio"]["output"]["language"] == "en"
        socket.send(json.dumps({"type": "session.close"}))
        events_of(socket, "session.closed")
        with pytest.raises(websockets.exceptions.ConnectionClosedOK):
            socket.recv(timeout=10)
    idle_again(live)


def test_simulstream_messages(live, bundle, recordings, expected):
    with connect(f"{live.ws}/") as socket:
        for samples in recordings[:2]:  # one recording after the other on one connection
            header = {"sample_rate": 16_000, "source_lang": "es", "target_lang": "en"}
            socket.send(json.dumps({**header, "metrics_metadata": {"wav_name": "x"}}))
            for i in range(0, len(samples), 1600):
                socket.send(samples[i : i + 1600].tobytes())
            socket.send(json.dumps({"end_of_stream": True}))
            found = []
            while not found or "end_of_processing" not in found[-1]:
                found.append(json.loads(socket.recv(timeout=20)))
            assert all(message["deleted"] == "" for message in found[:-1])
            text = alone(bundle, samples, speech=False).text
            assert "".join(message["new"] for message in found[:-1]) == text
    with connect(f"{live.ws}/simulstream") as socket:
        socket.send(json.dumps({"target_lang": "it"}))
        assert "'it'" in json.loads(socket.recv(timeout=10))["error"]
        with pytest.raises(websockets.exceptions.ConnectionClosedError):
            socket.recv(timeout=10)
    idle_again(live)


def test_the_simulstream_client(live, tmp_path):
    module = pytest.importorskip("simulstream.client.wav_reader_client")
    from echostream.audio.io import write_audio

    write_audio(tmp_path / "a.wav", speech(1.0), 16_000)
    asyncio.run(module.stream_wav_files(f"{live.ws}/", [str(tmp_path / "a.wav")], tgt_lang="en", src_lang="es"))
    idle_again(live)


def test_every_client_gets_what_a_session_alone_gives(live, recordings, expected):
    async def one(samples: np.ndarray) -> Any:
        async with Client(live.ws, 16_000, output_rate=16_000) as client:
            return await translate(client, samples)

    async def work() -> list[Any]:
        return await asyncio.gather(*(one(samples) for samples in recordings))

    for found, wanted in zip(asyncio.run(work()), expected):
        assert found.text == wanted.text
        assert len(found.samples) == len(wanted.samples)
        assert np.abs(found.samples - wanted.samples).max() < 1e-3
        numbers = [event["sequence"] for event in found.events if "sequence" in event]
        assert numbers == sorted(set(numbers))
        sentences = [event for event in found.events if event["type"] == "echostream.sentence"]
        assert " ".join(event["text"] for event in sentences) == found.text
        assert all(event["lag"]["first_text_ms"] is not None for event in sentences if event["text"])
    idle_again(live)


def test_streams_of_one_batch_may_differ(live, bundle, recordings):
    samples = heard(speech(1.5, 44_100))
    found = run(live, samples, 44_100, policy="wait-k", wait_k=1)
    assert found.text == alone(bundle, samples, 44_100, policy="wait-k", wait_k=1).text
    found = run(live, recordings[0], speech=False)
    assert found.text == alone(bundle, recordings[0], speech=False).text and not len(found.samples)
    for options in ({"policy": "guess"}, {"wait_k": 3}, {"beam": 5}, {"policy": "wait-k", "wait_k": 0}):
        with pytest.raises(ServerError) as refused:
            run(live, recordings[0], **options)
        assert refused.value.status == 400
    idle_again(live)


# Admission and abuse.


def test_a_full_server_refuses_before_the_upgrade(bundle, recordings, expected):
    with serving(bundle, Limits(sessions=1, speed=1000.0)) as live:
        with connect(f"{live.ws}/v1/realtime/translations") as first:
            for path in ("/v1/realtime/translations", "/simulstream"):
                with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                    connect(f"{live.ws}{path}")
                assert refused.value.response.status_code == 503
                assert int(refused.value.response.headers["Retry-After"]) > 0
            with pytest.raises(ServerError, match="all 1 places are taken"):
                run(live, recordings[0])
            assert "echostream_sessions_refused_total 3.0" in httpx.get(f"{live.http}/metrics").text
            first.send('{"type": "session.close"}')
            events_of(first, "session.closed")
        idle_again(live)
        assert run(live, recordings[0]).text == expected[0].text


def test_sessions_of_one_address(bundle):
    with serving(bundle, Limits(sessions=4, client_sessions=1)) as live:
        with connect(f"{live.ws}/v1/realtime/translations"):
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                connect(f"{live.ws}/v1/realtime/translations")
            assert refused.value.response.status_code == 429


def test_strangers_stay_outside(bundle):
    access = Access("secret", frozenset({"https://friend.example"}))
    with serving(bundle, FAST, access) as live:
        url = f"{live.ws}/v1/realtime/translations"
        good = {"Authorization": "Bearer secret"}

        def status(headers: dict[str, str], **options: Any) -> int:
            try:
                with connect(url, additional_headers=headers, **options):
                    return 101
            except websockets.exceptions.InvalidStatus as refused:
                return refused.response.status_code

        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            assert status(headers) == 401
        assert status(good) == status({}, subprotocols=["realtime", "openai-insecure-api-key.secret"]) == 101
        assert status(good, origin="https://evil.example") == 403
        assert status(good, origin="https://friend.example") == status(good, origin=live.http) == 101
        assert httpx.get(f"{live.http}/metrics").status_code == 401
        assert httpx.get(f"{live.http}/metrics", headers=good).status_code == 200
        assert httpx.get(f"{live.http}/healthz").status_code == httpx.get(f"{live.http}/readyz").status_code == 200


def test_garbage_is_cut_off_and_touches_nobody(live, recordings, expected):
    with connect(f"{live.ws}/v1/realtime/translations") as socket:
        for _ in range(FAST.garbage):
            socket.send("garbage")
        with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
            while True:
                socket.recv(timeout=10)
        assert closed.value.rcvd.code == 1008
    with connect(f"{live.ws}/v1/realtime/translations") as socket:
        socket.recv(timeout=10)
        with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
            socket.send("x" * (FAST.message_bytes + 1))
            socket.recv(timeout=10)
        assert closed.value.rcvd.code == 1009
    raw = socket_to(live)
    raw.sendall(b"\x00\xff" * 500)
    raw.close()
    assert run(live, recordings[0]).text == expected[0].text
    idle_again(live)


def socket_to(live: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=10)


def test_a_fast_sender_is_held_back(bundle, recordings, expected):
    """0.5 s at once and then four times real time: 2.5 s of sound take at least half a second, and none is lost."""
    with serving(bundle, Limits(sessions=2, speed=4.0, burst_s=0.5)) as live:
        began = time.monotonic()
        assert run(live, recordings[0]).text == expected[0].text
        assert time.monotonic() - began > (SECONDS - 0.5) / 4 - 0.06


def test_silence_on_the_line_ends_a_session(bundle):
    with serving(bundle, Limits(sessions=1, idle_s=0.2)) as live:
        with connect(f"{live.ws}/v1/realtime/translations") as socket:
            assert events_of(socket, "error")[-1]["error"]["code"] == "idle_timeout"
        idle_again(live)


def test_who_does_not_read_is_cut_off(bundle, recordings, expected):
    with serving(bundle, Limits(sessions=2, speed=1000.0, unsent_bytes=30_000)) as live:
        raw = socket_to(live)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        key = base64.b64encode(b"0123456789abcdef").decode()
        raw.sendall(
            f"GET /v1/realtime/translations HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        assert raw.recv(12) == b"HTTP/1.1 101"
        sound = append(recordings[0][:8000]).encode()
        frame = b"\x81\xfe" + len(sound).to_bytes(2, "big") + b"\0\0\0\0" + sound  # text, masked with zeros
        raw.settimeout(0.2)
        cut = lambda: "echostream_connections_cut_total 1.0" in live.server.metrics.page().decode()  # noqa: E731
        for _ in range(200):
            if cut():
                break
            try:
                raw.sendall(frame)
            except OSError:
                pass
        assert cut()
        assert run(live, recordings[0]).text == expected[0].text
        raw.close()
        idle_again(live)


def test_health_metrics_and_pages(live):
    run(live, heard(speech(0.7)))
    page = httpx.get(f"{live.http}/metrics").text
    for name in ("sessions", "places 4.0", "chunk_seconds{quantile=\"0.95\"}", "queue_seconds", "real_time_factor",
                 "decision_seconds_bucket", "audio_seconds_total", "lag_seconds"):  # fmt: skip
        assert f"echostream_{name}" in page
    config = httpx.get(f"{live.http}/config.json").json()
    assert (config["source_language"], config["target_language"], config["chunk_ms"]) == ("es", "en", 320)
    assert httpx.get(f"{live.http}/nothing").status_code == 404


# Nothing lost.


async def broken(client: Client, samples: np.ndarray, at: list[int], end: bool = True) -> Translation:
    """Translate with the connection broken after these samples; without ``end``, as far as it goes by itself."""
    found = Translation()

    async def listen() -> None:
        async for event in client:
            found.take(event)

    listener = asyncio.create_task(listen())
    for i in range(0, len(samples), 1600):
        await client.send(samples[i : i + 1600])
        if i in at:
            await asyncio.sleep(0.15)
            before = client.reconnects
            await client.break_connection()
            while client.reconnects == before:
                await asyncio.sleep(0.005)
    if end:
        await client.finish()
    else:
        await asyncio.sleep(0.3)
        listener.cancel()
    await asyncio.wait({listener})
    return found


def same(found: Any, wanted: Expected) -> None:
    assert found.text == wanted.text
    assert len(found.samples) == len(wanted.samples) and np.abs(found.samples - wanted.samples).max(initial=0) < 1e-3
    numbers = [event["sequence"] for event in found.events if "sequence" in event]
    assert numbers == sorted(set(numbers))


def test_a_broken_connection_loses_and_repeats_nothing(live, recordings, expected):
    async def work() -> tuple[Any, Client]:
        async with Client(live.ws, 16_000, output_rate=16_000) as client:
            return await broken(client, recordings[0], [8000, 16_000, 27_200]), client

    found, client = asyncio.run(work())
    assert client.reconnects == 3
    same(found, expected[0])
    idle_again(live)


def test_an_unknown_session_is_none(live):
    for name in ("sess_" + "0" * 32, "../../etc/passwd", ""):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            connect(f"{live.ws}/v1/realtime/translations?echostream=1&session={name}&samples=0&last_event=-1")
        assert refused.value.response.status_code == 404
        assert "/" not in json.loads(refused.value.response.body)["error"]["message"]


def test_a_client_that_stays_away_loses_its_place(bundle):
    with serving(bundle, Limits(sessions=1, resume_s=0.0)) as live:
        with connect(f"{live.ws}/v1/realtime/translations?echostream=1") as socket:
            socket.socket.shutdown(2)
        idle_again(live)


def test_sigterm_moves_sessions_to_the_next_process(bundle, recordings, expected, tmp_path):
    """The first server is asked to stop in the middle of a sentence; the second has only the directory."""
    servers = [LiveServer(Server(bundle, FAST, state_dir=tmp_path)) for _ in range(2)]
    address = [servers[0].ws]

    async def work() -> tuple[Any, Client]:
        async with Client(lambda: address[0], 16_000, output_rate=16_000) as client:
            task = asyncio.create_task(broken(client, recordings[1], []))
            while client.last_event < 4:
                await asyncio.sleep(0.005)
            address[0] = servers[1].ws
            await asyncio.get_running_loop().run_in_executor(None, servers[0].terminate)
            return await task, client

    try:
        found, _client = asyncio.run(work())
        same(found, expected[1])
        idle_again(servers[1])
        deadline = time.monotonic() + 5
        while list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not list(tmp_path.iterdir()), "a session that is over leaves nothing behind"
    finally:
        for server in servers:
            server.stop()


def test_draining_lets_other_clients_end(bundle):
    with serving(bundle, Limits(sessions=2, drain_s=20.0)) as live:
        with connect(f"{live.ws}/v1/realtime/translations") as socket:
            events_of(socket, "session.created")
            live.uvicorn.handle_exit(15, None)
            deadline = time.monotonic() + 5
            while not live.server.hub.draining and time.monotonic() < deadline:
                time.sleep(0.005)
            assert httpx.get(f"{live.http}/readyz").status_code == 503
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                connect(f"{live.ws}/v1/realtime/translations")
            assert refused.value.response.status_code == 503
            assert live.thread.is_alive()
            socket.send('{"type": "session.close"}')
            events_of(socket, "session.closed")
        live.thread.join(15)
        assert not live.thread.is_alive()


# The pieces.


def test_rows_are_archived_one_by_one(bundle, recordings, expected, tmp_path):
    rows = Rows(bundle, 2)
    first, second = rows.join(), rows.join({"speech": False})
    text: dict[int, str] = {first: "", second: ""}

    def take(events: dict[int, list[Any]]) -> None:
        for number, found in events.items():
            text[number] += "".join(event.text for event in found if isinstance(event, TargetText))

    take(rows.push({first: recordings[0][:20_000], second: recordings[1][:20_000]}))
    rows.snapshot(first)(tmp_path / "row.npz")
    rows.leave(first)
    third = rows.restore(tmp_path / "row.npz")
    text[third] = text[first]
    take(rows.push({third: recordings[0][20_000:], second: recordings[1][20_000:]}))
    take(rows.finish(third, second))
    assert text[third].split() and text[third].replace(" ", "") == expected[0].text.replace(" ", "")
    assert text[second].replace(" ", "") == alone(bundle, recordings[1], speech=False).text.replace(" ", "")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--threads", "0"], "--threads is 0"),
        (["--tls-cert", "x.pem"], "belong together"),
        (["--sessions", "0"], "sessions is 0"),
        (["--port", "99999"], "--port 99999"),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], "none.pem does not exist"),
    ],
)
def test_flags_are_checked_before_anything_is_loaded(flags, message, tmp_path):
    args = build_parser().parse_args(["serve", "--checkpoint-dir", str(tmp_path), *flags])
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        serve(args)


def test_a_taken_port_is_one_line():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_sound_of_decodes(live):
    assert sound_of({"delta": base64.b64encode(np.array([16384], "<i2").tobytes()).decode()}).tolist() == [0.5]


class Process:
    """``echostream serve`` as a process of its own."""

    def __init__(self, bundle: Path, *flags: str):
        command = [sys.executable, "-m", "echostream", "serve", "--port", "0", "--checkpoint-dir", str(bundle), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def url(self) -> str:
        """Its address, once it is ready."""
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        assert line, self.process.stderr.read()  # type: ignore[union-attr]
        return "ws" + line.partition("on http")[2].split("/ ")[0].strip().rstrip("/")

    def kill(self, number: int = signal.SIGKILL) -> str:
        """End it; returns what it logged."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=30)[1]


def test_kill_9_under_load_loses_and_repeats_nothing(tiny_bundle, bundle, tmp_path):
    """Two processes share a directory; one is killed with two streams in it, which go on in the other."""
    samples = [heard(speech(7.0, seed=seed)) for seed in (5, 6)]
    flags = ("--state-dir", str(tmp_path / "state"), "--speed", "1000", "--sessions", "2", "--no-speech")
    first, second = Process(tiny_bundle, *flags), Process(tiny_bundle, *flags)
    try:
        address = [first.url()]
        other = second.url()

        async def work() -> list[tuple[Any, Client]]:
            async with (
                Client(lambda: address[0], 16_000) as one,
                Client(lambda: address[0], 16_000) as two,
            ):
                clients = [one, two]
                tasks = [asyncio.create_task(broken(c, s[:80_000], [], end=False)) for c, s in zip(clients, samples)]
                found = [await task for task in tasks]
                while not all(client._base for client in clients):  # both have been archived once
                    await asyncio.sleep(0.01)
                address[0] = other
                first.kill()
                for client, part in zip(clients, samples):
                    await client.send(part[80_000:])
                    await client.finish()
                for translation, client in zip(found, clients):
                    async for event in client:
                        translation.take(event)
                return list(zip(found, clients))

        for (found, client), part in zip(asyncio.run(work()), samples):
            wanted = alone(bundle, part, speech=False)
            same(found, wanted)
            assert client.reconnects == 1 and found.text.count(" ") > 5
        said = second.kill(signal.SIGTERM)
        assert second.process.returncode == 0
        assert "resumed" in said and not any(word in said for word in ("Traceback", found.text[:12]))
    finally:
        for process in (first, second):
            if process.process.poll() is None:
                process.kill()
