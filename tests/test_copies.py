"""No shared module: what several scripts need is the same text in each, marked `# Same in:`, and this holds it so."""

from __future__ import annotations

import ast
import doctest
import re

import pytest
from conftest import ROOT, load_script

SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
# Each script's own, by design: the entry points, and the names the lessons are documented with.
OWN = {"main", "parse_args", "Config", "load_dataset", "format_example", "tokenize_dataset", "tokenize"}
OWN |= {"build_dataset", "run_training", "CliConfig", "FinetuneConfig", "TOTAL_SAMPLES", "RATIOS"}


def helpers() -> dict[str, dict[str, tuple[str, str]]]:
    """name -> script -> (text, marked scripts) of every top-level function and class."""
    found = {}
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                comment, line = [], first - 2
                while line >= 0 and lines[line].startswith("#"):
                    comment.insert(0, lines[line].lstrip("# "))
                    line -= 1
                mark = re.search(r"Same in: (.*)", " ".join(comment))
                body = "\n".join(lines[first - 1 : node.end_lineno])
                found.setdefault(node.name, {})[path.name] = (body, mark[1] if mark else "")
    return found


def test_there_are_nine_scripts_and_none_imports_another():
    names = {path.stem for path in SCRIPTS}
    assert len(names) == 9
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                imported = {(node.module or "").split(".")[0]}
            assert not imported & (names - {"evaluate"}), f"{path.name} imports another script"


def test_helpers_of_one_name_are_the_same_in_every_script():
    faults = []
    for name, copies in helpers().items():
        if len(copies) == 1:
            continue
        if len({body for body, _ in copies.values()}) > 1:
            faults.append(f"{name} differs between {', '.join(copies)}")
        for script, (_, mark) in copies.items():
            named = SCRIPTS and (
                {path.name for path in SCRIPTS} if mark == "all nine scripts" else set(mark.split(", "))
            )
            if named != set(copies):
                faults.append(f"{script}: above {name} stands 'Same in: {mark}', it is in {', '.join(copies)}")
    assert not faults, "\n".join(faults)


def test_constants_of_one_name_are_the_same_in_every_script():
    """PROBE decides a fingerprint and NF4 the weights: training and use must not drift apart there either."""
    found = {}
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, {})[path.name] = ast.unparse(node.value)
    shared = {name: copies for name, copies in found.items() if len(copies) > 1 and name not in OWN}
    assert {"PROBE", "NF4"} <= set(shared)
    assert [name for name, copies in shared.items() if len(set(copies.values())) > 1] == []


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS if ">>>" in path.read_text(encoding="utf-8")])
def test_the_examples_in_docstrings_are_true(script):
    assert doctest.testmod(load_script(script)).failed == 0
