"""How fast and how small are the two mixers? Stand-ins for the hub's datasets, the real scripts, one core.

    python benchmarks/bench_data.py                  # 24,000 and 240,000 rows, about 10 minutes
    python benchmarks/bench_data.py --rows 2400

Prints  seconds, rows a second and peak memory (limit: 2 GiB) of each script and number of rows; then
        how many times the processor time the larger number took
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = [a + b for a in ("ba", "ce", "di", "fo", "ka", "le", "mi", "ru") for b in ("n", "r", "st", "ment")]
TOPICS = ["neural network", "MOSFET", "protein"]  # so that every post fits a domain and is converted


def words(rng: random.Random, number: int) -> str:
    return " ".join(rng.choices(WORDS, k=number))


def orca(rng: random.Random, number: int) -> dict:
    turns = [("system", words(rng, 15)), ("human", words(rng, 120)), ("gpt", words(rng, 170))]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def pubmed(rng: random.Random, number: int) -> dict:
    row = {"question": words(rng, 12), "context": {"contexts": [words(rng, 70) for _ in range(3)]}}
    return row | {"long_answer": words(rng, 50), "final_decision": "yes"}


def stackexchange(rng: random.Random, number: int) -> dict:
    paragraph = f"<p>{words(rng, 40)} <b>{TOPICS[number % 3]}</b> <a href='u'>{words(rng, 3)}</a></p>"
    code = f"<pre><code>if a &lt; b:\n    {words(rng, 9)}\n</code></pre>"
    html = [
        f"{paragraph}{words(rng, 60)}{code}<ul><li>{words(rng, 6)}</li></ul>{paragraph}" for _ in range(3)
    ]
    answers = [{"pm_score": str(n), "selected": n == 1, "text": text} for n, text in enumerate(html)]
    return {"question": html[2], "answers": answers, "metadata": [f"https://x/{number}", "https://x", "me"]}


def measure(script: str, rows: int, flags: list[str], work: Path) -> float:
    """Run a script on one core and print its figures; returns its processor seconds."""
    one_core = ["taskset", "-c", "0"] if sys.platform == "linux" else []
    command = [*one_core, sys.executable, str(ROOT / script), "--total_samples", str(rows), *flags]
    command += ["--parts_dir", str(work / script / str(rows)), "--output_file", str(work / "mix.jsonl")]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, memory = time.perf_counter() - started, usage.ru_maxrss / 2**20  # Linux counts in KiB
    written = sum(1 for _ in open(work / "mix.jsonl", "rb"))  # noqa: SIM115
    verdict = "ok" if status == 0 and written == rows and memory < 2 else "NOT as wanted"
    speed = f"{seconds:>8.1f} s{written / seconds:>9,.0f} rows/s{memory:>6.2f} GiB"
    print(f"{script:24}{written:>9,} rows{speed}  {verdict}", flush=True)
    return usage.ru_utime + usage.ru_stime


def main(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        times = {"data_integration.py": [], "data_set_generation.py": []}
        for rows in sizes:
            flags = ["--my_report_data_path", str(ROOT / "my_dataset.json")]
            for make, number in (orca, rows), (pubmed, rows // 240), (stackexchange, rows):
                path, rng = Path(folder, f"{make.__name__}.jsonl"), random.Random(rows)
                with open(path, "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(make(rng, n)) + "\n" for n in range(number))
                flags += [f"--{make.__name__}_data_path", str(path)]
            for script, given in zip(times, (flags[:6], flags), strict=True):
                times[script].append(measure(script, rows, given, Path(folder)))
        for script, busy in times.items():
            print(f"{script}: {sizes[-1] / sizes[0]:.1f} x the rows, {busy[-1] / busy[0]:.1f} x the time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[24_000, 240_000], help="sizes of the mix")
    main(parser.parse_args().rows)
