"""sft_basics.py: the two formats to the letter, what carries loss, the answers' loss, whole runs, errors."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script

sft = load_script("sft_basics")
CLOSING = re.compile(r"两种格式的损失对比：instruction=(\d+\.\d{4}), sft=(\d+\.\d{4})$")


def run(folder: Path, model: Path, *flags: str) -> dict[str, dict]:
    """Train in this process; returns the figures and the loss of each step, by format."""
    sft.main(sft.parse_args(["--model_name", str(model), "--output_dir", str(folder), *flags]))
    paths = folder.glob("*/trainer_state.json")
    logs = {path.parent.name: json.loads(path.read_text())["log_history"] for path in paths}
    return {name: log[-1] | {"losses": [e["loss"] for e in log if "loss" in e]} for name, log in logs.items()}


def test_settings_and_formats_are_the_documented_ones():
    config = sft.FinetuneConfig()
    assert config == sft.FinetuneConfig("Qwen/Qwen3-4b", Path("./outputs/sft_basics"), 30, 5e-5, 2, 3, True)
    modes = [[c.instruction_mode for c in sft.parse_args(argv)] for argv in ([], ["--no-instruction_mode"])]
    assert modes == [[True, False], [False]]
    assert len(sft.EXAMPLE_PAIRS) >= 24 and sft.LOGGER.name == "sft_basics"
    instruction = sft.build_dataset(config)["text"]
    plain = sft.build_dataset(sft.FinetuneConfig(instruction_mode=False))["text"]
    for pair, one, other in zip(sft.EXAMPLE_PAIRS, instruction, plain, strict=True):
        assert one == f"指令：{pair['instruction']}\n输入：{pair['input']}\n回答：{pair['output']}"
        assert other == f"问题：{pair['input']}\n回答：{pair['output']}"


def test_only_the_attention_mask_lets_the_ending_keep_its_label(tiny_gpt2, caplog):
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"  # the hard case
    dataset = sft.build_dataset(sft.FinetuneConfig())
    assert {len(ids) for ids in sft.tokenize(dataset, tokenizer)["input_ids"]} == {512}
    rows = list(sft.tokenize(dataset, tokenizer, max_length=128, keep_eos=True))
    labels = [row["labels"] for row in rows]
    usual = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
    assert tokenizer.eos_token_id not in usual
    for text, row, label in zip(dataset["text"], rows, labels, strict=True):
        ids = tokenizer(text + tokenizer.eos_token).input_ids
        assert row["input_ids"][: len(ids)] == ids and label == ids + [-100] * (128 - len(ids))
    sft.tokenize(dataset, tokenizer, max_length=32)
    assert re.search(r"--max_length 32 cuts \d+ of 24 texts", caplog.text)


def test_answer_loss_is_that_of_the_answers_tokens(tiny_gpt2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, total, count = AutoTokenizer.from_pretrained(tiny_gpt2), 0.0, 0
    stops = []
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    texts = sft.build_dataset(sft.FinetuneConfig())["text"][:4]
    for text in texts:
        ids = tokenizer(text).input_ids
        prompt = len(tokenizer(text[: text.index("回答：") + 3]).input_ids)
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(chances[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
        count += len(ids) - prompt
        stops.append(chances[-1, tokenizer.eos_token_id].exp().item())
    figures = sft.answer_figures(model, tokenizer, texts)
    assert figures == pytest.approx((total / count, sum(stops) / 4), rel=1e-5)


def test_both_formats_learn_from_one_start_and_eos_only_when_kept(tiny_gpt2, tmp_path, capsys, caplog):
    flags = ("--max_length", "128", "--learning_rate", "2e-3")
    both = run(tmp_path / "both", tiny_gpt2, *flags)
    captured = capsys.readouterr()
    printed = CLOSING.search(caplog.messages[-1]).groups()
    for name, loss in zip(("instruction", "sft"), printed, strict=True):
        state = both[name]
        assert len(state["losses"]) == 30 and all(map(math.isfinite, state["losses"]))
        assert sum(state["losses"][-5:]) < sum(state["losses"][:5]) - 1
        assert f"{state['eval_loss']:.4f}" == loss and f"{name:<12}eval_loss" in captured.out
        assert state["answer_loss"] < state["answer_loss_before"] and state["supervised_eos"] == 0
        assert (tmp_path / "both" / name / "model.safetensors").is_file()
    kept = run(tmp_path, tiny_gpt2, *flags, "--keep_eos", "--eval_ratio", "0.25", "--instruction_mode")
    assert kept["instruction"]["supervised_eos"] == 18, "of 24 rows a quarter is held out"
    assert kept["instruction"]["stop_probability"] > 5 * both["instruction"]["stop_probability"]
    alone = run(tmp_path / "alone", tiny_gpt2, *flags, "--no-instruction_mode", "--max_steps", "1")
    assert list(alone) == ["sft"] and alone["sft"]["losses"] == both["sft"]["losses"][:1]


def test_errors_are_one_line(tiny_gpt2, tmp_path, monkeypatch):
    process = run_script("sft_basics.py", "--max_steps", "0", cwd=tmp_path)
    assert process.returncode == 1
    assert (
        process.stderr == "error: --max_steps and --batch_size must be 1 or more, --max_length 32 or more\n"
    )
    with pytest.raises(SystemExit, match="2"):
        sft.parse_args(["--max_step", "3"])
    line = "^Qwen/Qwen3-4b: We couldn't connect[^\n]* Try --model_name models/Smol"
    with pytest.raises(ValueError, match=line):
        sft.load_for_training("Qwen/Qwen3-4b", 512)
    with pytest.raises(ValueError, match="it has 1024 positions, --max_length is 1025. Try --model_name"):
        sft.load_for_training(str(tiny_gpt2), 1025)
    with pytest.raises(ValueError, match="the training ran away, try a smaller --learning_rate"):
        run(tmp_path, tiny_gpt2, "--max_steps", "6", "--learning_rate", "1e6", "--instruction_mode")
    shutil.copytree(tiny_gpt2, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(ValueError, match="^/[^\n]*(header|metadata)[^\n]* Try --model_name"):
        sft.load_for_training(str(tmp_path), 512)
    (tmp_path / "model.safetensors").unlink()  # the check of the memory comes first
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="training takes 0.0 GiB, 0.0 GiB are free. Try --model_name"):
        sft.load_for_training(str(tmp_path), 512)


@pytest.mark.real
def test_real_model_learns_both_formats(tmp_path):
    folder = Path(os.environ.get("SFT_MODEL_DIR") or ROOT / "models/SmolLM2-135M-Instruct")
    if not folder.is_dir():
        pytest.skip("no real model: set SFT_MODEL_DIR, or run qwen_finetuning.py --demo")
    for state in run(tmp_path, folder, "--max_length", "128", "--max_steps", "12", "--keep_eos").values():
        assert state["answer_loss"] < state["answer_loss_before"] - 0.2 and state["supervised_eos"] == 24
