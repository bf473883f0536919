"""Every Python snippet and every command of the README and the pages in docs/, run in their order, in one directory.

Small stand-ins take the place of long work: a corpus of 64 pairs spoken by tones, an untrained model of 0.1M
parameters, a recogniser that hears one word. What trains or measures for minutes is parsed by its own parser and goes
no further (``PARSED``). A command that nothing here knows how to run fails the test: a new line in the README needs its
line here.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

pytest.importorskip("torch")
pytest.importorskip("simuleval")

from echostream.commands import PROGRAMS
from tests.test_catalogues import write_mo
from tests.test_corpus import Tones, Whistler, pairs, tone
from tests.test_streamspeech import write_streamspeech
from tests.test_whisper_init import write_tiny_whisper
from tests.training_data import NUM_UNITS

ROOT = Path(__file__).resolve().parents[1]
NAVIGATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", *(f"docs/{n}" for n in NAVIGATION))}
# Later pages need what earlier ones make: corpora first.
ORDER = sorted(PAGES, key=lambda name: name not in ("docs/training.md", "docs/evaluation.md"))
BLOCKS = [
    block for name in ORDER for block in re.findall(r"^```(\w*)\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL)
]
SNIPPETS = list(dict.fromkeys(text for language, text in BLOCKS if language == "python"))
EVERY_COMMAND = [
    shlex.join(words) if "|" not in words else line
    for language, text in BLOCKS
    if language != "python"
    for line in text.replace("\\\n", " ").split("\n")
    if (words := shlex.split(line, comments=True))
]
COMMANDS = list(dict.fromkeys(line.partition(" #")[0].strip() for line in EVERY_COMMAND))  # each once

# Options of small stand-ins: what is put behind a command, or replaced in it.
BEHIND = {
    "echostream prepare all .*--pairs": "--train-pairs 24 --dev-pairs 4 --features mfcc --num-units 20 --positions 0",
    "echostream prepare all .*--cvss": "--features mfcc --num-units 20 --positions 0",
    "echostream prepare respeak ": "--features mfcc --num-units 20 --positions 0",
    "echostream prepare text .*--train-only": "--vocab-size 40",
    "import-streamspeech": f"--num-units {NUM_UNITS}",
    "echostream train ": "--dry-run",
    "echostream ablate ": "--dry-run",
    "echostream unit-report ": "--limit 4",
    "echostream evaluate resynthesis ": "--limit 2",
    "echostream evaluate simul ": "--limit 1",
    "echostream evaluate (sweep|longform) ": "--checkpoint-dir bundles/es-en",
    "echostream evaluate sweep .*--output runs/sweep": "--grid lagging_k1=1 wait_k=2 agreement_n=2 alignatt_frames=12",
    "echostream evaluate cascade ": "--limit 2",
    "echostream evaluate rerun ": "--limit 2",
    "echostream evaluate report ": "--samples 20",
}
INSTEAD = [
    (r"--vocab-size \d+", "--vocab-size 40"),
    (r"--source-vocab-size \d+", "--source-vocab-size 40"),
    (r"--whisper base --vocab-size \d+", "--whisper base --vocab-size 300"),
    (r"--output data/es-en --cvss", "--output data/cvss --cvss"),  # not over the corpus of the command before
    (r"^(echostream translate (?!.*--checkpoint-dir).*)", r"\1 --checkpoint-dir bundles/es-en"),
    (r"/usr/share/locale( /usr/share/games)?", "locale"),
    (r"--kmeans \S+", ""),
    (r"--test-size \d+", "--test-size 8"),
    (r"--limit 200", "--limit 2"),
    (r"--chunk-ms 320 960", "--chunk-ms 320"),
    (r"--executor ray --ray-address auto", "--executor local --limit 2"),
    (r"--minutes 60", "--updates 2"),  # minutes are measured by training, even in a dry run
    (r"--count 10 --minutes 5", "--count 1 --sentences 2"),
]
PARSED = ("benchmark", "load-test", "train-vocoder")


def test_every_page_stands_in_the_navigation() -> None:
    assert sorted(NAVIGATION) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(name: str) -> None:
    """To files of the project, and to headings of their pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, heading = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_modules_that_pages_name_are_there(name: str) -> None:
    """``core.py`` stands for any file of that name."""
    folders = ("echostream", "agent", "scripts", "tests", "examples")
    files = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for module in re.findall(r"`([\w/]+\.py)`", (ROOT / name).read_text(encoding="utf-8")):
        assert any(path.endswith(f"/{module}") for path in files), module


def test_case_08_the_pages_have_snippets_and_commands() -> None:
    assert len(SNIPPETS) >= 2 and len(COMMANDS) >= 30
    assert not [command for command in COMMANDS if "…" in command]


class Ear:
    """A recogniser that hears one word."""

    name = "Ear"

    def __init__(self, *arguments: object) -> None:
        pass

    def transcribe(self, samples: np.ndarray) -> str:
        return "one"

    transcribe_file = transcribe


@pytest.fixture(scope="module")
def sandbox(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with everything that the README's commands name, as the current one."""
    from echostream.commands import evaluations as evaluate
    from echostream.data.corpus import tts
    from echostream.evaluation import asr

    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "agent", "configs", "echostream", "Makefile", "setup.py"):
        (folder / name).symlink_to(ROOT / name)
    sound = tone(1.2)
    soundfile.write(folder / "talk.wav", sound, 16000)
    soundfile.write(folder / "talk.mp3", sound, 16000, format="MP3")
    (folder / "units.txt").write_text("1 2 3\n4 5\n")
    (folder / "voices").mkdir()
    table = "es\ten\n" + "".join(f"{a}\t{b}\n" for a, b in pairs(64))
    (folder / "pairs.tsv.gz").write_bytes(gzip.compress(table.encode()))
    for language in ("es", "fr"):
        write_mo(folder / "locale" / language / "LC_MESSAGES" / "a.mo", [(b, a) for a, b in pairs(200)[64:]])
    common_voice, cvss = folder / "cv-corpus" / "es", folder / "cvss_c_es_en"
    (common_voice / "clips").mkdir(parents=True)
    lines = {"train": [], "dev": []}
    for i, (source, target) in enumerate(pairs(40)):
        split = "train" if i % 8 else "dev"
        soundfile.write(common_voice / "clips" / f"c{i}.mp3", tone(0.6, 150 + 10 * i, 32000), 32000)
        (cvss / split).mkdir(parents=True, exist_ok=True)
        soundfile.write(cvss / split / f"c{i}.mp3.wav", tone(0.6, 300 + 10 * i), 16000)
        lines[split].append((f"c{i}.mp3", source, target))
    for split, rows in lines.items():
        (cvss / f"{split}.tsv").write_text("".join(f"{clip}\t{target}\n" for clip, _, target in rows))
    rows = [row for split in lines.values() for row in split]
    (common_voice / "validated.tsv").write_text("path\tsentence\n" + "".join(f"{c}\t{s}\n" for c, s, _ in rows))
    for pair in ("es-en", "fr-en"):
        shutil.copytree(tiny_bundle, folder / "bundles" / pair)
    write_tiny_whisper(folder / "whisper")
    write_streamspeech(folder / "cvss-c")
    (folder / "StreamSpeech" / "configs" / "fr-en").mkdir(parents=True)
    (folder / "runs" / "vocoder").mkdir(parents=True)
    for name in ("vocoder.pt", "vocoder.json"):
        shutil.copy(tiny_bundle / name, folder / "runs" / "vocoder")
    for name in ("es-en/units/checkpoint_1_10.pt", "es-en/units/checkpoint_last.pt", "fr-en/own/checkpoint_last.pt"):
        (folder / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "runs" / name).write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tts, "Kokoro", lambda source, voices, language: Tones(tuple(voices)))
        patch.setattr(tts, "Hibari", Whistler)
        patch.setattr("echostream.evaluation.simul_quality.load_recogniser", Ear)
        patch.setattr(evaluate, "load_recogniser", Ear)
        patch.setattr(asr, "Whisper", Ear)
        patch.setattr(evaluate, "require", lambda *a: None)
        patch.setattr("echostream.units.features.packaged_whisper", lambda: Path("whisper"))
        patch.setattr("echostream.evaluation.mos.DNSMOS.__init__", no_dnsmos)
        yield folder


def no_dnsmos(*arguments: object) -> None:
    from echostream.errors import MissingExtraError

    raise MissingExtraError("left out here")


@pytest.mark.parametrize("text", SNIPPETS, ids=["session", "model", *map(str, range(2, len(SNIPPETS)))])
def test_case_08_every_snippet_runs(sandbox: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    """With a list of arrays for the microphone, and a collector for the loudspeaker."""
    from echostream.audio.io import load_audio
    from echostream.checkpoint import load_bundle
    from echostream.streaming import StreamingSession, TargetText, Waveform

    talk = load_audio(ROOT / "echostream" / "assets" / "demo" / "02.ogg")
    blocks = np.array_split(np.repeat(talk, 3), 20)  # 48 kHz
    played: list[np.ndarray] = []
    names = {"microphone": blocks, "play": lambda samples, rate: played.append(samples)}
    exec(compile(text, "README.md", "exec"), names)
    if "microphone" in text:
        session = StreamingSession(load_bundle(), chunk_ms=320)
        events = [event for block in blocks for event in session.push(block, sample_rate=48000)] + session.finish()
        said = "".join(event.text for event in events if isinstance(event, TargetText))
        assert capsys.readouterr().out == said and said.strip()
        waves = [event.samples for event in events if isinstance(event, Waveform)]
        assert sum(map(len, played)) == sum(map(len, waves)) > 0


def run_program(name: str, words: list[str]) -> None:
    """One of ``echostream.commands``, or a script that is none of them."""
    module = PROGRAMS[name][0] if name in PROGRAMS else f"scripts.{name.replace('-', '_')}"
    program = importlib.import_module(module)
    if name in PARSED:
        parser = program.get_parser() if hasattr(program, "get_parser") else program.parser()
        parser.parse_args(words)
    elif name == "export-checkpoint":
        asked: list[object] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program, "export", asked.append)
            call(program.main, name, words)
        assert asked and asked[0].vocoder.exists() and (asked[0].data / "config.yaml").is_file()
        assert [Path(path).is_file() for path in asked[0].checkpoint] == [True]
    else:
        call(program.main, name, words)


def command_of(script: str) -> str:
    """What a script is as a command of ``echostream``: its name with hyphens, but for the one that was renamed."""
    return "prepare" if script == "prepare_corpus" else script.replace("_", "-")


def call(main: Callable[..., object], name: str, words: list[str]) -> None:
    """Run a program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
    assert not status, status


def parse_fairseq(tool: str, words: list[str]) -> None:
    """All flags are fairseq's or the plugin's, with values that they take."""
    from fairseq import options

    from echostream.plugin import register_with_fairseq

    register_with_fairseq()
    parser = {"train": options.get_training_parser, "generate": options.get_generation_parser}[tool]()
    # The plugin is registered already; from this directory it would be a second one of its name.
    args = options.parse_args_and_arch(parser, [str(ROOT / word) if word == "echostream" else word for word in words])
    assert args.task == "echostream_s2st"


def run_train(words: list[str], capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    run_program("train", words)
    printed = shlex.split(capsys.readouterr().out)
    assert printed[0] == "fairseq-train"
    parse_fairseq("train", printed[1:])


def run_pipeline(line: str, folder: Path) -> None:
    """With a recorder and a player made of cat."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    soundfile.write(folder / "raw48k", np.repeat(tone(1.0), 3), 48000, format="RAW", subtype="PCM_16")
    for name, text in {
        "arecord": f'case "$*" in *raw*) cat {folder}/raw48k;; *) cat {folder}/talk.wav;; esac',
        "aplay": f"cat > {folder}/played",
        "echostream": f'exec {sys.executable} -m echostream "$@" --checkpoint-dir bundles/es-en',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "-o -" not in line or (folder / "played").stat().st_size > 0


def check_install(words: list[str]) -> None:
    """What pip would install is what setup.py and the Makefile name."""
    setup, make = ((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "Makefile"))
    extras = set(re.findall(r'^    "(\w+)": ', setup, re.MULTILINE)) | {"all"}
    for word in words[1:]:
        if word.startswith("torch=="):
            assert word in make
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= extras


def expand(words: list[str]) -> list[str]:
    """As the shell does with stars."""
    return [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


def stand_in(folder: Path, words: list[str]) -> None:
    """The results of a fairseq-generate that was only parsed: the rows of the corpus, translated well."""
    subset = words[words.index("--gen-subset") + 1]
    results = folder / words[words.index("--results-path") + 1]
    results.mkdir(parents=True, exist_ok=True)
    from echostream.data.manifest import read_manifest

    rows = read_manifest(folder / words[0] / f"{subset}.tsv")
    lines = []
    for row in rows:
        soundfile.write(results / f"{row.id}.wav", tone(0.5), 16000)
        texts = {"asr": row.src_text, "asr_ref": row.src_text, "st": row.tgt_text, "mt": row.tgt_text}
        lines.append({"id": row.id, "audio": row.audio, **texts, "mt_ref": row.tgt_text, "wav": f"{row.id}.wav"})
    (results / f"generate-{subset}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: " ".join(COMMANDS[number].split()[:3]))
def test_case_08_every_command_runs(sandbox: Path, number: int, capsys: pytest.CaptureFixture) -> None:
    from simuleval import cli as simuleval
    from simuleval.utils.agent import EVALUATION_SYSTEM_LIST

    from echostream import cli
    from echostream.agent.__main__ import main as run_agent

    line = re.sub(r"^python scripts/(\w+)\.py", lambda found: f"echostream {command_of(found[1])}", COMMANDS[number])
    for pattern, text in INSTEAD:
        line = re.sub(pattern, text, line)
    for pattern, text in BEHIND.items():
        if re.search(pattern, line) and "--limit" not in (line if "--limit" in text else ""):
            line += f" {text}"
    words = expand(shlex.split(line, comments=True))
    program, rest = words[0], words[1:]
    if "|" in words:
        run_pipeline(line.partition(" #")[0], sandbox)
    elif program == "make":
        assert subprocess.run(["make", "-n", *rest], capture_output=True).returncode == 0
    elif program == "pip":
        check_install(rest)
    elif program == "echostream" and rest[0] == "serve":  # tests/test_serve.py runs it
        cli.build_parser().parse_args(rest)
    elif program == "serve":  # Ray's
        module, _, name = rest[1].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    elif program == "echostream" and rest[0] == "train":
        run_train(rest[1:], capsys)
    elif program == "echostream" and (rest[0] in PROGRAMS or rest[0] == "load-test"):
        run_program(rest[0], rest[1:])
    elif program == "echostream":
        call(cli.main, program, rest)
    elif program == "export":  # what the script has tried
        from scripts.check_nodes import OWN_STORE

        assert rest == [f"{name}={value}" for name, value in OWN_STORE.items()]
    elif program in ("torchrun", "srun"):
        assert "torchrun" in words[:2]
        launched = words.index("-m")
        launcher = importlib.import_module("torch.distributed.run").get_args_parser()
        asked = launcher.parse_args([*words[words.index("torchrun") + 1 : launched], "-m", "echostream"])
        assert asked.nproc_per_node == "2" and words[launched + 1 : launched + 3] == ["echostream", "train"]
        run_train(words[launched + 3 :], capsys)
    elif program == "ray":  # tests/test_corpus_cluster.py and test_serve_ray.py start one
        assert rest == ["start", "--head"]
    elif program == "fairseq-generate":
        parse_fairseq("generate", rest)
        stand_in(sandbox, rest)
    elif program == "simuleval" or words[:3] == ["python", "-m", "echostream.agent"]:
        rest = rest if program == "simuleval" else rest[2:]
        if "--source" in rest:
            from echostream.data.manifest import read_manifest

            row = read_manifest(sandbox / "data" / "es-en" / "test.tsv")[0]
            (sandbox / "wavs.txt").write_text(f"data/es-en/{row.audio}\n")
            (sandbox / "references.txt").write_text(f"{row.tgt_text}\n")
        EVALUATION_SYSTEM_LIST.clear()
        call(simuleval.main if program == "simuleval" else run_agent, program, rest)
        EVALUATION_SYSTEM_LIST.clear()
    else:
        pytest.fail(f"nothing here knows how to run {program!r}")
    made = re.search(r"(?:^|\s)(?:-o|--output|--subtitles|--timeline) ([\w./-]+)", line)
    if made and made[1] != "-" and program != "fairseq-generate" and "export-checkpoint" not in line:
        assert Path(made[1]).exists()
