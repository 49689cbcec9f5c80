"""How much faster does evaluate.py answer prompts in batches than one at a time?

    python benchmarks/bench_evaluate.py --model outputs/demo/Qwen_finetuning_model

Both ways answer the same prompts, greedily, batch by batch in turns, so that other work on the machine
slows both. Prompts are the held-out rows of the model's training, over and over. The last line is the ratio;
the line before says how many answers are equal (in 16 bits a batch rounds otherwise than a single prompt).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # the script, not the library of that name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="outputs/demo/Qwen_finetuning_model", help="an adapter's folder")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts (default: 64)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each answer (default: 48)")
    args = parser.parse_args()
    config = evaluate.Config(model=args.model)
    rows, _ = evaluate.rows_to_judge(config)
    model, tokenizer = evaluate.load_model(args.model)
    model.generation_config.min_new_tokens = args.tokens  # both ways do the same work
    prompts = [evaluate.with_ids(tokenizer, set(), 2048, row)["prompt_ids"] for row in rows]
    prompts = sorted((prompts * args.prompts)[: args.prompts], key=len, reverse=True)
    evaluate.generate(model, prompts[:1], 4)  # the first call packs 4-bit weights

    seconds, equal = {1: 0.0, config.batch_size: 0.0}, 0
    for start in range(0, len(prompts), config.batch_size):
        part, answers = prompts[start : start + config.batch_size], {}
        for size in seconds:
            began = time.perf_counter()
            batches = [part[n : n + size] for n in range(0, len(part), size)]
            answers[size] = [
                answer for batch in batches for answer in evaluate.generate(model, batch, args.tokens)
            ]
            seconds[size] += time.perf_counter() - began
        equal += sum(map(tuple.__eq__, *answers.values()))
        print(f"{start + len(part)} prompts: {seconds} seconds by batch size", flush=True)
    rates = {size: len(prompts) * args.tokens / spent for size, spent in seconds.items()}
    print(f"{equal} of {len(prompts)} answers are equal")
    print(f"ratio {rates[config.batch_size] / rates[1]:.2f}  (tokens/s by batch size: {rates})")


if __name__ == "__main__":
    main()
