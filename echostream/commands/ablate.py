"""Ablations: variants of the recipe ("arms"), trained for equal budgets, decoded offline and compared in a table.

    echostream ablate --config configs/scratch/ablations.yaml --data data/es-en --save-dir runs/ablations \
        --minutes 20 --only memory-0 full-context --table ABLATIONS.md

The configuration file has:

``steps``     trainings by name: ``config``, a file of flags beside this one; ``share`` of the budget; ``flags`` that
              differ from the file's; ``start``, flags that take over the checkpoint of an earlier step of the arm.
``groups``    arms that are compared with the group's first arm: ``steps``, in the order of training, ``measures``
              (WER, ST BLEU, BLEU, chrF, UER ...), ``arms`` by name. An arm may have ``flags`` for all of its steps,
              ``step-flags`` for some of them, ``steps`` and ``shares`` of its own.
``subsets``   manifests cut from others: ``from``, and ``match``, a regular expression for ``src_audio``.
``generate``  flags of fairseq-generate.

The budget counts updates, so that arms hear as much speech whatever else the machine does: ``--updates`` for a share of
1, or ``--minutes``, which is as many updates as the unaltered step makes in that time here. Warm-up and the schedule of
the learning rate are fitted to it. Arms that begin alike share these steps. Called again, finished work is skipped and
interrupted trainings go on. Every training's log lies beside its checkpoint in ``SAVE_DIR/steps``.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import re
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from echostream.commands import training_runs
from echostream.commands.training_runs import Training, digest_of, schedule
from echostream.data.config import DataConfig
from echostream.data.manifest import Utterance, read_manifest, write_manifest
from echostream.errors import ConfigError, EchoStreamError
from echostream.evaluation import ablation
from echostream.evaluation.systems import read_results
from echostream.files import write_json, write_text
from echostream.loading import read_mapping
from echostream.recipe import fill, find_recipe, read_flags
from echostream.text_file import read_json

TEST = "ablation_test"  # the first rows of the manifest to decode
TIMED_UPDATES = 12
ARM_KEYS = ("steps", "shares", "flags", "step-flags")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "echostream ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="steps and arms (YAML)")
    parser.add_argument("--pair", metavar="SRC-TGT", help="what {pair} in the files stands for, instead of pair.yaml's")
    parser.add_argument("--data", type=Path, required=True, help="data directory")
    parser.add_argument("--save-dir", type=Path, default=Path("runs/ablations"), help="(default: %(default)s)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--updates", type=int, help="budget of a share of 1, in updates")
    budget.add_argument("--minutes", type=float, help="the same in minutes, measured on the unaltered steps")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms and those they are compared with")
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", help="cpu=false, text.lr=0.01")
    parser.add_argument("--jobs", type=int, default=1, help="arms trained at a time (default: 1)")
    parser.add_argument("--subset", default="test", help="manifest to decode (default: %(default)s)")
    parser.add_argument("--test-limit", type=int, help="only its first N recordings")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap samples (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="write the tables here too, and all figures as .json beside it")
    parser.add_argument("--dry-run", action="store_true", help="print the trainings and stop")
    args = parser.parse_args(argv)
    try:
        with alone(args.save_dir):
            work(args)
    except EchoStreamError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises ConfigError: another process holds ``folder``; two would write the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another ablate is at work in {folder}; wait, or give another --save-dir") from None
        yield


def work(args: argparse.Namespace) -> None:
    """Train, decode and compare what the command line asks for, or show what would be trained.

    Raises:
        EchoStreamError: something in it is wrong, or an arm failed.
    """
    ablations = Ablations(args)
    if args.dry_run:
        ablations.show()
        return
    failed = ablations.run()
    figures = ablations.compare()
    text = "\n".join(f"### {title}\n\n{ablation.table(arms)}\n" for title, arms in figures.items())
    print(f"\n{text}")
    if args.table:
        write_text(args.table, text)
        write_json(args.table.with_suffix(".json"), figures)
    if failed:
        raise EchoStreamError(f"not finished: {', '.join(failed)}; the same command goes on with them")


class Ablations:
    """The trainings of all wanted arms, done or still to be done.

    Raises:
        ConfigError: the file or an option names what does not exist.
    """

    def __init__(self, args: argparse.Namespace):
        args.config = find_recipe(args.config)
        self.args, self.config = args, fill(read_mapping(args.config), args.config, args.pair)
        self.changes: dict[str, dict[str, Any]] = defaultdict(dict)  # by step; those of "" are for all
        for name, equals, value in (pair.partition("=") for pair in args.set):
            if not equals:
                raise ConfigError(f"--set {name!r} is not of the form FLAG=VALUE or STEP.FLAG=VALUE")
            step, _, flag = name.rpartition(".")
            self.changes[step][flag] = yaml.safe_load(value)
        groups = self.config.get("groups") or {}
        known = [arm for group in groups.values() for arm in group["arms"]]
        for name in args.only or ():
            if name not in known:
                raise ConfigError(f"--only {name!r} is no arm of {args.config}; the arms are {', '.join(known)}")
        if len(set(known)) < len(known):
            raise ConfigError(f"{args.config}: an arm's name appears in two groups")
        self.data = self._data_directory()
        self.locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)
        self.groups: dict[str, dict[str, list[Training]]] = {}
        for title, group in groups.items():
            chosen = [name for name in group["arms"] if not args.only or name in args.only]
            if chosen:
                names = dict.fromkeys([next(iter(group["arms"])), *chosen])
                self.groups[title] = {name: self._trainings(name, group) for name in names}

    def _data_directory(self) -> Path:
        """The data directory's files once more, with the manifests of ``subsets`` and the one to be decoded.

        They are copied: links that lead out of a data directory are not followed. The recordings stay where they are.
        """
        config, folder = DataConfig.load(self.args.data), self.args.save_dir / "data"
        folder.mkdir(parents=True, exist_ok=True)

        def manifest(name: str, rows: list[Utterance]) -> None:
            write_manifest(folder / f"{name}.tsv", rows)

        for path in self.args.data.iterdir():
            if path.is_file() and path.name != "config.yaml":
                shutil.copyfile(path, folder / path.name)
        values = {**read_mapping(self.args.data / "config.yaml"), "audio_root": str(config.root.resolve())}
        write_text(folder / "config.yaml", yaml.safe_dump(values))
        manifest(TEST, read_manifest(self.args.data / f"{self.args.subset}.tsv")[: self.args.test_limit])
        for name, cut in (self.config.get("subsets") or {}).items():
            rows = read_manifest(self.args.data / f"{cut['from']}.tsv")
            manifest(name, [row for row in rows if re.search(cut["match"], row.audio)])
        return folder

    def _trainings(self, name: str, group: dict[str, Any]) -> list[Training]:
        arm = {"steps": group["steps"], **(group["arms"][name] or {})}
        unknown = sorted(set(arm) - set(ARM_KEYS))
        if unknown:
            raise ConfigError(f"arm {name}: unknown key {unknown[0]!r}; known are {', '.join(ARM_KEYS)}")
        found: dict[str, Training] = {}
        for title in arm["steps"]:
            step, flags = self._step(title)
            flags |= {**arm.get("flags", {}), **arm.get("step-flags", {}).get(title, {})}
            updates = max(1, round(arm.get("shares", {}).get(title, step["share"]) * self._budget(title)))
            start = {flag: found[source] for flag, source in step.get("start", {}).items() if source in found}
            digest = digest_of([updates, flags, {flag: training.folder.name for flag, training in start.items()}])
            folder = self.args.save_dir / "steps" / f"{title}-{digest}"
            flags |= {flag: str(training.checkpoint) for flag, training in start.items()}
            found[title] = Training(title, updates, flags | schedule(flags, updates, folder), folder)
        return list(found.values())

    def _step(self, title: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A step of the file; and its flags, without paths, as ``--set`` has changed them."""
        steps = self.config.get("steps") or {}
        if title not in steps:
            raise ConfigError(f"{self.args.config} has no step {title!r}; its steps are {', '.join(steps)}")
        step = steps[title]
        flags = read_flags(self.args.config.parent / step["config"], self.args.pair) | step.get("flags", {})
        flags |= {**self.changes[""], **self.changes[title]}
        return step, {key: flags[key] for key in flags if key not in ("data", "save-dir", *step.get("start", {}))}

    def _budget(self, title: str) -> float:
        """The updates of a share of 1."""
        if self.args.updates:
            return self.args.updates
        path = self.args.save_dir / "seconds_per_update.json"
        known = read_json(path, EchoStreamError) if path.is_file() else {}
        if title not in known:
            flags, folder = self._step(title)[1], self.args.save_dir / "timing" / title
            flags |= {**schedule(flags, TIMED_UPDATES, folder), "no-save": True, "disable-validation": True}
            times: list[float] = []

            def watch(line: str) -> None:
                if "train_inner" in line:
                    times.append(time.monotonic())

            print(f"timing {TIMED_UPDATES} updates of step {title}", file=sys.stderr)
            training_runs.launch(training_runs.fairseq("train", flags, self.data), folder / "train.log", watch)
            known[title] = (times[-1] - times[1]) / (len(times) - 2)  # the first ones warm up
            write_json(path, known)
        return 60 * self.args.minutes / known[title]

    def show(self) -> None:
        for name, trainings in ((name, t) for group in self.groups.values() for name, t in group.items()):
            for training in trainings:
                print(f"{name}: {training.step}, {training.updates} updates{', done' * training.done}")
                print(f"    fairseq-train {' '.join(training_runs.fairseq('train', training.flags, self.data)[3:])}")

    def run(self) -> list[str]:
        """Train and decode what is not done yet; the names of the arms that failed."""
        arms = {name: trainings for group in self.groups.values() for name, trainings in group.items()}
        todo = {t.folder: t.updates for trainings in arms.values() for t in trainings if not t.done}
        failed = []
        with (
            tqdm(total=sum(todo.values()), desc="training", unit="update") as bar,
            ThreadPoolExecutor(self.args.jobs) as pool,
        ):
            futures = {name: pool.submit(self._arm, name, trainings, bar) for name, trainings in arms.items()}
            for name, future in futures.items():
                try:
                    future.result()
                except EchoStreamError as error:
                    tqdm.write(f"{name}: {error}", file=sys.stderr)
                    failed.append(name)
                except KeyboardInterrupt:  # the same key has ended the trainings
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return failed

    def _arm(self, name: str, trainings: list[Training], bar: tqdm) -> None:
        for training in trainings:
            with self.locks[training.folder]:
                if not training.done:
                    bar.set_description(f"{name}: {training.step}")
                    training_runs.train(training, self.data, bar)
        results = self._results(trainings)
        with self.locks[results]:
            if not results.is_file():
                unfinished = results.parent.with_suffix(".unfinished")
                flags = {**self.config.get("generate", {}), "criterion": None, "gen-subset": TEST}
                flags |= {"path": str(trainings[-1].checkpoint), "results-path": str(unfinished)}
                flags["cpu"] = trainings[-1].flags.get("cpu")
                training_runs.launch(training_runs.fairseq("generate", flags, self.data), unfinished / "generate.log")
                unfinished.rename(results.parent)

    def _results(self, trainings: list[Training]) -> Path:
        """Where the arm's translations are, or will be."""
        test = hashlib.sha256((self.data / f"{TEST}.tsv").read_bytes()).hexdigest()
        name = f"{trainings[-1].folder.name}-{digest_of([self.config.get('generate'), test])}"
        return self.args.save_dir / "decoded" / name / f"generate-{TEST}.jsonl"

    def compare(self) -> dict[str, dict[str, Any]]:
        """By group and arm: what it was, what it cost, and its figures; nothing without the group's first arm."""
        compared: dict[str, dict[str, Any]] = {}
        for title, group in self.groups.items():
            finished = {name: self._results(t) for name, t in group.items() if self._results(t).is_file()}
            if list(group)[:1] != list(finished)[:1]:
                continue
            rows = {name: read_results(path) for name, path in finished.items()}
            figures = ablation.compare(rows, self.config["groups"][title]["measures"], self.args.samples)
            compared[title] = {
                name: {
                    "about": describe(self.config["groups"][title]["arms"][name] or {}),
                    "updates": {t.step: t.updates for t in group[name]},
                    "wall_s": sum(t.record["wall_s"] for t in group[name]),
                    "cpu_s": sum(t.record["cpu_s"] for t in group[name]),
                    "validation": group[name][-1].record["validation"],
                    "figures": figures[name],
                    "results": str(path),
                }
                for name, path in finished.items()
            }
        return compared


def describe(arm: dict[str, Any]) -> str:
    """What makes an arm."""
    flags = {**arm.get("flags", {}), **{k: v for step in arm.get("step-flags", {}).values() for k, v in step.items()}}
    words = [f"{name} {value}" for name, value in flags.items()]
    if "steps" in arm:
        words.append("steps " + ", ".join(arm["steps"]))
    return "; ".join(words)
