"""sft_basics.py: the two formats to the letter, what carries loss, the memory check, and whole runs on tiny GPT-2."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script

sft = load_script("sft_basics")
CLOSING = re.compile(r"两种格式的损失对比：instruction=(\d+\.\d{4}), sft=(\d+\.\d{4})$")
SHORT = ("--max_length", "64", "--learning_rate", "1e-3")


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def figures(folder: Path) -> dict:
    return next(entry for entry in reversed(history(folder)) if "answer_loss" in entry)


# --------------------------------------------------------------------------------------- pure functions


def test_defaults_and_names_are_the_documented_ones():
    config = sft.FinetuneConfig()
    assert (config.model_name, config.output_dir) == ("Qwen/Qwen3-4b", Path("./outputs/sft_basics"))
    assert (config.max_steps, config.learning_rate, config.batch_size, config.warmup_steps) == (30, 5e-5, 2, 3)
    assert config.instruction_mode is True and config.max_length == 512 and config.eval_ratio == 0


def test_without_the_flag_both_formats_are_trained_instruction_first():
    both = sft.parse_args([])
    assert [(c.instruction_mode, c.output_dir.name) for c in both] == [(True, "instruction"), (False, "sft")]
    assert [c.instruction_mode for c in sft.parse_args(["--instruction_mode"])] == [True]
    assert [c.instruction_mode for c in sft.parse_args(["--no-instruction_mode"])] == [False]


def test_examples_and_formats_to_the_letter():
    pairs = sft.EXAMPLE_PAIRS
    assert len(pairs) >= 24 and len({pair["instruction"] for pair in pairs}) >= 6
    assert all(set(pair) == {"instruction", "input", "output"} and all(pair.values()) for pair in pairs)
    assert len({pair["input"] for pair in pairs}) == len(pairs)
    texts = [sft.build_dataset(sft.FinetuneConfig(instruction_mode=mode)) for mode in (True, False)]
    assert [dataset.column_names for dataset in texts] == [["text"], ["text"]]
    for pair, instruction, plain in zip(pairs, texts[0]["text"], texts[1]["text"], strict=True):
        assert instruction == f"指令：{pair['instruction']}\n输入：{pair['input']}\n回答：{pair['output']}"
        assert plain == f"问题：{pair['input']}\n回答：{pair['output']}"
        assert instruction.count("\n回答：") == plain.count("\n回答：") == 1  # answer_figures looks for it


def test_tokenize_pads_on_the_right_and_cuts_to_the_length(tiny_gpt2):
    tokenizer = tokenizer_of(tiny_gpt2)
    tokenizer.padding_side = "left"  # a chat tokenizer often says so
    dataset = sft.build_dataset(sft.FinetuneConfig())
    rows = sft.tokenize(dataset, tokenizer)
    assert rows.column_names == ["input_ids", "attention_mask"]
    for text, row in zip(dataset["text"], rows, strict=True):
        ids = tokenizer(text).input_ids
        assert len(row["input_ids"]) == 512
        assert row["input_ids"] == ids + [tokenizer.pad_token_id] * (512 - len(ids))
        assert row["attention_mask"] == [1] * len(ids) + [0] * (512 - len(ids))
    assert {len(row["input_ids"]) for row in sft.tokenize(dataset, tokenizer, max_length=16)} == {16}


def test_only_the_attention_mask_lets_the_final_eos_keep_its_label(tiny_gpt2):
    from transformers import DataCollatorForLanguageModeling

    tokenizer = tokenizer_of(tiny_gpt2)  # pad = EOS
    dataset = sft.build_dataset(sft.FinetuneConfig())
    rows = list(sft.tokenize(dataset, tokenizer, max_length=128, keep_eos=True))
    labels = sft.collate_by_attention(rows)["labels"]
    usual = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
    assert labels.shape == (24, 128)
    assert int((usual == tokenizer.eos_token_id).sum()) == 0
    assert int((labels == tokenizer.eos_token_id).sum()) == 24
    for text, row in zip(dataset["text"], labels, strict=True):
        assert tokenizer.decode(row[row != -100]) == text + tokenizer.eos_token
    cut = sft.collate_by_attention(list(sft.tokenize(dataset, tokenizer, max_length=8, keep_eos=True)))["labels"]
    assert int((cut == tokenizer.eos_token_id).sum()) == 0, "a text that is cut has no ending to learn"


def test_both_formats_are_measured_on_the_same_answer_tokens(tiny_gpt2):
    """With a model that gives every token the same chance, the mean loss is log(vocabulary), and P(EOS) 1/that."""
    import torch

    tokenizer, seen = tokenizer_of(tiny_gpt2), []

    class Uniform:
        device = torch.device("cpu")

        def eval(self):
            return self

        def __call__(self, input_ids, use_cache):
            assert use_cache is False
            logits = torch.zeros(1, input_ids.shape[1], len(tokenizer))
            return type("Output", (), {"logits": logits})

    for mode in (True, False):
        texts = sft.build_dataset(sft.FinetuneConfig(instruction_mode=mode))["text"]
        loss, stop = sft.answer_figures(Uniform(), tokenizer, texts)
        assert loss == pytest.approx(math.log(len(tokenizer)), rel=1e-5)
        assert stop == pytest.approx(1 / len(tokenizer), rel=1e-5)
        answers = [text[text.index("\n回答：") + 4 :] for text in texts]
        seen.append(
            [tokenizer("\n回答：" + answer).input_ids[len(tokenizer("\n回答：").input_ids) :] for answer in answers]
        )
    assert seen[0] == seen[1]


def test_answer_loss_equals_a_plain_count_over_the_answers(tiny_gpt2):
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(tiny_gpt2)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.eval()
    texts = sft.build_dataset(sft.FinetuneConfig(instruction_mode=False))["text"][:4]
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text).input_ids
        prompt = len(tokenizer(text[: text.index("\n回答：") + 4]).input_ids)  # byte-level: no token spans the colon
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(prompt, len(ids)):
            total -= chances[position - 1, ids[position]].item()
            count += 1
    assert sft.answer_figures(model, tokenizer, texts)[0] == pytest.approx(total / count, rel=1e-5)


def test_memory_of_full_finetuning_in_known_figures():
    assert sft.training_memory(1_000_000, 100, layers=2, hidden=64, vocabulary=1000) == 17_635_200
    qwen3_4b = sft.training_memory(4_022_468_096, 2 * 512, layers=36, hidden=2560, vocabulary=151_936)
    assert 60 < qwen3_4b / 2**30 < 70
    small = sft.training_memory(134_515_008, 2 * 512, layers=30, hidden=576, vocabulary=49_152)
    assert 3.0 < small / 2**30 < 3.3  # measured: 3.9 GiB at its peak, of which the libraries take 0.6


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def both(tiny_gpt2, tmp_path_factory):
    """One run of both formats on tiny GPT-2."""
    folder = tmp_path_factory.mktemp("both")
    return folder, run_script("sft_basics.py", "--model_name", tiny_gpt2, *SHORT, cwd=folder)


def test_both_formats_learn_and_the_closing_line_compares_them(both):
    folder, process = both
    assert process.returncode == 0, process.stderr
    closing = CLOSING.search(process.stderr.strip())
    assert closing, process.stderr[-500:]
    for name, printed in zip(("instruction", "sft"), closing.groups(), strict=True):
        out = folder / "outputs/sft_basics" / name
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
        losses = [entry["loss"] for entry in history(out) if "loss" in entry]
        assert len(losses) == 30 and all(map(math.isfinite, losses))
        assert sum(losses[-5:]) < sum(losses[:5]) - 1
        result = figures(out)
        assert f"{result['eval_loss']:.4f}" == printed
        assert result["answer_loss"] < result["answer_loss_before"] and result["supervised_eos"] == 0
        assert f"{name:<12}eval_loss {result['eval_loss']:.4g}" in process.stdout
    steps = [process.stderr.index(word) for word in ("format chosen", "training begins", "training ended", "两种格式")]
    assert steps == sorted(steps)
    assert "Traceback" not in process.stderr


def test_second_format_starts_afresh_and_one_alone_gives_the_same_figures(both, tiny_gpt2, tmp_path, caplog):
    flags = ("--model_name", str(tiny_gpt2), *SHORT, "--no-instruction_mode", "--output_dir", str(tmp_path))
    sft.main(sft.parse_args(flags))
    out = tmp_path
    assert [path.name for path in out.iterdir()] == ["sft"]
    assert "eval_loss" in caplog.text and "两种格式" not in caplog.text
    alone, second = figures(out / "sft"), figures(both[0] / "outputs/sft_basics/sft")
    assert alone["eval_loss"] == pytest.approx(second["eval_loss"], abs=1e-6)
    assert alone["answer_loss"] == pytest.approx(second["answer_loss"], abs=1e-6)


def test_kept_eos_is_supervised_and_makes_stopping_likelier(both, tiny_gpt2, tmp_path):
    flags = ("--keep_eos", "--instruction_mode", "--eval_ratio", "0.25", "--max_steps", "40", "--max_length", "128")
    sft.main(sft.parse_args(["--model_name", str(tiny_gpt2), *SHORT[2:], *flags, "--output_dir", str(tmp_path)]))
    kept = figures(tmp_path / "instruction")
    assert kept["supervised_eos"] == 18, "of 24 rows a quarter is held out"
    without = figures(both[0] / "outputs/sft_basics/instruction")
    assert kept["stop_probability"] > 5 * without["stop_probability"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_step", "3"], "unrecognized arguments: --max_step"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--batch_size", "two"], "--batch_size"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--eval_ratio", "1"], "--eval_ratio 1.0"),
    ],
)
def test_wrong_flags_exit_2(flags, words, tmp_path):
    process = run_script("sft_basics.py", *flags, cwd=tmp_path)
    assert process.returncode == 2
    assert words in process.stderr and "Traceback" not in process.stderr


def test_a_model_that_is_not_there_gets_one_clear_line(tmp_path):
    process = run_script("sft_basics.py", cwd=tmp_path)  # the default hub id, with HF_HUB_OFFLINE=1
    assert process.returncode == 1
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith("error: Qwen/Qwen3-4b: no such folder") and "--model_name" in error
    assert "HF_HUB_OFFLINE" in error and "models/SmolLM2-135M-Instruct" in error
    assert "Traceback" not in process.stderr


def test_a_folder_without_weights_and_a_broken_weight_file(tiny_gpt2, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_gpt2 / name).read_bytes())
    with pytest.raises(sft.UserError, match="no whole model in this folder.*model.safetensors"):
        sft.load(str(tmp_path), "--model_name", 128)
    (tmp_path / "model.safetensors").write_bytes((tiny_gpt2 / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(sft.UserError, match="no whole model in this folder"):
        sft.load(str(tmp_path), "--model_name", 128)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:500])
    with pytest.raises(sft.UserError, match="no whole model in this folder"):
        sft.load(str(tmp_path), "--model_name", 128)


def test_what_can_not_fit_is_said_before_weights_are_read(tiny_gpt2, tmp_path, monkeypatch):
    """The folder holds a 70B model's config and no weights: a line about memory means that none were looked for."""
    import psutil
    from transformers import Qwen2Config

    sizes = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
    Qwen2Config(**sizes, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False).save_pretrained(tmp_path)
    memory = type("Memory", (), {"available": 64 * 2**30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(sft.UserError) as caught:
        sft.load(str(tmp_path), "--model_name", 2 * 512)
    line = str(caught.value)
    need, free, small = map(float, re.findall(r"([\d.]+) GiB", line))
    assert 1080 < need < 1120 and free == 64.0 and small == 3.1
    assert "--model_name models/SmolLM2-135M-Instruct" in line and "\n" not in line
    memory.available = sft.training_memory(10, 0, 0, 0, 0)
    with pytest.raises(sft.UserError, match="full fine-tuning needs"):
        sft.load(str(tiny_gpt2), "--model_name", 128)
    memory.available = 64 * 2**30
    assert sft.load(str(tiny_gpt2), "--model_name", 128)[0].pad_token == "<|im_end|>"


# ----------------------------------------------------------------------------------------- slow and real


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tiny_gpt2, tmp_path):
    """gloo on CPU, one row in each process against two rows in one; dropout off, as each process draws its own."""
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_gpt2.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    flags = ["--model_name", str(model), *SHORT, "--keep_eos"]
    one = run_script("sft_basics.py", *flags, "--batch_size", 2, "--output_dir", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "sft_basics.py"), *flags]
    two = subprocess.run(
        [sys.executable, *launch, "--batch_size", "1", "--output_dir", "two"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("training begins: 30 steps of 2 rows") == 2, "two processes, of which the first speaks"
    assert two.stderr.count("两种格式的损失对比") == 1
    assert len(two.stdout.strip().splitlines()) == 2
    for name in ("instruction", "sft"):
        a, b = figures(tmp_path / "one" / name), figures(tmp_path / "two" / name)
        for key in ("eval_loss", "answer_loss", "stop_probability", "supervised_eos"):
            assert b[key] == pytest.approx(a[key], rel=2e-3), key
        losses = [[x["loss"] for x in history(tmp_path / folder / name) if "loss" in x] for folder in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.real
def test_real_model_learns_both_formats(tmp_path):
    folder = Path(os.environ.get("SFT_MODEL_DIR") or ROOT / "models/SmolLM2-135M-Instruct")
    if not folder.is_dir():
        pytest.skip("no real model: set SFT_MODEL_DIR, or run qwen_finetuning.py --demo")
    flags = ("--model_name", folder, "--max_length", 128, "--max_steps", 12, "--keep_eos")
    process = run_script("sft_basics.py", *flags, cwd=tmp_path, timeout=900)
    assert process.returncode == 0, process.stderr
    assert CLOSING.search(process.stderr.strip())
    for name in ("instruction", "sft"):
        result = figures(tmp_path / "outputs/sft_basics" / name)
        assert result["answer_loss"] < result["answer_loss_before"] - 0.2 and result["supervised_eos"] == 24
