"""The two READMEs against the scripts: commands parse, links exist, tables equal the settings.

    python tests/test_readme.py --write        # make the tables of options and of memory anew, in both files

In README.zh-CN.md the meaning of an option is written by hand, in Chinese; `--write` keeps it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import ROOT, load_script, run_script


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
READMES = ("README.md", "README.zh-CN.md")
# What a reader has made before the command that names it.
MADE_BEFORE = {
    "configs/finetune_my_task.yaml": text_of("configs/finetune.yaml"),
    "Qwen_finetuning_model/resolved.yaml": text_of("configs/finetune_reference.yaml"),
    "my_keywords.json": '{"ai": ["neural network"], "ic": ["CMOS"], "bio": ["genome"]}',
}
CHINESE = re.compile("[\u4e00-\u9fff]")
HEADS = {
    "README.md": ("| option | default | what |", "| model | weights | full, float32 | LoRA, 16 bit | QLoRA, 4 bit |"),
    "README.zh-CN.md": ("| 选项 | 默认 | 含义 |", "| 模型 | 参数量 | 全量，float32 | LoRA，16 位 | QLoRA，4 位 |"),
}
# hidden, intermediate, layers, query width, key-value width, vocabulary, whether head and embedding share weights
MODELS = {
    "SmolLM2-135M": (576, 1536, 30, 576, 192, 49152, True),
    "Qwen1.5-0.5B": (1024, 2816, 24, 1024, 1024, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 1536, 256, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 3584, 512, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 5120, 1024, 152064, False),
    "Qwen2.5-32B": (5120, 27648, 64, 5120, 1024, 152064, False),
    "Qwen2.5-72B": (8192, 29568, 80, 8192, 1024, 152064, False),
}


# ------------------------------------------------------------------------------------------- the tables


def settings_class(script: str) -> type:
    """The dataclass that a script's flags are made from."""
    module = load_script(Path(script).stem)
    return next(getattr(module, name) for name in ("CliConfig", "FinetuneConfig", "Config") if hasattr(module, name))


def options(script: str) -> list[tuple[str, str, str]]:
    """(option, default, help) of each setting, as they stand in a table.

    >>> options("merge_model.py")[1]
    ('--output', 'models/merged', 'folder of the merged model')
    """
    kinds, rows = get_type_hints(settings_class(script)), []
    for f in fields(settings_class(script)):
        flag = f.metadata.get("flag", f.name)
        choices = f.metadata.get("choices")
        option = f"--{flag}" + (f" {{{','.join(choices)}}}" if choices else "")
        if kinds[f.name] in (bool, bool | None):
            option = f"--{flag}, --no-{flag}"
        default = " ".join(f.default) if isinstance(f.default, tuple) else str(f.default)
        rows.append((option, default, f.metadata["help"]))
    return rows


def option_table(readme: str, script: str, meanings: dict[str, str]) -> str:
    """The table of a script's options; `meanings` takes the place of the help where it knows the option."""
    lines = [HEADS[readme][0], "|---|---|---|"]
    for option, default, help in options(script):
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{option}` | {shown} | {meanings.get(option, help)} |")
    return "\n".join(lines)


def shape(name: str, r: int = 16):
    """The sizes of one of MODELS, as qwen_finetuning.py reads them from a model's configuration."""
    hidden, intermediate, layers, q, kv, vocabulary, tied = MODELS[name]
    matrices = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]
    matrices += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return load_script("qwen_finetuning").ModelShape(
        linear=layers * sum(a * b for a, b in matrices),
        other=vocabulary * hidden * (1 if tied else 2),
        adapter=layers * r * sum(a + b for a, b in matrices),
        largest=hidden * intermediate,
        layers=layers,
        heads=q // 64,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
    )


def memory_table(readme: str) -> str:
    """GB of memory by model and method: the script's own estimate for one row of 1,024 tokens, activations computed
    twice; and 16 bytes a weight for full fine-tuning, activations not counted."""
    qwen = load_script("qwen_finetuning")
    lines = [HEADS[readme][1], "|---|---|---|---|---|"]
    for name in MODELS:
        sizes, cells = shape(name), []
        weights = sizes.linear + sizes.other
        for four_bit in (False, True):
            device = qwen.device_policy("cuda", True, False, four_bit)
            config = qwen.FinetuneConfig(load_in_4bit=four_bit)
            cells.append(f"{sum(qwen.estimate_memory(sizes, config, device, 1024, True).values()) / 1e9:.1f}")
        size = f"{weights / 1e9:.2f}".rstrip("0").rstrip(".") if weights < 1e10 else f"{weights / 1e9:.1f}"
        lines.append(f"| {name} | {size} B | {16 * weights / 1e9:,.0f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def with_tables(readme: str) -> str:
    """The text of a README with its tables as they should be."""

    def table(found: re.Match) -> str:
        name, old = found[1], found[2]
        if name == "memory":
            new = memory_table(readme)
        else:
            meanings = {}
            if readme != "README.md":
                meanings = dict(re.findall(r"^\| `(--[^`]*)` \|[^|]*\| (.*) \|$", old, re.M))
            new = option_table(readme, name, meanings)
        return f"<!-- table: {name} -->\n{new}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n(.*?)\n?<!-- end -->", table, text_of(readme), flags=re.S)


@pytest.mark.parametrize("readme", READMES)
def test_the_tables_are_those_of_the_scripts(readme):
    text = text_of(readme)
    assert sorted(re.findall(r"<!-- table: (\S+) -->", text)) == sorted([*SCRIPTS, "memory"])
    assert text == with_tables(readme), "run: python tests/test_readme.py --write"


def test_each_option_is_explained_in_chinese():
    tables = re.findall(r"<!-- table: \S+\.py -->\n(.*?)<!-- end -->", text_of("README.zh-CN.md"), re.S)
    rows = [row for table in tables for row in table.splitlines()[2:]]
    assert len(rows) > 100 and [row for row in rows if not CHINESE.search(row.split("|")[-2])] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_table_says(script, tmp_path):
    shown = run_script(script, "--help", cwd=tmp_path, env={"COLUMNS": "400"}).stdout.partition("\noptions:")[2]
    said = " ".join(shown.split())
    for option, default, help in options(script):
        assert " ".join(f"{help} (default: {default})".split()) in said.replace("(default: )", "(default: )"), option
    flags = set(re.findall(r"^  (?:-h, )?(--[^\n]*?)(?:  |\n)", shown, re.M))
    assert {re.match(r"--\w+", flag)[0] for flag in flags} == {
        re.match(r"--\w+", option)[0] for option, _, _ in options(script)
    } | {"--help"}


def test_the_memory_estimate_knows_the_real_sizes():
    assert shape("Qwen2.5-7B").linear == 6_525_288_448 and shape("Qwen2.5-7B").adapter == 40_370_176


# ------------------------------------------------------------------------------------------ the commands


def commands(readme: str) -> list[str]:
    """Each command in a README's code, without its comment; a line that ends in a backslash goes on."""
    text = text_of(readme)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    blocks = [block for language, block in blocks if language in ("", "bash")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in lines:
        line = " ".join(re.sub(r"\s#\s.*", "", line).split())
        if re.search(r"(python3?|torchrun|accelerate launch|deepspeed) .*\w\.py\b", line) and "..." not in line:
            found.append(line)
    return found


def parsed(command: str) -> tuple[list[str], str, list[str]]:
    """(what stands before the script, the script, its arguments) of one command.

    >>> parsed("CUDA_VISIBLE_DEVICES=1 torchrun --nproc_per_node=4 qwen_finetuning.py --lora_r 32")
    (['torchrun', '--nproc_per_node=4'], 'qwen_finetuning.py', ['--lora_r', '32'])
    """
    command = re.sub(r"^.*?(?:&&|\|) (?=python|torchrun|accelerate|deepspeed)", "", command)
    words = shlex.split(command.partition(" > ")[0].partition(" 2> ")[0])
    while re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[:place], words[place], words[place + 1 :]


@pytest.mark.parametrize("readme", READMES)
def test_each_command_parses(readme, monkeypatch, capsys, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name, text in MADE_BEFORE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    seen, lines = set(), commands(readme)
    for line in lines:
        before, script, arguments = parsed(line)
        assert before and before[0] in ("python", "torchrun", "accelerate", "deepspeed"), line
        if script.startswith("llama.cpp/"):  # not of this project
            continue
        assert (ROOT / script).is_file(), line
        seen.add(script)
        if script not in SCRIPTS:  # a benchmark or this file: its flags stand in its text
            assert all(word in text_of(script) for word in arguments if word.startswith("--")), line
            continue
        try:
            load_script(Path(script).stem).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")
    assert set(SCRIPTS) <= seen and len(lines) > 40


def test_the_launchers_know_their_flags():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    seen = set()
    for line in {line for readme in READMES for line in commands(readme)}:
        before, script, arguments = parsed(line)
        if before[0] == "torchrun":
            got = get_args_parser().parse_args([*before[1:], script, *arguments])
            assert got.training_script == script and got.training_script_args == arguments, line
        elif before[0] == "accelerate":
            got = launch_command_parser().parse_args([*before[2:], script, *arguments])
            assert got.training_script == script and got.training_script_args == arguments, line
        elif before[0] == "deepspeed":
            assert all(re.match(r"--num_gpus=\d+$|--num_nodes=\d+$|--hostfile", word) for word in before[1:]), line
        seen.add(before[0])
    assert seen == {"python", "torchrun", "accelerate", "deepspeed"}


@pytest.mark.parametrize("readme", READMES)
def test_it_opens_with_the_two_commands(readme):
    block = re.search(r"^```\w*\n(.*?)^```", text_of(readme), re.M | re.S)[1]
    assert block.splitlines() == [
        "pip install -r requirements.txt && python qwen_finetuning.py --demo",
        "pip install -r requirements.txt && pytest",
    ]


# ------------------------------------------------------------------------------- links, sections, examples


def headings(text: str) -> list[tuple[str, str]]:
    """(level, title) of each heading that stands outside of code."""
    return re.findall(r"^(#+) (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading.

    >>> slug("`chat.py`: a conversation")
    'chatpy-a-conversation'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("file", [*READMES, "CONTRIBUTING.md"])
def test_each_local_link_and_picture_exists(file):
    text = text_of(file)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    anchors = {slug(title) for _, title in headings(text)}
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("readme", READMES)
def test_each_file_of_the_project_that_is_named_exists(readme):
    for name in re.findall(r"`((?:configs|templates|tests|benchmarks|docs)/[\w./-]+)`", text_of(readme)):
        assert (ROOT / name).exists() or name in MADE_BEFORE, name


def test_both_have_the_same_sections_commands_and_pictures():
    english, chinese = map(text_of, READMES)
    first, second = headings(english), headings(chinese)
    assert [level for level, _ in first] == [level for level, _ in second]
    for (_, one), (_, two) in zip(first, second, strict=True):
        assert re.findall(r"`[^`]+`", one) == re.findall(r"`[^`]+`", two), (one, two)
        assert CHINESE.search(two) or one == two, two
    assert commands(READMES[0]) == commands(READMES[1])
    pictures = [re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) for text in (english, chinese)]
    assert pictures[0] == pictures[1] and len(pictures[0]) >= 2


@pytest.mark.parametrize("readme", READMES)
def test_the_example_records_are_good_ones(readme):
    qwen = load_script("qwen_finetuning")
    shapes = set()
    for block in re.findall(r"^```json\n(.*?)^```", text_of(readme), re.M | re.S):
        for line in block.splitlines():
            record = json.loads(line)
            messages = qwen.messages_of(record)
            assert messages[-1]["role"] == "assistant"
            shapes.add(tuple(sorted(record.keys() - {"system", "source"})))
    assert len(shapes) >= 5


if __name__ == "__main__" and "--write" in sys.argv:
    for readme in READMES:
        text = with_tables(readme)  # read and made before the file is opened for writing
        (ROOT / readme).write_text(text, encoding="utf-8", newline="\n")
