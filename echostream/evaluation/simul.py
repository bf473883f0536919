"""SimulEval for speech and text output: instances, data loaders and scorers that replace those of SimulEval 1.1.4.

``register()`` puts them into SimulEval's registries under the names users know (BLEU, ASR_BLEU, AL, LAAL, StartOffset,
EndOffset, ...), so that ``simuleval --agent-class echostream.agent.EchoStreamAgent`` gets them without further flags;
for ``--score-only``, which never imports the agent, say ``--user-dir agent``, or ``python -m echostream.agent`` for
``simuleval``. All of this is for simuleval 1.1.4, and an entry can go when the defect it names is gone:

* whole corpus as lists of Python floats, each file decoded three times → ``SpeechDataloader``, ``SpeechInstance``;
* ``elapsed`` written empty, so that computation-aware scoring crashes → ``SpeechInstance.summarize``;
* empty translations write no wav → written with no samples;
* BLEU of speech compares the wav's *path* with the reference → ``TextBLEU``;
* ASR_BLEU shells out to a file pip does not install and logs the failure only → ``SpeechBLEU``;
* AL and LAAL count emitted pieces of speech against words of the reference → per word here;
* ATD takes the speech of a finished run (``--score-only``) for text → from the log's durations;
* ``--computation-aware`` replaces the plain figures instead of adding to them → ``from_args``;
* RTF is 1.0 by construction, Discontinuity* assert on logged instances → from what the log holds;
* AP, DAL and NumChunks of speech count its pieces, and crash when nobody said anything → per unit here;
* WHISPER_ASR_BLEU without the package whisper is 0 → refused (``HostWhisperBLEU``);
* ``--remote-eval`` asks the evaluator for an attribute that it has not, and numpy is no JSON → ``register``,
  ``SpeechPiece``.

The host's own options are obeyed: ``--eval-latency-unit`` (``unit_times``), ``--sacrebleu-tokenizer``,
``--target-speech-lang``, ``--no-use-ref-len``, ``--start-index``, ``--end-index``, ``--continue-unfinished``.

Log lines (``instances.log``) gain ``text`` (what was said), ``source_text`` (what was heard), ``words`` (each with
``text``, and ``delay`` and ``elapsed`` in ms of the ``segment`` of speech that brought its end; of text output, of when
it was written), ``pieces`` (the text as it came, ``[text, delay, elapsed]``) and ``compute`` (ms). Where speech and
text are both wanted, ``written`` and ``written_pieces`` have the words as text.

SimulEval scores a finished run without importing anything of ours unless it is told to, and would give other figures.
Its ``config.yaml`` therefore names a source type that only ``register()`` knows (``SCORED_HERE``): without it
``--score-only`` ends with a KeyError that says what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from simuleval.data.dataloader import DATALOADER_DICT
from simuleval.evaluator.evaluator import SentenceLevelEvaluator
from simuleval.evaluator.instance import INSTANCE_TYPE_DICT
from simuleval.evaluator.scorers.latency_scorer import LATENCY_SCORERS_DICT, LATENCY_SCORERS_NAME_DICT
from simuleval.evaluator.scorers.quality_scorer import QUALITY_SCORERS_DICT

from echostream.errors import EchoStreamError
from echostream.evaluation.simul_instances import (
    SCORED_HERE,
    SpeechDataloader,
    SpeechInstance,
    TextDataloader,
    TextInstance,
    logger,
)
from echostream.evaluation.simul_latency import (
    ChunkCount,
    EndOffset,
    RealTimeFactor,
    SilenceAverage,
    SilenceNumber,
    SilenceSum,
    StartOffset,
    TokenDelay,
    WordAL,
    WordAP,
    WordDAL,
    WordLAAL,
    WrittenAL,
    WrittenLAAL,
    WrittenStart,
)
from echostream.evaluation.simul_quality import HostWhisperBLEU, SpeechBLEU, SpeechWER, TextBLEU, TextWER, VoiceWER

LATENCY_SCORERS = (
    WordAL, WordLAAL, WordAP, WordDAL, TokenDelay, StartOffset, EndOffset, RealTimeFactor, ChunkCount,
    SilenceSum, SilenceNumber, SilenceAverage, WrittenAL, WrittenLAAL, WrittenStart,
)  # fmt: skip
QUALITY_SCORERS = {
    "BLEU": TextBLEU, "WER": TextWER, "ASR_BLEU": SpeechBLEU, "ASR_WER": SpeechWER, "VOICE_WER": VoiceWER,
    "WHISPER_ASR_BLEU": HostWhisperBLEU,
}  # fmt: skip


def register() -> None:
    """Put these loaders, instances and scorers into SimulEval's registries; may be called again."""
    import simuleval

    version = _version("simuleval")
    if version != "1.1.4":
        logger.warning(f"simuleval {version}: EchoStream's scorers were made for 1.1.4 ({simuleval.__file__})")
    DATALOADER_DICT.update({"speech-to-speech": SpeechDataloader, "speech-to-text": TextDataloader})
    for source in ("speech", "youtube", SCORED_HERE):
        INSTANCE_TYPE_DICT.update({f"{source}-speech": SpeechInstance, f"{source}-text": TextInstance})
    INSTANCE_TYPE_DICT[f"{SCORED_HERE}-{SCORED_HERE}"] = SpeechInstance  # SimulEval notes the source's type twice
    if not hasattr(SentenceLevelEvaluator, "instance_iterator"):  # what RemoteEvaluator goes through
        SentenceLevelEvaluator.instance_iterator = property(lambda evaluator: evaluator.iterator)
    if Path(sys.argv[0]).name in ("simuleval", "cli.py") and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _one_line
        if "--slurm" in sys.argv:
            raise EchoStreamError("--slurm of simuleval 1.1.4 does not work on the command line; call it from sbatch")
    QUALITY_SCORERS_DICT.update(QUALITY_SCORERS)
    for scorer in LATENCY_SCORERS:
        LATENCY_SCORERS_DICT[scorer.name] = scorer
        LATENCY_SCORERS_NAME_DICT[scorer.__name__] = scorer.name


def _one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """SimulEval shows every error with its stack; ours are made to be read without."""
    if isinstance(error, EchoStreamError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
