"""Two replicas of the server on Ray Serve, one killed under load. Needs the extra ``ray``; skipped without it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

from echostream.checkpoint import load_bundle  # noqa: E402
from echostream.client import Client, Translation  # noqa: E402
from echostream.errors import ConfigError  # noqa: E402
from echostream.serve.ray import app  # noqa: E402
from tests.test_serve import alone, heard, same  # noqa: E402
from tests.test_streaming import speech  # noqa: E402


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="unknown argument 'session'"):
        app({"session": "3"})
    with pytest.raises(ConfigError, match="sessions=many"):
        app({"sessions": "many"})


def arguments(bundle: Path, state: Path, replicas: int) -> dict[str, str]:
    said = {"checkpoint_dir": str(bundle), "state_dir": str(state), "policy": "ctc"}
    return {**said, "sessions": "4", "replicas": str(replicas)}


@pytest.fixture
def port(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "300"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("echostream.serve.ray.DRAIN_S", 3.0)  # so long Serve waits for streams to end by themselves
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": number}, logging_config={"enable_access_log": False})
        serve.run(app(arguments(tiny_bundle, tmp_path / "state", 2)))
        yield number
    finally:
        serve.shutdown()
        ray.shutdown()


async def half_and_half(port: int, part: Any, ready: asyncio.Event, go_on: asyncio.Event) -> tuple[Translation, Client]:
    """A client that says the first 4.5 s, waits until it is told that something has happened, and says the rest."""
    found = Translation()
    async with Client(f"ws://127.0.0.1:{port}", 16_000, speech=False) as client:

        async def listen() -> None:
            async for event in client:
                found.take(event)

        listener = asyncio.create_task(listen())
        await client.send(part[:72_000])
        while not client._base:  # a sentence is in the archive
            await asyncio.sleep(0.02)
        ready.set()
        await go_on.wait()
        await client.send(part[72_000:])
        await client.finish()
        await listener
        return found, client


def owners(folder: Path) -> set[int]:
    """The processes of the streams in the archive."""
    return {int(json.loads(path.read_text())["owner"].split("-")[0]) for path in folder.glob("*.json")}


def test_clients_of_a_killed_replica_go_on_in_the_other(port, tiny_bundle, tmp_path):
    bundle = load_bundle(tiny_bundle, threads=1)
    samples = [heard(speech(6.0, seed=seed)) for seed in (5, 6)]

    async def work() -> list[tuple[Translation, Client]]:
        archived, go_on = [asyncio.Event() for _ in samples], asyncio.Event()
        tasks = [asyncio.create_task(half_and_half(port, part, event, go_on)) for part, event in zip(samples, archived)]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in archived)), 120)
        os.kill(min(owners(tmp_path / "state")), signal.SIGKILL)
        go_on.set()
        return await asyncio.gather(*tasks)

    results = asyncio.run(work())
    for (found, _), part in zip(results, samples):
        same(found, alone(bundle, part, speech=False))
    assert sum(client.reconnects for _, client in results) >= 1


def test_clients_of_replicas_that_are_taken_down_go_on_in_what_is_left(port, tiny_bundle, tmp_path):
    """From two replicas to one, which Serve begins anew: streams that do not end by themselves move by the archive."""
    bundle = load_bundle(tiny_bundle, threads=1)
    samples = [heard(speech(6.0, seed=seed)) for seed in (5, 6, 7)]

    async def work() -> list[tuple[Translation, Client]]:
        archived, go_on = [asyncio.Event() for _ in samples], asyncio.Event()
        tasks = []
        for part, event in zip(samples, archived):  # one after the other, so that Ray sees where there is room
            tasks.append(asyncio.create_task(half_and_half(port, part, event, go_on)))
            await asyncio.wait_for(event.wait(), 120)
        before = owners(tmp_path / "state")
        assert len(before) == 2, "both replicas have streams"
        await asyncio.to_thread(serve.run, app(arguments(tiny_bundle, tmp_path / "state", 1)))
        assert not any(Path(f"/proc/{process}").exists() for process in before)
        go_on.set()
        results = await asyncio.gather(*tasks)
        (last,) = serve.status().applications["default"].deployments.values()
        assert sum(last.replica_states.values()) == 1
        return results

    results = asyncio.run(work())
    for (found, client), part in zip(results, samples):
        same(found, alone(bundle, part, speech=False))
        assert client.reconnects >= 1
