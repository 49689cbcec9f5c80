"""The small mix and the check of one's own data, on small rows in the hub's schemas."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parent / "data"
REAL = ROOT.parent / "shared" / "data" / "pubmedqa_pqa_labeled.jsonl"
MIX = "mixed_finetune_dataset.jsonl"
script, training = load_script("data_integration"), load_script("qwen_finetuning")
ALPACA = {"instruction": "Q", "input": "", "output": "A"}
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
CALL = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'}
CALLS = {"conversations": [{"from": "human", "value": "Rain?"}, CALL, {"from": "observation", "value": "no"}]}
CALLS = {
    "conversations": [*CALLS["conversations"], {"from": "gpt", "value": "No."}],
    "tools": '[{"name": "weather"}]',
}


def sources(reports=ROOT / "my_dataset.json", orca=DATA / "slimorca.jsonl", pubmed=DATA / "pubmedqa.jsonl"):
    return ["--my_report_data_path", reports, "--orca_data_path", orca, "--pubmed_data_path", pubmed]


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script in this process, in an empty folder: (rows, rejects, cells of the table by source)."""
    monkeypatch.chdir(tmp_path)

    def run(*args, output=MIX):
        script.main(script.parse_args([str(arg) for arg in args]))
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"next: python qwen_finetuning.py --dataset_path {output}"
        table = {line.split()[0]: line.split()[1:] for line in lines}
        return read(output), read(f"{output}.rejected.jsonl"), table

    return run


def test_ratios_gap_table_and_order(run):
    mine = {"instruction": "只有一条", "output": "好", "tags": ["x"]}
    flags = sources(write_jsonl(Path("mine.jsonl"), [mine]))
    rows, rejects, table = run(*flags, "--total_samples", 10)
    assert table["source"] == ["asked", "found", "rejected", "duplicate", "written"] and rejects == []
    assert table["reports"] == ["2", "1", "0", "0", "1"]  # the others share the missing row by their ratios
    assert table["orca"] == ["5", "12", "0", "0", "6"] and table["pubmed"] == ["3", "6", "0", "0", "3"]
    names = [row["source"] for row in rows]
    assert set(names) == {"mine.jsonl", "slimorca.jsonl", "pubmedqa.jsonl"}
    assert mine | {"source": "mine.jsonl"} in rows
    rows, _, _ = run(*flags, "--ratios", "orca=0.5", "pubmed=0.5", "--total_samples", 12)
    names = [row["source"] for row in rows]
    assert names[:2] * 6 != names and sorted(names)[5:7] == ["pubmedqa.jsonl", "slimorca.jsonl"]  # shuffled
    rows, _, _ = run(*flags, "--total_samples", 99)
    assert len(rows) == 1 + 12 + 6  # nothing stands twice to fill a share
    assert any("\n\nConclusion: maybe" in row.get("output", "") and "\n" in row["input"] for row in rows)


def test_slimorca_keeps_weights_and_has_its_system_texts_or_not(run):
    for system in ("keep", "drop"):
        rows, _, _ = run(*sources(), "--ratios", "orca=1", "reports=0", "--system", system)
        turns = [turn for row in rows for turn in row["conversations"]]
        assert any(turn["from"] == "system" for turn in turns) == (system == "keep")
        assert {turn["weight"] for turn in turns if turn["from"] == "gpt"} == {1.0}
        assert len(rows) == 12 and all(training.messages_of(row) for row in rows)


def test_seed_decides_and_duplicates_go_across_sources(run):
    same = [{"instruction": "Do  longer\nSHIFTS?", "output": "no"}, {"instruction": "do longer shifts?"}]
    write_jsonl(Path("a.jsonl"), [same[0], same[1] | {"output": "NO ", "source": "b"}])
    write_jsonl(Path("b.jsonl"), [{"conversations": CALLS["conversations"]}, CALLS, CALLS])
    _, _, table = run(*sources("a.jsonl", "b.jsonl"), "--total_samples", 50)
    assert table["reports"][1:] == ["2", "0", "1", "1"] and table["orca"][1:] == ["3", "0", "1", "2"]
    outputs = [Path(MIX).read_bytes() for seed in (1, 1, 2) if run(*sources(), "--seed", seed)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_source_is_read_once_and_an_unfinished_one_anew(run, monkeypatch):
    flags, rows_of, asked = [*sources(), "--seed", 9], script.rows_of, []

    def reading(source, streaming):
        asked.append(Path(source).stem)
        yield from rows_of(source, streaming)
        if asked == ["my_dataset", "slimorca"]:
            raise KeyboardInterrupt

    Path(MIX).write_text("old")
    monkeypatch.setattr(script, "rows_of", reading)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert Path(MIX).read_text() == "old"
    rows = run(*flags)[0]
    assert asked == ["my_dataset", "slimorca", "slimorca", "pubmedqa"] and run(*flags)[0] == rows
    assert len(asked) == 4 and run(*flags, "--system", "drop") and len(asked) == 7


def test_a_hub_dataset_streams_shuffled_and_no_more_than_needed(run, monkeypatch):
    import datasets

    asked, read_rows = [], []

    def rows():
        for n in range(30_000):
            read_rows.append(n)
            yield {"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": f"{n}."}]}

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flags = ["--orca_data_path", "Org/Set:cfg", "--ratios", "orca=1", "--total_samples", "50"]
    numbers = [int(row["conversations"][0]["value"]) for row in run(*sources(), *flags)[0]]
    assert asked == [(("Org/Set", "cfg"), {"split": "train", "streaming": True})]
    assert len(numbers) == 50 and max(numbers) > 5000 and len(read_rows) < 10_100


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not beside the project")
def test_real_pubmedqa_rows(run):
    rows, _, _ = run(*sources(pubmed=REAL), "--ratios", "pubmed=1")
    ends = [row["output"].rsplit("Conclusion: ", 1)[1] for row in rows]
    assert {end: ends.count(end) for end in set(ends)} == {"yes": 552, "no": 338, "maybe": 110}


def test_edited_constants_act(tmp_path):
    text = (ROOT / "data_integration.py").read_text(encoding="utf-8")
    edits = {"TOTAL_SAMPLES = 2000": "TOTAL_SAMPLES = 4", '"orca": 0.5, "pubmed": 0.3': '"pubmed": 0.8'}
    edits |= {'PATH = "my_dataset.json"': 'PATH = "m.jsonl"', f'FILE = "{MIX}"': 'FILE = "new/mix.jsonl"'}
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "edited.py").write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "m.jsonl", [ALPACA])
    command = [sys.executable, "edited.py", "--pubmed_data_path", DATA / "pubmedqa.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert len(read(tmp_path / "new" / "mix.jsonl")) == 4 and "orca" not in done.stdout, done.stderr


def test_the_way_of_a_newcomer(tmp_path):
    (tmp_path / "data" / "raw").mkdir(parents=True)
    source, made = "data/raw/my.train.JSON", "data/processed/my.train.jsonl"
    rows = [ALPACA, {"instruction": "x"}, ALPACA, ALPACA | {"output": "half \ud800"}]
    (tmp_path / source).write_text(json.dumps(rows), encoding="utf-8-sig")
    done = run_script("data_integration.py", "--input", source, "--format", "alpaca", cwd=tmp_path)
    table, last = done.stdout.splitlines()[1:]
    assert last == f"next: python qwen_finetuning.py --dataset_path {made}" and done.returncode == 0
    assert table.split() == ["input", "all", "2", "2", "1", "1"] and read(tmp_path / made) == [ALPACA]
    rejects = read(tmp_path / f"{made}.rejected.jsonl")
    assert (
        rejects[0] == {"file": source, "row": 2, "reason": rejects[0]["reason"]}
        and rejects[0]["reason"].startswith("an answer is missing or empty; its keys are ['instruction']")
        and "surrogates not allowed" in rejects[1]["reason"]
        and len(rejects) == 2
    )


def test_each_kind_of_file_in_a_folder_and_each_format(run):
    from datasets import Dataset

    Path("mine/deep").mkdir(parents=True)
    write_jsonl(Path("mine/deep/a.JSONL"), [ALPACA | {"output": "1"}])
    Path("mine/deep/b.jsonl.gz").write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    cell = json.dumps(CHAT["messages"]).replace('"', '""')
    Path("mine/c.csv").write_text(f'messages\n"{cell}"\n')
    qa = {"input": "Q", "response": "A"}
    Dataset.from_list([CALLS | dict.fromkeys(qa), qa]).to_parquet("mine/d.parquet")
    rows, rejects, _ = run("--input", "mine", output="data/processed/mine.jsonl")
    assert len(rows) == 5 and not rejects and qa in rows and CALLS in rows
    assert all(training.messages_of(row) for row in rows)
    for kind, number in {"messages": 2, "sharegpt": 1, "alpaca": 1, "instruction": 1, "qa": 1}.items():
        rows, rejects, _ = run("--input", "mine", "--format", kind, "--output", "o.jsonl", output="o.jsonl")
        assert (len(rows), len(rejects)) == (number, 5 - number), kind


def test_what_is_written_is_what_was_read(run):
    user, answer = CHAT["messages"]
    rows = [
        {"messages": [user, answer | more]} for more in ({"reasoning_content": "hm"}, {"weight": 0}, {"x": 1})
    ]
    rows += [ALPACA | {"output": end} for end in ("\\n", "\\t")]  # a backslash and a letter, not a line break
    rows += [CALLS | {"id": n} for n in range(300)] + [ALPACA | {"history": [["a", "b"]], "system": "s"}]
    write_jsonl(Path("in.jsonl"), rows)
    written, _, _ = run("--input", "in.jsonl", "--output", "out.jsonl", output="out.jsonl")
    assert sorted(map(json.dumps, written)) == sorted(map(json.dumps, rows)) and written != rows


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ratios", "orca=0.5"], "the shares add up to 1"),
        (["--total_samples", "0"], "--total_samples is 1 or more"),
        (["--input", "mine.jsonl", "--system", "drop"], "--input goes without output_file ratios system"),
        (["--input", "m.jsonl.rejected.jsonl", "--output", "m.jsonl"], "m.jsonl.rejected.jsonl is, or lies"),
        (["--ratios", "web=1"], "the names are reports, orca, pubmed"),
        (["--input", "data", "--output", "o.jsonl"], "data/parts is, or lies in, what is read"),
        (["--input", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["--orca_data_path", "nowhere.jsonl", "--ratios", "orca=1"], "No such file"),
        (["--orca_data_path", "No/where", "--ratios", "orca=1"], "Couldn't reach 'No/where' on the Hub"),
        (["--input", "mine.jsonl", "--output", "mine.jsonl"], "mine.jsonl is, or lies in, what is read"),
        (["--input", "mine.jsonl", "--format", "qa"], "no row is good; see data/processed/mine.jsonl.rej"),
    ],
)
def test_faults_are_one_line_and_change_nothing(run, args, words):
    before = write_jsonl(Path("mine.jsonl"), [ALPACA]).read_bytes()
    Path(MIX).write_text("old")
    with pytest.raises((OSError, ValueError), match=words):
        run(*args)
    assert Path(MIX).read_text() == "old" and Path("mine.jsonl").read_bytes() == before


HOLES = st.none() | st.integers() | st.text(max_size=3) | st.just("\ud800") | st.just([[]]) | st.just([{}])
KEYS = st.sampled_from(["instruction", "input", "output", "response", "messages", "conversations", "tools"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(KEYS, HOLES, max_size=4), min_size=1, max_size=3), st.integers(0, 9))
def test_bad_rows_cost_no_good_row_and_are_named(run, bad, cut):
    lines = [json.dumps(ALPACA), *(json.dumps(row)[cut:] for row in bad), json.dumps(CHAT)]
    Path("in.jsonl").write_text("\n".join(lines))
    rows, rejects, table = run("--input", "in.jsonl", "--output", "o.jsonl", output="o.jsonl")
    assert ALPACA in rows and CHAT in rows and all(reject["reason"] for reject in rejects)
    assert int(table["input"][1]) + len(rejects) == sum(1 for line in lines if line)
    assert not {reject["line"] for reject in rejects} & {1, len(lines)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data_integration.py", "data_set_generation.py"])
def test_sigkill_at_twenty_moments_leaves_the_old_output_or_the_new(tmp_path, name):
    talk = lambda n: [{"from": "human", "value": f"{n}? " + "word " * 60}, {"from": "gpt", "value": f"{n}."}]
    rows = [{"conversations": talk(n)} for n in range(20_000)]
    flags = [*sources(orca=write_jsonl(tmp_path / "orca.jsonl", rows)), "--total_samples", "18000"]
    flags += ["--stackexchange_data_path", DATA / "stackexchange.jsonl"] * ("set" in name)
    command, output = [sys.executable, str(ROOT / name), *map(str, flags)], tmp_path / MIX
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = time.monotonic()
    subprocess.run([*command, "--parts_dir", "undisturbed"], check=True, **quiet)
    duration, new, moments, killed = time.monotonic() - started, output.read_bytes(), random.Random(3), 0
    for _ in range(20):
        output.write_bytes(b"old")
        process = subprocess.Popen(command, **quiet)
        time.sleep(moments.uniform(0.1, 1) * duration)
        process.kill()
        killed += process.wait() < 0
        assert output.read_bytes() in (b"old", new)
        for part in tmp_path.glob("data/parts/orca*") if moments.random() < 0.5 else ():
            part.unlink()
    subprocess.run(command, check=True, **quiet)
    assert output.read_bytes() == new and killed >= 10
