"""Imports point one way: no circles, and no floor of the house uses one above it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "echostream"
# From the ground up; a name stands for all modules below it, the longest that fits counts.
FLOORS = (
    "echostream constants errors text_file loading rules files text config recipe tensor_file weights compat memory",
    "audio",
    "models units whisper vocoder",
    "streaming",
    "checkpoint data",
    "frozen fairseq_model criterions tasks generator plugin hub info import_whisper vocode export output"
    " evaluation benchmarks",
    "commands data.corpus.cli data.corpus.steps data.corpus.further agent serve client translate cli __main__",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def modules() -> dict[str, Path]:
    paths = {path.relative_to(PACKAGE.parent).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): path for parts, path in paths.items()}


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Of each module those of ours that it imports, inside functions too; what only type checkers see is left out."""

    def found(node: ast.AST) -> set[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return set()
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        if isinstance(node, ast.ImportFrom) and node.module:  # of a module, or a name in it
            both = (f"{node.module}.{alias.name}" for alias in node.names)
            names = {full if full in known else node.module for full in both}
        return names.union(*map(found, ast.iter_child_nodes(node)))

    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()}
    return {name: {other for other in found(tree) if other in known} - {name} for name, tree in trees.items()}


GRAPH = imports(modules())


def floor(module: str) -> int:
    parts = module.removeprefix("echostream.").split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    name = next((name for name in names if name in FLOOR), None)
    assert name is not None, f"{module} is on no floor; give it one in FLOORS"
    return FLOOR[name]


def test_no_module_imports_itself_by_way_of_others():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_module_imports_from_a_floor_above_its_own():
    upwards = [f"{name} -> {other}" for name in GRAPH for other in GRAPH[name] if floor(other) > floor(name)]
    assert not upwards


def test_every_floor_is_there():
    assert {floor(name) for name in GRAPH} == set(range(len(FLOORS)))
    assert len(GRAPH) > 150


def test_no_module_is_longer_than_can_be_read_in_one_sitting():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert not {name: count for name, count in lines.items() if count > 400}
