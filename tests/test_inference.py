"""One question, or a file of them: the same answer alone and in a batch, from whatever kind of folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build_adapter, build_model, load_script, run_script, write_jsonl

inference = load_script("inference")


def ask(folder: Path, *more, **options) -> subprocess.CompletedProcess:
    flags = ("--model", folder, "--instruction", "What does the lamp cost?", "--max_new_tokens", "12")
    return run_script("inference.py", *flags, *more, cwd=ROOT, **options)


def plain_answer(folder: Path, question: str = "What does the lamp cost?", count: int = 12) -> str:
    """What `generate` of transformers gives, with the base in float32, as load_model has it on such a CPU."""
    import torch

    model, tokenizer = inference.load_model(str(folder))
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_adapter_answers_as_plain_code_does(tmp_path, tiny_qwen2, four_bit):
    adapter = build_adapter(tiny_qwen2, tmp_path / "adapter", four_bit=four_bit)
    process = ask(adapter)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == inference.printable(plain_answer(adapter))
    assert "12 tokens, " in process.stderr and "cut at the limit" in process.stderr
    model, _ = inference.load_model(str(adapter))
    assert bool(getattr(model, "is_loaded_in_4bit", False)) == four_bit


def test_a_foreign_adapter_and_a_plain_model_work(tmp_path, tiny_adapter, tiny_qwen2):
    foreign = tmp_path / "foreign"  # as PEFT alone leaves it: no record, no tokenizer, no generation settings
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tiny_adapter / name, foreign)
    model, tokenizer = inference.load_model(str(foreign))
    assert model.active_adapters() and tokenizer.chat_template
    config = json.loads((tiny_qwen2 / "config.json").read_text()) | {"use_cache": False}
    shutil.copytree(tiny_qwen2, tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    model, _ = inference.load_model(str(tmp_path / "base"))
    assert model.generation_config.use_cache is True


def test_a_file_of_questions(tmp_path, tiny_adapter):
    questions = [{"instruction": "lamp " * n, "id": n} for n in (1, 30, 4, 9)]
    questions += [
        {"messages": [{"role": "user", "content": "芯片"}, {"role": "assistant", "content": "known"}]}
    ]
    write_jsonl(tmp_path / "q.jsonl", questions)
    files = (
        "--input_file",
        tmp_path / "q.jsonl",
        "--output_file",
        tmp_path / "a.jsonl",
        "--max_new_tokens",
        "8",
    )
    process = run_script("inference.py", "--model", tiny_adapter, *files, "--batch_size", "2", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("answer", "ended")} for row in rows] == questions
    for row, question in zip(rows[:4], questions, strict=False):
        assert row["answer"] == plain_answer(tiny_adapter, question["instruction"], 8)
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_a_killed_run_goes_on(tmp_path, tiny_adapter, monkeypatch):
    write_jsonl(tmp_path / "q.jsonl", [{"instruction": f"question {n}"} for n in range(6)])
    flags = ["--model", str(tiny_adapter), "--input_file", str(tmp_path / "q.jsonl"), "--batch_size", "2"]
    config = inference.parse_args(
        [*flags, "--output_file", str(tmp_path / "a.jsonl"), "--max_new_tokens", "4"]
    )
    calls, own = [], inference.answers_to

    def stop_at_two(prompts, *args, **options):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(prompts, *args, **options)

    monkeypatch.setattr(inference, "answers_to", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        inference.main(config)
    assert not (tmp_path / "a.jsonl").exists()
    inference.main(config)
    assert calls == [2, 2, 2, 2] and len((tmp_path / "a.jsonl").read_text().splitlines()) == 6


def test_stdin_terminals_and_mistakes(tmp_path, tiny_adapter):
    process = ask(tiny_adapter, "--instruction", "-", input="What does the lamp cost?\n")
    assert process.stdout.strip() == inference.printable(plain_answer(tiny_adapter))
    command = [sys.executable, str(ROOT / "inference.py"), "--help"]  # an open pipe is not waited for
    done = subprocess.run(
        command, stdin=subprocess.PIPE, capture_output=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and b"--max_new_tokens" in done.stdout
    assert inference.printable("a\x1b[31m\x9bb\n\tc") == "a\ufffd[31m\ufffdb\n\tc"
    process = ask(tmp_path / "nowhere")
    assert process.returncode == 1 and process.stderr.startswith("error: ") and "nowhere" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    for flags, words in (
        (("--thinking", "off"), "--thinking: the chat template has no enable_thinking"),
        (("--instruction", ""), "there is no question"),
        (("--input", "x" * 3000), "leaves no room for an answer: the model has 1024 positions"),
    ):
        with pytest.raises(ValueError, match=words):
            inference.main(inference.parse_args(["--model", str(tiny_adapter), *flags]))


def test_a_relative_base_counts_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_model("qwen2", Path("models/base"))
    build_adapter(Path("models/base"), Path("out/adapter"))
    model, _ = inference.load_model("out/adapter")
    assert model.active_adapters()
