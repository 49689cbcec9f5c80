"""How fast does qwen_finetuning.py train, beside TRL as shipped and beside a bare PyTorch loop?

    python benchmarks/bench_train.py --model models/SmolLM2-135M-Instruct --data my_dataset.json --rows 24
    python benchmarks/bench_train.py --data rows.json --rows 32 --grow 128 512      # and how the time grows

LoRA is measured against the `trl sft` command line, QLoRA against SFTTrainer on a 4-bit model, both with their own
defaults. Every side trains one epoch over the same rows with the same adapter (r 16 on seven projections, eight rows a
step, 512 tokens at most). Loading and tokenising are left out: what counts is the time of the training loop, which the
trainers report as `train_runtime`. The sides take turns, so that other work on the machine slows all of them. TRL's
default is bfloat16; on a CPU that has no instructions for it, where it would take hours, TRL gets `--bf16 false`.
The bare loop is the ceiling: no trainer, no logging, the rows of a step laid end to end, logits only at labels.
Beside the speed stands the mean loss of the last quarter of the steps.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import qwen_finetuning as qwen  # noqa: E402

TARGETS = list(qwen.FinetuneConfig().lora_target_modules)
COMMON = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
COMMON |= {"learning_rate": 2e-4, "logging_steps": 1, "save_strategy": "no"}
FLAGS = [text for name, value in COMMON.items() for text in (f"--{name}", str(value))]
FLAGS += ["--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", *TARGETS]


def trl_sft(model: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """Seconds in the training loop of TRL's own command line, with its own defaults, and the losses of its steps."""
    command = [sys.executable, "-c", "import sys; from trl.cli import main; sys.exit(main())", "sft"]
    command += ["--model_name_or_path", model, "--dataset_name", folder / "data", "--output_dir", folder / "trl"]
    command += ["--use_peft", "--max_length", "512", "--report_to", "none", *FLAGS]
    device = qwen.find_device(four_bit)
    command += ["--use_cpu", "true"] if device.kind == "cpu" else []  # else it stops: no GPU
    command += ["--bf16", "false"] if device.dtype == "float32" else []
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    logs = [ast.literal_eval(text) for text in re.findall(r"\{'.*?\}", process.stdout + process.stderr)]
    if not any("train_runtime" in log for log in logs):
        sys.exit(f"trl sft failed:\n{process.stderr[-2000:]}")
    return times_of(logs)


def times_of(logs: list[dict]) -> tuple[float, list[float]]:
    """(seconds in the training loop, loss of each step) from what a Trainer has logged."""
    seconds = next(float(log["train_runtime"]) for log in logs if "train_runtime" in log)
    return seconds, [float(log["loss"]) for log in logs if "loss" in log]


def sft_trainer(model: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """The same for SFTTrainer on a 4-bit model, with its own defaults."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    device = qwen.find_device(four_bit)
    dtype = getattr(torch, device.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, quantization_config=quantization, device_map=device.device_map
    )
    options = {"use_cpu": device.kind == "cpu"} | ({"bf16": False} if device.dtype == "float32" else {})
    args = SFTConfig(str(folder / "trl"), max_length=512, report_to="none", disable_tqdm=True, **options, **COMMON)
    rows = load_dataset("json", data_files=str(folder / "data" / "train.jsonl"), split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(loaded, args=args, train_dataset=rows, peft_config=lora)
    trainer.train()
    return times_of(trainer.state.log_history)


def ours(model: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """The same for qwen_finetuning.py, with its own defaults."""
    command = [sys.executable, ROOT / "qwen_finetuning.py", "--model_name", model, "--max_seq_length", "512"]
    command += ["--dataset_path", folder / "data/train.jsonl", "--eval_ratio", "0", "--eval_strategy", "no"]
    command += ["--no-load_best_model_at_end", "--load_in_4bit" if four_bit else "--no-load_in_4bit", *FLAGS]
    process = subprocess.run(
        [*map(str, command), "--overwrite"], cwd=folder, capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"qwen_finetuning.py failed:\n{process.stderr[-2000:]}")
    return times_of(json.loads((folder / "outputs" / "trainer_state.json").read_text())["log_history"])


def bare_loop(model_folder: Path, folder: Path, four_bit: bool) -> tuple[float, list[float]]:
    """The same for a plain loop over the same rows: forward, backward, AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    config = qwen.FinetuneConfig(
        model_name=str(model_folder), dataset_path=str(folder / "data/train.jsonl"), eval_ratio=0, max_seq_length=512
    )
    device = qwen.find_device(four_bit)
    if device.kind == "cpu":  # as qwen_finetuning.py chooses for this model
        device = dataclasses.replace(device, attention="by_rows")
    version = qwen.sha256_of(Path(config.dataset_path))
    rows = list(qwen.prepare_data(config, AutoTokenizer.from_pretrained(model_folder), version)[0])
    model = get_peft_model(qwen.load_model(config, device), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    qwen.cast_adapter(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model.train()
    started, losses = time.perf_counter(), []
    for step in range(0, len(rows), 8):
        part = rows[step : step + 8]
        supervised = sum(label != -100 for row in part for label in row["labels"])
        losses.append(0.0)
        while part:
            batch, size = [part.pop(0)], 0
            size = len(batch[0]["input_ids"])
            while part and size + len(part[0]["input_ids"]) <= 1024:
                batch.append(part.pop(0))
                size += len(batch[-1]["input_ids"])
            ids = torch.tensor([id for row in batch for id in row["input_ids"]])
            positions = torch.tensor([i for row in batch for i in range(len(row["input_ids"]))])
            labels = torch.tensor([label for row in batch for label in row["labels"]])
            labels[positions == 0] = -100
            places = (labels[1:] != -100).nonzero().flatten()
            starts = torch.tensor([*(positions == 0).nonzero().flatten(), len(ids)], dtype=torch.int32)
            inputs = {"input_ids": ids[None], "position_ids": positions[None], "cu_seq_lens_q": starts}
            logits = model(**inputs, use_cache=False, logits_to_keep=places).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[places + 1], reduction="sum") / supervised
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started, losses


def fresh(side, *args):
    """Call a side in a process of its own, so that none inherits what another has loaded."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(side, args)


def compare(sides: dict, kind: str, records: list[str], runs: int, model: Path) -> dict[str, float]:
    """Run each side `runs` times on the same rows, in turns, and print its line; returns examples a second of each."""
    results = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        (Path(folder) / "data" / "train.jsonl").write_text("".join(records), encoding="utf-8")
        for _ in range(runs):
            for name, side in sides.items():
                results[name].append(fresh(side, model, Path(folder), kind == "qlora"))
    speed = {}
    for name, result in results.items():
        seconds, losses = zip(*result, strict=True)
        speed[name] = len(records) / statistics.median(seconds)
        last = losses[-1][-max(len(losses[-1]) // 4, 1) :]
        print(
            f"{kind:<6}{len(records):>4} rows  {name:<20}{speed[name]:6.2f} examples/s   "
            f"({' '.join(f'{second:.1f}' for second in seconds)} s)   last losses {statistics.mean(last):.3f}",
            flush=True,
        )
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="a model folder")
    parser.add_argument("--data", type=Path, default=ROOT / "my_dataset.json", help="records in any of the five shapes")
    parser.add_argument("--rows", type=int, default=24, help="how many of them (default: 24)")
    parser.add_argument("--grow", type=int, nargs="*", default=[], help="other numbers of rows, once and without TRL")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; the median counts (default: 3)")
    parser.add_argument("--only", choices=("lora", "qlora"), help="one of the two comparisons")
    args = parser.parse_args()
    qwen.quiet_libraries()
    model, records = args.model.resolve(), []
    for _, record, _ in qwen.read_rows(args.data):
        messages = qwen.messages_of(record, qwen.SYSTEM_PROMPT)
        records.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{args.data.name}, {model.name}, {os.cpu_count()} cores, {qwen.find_device(False).dtype}; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")))
    plain, ratios = {"qwen_finetuning.py": ours, "bare loop": bare_loop}, []
    for kind, name, peer in (("lora", "trl sft", trl_sft), ("qlora", "SFTTrainer", sft_trainer)):
        if args.only not in (None, kind):
            continue
        speed = compare({name: peer} | plain, kind, records[: args.rows], args.runs, model)
        ratios.append(
            f"{kind} {speed['qwen_finetuning.py'] / speed[name]:.2f} x {name}, "
            f"{speed['qwen_finetuning.py'] / speed['bare loop']:.2f} x the bare loop"
        )
        for rows in args.grow:
            compare(plain, kind, records[:rows], 1, model)
    print("; ".join(ratios))


if __name__ == "__main__":
    main()
