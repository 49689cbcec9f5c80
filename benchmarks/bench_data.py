"""How fast and how small are the two mixers? Makes local stand-ins for the hub's datasets and times the real scripts.

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --rows 2400 24000 --pubmed ../shared/data/pubmedqa_pqa_labeled.jsonl

Prints  for each script and number of rows: seconds, rows written a second, peak memory (MiB) and the share of one core
        that was used; then how much more processor time the larger number took (the clock also shows what else ran).

The rows are made from a seeded vocabulary: SlimOrca rows of about 1,700 characters, StackExchange rows of a question
and three answers with code, lists, links and tables. Every StackExchange row fits a domain, so all are converted.
"""

from __future__ import annotations

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
WORDS = [
    a + b for a in ("ba", "ce", "di", "fo", "ka", "le", "mi", "ru", "vi") for b in ("n", "r", "st", "ment", "tion")
]
ONLY_HTML = ("bio=0.34", "ai=0.33", "ic=0.33")  # but for the 1,000 rows of PubMedQA
DOMAIN_WORDS = ["neural network", "MOSFET", "protein", "gradient descent", "CMOS", "genome"]


def words(rng: random.Random, number: int) -> str:
    return " ".join(rng.choices(WORDS, k=number))


def orca_row(rng: random.Random) -> dict:
    turns = [
        ("system", "You are a patient teacher. " + words(rng, 12)),
        ("human", words(rng, 120)),
        ("gpt", words(rng, 170)),
    ]
    return {"conversations": [{"from": role, "value": text, "weight": None} for role, text in turns]}


def pubmed_row(rng: random.Random, number: int) -> dict:
    contexts = [words(rng, 70) for _ in range(3)]
    return {
        "pubid": number,
        "question": f"Does {words(rng, 12)}?",
        "context": {"contexts": contexts, "labels": ["A", "B", "C"]},
        "long_answer": words(rng, 50),
        "final_decision": rng.choice(["yes", "no", "maybe"]),
    }


def post(rng: random.Random, topic: str) -> str:
    code = "\n".join(f"    {word} = f({word} &lt; {rng.random():.3f})" for word in rng.choices(WORDS, k=5))
    paragraphs = "".join(
        f'<p>{words(rng, 25)} <strong>{topic}</strong> <a href="http://x.org/{n}" rel="nofollow">{words(rng, 3)}</a> '
        f"<code>{words(rng, 1)}</code> &amp; {words(rng, 15)}</p>\n\n"
        for n in range(3)
    )
    items = "".join(f"<li>{words(rng, 6)} <em>{words(rng, 1)}</em></li>\n" for _ in range(3))
    return f"{paragraphs}<pre><code>{code}\n</code></pre>\n\n<ul>\n{items}</ul>\n"


def stackexchange_row(rng: random.Random, number: int) -> dict:
    topic, site = DOMAIN_WORDS[number % 6], ["ai", "electronics", "biology"][number % 3] + ".stackexchange.com"
    answers = [
        {
            "answer_id": number * 3 + n,
            "author": f"user{n}",
            "author_id": n,
            "author_profile": f"https://{site}/users/{n}",
            "pm_score": str(n),
            "selected": n == 1,
            "text": post(rng, topic),
        }
        for n in range(3)
    ]
    links = [f"https://{site}/questions/{number}", f"https://{site}", f"https://{site}/users/9"]
    return {"qid": number, "question": post(rng, topic), "answers": answers, "date": "2020/01/01", "metadata": links}


def make(path: Path, rows: int, make_row) -> Path:
    """Write `rows` rows of JSONL, each from `make_row(rng, number)`."""
    rng = random.Random(path.name)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(json.dumps(make_row(rng, number)) + "\n")
    return path


def measure(title: str, script: str, folder: Path, rows: int, *flags) -> float:
    """Run a script in an empty folder and print its figures; returns its processor seconds. Stops if it fails."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, str(ROOT / script), "--total_samples", str(rows), *map(str, flags)]
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=work,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        errors = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this one process, which getrusage cannot tell apart
        seconds = time.perf_counter() - started
        if status:
            sys.exit(f"{script} failed:\n{errors}")
        with open(Path(work) / "mixed_finetune_dataset.jsonl", encoding="utf-8") as lines:
            written = sum(1 for _ in lines)
    busy = usage.ru_utime + usage.ru_stime
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(
        f"{title:<34}{written:>9,} rows {seconds:>7.1f} s {written / seconds:>8,.0f} rows/s "
        f"{memory:>6.0f} MiB {busy / seconds:>5.2f} cores",
        flush=True,
    )
    return busy


def main(rows: list[int], pubmed: Path | None, folder: Path) -> None:
    times, real = {}, pubmed.read_text(encoding="utf-8").split("\n") if pubmed else []
    for total in sorted(rows):
        report = ROOT / "my_dataset.json"
        orca = make(folder / "orca.jsonl", total, lambda rng, number: orca_row(rng))
        # PubMedQA has 1,000 rows, all of them in the largest mix; in a smaller one its share must be the same, as its
        # rows cost less than a page of HTML: otherwise the growth of the time would tell of the mixture
        papers = make(
            folder / "pubmed.jsonl",
            max(1000 * total // max(rows), 1),
            lambda rng, number: json.loads(real[number]) if real else pubmed_row(rng, number),
        )
        posts = make(folder / "posts.jsonl", total, stackexchange_row)
        local = ["--my_report_data_path", report, "--orca_data_path", orca, "--pubmed_data_path", papers]
        everything = [*local, "--stackexchange_data_path", posts]
        cases = [
            ("data_integration.py, JSONL", "data_integration.py", local),
            ("data_set_generation.py, HTML", "data_set_generation.py", [*everything, "--ratios", *ONLY_HTML]),
            ("data_set_generation.py, as it is", "data_set_generation.py", everything),
        ]
        for title, script, flags in cases:
            times.setdefault(title, []).append(measure(title, script, folder, total, *flags))
    if len(rows) > 1:
        for title, busy in times.items():
            print(
                f"{title}: {max(rows) // min(rows)} times the rows, {busy[-1] / busy[0]:.1f} times the processor time"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[24_000, 240_000], help="sizes of the mix")
    parser.add_argument("--pubmed", type=Path, help="real PubMedQA rows (.jsonl) instead of made ones")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(args.rows, args.pubmed, Path(folder))
