"""How much memory do loading in 4 bits and merging take, beside the 16-bit size of the model?

    python benchmarks/bench_memory.py                                  # a model of Qwen2.5-7B's shape: 15 GB of disk
    python benchmarks/bench_memory.py --layers 2 --merge_layers 4      # smaller ones, to try it

Makes models of random weights in a temporary folder: one of Qwen2.5-7B's shape, which `load_model` of
qwen_finetuning.py loads in 4 bits, and one of Qwen2.5-1.5B's, which qwen_finetuning.py trains for a step and
merge_model.py merges. Prints the peak of resident memory of each process beside its limit (16-bit size plus 2 GiB;
1.15 times the 16-bit size plus 1 GiB); the exit code is 1 if one is above it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_7B |= {"vocab_size": 152064, "tie_word_embeddings": False}
QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
QWEN_1_5B |= {"vocab_size": 151936, "tie_word_embeddings": True}
LOAD = "import qwen_finetuning as q, sys; q.quiet_libraries(); "
LOAD += "q.load_model(q.FinetuneConfig(model_name=sys.argv[1]), q.find_device(four_bit=True))"


def make_model(folder: Path, layers: int, sizes: dict) -> int:
    """Write a Qwen2 model of random bfloat16 weights, one file a layer; returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        num_hidden_layers=layers, architectures=["Qwen2ForCausalLM"], dtype="bfloat16", **sizes
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Qwen2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    noise, places, total = (torch.randn(2**20) * 0.02).bfloat16(), {}, 0
    for name in shapes:  # one file for each layer, and for each tensor that is in none
        places[name] = f"model-{name.split('.')[2] if '.layers.' in name else name}.safetensors"
    for file in dict.fromkeys(places.values()):
        weights = {}
        for name in (name for name in shapes if places[name] == file):
            size = shapes[name].numel()
            weights[name] = noise.repeat(size // len(noise) + 1)[:size].clone().view(shapes[name])
            total += 2 * size
        save_file(weights, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    return total


def peak_of(command: list, cwd: Path) -> int:
    """Largest resident memory of a command, in bytes. Stops with its last lines if it fails."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(
        process.pid, 0
    )  # the peak of this one process, which getrusage can not tell apart
    if status:
        sys.exit(f"{' '.join(command[:3])} failed:\n{printed[-2000:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(title: str, size: int, peak: int, limit: float) -> bool:
    """Print one line of the result; whether the peak is within the limit. All in bytes."""
    print(
        f"{title:<42}{size / GIB:6.2f} GiB in 16 bits, peak {peak / GIB:6.2f} GiB, limit {limit / GIB:6.2f} GiB",
        flush=True,
    )
    return peak <= limit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=28, help="layers of the model that is loaded (default: 28)"
    )
    parser.add_argument(
        "--merge_layers", type=int, default=28, help="layers of the one that is merged (default: 28)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("models/SmolLM2-135M-Instruct"),
        help="a folder with a chat tokenizer",
    )
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        size = make_model(folder / "small", args.merge_layers, QWEN_1_5B)
        tokenizer.save_pretrained(folder / "small")
        rows = [{"input": f"What is {n} plus one?", "output": f"It is {n + 1}."} for n in range(20)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = [ROOT / "qwen_finetuning.py", "--model_name", "small", "--dataset_path", "rows.jsonl"]
        peak_of([*train, "--max_steps", "1", "--system_prompt", ""], folder)
        peak = peak_of([ROOT / "merge_model.py"], folder)
        good = show("merge_model.py, 4-bit adapter", size, peak, 1.15 * size + GIB)
        shutil.rmtree(folder / "small")
        shutil.rmtree(folder / "models")
        size = make_model(folder / "large", args.layers, QWEN_7B)
        peak = peak_of(["-c", LOAD, folder / "large"], folder)
        good = show("qwen_finetuning.py, loading in 4 bits", size, peak, size + 2 * GIB) and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
