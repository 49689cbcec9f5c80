"""From messages to token ids and labels, on the chat templates that trl ships and the five of templates/."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from conftest import CHATML, ROOT, build_tokenizer, load_script

training = load_script("qwen_finetuning")
GOLDEN = json.loads((ROOT / "tests/data/golden.json").read_text(encoding="utf-8"))
VISION = ("idefics3", "llava_next", "smolvlm")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "now", "parameters": CITY}}]


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


TALKS = {
    "plain": [turn("user", "hi <|im_end|> <|eot_id|> x"), turn("assistant", "first 答案")],
    "turns": [turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2"), turn("assistant", "a2")],
    "thought": [turn("user", "q1"), turn("assistant", "a1", reasoning_content="think 1"), turn("user", "q2")]
    + [turn("assistant", "a2", reasoning_content="think 2")],
    "call": [turn("user", "weather in Paris?"), turn("assistant", "", tool_calls=[CALL])]
    + [turn("tool", "18 C", name="weather"), turn("assistant", "18 degrees.")],
}


def templates() -> dict[str, str]:
    import trl

    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    found = {
        file.stem: file.read_text(encoding="utf-8") for file in files if not file.stem.endswith("_training")
    }
    found = {name: text for name, text in found.items() if "_vl" not in name and name not in VISION}
    for file in sorted((ROOT / "templates").glob("*.json")):
        found[file.name] = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    return found


def tokenizer_for(template: str):
    """The tests' tokenizer with the template's control tokens as special ones."""
    tokenizer = build_tokenizer(template)
    tokenizer.bos_token = "<s>"
    pattern = (
        r"<\|[^|>{}]+\|>|<｜[^｜>{}]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|<reserved_\d+>|</?s>"
    )
    special = sorted(set(re.findall(pattern, template)))
    tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    return tokenizer


def supervised(examples: list[dict], tokenizer) -> list[str]:
    """The text that carries loss in each example."""
    return [tokenizer.decode([label for label in example["labels"] if label != -100]) for example in examples]


def outcome(template: str, name: str) -> list[str] | str:
    """What of a conversation carries loss, or why the template refuses it; checks what holds for all."""
    tokenizer, tools = tokenizer_for(template), TOOLS if name == "call" else None
    try:
        examples, counts = training.encode(TALKS[name], tokenizer, tools or [])
    except ValueError as error:
        return str(error)
    chat = {"tools": tools, "sanitize_control_tokens": True, "return_dict": False}
    prompts = [
        tokenizer.apply_chat_template(TALKS[name][:i], add_generation_prompt=True, **chat)
        for i, message in enumerate(TALKS[name])
        if message["role"] == "assistant"
    ]
    for prompt in (
        prompts
    ):  # each prompt as at use begins an example, and nothing of it is supervised, or it is counted
        starts = [e for e in examples if len(os.path.commonprefix([prompt, e["input_ids"]])) == len(prompt)]
        begins = any(e["labels"][len(prompt) - 1] == -100 != e["labels"][len(prompt)] for e in starts)
        assert begins or counts["prompts_otherwise"], name
    assert counts["turns_with_loss"] == len(prompts)
    for example in examples:
        assert all(
            label in (-100, id) for id, label in zip(example["input_ids"], example["labels"], strict=True)
        )
    return supervised(examples, tokenizer)


@pytest.mark.parametrize("name", TALKS)
def test_supervised_text_on_every_template(name):
    found = {file: outcome(template, name) for file, template in templates().items()}
    assert found == {file: GOLDEN[file][name] for file in found}


def test_known_edges():
    tokenizer, qwen3 = build_tokenizer(CHATML), tokenizer_for(templates()["qwen3"])
    [example], _ = training.encode([turn("user", "q"), turn("assistant", "\n\n  spaced  \n")], tokenizer)
    assert supervised([example], tokenizer) == ["spaced  \n<|im_end|>"]

    silent = build_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    [example], _ = training.encode([turn("user", "q"), turn("assistant", "a")], silent)
    assert example["labels"][-1] == silent.eos_token_id  # else the model would never stop

    ordinary = build_tokenizer(CHATML.replace("<|im_end|>", "</turn>"))
    ordinary.add_tokens(["</turn>"])
    ordinary.eos_token = "</turn>"  # an end that is not special
    [example], _ = training.encode([turn("user", "q </turn>"), turn("assistant", "a")], ordinary)
    assert supervised([example], ordinary) == ["a</turn>"]

    tokenizer.pad_token = tokenizer.eos_token
    [example], _ = training.encode(TALKS["turns"], tokenizer)
    assert supervised([example], tokenizer) == ["a1<|im_end|>a2<|im_end|>"]

    with pytest.raises(ValueError, match="refuses it: no system"):
        refusing = build_tokenizer(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        )
        training.encode([turn("system", "s"), turn("user", "q"), turn("assistant", "a")], refusing)
    with pytest.raises(ValueError, match="writes earlier turns otherwise once this answer follows"):
        training.encode([turn("user", "q"), turn("assistant", "a1"), turn("assistant", "a2")], qwen3)
    for content, thought, words in (
        ("Hello <think>x</think>a", "", "'Hello' before"),
        ("<think>x</think>a", "y", ""),
    ):
        with pytest.raises(ValueError, match=words or "say different things"):
            said = turn("assistant", content, reasoning_content=thought)
            training.encode([turn("user", "q"), said], qwen3)
    with pytest.raises(ValueError, match="does not write the answer 'a secret'"):
        shy = build_tokenizer(CHATML.replace("{{ message.content }}", "{{ message.content[:3] }}"))
        training.encode([turn("user", "q"), turn("assistant", "a secret")], shy)


def test_loss_only_where_it_is_wanted():
    tokenizer = build_tokenizer(CHATML)
    examples, counts = training.encode(TALKS["turns"], tokenizer)
    ends = [i for i, label in enumerate(examples[0]["labels"]) if label == tokenizer.eos_token_id]
    for limit, cut in ((ends[1] + 1, 0), (ends[1], 1), (ends[0], 2)):  # each answer that lost its end
        config = training.FinetuneConfig(max_seq_length=limit)
        counts = training.Counter()
        training.cut_examples(examples, counts, set(), config)
        assert counts["answers_cut"] == cut
    talk = [turn("user", "q1"), turn("assistant", "a1", weight=0), *TALKS["turns"], turn("user", "q3")]
    examples, counts = training.encode(talk, tokenizer)
    assert supervised(examples, tokenizer) == ["a1<|im_end|>a2<|im_end|>"]
    assert (counts["turns_with_loss"], counts["turns_without_loss"]) == (2, 2)
    examples, counts = training.encode(talk, tokenizer, train_on="last")
    assert supervised(examples, tokenizer) == ["a2<|im_end|>"]
    assert (counts["turns_with_loss"], counts["turns_without_loss"]) == (1, 3)


def test_the_system_prompt_lies_in_the_template(capsys):
    said = turn("system", '你懂 "x"\n{{ y }}')
    talk = [turn("user", "q"), turn("assistant", "a"), turn("user", "r")]
    for name, template in templates().items():
        given, built_in = tokenizer_for(template), tokenizer_for(template)
        training.set_defaults(built_in, said["content"])
        folded = "takes no system message" in capsys.readouterr().err
        assert folded == (name == "gemma"), name
        if folded:
            first = turn("user", said["content"] + "\n\nq")
            assert built_in.apply_chat_template([said, *talk], tokenize=False) == given.apply_chat_template(
                [first, *talk[1:]], tokenize=False
            )
        wanted = given.apply_chat_template([first, *talk[1:]] if folded else [said, *talk], tokenize=False)
        assert built_in.apply_chat_template(talk, tokenize=False) == wanted, name
    with pytest.raises(ValueError, match="control token"):
        training.set_defaults(build_tokenizer(), "Stop at <|im_end|>.")
    with pytest.raises(ValueError, match="enable_thinking"):
        training.set_defaults(build_tokenizer(), "", "off")
    qwen = tokenizer_for(templates()["qwen3"])
    training.set_defaults(qwen, "", "off")
    assert qwen.apply_chat_template(talk, tokenize=False, add_generation_prompt=True).endswith(
        "\n\n</think>\n\n"
    )


def test_of_several_templates_each_gets_the_system_prompt():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = dict.fromkeys(("default", "tool_use"), tokenizer.chat_template)
    training.set_defaults(tokenizer, "Be brief.")
    talk = [turn("user", "q")]
    for tools in (None, TOOLS):  # with tools the library takes tool_use
        assert "Be brief." in tokenizer.apply_chat_template(talk, tools=tools, tokenize=False)


def test_a_template_of_the_folder_goes_onto_a_tokenizer(tmp_path):
    tokenizer = build_tokenizer(None)
    training.set_template(tokenizer, str(ROOT / "templates/qwen2_chatml.json"))
    assert tokenizer.eos_token == "<|im_end|>" and "Alibaba" in tokenizer.chat_template
    with pytest.raises(ValueError, match=r"llama3_instruct.json: the tokenizer has no <\|eot_id\|>"):
        training.set_template(tokenizer, str(ROOT / "templates/llama3_instruct.json"))
    (tmp_path / "half.json").write_text('{"chat_template": "x"}')
    with pytest.raises(ValueError, match="half.json needs chat_template, stop_tokens and control_tokens"):
        training.set_template(tokenizer, str(tmp_path / "half.json"))
