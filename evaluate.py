"""Judge a model on the rows that training held out: loss, free answers, and a report to read.

    python evaluate.py --rouge --bleu                                    # Qwen_finetuning_model/ on its held-out rows
    python evaluate.py --model outputs/demo/Qwen_finetuning_model --rouge --compare_base
    python evaluate.py --model models/merged --dataset_path test.jsonl --eval_ratio 1 --resume

Reads   --model: an adapter folder, a checkpoint, a merged folder, a hub id or a .gguf file; finetune_config.json beside
        it names the dataset and the held-out rows. Without that, the rows are split as training would split them.
Writes  evaluation_results/metrics.json       {"eval_loss": 0.445, "perplexity": 1.56, "stop_rate": 1.0, ...}
        evaluation_results/predictions.jsonl  {"instruction": "解释LoRA", "input": "", "reference": "...",
                                               "prediction": "...", "stopped": "end_of_turn", ...}
        evaluation_results/report.html        the same to read by eye, lowest score first; needs nothing else

The loss is teacher-forced, on the assistant's tokens alone, by the function that training used. Answers are generated
from what stands before a conversation's last assistant turn. Words are counted in Chinese (jieba) and in what
rouge_score knows as words, letters a-z and digits; other scripts count as no words. It asks no judge model.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:  # for annotations only: importing transformers takes seconds, and --help should not
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATASET = "mixed_finetune_dataset.jsonl"
UNFINISHED = "predictions.unfinished.jsonl"  # what --resume goes on with
MANY_ANSWERS = 16  # from here on a 4-bit base is turned into plain layers once; below, that does not pay
HAN = re.compile("([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+)")  # runs of Chinese characters
# 4 bits as in the training: NF4, double quantisation
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# One fixed conversation; its token ids are part of the fingerprint that training and inference compare.
PROBE = [
    {"role": "user", "content": "你好, 1+1=?"},
    {"role": "assistant", "content": "2。"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]
# Marks in text on its way to token ids: within a control token that a person typed, and after an answer. They are
# halves of a character (lone surrogates), which no message holds.
BREAK, END = "\ud800", "\ud801"

# ----------------------------------------------------------------------------------------- settings


# Same in: all nine scripts
def setting(default, help: str, **extra):
    """A dataclass field that is also a command-line flag; its default is written here and nowhere else."""
    return field(default=default, metadata={"help": help, **extra})


# What a setting must be: a test of its value, and the words for it.
POSITIVE = (lambda value: 0 < value < math.inf, "above 0")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
UTF8_TEXT = (lambda value: not re.search("[\ud800-\udfff]", value), "text in UTF-8")
PART = (lambda value: 0 < value <= 1, "above 0 and at most 1")
ANY_SEED = (lambda value: 0 <= value < 2**32, "from 0 to 4294967295")


@dataclass
class Config:
    model: str = setting("Qwen_finetuning_model", "adapter or model folder, checkpoint, hub id or .gguf file")
    dataset_path: str | None = setting(None, f"file, folder or hub id; None takes the training's, else {DATASET}")
    output_dir: Path = setting(Path("evaluation_results"), "where the results go")
    eval_ratio: float = setting(0.1, "share of rows where training left no list of held-out ones; 1: all", must=PART)
    seed: int = setting(42, "which rows are taken; with a temperature, how answers are sampled", must=ANY_SEED)
    limit: int | None = setting(None, "judge by this many rows at most; None for all", must=POSITIVE)
    skip_bad_rows: bool = setting(False, "leave out rows that can not be used, instead of stopping")
    max_seq_length: int | None = setting(
        None, "cut longer rows for the loss; None: as trained, else 2048", must=POSITIVE
    )
    system_prompt: str | None = setting(
        None, "system message; None takes the one of the training, '' none", must=UTF8_TEXT
    )
    rouge: bool = setting(False, "ROUGE-1, ROUGE-2 and ROUGE-L, with 95 % intervals")
    bleu: bool = setting(False, "BLEU, with a 95 % interval")
    metrics: tuple[str, ...] = setting((), "metrics of the evaluate library: names or paths; runs their Python code")
    compare_base: bool = setting(False, "the same with the adapter switched off, side by side")
    batch_size: int = setting(32, "prompts that are answered together", must=POSITIVE)
    max_new_tokens: int = setting(512, "longest answer in tokens", must=POSITIVE)
    temperature: float = setting(0.0, "0 always takes the likeliest token; higher is freer", must=NOT_NEGATIVE)
    top_p: float = setting(0.9, "with a temperature: sample from the likeliest tokens up to this share", must=PART)
    repetition_penalty: float = setting(1.0, "above 1: tokens that were used become less likely", must=POSITIVE)
    no_repeat_ngram_size: int = setting(0, "no run of this many tokens comes twice; 0 for no limit", must=NOT_NEGATIVE)
    load_in_4bit: bool | None = setting(None, "4-bit base weights; None does as the training did")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    resume: bool = setting(False, "go on with an evaluation that was interrupted, after its last whole prediction")


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


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def range_faults(config) -> list[str]:
    """The settings whose value is not what their field says it must be, one line each."""
    checked = [(f.name, getattr(config, f.name), *f.metadata["must"]) for f in fields(config) if "must" in f.metadata]
    return [
        f"--{name} is {value}; it must be {words}"
        for name, value, holds, words in checked
        if value is not None and not holds(value)
    ]


def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line. Exits with 2 for what can not be."""
    parser = settings_parser(Config, __doc__)
    config = Config(**vars(parser.parse_args(argv)))
    if faults := range_faults(config):
        parser.error("\n".join(faults))
    return config


# --------------------------------------------------------------------------------- reading and writing


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


# Same in: evaluate.py, qwen_finetuning.py
def dataset_rows(source: str) -> Iterator[tuple[str, dict | None, str]]:
    """Rows of a .jsonl or .json file, of a folder or of a hub dataset, as `read_rows` yields them."""
    if source.endswith((".jsonl", ".json")):
        yield from read_rows(Path(source))
        return
    from datasets import load_dataset

    with explaining("dataset", source):
        for number, record in enumerate(load_dataset(source, split="train")):
            yield f"{source}[{number}]", record, ""


# Same in: chat.py, evaluate.py, inference.py, merge_model.py, qwen_finetuning.py
@contextmanager
def explaining(what: str, name: str) -> Iterator[None]:
    """Turn a failed download or a broken folder into one line that says what to do."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # for a cut file the libraries raise what they like; a panic in Rust is no Exception
        reason, mend = " ".join(str(error).split())[:300].rstrip("."), ""
        if "trust_remote_code" in str(error):  # the library's own text is long, and asks to visit the hub
            reason = "it brings Python code of its own; read it, and pass --trust_remote_code to run it"
        elif not os.path.exists(name):  # unlike Path.exists it answers for every text, however long
            mend = (
                "; if it is on the hub, check the name and the network (HF_ENDPOINT sets a mirror) and, for a gated "
                "model, log in with 'hf auth login'; or pass a local folder"
            )
        raise UserError(f"{what} {name} can not be loaded: {reason}{mend}") from error


# Same in: evaluate.py, merge_model.py, qwen_finetuning.py
def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)


# Same in: evaluate.py, qwen_finetuning.py
def say(text: str) -> None:
    """A line of progress on stderr, from the first process only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


# Same in: evaluate.py, qwen_finetuning.py
def is_main_process() -> bool:
    """Whether this process may speak and write; torchrun and accelerate set RANK."""
    return int(os.environ.get("RANK", 0)) == 0


# Same in: chat.py, evaluate.py, inference.py, merge_model.py, qwen_finetuning.py
def quiet_libraries() -> None:
    """Their warnings would stand between a person and the lines that matter; errors still show."""
    import logging
    import warnings

    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1"}  # TRL reports each run otherwise
    quiet |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        quiet["TQDM_DISABLE"] = "1"  # a bar belongs on a terminal, not in a log file
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    for name in ("transformers", "trl", "accelerate", "bitsandbytes", "peft", "torch", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(torch|transformers|trl|peft|bitsandbytes|accelerate|datasets)")
    warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT would go on with half an adapter


# --------------------------------------------------------------------- from a record to ids and labels


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


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
@lru_cache(maxsize=1)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], re.Pattern]:
    """The tokenizer's control tokens with their ids, and a pattern that finds them as the tokenizer itself does."""
    tokens = [(token, id) for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    tokens.sort(key=lambda pair: -len(pair[0].content))  # the longest first, where one begins like another
    # some swallow the white space beside them
    patterns = [r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for token, _ in tokens]
    return {token.content: id for token, id in tokens}, re.compile("|".join(patterns) or r"(?!)")


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def shield(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` with BREAK after the first character of each control token that a person typed in it."""
    return control_tokens(tokenizer)[1].sub(lambda found: re.sub(r"(\S)", rf"\1{BREAK}", found[0], count=1), text)


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options) -> str:
    """What the chat template makes of the messages, in which control tokens that were typed are broken by BREAK.

    Raises ValueError with the template's own words where it refuses the messages.
    """
    from jinja2 import TemplateError

    shielded = [message | {"content": shield(message["content"], tokenizer)} for message in messages]
    try:
        return tokenizer.apply_chat_template(shielded, tokenize=False, **options)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def tokenize_rendered(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of rendered text: the template's control tokens as such, those a person typed as plain characters."""
    ids, (known, pattern) = [], control_tokens(tokenizer)
    position = 0
    for found in [*pattern.finditer(text), None]:
        piece = text[position : found.start() if found else len(text)].replace(BREAK, "")
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
        if found:
            ids.append(known[found[0].strip()])
            position = found.end()
    return ids


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def encode_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer. Raises ValueError as `render` does."""
    return tokenize_rendered(render(messages, tokenizer, add_generation_prompt=True), tokenizer)


# Same in: evaluate.py, qwen_finetuning.py
def encode_conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict:
    """A conversation as `input_ids` and `labels`, two lists of the same length.

    Every assistant turn, from where the generation prompt ends to its end-of-turn token, has its ids as labels; all
    else has -100. The turns are tokenised apart, so that no token spans the border between a prompt and an answer.
    `broken_prompts` counts the turns whose prompt, as `encode_prompt` gives it, is no prefix of the conversation.
    Raises ValueError where the template refuses the conversation or rewrites an answer beyond recognition.
    """
    text, turns = render(messages, tokenizer), [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for strip in (str, str.rstrip):  # some templates trim an answer: then the mark must follow the trimmed one
        marked = [m | {"content": strip(m["content"]) + END} if i in turns else m for i, m in enumerate(messages)]
        marked = render(marked, tokenizer)
        ends = [found.start() - order for order, found in enumerate(re.finditer(END, marked))]
        if marked.replace(END, "") == text and len(ends) == len(turns):
            break
    else:
        raise ValueError("the chat template does not show every answer as it is")

    pieces, position, broken_prompts = [], 0, 0  # of the text, by turns without loss and with it
    for turn, end in zip(turns, ends, strict=True):
        prompt = render(messages[:turn], tokenizer, add_generation_prompt=True)
        start = len(prompt)
        if not text.startswith(prompt) or not position <= start <= end:
            broken_prompts += 1
            answer = shield(messages[turn]["content"], tokenizer)
            shown = [s for s in (answer, answer.rstrip(), answer.lstrip(), answer.strip()) if text.endswith(s, 0, end)]
            if not shown:
                raise ValueError("the chat template rewrites an answer (does it drop its reasoning?)")
            start = end - len(shown[0])
        found = control_tokens(tokenizer)[1].search(text, end)
        closed = found is not None and not text[end : found.start()].strip()
        pieces.append(text[position:start])
        position = found.end() if closed else end
        # a template without an end-of-turn token would teach the model never to stop
        pieces.append(text[start:position] + ("" if closed else tokenizer.eos_token))
    encoded = {"input_ids": [], "labels": [], "broken_prompts": broken_prompts}
    for order, piece in enumerate([*pieces, text[position:]]):
        ids = tokenize_rendered(piece, tokenizer)
        encoded["input_ids"] += ids
        encoded["labels"] += ids if order % 2 else [-100] * len(ids)
    return encoded


# Same in: chat.py, evaluate.py, inference.py, merge_model.py, qwen_finetuning.py
def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What tells two chat formats apart: the template's SHA-256 and the token ids of one fixed conversation."""
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    probe_ids = tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=False)
    return {"sha256": hashlib.sha256(template.encode()).hexdigest(), "probe_ids": list(probe_ids)}


# Same in: evaluate.py, qwen_finetuning.py
def digest_of(messages: list[dict[str, str]]) -> str:
    """SHA-256 of a conversation: two rows with the same one are duplicates, and held-out rows are known by it."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


# Same in: evaluate.py, qwen_finetuning.py
def sha256_of(path: Path) -> str:
    """SHA-256 of a file; "" for a folder or a hub id."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


# Same in: evaluate.py, qwen_finetuning.py
def stop_for(faults: list[str], go_on: bool) -> None:
    """Raise UserError naming the first ten faults, unless the person said to go on."""
    if faults and not go_on:
        shown = "\n  ".join(faults[:10])
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"{len(faults)} rows can not be used; mend them or pass --skip_bad_rows\n  {shown}{more}")


# ------------------------------------------------------------------------------------------- the rows


def usable_rows(source: str, config: Config, run: dict, go_on: bool) -> dict[str, dict]:
    """The usable rows of a dataset by their digests, so that duplicates drop out. Raises UserError naming bad ones.

    A row has `digest`, `messages`, and for the eye `where`, `instruction`, `input` and `reference`.
    """
    trained_system = run.get("system_prompt", "")
    system = trained_system if config.system_prompt is None else config.system_prompt
    rows, faults = {}, []
    for where, record, fault in dataset_rows(source):
        try:
            if record is not None:  # the digest is the training's, whichever system prompt the row is judged with
                digest = digest_of(messages_of(record, trained_system))
                rows.setdefault(digest, {"digest": digest, "where": where} | shown_row(record, system))
        except ValueError as error:
            fault = str(error)
        if fault:
            faults.append(f"{where}: {fault}")
    stop_for(faults, go_on)
    return rows


def rows_to_judge(config: Config, run: dict) -> tuple[list[dict], dict]:
    """The rows to judge by, as `usable_rows` gives them, and what metrics.json says of the dataset.

    On the dataset of the training these are the rows whose digests the training stored. On any other, or without a
    training, rows are split with the function and seed that training uses.
    """
    trained = {"path": "", "sha256": ""} | run.get("dataset", {})
    source = config.dataset_path or trained["path"] or DATASET
    sha256 = sha256_of(Path(source))
    changed = sha256 != trained["sha256"]
    same = source == trained["path"] or bool(sha256) and not changed
    go_on = config.skip_bad_rows or same and run.get("settings", {}).get("skip_bad_rows", False)
    rows = usable_rows(source, config, run, go_on)
    about = {"path": source, "sha256": sha256, "rows": len(rows)}
    if not same:
        chosen = split_as_training(list(rows.values()), config)
        about["chosen_by"] = f"split, eval_ratio {config.eval_ratio}, seed {config.seed}"
    elif held_out := run.get("held_out"):
        chosen = [rows[digest] for digest in map(str, held_out) if digest in rows]
        about |= {"chosen_by": "digests of the training", "changed": changed}
    else:
        raise UserError(f"{config.model}: its training held no rows out; pass --dataset_path with rows to judge by")
    if same and changed:
        still = f"{len(chosen)} of the {len(held_out)} held-out rows are still in it"
        say(f"warning: {source} has changed since the training (its SHA-256 differs); {still}")
    if not chosen:
        raise UserError(f"{source}: no row to judge by among {len(rows)} usable ones; --eval_ratio 1 takes all")
    return chosen[: config.limit], about


def split_as_training(rows: list[dict], config: Config) -> list[dict]:
    """The held-out share of `rows`, in the order in which training's split gives it; all of them for a ratio of 1."""
    if config.eval_ratio == 1:
        return rows
    if len(rows) <= math.ceil(config.eval_ratio * len(rows)):  # a training would have nothing left
        return []
    from datasets import Dataset

    places = Dataset.from_dict({"place": range(len(rows))})
    held_out = places.train_test_split(test_size=config.eval_ratio, seed=config.seed)["test"]
    return [rows[place] for place in held_out["place"]]


def shown_row(record: dict, system_prompt: str) -> dict:
    """What a report shows of a record, and its `messages`. Of several turns the last answer is the reference.

    >>> shown_row({"instruction": "解释LoRA", "output": "低秩微调"}, "")["reference"]
    '低秩微调'
    """
    messages = messages_of(record, system_prompt)
    while messages[-1]["role"] != "assistant":
        messages.pop()
    if "messages" in record or "conversations" in record:
        before = [message for message in messages[:-1] if message["role"] != "system"]
        lines = [f"{message['role']}: {message['content']}" for message in before]
        record = {"instruction": "\n".join(lines) if len(before) > 1 else before[0]["content"]}
    return {
        "instruction": record.get("instruction") or "",
        "input": record.get("input") or "",
        "reference": messages[-1]["content"],
        "messages": messages,
    }


def encode_rows(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, go_on: bool) -> list[dict]:
    """The rows with `input_ids` and `labels`, cut to `max_seq_length`, `prompt_ids`, and `tokens`, the whole length.

    Raises UserError naming the rows that the chat template refuses.
    """
    encoded, faults = [], []
    for row in rows:
        try:
            whole = encode_conversation(row["messages"], tokenizer)
            cut = {key: whole[key][:max_seq_length] for key in ("input_ids", "labels")}
            prompt_ids = encode_prompt(row["messages"][:-1], tokenizer)
            encoded.append(row | cut | {"prompt_ids": prompt_ids, "tokens": len(whole["input_ids"])})
        except ValueError as error:
            faults.append(f"{row['where']}: {error}")
    stop_for(faults, go_on)
    if not encoded:
        raise UserError("no row is left to judge by: the chat template refuses them all")
    return encoded


# ------------------------------------------------------------------------------------------- the model


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
@dataclass(frozen=True)
class Device:
    """Where a model runs and how; `device_map` is for `from_pretrained`."""

    kind: str
    dtype: str
    four_bit: bool
    attention: str
    device_map: dict


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def device_policy(kind: str, bfloat16: bool, flash: bool, four_bit: bool, dtype: str = "auto", rank: int = 0) -> Device:
    """Decide type, quantisation and attention from what a machine can do.

    >>> device_policy("cuda", bfloat16=True, flash=False, four_bit=True).dtype
    'bfloat16'
    """
    if dtype == "auto":
        dtype = "bfloat16" if bfloat16 else "float32" if kind == "cpu" else "float16"
    flash = flash and kind == "cuda" and bfloat16 and dtype != "float32"  # it runs on GPUs that know bfloat16
    return Device(
        kind=kind,
        dtype=dtype,
        four_bit=four_bit and kind != "mps",  # bitsandbytes has no 4-bit layers for Apple's GPUs
        attention="flash_attention_2" if flash else "sdpa",
        device_map={"": rank if kind == "cuda" else kind},
    )


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def find_device(four_bit: bool, dtype: str = "auto") -> Device:
    """`device_policy` with the facts of this machine. Each process of a distributed run takes its own GPU."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return device_policy("cuda", bfloat16, is_flash_attn_2_available(), four_bit, dtype, rank)
    if torch.backends.mps.is_available():
        return device_policy("mps", torch.backends.mps.is_macos_or_newer(14, 0), False, four_bit, dtype)
    features = torch.cpu.get_capabilities()
    return device_policy("cpu", features.get("avx512_bf16") or features.get("amx_bf16"), False, four_bit, dtype)


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def model_fault(name: str, mend: str = "Train one with qwen_finetuning.py, or pass --model") -> str:
    """What keeps `name` from being a model to load, seen from its files alone; "" if nothing does."""
    path = Path(name)
    if os.path.isfile(name):  # unlike Path.is_file it answers for every text, however long
        wrong = f"{name} is a file; --model takes an adapter or model folder, a hub id or a .gguf file"
        return "" if path.suffix == ".gguf" else wrong
    if not os.path.isdir(name):
        hub_id = name.count("/") == 1 and not name.startswith((".", "/", "models/", "outputs/")) and len(name) <= 96
        return "" if hub_id else f"{name}: no such folder. {mend}"
    if not any(path.glob("*.safetensors")):
        return f"{name}: no *.safetensors in this folder; only that format (or a .gguf file) is read"
    if not (path / "adapter_config.json").is_file():
        return "" if (path / "config.json").is_file() else f"{name}: neither adapter_config.json nor config.json in it"
    try:
        base = base_of(path, read_run(path))
    except UserError as error:
        return str(error)
    fault = model_fault(base, "Put it there, or start from the folder where the training was started")
    return fault and f"{name} is an adapter whose base model is missing: {fault}"


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def read_run(folder: Path) -> dict:
    """The record of the run that made a model, from `finetune_config.json` beside it; {} where there is none.

    Raises UserError where a part that the scripts use is of another kind than the training writes.
    """
    path, sections = folder / "finetune_config.json", ("settings", "chat_template", "dataset", "merged")
    if not path.is_file():
        return {}
    kinds = dict.fromkeys(sections, dict) | {"max_seq_length": int, "held_out": list, "end_of_turn_ids": list}
    kinds |= dict.fromkeys(("base_model", "dtype", "held_out_file", "path", "system_prompt", "tokenizer_dir"), str)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        for part in (run, *(run.get(section, {}) for section in sections)):
            for key, value in part.items():
                if not isinstance(value, kinds.get(key, object)):
                    raise ValueError(f"{key} is {str(value)[:80]!r}")
        if not all(isinstance(id, int) for id in run.get("chat_template", {}).get("end_of_turn_ids", [])):
            raise ValueError("end_of_turn_ids are no numbers")
        return run
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{path}: not the record of a run ({error}); take the one of the training again") from None


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def base_of(folder: Path, run: dict) -> str:
    """Name of an adapter's base model, as its run or PEFT's own settings have it. Raises UserError if they are cut."""
    path = folder / "adapter_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the settings of an adapter ({error}); take the training's again") from None
    return run.get("base_model") or str(named)


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: dict) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, the tokenizer's, and those that the training used."""
    own = model.generation_config.eos_token_id
    trained = run.get("chat_template", {}).get("end_of_turn_ids", [])
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *trained} - {None})


# Same in: chat.py, evaluate.py, inference.py
def load_tokenizer(name: str, source: dict, run: dict) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder, else where its training left it, else that of `source`.

    `source` is what `from_pretrained` takes for the base model. Raises UserError where the tokenizer does not write
    conversations as the training did.
    """
    from transformers import AutoTokenizer

    of_training = run.get("settings", {}).get("tokenizer_dir", "Qwen_finetuning_tokenizer")
    places = (of_training, name) if os.path.isdir(name) else ()
    for folder in places:  # the last one counts: the model's own, where there is one
        if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
            source = {"pretrained_model_name_or_path": folder, "trust_remote_code": source["trust_remote_code"]}
    place = name if "gguf_file" in source else source["pretrained_model_name_or_path"]
    trained = run.get("chat_template", {})
    with explaining("tokenizer", place):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if not tokenizer.chat_template:
            raise UserError(f"{name}: its tokenizer has no chat template; take the model's chat (Instruct) form")
        if trained and trained | fingerprint(tokenizer) != trained:
            raise UserError(
                f"{name}: the tokenizer in {place} does not write conversations as the training did (its fingerprint "
                "differs from finetune_config.json); put the training's own tokenizer beside the model"
            )
    return tokenizer


# Same in: chat.py, evaluate.py, inference.py
def load_chat_model(name: str, load_in_4bit: bool | None, trust_remote_code: bool):
    """A model to talk to, its tokenizer, and the record of the run that made it ({} where there is none).

    `name` is an adapter or model folder, a checkpoint, a hub id or a .gguf file. An adapter comes back on its base
    model, in 4 bits where it was trained so. Raises UserError, before any weights are read where it can.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig

    folder, run, quantization = Path(name), read_run(Path(name)), None
    adapter, settings = (folder / "adapter_config.json").is_file(), run.get("settings", {})
    base = base_of(folder, run) if adapter else name
    source = {"pretrained_model_name_or_path": base, "revision": run.get("base_revision") or "main"}
    if folder.suffix == ".gguf":
        source |= {"pretrained_model_name_or_path": str(folder.parent), "gguf_file": folder.name}
        quantization = GgufConfig(dequantize=True)
    source["trust_remote_code"] = trust_remote_code
    tokenizer = load_tokenizer(name, source, run)

    if load_in_4bit is None:
        load_in_4bit = adapter and bool(settings.get("load_in_4bit"))
    with explaining("base model" if adapter else "model", base):
        # a merged model runs in the type that its merge found to keep what was trained
        device = find_device(load_in_4bit, run.get("merged", {}).get("dtype") or settings.get("dtype", "auto"))
        if device.four_bit:
            quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=device.dtype)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source,
            output_loading_info=True,
            dtype=device.dtype,
            quantization_config=quantization,
            attn_implementation=device.attention,
            device_map=device.device_map,
            use_safetensors=True,
        )
        if missing := sorted(report["missing_keys"]):  # the library fills them with random numbers and goes on
            raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer, run)
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    if adapter:
        from peft import PeftModel

        with explaining("adapter", name):
            model = PeftModel.from_pretrained(model, name)
    return model.eval(), tokenizer, run


def dequantise_for_many(model: PreTrainedModel, answers: int) -> bool:
    """Turn a 4-bit base into plain layers of the compute type, once; says whether it was done.

    The weights stay those that 4 bits can hold, and the adapter stays beside them, so the function is the trained one
    (merging would change it). Must come before the first forward: on CPUs with AVX512-BF16 that repacks the weights,
    and bitsandbytes 0.50 then dequantises them to rubbish.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if answers < MANY_ANSWERS or not getattr(base, "is_loaded_in_4bit", False):
        return False
    import psutil
    import torch

    dtype = base.get_input_embeddings().weight.dtype
    need = base.num_parameters() * dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if base.device.type == "cuda" else psutil.virtual_memory().available
    if need > 0.6 * free:  # the rest is for the cache of keys and values
        return False
    base.dequantize(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name and dtype == torch.bfloat16:  # loaded as float32; it was trained in this, so nothing is lost
            parameter.data = parameter.data.to(dtype)
    return True


# Same in: evaluate.py, merge_model.py, qwen_finetuning.py
def held_out_loss(model: PreTrainedModel, rows: list[dict], tokens_per_forward: int = 2048) -> float:
    """Mean of -log p over all supervised tokens of all rows, in nats per token; NaN without rows.

    Rows are laid end to end with their own positions, which keeps them apart where no cache is used; logits are made
    only where there is a label, so that a large vocabulary fits.
    """
    import torch
    from tqdm import tqdm

    batches, room = [], 0
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        room -= len(row["input_ids"])
        if not batches or room < 0:
            batches, room = [*batches, []], tokens_per_forward - len(row["input_ids"])
        batches[-1].append(row)
    training, total, count = model.training, 0.0, 0
    model.eval()
    for batch in tqdm(batches, desc="loss", leave=False):
        ids, labels = (torch.tensor(sum((row[key] for row in batch), [])) for key in ("input_ids", "labels"))
        positions = torch.tensor([place for row in batch for place in range(len(row["input_ids"]))])
        starts = positions == 0
        labels[starts] = -100  # nothing of its own row stands before a row's first token
        places = (labels[1:] != -100).nonzero().flatten()  # the logits at a place are for the token after it
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "logits_to_keep": places}
        # where rows begin, for layers that do not tell it from the positions
        inputs["cu_seq_lens_q"] = torch.tensor([*starts.nonzero().flatten(), len(ids)], dtype=torch.int32)
        inputs["seq_idx"] = starts.cumsum(0, dtype=torch.int32)[None] - 1
        with torch.inference_mode():
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            logits = model(**inputs, use_cache=False).logits[0].float()
            wanted = labels[places + 1].to(model.device)
            total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        count += len(places)
    model.train(training)
    return total / count if count else math.nan


def teacher_forced(model: PreTrainedModel, rows: list[dict]) -> dict:
    """`eval_loss` (nats per supervised token of all rows) and `perplexity`; None where there is no such token."""
    loss = held_out_loss(model, rows)
    return {"eval_loss": None if math.isnan(loss) else loss, "perplexity": math.exp(loss) if loss < 700 else None}


# ----------------------------------------------------------------------------------------- the answers


# Same in: chat.py, evaluate.py, inference.py
def generation_options(config: Config, prompt_length: int) -> dict:
    """The decoding settings for `generate`. The penalties count what the model writes, not the words of the prompt."""
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    sample, processors = config.temperature > 0, []
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty, prompt_length))
    if config.no_repeat_ngram_size:
        ngrams = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        processors.append(lambda input_ids, scores: ngrams(input_ids[:, prompt_length:], scores))
    # the model's own generation_config may hold any of these; what a person did not ask for is switched off
    options = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_p": None, "typical_p": None}
    if sample:
        options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return options | {"max_new_tokens": config.max_new_tokens, "do_sample": sample, "logits_processor": processors}


def generate_batch(model: PreTrainedModel, prompts: list[list[int]], config: Config) -> list[tuple[list[int], str]]:
    """(token ids, why it stopped) of the answer to each prompt: `end_of_turn`, `limit`, or `no_room` in the context."""
    import torch

    longest = max(map(len, prompts))
    room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf) - longest
    if room < 1:
        return [([], "no_room")] * len(prompts)
    ends, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    options = generation_options(config, longest) | {"max_new_tokens": min(config.max_new_tokens, room)}
    torch.manual_seed(config.seed)  # for each batch, so that an evaluation which was resumed samples the same
    with torch.inference_mode():
        output = model.generate(input_ids=input_ids, attention_mask=torch.tensor(mask, device=model.device), **options)
    answers = []
    for ids in output[:, longest:].tolist():
        end = next((place for place, id in enumerate(ids) if id in ends), None)
        answers.append((ids[:end], "limit" if end is None else "end_of_turn"))
    return answers


def json_lines(rows: Iterable[dict]) -> str:
    """Rows as text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answer_all(model, tokenizer, rows: list[dict], config: Config, earlier: dict, file: IO[str]) -> list[dict]:
    """The predictions for all rows, in their order; those that are not in `earlier` are made, and written to `file`."""
    import torch
    from tqdm import tqdm

    sides = {"": nullcontext} | ({"base_": model.disable_adapter} if config.compare_base else {})
    predictions, tokens, started = dict(earlier), 0, time.monotonic()
    # similar lengths together, so that little is padded; the longest first, so that a lack of memory shows at once
    unanswered = sorted((i for i in range(len(rows)) if i not in earlier), key=lambda i: -len(rows[i]["prompt_ids"]))
    for start in tqdm(range(0, len(unanswered), config.batch_size), desc="answers", unit="batch"):
        batch = unanswered[start : start + config.batch_size]
        made = [{"index": i} | {key: rows[i][key] for key in ("instruction", "input", "reference")} for i in batch]
        for prefix, side in sides.items():
            try:
                with side():
                    answers = generate_batch(model, [rows[i]["prompt_ids"] for i in batch], config)
            except torch.cuda.OutOfMemoryError:
                mend = "take a smaller one and pass --resume"
                raise UserError(f"out of GPU memory with --batch_size {config.batch_size}; {mend}") from None
            for row, (ids, stopped) in zip(made, answers, strict=True):
                row[prefix + "prediction"] = tokenizer.decode(ids, skip_special_tokens=True)
                row[prefix + "stopped"] = stopped
                tokens += len(ids)
        file.write(json_lines(made))
        file.flush()
        predictions |= {row["index"]: row for row in made}
    if unanswered:
        seconds = time.monotonic() - started
        say(f"{len(unanswered)} prompts answered in {seconds:.0f} s, {tokens / seconds:.1f} tokens/s")
    return [predictions[i] for i in range(len(rows))]


def earlier_predictions(path: Path, identity: dict) -> dict[int, dict]:
    """The whole predictions of an interrupted evaluation, by row index. Raises UserError if it was another one."""
    if not path.is_file():
        say(f"--resume: no unfinished evaluation in {path.parent}; starting from the beginning")
        return {}
    first, *rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]  # the last may be cut
    differing = [
        f"{key} was {first.get(key)}, is {value}" for key, value in identity.items() if first.get(key) != value
    ]
    if differing:
        raise UserError(f"--resume: {path} is of another evaluation; delete it to start anew: " + "; ".join(differing))
    say(f"resuming after {len(rows)} predictions")
    return {row["index"]: row for row in rows}


def identity_of(config: Config, rows: list[dict]) -> dict:
    """What must not change between an interrupted evaluation and its resumption."""
    decoding = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "no_repeat_ngram_size", "seed")
    texts = json.dumps([[row["digest"], row["prompt_ids"]] for row in rows])
    weights = sorted(Path(config.model).glob("*.safetensors"))
    return {name: getattr(config, name) for name in ("model", *decoding, "load_in_4bit", "compare_base")} | {
        "rows": hashlib.sha256(texts.encode()).hexdigest(),
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
    }


# ------------------------------------------------------------------------------------------ the scores


class Words:
    """A tokenizer for rouge_score: Chinese runs as jieba cuts them, the rest as rouge_score does by itself.

    Its own tokenizer alone drops every character outside a-z and 0-9, so that Chinese text scores 0.
    """

    def tokenize(self, text: str) -> list[str]:
        import jieba
        from rouge_score.tokenize import tokenize

        jieba.setLogLevel("WARNING")
        words = []
        for place, part in enumerate(HAN.split(text)):  # by turns other text and Chinese
            words += jieba.lcut(part) if place % 2 else tokenize(part, None)
        return words


def rouge_scores(predictions: list[str], references: list[str]) -> list[dict]:
    """For each pair its rouge_score scores by name (`rouge1`, `rouge2`, `rougeL`)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
    return [scorer.score(reference, answer) for reference, answer in zip(references, predictions, strict=True)]


def rouge_summary(scores: list[dict], seed: int) -> dict:
    """Mean F-measure of each kind and its 95 % bootstrap interval, as rouge_score's aggregator draws it."""
    import numpy
    from rouge_score.scoring import BootstrapAggregator

    numpy.random.seed(seed)  # the aggregator draws from numpy's global generator
    aggregator, summary = BootstrapAggregator(), {}
    for score in scores:
        aggregator.add_scores(score)
    for kind, bounds in aggregator.aggregate().items():
        summary[kind] = statistics.fmean(score[kind].fmeasure for score in scores)
        summary[kind + "_interval"] = [bounds.low.fmeasure, bounds.high.fmeasure]
    return summary


def bleu_summary(predictions: list[str], references: list[str]) -> dict:
    """Corpus BLEU (0 to 100), its 95 % bootstrap interval and sacreBLEU's signature; `zh` where a text is Chinese."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="zh" if any(map(HAN.search, references)) else "13a")
    score = metric.corpus_score(predictions, [references], n_bootstrap=1000)
    told = json.loads(score.format(width=6, signature=str(metric.get_signature()), is_json=True))
    middle, half = told.get("confidence_mean", 0.0), told.get("confidence_var", 0.0)
    return {"bleu": score.score, "bleu_interval": [middle - half, middle + half], "bleu_signature": told["signature"]}


def distinct(predictions: list[str], n: int) -> float:
    """Different n-grams of words over all n-grams of words (arXiv:1510.03055); 0 where there is none.

    >>> distinct(["a b a b"], 2)
    0.6666666666666666
    """
    texts = [Words().tokenize(text) for text in predictions]
    ngrams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def load_metrics(names: tuple[str, ...]) -> dict:
    """Metrics of the Hugging Face `evaluate` library by name, each tried on one pair. Raises UserError."""
    if not names:
        return {}
    # This file has that library's name, and Python looks in a script's own folder first; so that folder is left out
    # while the library is imported. From then on `import evaluate`, also in a metric's code, means the library.
    here, path = Path(__file__).resolve().parent, sys.path[:]
    sys.path[:] = [place for place in path if Path(place).resolve() != here]
    try:
        import evaluate
    except ImportError:
        raise UserError("--metrics needs the evaluate library: pip install evaluate") from None
    finally:
        sys.path[:] = path
    loaded = {}
    for name in names:
        with explaining("metric", name):
            loaded[Path(name).stem] = evaluate.load(name)
            loaded[Path(name).stem].compute(predictions=["a"], references=["a"])
    return loaded


def judge_answers(predictions, stops, references, tokenizer, config: Config, library: dict) -> tuple[dict, list[float]]:
    """The metrics of free generation, and for each answer the ROUGE-L that orders the report.

    `predictions`, `stops` and `references` are lists of texts of the same length; a blank prediction counts as none.
    """

    def mean_length(texts: list[str]) -> float:
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        return statistics.fmean(map(len, ids))

    predictions = [text if text.strip() else "" for text in predictions]
    length, wanted = mean_length(predictions), mean_length(references)
    values = {
        "empty_rate": statistics.fmean(not text for text in predictions),
        "stop_rate": statistics.fmean(stopped == "end_of_turn" for stopped in stops),
        "avg_pred_len_tokens": length,
        "avg_ref_len_tokens": wanted,
        "distinct-1": distinct(predictions, 1),
        "distinct-2": distinct(predictions, 2),
        "len_ratio_pred_over_ref": length / wanted if wanted else None,
    }
    scores = rouge_scores(predictions, references)
    if config.rouge:
        values |= rouge_summary(scores, config.seed)
    if config.bleu:
        values |= bleu_summary(predictions, references)
    for name, metric in library.items():
        found = metric.compute(predictions=predictions, references=references)
        values |= {key if key == name else f"{name}_{key}": value for key, value in found.items()}
    return values, [score["rougeL"].fmeasure for score in scores]


def plain(value: object) -> object:
    """`value` as JSON can hold it: numpy's numbers and arrays as Python's, what is no finite number as None.

    >>> plain({"a": float("nan"), "b": (1, 2.5)})
    {'a': None, 'b': [1, 2.5]}
    """
    text = json.dumps(value, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other))
    return json.loads(text, parse_constant=lambda name: None)  # NaN, Infinity, -Infinity


# ------------------------------------------------------------------------------------------ the report


def table(sides: dict[str, dict]) -> list[list[str]]:
    """The scores of each side (`model`, and `base` where compared) as rows of text, a heading first."""

    def shown(scores: dict, name: str) -> str:
        value, interval = scores.get(name), scores.get(f"{name}_interval")
        text = f"{value:.4g}" if isinstance(value, (int, float)) else "none"
        return text + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")

    names = [name for name, value in sides["model"].items() if value is None or isinstance(value, (int, float))]
    return [["", *sides]] + [[name, *(shown(scores, name) for scores in sides.values())] for name in names]


def histogram(lengths: list[int], max_seq_length: int) -> str:
    """An SVG picture of how many samples have how many tokens; a line shows where some are cut."""
    width = max(lengths) // 30 + 1  # tokens a bar, for 30 bars of 20 pixels
    counts = Counter(length // width for length in lengths)
    tallest = max(counts.values())
    bars = "".join(
        f'<rect x="{20 * place}" y="{110 - 100 * count / tallest:.1f}" width="18" height="{100 * count / tallest:.1f}">'
        f"<title>{place * width} to {(place + 1) * width - 1}: {count}</title></rect>"
        for place, count in sorted(counts.items())
    )
    at = 20 * max_seq_length / width
    cut = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="110" stroke="red"/>' if max_seq_length < max(lengths) else ""
    return (
        f'<svg viewBox="0 0 600 130" width="600" role="img" fill="steelblue">{bars}{cut}<text y="126" font-size="12">0'
        f'</text><text x="600" y="126" font-size="12" text-anchor="end">{30 * width} tokens</text></svg>'
    )


def report(title: str, sides: dict[str, dict], lengths: list[int], max_seq_length: int, predictions: list[dict]) -> str:
    """One HTML page that needs nothing else. Text of models and data is escaped; scripts and requests are barred."""

    def line(cells: list[str], kind: str = "td") -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(printable(cell))}</{kind}>" for cell in cells) + "</tr>\n"

    answers = ["prediction"] + ["base_prediction"] * ("base" in sides)
    rows = line(["score", "prompt", "reference", *answers], "th")
    for row in sorted(predictions, key=lambda row: row["score"]):
        prompt = f"{row['instruction']}\n{row['input']}".strip()
        rows += line([f"{row['score']:.2f}", prompt, row["reference"], *(row[key] for key in answers)])
    return f"""<!DOCTYPE html>
<html><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; margin-bottom: 2em; }}
td, th {{ border: 1px solid #ccc; padding: 0.3em 0.6em; text-align: left; vertical-align: top; }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<table>{"".join(line(cells) for cells in table(sides))}</table>
<h2>Length of the samples</h2>
{histogram(lengths, max_seq_length)}
<h2>Answers, lowest score (ROUGE-L) first</h2>
<table>{rows}</table>
</body></html>
"""


# ------------------------------------------------------------------------------------------- the run


def path_faults(config: Config, run: dict) -> list[str]:
    """What is wrong with the files that the settings name, one line each."""
    faults, unfinished = list(filter(None, [model_fault(config.model)])), config.output_dir / UNFINISHED
    source = config.dataset_path or run.get("dataset", {}).get("path") or DATASET
    file_name = source.endswith((".json", ".jsonl"))
    if os.path.isfile(source) and not file_name:
        faults.append(f"{source}: a dataset file ends in .jsonl or .json")
    elif not os.path.exists(source) and (file_name or source.count("/") != 1):
        faults.append(f"{source}: no such dataset. Pass --dataset_path with records to judge by")
    if config.compare_base and not (Path(config.model) / "adapter_config.json").is_file():
        faults.append(f"--compare_base switches an adapter off; {config.model} is none")
    if not config.resume and unfinished.is_file() and unfinished.read_bytes().count(b"\n") > 1:
        faults.append(f"{unfinished} holds an unfinished evaluation: pass --resume to go on with it, or delete it")
    return faults


def write_results(config: Config, dataset: dict, sides: dict, lengths: list[int], predictions: list[dict]) -> None:
    """Write metrics.json, predictions.jsonl and report.html, and print the scores; `lengths` are sorted, in tokens."""
    p95 = lengths[math.ceil(0.95 * len(lengths)) - 1]
    metrics = {
        "model": config.model,
        "dataset": dataset | {"evaluated": len(predictions)},
        "max_seq_length": config.max_seq_length,
        "length": {"min": lengths[0], "median": statistics.median(lengths), "p95": p95, "max": lengths[-1]},
        "truncation_rate": statistics.fmean(length > config.max_seq_length for length in lengths),
        **sides["model"],
    }
    if "base" in sides:
        metrics["base"] = sides["base"]
    with replacing(config.output_dir / "predictions.jsonl") as file:
        file.write(json_lines(predictions))
    with replacing(config.output_dir / "report.html") as file:
        file.write(report(f"Evaluation of {config.model}", sides, lengths, config.max_seq_length, predictions))
    write_json(config.output_dir / "metrics.json", metrics)
    for cells in table(sides):
        print("".join(f"{cell:<26}" for cell in cells).rstrip())
    say(f"written: metrics.json, predictions.jsonl and report.html in {config.output_dir}")


def main(config: Config) -> None:
    run = read_run(Path(config.model))
    if faults := path_faults(config, run):
        raise UserError("\n".join(faults))
    quiet_libraries()
    rows, dataset = rows_to_judge(config, run)
    library = load_metrics(config.metrics)
    model, tokenizer, _ = load_chat_model(config.model, config.load_in_4bit, config.trust_remote_code)
    config.max_seq_length = config.max_seq_length or run.get("max_seq_length") or 2048
    rows = encode_rows(rows, tokenizer, config.max_seq_length, config.skip_bad_rows)
    plain_base = dequantise_for_many(model, len(rows) * (1 + config.compare_base))
    say(f"{len(rows)} rows of {dataset['path']}, {model.device.type}" + ", 4-bit base made plain once" * plain_base)

    unfinished, identity = config.output_dir / UNFINISHED, identity_of(config, rows)
    earlier = earlier_predictions(unfinished, identity) if config.resume else {}
    try:
        with replacing(unfinished) as file:  # anew, since the last line of an interrupted one may be cut
            file.write(json_lines([identity, *earlier.values()]))
    except OSError as error:
        raise UserError(f"--output_dir {config.output_dir} can not be written: {error}") from None

    sides = {"model": teacher_forced(model, rows)}
    if config.compare_base:
        with model.disable_adapter():
            sides["base"] = teacher_forced(model, rows)
    with open(unfinished, "a", encoding="utf-8", newline="\n") as file:
        predictions = answer_all(model, tokenizer, rows, config, earlier, file)

    references = [row["reference"] for row in rows]
    for side, prefix in zip(sides, ("", "base_"), strict=False):
        answers, stops = ([row[prefix + key] for row in predictions] for key in ("prediction", "stopped"))
        scores, order = judge_answers(answers, stops, references, tokenizer, config, library)
        sides[side] |= scores
        for row, score in zip(predictions, order, strict=True):
            row[prefix + "score"] = score
    write_results(config, dataset, plain(sides), sorted(row["tokens"] for row in rows), predictions)
    unfinished.unlink()


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
