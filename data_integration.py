"""Mix three sources into one small training file, or check records of your own.

    python data_integration.py                                                  # 2,000 rows; needs the hub
    python data_integration.py --input data/raw/my_data.json --format alpaca    # this file or folder alone

Reads   my_dataset.json, SlimOrca and PubMedQA, each a hub id (id:configuration), file or folder; or --input
Writes  mixed_finetune_dataset.jsonl, or data/processed/my_data.jsonl: rows as they are, in random order; to
        <its name>.rejected.jsonl file, line (or row) and reason of those with no known shape or no answer
`qwen_finetuning.py --dry_run` checks all else. SlimOrca's system texts are kept, as its answers follow them.
"""

import csv
import gzip
import hashlib
import json
import random
import re
import sys
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

TOTAL_SAMPLES = 2000
RATIOS = {"reports": 0.2, "orca": 0.5, "pubmed": 0.3}
MY_REPORT_DATA_PATH = "my_dataset.json"
OUTPUT_FILE = "mixed_finetune_dataset.jsonl"
FORMATS = {"instruction": "instruction", "messages": "messages", "sharegpt": "conversations"}
FORMATS |= {"alpaca": "instruction", "qa": "input", "completion": "prompt"}  # format: a key that it has
MIXING = {"total_samples", "ratios", "system", "output_file"}  # settings of the mix alone
DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
ASKING = ("system", "developer", "user", "human", "tool", "observation", "function")  # roles with no answer


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class Config:
    total_samples: int = setting(TOTAL_SAMPLES, "rows of the mix")
    ratios: tuple = setting(tuple(f"{k}={v}" for k, v in RATIOS.items()), "shares", type=str, nargs="+")
    my_report_data_path: str = setting(MY_REPORT_DATA_PATH, "your own records, of any shape")
    orca_data_path: str = setting("Open-Orca/SlimOrca", "SlimOrca")
    pubmed_data_path: str = setting("qiaojin/PubMedQA:pqa_labeled", "PubMedQA")
    system: str = setting("keep", "SlimOrca's own system texts", choices=("keep", "drop"))
    output_file: str = setting(OUTPUT_FILE, "where the mix goes")
    input: str = setting("", "check this file or folder instead of mixing")
    format: str = setting("auto", "shape of your own records", choices=("auto", *FORMATS))
    output: str = setting("", "where they go; without it data/processed/<name of the input>.jsonl")
    parts_dir: str = setting("data/parts", "keeps each source as read, until it or a setting changes")
    seed: int = setting(42, "decides which rows are taken, and their order")


# Same in: chat.py, data_integration.py, data_set_generation.py, evaluate.py, inference.py, merge_model.py
def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line; an unknown or shortened flag is an error (exit 2)."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return Config(**vars(cli.parse_args(argv)))


def main(config: Config) -> None:
    mixing = {f.name for f in fields(Config) if getattr(config, f.name) != f.default} & MIXING
    if config.total_samples < 1 or config.input and mixing:
        raise ValueError(f"--total_samples is 1 or more; --input goes without {' '.join(sorted(MIXING))}")
    paths = {"reports": config.my_report_data_path, "orca": config.orca_data_path}
    paths |= {"pubmed": config.pubmed_data_path, "input": config.input}
    shares = re.findall(r"(\S+)=(\d*\.?\d+)(?!\S)", " ".join(config.ratios))
    shares = {name: float(share) for name, share in shares if name in RATIOS}
    if len(shares) < len(config.ratios) or round(sum(shares.values()), 6) != 1:
        raise ValueError(
            f"--ratios {' '.join(config.ratios)}: the names are {', '.join(RATIOS)}, the shares add up to 1"
        )
    ratios = {"input": 1.0} if config.input else {name: share for name, share in shares.items() if share}
    own = re.sub(r"(?i)\.(jsonl?|csv|parquet)(\.gz)?$", "", Path(config.input).resolve().name)
    output = config.output or (f"data/processed/{own}.jsonl" if config.input else config.output_file)
    for place in (output, f"{output}.rejected.jsonl", config.parts_dir):
        if any(Path(place).resolve().is_relative_to(Path(paths[name]).resolve()) for name in ratios):
            raise ValueError(f"{place} is, or lies in, what is read; name another place for it")
    rng, seen, rejects, order = random.Random(config.seed), {}, [], []
    table = {"source": ["asked", "found", "rejected", "duplicate", "written"]}
    for name, ratio in ratios.items():
        rows, rejected = read_and_convert(name, paths[name], config)
        new = [row for row in rows if seen.setdefault(same_text(row), row) is row]  # the first one
        rng.shuffle(new)
        order += [(n / ratio, name, row) for n, row in enumerate(new)]  # so they stand in their ratios
        asked = "all" if config.input else round(config.total_samples * ratio)
        table[name] = [asked, len(rows), len(rejected), len(rows) - len(new)]
        rejects += rejected
    mix = sorted(order)[: None if config.input else config.total_samples]
    rng.shuffle(mix)
    write_lines(f"{output}.rejected.jsonl", [json.dumps(reject).encode() + b"\n" for reject in rejects])
    if not mix:
        raise ValueError(f"no row is good; see {output}.rejected.jsonl")
    write_lines(output, [row for _, _, row in mix])
    for name in ratios:
        table[name].append([source for _, source, _ in mix].count(name))
    print("\n".join(f"{name:10}" + "".join(f"{cell:>11}" for cell in row) for name, row in table.items()))
    print(f"next: python qwen_finetuning.py --dataset_path {output}")


def read_and_convert(name: str, source: str, config: Config) -> tuple[list[bytes], list[dict]]:
    """(good rows as lines of JSON, rejects) of a source; from data/parts/ if it was read before."""
    files = filter(Path.is_file, (Path(__file__), Path(source), *sorted(Path(source).rglob("*"))))
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    state += [source, config.format, config.system, config.total_samples, bool(config.input)]
    part = Path(config.parts_dir, f"{name}-{hashlib.sha256(ascii(state).encode()).hexdigest()[:16]}.jsonl")
    if not part.exists():
        good, bad, local = [], [], Path(source).exists()
        label = {} if config.input else {"source": Path(source).name if local else source}
        most = None if local or config.input else max(10_000, 2 * config.total_samples)
        for where, row in islice(rows_of(source, streaming=True), most):
            try:
                record = label | converted(row, name, config)
                good.append(json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                file, sign, n = re.fullmatch(r"(?s)(.*)(:|, row )(\d+)", where).groups()
                reason = str(error) if isinstance(error, ValueError) else repr(error)
                bad.append({"file": file, "line" if sign == ":" else "row": int(n), "reason": reason})
        write_lines(part, [json.dumps(bad).encode() + b"\n", *good])
    bad, *good = part.read_bytes().splitlines(keepends=True)  # the rejects are its first line
    return good, json.loads(bad)


# Same in: data_integration.py, data_set_generation.py, qwen_finetuning.py
def rows_of(source: str, streaming: bool = False) -> Iterator[tuple[str, dict | str]]:
    """Yield (where, record) for each row of a file, a folder or a hub dataset (id:configuration); in place
    of a row that can not be read comes a text that says why. A folder's other files are named."""
    path, name = Path(source), source.lower()
    if path.is_dir():
        for file in sorted(filter(Path.is_file, path.rglob("*"))):
            if file.name.lower().endswith(DATA_ENDINGS):
                yield from rows_of(str(file), streaming)
            else:
                print(f"{file} is not read: data files end in {' '.join(DATA_ENDINGS)}", file=sys.stderr)
    elif name.endswith((".json", ".jsonl", ".gz", ".csv")):
        text = {"encoding": "utf-8-sig", "errors": "surrogateescape"}  # no UTF-8 is refused with its row
        with (gzip.open if name.endswith(".gz") else open)(path, "rt", **text) as file:
            where = f"{source}, row "
            if name.endswith(".csv"):
                csv.field_size_limit(2**31 - 1)
                rows = csv.DictReader(file, strict=True)
                rows = ("more cells than the header has" if None in row else row for row in rows)
            elif name.endswith(".json") and file.read(1000).lstrip().startswith("["):
                rows = from_json(path.read_text(**text))
                if isinstance(rows, str):  # nobody knows how many rows were lost
                    raise ValueError(f"{source}: {rows}")
            else:
                file.seek(0)
                where, rows = f"{source}:", (from_json(line) if line.strip() else ... for line in file)
            try:  # `...` is an empty line, None is JSON's null
                yield from ((f"{where}{n}", row) for n, row in enumerate(rows, 1) if row is not ...)
            except (EOFError, csv.Error, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{source}: damaged: {error}") from None
    else:
        from datasets import load_dataset

        kind = ["parquet", None, None, source] if name.endswith(".parquet") else source.split(":")
        no_nulls = lambda part: {key: value for key, value in part.items() if value is not None}
        for n, row in enumerate(load_dataset(*kind, split="train", streaming=streaming), 1):
            row = json.loads(json.dumps(row, default=str), object_hook=no_nulls)  # a table has all columns
            yield f"{source}, row {n}", row


# Same in: data_integration.py, data_set_generation.py, evaluate.py, qwen_finetuning.py
def from_json(text: str):
    """What a JSON text means; where it is broken, or a key stands twice in an object, a text that says so."""

    def each_key_once(pairs: list[tuple[str, object]]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            twice = max(found, key=[name for name, _ in pairs].count)
            raise ValueError(f"the key {twice!r} stands twice in {str(pairs)[:80]}")
        return found

    try:
        return json.loads(text, object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"


def converted(row: dict | str, name: str, config: Config) -> dict:
    """`answered`; a row of one's own has the shape of --format, or of any. ValueError for another."""
    row, keys = answered(row, name, config.system), set(FORMATS.values())
    keys = keys if config.format == "auto" else {FORMATS[config.format]}
    if not any(row.get(key) for key in keys) and name in ("reports", "input"):
        raise ValueError(f"no {' or '.join(sorted(keys))} in it; its keys are {list(row)}")
    return row


# Same in: data_integration.py, data_set_generation.py
def answered(row: dict | str, name: str, system: str) -> dict:
    """The row as it is, PubMedQA's as a record. Raises ValueError where an answer is missing or empty."""
    if not isinstance(row, dict):
        raise ValueError(f"no JSON object: {row}")
    if name == "pubmed":
        said = row["long_answer"] and f"{row['long_answer']}\n\nConclusion: {row['final_decision']}"
        row = {"instruction": row["question"], "input": "\n".join(row["context"]["contexts"]), "output": said}
    answer = row.get("output") or row.get("response") or row.get("completion")
    turns = row.get("messages") or row.get("conversations") or [{"content": answer}]
    turns = from_json(turns) if isinstance(turns, str) else turns  # in a table it is text
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"its turns are no list of objects: {str(turns)[:80]}")
    if name == "orca" and system == "drop":
        row["conversations"] = [turn for turn in turns if turn["from"] != "system"]
    answers = [turn for turn in turns if str(turn.get("role") or turn.get("from")).lower() not in ASKING]
    answers = [turn.get("content") or turn.get("value") or turn.get("tool_calls") for turn in answers]
    if not answers or not all(str(answer or "").strip() for answer in answers):
        raise ValueError(f"an answer is missing or empty; its keys are {list(row)}")
    return row


# Same in: data_integration.py, data_set_generation.py
def same_text(line: bytes) -> bytes:
    """The same for all rows that are equal but for case, white space and `source`."""
    text = json.dumps(json.loads(line) | {"source": None}, ensure_ascii=False, sort_keys=True).casefold()
    return hashlib.blake2b(re.sub(r"(\\\\)|\\[nrtf]|\s", r"\1", text).encode(), digest_size=16).digest()


# Same in: data_integration.py, data_set_generation.py
def write_lines(path: str | Path, lines: list[bytes]) -> None:
    """Write a file beside its place and move it there whole: a killed run leaves the old or the new one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.partial", "wb") as file:
        file.writelines(lines)
    Path(f"{path}.partial").replace(path)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError) as error:  # a person's mistake or a file's
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
