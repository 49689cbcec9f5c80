"""hf_finetune_scaffold.py: formats, labels, bad input, the rank figures of a known update, and whole runs."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, build_model, load_script, run_script, write_jsonl

scaffold = load_script("hf_finetune_scaffold")
RECORDS = [{"instruction": "翻译成中文", "input": f"Lamp {i}.", "output": f"第{i}盏灯。"} for i in range(12)]
TINY = ("--max_length", "64", "--lr", "1e-3")


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def eval_loss(folder: Path) -> float:
    return next(entry["eval_loss"] for entry in reversed(history(folder)) if "eval_loss" in entry)


# ---------------------------------------------------------------------------------- records and tokens


def test_defaults_and_names_are_the_documented_ones():
    config = scaffold.parse_args([])
    assert config == scaffold.CliConfig()
    assert config.data_path == Path("outputs/examples_translation_en_zh.jsonl")
    assert (config.model_name, config.output_dir) == ("Qwen/Qwen3-4b", Path("./outputs/hf_trainer"))
    assert (config.learning_rate, config.batch_size, config.num_train_epochs, config.test_size) == (2e-5, 2, 1, 0.2)
    flags = ["--data", "d", "--model", "m", "--output", "o", "--lr", "0.1", "--batch", "3", "--epochs", "4"]
    given = scaffold.parse_args(flags)
    assert (given.data_path, given.model_name, given.output_dir) == (Path("d"), "m", Path("o"))
    assert (given.learning_rate, given.batch_size, given.num_train_epochs) == (0.1, 3, 4)


def test_format_to_the_letter():
    example = {"instruction": "做", "input": "", "output": "好\n"}
    assert scaffold.format_example(example) == "### 指令:\n做\n### 输入:\n\n### 回答:\n好\n"


def test_good_lines_of_every_kind_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        '{"instruction": "a", "output": "b", "source": 3}',
        "",
        '{"instruction": "c", "input": "d", "output": "e"}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert scaffold.load_dataset(path).to_list() == [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "c", "input": "d", "output": "e"},
    ]


def test_bad_lines_are_named_and_can_be_skipped(tmp_path):
    good = json.dumps(RECORDS[0], ensure_ascii=False).encode()
    bad = {
        2: (b'{"instruction": "a", "output"', "no record: Expecting ':' delimiter"),
        4: (b'{"instruction": "a", "input": ""}', "missing key 'output'"),
        5: (b'{"input": "a", "output": "b"}', "missing key 'instruction'"),
        6: (b'["a", "b"]', "no record: 'list' object is not a mapping"),
        7: (b'{"instruction": "a", "output": "\xff"}', "no record: 'utf-8' codec"),
        8: (b'{"instruction": "a", "output": 7}', "must be text"),
        9: (b'{"instruction": "a", "output": " "}', "output not empty"),
        10: (b"[" * 100_000, "no record"),
    }
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(bad[n][0] if n in bad else good for n in range(1, 12)))
    with pytest.raises(scaffold.UserError) as caught:
        scaffold.load_dataset(path)
    lines = str(caught.value).splitlines()
    for line, (number, (_, words)) in zip(lines, bad.items(), strict=False):
        assert line.startswith(f"{path}:{number}: ") and words in line
    assert lines[-1].startswith("Bad lines: 8.") and "--skip_bad_rows" in lines[-1] and len(lines) == 9
    assert len(scaffold.load_dataset(path, skip_bad_rows=True)) == 3
    path.write_bytes(b"{\n" * 30)
    with pytest.raises(scaffold.UserError) as caught:
        scaffold.load_dataset(path)
    assert len(str(caught.value).splitlines()) == 11, "the first ten, and their number"


def test_labels_leave_out_padding_and_nothing_else(tiny_gpt2):
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.pad_token = tokenizer.eos_token  # the hard case: the ending looks like padding
    tokenizer.padding_side = "left"
    dataset = Dataset.from_list(RECORDS)
    static = scaffold.tokenize_dataset(dataset, tokenizer)
    dynamic = scaffold.tokenize_dataset(dataset, tokenizer, dynamic_padding=True)
    assert set(static.column_names) == {"input_ids", "attention_mask", "labels"}
    for record, row, short in zip(RECORDS, static, dynamic, strict=True):
        ids = tokenizer(scaffold.format_example(record) + tokenizer.eos_token).input_ids
        rest = 1024 - len(ids)
        assert row["labels"] == ids + [-100] * rest
        assert row["input_ids"] == ids + [tokenizer.pad_token_id] * rest
        assert short["labels"] == short["input_ids"] == ids
    batch = DataCollatorForSeq2Seq(tokenizer)([dynamic[0], dynamic[10]])
    lengths = [len(dynamic[0]["input_ids"]), len(dynamic[10]["input_ids"])]
    assert batch["labels"].shape == (2, max(lengths))
    assert int((batch["labels"] == -100).sum()) == max(lengths) - min(lengths)


# ------------------------------------------------------------------------------- the rank of an update


def test_an_update_of_rank_4_needs_rank_4_and_no_less(tiny_qwen2, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    base, tuned = (AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.ndim == 2:
                update = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
                weight += update * weight.norm() / update.norm()  # as large as the weights
    scaffold.write_rank_errors(base, tuned, tmp_path)
    written = json.loads((tmp_path / "lora_rank_error.json").read_text())
    assert written["ranks"] == list(range(1, 129))
    kinds = {f"self_attn.{k}_proj" for k in "qkvo"} | {f"mlp.{k}_proj" for k in ("gate", "up", "down")}
    assert set(written["projections"]) == kinds, "no embedding, no norm"
    for figures in written["projections"].values():
        assert figures["layers"] == 2 and len(figures["median"]) == 128
        assert figures["highest"][3] < 1e-5 < 0.05 < figures["lowest"][2]
        assert figures["lowest"][0] > figures["lowest"][1] > figures["lowest"][2]
        for low, median, high in zip(*(figures[key] for key in ("lowest", "median", "highest")), strict=True):
            assert low <= median <= high
    assert (tmp_path / "lora_rank_error.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*partial*"))


def test_rank_errors_equal_the_error_of_a_real_truncated_svd():
    import torch

    torch.manual_seed(0)
    matrix = torch.randn(40, 60)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    errors = scaffold.rank_errors(matrix)
    for rank in (1, 7, 39):
        best = u[:, :rank] * s[:rank] @ v[:rank]
        assert errors[rank - 1] == pytest.approx(((matrix - best).norm() / matrix.norm()).item(), rel=1e-4)
    assert errors[39:] == [0.0] * 89
    assert scaffold.rank_errors(torch.zeros(5, 5)) == [0.0] * 128, "a layer that did not move"


# ------------------------------------------------------------------------------------------ whole runs


def test_default_data_is_written_and_tiny_gpt2_learns_it(tiny_gpt2, tmp_path):
    process = run_script("hf_finetune_scaffold.py", "--model", tiny_gpt2, *TINY, "--epochs", 2, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    data = [json.loads(line) for line in (tmp_path / "outputs/examples_translation_en_zh.jsonl").open(encoding="utf-8")]
    assert len(data) >= 40 and all(list(record) == ["instruction", "input", "output"] for record in data)
    assert all(re.search("[a-z]", r["input"]) and re.search("[\u4e00-\u9fff]", r["output"]) for r in data)
    assert len({record["input"] for record in data}) == len(data)
    assert f"{len(data)} translation records written" in process.stderr
    out = tmp_path / "outputs/hf_trainer"
    files = {path.name for path in out.iterdir()}
    wanted = {
        "model.safetensors",
        "tokenizer.json",
        "trainer_state.json",
        "lora_rank_error.png",
        "lora_rank_error.json",
    }
    assert wanted <= files and any(name.startswith("checkpoint-") for name in files)
    losses = [entry["loss"] for entry in history(out) if "loss" in entry]
    assert len(losses) >= 30 and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    loss, perplexity = re.search(r"eval_loss ([\d.]+) · perplexity ([\d.]+)", process.stdout).groups()
    assert float(loss) == pytest.approx(eval_loss(out), abs=1e-4)
    assert float(perplexity) == pytest.approx(math.exp(eval_loss(out)), rel=1e-3)
    assert "attn.c_attn" in process.stdout and "mlp.c_proj" in process.stdout


def test_dynamic_padding_gives_the_same_loss_with_fewer_tokens(tiny_qwen2, tmp_path, monkeypatch, capsys):
    """Qwen2, which has no dropout: with it two runs draw other numbers where the shapes differ."""
    monkeypatch.setattr(scaffold, "device_settings", lambda: {"use_cpu": True})  # float32: equal, not nearly equal
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    flags = ["--data", data, "--model", tiny_qwen2, *TINY, "--test_size", "0.25"]
    runs = {"static": [], "dynamic": ["--dynamic_padding", "--gradient_checkpointing"]}
    for name, more in runs.items():
        scaffold.main(scaffold.parse_args([*map(str, flags), "--output", str(tmp_path / name), *more]))
    losses = {n: [entry["loss"] for entry in history(tmp_path / n) if "loss" in entry] for n in runs}
    assert len(losses["static"]) == 5
    assert losses["dynamic"] == pytest.approx(losses["static"], abs=1e-5)
    assert eval_loss(tmp_path / "dynamic") == pytest.approx(eval_loss(tmp_path / "static"), abs=1e-5)
    seen, full = map(int, re.search(r"trained on (\d+) tokens, not the (\d+)", capsys.readouterr().out).groups())
    assert full == 9 * 64 and 0 < seen < full
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in runs]
    assert [state["num_input_tokens_seen"] for state in states] == [full, seen]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("folder", "a folder"),
        ("", "0 records"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "out', ":2: no record"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', ":2: missing key 'output'"),
    ],
)
def test_bad_data_gets_clear_lines_and_exit_1(content, words, tiny_gpt2, tmp_path, capsys):
    path = tmp_path / "named.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(scaffold.UserError) as caught:
        scaffold.main(scaffold.parse_args(["--data", str(path), "--model", str(tiny_gpt2)]))
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)
    assert not (tmp_path / "outputs").exists()


def test_exit_codes_of_the_script_itself(tmp_path):
    process = run_script("hf_finetune_scaffold.py", "--data", "named.jsonl", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.strip() == "error: named.jsonl: no such file; --data takes a JSONL file."
    for flags in (["--dat", "x"], ["--batch", "0"], ["--lr", "nan"], ["--test_size", "1"], ["--epochs", "1.5"]):
        process = run_script("hf_finetune_scaffold.py", *flags, cwd=tmp_path)
        assert process.returncode == 2 and "error:" in process.stderr and "Traceback" not in process.stderr


def test_a_hub_model_out_of_reach_and_one_that_is_too_large(tmp_path, monkeypatch):
    import psutil

    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    with pytest.raises(scaffold.UserError, match="Qwen/Qwen3-4b: no such folder.*--model with a model folder"):
        scaffold.main(scaffold.parse_args(["--data", str(data)]))
    folder = build_model("qwen2", tmp_path / "model")
    (folder / "model.safetensors").unlink()  # the check comes first: it needs the config alone
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(scaffold.UserError, match="needs .* GiB of memory, 0.0 GiB are free. Pass --model models/Smol"):
        scaffold.main(scaffold.parse_args(["--data", str(data), "--model", str(folder)]))


@pytest.mark.real
def test_real_model_once_through(tmp_path):
    folder = Path(os.environ.get("SFT_MODEL_DIR") or ROOT / "models/SmolLM2-135M-Instruct")
    if not folder.is_dir():
        pytest.skip("no real model: set SFT_MODEL_DIR, or run qwen_finetuning.py --demo")
    flags = ("--model", folder, "--dynamic_padding", "--output", "out")
    process = run_script("hf_finetune_scaffold.py", *flags, cwd=tmp_path, timeout=900)
    assert process.returncode == 0, process.stderr
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    written = json.loads((tmp_path / "out/lora_rank_error.json").read_text())["projections"]
    assert {figures["layers"] for figures in written.values()} == {30} and len(written) == 7
    assert all(figures["median"][0] > figures["median"][15] > figures["median"][127] for figures in written.values())
