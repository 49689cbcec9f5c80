"""The small mix and the conversion of one file, run as a person runs them, on small rows in the hub's schemas."""

from __future__ import annotations

import doctest
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script, run_script, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parent / "data"
REAL = ROOT.parent / "shared" / "data" / "pubmedqa_pqa_labeled.jsonl"
SCRIPT = "data_integration.py"
script = load_script("data_integration")


def sources(reports=DATA.parent.parent / "my_dataset.json", orca="slimorca.jsonl", pubmed="pubmedqa.jsonl") -> list:
    pairs = {"my_report": reports, "orca": DATA / orca, "pubmed": DATA / pubmed}
    return [word for name, path in pairs.items() for word in (f"--{name}_data_path", path)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]  # U+2028 is text


def mix(cwd: Path, *args, **kwargs) -> list[dict]:
    process = run_script(SCRIPT, *args, cwd=cwd, **kwargs)
    assert process.returncode == 0, process.stderr
    return read(cwd / "mixed_finetune_dataset.jsonl")


def convert(tmp_path: Path, content: bytes | list, *args, name="in.jsonl") -> tuple[list[dict], list[dict], str]:
    """Run the conversion of one file in this process: (records, rejected, error)."""
    source, output = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
    rejects = tmp_path / "out.jsonl.rejected.jsonl"
    output.unlink(missing_ok=True)
    rejects.unlink(missing_ok=True)
    try:
        error = script.main(script.parse_args(["--input", str(source), "--output", str(output), *args])) or ""
    except script.UserError as found:
        error = str(found)
    return read(output) if output.exists() else [], read(rejects) if rejects.exists() else [], error


# ------------------------------------------------------------------------------------------------ the mix


def test_mix_holds_every_source_and_shares_the_gap(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [{"instruction": "只有一条", "output": "好"}])
    process = run_script(SCRIPT, *sources(reports="mine.jsonl"), "--total_samples", 10, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = read(tmp_path / "mixed_finetune_dataset.jsonl")
    by_source = {name: [row for row in rows if row["source"] == name] for name in {row["source"] for row in rows}}
    # 10 rows: 2, 5, 3 are asked; one report exists, and its missing row goes to the greater share
    assert {name: len(found) for name, found in by_source.items()} == {
        "mine.jsonl": 1,
        "slimorca.jsonl": 6,
        "pubmedqa.jsonl": 3,
    }
    table = [line.split() for line in process.stdout.splitlines()]
    assert table[0] == ["share", "source", "asked", "found", "rejected", "duplicate", "written"]
    assert table[1] == ["reports", "reports", "2", "1", "0", "0", "1"]
    assert table[2] == ["orca", "orca", "5", "6", "0", "0", "6"]
    assert table[4] == ["total", "10", "10", "0", "0", "10"]
    assert [row["source"] for row in rows] != sorted(row["source"] for row in rows), "not shuffled"
    assert not (tmp_path / "mixed_finetune_dataset.jsonl.rejected.jsonl").exists()


def test_too_little_data_is_said_and_never_repeated(tmp_path):
    process = run_script(SCRIPT, *sources(), "--total_samples", 500, cwd=tmp_path)
    rows = read(tmp_path / "mixed_finetune_dataset.jsonl")
    assert len(rows) == len({json.dumps(row) for row in rows}) == 30 + 12 + 6
    assert "All sources together gave 48 of 500 rows." in process.stderr


def test_conversions(tmp_path):
    rows = mix(tmp_path, *sources(), "--total_samples", 48)
    orca = {row.get("instruction"): row for row in rows if row["source"] == "slimorca.jsonl"}
    assert orca["How many minutes are there in 2 hours?"] == {
        "instruction": "How many minutes are there in 2 hours?",
        "input": "",
        "output": "One hour has 60 minutes, so 2 hours have 120 minutes.",
        "system": "You are an assistant that explains its steps.",
        "source": "slimorca.jsonl",
    }
    assert orca["Name a metal that is liquid at room temperature."]["system"] == ""  # it asked for none
    assert "system" not in orca["Translate to French: Good morning."]
    assert [turn["role"] for turn in orca[None]["messages"]] == ["user", "assistant", "user", "assistant"]
    pubmed = next(row for row in rows if row.get("instruction", "").startswith("Do longer shifts"))
    assert pubmed["input"] == "We followed 42 people for a year.\nOne group served as control."
    assert pubmed["output"] == "In this sample of 42 people the answer leans to maybe.\n\nConclusion: maybe"
    for row in rows:
        assert script.messages_of(row)


def test_same_inputs_and_seed_give_the_same_bytes(tmp_path):
    args = [*sources(), "--total_samples", 30]
    outputs = []
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        mix(tmp_path, *args, "--seed", seed, "--parts_dir", name)
        outputs.append((tmp_path / "mixed_finetune_dataset.jsonl").read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_longer_build_before_does_not_change_a_shorter_one(tmp_path):
    mix(tmp_path, *sources(), "--total_samples", 20, "--parts_dir", "fresh")
    expected = (tmp_path / "mixed_finetune_dataset.jsonl").read_bytes()
    mix(tmp_path, *sources(), "--total_samples", 48)
    mix(tmp_path, *sources(), "--total_samples", 20)
    assert (tmp_path / "mixed_finetune_dataset.jsonl").read_bytes() == expected


def test_duplicates_go_across_sources(tmp_path):
    same = [{"instruction": "Translate to  French:\nGOOD morning.", "output": " bonjour. "}] * 2
    write_jsonl(tmp_path / "mine.jsonl", [*same, {"instruction": "other", "output": "row"}])
    process = run_script(SCRIPT, *sources(reports="mine.jsonl"), "--total_samples", 99, cwd=tmp_path)
    rows = read(tmp_path / "mixed_finetune_dataset.jsonl")
    assert sum("bonjour" in row.get("output", "").lower() for row in rows) == 1
    table = [line.split() for line in process.stdout.splitlines()]
    assert table[1][3:] == ["3", "0", "1", "2"] and table[2][3:] == ["12", "0", "1", "11"]


def test_rejected_rows_are_named_and_strict_stops(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n\n{"instruction": "c"\n', "utf-8")
    args = [*sources(reports="mine.jsonl"), "--total_samples", 10]
    rows = mix(tmp_path, *args)
    assert len(rows) == 10
    (rejected,) = read(tmp_path / "mixed_finetune_dataset.jsonl.rejected.jsonl")
    assert (rejected["file"], rejected["line"]) == ("mine.jsonl", 3) and "not JSON" in rejected["reason"]
    before = (tmp_path / "mixed_finetune_dataset.jsonl").read_bytes()
    for _ in range(2):  # from the stream, and from the part that the first run kept
        strict = run_script(SCRIPT, *args, "--strict", "--seed", 7, cwd=tmp_path)
        assert strict.returncode == 1 and "error: mine.jsonl:3: not JSON" in strict.stderr
        assert "Traceback" not in strict.stderr
    assert (tmp_path / "mixed_finetune_dataset.jsonl").read_bytes() == before


def test_parquet_and_folders(tmp_path):
    from datasets import Dataset

    folder = tmp_path / "orca" / "data"
    folder.mkdir(parents=True)
    rows = read(DATA / "slimorca.jsonl")
    Dataset.from_list(rows[:6]).to_parquet(folder / "train-0.parquet")
    write_jsonl(folder / "train-1.jsonl", rows[6:])
    Dataset.from_list(rows * 50).to_parquet(tmp_path / "whole.parquet")
    (folder / "train-2.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:1000])
    args = [*sources(), "--ratios", "orca=1", "--total_samples", 100, "--orca_data_path", "orca"]
    process = run_script(SCRIPT, *args, cwd=tmp_path)
    assert process.returncode == 0 and "Traceback" not in process.stderr and "Exception" not in process.stderr
    assert len(read(tmp_path / "mixed_finetune_dataset.jsonl")) == 12
    (rejected,) = read(tmp_path / "mixed_finetune_dataset.jsonl.rejected.jsonl")
    assert rejected["file"] == "orca/data/train-2.parquet" and rejected["row"] == 1
    # stops in the middle of a file, and leaves without noise
    process = run_script(SCRIPT, *args[:-4], "--total_samples", 3, "--orca_data_path", "whole.parquet", cwd=tmp_path)
    assert process.returncode == 0 and "Exception" not in process.stderr, process.stderr


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not beside the project")
def test_real_pubmedqa_rows(tmp_path):
    rows = mix(tmp_path, *sources(pubmed=REAL), "--ratios", "pubmed=1", "--total_samples", 2000)
    assert len(rows) == 1000
    decisions = [row["output"].rsplit("Conclusion: ", 1)[1] for row in rows]
    assert {name: decisions.count(name) for name in set(decisions)} == {"yes": 552, "no": 338, "maybe": 110}


def test_a_mix_is_what_the_training_script_reads(tmp_path, tiny_qwen2):
    mix(tmp_path, *sources(), "--total_samples", 48)
    process = run_script("qwen_finetuning.py", "--dry_run", "--model_name", tiny_qwen2, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    ledger = dict(re.findall(r"^  (\D+?) +([\d,]+)", process.stdout, flags=re.M))
    assert ledger["rows read"] == "48" and int(ledger["train"]) + int(ledger["eval"]) == 48
    for fault in ("unreadable", "wrong shape", "empty answer", "exact duplicate"):
        assert ledger[fault] == "0"


def test_a_hub_id_and_a_dropped_connection(tmp_path, monkeypatch, capsys):
    """The hub is played by two functions of the `datasets` library; what is dropped is read by the next build."""
    import datasets

    rows = [
        {"conversations": [{"from": "human", "value": f"Number {n}?"}, {"from": "gpt", "value": f"Yes {n}."}]}
        for n in range(6000)
    ]
    asked, works_until = [], {"row": 5500}

    def load_dataset_builder(hub_id, config):
        asked.append((hub_id, config))
        files = {"train": ["hf://datasets/Org/Set@abc/data/a.parquet", "hf://datasets/Org/Set@abc/README.md"]}
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    def load_dataset(kind, data_files, split, streaming):
        assert (kind, split, streaming) == ("parquet", "train", True) and data_files.endswith("a.parquet")
        for number, row in enumerate(rows):
            if number == works_until["row"]:
                raise ConnectionError("Server Disconnected")
            yield row

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    args = [*map(str, sources()), "--orca_data_path", "Org/Set:cfg", "--ratios", "orca=1", "--total_samples", "6000"]
    output = tmp_path / "mixed_finetune_dataset.jsonl"
    output.write_text("old")
    with pytest.raises(script.UserError, match=r"a\.parquet:5501: Server Disconnected. Run again to go on"):
        script.main(script.parse_args(args))
    assert output.read_text() == "old" and asked == [("Org/Set", "cfg")]
    kept = sqlite3.connect(next(tmp_path.glob("data/parts/orca-*.sqlite")))
    assert kept.execute("SELECT count(*) FROM rows").fetchone()[0] == 5500 - script.SHUFFLE_BUFFER
    kept.close()
    works_until["row"] = None
    script.main(script.parse_args(args))
    continued = output.read_bytes()
    script.main(script.parse_args([*args, "--parts_dir", "fresh"]))
    assert output.read_bytes() == continued and len(read(output)) == 6000
    assert {row["source"] for row in read(output)} == {"Org/Set"}
    # the library's own retries last minutes
    assert datasets.config.STREAMING_READ_MAX_RETRIES * datasets.config.STREAMING_READ_RETRY_INTERVAL >= 180


# --------------------------------------------------------------------------------------- when it goes wrong


def test_without_network_and_local_sources(tmp_path):
    output = tmp_path / "mixed_finetune_dataset.jsonl"
    output.write_text("old")
    process = run_script(SCRIPT, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert process.returncode == 1 and output.read_text() == "old"
    faults = [line for line in process.stderr.splitlines() if "Pass --" in line]
    assert len(faults) == 3 and "Traceback" not in process.stderr
    for fault, flag in zip(faults, ("my_report", "orca", "pubmed"), strict=True):
        assert f"Pass --{flag}_data_path with a local file or folder" in fault


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ratios", "orca=0.5"], "adds up to 0.5; it must be 1"),
        (["--ratios", "web=1"], "'web=1' is not name=number with a name of reports, orca, pubmed"),
        (["--total_samples", "0"], "--total_samples is 0"),
        (["--format", "qa"], "go with --input"),
        (["--form", "qa"], "unrecognized arguments"),
        (["--input", "x.json", "--format", "csv"], "invalid choice"),
    ],
)
def test_usage(tmp_path, args, words):
    process = run_script(SCRIPT, *args, cwd=tmp_path)
    assert process.returncode == 2 and words in process.stderr and "Traceback" not in process.stderr


def test_the_output_is_never_a_source_or_a_folder(tmp_path):
    mine = write_jsonl(tmp_path / "mine.jsonl", [{"instruction": "a", "output": "b"}])
    before = mine.read_bytes()
    (tmp_path / "folder").mkdir()
    args = [*sources(reports="mine.jsonl"), "--total_samples", 5]
    for target, words in ("mine.jsonl", "is a source"), ("folder", "Is a directory"):
        process = run_script(SCRIPT, *args, "--output_file", target, cwd=tmp_path)
        assert process.returncode == 1 and words in process.stderr and "Traceback" not in process.stderr
    process = run_script(SCRIPT, "--input", "mine.jsonl", "--output", "mine.jsonl", cwd=tmp_path)
    assert process.returncode == 1 and "is the input itself" in process.stderr
    assert mine.read_bytes() == before


def start(tmp_path: Path, args: list) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / SCRIPT), *map(str, args)]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list:
    """Flags for a build of 12,000 rows."""
    folder = tmp_path_factory.mktemp("many")
    orca = [
        {
            "conversations": [
                {"from": "human", "value": f"Number {n}? " + "word " * 60},
                {"from": "gpt", "value": f"Yes {n}."},
            ]
        }
        for n in range(14_000)
    ]
    flags = sources(orca=write_jsonl(folder / "orca.jsonl", orca))
    return [*flags, "--total_samples", 12_000]


def test_sigkill_leaves_the_output_whole_and_the_next_build_the_same(tmp_path, many):
    output, moments = tmp_path / "mixed_finetune_dataset.jsonl", random.Random(3)
    started = time.monotonic()
    mix(tmp_path, *many, "--parts_dir", "undisturbed")
    duration, expected = time.monotonic() - started, output.read_bytes()
    output.write_text("old")
    killed = 0
    for _ in range(20):
        process = start(tmp_path, many)
        time.sleep(moments.uniform(0.1, 0.9) * duration)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
        content = output.read_bytes()
        assert content in (b"old", expected)
        if content == expected or moments.random() < 0.2:  # from the beginning again, else from what the parts hold
            output.write_text("old")
            for part in (tmp_path / "data" / "parts").iterdir():
                part.unlink()
    assert killed >= 10
    mix(tmp_path, *many)
    assert output.read_bytes() == expected
    assert not list(tmp_path.glob("*.partial"))


def test_ctrl_c_leaves_the_old_output(tmp_path, many):
    output = tmp_path / "mixed_finetune_dataset.jsonl"
    output.write_text("old")
    process = start(tmp_path, many)
    while not list(tmp_path.glob("data/parts/orca*journal")):  # in the middle of writing its part
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and b"Traceback" not in errors
    assert output.read_text() == "old"


def test_two_builds_at_once_do_not_share_a_part(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('BEGIN EXCLUSIVE'); input()",
        ]
        + [str(next(iter(prepared(tmp_path))))],
        stdin=subprocess.PIPE,
    )
    time.sleep(0.5)
    process = run_script(SCRIPT, *sources(), "--total_samples", 5, cwd=tmp_path)
    holder.communicate(b"\n")
    assert process.returncode == 1 and "database is locked. If another build is running" in process.stderr
    assert "Traceback" not in process.stderr


def prepared(tmp_path: Path) -> list[Path]:
    mix(tmp_path, *sources(), "--total_samples", 5)
    return sorted((tmp_path / "data" / "parts").glob("orca*.sqlite"))


# --------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize(
    ("kind", "row", "user"),
    [
        ("instruction", {"instruction": "Q", "input": "C", "output": "A"}, "Q\n补充信息：C"),
        ("alpaca", {"instruction": "Q", "input": "", "response": "A"}, "Q"),
        ("alpaca", {"instruction": "Q", "output": "A"}, "Q"),
        ("qa", {"input": "Q", "output": "A"}, "Q"),
        ("messages", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "Q"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q"),
    ],
)
def test_formats(tmp_path, kind, row, user):
    for args in (), ("--format", kind):
        (record,), rejected, error = convert(tmp_path, [row], *args)
        assert script.messages_of(record) == [
            {"role": "user", "content": user},
            {"role": "assistant", "content": "A"},
        ]
        assert {"instruction", "input", "output"} == set(record) and not rejected and not error
    wrong = "sharegpt" if kind != "sharegpt" else "messages"
    records, (rejected,), error = convert(tmp_path, [row], "--format", wrong)
    assert not records and f"--format {wrong} needs" in rejected["reason"] and "no good row" in error


def test_one_file_needs_no_network_and_has_a_place_to_go(tmp_path):
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    rows = [{"instruction": "问", "response": "答", "source": "我"}, {"instruction": "问 ", "response": "答"}, {"a": 1}]
    (raw / "my_data.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False, indent=1).encode())
    process = run_script(SCRIPT, "--input", "data/raw/my_data.json", "--format", "alpaca", cwd=tmp_path)
    assert process.returncode == 0 and process.stdout == "3 read, 1 rejected, 1 duplicate, 1 written\n"
    output = tmp_path / "data" / "processed" / "my_data.jsonl"
    assert read(output) == [{"instruction": "问", "input": "", "output": "答", "source": "我"}]
    (rejected,) = read(output.with_name("my_data.jsonl.rejected.jsonl"))
    assert (rejected["file"], rejected["line"]) == ("data/raw/my_data.json", 11)
    assert not (tmp_path / "data" / "parts").exists()
    strict = run_script(SCRIPT, "--input", "data/raw/my_data.json", "--strict", cwd=tmp_path)
    assert strict.returncode == 1 and "data/raw/my_data.json:11: unknown shape with keys ['a']" in strict.stderr
    missing = run_script(SCRIPT, "--input", "nowhere.json", cwd=tmp_path)
    assert missing.returncode == 1 and missing.stderr == "error: nowhere.json: no such file or folder\n"
    unnamed = run_script(SCRIPT, "--my_report_data_path", "", cwd=tmp_path)  # Path("") would be this whole folder
    assert unnamed.returncode == 1 and "reports: : no such file or folder. Pass --my_report_data_path" in unnamed.stderr


def test_the_example_records_are_good(tmp_path):
    process = run_script(SCRIPT, "--input", ROOT / "my_dataset.json", "--output", "o.jsonl", "--strict", cwd=tmp_path)
    assert process.stdout == "30 read, 0 rejected, 0 duplicate, 30 written\n"


GOOD = [{"instruction": f"question {n}", "input": "", "output": f"answer {n} 芯片"} for n in range(4)]
HOLES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800") | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["instruction", "input", "output", "response", "messages", "conversations", "system", "source"])
TURN = st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), HOLES | st.sampled_from(["user", "gpt"]))


@st.composite
def bad_line(draw) -> bytes:
    """A row with cut bytes, wrong types, nulls, nested lists or lone surrogates."""
    row = draw(st.dictionaries(KEYS, HOLES | st.lists(TURN | HOLES, max_size=3), max_size=4))
    line = draw(st.sampled_from([json.dumps(row), json.dumps(row, ensure_ascii=False), json.dumps(GOOD[0] | row)]))
    line = line.encode("utf-8", draw(st.sampled_from(["replace", "surrogatepass"])))
    return line[draw(st.integers(0, 5)) : len(line) - draw(st.integers(0, 5))].replace(b"\n", b" ").replace(b"\r", b" ")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(bad_line(), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_mutated_rows_cost_no_good_row_and_are_named(tmp_path, lines, seed):
    order = [json.dumps(row).encode() for row in GOOD] + lines
    random.Random(seed).shuffle(order)
    content = b"\n".join(order)
    records, rejected, error = convert(tmp_path, content)
    assert not error
    assert all(row in records for row in GOOD)
    judged = {}
    for number, line in enumerate(order, start=1):
        try:
            judged[number] = bool(script.messages_of(json.loads(line.strip())))
        except (ValueError, TypeError, AttributeError, RecursionError):
            judged[number] = False
    named = {row["line"] for row in rejected}
    expected = {number for number, line in enumerate(order, start=1) if line.strip() and not judged[number]}
    assert named == expected and all(row["file"].endswith("in.jsonl") and row["reason"] for row in rejected)


def test_strange_files(tmp_path):
    good = json.dumps(GOOD[0]).encode()
    # UTF-16
    assert "UTF-16" in convert(tmp_path, json.dumps(GOOD[0]).encode("utf-16"))[1][0]["reason"]
    # an empty file
    assert convert(tmp_path, b"")[2].endswith("in.jsonl: no good row")
    # an array where lines are expected
    records, rejected, _ = convert(tmp_path, json.dumps(GOOD, indent=2).encode())
    assert records == GOOD and not rejected
    # a cut array keeps what stands before the cut
    records, rejected, _ = convert(tmp_path, json.dumps(GOOD, indent=2).encode()[:-30], name="in.json")
    assert records == GOOD[:3] and rejected[0]["line"] == 17
    # a line of 10 MB between others, one bad and one good
    long = json.dumps({"instruction": "long", "output": "x" * 10_000_000}).encode()
    records, rejected, _ = convert(
        tmp_path, b"\n".join([good, long[:-5], long, b'{"instruction": "\\ud800", "output": "x"}'])
    )
    assert records[0] == GOOD[0] and len(records[1]["output"]) == 10_000_000
    assert [row["line"] for row in rejected] == [2, 4]
    # deep nesting
    records, rejected, _ = convert(tmp_path, good + b"\n" + b"[" * 100_000 + b"\n" + json.dumps(GOOD[1]).encode())
    assert records == GOOD[:2] and rejected[0]["line"] == 2


def test_the_mix_stands_mutated_sources_too(tmp_path):
    """The hub's own schemas with holes: every good row is in the mix, every bad one is named."""
    orca, pubmed = read(DATA / "slimorca.jsonl"), read(DATA / "pubmedqa.jsonl")
    holes = [None, 3, [], {}, [[]], "\ud800", {"contexts": [None]}, {"contexts": "text"}]
    bad_orca = [{"conversations": hole} for hole in holes] + [
        {"conversations": [{"from": hole, "value": "x"}]} for hole in holes
    ]
    bad_pubmed = [
        {**pubmed[0], key: hole} for key in ("question", "context", "long_answer", "final_decision") for hole in holes
    ]
    write_jsonl_bytes(tmp_path / "o.jsonl", bad_orca + orca)
    write_jsonl_bytes(tmp_path / "p.jsonl", pubmed + bad_pubmed)
    rows = mix(tmp_path, *sources(orca=tmp_path / "o.jsonl", pubmed=tmp_path / "p.jsonl"), "--total_samples", 400)
    assert len(rows) == 30 + 12 + 6
    rejected = read(tmp_path / "mixed_finetune_dataset.jsonl.rejected.jsonl")
    lines = {
        name: sorted(row["line"] for row in rejected if row["file"].endswith(name)) for name in ("o.jsonl", "p.jsonl")
    }
    assert lines["o.jsonl"] == list(range(1, len(bad_orca) + 1))
    assert lines["p.jsonl"] == list(range(7, 7 + len(bad_pubmed)))


def write_jsonl_bytes(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def test_help_is_quick(tmp_path):
    started = time.monotonic()
    process = run_script(SCRIPT, "--help", cwd=tmp_path, env={"PYTHONWARNINGS": "error"})
    assert process.returncode == 0 and time.monotonic() - started < 0.5 * (2 if os.cpu_count() < 4 else 1)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(script).attempted >= 4 and doctest.testmod(script).failed == 0
