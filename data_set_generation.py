"""The large mix: my own reports, SlimOrca, PubMedQA and StackExchange by domain, as one shuffled training file.

    python data_set_generation.py
    python data_set_generation.py --total_samples 24000 --orca_data_path data/slimorca --min_score 3

Reads   my_dataset.json and three datasets; each may be a hub id, or a local file or folder (.json, .jsonl, .parquet).
        StackExchange is sorted by KEYWORDS into AI, integrated circuits (IC) and biomedicine.
Writes  mixed_finetune_dataset.jsonl:  {"instruction": "...", "input": "", "output": "...", "source": "my.jsonl"}
        mixed_finetune_dataset.jsonl.rejected.jsonl:  {"file": "my.jsonl", "line": 7, "reason": "empty answer"}
        data/parts/*.sqlite: the converted rows of each source, from which an interrupted build goes on. The whole
        folder may be deleted when the mix is done.

No row is used twice: where a source has too few, the others share the gap. The same inputs and seed give the same
bytes. Beyond the keywords and --min_score it judges no row's content; it does not look for near-duplicates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from html import unescape
from itertools import islice
from pathlib import Path
from random import Random
from typing import IO, TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:  # for annotations only: imported where they are used, as --help should not wait for them
    from lxml.etree import _Element
    from tqdm import tqdm

TOTAL_SAMPLES = 240_000
RATIOS = {"my_reports": 0.1, "orca": 0.3, "bio": 0.2, "ai": 0.2, "ic": 0.2}  # bio: PubMedQA and StackExchange together
MY_REPORT_DATA_PATH = "my_dataset.json"
OUTPUT_FILE = "mixed_finetune_dataset.jsonl"

# A word in capitals is an acronym and matches as written; other words and all phrases match in any case. Whole words,
# but a keyword with Chinese characters matches as written, anywhere.
KEYWORDS = {
    "ai": (
        "AI", "LLM", "LLMs", "NLP", "CNN", "RNN", "LSTM", "GAN", "SVM", "PCA", "artificial intelligence",
        "machine learning", "deep learning", "reinforcement learning", "supervised learning", "neural network",
        "neural networks", "language model", "language models", "transformer model", "computer vision",
        "backpropagation", "gradient descent", "overfitting", "classifier", "embeddings", "pytorch",
        "tensorflow", "keras", "scikit", "random forest", "logistic regression",
        "人工智能", "机器学习", "深度学习", "强化学习", "神经网络", "大模型",
        "语言模型", "计算机视觉", "自然语言处理",
    ),
    "ic": (
        "IC", "ICs", "ASIC", "FPGA", "VLSI", "CMOS", "NMOS", "PMOS", "MOSFET", "MOSFETs", "BJT", "SRAM", "DRAM", "PCB",
        "ADC", "DAC", "PLL", "LDO", "EDA", "SPICE", "RTL", "integrated circuit", "integrated circuits", "semiconductor",
        "semiconductors", "transistor", "transistors", "op amp", "opamp", "wafer", "lithography", "verilog", "vhdl",
        "microcontroller", "flip flop", "standard cell", "tape out",
        "集成电路", "芯片", "半导体", "晶体管", "光刻", "晶圆", "流片", "电路设计", "放大器", "模数转换",
    ),
    "bio": (
        "DNA", "RNA", "mRNA", "PCR", "CRISPR", "MRI", "EEG", "ECG", "gene", "genes", "genome", "genomic", "genomics",
        "protein", "proteins", "enzyme", "antibody", "antibodies", "bacteria", "virus", "vaccine", "cancer", "tumor",
        "tumour", "clinical", "patient", "patients", "disease", "diagnosis", "therapy", "biomedical", "bioinformatics",
        "pharmacology", "neuroscience", "immune", "stem cells",
        "基因", "蛋白质", "生物医学", "临床", "患者", "疾病", "疫苗", "肿瘤", "癌症", "抗体", "药物", "诊断", "细胞",
    ),
}  # fmt: skip

# StackExchange is ordered by site, one folder each. These can hold a domain: they are read before the other millions.
SITES = (
    "ai.stackexchange.com", "datascience.stackexchange.com", "stats.stackexchange.com", "cs.stackexchange.com",
    "electronics.stackexchange.com", "robotics.stackexchange.com", "dsp.stackexchange.com",
    "biology.stackexchange.com", "bioinformatics.stackexchange.com", "medicalsciences.stackexchange.com",
    "chemistry.stackexchange.com", "psychology.stackexchange.com",
)  # fmt: skip

SHUFFLE_BUFFER = 2_000  # rows of a source held in memory to change their order while it streams
SUFFIXES = (".json", ".jsonl", ".parquet")

# ----------------------------------------------------------------------------------------- settings


# Same in: all nine scripts
def setting(default, help: str, **extra):
    """A dataclass field that is also a command-line flag; its default is written here and nowhere else."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass
class Config:
    total_samples: int = setting(TOTAL_SAMPLES, "rows of the mix")
    ratios: tuple[str, ...] = setting(
        tuple(f"{name}={ratio}" for name, ratio in RATIOS.items()), "share of each kind; what is not named gets 0"
    )
    my_report_data_path: str = setting(MY_REPORT_DATA_PATH, "your own records, in any of the five shapes")
    orca_data_path: str = setting("Open-Orca/SlimOrca", "SlimOrca: hub id (id:config), file or folder")
    pubmed_data_path: str = setting("qiaojin/PubMedQA:pqa_labeled", "PubMedQA: hub id (id:config), file or folder")
    stackexchange_data_path: str = setting(
        "HuggingFaceH4/stack-exchange-preferences", "StackExchange preferences: hub id (id:config), file or folder"
    )
    keywords: Path | None = setting(None, 'JSON file {"ai": [...], "ic": [...], "bio": [...]} instead of KEYWORDS')
    min_score: int = setting(2, "pm_score that an answer needs when the asker accepted none")
    output_file: Path = setting(Path(OUTPUT_FILE), "where the mix goes")
    parts_dir: Path = setting(Path("data/parts"), "folder for the converted rows of each source")
    seed: int = setting(42, "decides which rows are taken and their order")
    strict: bool = setting(False, "stop at the first rejected row")


# Same in: chat.py, data_integration.py, data_set_generation.py, evaluate.py, inference.py, merge_model.py,
# qwen_finetuning.py
def settings_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """A parser with one flag a field: its name, type, default and help. Unknown or shortened flags are errors.

    A field's metadata may hold `choices`; a tuple takes several values.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = get_type_hints(config_class)
    for f in fields(config_class):
        kind, default, choices = kinds[f.name], f.default, f.metadata.get("choices")
        kind = (get_args(kind) or (kind,))[0]  # Path | None and tuple[str, ...] hold their type first
        shown = " ".join(default) if isinstance(default, tuple) else default
        # argparse formats help with %, so a bare one in a text would crash --help
        options = {"default": default, "help": f"{f.metadata['help']} (default: {shown})".replace("%", "%%")}
        if kind is bool:  # never type=bool: bool("False") is True
            options["action"] = argparse.BooleanOptionalAction  # --flag and --no-flag
        else:
            options |= {"type": kind, "choices": choices, "metavar": None if choices else "VALUE"}
            options["nargs"] = "+" if isinstance(default, tuple) else None
        parser.add_argument("--" + f.name, **options)
    return parser


def parse_args(argv: list[str] | None = None) -> Config:
    parser = settings_parser(Config, __doc__)
    config = Config(**vars(parser.parse_args(argv)))
    try:
        ratios_of(config.ratios, RATIOS)
        keywords_of(config.keywords)
    except ValueError as error:
        parser.error(str(error))
    if config.total_samples < 1:
        parser.error(f"--total_samples is {config.total_samples}; it must be at least 1")
    return config


# Same in: data_integration.py, data_set_generation.py
def ratios_of(pairs: tuple[str, ...], known: dict[str, float]) -> dict[str, float]:
    """Shares above 0 from `name=number` pairs. Raises ValueError unless the names are known and the sum is 1.

    >>> ratios_of(("reports=0.25", "orca=0.75", "pubmed=0"), {"reports": 0.2, "orca": 0.5, "pubmed": 0.3})
    {'reports': 0.25, 'orca': 0.75}
    """
    ratios = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in known or not re.fullmatch(r"\d*\.?\d+", number):
            raise ValueError(f"--ratios: {pair!r} is not name=number with a name of {', '.join(known)}")
        ratios[name] = float(number)
    if abs(sum(ratios.values()) - 1) > 1e-6:
        raise ValueError(f"--ratios: {' '.join(pairs)} adds up to {sum(ratios.values()):g}; it must be 1")
    return {name: ratios[name] for name in known if ratios.get(name)}  # in a fixed order, however they were typed


def keywords_of(path: Path | None) -> dict[str, Sequence[str]]:
    """KEYWORDS, or those of a JSON file in their place. Raises ValueError for another form."""
    if path is None:
        return KEYWORDS
    try:
        keywords = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--keywords {path}: {error}") from None
    lists = keywords.values() if isinstance(keywords, dict) and set(keywords) == set(KEYWORDS) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise ValueError(f"--keywords {path}: expected an object of three lists of words: {', '.join(KEYWORDS)}")
    if marked := [word for words in lists for word in words if not re.fullmatch(r"\w+([ -]\w+)*", word)]:
        raise ValueError(f"--keywords {path}: only words of letters and digits are found, not {marked[:5]}")
    return keywords


# -------------------------------------------------------------------------------- reading the sources


# Same in: all nine scripts
class UserError(Exception):
    """A person's mistake: shown as it is, without a traceback."""


# Same in: data_integration.py, data_set_generation.py, evaluate.py, qwen_finetuning.py
def read_rows(path: Path) -> Iterator[tuple[str, dict | None, str]]:
    """Yield (where, record, fault) for each row of a JSONL file or a JSON array, in order.

    `where` is file:line. An unreadable row has no record and a fault that says why; a good one has the fault "".
    What stands around a bad row is still read.
    """
    with open(path, "rb") as file:
        start = file.read(1000)
        file.seek(0)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            yield f"{path}:1", None, "this is UTF-16 text; save the file as UTF-8"
            return
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            # broken bytes become lone surrogates, which messages_of finds in the row that has them
            text = file.read().decode("utf-8-sig", errors="surrogateescape")
            file.seek(0)
            items = list(read_array(path, text))
            # lines that merely begin with a bracket are no array: read them one by one
            array = any(record for _, record, _ in items) and not items[-1][2].startswith("text behind")
            if path.suffix == ".json" or array or not items:
                yield from items
                return
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if not line:
                continue
            try:
                record, fault = json.loads(line.decode("utf-8")), ""
                if not isinstance(record, dict):
                    record, fault = None, f"expected an object, found {type(record).__name__}"
            except (ValueError, RecursionError) as error:
                record, fault = None, f"not JSON ({error})"
            yield f"{path}:{number}", record, fault


# Same in: data_integration.py, data_set_generation.py, evaluate.py, qwen_finetuning.py
def read_array(path: Path, text: str) -> Iterator[tuple[str, dict | None, str]]:
    """`read_rows` for the text of one JSON array. In a .json file it goes on after a damaged element, at the next line
    that begins an object; what stands behind the array is a fault too.
    """
    decode, gap, anew = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), re.compile(r"\n[\s,]*(?=\{)")
    counted = text.index("[")
    line, position = 1 + text.count("\n", 0, counted), gap.match(text, counted + 1).end()
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = decode(text, position)
            good = isinstance(record, dict)
            fault = "" if good else f"expected an object, found {type(record).__name__}"
            yield f"{path}:{line}", record if good else None, fault
            position = gap.match(text, end).end()
        except (ValueError, RecursionError) as error:
            found = path.suffix == ".json" and anew.search(text, position + 1)
            yield f"{path}:{line}", None, f"not JSON ({error})" + ("" if found else "; nothing after it could be read")
            if not found:
                return
            position = found.end()
    if text[position + 1 :].strip():
        line += text.count("\n", counted, gap.match(text, position + 1).end())
        yield f"{path}:{line}", None, "text behind the array; a file holds one array, or one object a line"


# Same in: data_integration.py, data_set_generation.py, evaluate.py, merge_model.py, qwen_finetuning.py
@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Write beside `path` and take its place only at the end, so that it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# Same in: data_integration.py, data_set_generation.py
def files_of(path: str) -> list[str]:
    """The data files behind a local file or folder, or a hub id (`id` or `id:config`), in a fixed order.

    Raises UserError where there is none, or the hub cannot be reached.
    """
    if os.path.exists(path):  # Path("") would be the working folder
        found = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
        files = [str(file) for file in found if file.suffix in SUFFIXES and file.is_file()]
        files = [file for file in files if not file.endswith(".rejected.jsonl")]  # of an earlier build
    elif path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{path}: no such file or folder")
    else:
        from datasets import load_dataset_builder
        from huggingface_hub.utils import logging

        print(f"looking up {path} on the hub ...", file=sys.stderr)
        logging.set_verbosity_error()  # its five retries are lines of noise; what counts is said below
        hub_id, _, config = path.partition(":")
        try:
            files = load_dataset_builder(hub_id, config or None).config.data_files["train"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # the library raises all of them
            raise UserError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
        files = [file for file in files if file.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in it")
    return files


# Same in: data_integration.py, data_set_generation.py
def rows_of_files(files: list[str]) -> Iterator[tuple[str, dict | None, str]]:
    """Yield (where, record, fault) for each row of some files, local or on the hub.

    Local JSON goes through read_rows and not through load_dataset: that fails on a whole block of rows for one bad
    line, and could name neither the line nor save the good rows around it.
    """
    for file in files:
        if Path(file).exists() and not file.endswith(".parquet"):
            yield from read_rows(Path(file))
            continue
        import datasets

        datasets.config.STREAMING_READ_MAX_RETRIES = 60  # five seconds apart: a dropped connection may last 5 minutes
        number, kind = 0, "parquet" if file.endswith(".parquet") else "json"
        try:
            rows = datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
            for number, record in enumerate(rows, start=1):
                yield f"{file}:{number}", record, ""
        except Exception as error:  # pyarrow and the hub's client raise a dozen kinds; no code of ours runs in here
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if not Path(file).exists():
                raise UserError(f"{file}:{number + 1}: {reason}. Run again to go on from what was read.") from None
            yield f"{file}:{number + 1}", None, f"the file cannot be read from here on ({reason})"


# Same in: data_integration.py, data_set_generation.py
def stream_of(files: list[str], seed: int, first: tuple[str, ...]) -> Iterator[tuple[str, dict | None, str]]:
    """Yield (where, record, fault) for each row, in the seed's order by file and buffer; folders `first` come first.

    What IterableDataset.shuffle does; but that hands each row through a thread (measured: 30,000 rows/s, here over a
    million).
    """
    random = Random(seed)
    early = [file for file in files if Path(file).parent.name in first]
    for group in early, sorted(set(files) - set(early)):
        random.shuffle(group)
        held = []
        for row in rows_of_files(group):
            if len(held) < SHUFFLE_BUFFER:
                held.append(row)
                continue
            index = random.randrange(SHUFFLE_BUFFER)
            yield held[index]
            held[index] = row
        random.shuffle(held)
        yield from held


# ----------------------------------------------------------------------------------- from row to record


# Same in: data_integration.py, data_set_generation.py, evaluate.py, qwen_finetuning.py
class EmptyAnswer(ValueError):
    """A record whose assistant says nothing."""


# Same in: data_integration.py, data_set_generation.py, evaluate.py, qwen_finetuning.py
def messages_of(record: dict, system_prompt: str = "") -> list[dict[str, str]]:
    """A record of any of the five shapes as chat messages. Raises ValueError that says what is wrong with it.

    >>> messages_of({"instruction": "解释LoRA", "input": "一句话", "output": "低秩微调"})
    [{'role': 'user', 'content': '解释LoRA\\n补充信息：一句话'}, {'role': 'assistant', 'content': '低秩微调'}]
    """
    if record.get("messages") is not None:  # in a table every row has every column
        turns = turns_of(record["messages"], "messages", "role", "content")
    elif record.get("conversations") is not None:
        turns = turns_of(record["conversations"], "conversations", "from", "value")
    else:
        answer = "response" if "output" not in record and "response" in record else "output"
        if answer not in record or not ("instruction" in record or "input" in record):
            raise ValueError(
                f"unknown shape with keys {sorted(record)}; expected instruction and output (or response), "
                "input and output, messages, or conversations"
            )
        parts = [record.get("instruction"), record.get("input")]
        if any(part is not None and not isinstance(part, str) for part in parts):
            raise ValueError(f"instruction and input are {[type(part).__name__ for part in parts]}, not text")
        turns = [("user", "\n补充信息：".join(part for part in parts if part)), ("assistant", record[answer])]

    system = system_prompt if record.get("system") is None else record["system"]
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": content} for role, content in turns]
    for message in messages:
        role, content = message["role"], message["content"]
        if content is None or (isinstance(content, str) and not content.strip()):
            raise EmptyAnswer("empty answer") if role == "assistant" else ValueError(f"the {role} says nothing")
        if not isinstance(content, str):
            raise ValueError(f"the {role}'s text is {type(content).__name__}, not text")
        if re.search("[\ud800-\udfff]", content):
            raise ValueError(f"the {role}'s text holds half a character (a lone surrogate)")
    roles = [role for role, _ in turns]
    if roles[:1] != ["user"] or "assistant" not in roles or "system" in roles:
        raise ValueError(f"roles are {roles}; expected user first, an assistant, and system only at the start")
    return messages


# Same in: data_integration.py, data_set_generation.py, evaluate.py, qwen_finetuning.py
def turns_of(items: object, name: str, role_key: str, text_key: str) -> list[tuple[str, object]]:
    """(role, text) of each message in a list of them. Raises ValueError for another form or an unknown role."""
    roles = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name} is no list of objects")
    for item in items:
        if not isinstance(item.get(role_key), str) or item[role_key] not in roles:
            raise ValueError(f"unknown role {item.get(role_key)!r}; known: {', '.join(roles)}")
    return [(roles[item[role_key]], item.get(text_key)) for item in items]


# Same in: data_integration.py, data_set_generation.py
def training_record(row: dict) -> dict:
    """A row of any of the five shapes as the mixers write it. Raises ValueError that says what is wrong with it.

    One question and one answer become instruction, input, output; longer conversations stay messages.

    >>> training_record({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    {'instruction': 'Hi', 'input': '', 'output': 'Hello'}
    """
    messages = messages_of(row, system_prompt="\0")  # the mark of a row that has no system text of its own
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if len(messages) > 2:
        record = {"messages": messages}
    elif row.get("instruction") and row.get("messages") is None and row.get("conversations") is None:
        record = {"instruction": row["instruction"], "input": row.get("input") or "", "output": messages[1]["content"]}
    else:
        record = {"instruction": messages[0]["content"], "input": "", "output": messages[1]["content"]}
    if system != "\0":
        record["system"] = system  # an empty one too: it says that the record wants no system prompt
    if row.get("source") is not None:
        record["source"] = row["source"] if isinstance(row["source"], str) else json.dumps(row["source"], default=str)
    return record


# Same in: data_integration.py, data_set_generation.py
def key_of(record: dict, seed: int) -> int:
    """A number that two records share only if they are the same but for white space and case (64 bits, signed).

    Sorted by it, records lie in a random order that depends on the seed and on nothing else.
    """
    texts = [f"{m['role']} {' '.join(m['content'].split()).casefold()}" for m in messages_of(record, "\0")]
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big", signed=True)


# Same in: data_integration.py, data_set_generation.py
def convert_pubmed(row: dict) -> dict:
    """A PubMedQA row as a record: contexts as input; the long answer and the decision as output. Raises ValueError.

    >>> convert_pubmed({"question": "Q?", "context": {"contexts": ["A.", "B."]}, "long_answer": "L.",
    ...                 "final_decision": "maybe"})
    {'instruction': 'Q?', 'input': 'A.\\nB.', 'output': 'L.\\n\\nConclusion: maybe'}
    """
    context, decision = row.get("context"), row.get("final_decision")
    contexts = context.get("contexts") if isinstance(context, dict) else None
    texts = [row.get("question"), row.get("long_answer"), *(contexts if isinstance(contexts, list) else [None])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("question, long_answer and context.contexts must be text; here one is missing or empty")
    if decision not in ("yes", "no", "maybe"):
        raise ValueError(f"final_decision is {decision!r}; expected yes, no or maybe")
    output = f"{row['long_answer']}\n\nConclusion: {decision}"
    return {"instruction": row["question"], "input": "\n".join(contexts), "output": output}


def convert_stackexchange(row: dict, matcher: KeywordMatcher, min_score: int) -> dict | None:
    """A question and its best answer as a record in Markdown; None if it fits no domain or no answer is good enough.

    Its domains stand in it as `shares`. Raises ValueError for a row of another form. These questions have no title.
    """
    question, answers = row.get("question"), row.get("answers")
    if not isinstance(question, str):
        raise ValueError(f"question is {type(question).__name__}, not text")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError("answers is no list of objects")
    best = best_answer(answers, min_score)
    if best is None:
        return None
    if not isinstance(best.get("text"), str):
        raise ValueError(f"the answer's text is {type(best.get('text')).__name__}, not text")
    # before the slow part, which most rows need not see; without tags, as a link's address is no keyword
    domains = matcher.domains(unescape(TAG.sub(" ", question + " " + best["text"])))
    if not domains:
        return None
    metadata = row.get("metadata")  # addresses of the question, the site and the asker
    links = [*metadata, *[None] * 3] if isinstance(metadata, list) else [None] * 3
    address, _, asker = (link if isinstance(link, str) and link else "unknown" for link in links[:3])
    who = [best.get("author"), best.get("author_profile")]
    author = " ".join(text for text in who if isinstance(text, str) and text) or "unknown"
    credit = f"{address} question by {asker}, answer by {author}, CC BY-SA"
    source = f"HuggingFaceH4/stack-exchange-preferences {credit}"
    question, answer = markdown_of(question), markdown_of(best["text"])
    return {"instruction": question, "input": "", "output": answer, "source": source, "shares": domains}


def best_answer(answers: list[dict], min_score: int) -> dict | None:
    """The accepted answer, else the first of those with the highest pm_score if that is `min_score` or more.

    >>> best_answer([{"pm_score": "1", "selected": False}, {"pm_score": "10", "selected": False}], 2)["pm_score"]
    '10'
    """
    for answer in answers:
        if answer.get("selected") is True:
            return answer
    try:
        scores = [int(answer.get("pm_score")) for answer in answers]  # "10" is a string in the data, and above "9"
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"pm_score is {[answer.get('pm_score') for answer in answers]}, not numbers") from None
    return answers[scores.index(max(scores))] if scores and max(scores) >= min_score else None


class KeywordMatcher:
    """Finds the domains whose keywords a text holds: whole words, Chinese keywords anywhere.

    >>> KeywordMatcher({"ic": ["IC"], "ai": ["AI", "machine learning", "芯片"]}).domains("Topics to maintain: AI芯片")
    ('ai',)
    """

    # a word ends where Chinese, Japanese or Korean text begins: "AI芯片" holds the word "AI"
    CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
    WORD = re.compile(rf"[^\W{CJK}]+")
    ASCII_WORD = re.compile(r"\w+", re.ASCII)  # the same for ASCII text, in half the time

    def __init__(self, keywords: dict[str, Sequence[str]]):
        self.kinds = {}  # domain -> (single words, phrases between spaces, Chinese keywords)
        for domain, of_domain in keywords.items():
            words, phrases, chinese = set(), [], []
            for keyword in of_domain:
                parts = self.WORD.findall(keyword)
                if re.search(f"[{self.CJK}]", keyword):
                    chinese.append(keyword)
                elif len(parts) == 1:
                    words.add(parts[0] if keyword.isupper() else parts[0].lower())
                elif parts:
                    phrases.append(f" {' '.join(parts).lower()} ")
            self.kinds[domain] = words, phrases, chinese

    def domains(self, text: str) -> tuple[str, ...]:
        parts = (self.ASCII_WORD if text.isascii() else self.WORD).findall(text)
        line = f" {' '.join(parts).lower()} "
        found = {*parts, *line.split()}  # as written, which is for the acronyms, and in small letters
        return tuple(
            domain
            for domain, (words, phrases, chinese) in self.kinds.items()
            if not words.isdisjoint(found)
            or any(phrase in line for phrase in phrases)
            or any(keyword in text for keyword in chinese)
        )


# ------------------------------------------------------------------------------------- HTML to Markdown
# Our own walk over lxml's tree, and not a ready converter, for measured reasons: on such posts markdownify made 590
# texts a second, and html-to-markdown (6,400) lost the closing backtick of code inside a stripped link and doubled the
# backslashes of \[formulas\].

BLOCKS = {"html", "body", "p", "div", "pre", "ul", "ol", "li", "blockquote", "table", "hr", "dl", "dt", "dd"}
BLOCKS |= {"h1", "h2", "h3", "h4", "h5", "h6"}
SPACE, LINE_BREAK, TAG = re.compile(r"\s+"), re.compile(r" *\n *"), re.compile(r"<[^<>]*>")
STRAY = re.compile(r"\0|</?(?:html|body)[^>]*>", re.I)
MARKS = {"strong": "**", "b": "**", "em": "*", "i": "*", "del": "~~", "s": "~~", "strike": "~~"}


def markdown_of(html: str) -> str:
    """HTML as Markdown: code stays code, a link becomes its text, images go. Formulas and `*` in text stay as they are.

    >>> markdown_of("<p>Use <a href='http://x.org'>the <b>fast</b> one</a>:</p><pre><code>a &lt; b\\n</code></pre>")
    'Use the **fast** one:\\n\\n```\\na < b\\n```'
    """
    from lxml import etree

    if not html.strip():
        return ""
    # a NUL would end the text for the parser, and so would a stray </body>; huge_tree lifts its limit of 256 levels
    html = STRAY.sub("", html)
    parser = etree.HTMLParser(huge_tree=True, remove_comments=True, remove_pis=True, encoding="utf-8")
    try:
        return "\n\n".join(blocks_of(etree.fromstring(f"<body>{html}</body>".encode(), parser)))
    except RecursionError:
        raise ValueError("the HTML is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the HTML cannot be read ({error})") from None


def blocks_of(node: _Element) -> list[str]:
    """The paragraphs, lists, code blocks ... of an element, each as Markdown."""
    blocks, line = [], squeeze(node.text)
    for child in node:
        # code inside a link or the like is a block too
        if child.tag in BLOCKS or (len(child) and child.find(".//pre") is not None):
            blocks += paragraph(line) + block_of(child)
            line = squeeze(child.tail)
        else:
            line += inline(child) + squeeze(child.tail)
    return blocks + paragraph(line)


def paragraph(line: str) -> list[str]:
    """Text with its marks as one block, or none if it is empty."""
    line = line.strip()
    return [LINE_BREAK.sub("\n", line) if "\n" in line else line] if line else []


def block_of(node: _Element) -> list[str]:
    """One block element as Markdown, in one or more blocks; none if it is empty."""
    tag = node.tag
    if tag == "pre":
        code = "".join(node.itertext()).strip("\n").rstrip()
        fence = backticks(code, 3)
        language = re.search(r"\blang(?:uage)?-(\w+)", node.get("class", ""))
        return [f"{fence}{language[1] if language else ''}\n{code}\n{fence}"] if code else []
    if tag in ("ul", "ol"):
        return list_of(node)
    if tag == "blockquote":
        text = "\n\n".join(blocks_of(node))
        return ["\n".join(f"> {line}" if line else ">" for line in text.split("\n"))] if text else []
    if tag == "hr":
        return ["---"]
    if tag == "table":
        return table_of(node)
    blocks = blocks_of(node)
    if tag[0] == "h" and tag[1:].isdigit() and blocks:
        return ["#" * int(tag[1:]) + " " + " ".join(blocks)]
    return blocks


def table_of(node: _Element) -> list[str]:
    """A table's caption, with what else stands in no row, and its rows; none if it is empty."""
    lines, columns = [], 0
    for row in node.xpath("./tr | ./*/tr"):
        cells = [blocks_of(cell) + paragraph(squeeze(cell.tail)) for cell in row]
        stray = paragraph(squeeze(row.text))  # text that stands in no cell
        cells = [stray, *cells] if stray else cells
        lines.append("| " + " | ".join(" ".join(cell).replace("\n", " ").replace("|", "\\|") for cell in cells) + " |")
        columns = columns or len(cells)
        row.clear(keep_tail=True)
    return blocks_of(node) + (["\n".join([lines[0], "|" + " --- |" * columns, *lines[1:]])] if columns else [])


def list_of(node: _Element) -> list[str]:
    """A list as one block; none if it is empty. Where an item has several paragraphs, empty lines part the items."""
    lines, gap, start = paragraph(squeeze(node.text)), "\n", node.get("start", "")
    for number, item in enumerate(node, start=int(start) if start.isdecimal() else 1):
        blocks = blocks_of(item)
        has_paragraphs = any(part.tag in ("p", "pre", "blockquote") for part in item)
        if has_paragraphs and len(blocks) > 1:
            gap = "\n\n"
        mark = "- " if node.tag == "ul" else f"{number}. "
        text = ("\n\n" if has_paragraphs else "\n").join(blocks)
        lines.append(mark + re.sub(r"\n(?=[^\n])", "\n" + " " * len(mark), text))
        lines += paragraph(squeeze(item.tail))  # text that stands in no item
    return [gap.join(lines)] if lines else []


def inline(node: _Element) -> str:
    """An element within a line as Markdown, without its tail."""
    tag = node.tag
    if tag == "br":
        return "\n"
    if tag in ("script", "style", "img"):
        return ""
    if tag in ("code", "kbd", "tt"):
        code = squeeze("".join(node.itertext())).strip()
        ticks, edge = backticks(code, 1), " " if code[:1] == "`" or code[-1:] == "`" else ""
        return f"{ticks}{edge}{code}{edge}{ticks}" if code else ""
    text = squeeze(node.text) + "".join(inline(child) + squeeze(child.tail) for child in node)
    inner = text.strip()
    if tag in MARKS and inner:  # the mark must touch the word: <b>bold </b>x is **bold** x
        return text.replace(inner, MARKS[tag] + inner + MARKS[tag])
    if tag in ("sub", "sup") and inner and " " not in inner:
        return ("_" if tag == "sub" else "^") + inner
    return text


def backticks(code: str, least: int) -> str:
    """The mark before and after code: more backticks than any run of them in the code."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", code)), default=0))


def squeeze(text: str | None) -> str:
    """White space as one space, as a browser shows it."""
    return SPACE.sub(" ", text) if text else ""


# --------------------------------------------------------------------------------------------- mixing


# Same in: data_integration.py, data_set_generation.py
def line_of(record: dict) -> str:
    """A record as a line of JSON that UTF-8 can hold: half a character (a lone surrogate) becomes a question mark."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace").decode()


# Same in: data_integration.py, data_set_generation.py
def converted_rows(
    rows: Iterable[tuple[str, dict | None, str]], convert: Callable[[dict], dict | None], seed: int
) -> Iterator[tuple[str, dict | None, int, str]]:
    """Yield (where, record, key, fault) for each row; a bad one has a fault, one of no use neither fault nor record."""
    for place, row, fault in rows:
        record, key = None, 0
        try:
            if not fault:
                record = convert(row)
                key = key_of(record, seed) if record else 0
        except (ValueError, RecursionError) as error:
            record, fault = None, str(error) or type(error).__name__
        yield place, record, key, fault


# Same in: data_integration.py, data_set_generation.py
def rejection(place: str, fault: str) -> str:
    """A bad row as a line of the reject file: its file, its line there (in Parquet: row), and the reason."""
    file, _, number = place.rpartition(":")
    return line_of({"file": file, "row" if file.endswith(".parquet") else "line": int(number), "reason": fault})


# Same in: data_integration.py, data_set_generation.py
@dataclass
class Source:
    name: str
    flag: str  # the setting that holds its hub id, file or folder
    shares: tuple[str, ...]  # those that its rows may fill
    convert: Callable[[dict], dict | None]  # row to record; None: of no use; "shares" in it: it fits only these
    settings: str = ""  # what else decides how a row is converted
    first: tuple[str, ...] = ()  # folders to read before the rest


# Same in: data_integration.py, data_set_generation.py
class Part:
    """The converted rows of one source, on disk, in the order in which the source's stream gives them.

    A build takes the rows that are here and converts only what it needs beyond them. SQLite keeps the file whole
    when the process is killed, and keeps a second build away from it.
    """

    def __init__(self, source: Source, path: str, seed: int, folder: Path):
        self.source, self.path, self.seed = source, path, seed
        local = os.path.exists(path)
        self.label = Path(path).name if local else path.partition(":")[0]
        self.files = files_of(path) if local else []
        versions = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.files]
        # the script itself is part of the name: a changed script may convert in another way
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        name = repr([path, source.settings, source.first, seed, code, versions]).encode("utf-8", "surrogateescape")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{source.name}-{hashlib.sha256(name).hexdigest()[:16]}.sqlite"
        self.db = sqlite3.connect(file, timeout=1)  # seconds to wait for a lock
        self.db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self.db.execute("BEGIN EXCLUSIVE")
        # a bad row has no shares, and its line is that of the reject file
        self.db.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, key, shares, line)")
        # a killed build reads the stream again from its beginning, and converts what comes after the last of these rows
        self.last = self.db.execute("SELECT coalesce(max(number), 0) FROM rows").fetchone()[0]
        # a number that SQLite keeps for its users: here 1 when the stream was read to its end
        self.complete = self.db.execute("PRAGMA user_version").fetchone()[0]
        if not local and not self.last:
            self.files = files_of(path)  # now, so that all sources that cannot be opened are named together

    def rows(self, bar: tqdm) -> Iterator[tuple[int, int, str]]:
        """Yield (number, key, shares) of each row of use and each bad row; the others leave a gap."""
        yield from self.db.execute("SELECT number, key, shares FROM rows ORDER BY number")
        if self.complete:
            return
        with closing(stream_of(self.files or files_of(self.path), self.seed, self.source.first)) as stream:
            rows = converted_rows(islice(stream, self.last, None), self.source.convert, self.seed)
            for number, (place, record, key, fault) in enumerate(rows, start=self.last + 1):
                if fault:
                    key, shares, line = 0, "", rejection(place, fault)
                elif record:
                    shares = " ".join(record.pop("shares", self.source.shares))
                    record.setdefault("source", self.label)
                    line = line_of(record)
                if fault or record:
                    self.db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (number, key, shares, line))
                    yield number, key, shares
                if number % 5000 == 0:
                    self.db.commit()
                    bar.set_postfix_str(f"{self.source.name}: row {number:,}")
        self.db.execute("PRAGMA user_version=1")
        self.db.commit()

    def line(self, number: int) -> str:
        return self.db.execute("SELECT line FROM rows WHERE number = ?", (number,)).fetchone()[0]

    def close(self) -> None:
        with suppress(sqlite3.Error):  # what went wrong was said before
            self.db.commit()
        self.db.close()


# Same in: data_integration.py, data_set_generation.py
class Mix:
    """Takes rows from the parts, each text once, and gives them out in a random order that the seed decides.

    The keys of the rows lie in a temporary SQLite table, so that memory does not grow with the mix: its index finds
    duplicates, and reading it in the order of the keys is the shuffle.
    """

    def __init__(self, parts: dict[str, Part], ratios: dict[str, float], strict: bool):
        self.parts, self.ratios, self.strict = parts, ratios, strict
        # the sources of each share, in the order in which they are used up
        self.feeds = {share: [name for name in parts if share in parts[name].source.shares] for share in ratios}
        self.read = dict.fromkeys(parts, 0)  # how far into each stream this mix came
        self.counts = Counter()  # (share, source, "found" | "rejected" | "duplicate" | "written") -> rows
        self.found_for = dict.fromkeys(ratios, 0)  # share -> rows
        self.db = sqlite3.connect("", isolation_level=None)  # "": a private file that SQLite deletes
        self.db.execute("PRAGMA cache_size=-65536")  # 64 MiB
        self.db.execute("CREATE TABLE chosen (key INTEGER PRIMARY KEY, source, number)")
        self.db.execute("CREATE TABLE waiting (id INTEGER PRIMARY KEY, share, source, number, key)")
        self.db.execute("CREATE INDEX waiting_for ON waiting (share, id)")
        self.db.execute("BEGIN")

    def take(self, total: int, bar: tqdm) -> int:
        """Choose up to `total` rows by the ratios. What one share lacks, those that have more give by their ratios."""
        self.streams = {name: part.rows(bar) for name, part in self.parts.items()}
        taken, have_more = 0, dict(self.ratios)
        try:
            while taken < total and have_more:
                missing, weight = total - taken, sum(have_more.values())
                for share, ratio in list(have_more.items()):
                    for _ in range(min(total - taken, max(1, int(missing * ratio / weight)))):
                        if not self.choose(share):
                            del have_more[share]
                            break
                        taken += 1
                        bar.update()
        finally:
            for stream in self.streams.values():
                stream.close()
        return taken

    def choose(self, share: str) -> bool:
        """Take one more row for a share; False if there is none."""
        while candidate := self.candidate(share):
            source, number, key = candidate
            if self.db.execute("INSERT OR IGNORE INTO chosen VALUES (?, ?, ?)", (key, source, number)).rowcount:
                self.counts[share, source, "written"] += 1
                return True
            self.counts[share, source, "duplicate"] += 1
        return False

    def candidate(self, share: str) -> tuple[str, int, int] | None:
        """(source, number, key) of the next row for a share, chosen before or not.

        Rows come in the order of their source. One that fits another share waits until that share asks.
        """
        query = "SELECT id, source, number, key FROM waiting WHERE share = ? ORDER BY id LIMIT 1"
        row = self.db.execute(query, (share,)).fetchone()
        if row:
            self.db.execute("DELETE FROM waiting WHERE id = ?", row[:1])
            return row[1:]
        for source in self.feeds[share]:
            for number, key, shares in self.streams[source]:
                self.read[source] = number
                if not shares:
                    if self.strict:
                        file, line, reason = json.loads(self.parts[source].line(number)).values()
                        raise UserError(f"{file}:{line}: {reason}. Mend the row or leave out --strict.")
                    self.counts[share, source, "rejected"] += 1
                    continue
                # a row that fits several shares goes to the scarcest: the one found least for what it asks
                home = min(shares.split(), key=lambda name: self.found_for[name] / self.ratios[name])
                self.found_for[home] += 1
                self.counts[home, source, "found"] += 1
                if home == share:
                    return source, number, key
                self.db.execute("INSERT INTO waiting VALUES (NULL, ?, ?, ?, ?)", (home, source, number, key))
        return None

    def lines(self) -> Iterator[str]:
        """The chosen rows as JSON, in the order of their keys."""
        for source, number in self.db.execute("SELECT source, number FROM chosen ORDER BY key"):
            yield self.parts[source].line(number)

    def rejected(self) -> Iterator[str]:
        """The bad rows that this mix came across, as lines of the reject file."""
        for name, part in self.parts.items():
            query = "SELECT line FROM rows WHERE shares = '' AND number <= ? ORDER BY number"
            yield from (line for (line,) in part.db.execute(query, (self.read[name],)))

    def table(self, total: int) -> str:
        """What was asked, found, rejected, duplicate and written, for each share and source."""
        columns = ("found", "rejected", "duplicate", "written")
        rows = [("share", "source", "asked", *columns)]
        for share, ratio in self.ratios.items():
            for place, source in enumerate(self.feeds[share]):
                asked = f"{round(total * ratio):,}" if place == 0 else ""
                rows.append((share, source, asked, *(f"{self.counts[share, source, name]:,}" for name in columns)))
        sums = [sum(count for key, count in self.counts.items() if key[2] == name) for name in columns]
        rows.append(("total", "", f"{total:,}", *(f"{number:,}" for number in sums)))
        return "\n".join(f"{row[0]:<12}{row[1]:<15}" + "".join(f"{value:>11}" for value in row[2:]) for row in rows)


# Same in: data_integration.py, data_set_generation.py
def write_rejected(lines: Iterable[str], output_file: Path) -> int:
    """Write the reject file beside the output, unless it would be empty; returns the number of its lines."""
    path, count = output_file.with_name(output_file.name + ".rejected.jsonl"), 0
    with replacing(path) as file:
        for line in lines:
            file.write(line + "\n")
            count += 1
    if not count:
        path.unlink()  # an empty one would look like a finding
    return count


# Same in: data_integration.py, data_set_generation.py
def open_parts(sources: list[Source], config: Config) -> dict[str, Part]:
    """Open the part file of each source. Raises UserError with one line for each source that cannot be read."""
    parts, faults = {}, []
    for source in sources:
        try:
            parts[source.name] = Part(source, getattr(config, source.flag), config.seed, config.parts_dir)
        except UserError as error:
            faults.append(f"{source.name}: {error}. Pass --{source.flag} with a local file or folder.")
    if faults:
        raise UserError("\n".join(faults))
    return parts


# Same in: data_integration.py, data_set_generation.py
def build(sources: list[Source], ratios: dict[str, float], config: Config) -> None:
    """Make the mix, write it and print its table. Raises UserError where a source or the output is at fault."""
    from tqdm import tqdm

    parts = {}
    try:
        parts = open_parts([source for source in sources if not ratios.keys().isdisjoint(source.shares)], config)
        files = [file for part in parts.values() for file in part.files if Path(file).exists()]
        if config.output_file.exists() and any(map(config.output_file.samefile, files)):
            raise UserError(f"{config.output_file} is a source. Pass another --output_file.")
        mix = Mix(parts, ratios, config.strict)
        with tqdm(total=config.total_samples, unit=" rows", smoothing=0.05) as bar:
            written = mix.take(config.total_samples, bar)
        rejected = write_rejected(mix.rejected(), config.output_file)
        if not written:
            hint = f"; see {config.output_file}.rejected.jsonl" if rejected else ""
            raise UserError("no good row in any source" + hint)
        with replacing(config.output_file) as file:
            file.writelines(line + "\n" for line in mix.lines())
    except sqlite3.Error as error:
        hint = "If another build is running, wait for it; if the disk is full, make room; else delete the folder."
        raise UserError(f"{config.parts_dir}: {error}. {hint}") from None
    except OSError as error:  # no permission, no space, a folder where a file should be
        raise UserError(str(error)) from None
    finally:
        for part in parts.values():
            part.close()
    print(mix.table(config.total_samples))
    if written < config.total_samples:
        print(f"All sources together gave {written:,} of {config.total_samples:,} rows.", file=sys.stderr)
    if rejected:
        print(f"rejected rows: {config.output_file}.rejected.jsonl", file=sys.stderr)
    print(f"written: {config.output_file}", file=sys.stderr)


def main(config: Config) -> None:
    ratios, keywords = ratios_of(config.ratios, RATIOS), keywords_of(config.keywords)
    domains = {domain: words for domain, words in keywords.items() if domain in ratios}
    matcher = KeywordMatcher(domains)
    sources = [
        Source("my_reports", "my_report_data_path", ("my_reports",), training_record),
        Source("orca", "orca_data_path", ("orca",), training_record),
        Source("pubmed", "pubmed_data_path", ("bio",), convert_pubmed),
        Source(
            "stackexchange",
            "stackexchange_data_path",
            ("bio", "ai", "ic"),
            lambda row: convert_stackexchange(row, matcher, config.min_score),
            settings=f"{config.min_score} {json.dumps(domains, ensure_ascii=False)}",
            first=SITES,
        ),
    ]
    build(sources, ratios, config)


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
