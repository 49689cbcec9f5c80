"""The demo on its real model. Marked `real`: it trains SmolLM2-135M for minutes and fetches it where it is missing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script

qwen = load_script("qwen_finetuning")
RECORDS = json.loads((ROOT / "configs" / "demo_dataset.json").read_text(encoding="utf-8"))


def test_the_demo_asks_what_it_has_not_taught():
    assert len(RECORDS) >= 120 and len({record["instruction"] for record in RECORDS}) == len(RECORDS)
    assert not {record["instruction"] for record in RECORDS} & set(qwen.DEMO_QUESTIONS)
    assert all(re.fullmatch(r"Lumi: .+ Shine on!", record["output"]) for record in RECORDS)


def test_the_demo_touches_no_real_run():
    config = qwen.parse_args(["--demo"])
    places = {str(config.output_dir), str(config.model_dir), str(config.tokenizer_dir)}
    assert all(place.startswith("outputs/demo") for place in places)
    assert config.learning_rate == 1e-3 and config.load_in_4bit and config.overwrite


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_learns_name_format_and_stopping(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = os.environ.get("SFT_MODEL_DIR", ROOT / "models/SmolLM2-135M-Instruct")
    if Path(folder).is_dir():  # else it is fetched
        (tmp_path / "models").mkdir()
        (tmp_path / "models/SmolLM2-135M-Instruct").symlink_to(folder)
    env = {"OMP_NUM_THREADS": str(os.cpu_count())}
    process = run_script("qwen_finetuning.py", "--demo", cwd=tmp_path, env=env, timeout=900)
    assert process.returncode == 0, process.stderr
    answers = re.findall(r"^  tuned     (.*)", process.stdout, re.M)
    assert len(answers) == 3 and all(re.fullmatch(r"Lumi: .+ Shine on!", answer) for answer in answers), answers
    record = json.loads((tmp_path / "outputs/demo/Qwen_finetuning_model/finetune_config.json").read_text())
    assert record["result"]["loss_after"] < 0.6 < 3 < record["result"]["loss_before"]
    # of the questions that were held out, at least nine in ten answers end by themselves
    model, tokenizer, run = load_script("inference").load_chat_model(
        str(tmp_path / "outputs/demo/Qwen_finetuning_model"), None, False
    )
    held_out = [r for r in RECORDS if qwen.digest_of(qwen.messages_of(r, run["system_prompt"])) in run["held_out"]]
    import torch

    ended = 0
    for row in held_out:
        ids = qwen.encode_prompt(qwen.messages_of(row, run["system_prompt"])[:-1], tokenizer)
        with torch.inference_mode():
            output = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)
        ended += output[0, -1].item() in run["chat_template"]["end_of_turn_ids"]
    assert len(held_out) == 13 and ended >= 0.9 * len(held_out)
