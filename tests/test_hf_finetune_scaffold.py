"""hf_finetune_scaffold.py: formats, labels, bad lines, the rank of a known update, and whole runs."""

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script, write_jsonl

scaffold = load_script("hf_finetune_scaffold")
RECORDS = [{"instruction": "翻译", "input": f"Lamp {i}.", "output": f"第{i}盏灯。"} for i in range(12)]


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_finetune_scaffold.py", *map(str, flags)])
    scaffold.main()


def losses(folder: Path) -> list[float]:
    """The loss of each step, and that of the held-out rows at the end."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for key in ("loss", "eval_loss") for entry in log if key in entry]


def test_settings_and_format_are_the_documented_ones():
    folder = Path("outputs/hf_trainer")
    defaults = scaffold.CliConfig(scaffold.EXAMPLE_DATA, "Qwen/Qwen3-4b", folder, 2e-5, 2, 1)
    assert scaffold.parse_args([]) == defaults
    flags = "--data=d --model=m --output=o --lr=0.1 --batch=3 --epochs=4"
    assert scaffold.parse_args(flags.split()) == scaffold.CliConfig(Path("d"), "m", Path("o"), 0.1, 3, 4)
    example = {"instruction": "做", "input": "", "output": "好{}"}
    assert scaffold.format_example(example) == "### 指令:\n做\n### 输入:\n\n### 回答:\n好{}"


def test_bad_lines_are_named_and_null_is_an_empty_input(tmp_path, capsys):
    good = ['{"instruction": "a", "output": "b"}', "", '{"instruction": "a", "input": null, "output": "b"}']
    bad = ["{", "[1]", '{"instruction": "a"}', '{"instruction": 1, "output": "b"}', "[" * 9999, "\udcff"]
    bad += ['{"instruction": "a", "output": " "}', '{"instruction": "a", "input": 0, "output": "b"}']
    bad += [r'{"instruction": "a", "output": "\ud800"}', '{"instruction": "a", "output": "b", "system": "s"}']
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(good + bad).encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as caught:
        scaffold.load_dataset(path)
    *lines, last = str(caught.value).splitlines()
    assert [line.split(": no record: ")[0] for line in lines] == [f"{path}:{n}" for n in range(4, 14)]
    assert lines[-1].endswith("system would not be trained on")
    assert lines[2].endswith("output is missing, empty or no text") and last.startswith("10 bad lines")
    rows = scaffold.load_dataset(path, skip_bad_rows=True).to_list()
    assert rows == [{"instruction": "a", "input": "", "output": "b"}] * 2
    assert "2 records, 10 bad lines left out" in capsys.readouterr().err
    path.write_text("")
    with pytest.raises(ValueError, match="one record to train on"):
        scaffold.load_dataset(path)


def test_labels_leave_out_padding_and_nothing_else(tiny_gpt2, capsys):
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"  # the hard case
    dataset = Dataset.from_list(RECORDS)
    static, dynamic = (scaffold.tokenize_dataset(dataset, tokenizer, dynamic_padding=d) for d in (0, 1))
    for record, row, short in zip(RECORDS, static, dynamic, strict=True):
        ids = tokenizer(scaffold.format_example(record) + tokenizer.eos_token).input_ids
        assert row["labels"] == ids + [-100] * (1024 - len(ids))
        assert short["labels"] == short["input_ids"] == row["input_ids"][: len(ids)] == ids
    scaffold.tokenize_dataset(dataset, tokenizer, max_length=32)
    assert capsys.readouterr().err.splitlines()[-1] == "--max_length 32 cuts 12 of 12 rows"


def test_an_update_of_rank_4_needs_rank_4_and_no_less(tiny_qwen2, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    base, tuned = (AutoModelForCausalLM.from_pretrained(tiny_qwen2) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (weight for weight in tuned.parameters() if weight.ndim == 2):
            update = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
            weight += update * weight.norm() / update.norm()  # as large as the weights
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    figures = scaffold.write_rank_errors(base, tuned, tmp_path)
    assert "no lora_rank_error.png: " in capsys.readouterr().err
    written = json.loads((tmp_path / "lora_rank_error.json").read_text())
    assert written == {"ranks": list(range(1, 129)), "projections": figures} and len(figures) == 7
    for errors in figures.values():
        assert errors["layers"] == 2 and len(errors["median"]) == 128
        assert errors["highest"][3] < 1e-5 < 0.05 < errors["lowest"][2] < errors["highest"][2]
    matrix = torch.randn(40, 60)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    error = ((matrix - u[:, :7] * s[:7] @ v[:7]).norm() / matrix.norm()).item()
    assert scaffold.rank_errors(matrix)[6] == pytest.approx(error, rel=1e-4)
    assert scaffold.rank_errors(torch.zeros(5, 5)) == [0.0] * 128, "a layer that did not move"


def test_whole_run_on_the_example_data(tiny_gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--model", tiny_gpt2, "--max_length", 128, "--lr", 1e-3)
    data = scaffold.EXAMPLE_DATA.read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["input"] for line in data}) == len(data) >= 40
    out = tmp_path / "outputs/hf_trainer"
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json"} < {
        path.name for path in out.iterdir()
    }
    assert (out / "lora_rank_error.png").read_bytes().startswith(b"\x89PNG")
    *steps, loss = losses(out)
    assert len(steps) == 16 and sum(steps[-5:]) < sum(steps[:5]) - 1
    words = (
        f"eval_loss {loss:.4f} · perplexity {math.exp(loss):.2f}\ntrained on 4096 tokens, padding too\nattn"
    )
    assert capsys.readouterr().out.startswith(words)


def test_dynamic_padding_gives_the_same_loss_with_fewer_tokens(tiny_qwen2, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)  # float32: equal, not nearly equal
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    flags = ["--data", data, "--model", tiny_qwen2, "--max_length", 64, "--test_size", 0.25, "--output"]
    run(monkeypatch, *flags, tmp_path / "static")
    run(monkeypatch, *flags, tmp_path / "dynamic", "--dynamic_padding", "--gradient_checkpointing")
    assert losses(tmp_path / "dynamic") == pytest.approx(losses(tmp_path / "static"), abs=1e-5)
    full, seen = map(int, re.findall(r"trained on (\d+) tokens", capsys.readouterr().out))
    assert full == 9 * 64 and 0 < seen < 9 * 64


def test_errors_are_one_line(tiny_qwen2, tmp_path, monkeypatch):
    process = run_script("hf_finetune_scaffold.py", "--data", "none.jsonl", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr == "error: [Errno 2] No such file or directory: 'none.jsonl'\n"
    with pytest.raises(
        ValueError, match="^Qwen/Qwen3-4b: We couldn't connect[^\n]* Try --model_name models/Smol"
    ):
        scaffold.load_for_training("Qwen/Qwen3-4b", 512)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="training takes 0.0 GiB, 0.0 GiB are free. Try --model"):
        scaffold.load_for_training(str(tiny_qwen2), 512)
    with pytest.raises(ValueError, match="--epochs and --batch must be 1 or more"):
        run(monkeypatch, "--epochs", 0)


@pytest.mark.real
def test_real_model_once_through(tmp_path, monkeypatch):
    folder = Path(os.environ.get("SFT_MODEL_DIR") or ROOT / "models/SmolLM2-135M-Instruct")
    if not folder.is_dir():
        pytest.skip("no real model: set SFT_MODEL_DIR, or run qwen_finetuning.py --demo")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--model", folder, "--dynamic_padding", "--output", "out")
    steps = losses(tmp_path / "out")
    assert sum(steps[-6:-1]) < sum(steps[:5])
    written = json.loads((tmp_path / "out/lora_rank_error.json").read_text())["projections"]
    assert [errors["layers"] for errors in written.values()] == [30] * 7
    assert all(e["median"][0] > e["median"][15] > e["median"][127] for e in written.values())
