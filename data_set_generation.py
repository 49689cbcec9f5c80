"""Mix your own reports, SlimOrca, PubMedQA and StackExchange by domain into one large training file.

    python data_set_generation.py                                  # 240,000 rows; needs the hub
    python data_set_generation.py --total_samples 24000 --orca_data_path data/slimorca --keywords words.json

Reads   my_dataset.json and three datasets, each a hub id (id:configuration), a file or a folder. Posts of
        StackExchange with one of the KEYWORDS of AI, circuits (IC) or biomedicine are converted to Markdown
Writes  mixed_finetune_dataset.jsonl:  {"source": "...", "instruction": "...", "input": "", "output": "..."}
        <the same>.rejected.jsonl:  {"file": "my.jsonl", "line": 7, "reason": "..."}; data/parts/: each source
        read to its end, which is not read again while it, the settings and this script are the same

What one share lacks, the others give by their ratios. SlimOrca's system texts stay (--system keep), as its
answers were written to them ("think step by step"); --system drop teaches to answer so without being told.
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
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from html import unescape
from itertools import chain, islice
from pathlib import Path

TOTAL_SAMPLES = 240_000
RATIOS = {"my_reports": 0.1, "orca": 0.3, "bio": 0.2, "ai": 0.2, "ic": 0.2}
MY_REPORT_DATA_PATH = "my_dataset.json"
OUTPUT_FILE = "mixed_finetune_dataset.jsonl"
# Whole words: in any case, but those in capitals or with signs (C++, .NET) as written; Chinese ones anywhere.
KEYWORDS = {
    "ai": ("AI", "LLM", "LLMs", "NLP", "CNN", "RNN", "LSTM", "GAN", "SVM", "PCA", "artificial intelligence",
        "machine learning", "deep learning", "reinforcement learning", "supervised learning",
        "neural network", "neural networks", "language model", "language models", "transformer model",
        "computer vision", "backpropagation", "gradient descent", "overfitting", "classifier", "embeddings",
        "pytorch", "tensorflow", "keras", "scikit", "random forest", "logistic regression", "人工智能",
        "机器学习", "深度学习", "强化学习", "神经网络", "大模型", "语言模型", "计算机视觉", "自然语言处理"),
    "ic": ("IC", "ICs", "ASIC", "FPGA", "VLSI", "CMOS", "NMOS", "PMOS", "MOSFET", "MOSFETs", "BJT", "SRAM",
        "DRAM", "PCB", "ADC", "DAC", "PLL", "LDO", "EDA", "SPICE", "RTL", "integrated circuit",
        "integrated circuits", "semiconductor", "semiconductors", "transistor", "transistors", "op amp",
        "opamp", "wafer", "lithography", "verilog", "vhdl", "microcontroller", "flip flop", "standard cell",
        "tape out", "集成电路", "芯片", "半导体", "晶体管", "光刻", "晶圆", "流片", "电路设计", "放大器",
        "模数转换"),
    "bio": ("DNA", "RNA", "mRNA", "PCR", "CRISPR", "MRI", "EEG", "ECG", "gene", "genes", "genome", "genomic",
        "genomics", "protein", "proteins", "enzyme", "antibody", "antibodies", "bacteria", "virus", "vaccine",
        "cancer", "tumor", "tumour", "clinical", "patient", "patients", "disease", "diagnosis", "therapy",
        "biomedical", "bioinformatics", "pharmacology", "neuroscience", "immune", "stem cells", "基因",
        "蛋白质", "生物医学", "临床", "患者", "疾病", "疫苗", "肿瘤", "癌症", "抗体", "药物", "诊断", "细胞"),
}  # fmt: skip
SITES = ("ai", "datascience", "stats", "cs", "electronics", "robotics", "dsp", "biology", "bioinformatics")
SITES += ("medicalsciences", "chemistry", "psychology")  # read before the other millions of posts
BUFFER = 2_000  # rows held in memory to change their order while a source streams
FEEDS = {"my_reports": ["my_reports"], "orca": ["orca"], "bio": ["pubmed", "stackexchange"]}
FEEDS |= {"ai": ["stackexchange"], "ic": ["stackexchange"]}  # share: its sources, one by one
DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
ASKING = ("system", "developer", "user", "human", "tool", "observation", "function")  # roles with no answer


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class Config:
    total_samples: int = setting(TOTAL_SAMPLES, "how many rows to mix")
    ratios: tuple = setting(tuple(f"{n}={r}" for n, r in RATIOS.items()), "parts of 1", type=str, nargs="+")
    my_report_data_path: str = setting(MY_REPORT_DATA_PATH, "your own records, in whatever shape")
    orca_data_path: str = setting("Open-Orca/SlimOrca", "SlimOrca, whole or in part")
    pubmed_data_path: str = setting("qiaojin/PubMedQA:pqa_labeled", "PubMedQA, any configuration")
    stackexchange_data_path: str = setting("HuggingFaceH4/stack-exchange-preferences", "StackExchange")
    keywords: str = setting("", 'JSON file {"ai": [...], "ic": [...], "bio": [...]} in place of KEYWORDS')
    min_score: int = setting(2, "pm_score that an answer needs if none was accepted")
    system: str = setting("keep", "what to do with SlimOrca's system texts", choices=("keep", "drop"))
    output_file: str = setting(OUTPUT_FILE, "the file to write")
    parts_dir: str = setting("data/parts", "folder for sources that were read to their end")
    seed: int = setting(42, "decides on the rows and their order")

    def __post_init__(self):
        shares = re.findall(r"(\S+)=(\d*\.?\d+)(?!\S)", " ".join(self.ratios))
        shares = {name: float(number) for name, number in shares if name in FEEDS}
        if len(shares) < len(self.ratios) or round(sum(shares.values()), 6) != 1:
            raise ValueError(f"--ratios {self.ratios}: use name=number with {', '.join(FEEDS)}; sum 1")
        self.ratios = {name: share for name, share in shares.items() if share}
        words = from_json(Path(self.keywords).read_text("utf-8-sig")) if self.keywords else KEYWORDS
        lists = isinstance(words, dict) and all(isinstance(keys, list | tuple) for keys in words.values())
        if not lists or words.keys() != KEYWORDS.keys():
            raise ValueError(f"--keywords: expected lists of words {', '.join(KEYWORDS)}, not {words!r:.80}")
        self.keywords = words
        if self.total_samples < 1:
            raise ValueError("--total_samples must be 1 or more")


# Same in: chat.py, data_integration.py, data_set_generation.py, evaluate.py, inference.py, merge_model.py
def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line; an unknown or shortened flag is an error (exit 2)."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return Config(**vars(cli.parse_args(argv)))


def main(config: Config) -> None:
    paths = {"my_reports": config.my_report_data_path, "orca": config.orca_data_path}
    paths |= {"pubmed": config.pubmed_data_path, "stackexchange": config.stackexchange_data_path}
    asked = [(share, name) for share in config.ratios for name in FEEDS[share]]
    for place in (config.output_file, f"{config.output_file}.rejected.jsonl", config.parts_dir):
        if any(Path(place).resolve().is_relative_to(Path(paths[name]).resolve()) for _, name in asked):
            raise ValueError(f"{place} is, or lies in, a source; name another place for it")
    streams = {name: stream_records(name, paths[name], config) for _, name in asked}
    lines, rejects, counts = sample(streams, config)
    random.Random(config.seed).shuffle(lines)
    write_lines(f"{config.output_file}.rejected.jsonl", rejects)
    if not lines:
        raise ValueError(f"no row is of use; {config.output_file}.rejected.jsonl names the bad ones")
    write_lines(config.output_file, lines)
    columns = ("found", "rejected", "duplicate", "written")
    print(f"{'share':12}{'source':15}{'asked':>9}" + "".join(f"{column:>11}" for column in columns))
    for share, name in asked:
        cells = "".join(f"{counts[share, name, column]:11,}" for column in columns)
        print(f"{share:12}{name:15}{config.total_samples * config.ratios[share]:9,.0f}{cells}")
    print(f"{len(lines):,} rows; next: python qwen_finetuning.py --dataset_path {config.output_file}")


def sample(streams: dict[str, Iterator], config: Config) -> tuple[list[bytes], list[bytes], Counter]:
    """(lines of the mix, rejects, counts by share, source and what). The next row is for the share that is
    furthest behind its ratio; a row that fits several shares goes to the scarcest and waits there."""
    from tqdm import tqdm

    ratios, lines, rejects, counts, seen = config.ratios, [], [], Counter(), set()
    feeds = {share: chain(*(streams[name] for name in FEEDS[share])) for share in ratios}  # one by one
    waiting, taken = {share: deque() for share in ratios}, Counter()
    with tqdm(total=config.total_samples, unit=" rows") as bar:
        while len(lines) < config.total_samples and feeds:
            share = min(feeds, key=lambda share: taken[share] / ratios[share])
            if waiting[share]:
                name, line = waiting[share].popleft()
                lines.append(line)
                taken[share] += 1
                counts[share, name, "written"] += 1
                bar.update()
            elif (row := next(feeds[share], None)) is None:  # all that could fill this share was read
                del feeds[share]
            else:
                name, fits, line = row.split(b"\t", 2)
                name, fits = name.decode(), fits.decode().split()
                if fits == ["rejected"]:
                    rejects.append(line)
                    counts[share, name, "rejected"] += 1
                elif wanted := [fit for fit in fits if fit in ratios]:
                    share = min(wanted, key=lambda fit: (taken[fit] + len(waiting[fit])) / ratios[fit])
                    counts[share, name, "found"] += 1
                    if (key := same_text(line)) in seen:
                        counts[share, name, "duplicate"] += 1
                    elif len(waiting[share]) < config.total_samples:  # more can not be needed
                        seen.add(key)
                        waiting[share].append((name, line))
    return lines, rejects, counts


def stream_records(name: str, source: str, config: Config) -> Iterator[bytes]:
    """Yield a line for each row of use: source, the shares that it fits, or "rejected", and JSON."""
    files = filter(Path.is_file, (Path(__file__), Path(source), *sorted(Path(source).rglob("*"))))
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    state += [source, config.seed, config.system, config.min_score, config.keywords]
    part = Path(config.parts_dir, f"{name}-{hashlib.sha256(ascii(state).encode()).hexdigest()[:16]}.tsv")
    if part.exists():
        with open(part, "rb") as lines:
            yield from lines
        return
    label = {"source": Path(source).name if Path(source).exists() else source}
    find = domain_finder(config.keywords)
    part.parent.mkdir(parents=True, exist_ok=True)
    passed = 0
    try:
        with open(f"{part}.new", "wb") as file:
            for where, row in stream_of(source, config.seed):
                try:
                    fits, record = converted_row(name, row, find, config)
                    if not fits:
                        passed += 1
                        continue
                    line = json.dumps(label | record, ensure_ascii=False, default=str).encode()
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    file_name, sign, n = re.fullmatch(r"(?s)(.*)(:|, row )(\d+)", where).groups()
                    reason = str(error) if isinstance(error, ValueError) else repr(error)
                    reject = {"file": file_name, "line" if sign == ":" else "row": int(n), "reason": reason}
                    fits, line = ["rejected"], json.dumps(reject).encode()
                line = f"{name}\t{' '.join(fits)}\t".encode() + line + b"\n"
                file.write(line)
                yield line
        Path(f"{part}.new").replace(part)  # comes here only at the end of the source
    finally:
        Path(f"{part}.new").unlink(missing_ok=True)
        if passed:
            print(
                f"{name}: {passed:,} rows had no keyword, or no answer that is good enough", file=sys.stderr
            )


def stream_of(source: str, seed: int) -> Iterator[tuple[str, dict | str]]:
    """Yield (where, row), shuffled within BUFFER rows; of a hub dataset's files those of the SITES first."""
    if Path(source).exists() or source.lower().endswith(DATA_ENDINGS):
        rows = rows_of(source, streaming=True)
    else:
        from datasets import load_dataset_builder

        builder = load_dataset_builder(*source.split(":"))
        urls = builder.config.data_files["train"]
        random.Random(seed).shuffle(urls)
        urls.sort(key=lambda url: url.split("/")[-2].partition(".")[0] not in SITES)
        rows = enumerate(builder.as_streaming_dataset("train"), 1)
        rows = ((f"{source}, row {number}", row) for number, row in rows)
    while buffer := list(islice(rows, BUFFER)):
        random.Random(seed).shuffle(buffer)
        yield from buffer


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


def converted_row(name: str, row: dict | str, find, config: Config) -> tuple[list[str], dict]:
    """(shares that a row fits, none if it is of no use; record). ValueError for one without an answer."""
    if name == "stackexchange" and isinstance(row, dict):
        return from_stackexchange(row, find, config.min_score)
    row = answered(row, name, config.system)
    if not any(row.get(key) for key in ("messages", "conversations", "instruction", "input", "prompt")):
        raise ValueError(f"unknown shape with keys {list(row)}")
    return ["bio" if name == "pubmed" else name], row


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


def from_stackexchange(post: dict, find, min_score: int) -> tuple[list[str], dict]:
    """(domains, record in Markdown) of a post and its accepted answer, or else that with the best score."""
    if not post["answers"]:
        raise ValueError("it has no answers")
    best = max(post["answers"], key=lambda answer: (answer["selected"] is True, int(answer["pm_score"])))
    good = best["selected"] is True or int(best["pm_score"]) >= min_score
    text = unescape(re.sub(r"<[^<>]*>", " ", post["question"] + " " + best["text"]))
    if not good or not (domains := find(text)):
        return [], {}
    question, answer = markdown_of(post["question"]), markdown_of(best["text"])
    if not question or not answer:
        raise ValueError("its question or its answer holds no text")
    address, _, asker = post["metadata"]
    source = f"HuggingFaceH4/stack-exchange-preferences {address} question by {asker}, answer by "
    source += f"{best.get('author')} {best.get('author_profile')}, CC BY-SA"
    return domains, {"instruction": question, "input": "", "output": answer, "source": source}


def markdown_of(html: str) -> str:
    """HTML as Markdown: code stays code, a link becomes its text, images go, formulas stay as they are."""
    from markdownify import markdownify

    html = html.replace("<sup>", "^<sup>").replace("<sub>", "_<sub>")  # else 10<sup>9</sup> reads 109
    plain = {"escape_asterisks": False, "escape_underscores": False, "escape_misc": False}
    return markdownify(html, heading_style="ATX", strip=["a", "img"], bullets="-", **plain).strip()


def domain_finder(keywords: dict[str, list[str]]):
    """A function that tells of a text the domains of which it has a keyword."""
    cjk = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # where this text begins a word ends: AI芯片 holds AI
    letter, plain, signs = rf"[^\W{cjk}]", [], []
    for domain, keys in keywords.items():
        for key in filter(None, (" ".join(str(key or "").split()) for key in keys)):
            if re.search(f"[{cjk}]", key):
                plain.append(("text", key, domain))
            elif re.fullmatch(r"\w+([ -]\w+)*", key):
                words = f" {key.replace('-', ' ')} "
                plain.append(("words", words, domain) if key.isupper() else ("small", words.lower(), domain))
            else:  # with signs: beside it no letter or digit, nor its own sign once more
                first, key, last = re.escape(key[0]), re.escape(key), re.escape(key[-1])
                signs.append((re.compile(f"(?<!{letter})(?<!{first}){key}(?!{letter})(?!{last})"), domain))

    def find(text: str) -> list[str]:
        words = f" {' '.join(re.findall(f'{letter}+', text))} "
        forms = {"text": text, "words": words, "small": words.lower()}
        found = {domain for form, key, domain in plain if key in forms[form]}
        return sorted(found | {domain for sign, domain in signs if sign.search(text)})

    return find


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError) as error:  # a person's mistake or a file's
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
