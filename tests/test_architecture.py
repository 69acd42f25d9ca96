"""The architecture: what may import what. Data flows one way, and nothing imports a command."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parents[1] / "code"

# Lowest first. A module imports from its level and from lower ones, without cycles.
LEVELS = [
    ["utils", "custom_affine", "custom_transforms", "custom_dataloader", "custom_blocks"],
    ["student_code", "deepvision.attacks"],
    ["deepvision.runtime", "deepvision.evaluation.statistics", "deepvision.evaluation.accuracy"],
    ["deepvision.checkpoint", "deepvision.evaluation.sweep", "deepvision.evaluation.saliency"],
    ["deepvision.models", "deepvision.data", "deepvision.evaluation.pictures"],
    ["deepvision.training"],
    ["deepvision.config"],
    ["deepvision.training.trainer", "deepvision.evaluation"],
    ["deepvision.reporting"],
    ["reverse_attack"],
    ["main", "report", "make_sample_data", "download_dataset"],
]
# The commands, which nothing imports
COMMANDS = {"main", "report", "grade", "make_sample_data", "download_dataset"}
COMMANDS |= {f"reverse_attack.{n}" for n in ("train", "attack", "inference", "evaluate", "figures")}
STANDALONE = ("self_check", "checks", "test_conv", "grade", "grader")  # run next to any answer
TORCH_ALONE = ("student_code", "custom_blocks", "deepvision.attacks")


def module_name(path: Path) -> str:
    parts = path.relative_to(CODE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for p in CODE.rglob("*.py") if "__pycache__" not in p.parts}


def imported(path: Path) -> set[str]:
    """The modules of this project that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    names = found & FILES.keys()
    return {n for n in names if not any(m.startswith(f"{n}.") for m in names)}


GRAPH = {name: imported(path) for name, path in FILES.items()}


def level(name: str) -> int:
    """The level whose longest prefix matches the module."""
    matches = [
        (len(prefix), i)
        for i, prefixes in enumerate(LEVELS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    assert matches, f"{name} has no level: add it to LEVELS"
    return max(matches)[1]


def rooms() -> dict[str, set[str]]:
    """The graph without the files that stand alone."""
    own = {n for n in GRAPH if n.split(".")[0] not in STANDALONE and n != "deepvision"}
    return {n: GRAPH[n] & own for n in own}


@pytest.mark.parametrize("name", sorted(rooms()))
def test_no_module_imports_a_higher_one(name):
    higher = [other for other in rooms()[name] if level(other) > level(name)]
    assert not higher, f"{name} imports {higher}, which stand higher"


def test_there_is_no_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_nothing_imports_a_command():
    importers = {name: GRAPH[name] & COMMANDS for name in GRAPH if GRAPH[name] & COMMANDS}
    assert not importers


def test_only_the_models_room_imports_student_code():
    importers = {n for n, others in GRAPH.items() if "student_code" in others}
    assert {n for n in importers if n.split(".")[0] not in STANDALONE} == {
        "deepvision.models.student"
    }


def test_only_config_knows_argparse():
    knowing = {
        name
        for name in rooms()
        if name.startswith("deepvision") and "argparse" in FILES[name].read_text()
    }
    assert knowing == {"deepvision.config"}


def test_the_checks_need_nothing_of_the_package():
    for name in GRAPH:
        if name.split(".")[0] in ("checks", "self_check", "test_conv"):
            top = ast.parse(FILES[name].read_text()).body
            modules = {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
            assert not any(m.startswith("deepvision") for m in modules), name


@pytest.mark.parametrize("prefix", TORCH_ALONE)
def test_parts_i_to_iii_and_the_attacks_import_torch_alone(prefix):
    allowed = {"torch", "custom_blocks", *TORCH_ALONE}
    standard = set(__import__("sys").stdlib_module_names)
    for name, path in FILES.items():
        if name != prefix and not name.startswith(f"{prefix}."):
            continue
        for node in ast.parse(path.read_text()).body:  # imports at the top of the file
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in names:
                top = module.split(".")[0]
                assert top in allowed | standard or module.startswith("deepvision.attacks"), name
