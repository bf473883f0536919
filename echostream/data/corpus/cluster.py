"""Steps of the corpus on a Ray cluster (extra ``ray``): their shards as tasks, on machines that share the directory.

What is done stands in the ledgers alone. A task whose worker or machine dies is started again elsewhere and goes on
behind the last line of its shard's ledger; so does the whole command.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from echostream.errors import EchoStreamError, OutputError, require

SHARDS_PER_CPU = 4  # so that the last ones to finish are short
POLL_S = 2.0
Outcome = tuple[str, dict[str, Any]]  # a step's note: its name, and facts, ``counts`` among them
_ROOT = Path(__file__).resolve().parents[3]


def run_sharded(
    run: Callable[[argparse.Namespace], Outcome], args: argparse.Namespace, ledger: str, bar: Any
) -> Outcome:
    """One step, its shards as tasks of the cluster.

    Args:
        run: the step for one shard, by ``args.shard`` and ``args.num_shards``; a function of a module's.
        args: of the step; ``num_shards`` 1 stands for ``SHARDS_PER_CPU`` for each CPU of the cluster.
        ledger: pattern of the ledger's files in the output directory.
        bar: of tqdm, which shows rows done.

    Returns:
        the note of all shards together.

    Raises:
        EchoStreamError: a shard met an error, or was killed more than ``args.retries`` times.
    """
    ray = require("ray", "ray")
    connect(ray, args.ray_address)
    shards = args.num_shards if args.num_shards > 1 else SHARDS_PER_CPU * max(1, int(ray.cluster_resources()["CPU"]))
    options = {"num_cpus": 1, "max_retries": args.retries, "retry_exceptions": [OutputError]}
    task = ray.remote(_shard).options(**options)
    settings = {**vars(args), "output": args.output.resolve(), "num_shards": shards}
    pending = [task.remote(run, {**settings, "shard": shard}) for shard in range(shards)]
    noted: list[Outcome] = []
    before = rows_in(args.output, ledger)
    while pending:
        finished, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
        for result in finished:
            try:
                noted.append(ray.get(result))
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, EchoStreamError) else error from None
            except ray.exceptions.RayError as error:
                raise EchoStreamError(
                    f"a shard was lost {args.retries + 1} times ({type(error).__name__}); the same command goes on"
                ) from None
        bar.set_postfix_str(f"{len(noted)} of {shards} shards", refresh=False)
        bar.update(rows_in(args.output, ledger) - before - bar.n)
    bar.close()
    name, facts = noted[0]
    return name, {**facts, "counts": dict(sum((Counter(facts["counts"]) for _, facts in noted), Counter()))}


def connect(ray: Any, address: str | None) -> None:
    """Join the cluster at ``address`` (``auto``, host:port), or make one of this machine; once.

    Raises:
        EchoStreamError: there is no cluster.
    """
    if ray.is_initialized():
        return
    # A worker finds this very package; and shares a machine with others, each with one thread.
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise EchoStreamError(f"no Ray cluster at {address!r} ({reason}); ray start --head makes one") from None


def rows_in(output: Path, ledger: str) -> int:
    """Lines in a ledger's files, without their headers."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in output.glob(ledger))


def _shard(run: Callable[[argparse.Namespace], Outcome], settings: dict[str, Any]) -> Outcome:
    return run(argparse.Namespace(**settings))


__all__ = ["connect", "rows_in", "run_sharded"]
