"""No shared module: what several scripts need is the same text in each, marked `# Same in:`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
# Each script's own by design: the entry points, and the names that the lessons are documented with.
OWN = {"main", "parse_args", "Config", "CliConfig", "FinetuneConfig", "load_dataset", "format_example"}
OWN |= {"tokenize_dataset", "tokenize", "build_dataset", "run_training", "TOTAL_SAMPLES", "RATIOS"}


def helpers() -> dict[str, dict[str, tuple[str, str]]]:
    """name -> script -> (text, marked scripts) of every function and class at the top level."""
    found = {}
    for path in SCRIPTS:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                mark = re.search(r"# Same in: (.*)", lines[first - 2])
                if node.name in OWN and not mark:
                    continue
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
    faults, everywhere = [], {path.name for path in SCRIPTS}
    for name, copies in helpers().items():
        if len({body for body, _ in copies.values()}) > 1:
            faults.append(f"{name} differs between {', '.join(copies)}")
        for script, (_, mark) in copies.items():
            named = everywhere if mark == "all nine scripts" else set(filter(None, mark.split(", ")))
            if named != (set(copies) if len(copies) > 1 else set()):
                faults.append(f"{script}: {name} is marked {mark!r} and stands in {', '.join(copies)}")
    assert not faults, "\n".join(faults)


def test_copies_are_few():
    copied = sum(
        sum(body.count("\n") + 1 for body, _ in list(copies.values())[1:])
        for copies in helpers().values()
        if len(copies) > 1
    )
    assert copied * 8 <= sum(path.read_text(encoding="utf-8").count("\n") for path in SCRIPTS)


def test_constants_of_one_name_are_the_same_in_every_script():
    found = {}
    for path in SCRIPTS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, {})[path.name] = ast.unparse(node.value)
    shared = {
        name: set(copies.values()) for name, copies in found.items() if len(copies) > 1 and name not in OWN
    }
    assert [name for name, values in shared.items() if len(values) > 1] == []


def test_help_imports_nothing_heavy_and_shows_every_default():
    """--help answers at once since torch and its like are imported where they are used."""
    for path in SCRIPTS:
        code = "import sys, runpy; sys.argv = ['x', '--help']\ntry: "
        code += f"runpy.run_path({str(path)!r}, run_name='__main__')\nexcept SystemExit: "
        code += "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert process.stdout.rstrip().endswith("[]"), (
            path.name,
            process.stdout[-200:],
            process.stderr[-500:],
        )
        assert process.stdout.count("(default: ") >= 4
