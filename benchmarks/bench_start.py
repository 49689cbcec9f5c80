"""How long until something happens? `--help` of each script, and of `trl sft`; and the imports of a training.

    python benchmarks/bench_start.py

Each command runs a few times after a first, uncounted run; the median counts. The last line is the ratio of the slowest
`--help` here to that of `trl sft`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
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


def main() -> None:
    slowest = 0.0
    for script in sorted(ROOT.glob("*.py")):
        value = seconds([sys.executable, script, "--help"], runs=5)
        slowest = max(slowest, value)
        print(f"{script.name + ' --help':<32}{value:6.2f} s", flush=True)
    trl = seconds(
        [sys.executable, "-c", "import sys; from trl.cli import main; sys.exit(main())", "sft", "--help"], runs=3
    )
    print(f"{'trl sft --help':<32}{trl:6.2f} s")
    imports = seconds(
        [sys.executable, "-c", "import datasets, peft, torch, transformers; from trl import SFTTrainer"], runs=3
    )
    print(f"{'imports of a training':<32}{imports:6.2f} s")
    print(f"slowest --help: {slowest:.2f} s, {trl / slowest:.0f} times as fast as trl sft --help")


if __name__ == "__main__":
    main()
