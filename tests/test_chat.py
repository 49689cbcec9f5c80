"""chat.py on a tiny adapter: turns and their cache, commands, the context's end, and a real terminal."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from contextlib import suppress

import pytest
from conftest import ROOT, load_script

GREEDY = {"temperature": 0.0, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def loaded(tiny_adapter):
    """(model, tokenizer) of the tiny adapter."""
    return load_script("chat").load_model(str(tiny_adapter))


def conversation(loaded, **settings):
    chat = load_script("chat")
    return chat.Talk(chat.Config(**GREEDY | settings), *loaded)


@pytest.fixture
def talk(loaded):
    return conversation(loaded)


def fresh_answer(loaded, talk, system: str = "") -> str:
    """The answer to the last question of `talk`, by a conversation that reads everything anew."""
    other = conversation(loaded, system_prompt=system)
    other.turns = talk.turns[:-2]
    return other.generate(talk.turns[-2])[0]


def test_the_second_turn_reads_only_what_is_new_and_answers_the_same(talk, loaded):
    seen = []
    embedding = loaded[0].get_input_embeddings()
    watch = embedding.register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    talk.ask("What are chips made of?")
    first = seen[0]
    seen.clear()
    talk.ask("你好，世界！")
    watch.remove()
    whole = len(talk.read) - 15  # 16 tokens written, of which the last is not read
    assert seen[0] < whole - first + 2 and len(talk.turns) == 4
    assert fresh_answer(loaded, talk) == talk.turns[-1]["content"]
    talk.obey("/system", "Be brief.")
    talk.ask("And genes?")
    assert talk.turns[-1]["content"] == fresh_answer(loaded, talk, "Be brief.") != fresh_answer(loaded, talk)


def test_the_penalties_count_the_answer_alone(loaded, monkeypatch):
    import torch

    seen, right = {}, loaded[0].generate
    monkeypatch.setattr(loaded[0], "generate", lambda ids, **o: seen.update(o, ids=ids) or right(ids, **o))
    conversation(loaded, repetition_penalty=1.3, no_repeat_ngram_size=1).ask("silicon")
    said = torch.cat([seen["ids"], torch.tensor([[5]])], dim=1)
    scores = [processor(said, torch.ones(1, 494))[0] for processor in seen["logits_processor"]]
    assert [(score != 1).nonzero().flatten().tolist() for score in scores] == [[5], [5]]
    assert scores[1][5] == pytest.approx(1 / 1.3) and scores[0][5] == -torch.inf
    assert seen["use_cache"]


def test_compare_is_the_base_and_leaves_the_conversation_as_it_was(talk, loaded, tiny_qwen2, capsys):
    talk.ask("What are chips made of?")
    before = list(talk.turns)
    capsys.readouterr()
    talk.obey("/compare", "")
    base = capsys.readouterr().out
    other = load_script("chat").load_model(str(tiny_qwen2))
    other[1].chat_template = loaded[1].chat_template
    plain = conversation(other)
    plain.ask("What are chips made of?")
    assert base == capsys.readouterr().out != before[1]["content"] + "\n"
    with pytest.raises(ValueError, match="can not be done now"):
        plain.obey("/compare", "")
    assert talk.turns == before
    talk.ask("And genes?")
    assert talk.turns[-1]["content"] == fresh_answer(loaded, talk)


def test_ctrl_c_keeps_what_has_come_and_the_conversation_goes_on(talk, loaded, capsys):
    count = 0

    def interrupt(*_):
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt

    watch = loaded[0].get_input_embeddings().register_forward_hook(interrupt)
    talk.ask("What are chips made of?")
    assert "[stopped]" in capsys.readouterr().err and talk.turns[1]["weight"] == 0
    count = 11  # now before the first word: a question without an answer does not stay
    with pytest.raises(ValueError, match="the question is forgotten"):
        talk.ask("Why?")
    watch.remove()
    assert len(talk.turns) == 2
    talk.ask("And genes?")
    assert fresh_answer(loaded, talk) == talk.turns[-1]["content"]


def test_the_oldest_turns_go_when_the_context_is_full(loaded, monkeypatch, capsys):
    talk = conversation(loaded, repetition_penalty=1.3, no_repeat_ngram_size=3)
    monkeypatch.setattr(loaded[0].config, "max_position_embeddings", 176)
    for number in range(5):
        talk.ask(f"question {number} " + "chips are made of silicon " * 2)
    assert "[context full: the 2 oldest messages are forgotten]" in capsys.readouterr().err
    assert 2 <= len(talk.turns) < 10 and talk.turns[-2]["content"].startswith("question 4")
    before = list(talk.turns)
    with pytest.raises(ValueError, match="and the answer's are more than the 176 that fit"):
        talk.ask("chips " * 400)
    assert talk.turns == before  # a question that is refused costs no history


def test_save_marks_what_was_cut_and_writes_no_half_character(talk, loaded, tmp_path, monkeypatch, capsys):
    from transformers import ForcedEOSTokenLogitsProcessor as Ending

    path, right = tmp_path / "talks.jsonl", loaded[0].generate
    path.write_text('{"input": "a", "output": "b"}', encoding="utf-8")
    talk.ask("你")
    assert "[cut at --max_new_tokens 16]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="can not be done now"):
        conversation(loaded).obey("/save", str(path))  # there is nothing yet

    def ending_soon(prompt, logits_processor, **options):
        ending = Ending(prompt.shape[1] + 8, loaded[1].eos_token_id)
        return right(prompt, logits_processor=[*logits_processor, ending], **options)

    monkeypatch.setattr(loaded[0], "generate", ending_soon)
    talk.ask("芯片由什么制成？")
    assert "cut" not in capsys.readouterr().err
    talk.obey("/save", str(path))
    talk.obey("/save", str(path))
    assert [line[:9] for line in path.read_text("utf-8").split("\n")] == ['{"input":'] + ['{"message'] * 2 + [
        ""
    ]
    training = load_script("qwen_finetuning")
    messages, _ = training.messages_of([row for _, row in training.rows_of(str(path))][1])
    assert [m.get("weight") for m in messages] == [None, 0, None, None] and messages == talk.turns
    assert not messages[1]["content"].endswith("\ufffd")
    for line in ("/save no/such/folder/talk.jsonl", "/save my_dataset.json", "/save", "/what"):
        with pytest.raises((ValueError, OSError), match="No such file|can not be done now"):
            talk.obey(*line.partition(" ")[::2])


def test_lines_from_a_pipe(tiny_adapter, tmp_path, monkeypatch, capsys):
    chat, seen = load_script("chat"), []
    text = (
        '\ufeff你好\n\n/reset\n/system 短\n/help\n/nonsense\nWhy?\n"""\n/reset\ntwo\n"""\nquit\nnever read\n'
    )
    stdin = io.TextIOWrapper(io.BytesIO(text.encode() + b"\xff"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr(chat.Talk, "ask", lambda talk, text: seen.append(([*talk.system], text)))
    chat.main(chat.Config(model=str(tiny_adapter)))
    system = [{"role": "system", "content": "短"}]
    assert seen == [([], "你好"), (system, "Why?"), (system, "/reset\ntwo")]
    told = capsys.readouterr()
    assert told.out == "" and "[/nonsense  can not be done now." in told.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'"""\nnot\nclosed\n')))
    chat.main(chat.Config(model=str(tiny_adapter)))
    assert seen[-1] == ([], "not\nclosed")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="stdin is closed"):
        chat.main(chat.Config())


class Terminal:
    """chat.py on a pseudo-terminal, typed to and read as a person does."""

    def __init__(self, *args, cwd):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            command = [sys.executable, str(ROOT / "chat.py"), *map(str, args)]
            os.execve(sys.executable, command, os.environ | {"TERM": "xterm"})
        self.seen = b""

    def until(self, words: str, seconds: float = 120) -> str:
        """Everything up to `words`, which must come within `seconds`."""
        end = time.monotonic() + seconds
        while words.encode() not in self.seen:
            assert select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0], (words, self.seen)
            self.seen += os.read(self.fd, 4096)
        before, _, self.seen = self.seen.partition(words.encode())
        return before.decode(errors="replace")

    def interrupt(self) -> str:
        """Press Ctrl-C, again where nothing comes: input() misses one between its prompt and its wait."""
        for _ in range(20):
            self.type("\x03")
            with suppress(AssertionError):
                return self.until("you> ", 1)
        raise AssertionError(f"no prompt after Ctrl-C: {self.seen}")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal(tiny_adapter, tmp_path):
    screen = Terminal("--model", tiny_adapter, "--max_new_tokens", 900, "--temperature", 0, cwd=tmp_path)
    assert "\x1b[?2004h" in screen.until("you> ")  # asks the terminal to mark what is pasted
    screen.type("\x1b[200~/reset\rone 🙂\rtwo\r三\rfive\x1b[201~")  # what a terminal sends for a paste
    screen.until("five")
    screen.type("\r")
    screen.until("\n")
    while len(screen.seen) < 60:  # the answer has begun
        screen.seen += os.read(screen.fd, 4096)
    assert "[stopped]" in screen.interrupt()
    assert "[stopped]" not in screen.interrupt()  # all five lines were one message: no other is under way
    screen.type("/save talk.jsonl\r")
    screen.until("[done]")
    screen.until("you> ")  # else Ctrl-D comes before readline listens
    screen.type("\x04")  # Ctrl-D
    assert os.waitstatus_to_exitcode(os.waitpid(screen.pid, 0)[1]) == 0
