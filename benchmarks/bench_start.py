"""How long until something happens? `--help` of each script and of `trl sft`, imports, and the demo's first step.

    python benchmarks/bench_start.py

Each command runs a few times after a first, uncounted run; the median counts. The demo's model must lie in `models/` of
the working folder; its evaluation before training is left out. The last line is the ratio of the slowest `--help` here
to that of `trl sft`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds(command: list, runs: int) -> float:
    """Median wall time of a command, in seconds, after one run that does not count."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def first_step() -> float:
    """Seconds from the command to the end of the demo's first optimiser step (eight rows)."""
    command = [
        sys.executable,
        str(ROOT / "qwen_finetuning.py"),
        "--demo",
        "--max_steps",
        "1",
        "--logging_steps",
        "1",
    ]
    command += ["--eval_ratio", "0", "--eval_strategy", "no", "--no-load_best_model_at_end"]
    with tempfile.TemporaryDirectory() as folder:
        for target in (ROOT / "configs", Path("models").resolve()):
            (Path(folder) / target.name).symlink_to(target)
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        found = next((time.perf_counter() - started for line in process.stderr if "Step 1/1" in line), None)
        if process.wait() or found is None:
            sys.exit("the demo failed")
        return found


def main() -> None:
    slowest = 0.0
    for script in sorted(ROOT.glob("*.py")):
        value = seconds([sys.executable, script, "--help"], runs=5)
        slowest = max(slowest, value)
        print(f"{script.name + ' --help':<32}{value:6.2f} s", flush=True)
    trl = seconds(
        [sys.executable, "-c", "import sys; from trl.cli import main; sys.exit(main())", "sft", "--help"],
        runs=3,
    )
    print(f"{'trl sft --help':<32}{trl:6.2f} s")
    imports = seconds(
        [sys.executable, "-c", "import datasets, peft, torch, transformers; from trl import SFTTrainer"],
        runs=3,
    )
    print(f"{'imports of a training':<32}{imports:6.2f} s")
    steps = [first_step() for _ in range(4)][1:]
    print(f"{'demo, to its first step':<32}{statistics.median(steps):6.2f} s")
    print(f"slowest --help: {slowest:.2f} s, {trl / slowest:.0f} times as fast as trl sft --help")


if __name__ == "__main__":
    main()
