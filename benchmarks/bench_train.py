"""How fast does qwen_finetuning.py train, beside `trl sft` as shipped and beside a bare PyTorch loop?

    python benchmarks/bench_train.py --model models/SmolLM2-135M-Instruct --data my_dataset.json --rows 24

Every side trains one epoch over the same rows with the same adapter (r 16 on seven projections, eight rows a step, 512
tokens at most). Loading and tokenising are left out: what counts is the time of the training loop, which both trainers
report as `train_runtime`. The sides take turns, so that other work on the machine slows all of them.
The bare loop is the ceiling: no trainer, no logging, the rows of a step laid end to end, logits only at labels.
"""

from __future__ import annotations

import argparse
import json
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

ADAPTER = ["--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", *qwen.FinetuneConfig().lora_target_modules]
COMMON = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--num_train_epochs", "1"]
COMMON += ["--learning_rate", "2e-4", "--save_strategy", "no", *ADAPTER]


def trl_sft(model: Path, folder: Path, four_bit: bool) -> float:
    """Seconds in the training loop of TRL's own command line, with its own defaults."""
    command = [sys.executable, "-c", "import sys; from trl.cli import main; sys.exit(main())", "sft"]
    command += ["--model_name_or_path", model, "--dataset_name", folder / "data", "--output_dir", folder / "trl"]
    command += ["--use_peft", "--max_length", "512", "--report_to", "none", *COMMON]
    command += ["--load_in_4bit", "true"] if four_bit else []
    command += ["--use_cpu", "true"] if qwen.find_device(four_bit).kind == "cpu" else []  # else it stops: no GPU
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    found = re.search(r"'train_runtime': '?([\d.]+)", process.stdout + process.stderr)
    if not found:
        sys.exit(f"trl sft failed:\n{process.stderr[-2000:]}")
    return float(found[1])


def ours(model: Path, folder: Path, four_bit: bool) -> float:
    """Seconds in the training loop of qwen_finetuning.py, with its own defaults."""
    command = [sys.executable, ROOT / "qwen_finetuning.py", "--model_name", model, "--max_seq_length", "512"]
    command += [
        "--dataset_path",
        folder / "data/train.jsonl",
        "--eval_ratio",
        "0",
        "--eval_strategy",
        "no",
        "--overwrite",
    ]
    command += ["--no-load_best_model_at_end", "--load_in_4bit" if four_bit else "--no-load_in_4bit", *COMMON]
    process = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"qwen_finetuning.py failed:\n{process.stderr[-2000:]}")
    history = json.loads((folder / "outputs" / "trainer_state.json").read_text())["log_history"]
    return next(entry["train_runtime"] for entry in history if "train_runtime" in entry)


def bare_loop(model_folder: Path, folder: Path, four_bit: bool) -> float:
    """Seconds of a plain loop over the same rows: forward, backward, AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    config = qwen.FinetuneConfig(
        model_name=str(model_folder), dataset_path=str(folder / "data/train.jsonl"), eval_ratio=0, max_seq_length=512
    )
    device = qwen.find_device(four_bit)
    with tempfile.TemporaryDirectory() as cache:
        rows = list(qwen.prepare_data(config, AutoTokenizer.from_pretrained(model_folder), cache)[0])
    targets = list(config.lora_target_modules)
    model = get_peft_model(qwen.load_model(config, device), LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    qwen.cast_adapter(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model.train()
    started = time.perf_counter()
    for step in range(0, len(rows), 8):
        part = rows[step : step + 8]
        supervised = sum(label != -100 for row in part for label in row["labels"])
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
            logits = model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=places
            ).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[places + 1], reduction="sum") / supervised
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="a model folder")
    parser.add_argument("--data", type=Path, default=ROOT / "my_dataset.json", help="records in any of the five shapes")
    parser.add_argument("--rows", type=int, default=24, help="how many of them (default: 24)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; the median counts (default: 3)")
    parser.add_argument("--only", choices=("lora", "qlora"), help="one of the two comparisons")
    args = parser.parse_args()
    qwen.quiet_libraries()
    args.model = args.model.resolve()
    records = [record for _, record, _ in qwen.read_rows(args.data) if record][: args.rows]
    sides = {"trl sft": trl_sft, "qwen_finetuning.py": ours, "bare loop": bare_loop}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        with open(folder / "data" / "train.jsonl", "w", encoding="utf-8") as file:
            for record in records:
                messages = qwen.messages_of(record, qwen.SYSTEM_PROMPT)
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        print(f"{len(records)} rows of {args.data.name}, {args.model.name}, {os.cpu_count()} cores; ", end="")
        print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")))
        for kind in ("lora", "qlora") if not args.only else (args.only,):
            seconds = {name: [] for name in sides}
            for _ in range(args.runs):
                for name, side in sides.items():
                    seconds[name].append(side(args.model, folder, kind == "qlora"))
            speed = {name: len(records) / statistics.median(values) for name, values in seconds.items()}
            for name, value in speed.items():
                runs = " ".join(f"{second:.1f}" for second in seconds[name])
                print(f"{kind:<6}{name:<20}{value:6.2f} examples/s   ({runs} s)", flush=True)
            against = speed["qwen_finetuning.py"] / speed["trl sft"], speed["qwen_finetuning.py"] / speed["bare loop"]
            ratios.append(f"{kind} {against[0]:.2f} x trl sft, {against[1]:.2f} x the bare loop")
    print("; ".join(ratios))


if __name__ == "__main__":
    main()
