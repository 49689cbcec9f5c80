"""QLoRA on a model of Qwen2.5-7B's shape, for a machine with CUDA and without a hub.

    python benchmarks/bench_gpu.py                              # takes 16 GB of disk for random weights
    python benchmarks/bench_gpu.py --layers 2 --width 256 --tokens 64 --steps 6          # see that it runs

The weights are random and made on the spot: a step costs the same whatever they say. The script and a bare
SFTTrainer of the same shape (4 bits, r 16, two rows in a forward pass, gradient checkpointing as the script
decides it) train on the same rows, each in its own process; the first three steps are not timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import qwen_finetuning as training  # noqa: E402


def make_model(folder: Path, layers: int, width: int) -> None:
    """Save a Qwen2 with random weights and the tests' small tokenizer."""
    import torch
    from conftest import build_tokenizer
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer, heads = build_tokenizer(), max(width // 128, 2)
    sizes = {"hidden_size": width, "intermediate_size": round(width * 5.2857), "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(heads // 7, 1), "vocab_size": 152064}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **ids), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def step_timer():
    """A callback that knows when each step ended."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        ends = []

        def on_step_end(self, args, state, control, **_):
            self.ends.append(time.perf_counter())

    return Timer()


def run(bare: bool, model: Path, folder: Path, steps: int, tokens: int) -> tuple[float, float]:
    """(seconds a step, peak bytes on the device) of one side."""
    import torch

    flags = [
        "--model_name",
        model,
        "--dataset_path",
        folder / "rows.jsonl",
        "--output_dir",
        folder / f"run-{bare}",
    ]
    flags += ["--max_seq_length", tokens, "--max_steps", steps, "--eval_ratio", 0, "--save_strategy", "no"]
    flags += ["--gradient_accumulation_steps", 1, "--system_prompt", ""]
    config = training.parse_args([str(flag) for flag in flags])
    training.quiet_libraries()
    tokenizer = training.load_tokenizer(config)
    data = training.prepare_data(config, tokenizer)
    plan = training.plan_run(config, data)
    args = training.training_args(config, plan)
    timer, base = step_timer(), training.load_base(config, data["stop_ids"])
    if bare:
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        lora = LoraConfig(r=16, lora_alpha=32, target_modules=plan["targets"], task_type="CAUSAL_LM")
        names = (
            "output_dir",
            "max_steps",
            "learning_rate",
            "per_device_train_batch_size",
            "optim",
            "use_cpu",
        )
        names += ("gradient_checkpointing", "gradient_accumulation_steps", "save_strategy", "disable_tqdm")
        same = {name: getattr(args, name) for name in names} | {"bf16": config.dtype == "bfloat16"}
        same |= {"report_to": "none", "max_length": tokens, "dataset_kwargs": {"skip_prepare_dataset": True}}
        parts = {"train_dataset": plan["train_set"], "peft_config": lora, "callbacks": [timer]}
        trainer = SFTTrainer(base, args=SFTConfig(**same), **parts)
    else:
        trainer = training.build_trainer(config, args, base, tokenizer, data, plan, {})
        trainer.add_callback(timer)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return (timer.ends[-1] - timer.ends[2]) / (len(timer.ends) - 3), peak


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    for name, default in (("layers", 28), ("width", 3584), ("tokens", 2048), ("steps", 13)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args, chance = parser.parse_args(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder, words = Path(folder), ["lamp", "chip", "gene", "euros", "芯片", "protein", "what", "12"]
        rows = [" ".join(chance.choices(words, k=args.tokens)) for _ in range(2 * args.steps)]
        lines = [json.dumps({"instruction": f"{n}", "output": row}) for n, row in enumerate(rows)]
        (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        spawn = multiprocessing.get_context("spawn")
        for side, job in (("", make_model), ("qwen_finetuning.py", False), ("bare SFTTrainer", True)):
            with spawn.Pool(1) as pool:
                if not side:
                    pool.apply(job, (folder / "model", args.layers, args.width))
                    continue
                seconds, peak = pool.apply(run, (job, folder / "model", folder, args.steps, args.tokens))
            speed = 2 * args.tokens / seconds
            print(
                f"{side:<20}{seconds:7.3f} s a step {speed:9,.0f} tokens/s  peak {peak / 2**30:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
