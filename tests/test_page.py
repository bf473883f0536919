"""The page of ``echostream serve`` in a real browser, with a microphone that hears a demo recording.

Needs Debian's chromium and chromium-driver (``.ci/run`` installs both). ECHOSTREAM_SCREENSHOTS names a folder to keep
pictures of the page in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("starlette")
pytest.importorskip("selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs a browser: apt-get install chromium chromium-driver"
)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

from echostream.audio.io import read_audio, write_audio  # noqa: E402
from echostream.audio.resample import Resampler  # noqa: E402
from echostream.checkpoint import DEFAULT_BUNDLE, load_bundle  # noqa: E402
from echostream.serve.limits import Limits  # noqa: E402
from tests.live_server import LiveServer, serving  # noqa: E402

DEMO = DEFAULT_BUNDLE.parent / "demo" / "01.ogg"
SILENCE_S = 1.0
WAIT_S = 90.0  # on a machine that is busy with other things


@pytest.fixture(scope="module")
def bundle() -> Any:
    return load_bundle(threads=1)


@pytest.fixture(scope="module")
def live(bundle: Any) -> Iterator[LiveServer]:
    with serving(bundle, Limits(sessions=2)) as server:
        yield server


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo sentence between silences at 48 kHz, as the browser's microphone wants it."""
    samples, rate = read_audio(DEMO)
    samples = Resampler(rate, 48_000).resample(samples)
    silence = np.zeros(round(SILENCE_S * 48_000), np.float32)
    path = tmp_path_factory.mktemp("page") / "said.wav"
    write_audio(path, np.concatenate([silence, samples, silence, silence]), 48_000)
    return path


@pytest.fixture
def browser(recording: Path, tmp_path: Path) -> Iterator[Any]:
    with chromium(recording, tmp_path) as driver:
        yield driver


@contextmanager
def chromium(recording: Path, downloads: Path, *flags: str) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1000,900",
        "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={recording}%noloop", "--autoplay-policy=no-user-gesture-required",
        "--disable-background-networking", "--no-first-run", *flags,
    ):  # fmt: skip
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def until(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := true()):
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S:g} s"
        time.sleep(0.1)
    return found


def picture(browser: Any, name: str) -> None:
    if folder := os.environ.get("ECHOSTREAM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def text(browser: Any, name: str) -> str:
    return browser.find_element(By.ID, name).text


def lines(browser: Any, name: str) -> list[str]:
    """Sentences, without their times."""
    return browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} p`)].map("
        "p => [...p.querySelectorAll('span')].map(span => span.textContent).join(''))",
        name,
    )


def no_errors(browser: Any) -> None:
    """Nothing was refused by the page's own content policy, nothing failed to load, no script broke."""
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in severe if "favicon" not in message]


def test_a_microphone_is_translated_played_and_saved(live, browser, tmp_path):
    browser.get(live.http)
    until(lambda: "es → en" in text(browser, "pair"), "the page's languages")
    browser.find_element(By.ID, "start").click()
    until(lambda: len(text(browser, "targetText").split()) > 4, "a translation")
    played = lambda: int(browser.find_element(By.ID, "drop").get_attribute("data-played") or 0)  # noqa: E731
    until(lambda: played() > 8000, "sound")
    picture(browser, "page-live")
    # A dropped connection is taken up again, and nobody notices.
    (session,) = live.server.hub.sessions.values()
    live.uvicorn.loop.call_soon_threadsafe(session.connection.abort)
    until(lambda: session.connection is not None and not session.connection.aborted, "the way back")
    browser.find_element(By.ID, "stop").click()
    until(lambda: browser.find_element(By.ID, "start").is_enabled(), "the end")
    source, target = (" ".join(lines(browser, name)).split() for name in ("sourceText", "targetText"))
    assert len(source) > 3 and len(target) > 3  # which words, depends on when the browser began to hear
    assert text(browser, "lagMean") != "–" and text(browser, "firstSound") != "–" and text(browser, "hint") == ""
    for name in ("saveWav", "saveSrt", "savePng"):
        browser.find_element(By.ID, name).click()
    names = ("translation.wav", "translation.srt", "timeline.png")
    until(lambda: all((tmp_path / name).is_file() and (tmp_path / name).stat().st_size for name in names), "files")
    samples, rate = read_audio(tmp_path / "translation.wav")
    assert len(samples) > rate and np.abs(samples).max() > 0.05
    subtitles = (tmp_path / "translation.srt").read_text(encoding="utf-8")
    assert subtitles.startswith("1\n00:00:") and " --> " in subtitles
    said = [line for line in subtitles.splitlines() if line and "-->" not in line and not line.isdigit()]
    assert " ".join(said).split() == target
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    picture(browser, "page-done")
    no_errors(browser)


def test_a_recording_on_a_phone(live, browser, recording):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    browser.get(live.http)
    until(lambda: "es → en" in text(browser, "pair"), "the page's languages")
    browser.find_element(By.CSS_SELECTOR, "details summary").click()
    policy = browser.find_element(By.ID, "policy")
    assert policy.get_attribute("value") == live.server.described["policy"] == "alignatt"
    browser.execute_script("latency.value = 20; latency.oninput()")
    assert text(browser, "latencyValue") == "800 ms"
    browser.execute_script("play.checked = false; source.value = 'file'")
    browser.find_element(By.ID, "file").send_keys(str(recording))
    browser.find_element(By.ID, "start").click()
    until(lambda: text(browser, "targetText"), "a translation")
    (session,) = live.server.hub.sessions.values()
    assert session.options == {"alignatt_frames": 20, "speech": False}
    until(lambda: browser.find_element(By.ID, "start").is_enabled(), "the end")
    assert "sister" in text(browser, "targetText").lower()
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 375, "nothing reaches beyond a phone's edge"
    picture(browser, "page-phone")
    no_errors(browser)


def test_the_sound_of_a_tab(live, recording, tmp_path):
    """One tab plays a recording, the page in another listens to it by ``getDisplayMedia``."""
    (tmp_path / "talk.html").write_text(
        f"<title>The talk</title><audio id=talk controls loop src='{recording.as_uri()}'></audio>", encoding="utf-8"
    )
    with chromium(recording, tmp_path, "--auto-select-tab-capture-source-by-title=The talk") as browser:
        browser.get((tmp_path / "talk.html").as_uri())
        browser.execute_script("talk.play()")
        browser.switch_to.new_window("tab")
        browser.get(live.http)
        until(lambda: "es → en" in text(browser, "pair"), "the page's languages")
        # The microphone's stand-in must not be what is heard.
        browser.execute_script("navigator.mediaDevices.getUserMedia = null; source.value = 'tab'")
        browser.find_element(By.ID, "start").click()
        until(lambda: len(text(browser, "targetText").split()) > 4 or text(browser, "hint"), "a translation")
        assert len(text(browser, "targetText").split()) > 4, text(browser, "hint")
        browser.find_element(By.ID, "stop").click()
        until(lambda: browser.find_element(By.ID, "start").is_enabled(), "the end")
        no_errors(browser)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """uvicorn's options for HTTPS with a certificate that nobody trusts."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs a certificate: apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=talk.test", "-addext", "subjectAltName=DNS:talk.test"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return {"ssl_certfile": cert, "ssl_keyfile": key}


ELSEWHERE = "--host-resolver-rules=MAP talk.test 127.0.0.1"  # a name that is not localhost


def test_a_microphone_elsewhere_by_https(bundle, certificate, recording, tmp_path):
    """A secure page off localhost: sound goes by wss, and the microphone is there."""
    with (
        serving(bundle, Limits(sessions=1), tls=certificate) as secure,
        chromium(recording, tmp_path, ELSEWHERE, "--ignore-certificate-errors") as browser,
    ):
        browser.get(f"https://talk.test:{secure.port}/")
        until(lambda: "es → en" in text(browser, "pair"), "the page's languages")
        assert not browser.find_element(By.ID, "secure").is_displayed()
        browser.find_element(By.ID, "start").click()
        until(lambda: len(text(browser, "targetText").split()) > 4, "a translation")
        assert len(secure.server.hub.sessions) == 1
        no_errors(browser)


def test_a_recording_elsewhere_by_http(live, recording, tmp_path):
    """Browsers give such a page no microphone, and no worklet that plays: it says so, and plays all the same."""
    with chromium(recording, tmp_path, ELSEWHERE) as browser:
        browser.get(f"http://talk.test:{live.port}/")
        until(lambda: "es → en" in text(browser, "pair"), "the page's languages")
        assert "--tls-cert" in text(browser, "secure")
        assert browser.execute_script("return source.value") == "file"
        browser.find_element(By.ID, "file").send_keys(str(recording))
        browser.find_element(By.ID, "start").click()
        until(lambda: text(browser, "hint") or text(browser, "targetText"), "a translation")
        played = lambda: int(browser.find_element(By.ID, "drop").get_attribute("data-played") or 0)  # noqa: E731
        until(lambda: text(browser, "hint") or played() > 8000, "sound")
        until(lambda: browser.find_element(By.ID, "start").is_enabled(), "the end")
        assert "sister" in text(browser, "targetText").lower() and not text(browser, "hint")
        no_errors(browser)
