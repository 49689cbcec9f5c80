"""One question, or a file of them: the same answer alone and in a batch, from whatever kind of folder."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build_adapter, build_model, load_script, write_jsonl

inference = load_script("inference")
LAMP = "What does the lamp cost?"


@pytest.fixture
def ask(monkeypatch, capsys):
    """Run inference.py in this process as a person would: (stdout, stderr)."""

    def ask(folder: Path, *flags, count: int = 12) -> tuple[str, str]:
        flags = ("--model", folder, "--max_new_tokens", count, *flags)
        monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, flags)])
        runpy.run_path(str(ROOT / "inference.py"), run_name="__main__")
        return capsys.readouterr()

    return ask


def plain_answer(folder: Path, question: str = LAMP, count: int = 12) -> str:
    """What `generate` of transformers gives, with the base in float32, as load_model has it on such a CPU."""
    import torch

    model, tokenizer = inference.load_model(str(folder))
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": question}], **options)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_adapter_answers_as_plain_code_does(tmp_path, tiny_qwen2, ask, four_bit):
    adapter = build_adapter(tiny_qwen2, tmp_path / "adapter", four_bit=four_bit)
    out, err = ask(adapter, "--instruction", LAMP)
    assert out.strip() == inference.CONTROL.sub("\ufffd", plain_answer(adapter))
    assert "12 tokens, " in err and "cut at the limit" in err
    model, _ = inference.load_model(str(adapter))
    assert bool(getattr(model, "is_loaded_in_4bit", False)) == four_bit


def interrupted_if_v2(name, revision, **options):
    if revision == "v2":
        raise KeyboardInterrupt


def test_a_foreign_adapter_and_a_plain_model_work(tmp_path, tiny_adapter, monkeypatch):
    from safetensors.torch import load_file, save_file

    foreign = tmp_path / "foreign"  # as PEFT alone leaves it: no record, no tokenizer, no generation settings
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tiny_adapter / name, foreign)
    model, tokenizer = inference.load_model(str(foreign))
    assert model.active_adapters and tokenizer.chat_template
    half = shutil.copytree(tiny_adapter, tmp_path / "half")
    weights = load_file(half / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[::2]), half / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserWarning, match="Found missing adapter keys"):
        inference.load_model(str(half))
    settings = json.loads((foreign / "adapter_config.json").read_text()) | {"revision": "v2"}
    (foreign / "adapter_config.json").write_text(json.dumps(settings))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the base's, as PEFT wrote it
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", interrupted_if_v2)
        inference.load_model(str(foreign))
    seen, right = {}, model.generate
    monkeypatch.setattr(model, "generate", lambda **options: seen.update(options) or right(**options))
    inference.answers_to([[5, 6]], inference.Config(max_new_tokens=2), model, tokenizer)
    assert seen["use_cache"] is True  # some models are saved with it off, as in training


def test_a_file_of_questions(tmp_path, tiny_adapter, ask, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "芯片"}, {"role": "assistant", "content": "known"}]
    questions = [{"instruction": "lamp " * n, "id": n} for n in (1, 30, 4, 9)]
    questions += [{"messages": talk}, {"instruction": "0 " * 489 + "489"}]  # which leaves four tokens
    write_jsonl(tmp_path / "q.jsonl", questions)
    ask(tiny_adapter, "--input_file", "q.jsonl", "--output_file", "a.jsonl", "--batch_size", 2, count=8)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("answer", "ended")} for row in rows] == questions
    for row, question in zip(rows[:4], questions, strict=False):
        assert row["answer"] == plain_answer(tiny_adapter, question["instruction"], 8)
    assert rows[5]["answer"] == plain_answer(tiny_adapter, questions[5]["instruction"], 4)
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_a_killed_run_goes_on(tmp_path, tiny_adapter, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "q.jsonl", [{"instruction": f"question {n}"} for n in range(6)])
    options = {"output_file": "a.jsonl", "batch_size": 2, "max_new_tokens": 4}
    config = inference.Config(model=str(tiny_adapter), input_file="q.jsonl", **options)
    calls, own = [], inference.answers_to

    def stop_at_two(prompts, *args, **options):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        answers = own(prompts, *args, **options)
        return [(f"\u2028{text}", tokens, ended) for text, tokens, ended in answers]  # ends a line for some

    monkeypatch.setattr(inference, "answers_to", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        inference.main(config)
    assert not Path("a.jsonl").exists()
    with open("a.jsonl.partial", "a", encoding="utf-8") as file:
        file.write('["[4, [1')  # half a line, as a kill may leave it
    killed = Path("a.jsonl.partial").read_text(encoding="utf-8")
    inference.main(config)
    assert calls == [2, 2, 2, 2] and Path("a.jsonl").read_text(encoding="utf-8").count("\n") == 6
    Path("a.jsonl.partial").write_text(killed, encoding="utf-8")
    (tiny_adapter / "adapter_model.safetensors").touch()  # another training, whose answers are others
    inference.main(config)
    assert calls == [2] * 7


def test_what_would_be_dropped_or_overwritten_is_refused(tmp_path, tiny_adapter, ask, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ({"answer": "mine"}, {"history": [["a", "b"]]}, {"prompt": "p"}):
        write_jsonl(tmp_path / "q.jsonl", [{"instruction": "q"} | more])
        with pytest.raises(SystemExit, match=f"q.jsonl:1: no question: {next(iter(more))}: this is not read"):
            ask(tiny_adapter, "--input_file", "q.jsonl")
    for flags, words in (
        (["--batch_size", 0], "--batch_size are 1"),
        (["--input", "x"], "leave --instruction"),
    ):
        with pytest.raises(SystemExit, match=words):
            ask(tiny_adapter, "--input_file", "q.jsonl", *flags)


def test_stdin_terminals_and_mistakes(tmp_path, tiny_adapter, ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(LAMP + "\n"))
    assert ask(tiny_adapter, "--instruction", "-")[0].strip() == inference.CONTROL.sub(
        "\ufffd", plain_answer(tiny_adapter)
    )
    command = [sys.executable, str(ROOT / "inference.py"), "--help"]  # an open pipe is not waited for
    streams = {"stdin": subprocess.PIPE, "capture_output": True, "env": {"PYTHONIOENCODING": "ascii"}}
    done = subprocess.run(command, **streams)
    assert done.returncode == 0 and b"--max_new_tokens" in done.stdout
    assert inference.CONTROL.sub("\ufffd", "a\x1b[31m\x9bb\n\tc") == "a\ufffd[31m\ufffdb\n\tc"
    for model, flags, words in (
        (tmp_path / "nowhere", (), "^error: [^\n]*nowhere[^\n]*$"),
        (tiny_adapter, ("--thinking", "off"), "--thinking: the chat template has no enable_thinking"),
        (tiny_adapter, ("--instruction", ""), "there is no question"),
        (tiny_adapter, ("--input", "x" * 3000), "tokens leave no room for an answer in 1024 positions"),
    ):
        with pytest.raises(SystemExit, match=words):
            ask(model, *flags)


def test_a_relative_base_counts_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_model("qwen2", Path("models/base"))
    build_adapter(Path("models/base"), Path("out/adapter"))
    model, _ = inference.load_model("out/adapter")
    assert model.active_adapters
