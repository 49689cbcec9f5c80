"""Does an adapter in bfloat16 learn as well as one in float32, and how much faster is it?

    python benchmarks/bench_adapter_dtype.py --config configs/demo.yaml --epochs 5

Trains twice with qwen_finetuning.py, on the same rows in the same order from the same start: once with the adapter in
the compute type of its base, as the script does it, once with float32 adapters on the same base, as PEFT does it.
Prints both losses over the steps, the held-out loss after training, and the ratio of the speeds. The demo's model must
lie in `models/` of the working folder. Without bfloat16 on the device the two are the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def train(folder: str, config: Path, epochs: float, widen: bool) -> tuple[list[dict], float]:
    """(what the Trainer logged, held-out loss after training) of one run, in `folder`."""
    import json

    import qwen_finetuning as qwen

    os.chdir(folder)
    if widen:

        def to_float32(model) -> None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

        qwen.cast_adapter = to_float32
    flags = ["--config", str(config), "--num_train_epochs", str(epochs), "--logging_steps", "1", "--overwrite"]
    qwen.main(
        qwen.parse_args([*flags, "--output_dir", "out", "--model_dir", "adapter", "--tokenizer_dir", "tokenizer"])
    )
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    return history, json.loads(Path("adapter/finetune_config.json").read_text())["result"]["loss_after"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="the run's YAML file")
    parser.add_argument("--epochs", type=float, default=5, help="passes over its data (default: 5)")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in (ROOT / "configs", Path("models").resolve()):
            (Path(folder) / target.name).symlink_to(target)
        for name, widen in (("compute type", False), ("float32", True)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results[name] = pool.apply(train, (folder, args.config.resolve(), args.epochs, widen))
    losses = {name: [entry["loss"] for entry in history if "loss" in entry] for name, (history, _) in results.items()}
    print(f"{'steps':<10}" + "".join(f"{name:>15}" for name in losses) + "   mean training loss")
    for first in range(0, len(losses["float32"]), 5):
        means = [statistics.mean(values[first : first + 5]) for values in losses.values()]
        print(f"{first + 1:>3} to {first + 5:<3}" + "".join(f"{mean:>15.3f}" for mean in means))
    print("held out  " + "".join(f"{loss:>15.3f}" for _, loss in results.values()))
    seconds = [next(e["train_runtime"] for e in history if "train_runtime" in e) for history, _ in results.values()]
    print(f"seconds   {seconds[0]:>15.1f}{seconds[1]:>15.1f}")
    print(f"adapters in the compute type train {seconds[1] / seconds[0]:.2f} times as fast")


if __name__ == "__main__":
    main()
