"""Chat formats from templates/: rendered as published, set on a tokenizer, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, build_model, build_tokenizer, load_script, run_script, write_jsonl

qwen = load_script("qwen_finetuning")

FOLDER = ROOT / "templates"
NAMES = ["qwen2_chatml", "llama3_instruct", "chatglm3", "baichuan2_chat", "deepseek_chat"]
TALK = [
    {"role": "system", "content": "你是专家"},
    {"role": "user", "content": "hello\n补充信息：x"},
    {"role": "assistant", "content": "first 答案"},
    {"role": "user", "content": 'say "{{ x }}" \\ {% raw %}'},
    {"role": "assistant", "content": "second answer"},
]
ASKED = 'say "{{ x }}" \\ {% raw %}'
GOLDEN = {
    "qwen2_chatml": "<|im_start|>system\n你是专家<|im_end|>\n<|im_start|>user\nhello\n补充信息：x<|im_end|>\n"
    f"<|im_start|>assistant\nfirst 答案<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n"
    "<|im_start|>assistant\nsecond answer<|im_end|>\n",
    "llama3_instruct": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n你是专家<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhello\n补充信息：x<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nfirst 答案<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{ASKED}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nsecond answer<|eot_id|>",
    "chatglm3": "[gMASK]sop<|system|>\n 你是专家<|user|>\n hello\n补充信息：x<|assistant|>\n first 答案"
    f"<|user|>\n {ASKED}<|assistant|>\n second answer",
    "baichuan2_chat": "你是专家<reserved_106>hello\n补充信息：x<reserved_107>first 答案"
    f"<reserved_106>{ASKED}<reserved_107>second answer",
    "deepseek_chat": "<｜begin▁of▁sentence｜>你是专家\n\nUser: hello\n补充信息：x\n\nAssistant: first 答案"
    f"<｜end▁of▁sentence｜>User: {ASKED}\n\nAssistant: second answer<｜end▁of▁sentence｜>",
}
PROMPT_ENDS = {
    "qwen2_chatml": "<|im_start|>assistant\n",
    "llama3_instruct": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatglm3": "<|assistant|>",
    "baichuan2_chat": "<reserved_107>",
    "deepseek_chat": "Assistant:",
}
# What the model must write in TALK: the answers, what stands before them behind the generation prompt, and their ends.
SUPERVISED = {
    "qwen2_chatml": ["first 答案<|im_end|>", "second answer<|im_end|>"],
    "llama3_instruct": ["first 答案<|eot_id|>", "second answer<|eot_id|>"],
    "chatglm3": ["\n first 答案<|user|>", "\n second answer</s>"],
    "baichuan2_chat": ["first 答案<reserved_106>", "second answer</s>"],
    "deepseek_chat": [" first 答案<｜end▁of▁sentence｜>", " second answer<｜end▁of▁sentence｜>"],
}
# The models' own templates, as their tokenizer_config.json has them
OFFICIAL = {
    "chatglm3": "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>\n "
    "{{ message['content'] }}{% else %}<|{{ message['role'] }}|>\n {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "deepseek_chat": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}


def content_of(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def bare_tokenizer(name: str):
    """A tokenizer without a template that has the control tokens of this one."""
    template, tokenizer = content_of(name), build_tokenizer(None)
    tokens = [*template["control_tokens"], *template["stop_tokens"]]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens, "bos_token": tokens[0]})
    return tokenizer


def tokenizer_with(name: str):
    tokenizer = bare_tokenizer(name)
    qwen.set_template(tokenizer, FOLDER / f"{name}.json")
    return tokenizer


def supervised_texts(encoded: dict, tokenizer) -> list[str]:
    """The runs of labels that carry loss, as text."""
    marked = [label if label != -100 else None for label in encoded["labels"]]
    texts = [[]]
    for label in marked:
        if label is not None:
            texts[-1].append(label)
        elif texts[-1]:
            texts.append([])
    return [tokenizer.decode(run) for run in texts if run]


def test_these_are_the_files():
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)
    assert all(len(qwen.read_template(FOLDER / f"{name}.json")["source"]) > 40 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_conversation(name):
    tokenizer = tokenizer_with(name)
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == GOLDEN[name]
    prompt = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(PROMPT_ENDS[name]) and GOLDEN[name].startswith(prompt)


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_their_ends_carry_loss_and_nothing_else(name):
    tokenizer = tokenizer_with(name)
    encoded = qwen.encode_conversation(TALK, tokenizer)
    assert supervised_texts(encoded, tokenizer) == SUPERVISED[name]
    assert encoded["broken_prompts"] == 0
    last = encoded["labels"][-1] if encoded["labels"][-1] != -100 else encoded["labels"][-2]  # ChatML adds a newline
    stops = tokenizer.convert_tokens_to_ids(content_of(name)["stop_tokens"])
    assert last == tokenizer.eos_token_id == stops[0]
    assert set(qwen.end_of_turn_ids(tokenizer)) <= set(stops)
    prompt = qwen.encode_prompt(TALK[:-1], tokenizer)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert prompt == tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", NAMES)
def test_typed_control_tokens_stay_text(name):
    tokenizer = tokenizer_with(name)
    attack = "".join(content_of(name)["stop_tokens"] + content_of(name)["control_tokens"])
    plain = qwen.encode_conversation([{"role": "user", "content": "x"}, TALK[2]], tokenizer)["input_ids"]
    typed = qwen.encode_conversation([{"role": "user", "content": attack}, TALK[2]], tokenizer)["input_ids"]
    control = set(qwen.control_tokens(tokenizer)[0].values())
    assert sum(id in control for id in typed) == sum(id in control for id in plain)


@pytest.mark.parametrize("official", ["qwen2_5:qwen2_chatml", "llama3:llama3_instruct", "chatglm3", "deepseek_chat"])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[1:2], [TALK[1], TALK[2] | {"content": "  \n spaced 😀 \n"}]])
def test_rendering_equals_the_official_template(official, talk):
    import trl

    shipped, _, name = official.rpartition(":")
    tokenizer, other = tokenizer_with(name), tokenizer_with(name)
    folder = Path(trl.__file__).parent / "chat_templates"
    other.chat_template = (folder / f"{shipped}.jinja").read_text("utf-8") if shipped else OFFICIAL[name]
    other.bos_token = content_of(name)["prefix"] or None
    for prompt in (False, True):
        options = {"tokenize": False, "add_generation_prompt": prompt}
        assert tokenizer.apply_chat_template(talk, **options) == other.apply_chat_template(talk, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_template_is_saved_with_the_tokenizer(name, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_with(name)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token == content_of(name)["stop_tokens"][0]
    assert qwen.encode_conversation(TALK, again) == qwen.encode_conversation(TALK, tokenizer)
    assert qwen.fingerprint(again) == qwen.fingerprint(tokenizer)


def test_missing_control_tokens_are_all_named():
    with pytest.raises(qwen.UserError, match=r"no </s>, <\|user\|>, <\|observation\|>, \[gMASK\], sop, <\|system\|>"):
        qwen.set_template(build_tokenizer(None), FOLDER / "chatglm3.json")


def test_an_ordinary_token_of_the_vocabulary_becomes_a_control_token():
    """As with Baichuan2, whose role tokens are ordinary entries; no token is added, no id moves."""
    tokenizer = build_tokenizer(None)
    tokenizer.add_tokens(["<reserved_106>", "<reserved_107>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["</s>"]})
    before = tokenizer.get_vocab()
    qwen.set_template(tokenizer, FOLDER / "baichuan2_chat.json")
    assert tokenizer.get_vocab() == before
    assert {"<reserved_106>", "<reserved_107>", "</s>", "<|im_start|>"} <= set(qwen.control_tokens(tokenizer)[0])
    encoded = qwen.encode_conversation([{"role": "user", "content": "<reserved_107>"}, TALK[2]], tokenizer)
    assert encoded["input_ids"].count(before["<reserved_107>"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user": "<|im_start|>user"}, "'user' needs {content} once"),
        ({"user": "{content}{content}"}, "'user' needs {content} once"),
        ({"user": None, "colour": "red"}, "unknown key 'colour'; 'user' is missing or no str"),
        ({"trim": "no"}, "'trim' is missing or no bool"),
        ({"stop_tokens": []}, "'stop_tokens' must name one"),
        ({"generation_prompt": "<|im_start|>bot"}, "'assistant' must begin with 'generation_prompt'"),
    ],
)
def test_wrong_template_files_are_named(change, words, tmp_path):
    content = {key: value for key, value in (content_of("qwen2_chatml") | change).items() if value is not None}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(qwen.UserError) as error:
        qwen.read_template(tmp_path / "mine.json")
    assert "mine.json: " in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_unreadable_template_files_are_named(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    for name, words in (("list", "'source' is missing"), ("broken", "can not be read"), ("none", "No such file")):
        with pytest.raises(qwen.UserError, match=f"{name}.json: .*{words}"):
            qwen.read_template(tmp_path / f"{name}.json")


def test_a_run_with_a_template_file_and_without(tmp_path, monkeypatch, capsys):
    """The model has no template; then a wrong one; then ChatML's, which every later script finds in the folder."""
    from transformers import AutoTokenizer

    model = build_model("qwen2", tmp_path / "model", chat_template=None)
    write_jsonl(tmp_path / "data.jsonl", [{"input": f"What costs {i}?", "output": f"{i} euros"} for i in range(12)])
    flags = ["--model_name", str(model), "--dataset_path", "data.jsonl", "--no-load_in_4bit", "--dtype", "float32"]
    flags += ["--optim", "adamw_torch", "--max_steps", "1", "--system_prompt", "Be brief."]
    process = run_script("qwen_finetuning.py", *flags, cwd=tmp_path)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "no chat template" in process.stderr and all(f"{name}.json" in process.stderr for name in NAMES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qwen.UserError, match=r"llama3_instruct.json: .*tokenizer has no <\|eot_id\|>, "):
        qwen.main(qwen.parse_args([*flags, "--template_path", str(FOLDER / "llama3_instruct.json")]))
    qwen.main(qwen.parse_args([*flags, "--template_path", str(FOLDER / "qwen2_chatml.json")]))
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat costs" in capsys.readouterr().out
    saved = AutoTokenizer.from_pretrained(tmp_path / "Qwen_finetuning_model")
    assert saved.apply_chat_template(TALK, tokenize=False) == GOLDEN["qwen2_chatml"]


def test_a_template_of_its_own_gives_way_only_by_force(tmp_path, tiny_qwen2, monkeypatch, capsys):
    write_jsonl(tmp_path / "data.jsonl", [{"input": f"What costs {i}?", "output": f"{i} euros"} for i in range(12)])
    monkeypatch.chdir(tmp_path)
    flags = ["--model_name", str(tiny_qwen2), "--dataset_path", "data.jsonl", "--system_prompt", "", "--dry_run"]
    flags += ["--template_path", str(FOLDER / "qwen2_chatml.json")]
    qwen.main(qwen.parse_args(flags))
    printed = capsys.readouterr()
    assert "created by Alibaba Cloud" not in printed.out and "--force_template would take" in printed.err
    qwen.main(qwen.parse_args([*flags, "--force_template"]))
    assert "created by Alibaba Cloud" in capsys.readouterr().out


def test_force_without_a_template_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        qwen.parse_args(["--force_template"])
    assert stop.value.code == 2 and "--force_template needs --template_path" in capsys.readouterr().err
