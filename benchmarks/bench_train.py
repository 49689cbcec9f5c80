"""How fast does qwen_finetuning.py train, beside TRL as shipped and beside a bare PyTorch loop?

    python benchmarks/bench_train.py --model models/SmolLM2-135M-Instruct --data my_dataset.json --rows 24

LoRA is measured against the `trl sft` command line, QLoRA against SFTTrainer on a 4-bit model, both with
their own defaults. Every side trains one epoch over the same rows (r 16, eight rows a step, 512 tokens at
most); what counts is the training loop (`train_runtime`). The sides take turns, so that other work slows all
of them, though not evenly: leave the machine alone. On a CPU without instructions for bfloat16, TRL gets
`--bf16 false`. The bare loop is the ceiling: no trainer, no logging, the rows of a forward pass end to end,
logits only at labels.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import qwen_finetuning as training  # noqa: E402

COMMON = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
COMMON |= {"learning_rate": 2e-4, "logging_steps": 1, "save_strategy": "no"}
LORA = ["--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", *training.QWEN_LAYERS]
FLAGS = [text for name, value in COMMON.items() for text in (f"--{name}", str(value))] + LORA


def settings(four_bit: bool, model: Path = Path()) -> training.FinetuneConfig:
    """The script's settings with what it decides for this machine."""
    same = {"model_name": str(model), "load_in_4bit": four_bit, "eval_ratio": 0, "max_seq_length": 512}
    config = training.FinetuneConfig(**same)
    training.decide_device(config)
    return config


def times_of(logs: list[dict]) -> tuple[float, list[float]]:
    """(seconds in the training loop, loss of each step) from what a Trainer has logged."""
    seconds = [float(log["train_runtime"]) for log in logs if "train_runtime" in log][-1]
    return seconds, [float(log["loss"]) for log in logs if "loss" in log]


def trl_sft(model: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """TRL's own command line, with its own defaults."""
    import torch

    command = [sys.executable, "-c", "import sys; from trl.cli import main; sys.exit(main())", "sft", *FLAGS]
    command += ["--model_name_or_path", model, "--dataset_name", folder / "data"]
    command += ["--output_dir", folder / "trl"]
    command += ["--use_peft", "--max_length", "512", "--report_to", "none"]
    command += [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    command += ["--bf16", "false"] if settings(False).dtype == "float32" else []
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    logs = [ast.literal_eval(text) for text in re.findall(r"\{'.*?\}", process.stdout + process.stderr)]
    return times_of(logs) if process.returncode == 0 else sys.exit(process.stderr[-2000:])


def sft_trainer(model: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """SFTTrainer on a 4-bit model, with its own defaults."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    config = settings(True, model)
    options = {"use_cpu": not torch.cuda.is_available(), "max_length": 512, "report_to": "none", **COMMON}
    options |= {"bf16": False} if config.dtype == "float32" else {}
    args = SFTConfig(str(folder / "trl"), disable_tqdm=True, **options)
    rows = load_dataset("json", data_files=str(folder / "data/train.jsonl"), split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(training.QWEN_LAYERS), task_type="CAUSAL_LM")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=config.dtype)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=config.dtype, quantization_config=nf4)
    trainer = SFTTrainer(base, args=args, train_dataset=rows, peft_config=lora)
    trainer.train()
    return times_of(trainer.state.log_history)


def ours(model: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """qwen_finetuning.py with its own defaults."""
    command = [sys.executable, ROOT / "qwen_finetuning.py", "--model_name", model, *FLAGS]
    command += ["--max_seq_length", "512"]
    command += ["--dataset_path", folder / "data/train.jsonl", "--eval_ratio", "0", "--overwrite"]
    command += ["--load_in_4bit" if four_bit else "--no-load_in_4bit"]
    process = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr[-2000:])
    return times_of(json.loads((folder / "outputs/trainer_state.json").read_text())["log_history"])


def bare_loop(model_folder: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """Forward, backward, AdamW over the same rows, two in a forward pass and eight in a step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    config = settings(four_bit, model_folder)
    config.dataset_path = str(folder / "data/train.jsonl")
    data = training.prepare_data(config, training.load_tokenizer(config))
    rows, collate = data["train"], DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(training.QWEN_LAYERS))
    model = get_peft_model(training.load_base(config, set()), lora).train()
    training.cast_adapter(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    started, losses = time.perf_counter(), []
    for step in range(0, len(rows), 8):
        part = rows[step : step + 8]
        supervised = sum(int((row["labels"] != -100).sum()) for row in part)
        losses.append(0.0)
        for place in range(0, len(part), 2):
            batch = collate(part[place : place + 2])
            batch = {key: v.to(model.device) if hasattr(v, "to") else v for key, v in batch.items()}
            labels = batch.pop("labels")[0].long()
            places = (labels[1:] != -100).nonzero().flatten()
            logits = model(**batch, use_cache=False, logits_to_keep=places).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[places + 1], reduction="sum") / supervised
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started, losses


def fresh(side, *args):
    """Call a side in a process of its own, so that none inherits what another has loaded."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(side, args)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "my_dataset.json", help="records of any shape")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; the median counts")
    parser.add_argument("--only", choices=("lora", "qlora"))
    args = parser.parse_args()
    training.quiet_libraries()
    model, records = args.model.resolve(), [record for _, record in training.rows_of(str(args.data))]
    found = [training.messages_of(record)[0] for record in records[: args.rows]]
    system = [{"role": "system", "content": training.SYSTEM_PROMPT}]  # else it would stand in our rows alone
    found = [system * (messages[0]["role"] != "system") + messages for messages in found]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in found]
    print(f"{args.data.name}, {model.name}, {settings(False).dtype}")
    for kind, name, peer in (("lora", "trl sft", trl_sft), ("qlora", "SFTTrainer", sft_trainer)):
        if args.only in (None, kind):
            results, sides = {}, {name: peer, "qwen_finetuning.py": ours, "bare loop": bare_loop}
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "data").mkdir()
                (Path(folder) / "data/train.jsonl").write_text("".join(lines), encoding="utf-8")
                for _ in range(args.runs):
                    for side, run in sides.items():
                        results.setdefault(side, []).append(fresh(run, model, Path(folder), kind == "qlora"))
            seconds = {side: statistics.median(s for s, _ in result) for side, result in results.items()}
            speed = {side: len(lines) / each for side, each in seconds.items()}
            for side, result in results.items():
                times, last = " ".join(f"{s:.1f}" for s, _ in result), result[-1][1][-1]
                print(f"{kind:<6}{side:<20}{speed[side]:6.2f} examples/s ({times} s), last loss {last:.3f}")
            mine = speed["qwen_finetuning.py"]
            line = f"{kind}: {mine / speed[name]:.2f} x {name}, {mine / speed['bare loop']:.2f} x the loop"
            print(line, flush=True)


if __name__ == "__main__":
    main()
