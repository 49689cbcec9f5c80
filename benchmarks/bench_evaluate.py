"""How much faster does evaluate.py answer prompts than one prompt at a time on the 4-bit model?

    python benchmarks/bench_evaluate.py --model outputs/demo/Qwen_finetuning_model

Both ways answer the same prompts, greedily, with the same number of new tokens, and take turns, so that other work on
the machine slows both. Needs a 4-bit adapter as qwen_finetuning.py --demo leaves it, run from where that was run.
The last line is the ratio; the line before it says how far the two functions are from one another.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # the script, not the library of that name


def answer(model, prompts: list[list[int]], config: evaluate.Config, batch_size: int) -> tuple[int, float]:
    """(tokens, seconds) of answering all prompts, so many at a time."""
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(prompts), batch_size):
        answers = evaluate.generate_batch(model, prompts[start : start + batch_size], config)
        tokens += sum(len(ids) for ids, _ in answers)
    return tokens, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo/Qwen_finetuning_model", help="a 4-bit adapter")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts (default: 64)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each answer (default: 48)")
    args = parser.parse_args()
    evaluate.quiet_libraries()
    config = evaluate.Config(model=args.model, max_new_tokens=args.tokens, eval_ratio=1, compare_base=False)
    run = evaluate.read_run(Path(args.model))
    config.dataset_path = str(run["dataset"]["path"])
    run["dataset"] = {}  # all rows, not only the held-out ones
    rows, _ = evaluate.rows_to_judge(config, run)
    slow, tokenizer, _ = evaluate.load_chat_model(args.model, True, False)
    fast, _, _ = evaluate.load_chat_model(args.model, True, False)
    rows = evaluate.encode_rows(rows[: args.prompts], tokenizer, run["max_seq_length"], False)
    assert evaluate.dequantise_for_many(fast, len(rows)), "the base was not made plain"
    for model in (slow, fast):
        model.generation_config.min_new_tokens = args.tokens  # answers of one length, so that both do the same work
        evaluate.generate_batch(model, [rows[0]["prompt_ids"]], config)  # warm up; packs the 4-bit weights

    prompts = sorted((row["prompt_ids"] for row in rows), key=len, reverse=True)
    speed = {}
    for start in range(0, len(prompts), config.batch_size):
        part = prompts[start : start + config.batch_size]
        for name, model, batch_size in (("one at a time", slow, 1), ("evaluate.py", fast, config.batch_size)):
            tokens, seconds = answer(model, part, config, batch_size)
            done = speed.setdefault(name, [0, 0.0])
            done[0], done[1] = done[0] + tokens, done[1] + seconds
            print(f"{name}: {len(part)} prompts, {tokens} tokens, {tokens / seconds:.1f} tokens/s", flush=True)
    losses = [evaluate.teacher_forced(model, rows)["eval_loss"] for model in (slow, fast)]
    print(f"loss on these rows: 4-bit {losses[0]:.4f}, evaluate.py {losses[1]:.4f}")
    rates = {name: tokens / seconds for name, (tokens, seconds) in speed.items()}
    print(f"ratio {rates['evaluate.py'] / rates['one at a time']:.2f}  ({rates})")


if __name__ == "__main__":
    main()
