"""chat.py on a tiny adapter: turns and their cache, commands, the context's end, and a real terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress

import pytest
from conftest import ROOT, load_script, run_script

GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": 16}


@pytest.fixture(scope="session")
def loaded(tiny_adapter):
    """(model, tokenizer) of the tiny adapter, in float32."""
    return load_script("chat").load_chat_model(str(tiny_adapter), None, False)[:2]


@pytest.fixture
def talk(loaded):
    """A greedy conversation without a system message."""
    return conversation(loaded)


def conversation(loaded, **settings):
    chat = load_script("chat")
    return chat.Conversation(*loaded, chat.Config(**GREEDY | settings), "")


def contents(talk, role: str) -> list[str]:
    return [turn["content"] for turn in talk.turns if turn["role"] == role]


def test_its_answer_is_that_of_inference(tiny_adapter, loaded, monkeypatch, capsys):
    inference = load_script("inference")
    monkeypatch.setattr("sys.stdin", None)
    settings = {"instruction": "What are chips?", "system_prompt": "", "max_new_tokens": 16}
    inference.main(inference.Config(model=str(tiny_adapter), **settings))
    expected = capsys.readouterr().out.strip()
    talk = conversation(loaded)
    talk.ask("What are chips?")
    assert load_script("chat").printable(talk.turns[-1]["content"]) == expected
    assert capsys.readouterr().out.strip() == expected


def test_the_second_turn_reads_only_what_is_new_and_answers_the_same(talk, loaded):
    seen = []
    hook = (
        loaded[0].get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    )
    talk.ask("What are chips made of?")
    first, kept = seen[0], len(talk.read)
    seen.clear()
    talk.ask("你好，世界！")
    hook.remove()
    whole = len(talk.read) - 15  # 16 tokens written, of which the last is not read
    assert seen[0] < whole - first + 2 and kept > first
    fresh = conversation(loaded)
    fresh.turns = talk.turns[:-1]
    assert fresh.generate(fresh.prompt(), reuse=True) == talk.turns[-1]["content"]


def test_compare_is_the_base_model_and_leaves_the_conversation_as_it_was(talk, tiny_qwen2, capsys):
    chat = load_script("chat")
    talk.ask("What are chips made of?")
    before, cache = list(talk.turns), talk.cache
    capsys.readouterr()
    chat.obey("/compare", talk)
    said = capsys.readouterr()
    base = conversation(chat.load_chat_model(str(tiny_qwen2), None, False)[:2])
    base.ask("What are chips made of?")
    assert said.out == capsys.readouterr().out
    assert said.out.strip() != chat.printable(before[-1]["content"])
    assert "[the base model:]" in said.err
    assert talk.turns == before and talk.cache is cache
    with pytest.raises(chat.UserError, match="no adapter to switch off"):
        chat.obey("/compare", base)
    talk.reset()
    with pytest.raises(chat.UserError, match="ask something first"):
        chat.obey("/compare", talk)


def test_ctrl_c_keeps_what_has_come_and_the_conversation_goes_on(talk, loaded, capsys):
    count = 0

    def interrupt(*_):
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt

    hook = loaded[0].get_input_embeddings().register_forward_hook(interrupt)
    talk.ask("What are chips made of?")
    assert "[stopped]" in capsys.readouterr().err
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    count = 11  # now before the first word: a question without an answer does not stay
    talk.ask("Why?")
    hook.remove()
    assert contents(talk, "user") == ["What are chips made of?"]
    talk.ask("And genes?")
    fresh = conversation(loaded)
    fresh.turns = talk.turns[:-1]
    assert fresh.generate(fresh.prompt(), reuse=False) == talk.turns[-1]["content"]


def test_the_oldest_turns_go_when_the_context_is_full(talk, capsys):
    talk.room = 160
    for number in range(6):
        talk.ask(f"question {number} " + "chips are made of silicon " * 2)
    assert "its 2 oldest messages are forgotten" in capsys.readouterr().err
    asked = contents(talk, "user")
    assert 1 <= len(asked) < 6 and asked[-1].startswith("question 5")
    assert len(talk.read) <= 160 + 16
    before = list(talk.turns)
    with pytest.raises(load_script("chat").UserError, match="tokens are too long for this model: 160 fit"):
        talk.ask("chips " * 400)
    assert talk.turns == before  # a question that is refused costs no history


def test_more_new_tokens_than_the_model_can_hold_are_refused(loaded):
    with pytest.raises(load_script("chat").UserError, match="--max_new_tokens must be below 1024"):
        conversation(loaded, max_new_tokens=1024)


def test_save_writes_a_record_that_can_be_trained_on(talk, tmp_path):
    chat, path = load_script("chat"), tmp_path / "talks.jsonl"
    with pytest.raises(chat.UserError, match="nothing to save yet"):
        chat.obey(f"/save {path}", talk)
    assert not path.exists()
    chat.obey("/system 你懂芯片。", talk)
    talk.ask("芯片由什么制成？")
    path.write_text('{"input": "a", "output": "b"}', encoding="utf-8")  # its last line left open, as editors do
    chat.obey(f"/save {path}", talk)
    chat.obey(f"/save {path}", talk)
    training = load_script("qwen_finetuning")
    rows = list(training.read_rows(path))
    assert [fault for _, _, fault in rows] == ["", "", ""]
    assert training.messages_of(rows[1][1]) == [{"role": "system", "content": "你懂芯片。"}, *talk.turns]


@pytest.mark.parametrize(
    "line, words",
    [
        ("/save no/such/folder/talk.jsonl", "No such file or directory"),
        ("/save my_dataset.json", "ends in .jsonl"),
        ("/save ~nobody/talk.jsonl", "No such file or directory"),
        ("/save", "unknown or incomplete command '/save'"),
        ("/what", "unknown or incomplete command '/what'"),
    ],
)
def test_a_command_that_can_not_be_done_says_so(talk, line, words):
    talk.ask("What are chips?")
    with pytest.raises(load_script("chat").UserError, match=words):
        load_script("chat").obey(line, talk)


def test_reset_forgets_the_turns_and_keeps_the_system_message(talk, capsys):
    chat = load_script("chat")
    chat.obey("/system Be brief.", talk)
    talk.ask("What are chips?")
    chat.obey("/reset", talk)
    assert talk.messages() == [{"role": "system", "content": "Be brief."}]
    chat.obey("/system", talk)
    assert talk.messages() == []
    chat.obey("/help", talk)
    assert "/compare" in capsys.readouterr().err


class Terminal:
    """chat.py on a pseudo-terminal, typed to and read as a person does."""

    def __init__(self, *args, cwd):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, str(ROOT / "chat.py"), *map(str, args)])
        self.seen = ""

    def until(self, words: str, seconds: float = 180) -> str:
        """Everything up to `words`, which must come within `seconds`."""
        import select

        end, data = time.monotonic() + seconds, self.seen.encode()
        while words not in data.decode(errors="replace"):
            assert select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0], f"no {words!r} in {data!r}"
            data += os.read(self.fd, 4096)
            self.seen = data.decode(errors="replace")
        before, _, self.seen = data.decode(errors="replace").partition(words)
        return before

    def more(self, seconds: float = 180) -> None:
        """Wait for anything more to come."""
        import select

        assert self.seen or select.select([self.fd], [], [], seconds)[0], "nothing came"

    def interrupt(self) -> str:
        """Press Ctrl-C as a person does, again where nothing happens; everything up to the next prompt.

        CPython's input() misses a signal that comes after its prompt is shown and before it waits for a key: seen in
        3 of 1,500 tries.
        """
        for _ in range(5):
            self.type("\x03")
            with suppress(AssertionError):
                return self.until("you> ", 30)
        raise AssertionError(f"no prompt after Ctrl-C: {self.seen!r}")

    def type(self, text: str | bytes) -> None:
        os.write(self.fd, text if isinstance(text, bytes) else text.encode())

    def leave(self) -> int:
        """Exit code of the process, which must end within 20 seconds."""
        for _ in range(200):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            with suppress(OSError):
                os.set_blocking(self.fd, False)
                os.read(self.fd, 4096)
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("chat.py did not end")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal(tiny_adapter, tmp_path):
    screen = Terminal("--model", tiny_adapter, "--max_new_tokens", 900, "--temperature", 0, cwd=tmp_path)
    assert "/compare" in screen.until("you> ")
    screen.interrupt()  # at the prompt: a new prompt, no end
    screen.type("你好x\x7f，世界\r")  # the backspace takes the x
    screen.until("，世界\r\n")
    screen.more()
    assert "[stopped]" in screen.interrupt()  # at the first word of the answer, of 900
    screen.type(b"\xff\r")  # no UTF-8
    screen.until("\n")
    screen.more()
    screen.interrupt()
    screen.type("/save talk.jsonl\r")
    screen.until("[one record added to talk.jsonl]")
    screen.until("you> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.leave() == 0
    record = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert record["messages"][1]["content"] == "你好，世界"
    assert [message["role"] for message in record["messages"][:3]] == ["system", "user", "assistant"]


def test_lines_from_a_pipe(tiny_adapter, tmp_path):
    lines = "芯片由什么制成？\n/save a/b.jsonl\n/save talk.jsonl\nquit\nnever read\n"
    done = run_script("chat.py", "--model", tiny_adapter, "--max_new_tokens", 8, "--seed", 1, cwd=tmp_path, input=lines)
    assert done.returncode == 0, done.stderr
    assert "you>" not in done.stdout and "Traceback" not in done.stderr
    assert "[a/b.jsonl: No such file or directory]" in done.stderr
    record = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert load_script("chat").printable(record["messages"][-1]["content"]) == done.stdout.strip()


def test_out_of_memory_does_not_end_the_conversation(tiny_adapter, tmp_path, monkeypatch, capsys):
    import torch

    chat = load_script("chat")

    def full(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chat.Conversation, "generate", full)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好\n/system 短\n".encode()), encoding="utf-8"))
    chat.main(chat.Config(model=str(tiny_adapter)))
    told = capsys.readouterr().err
    assert "[out of memory; /save keeps the conversation, /reset makes room]" in told
    assert told.index("out of memory") < told.index("[system message: 短]")


def test_mistakes_end_with_a_line_and_the_right_code(tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "cut")
    (tmp_path / "cut" / "finetune_config.json").write_text("{")
    cut = run_script("chat.py", "--model", "cut", cwd=tmp_path, input="")
    assert cut.returncode == 1 and cut.stderr.startswith("error: cut/finetune_config.json: not the record of a run")
    assert cut.stderr.count("\n") == 1
    usage = run_script("chat.py", "--repetition_penalty", "0", cwd=tmp_path, input="")
    assert usage.returncode == 2 and "--repetition_penalty is 0.0" in usage.stderr
