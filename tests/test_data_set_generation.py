"""The large mix: whole builds on small rows in the hub's schemas, keywords, and HTML as Markdown."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script, write_jsonl

DATA = Path(__file__).parent / "data"
MIX = "mixed_finetune_dataset.jsonl"
script, training = load_script("data_set_generation"), load_script("qwen_finetuning")
STACK = [json.loads(line) for line in (DATA / "stackexchange.jsonl").read_text(encoding="utf-8").splitlines()]


def sources(stack=DATA / "stackexchange.jsonl", orca=DATA / "slimorca.jsonl") -> list:
    flags = ["--my_report_data_path", ROOT / "my_dataset.json", "--pubmed_data_path", DATA / "pubmedqa.jsonl"]
    return [*flags, "--orca_data_path", orca, "--stackexchange_data_path", stack]


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def build(tmp_path, monkeypatch, capsys):
    """Run the script in this process, in an empty folder: (rows, rejects, cells by share and source)."""
    monkeypatch.chdir(tmp_path)

    def build(*args):
        script.main(script.parse_args([str(arg) for arg in args]))
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].endswith(f"next: python qwen_finetuning.py --dataset_path {MIX}")
        table = {tuple(line.split()[:2]): line.split()[2:] for line in lines[:-1]}
        return read(MIX), read(f"{MIX}.rejected.jsonl"), table

    return build


def test_a_build_of_everything(build):
    rows, rejects, table = build(*sources(), "--total_samples", 100)
    assert table["share", "source"] == ["asked", "found", "rejected", "duplicate", "written"] and not rejects
    assert table["my_reports", "my_reports"] == ["10", "30", "0", "0", "30"]  # the others are short
    assert table["bio", "pubmed"][1:] == ["6", "0", "0", "6"] and table["orca", "orca"][-1] == "12"
    assert table["bio", "stackexchange"][-1] == "2"  # of ten posts one fits no domain, one has no good answer
    assert int(table["ai", "stackexchange"][-1]) + int(table["ic", "stackexchange"][-1]) == 6
    assert len(rows) == 56 and all(training.messages_of(row) for row in rows)
    by_text = {row.get("instruction"): row for row in rows}
    assert by_text["What does a *neural network* learn in its first layer?"] == {
        "instruction": "What does a *neural network* learn in its first layer?",
        "input": "",
        "output": "Mostly **edges**, see this paper.",  # the accepted answer
        "source": "HuggingFaceH4/stack-exchange-preferences https://ai.stackexchange.com/questions/1 "
        "question by https://ai.stackexchange.com/users/77, "
        "answer by Ann1 https://ai.stackexchange.com/users/1, CC BY-SA",
    }
    code = "Why does gradient descent diverge here?\n\n```\nlr = 10\nif loss < best:\n    best = loss\n```"
    assert (
        by_text[code]["output"] == "The rate is far too high:\n\n- try 0.1\n- then 0.01"
    )  # score "10" beats "2"
    assert by_text["How long is the human genome?"]["output"] == "About 3.1 × 10^9 base pairs."
    names = [
        row["source"]
        for row in build(*sources(), "--ratios", "bio=0.5", "orca=0.5", "--total_samples", 12)[0]
    ]
    assert names[:2] * 6 != names and sorted(names)[5:7] == ["pubmedqa.jsonl", "slimorca.jsonl"]  # shuffled
    more, _, _ = build(*sources(), "--total_samples", 100, "--min_score", 1)
    assert len(more) == 57 and any("stable at 60" in row.get("instruction", "") for row in more)


def test_ratios_gap_and_the_scarcer_domain(build):
    posts = [post for post in STACK if post["qid"] in (1, 2, 3, 4, 6)]  # three AI, one IC, one both
    flags = sources(write_jsonl(Path("posts.jsonl"), [*posts, posts[0]]))
    _, _, table = build(*flags, "--ratios", "ai=0.5", "ic=0.5", "--total_samples", 9)
    assert (table["ai", "stackexchange"][-2:], table["ic", "stackexchange"][-1]) == (["1", "3"], "2")
    _, _, table = build(*flags, "--ratios", "orca=0.2", "ai=0.2", "my_reports=0.6", "--total_samples", 40)
    written = [table[name][-1] for name in (("orca", "orca"), ("ai", "stackexchange"), ("my_reports",) * 2)]
    assert written == ["9", "4", "27"]  # four of the eight that AI asked are there; 36 others, three to one


def test_same_bytes_parts_and_systems(build, monkeypatch):
    flags, rows_of, asked = [*sources(), "--total_samples", 60], script.rows_of, []
    monkeypatch.setattr(script, "rows_of", lambda *args, **_: asked.append(args) or rows_of(*args))
    outputs = [Path(MIX).read_bytes() for seed in (1, 1, 2) if build(*flags, "--seed", seed)]
    assert outputs[0] == outputs[1] != outputs[2] and len(asked) == 8  # four sources, once for each seed
    rows, _, _ = build(*flags, "--system", "drop")
    turns = [turn for row in rows for turn in row.get("conversations", ())]
    assert {turn["from"] for turn in turns} == {"human", "gpt"}
    assert {turn["weight"] for turn in turns if turn["from"] == "gpt"} == {1.0}
    asked.clear()
    build(
        *flags, "--ratios", "orca=1", "--total_samples", 3, "--seed", 7
    )  # stops before the end of the source
    assert not list(Path("data/parts").glob("*.new"))
    build(*flags, "--ratios", "orca=1", "--total_samples", 3, "--seed", 7)
    assert len(asked) == 2


def test_bad_rows_are_named_and_good_ones_kept(build):
    holes = [None, 3, {}, [[]], "\ud800 AI", {"text": None}]
    bad = [STACK[0] | {key: hole} for key in ("question", "answers", "metadata") for hole in holes]
    text = "".join(json.dumps(row) + "\n" for row in bad) + "{cut\n"
    Path("posts.jsonl").write_text(text + "".join(json.dumps(row) + "\n" for row in STACK))
    rows, rejects, _ = build(*sources("posts.jsonl"), "--total_samples", 100)
    assert len(rows) == 56 and sorted(reject["line"] for reject in rejects) == list(range(1, len(bad) + 2))
    assert all(reject["file"] == "posts.jsonl" and reject["reason"] for reject in rejects)
    Path("orca.jsonl").write_text('{"conversations": [{"from": "human", "value": "x"}]}\n{"a": 1}\n')
    with open("orca.jsonl", "a") as file:
        file.write('{"prompt": "q", "completion": "a"}\n')  # a shape that training reads
    rows, rejects, _ = build(*sources(orca="orca.jsonl"), "--total_samples", 100)
    assert {"source": "orca.jsonl", "prompt": "q", "completion": "a"} in rows
    reasons = {reject["line"]: reject["reason"] for reject in rejects}
    assert reasons[1].startswith("an answer is missing") and "its keys are" in reasons[2]


def test_the_hub_streams_and_sites_with_a_domain_come_first(build, monkeypatch):
    import datasets

    sites = [Path(f"data/{site}.stackexchange.com/train.jsonl").absolute() for site in ("ai", "cooking")]
    for path in sites:
        path.parent.mkdir(parents=True)
        write_jsonl(path, [STACK[0] | {"question": f"<p>AI {path.parent.name} {n}</p>"} for n in range(2500)])
    files, make = {"train": list(map(str, sites))}, datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: make("json", data_files=files))
    rows, _, _ = build(*sources("Org/Set"), "--ratios", "ai=1", "--total_samples", 40)
    numbers = [int(row["instruction"].split()[-1]) for row in rows]
    assert len(rows) == 40 and not any("cooking" in row["instruction"] for row in rows)
    assert 100 < max(numbers) < 2000  # shuffled within a buffer
    rows, _, _ = build(*sources("Org/Set"), "--ratios", "ai=1", "--total_samples", 5000)
    assert len(rows) == 5000


def test_edited_keywords_and_a_file_of_them_act(build, tmp_path):
    words = {"ai": ["milk", "C++"], "ic": ["湿度"], "bio": []}
    Path("k.json").write_text(json.dumps(words), encoding="utf-8")
    flags = [*sources(), "--ratios", "ai=1", "--total_samples", 9]
    rows, _, _ = build(*flags, "--keywords", "k.json")
    assert [row["instruction"] for row in rows] == ["Does boiling kill bacteria in milk?"]
    text = (ROOT / "data_set_generation.py").read_text(encoding="utf-8")
    edited = re.sub(r"KEYWORDS = \{.*?\n\}", f"KEYWORDS = {words!r}", text, flags=re.S)
    Path("edited.py").write_text(edited.replace("= 240_000", "= 7"), encoding="utf-8")
    subprocess.run([sys.executable, "edited.py", *map(str, flags[:-2])], check=True, capture_output=True)
    assert read(MIX) == rows


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ratios", "ai=0.5"], "sum 1"),
        (["--ratios", "ai=1", "junk"], "use name=number with my_reports, orca, bio, ai, ic"),
        (["--keywords", "k.json"], "expected lists of words ai, ic, bio"),
        (["--keywords", "mine.jsonl"], "expected lists of words ai, ic, bio, not {'a': 1}"),
        (["--total_samples", "0"], "--total_samples must be 1 or more"),
        (
            ["--output_file", "mine.jsonl", "--stackexchange_data_path", "mine.jsonl", "--ratios", "bio=1"],
            "mine.jsonl is, or lies in, a source",
        ),
        (["--stackexchange_data_path", "No/where"], "Couldn't reach 'No/where' on the Hub"),
        (
            ["--stackexchange_data_path", "no.jsonl", "--ratios", "ai=1"],
            "No such file or directory: 'no.jsonl'",
        ),
        (["--orca_data_path", "mine.jsonl", "--ratios", "orca=1"], "no row is of use"),
    ],
)
def test_faults_are_one_line_and_change_nothing(build, args, words):
    Path("mine.jsonl").write_text('{"a": 1}\n')
    Path("k.json").write_text('{"ai": ["x"]}')
    Path(MIX).write_text("old")
    with pytest.raises((OSError, ValueError), match=words):
        build(*sources(), *args)
    assert Path(MIX).read_text() == "old" and Path("mine.jsonl").read_text() == '{"a": 1}\n'


WORDS = {"sign": ["C++", ".NET", "C#", "Node.js"], "abc": ["IC", "gene", "op amp", " "], "cjk": ["芯片"]}
MATCHES = {"learn C++.": "sign", "(C++)": "sign", "the .NET runtime": "sign", "in .NET.": "sign",
    "用C#写": "sign", "F#/C#": "sign", "Node.js": "sign", "An IC.": "abc", "The Gene": "abc", "op-amp": "abc",
    "IC芯片": "abc cjk", "vitamin C, NET profit": "", "C++11 or c++ or C+++": "", "Nodexjs": "", "ic": "",
    "ASP.NET, .network, .net, ..NET": "", "A topic: ICONIC": "", "generic": "", "": ""}  # fmt: skip


def test_keywords_match_whole_words_in_their_spelling():
    find = script.domain_finder(WORDS)
    assert {text: " ".join(find(text)) for text in MATCHES} == MATCHES


def test_a_links_address_is_no_keyword_and_no_post_is_converted_before_it_matches(monkeypatch):
    monkeypatch.setattr("markdownify.markdownify", lambda *_, **__: pytest.fail("converted"))
    post = STACK[8] | {"question": "<p>See <a href='http://x.org/AI/genome'>this</a></p>"}
    assert script.from_stackexchange(post, script.domain_finder(script.KEYWORDS), 2) == ([], {})


POST = """<p><img src="a.png" alt="a">Use <a href="http://x">the <b>fast</b> one</a>: <code>a_b*c</code></p>
<pre class="lang-py"><code>if a &lt; b:
    x = "*1*"   # [2]


</code></pre>
<p>$a_1*b*c$ and \\[x\\], 3 &gt; 2, H<sub>2</sub>O</p>
<ul><li>one</li><li>two<ol><li>deep</li></ol></li></ul><h2>Head</h2><blockquote><p>said</p></blockquote>"""
MARKDOWN = """Use the **fast** one: `a_b*c`

```
if a < b:
    x = "*1*"   # [2]
```

$a_1*b*c$ and \\[x\\], 3 > 2, H_2O

- one
- two
  1. deep

## Head

> said"""


def test_a_post_as_markdown():
    assert script.markdown_of(POST) == MARKDOWN and script.markdown_of("<p><img src='a'></p>") == ""
