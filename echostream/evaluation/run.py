"""Running SimulEval over a list of recordings, in one process or several, and scoring its log."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echostream.errors import EchoStreamError, require
from echostream.files import replacing, write_json, write_text
from echostream.text_file import read_json_lines, read_text

# By what the agent gives out (its --output-type).
QUALITY = {
    "speech": ("BLEU", "ASR_BLEU", "ASR_WER"),
    "text": ("BLEU",),
    "source": ("WER",),
    "both": ("BLEU", "ASR_BLEU", "ASR_WER"),
}
LATENCY = ("StartOffset", "EndOffset", "AL", "LAAL", "ATD")
WRITTEN_LATENCY = ("StartOffset_TEXT", "AL_TEXT", "LAAL_TEXT")  # of the text that comes with speech: output "both"
AGENT = "echostream.agent.simuleval.EchoStreamAgent"
PLAIN_ONLY = ("RTF",)  # made of computing time alone


def simulate(
    sources: Sequence[str | Path],
    references: Sequence[str],
    output: str | Path,
    options: Mapping[str, Any],
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Run SimulEval with EchoStream as its agent over recordings and return the lines of ``instances.log``, in order.

    Args:
        sources, references: recordings and their translations, one line of text each.
        output: directory for ``instances.log`` and ``wavs/``.
        options: options of simuleval and of the agent; None leaves an option out.
        jobs: processes side by side. More than one falsifies the computation-aware figures.

    Raises:
        EchoStreamError: there is nothing to do, or simuleval failed (it has said why).
    """
    require("simuleval", "simuleval")
    if not sources or len(sources) != len(references):
        raise EchoStreamError(f"{len(sources)} recordings and {len(references)} references cannot be paired")
    output = Path(output).resolve()
    bounds = [round(i * len(sources) / jobs) for i in range(jobs + 1)]
    parts = [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]
    folders = [output] if len(parts) == 1 else [output / f"part{i}" for i in range(len(parts))]
    processes = []
    for (start, stop), folder in zip(parts, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        # SimulEval reads one item a line
        lists = {"source": [str(Path(s).resolve()) for s in sources[start:stop]], "target": references[start:stop]}
        for name, lines in lists.items():
            text = "".join(f"{' '.join(line.split()) if name == 'target' else line}\n" for line in lines)
            write_text(folder / f"{name}.txt", text)
        command = [sys.executable, "-m", "simuleval.cli", "--agent-class", AGENT, "--no-scoring"]
        command += ["--source", str(folder / "source.txt"), "--target", str(folder / "target.txt")]
        command += ["--output", str(folder)]
        for name, value in options.items():
            if value is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        processes.append(subprocess.Popen(command, env=environment()))
    statuses = [_wait(process) for process in processes]
    if any(statuses):
        raise EchoStreamError(f"simuleval ended with status {next(filter(None, statuses))}; its message is above")
    if len(parts) > 1:
        _join(output, folders, [start for start, _ in parts])
    return read_log(output)


def _join(output: Path, folders: Sequence[Path], starts: Sequence[int]) -> None:
    """Make the results of several processes look like those of one."""
    with replacing(output / "instances.log", "w") as log:
        for folder, start in zip(folders, starts, strict=True):
            for line in read_log(folder):
                line["index"] += start
                if "durations" in line:  # speech
                    wav = output / "wavs" / f"{line['index']}_pred.wav"
                    wav.parent.mkdir(exist_ok=True)
                    Path(line["prediction"]).replace(wav)
                    line["prediction"] = wav.as_posix()
                log.write(json.dumps(line) + "\n")
    for folder in folders:  # only now that all of them are in one
        shutil.rmtree(folder)


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``instances.log``.

    Raises:
        EchoStreamError: the file is missing, or a line is not JSON.
    """
    path = Path(folder) / "instances.log"
    if not path.is_file():
        raise EchoStreamError(f"{path} does not exist; has simuleval run with --output {folder}?")
    return read_json_lines(path, EchoStreamError)


def latencies(output: str) -> tuple[str, ...]:
    """The latencies that are measured of a kind of output."""
    return LATENCY + (WRITTEN_LATENCY if output == "both" else ())


def score(
    folder: str | Path,
    asr: str = "auto",
    output: str = "speech",
    voice: bool = False,
    *,
    unit: str = "word",
    tokenizer: str = "13a",
    language: str = "en",
    model: str | None = None,
) -> dict[str, float]:
    """All figures of a finished run by the scorers of ``echostream.evaluation.simul``; also kept in ``scores.json``.

    Latencies are in ms, computation-aware ones end in ``_CA``. ``output`` is what the agent gave out; ``voice`` listens
    to it a second time without the silences in which the listener waits (VOICE_WER). ``unit`` (``word``, ``char``) is
    what latencies count, ``tokenizer`` BLEU's, ``language`` what the recogniser hears, ``model`` another Whisper.
    """
    from echostream.evaluation import simul

    instances = read_instances(folder, unit)
    args = Namespace(asr=asr, asr_model=model, target_speech_lang=language, sacrebleu_tokenizer=tokenizer)
    names = QUALITY[output] + (("VOICE_WER",) if voice else ())
    figures = {name: simul.QUALITY_SCORERS[name].from_args(args)(instances) for name in names}
    figures |= score_latency(instances, output)
    write_json(Path(folder) / "scores.json", figures)
    return figures


def read_instances(folder: str | Path, unit: str = "word") -> dict[int, Any]:
    """The log of a finished run as SimulEval's instances, which its scorers take; latencies count by ``unit``.

    Raises:
        EchoStreamError: there is no log, or it is empty or damaged.
    """
    require("simuleval", "simuleval")
    from simuleval.evaluator.instance import LogInstance

    instances = {line["index"]: LogInstance(json.dumps(line), unit) for line in read_log(folder)}
    if not instances:
        raise EchoStreamError(f"{folder}/instances.log is empty: there is nothing to score")
    return instances


def score_latency(instances: Mapping[int, Any], output: str = "speech") -> dict[str, float]:
    """The latencies of a run, plain and with ``_CA``, in ms, and RTF."""
    from echostream.evaluation import simul

    args = Namespace(no_use_ref_len=False, computation_aware=True)
    scorers = {scorer.name: scorer for scorer in simul.LATENCY_SCORERS}
    figures = {name: scorers[name].from_args(args)(instances) for name in (*latencies(output), *PLAIN_ONLY)}
    return figures | {f"{name}_CA": scorers[name](computation_aware=True)(instances) for name in latencies(output)}


def recogniser_name(folder: str | Path) -> str:
    """Which recogniser the ASR figures of a scored run rest on."""
    path = Path(folder) / "asr.txt"
    return read_text(path, EchoStreamError).strip() if path.exists() else "no ASR"


def environment() -> dict[str, str]:
    """This process's environment, with this very package importable: for programs started from here."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


def _wait(process: subprocess.Popen) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        time.sleep(0.1)
        raise
