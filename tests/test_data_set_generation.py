"""The large mix: HTML to Markdown, keywords and domains, and whole builds on small rows in the hub's schemas."""

from __future__ import annotations

import doctest
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parent / "data"
SCRIPT = "data_set_generation.py"
script = load_script("data_set_generation")
STACK = [json.loads(line) for line in (DATA / "stackexchange.jsonl").read_text(encoding="utf-8").splitlines()]


def sources(stackexchange: Path | str = DATA / "stackexchange.jsonl") -> list:
    pairs = {
        "my_report": ROOT / "my_dataset.json",
        "orca": DATA / "slimorca.jsonl",
        "pubmed": DATA / "pubmedqa.jsonl",
        "stackexchange": stackexchange,
    }
    return [word for name, path in pairs.items() for word in (f"--{name}_data_path", path)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def build(cwd: Path, *args) -> tuple[list[dict], dict[tuple[str, str], list[str]]]:
    """Run the script; returns the rows and the figures of the table by (share, source)."""
    process = run_script(SCRIPT, *args, cwd=cwd)
    assert process.returncode == 0, process.stderr
    table = [line.split() for line in process.stdout.splitlines()]
    return read(cwd / "mixed_finetune_dataset.jsonl"), {tuple(line[:2]): line[-4:] for line in table}


# ------------------------------------------------------------------------------------------- whole builds


def test_a_build_of_everything(tmp_path):
    rows, table = build(tmp_path, *sources(), "--total_samples", 100)
    assert len(rows) == 30 + 12 + 6 + 8  # of ten posts one fits no domain, and one has no answer that is good enough
    for row in rows:
        assert script.messages_of(row)
    # found, rejected, duplicate, written
    assert table["my_reports", "my_reports"] == ["30", "0", "0", "30"]
    assert table["orca", "orca"] == ["12", "0", "0", "12"]
    assert table["bio", "pubmed"] == ["6", "0", "0", "6"]
    assert table["bio", "stackexchange"] == ["2", "0", "0", "2"]
    assert int(table["ai", "stackexchange"][3]) + int(table["ic", "stackexchange"][3]) == 6
    assert table["total", "100"] == ["56", "0", "0", "56"]
    by_text = {row.get("instruction"): row for row in rows}
    accepted = by_text["What does a *neural network* learn in its first layer?"]
    assert accepted == {
        "instruction": "What does a *neural network* learn in its first layer?",
        "input": "",
        "output": "Mostly **edges**, see this paper.",
        "source": "HuggingFaceH4/stack-exchange-preferences https://ai.stackexchange.com/questions/1 "
        "question by https://ai.stackexchange.com/users/77, "
        "answer by Ann1 https://ai.stackexchange.com/users/1, CC BY-SA",
    }
    code = by_text["Why does gradient descent diverge here?\n\n```\nlr = 10\nif loss < best:\n    best = loss\n```"]
    assert code["output"] == "The rate is far too high:\n\n- try 0.1\n- then 0.01"  # "10" beats "2": numbers, not text
    assert by_text["How long is the human genome?"]["output"] == "About 3.1 × 10^9 base pairs."
    assert not any("recipes" in (row.get("instruction") or "") for row in rows)


def test_min_score_lets_more_answers_in(tmp_path):
    rows, _ = build(tmp_path, *sources(), "--total_samples", 100, "--min_score", 1)
    assert any(row.get("instruction") == "Is this protein stable at 60 degrees?" for row in rows)


def test_a_row_of_two_domains_goes_to_the_scarcer(tmp_path):
    posts = [post for post in STACK if post["qid"] in (1, 2, 3, 4, 6)]  # three AI, one IC, one both
    path = write_jsonl(tmp_path / "posts.jsonl", posts)
    _, table = build(tmp_path, *sources(path), "--ratios", "ai=0.5", "ic=0.5", "--total_samples", 5)
    assert (table["ai", "stackexchange"][3], table["ic", "stackexchange"][3]) == ("3", "2")


def test_sites_that_hold_a_domain_are_read_first(tmp_path):
    from datasets import Dataset

    for site in (
        "ai.stackexchange.com",
        "biology.stackexchange.com",
        "cooking.stackexchange.com",
        "aviation.stackexchange.com",
    ):
        folder = tmp_path / "se" / "data" / site
        folder.mkdir(parents=True)
        rows = [
            {**STACK[0], "question": f"<p>AI question {n} at {site}</p>", "metadata": [f"https://{site}/questions/{n}"]}
            for n in range(20)
        ]
        Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    args = [*sources("se"), "--ratios", "ai=1", "--total_samples"]
    rows, _ = build(tmp_path, *args, 40)
    assert {row["source"].split("/")[3] for row in rows} == {"ai.stackexchange.com", "biology.stackexchange.com"}
    rows, _ = build(tmp_path, *args, 80)
    assert len({row["source"].split("/")[3] for row in rows}) == 4


def test_the_seed_decides(tmp_path):
    outputs = []
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        build(tmp_path, *sources(), "--total_samples", 20, "--seed", seed, "--parts_dir", name)
        outputs.append((tmp_path / "mixed_finetune_dataset.jsonl").read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


def test_bad_rows_are_named_and_good_ones_kept(tmp_path):
    holes = [None, 3, [], {}, [[]], "\ud800 AI", {"text": None}]
    bad = [{**STACK[0], key: hole} for key in ("question", "answers") for hole in holes]
    bad = [row for row in bad if row["answers"] != []]  # no answer at all is no fault
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in bad) + "{cut\n", encoding="ascii")
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in STACK)
    rows, table = build(tmp_path, *sources(path), "--total_samples", 100)
    assert len(rows) == 56
    rejected = read(tmp_path / "mixed_finetune_dataset.jsonl.rejected.jsonl")
    assert sorted(row["line"] for row in rejected) == list(range(1, len(bad) + 2))
    assert {row["file"] for row in rejected} == {str(path)} and all(row["reason"] for row in rejected)
    assert table["total", "100"][1] == str(len(rejected))


def test_own_keywords(tmp_path):
    (tmp_path / "k.json").write_text('{"ai": ["milk"], "ic": ["湿度"], "bio": []}', encoding="utf-8")
    rows, table = build(tmp_path, *sources(), "--keywords", "k.json", "--ratios", "ai=1", "--total_samples", 9)
    assert [row["instruction"] for row in rows] == ["Does boiling kill bacteria in milk?"]
    wrong = ("[1]", '{"ai": ["x"]}', '{"ai": ["x"], "ic": [1], "bio": []}', '{"ai": ["C++"], "ic": [], "bio": []}', "{")
    for content in wrong:
        (tmp_path / "k.json").write_text(content)
        process = run_script(SCRIPT, "--keywords", "k.json", cwd=tmp_path)
        assert process.returncode == 2 and "--keywords k.json" in process.stderr and "Traceback" not in process.stderr


def test_without_network_and_local_sources(tmp_path):
    output = tmp_path / "mixed_finetune_dataset.jsonl"
    output.write_text("old")
    process = run_script(SCRIPT, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert process.returncode == 1 and output.read_text() == "old" and "Traceback" not in process.stderr
    faults = [line for line in process.stderr.splitlines() if "Pass --" in line]
    assert len(faults) == 4 and "Pass --stackexchange_data_path with a local file or folder" in faults[3]


def test_sigkill_in_a_build_with_domains(tmp_path):
    posts = [{**STACK[n % 8], "question": f"<p>Post {n}.</p>" + STACK[n % 8]["question"]} for n in range(5000)]
    args = [*sources(write_jsonl(tmp_path / "posts.jsonl", posts)), "--total_samples", 4000]
    output, moments = tmp_path / "mixed_finetune_dataset.jsonl", random.Random(5)
    started = time.monotonic()
    build(tmp_path, *args, "--parts_dir", "undisturbed")
    duration, expected = time.monotonic() - started, output.read_bytes()
    output.write_text("old")
    for _ in range(6):
        command = [sys.executable, str(ROOT / SCRIPT), *map(str, args)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, 0.9) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert output.read_bytes() in (b"old", expected)
    build(tmp_path, *args)
    assert output.read_bytes() == expected


# ---------------------------------------------------------------------------------------------- keywords


@pytest.mark.parametrize(
    ("text", "domains"),
    [
        ("A topic to maintain", ()),
        ("ICONIC AIM, said j'ai", ()),
        ("An IC.", ("ic",)),
        ("The AI-based tool", ("ai",)),
        ("AI芯片", ("ai", "ic")),
        ("用人工智能设计", ("ai",)),
        ("Machine\n learning", ("ai",)),
        ("machine-learning", ("ai",)),
        ("amachine learning", ()),
        ("Proteins and GENES", ("bio",)),
        ("proteinsynthesis", ()),
        ("é un IC", ("ic",)),
        ("ICône", ()),
        ("", ()),
    ],
)
def test_keywords_match_whole_words(text, domains):
    assert (
        script.KeywordMatcher({name: list(words) for name, words in script.KEYWORDS.items()}).domains(text) == domains
    )


def test_a_links_address_is_no_keyword():
    row = {**STACK[8], "question": "<p>See <a href='http://x.org/AI/genome'>this</a></p>"}
    matcher = script.KeywordMatcher({name: list(words) for name, words in script.KEYWORDS.items()})
    assert script.convert_stackexchange(row, matcher, 2) is None


# --------------------------------------------------------------------------------------------- Markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("plain &amp; simple", "plain & simple"),
        ("<p>one</p>\n\n<p>two  spaces\nline</p>", "one\n\ntwo spaces line"),
        ("a<br>b<br/> c", "a\nb\nc"),
        ("<p><b>bold </b>x <em>y</em> <s>z</s></p>", "**bold** x *y* ~~z~~"),
        ('<p><a href="http://x.y">text <code>c</code></a></p>', "text `c`"),
        ("<p>H<sub>2</sub>O, 10<sup>-3</sup></p>", "H_2O, 10^-3"),
        ('<p><img src="a.png" alt="enter image description here">t</p>', "t"),
        ("<h2>Head</h2><hr>", "## Head\n\n---"),
        ("<pre><code>if a &lt; b:\n\n\n    x = 1  \n</code></pre>", "```\nif a < b:\n\n\n    x = 1\n```"),
        ('<pre class="lang-py prettyprint"><code>x</code></pre>', "```py\nx\n```"),
        ("<pre>```\nx\n```</pre>", "````\n```\nx\n```\n````"),
        ("<p><code>a`b</code> <code>`</code></p>", "``a`b`` `` ` ``"),
        ("<a href='u'>see<pre>  code\n    in</pre></a>", "see\n\n```\n  code\n    in\n```"),
        ("<ul><li>a</li><li>b<ol><li>c</li><li>d</li></ol></li></ul>", "- a\n- b\n  1. c\n  2. d"),
        ("<ol start='3'><li><p>a</p></li><li><p>b</p><pre>c</pre></li></ol>", "3. a\n\n4. b\n\n   ```\n   c\n   ```"),
        ("<ul>a<li>b</li>c<li>d</li></ul>", "a\n- b\nc\n- d"),
        ("<blockquote><p>a</p><p>b</p></blockquote>", "> a\n>\n> b"),
        ("<blockquote><pre>a\n\n\nb</pre></blockquote>", "> ```\n> a\n>\n>\n> b\n> ```"),
        ("<table><tr><td>a|b</td><td>c</td></tr></table>", "| a\\|b | c |\n| --- | --- |"),
        (
            "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
            "| a | b |\n| --- | --- |\n| 1 | 2 |",
        ),
        ("<table><caption>t</caption><tr><td>a</td></tr></table>", "t\n\n| a |\n| --- |"),
        ("<p>$a_1*b*c$ and \\[x\\]</p>", "$a_1*b*c$ and \\[x\\]"),
        ("<!-- c --><script>s</script><style>s</style>t", "t"),
        ("<p>a</p></div></body></html><p>b</p>", "a\n\nb"),
        ("a\0b", "ab"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_markdown(html, markdown):
    assert script.markdown_of(html) == markdown


@pytest.mark.parametrize("html", ["<div>" * 3000 + "x", "<b>" * 50_000 + "x", "<p>\ud800</p>"])
def test_html_that_cannot_be_read_is_a_fault_of_the_row(html):
    with pytest.raises(ValueError, match="the HTML"):
        script.markdown_of(html)


TAGS = ["p", "/p", "pre", "/pre", "code", "/code", "ul", "li", "/ul", "b", "a", "/a", "br", "table", "tr", "td", "!--"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(TAGS).map("<{}>".format) | st.sampled_from(["&lt;", "`", "\n"]) | st.text(max_size=4),
        max_size=12,
    ).map("".join)
)
def test_any_html_gives_text_or_a_reason(html):
    try:
        assert isinstance(script.markdown_of(html), str)
    except ValueError as error:
        assert "the HTML" in str(error)


KEPT = [*TAGS[:-1], "ol", "th", "/td", "/table", "caption", "h2", "/h2", "blockquote", "dl", "dd", "hr", "div", "i"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(KEPT) | st.just("text"), max_size=16))
def test_no_word_is_lost_wherever_it_stands(parts):
    parts = [f" word{place}. " if part == "text" else f"<{part}>" for place, part in enumerate(parts)]
    found = script.markdown_of("".join(parts)).split()
    assert [part for part in parts if "word" in part and not any(part.strip() in word for word in found)] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("AI \ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ANSWER = st.fixed_dictionaries({}, optional={"text": JSON, "pm_score": JSON, "selected": JSON, "author": JSON})
ROW = st.fixed_dictionaries(
    {},
    optional={
        "question": JSON | st.just("AI"),
        "answers": JSON | st.lists(ANSWER | JSON, max_size=3),
        "metadata": JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(ROW, JSON)
def test_any_row_is_converted_passed_over_or_a_fault(row, hole):
    matcher = script.KeywordMatcher({"ai": ["AI"]})
    pubmed = {
        "question": row.get("question"),
        "context": hole,
        "long_answer": row.get("metadata"),
        "final_decision": hole,
    }
    for convert in (lambda: script.convert_stackexchange(row, matcher, 1), lambda: script.convert_pubmed(pubmed)):
        try:
            convert()
        except ValueError as error:
            assert str(error)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(script).attempted >= 4 and doctest.testmod(script).failed == 0
