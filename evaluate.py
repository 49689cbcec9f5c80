"""Judge a model on the rows that training held out: loss, free answers with scores, and a report to read.

    python evaluate.py --rouge --bleu --compare_base
    python evaluate.py --model models/merged --dataset_path test.jsonl --eval_ratio 1

Reads   --model, whose finetune_config.json names the held-out rows; or --dataset_path without trained rows
Writes  evaluation_results/metrics.json       {"eval_loss": 0.445, "perplexity": 1.56, "stop_rate": 1.0, ...}
        evaluation_results/predictions.jsonl  {"prompt": "解释LoRA", "prediction": "…", "score": 0.57, ...}
        evaluation_results/report.html        the same to read by eye, lowest score first

The loss is teacher-forced: on stored rows over the tokens that training supervised, on others over the last
answer. Free, greedy answers stand in for a conversation's last one; <think>…</think> is kept and not scored.
"""

import hashlib
import json
import logging
import math
import os
import re
import sys
import unicodedata
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from difflib import SequenceMatcher
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

# Runs of Chinese; and what else stands without spaces: kana, Thai, Lao, Tibetan, Burmese, Khmer, emoji.
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
ALONE = re.compile("[\u3040-\u30ff\u0e00-\u109f\u1780-\u17ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could steer a terminal; unlike line breaks and tabs
NO_ANSWER = "the assistant says nothing"
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "tool": "tool"}
ROLES |= {"observation": "tool", "function": "tool", "function_call": "call", "tool_call": "call"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
NOT_READ = ("image", "images", "audio", "audios", "video", "videos", "chosen", "rejected")
REPORT = """<!DOCTYPE html><meta charset="utf-8"><title>{{ title }}</title>
<style>td { border: 1px solid #ccc; padding: 0.4em; vertical-align: top; white-space: pre-wrap }</style>
<h1>{{ title }}</h1><pre>{{ scores }}</pre><table>
{% for row in answers %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>"""


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class Config:
    model: str = setting("Qwen_finetuning_model", "adapter folder, model folder or hub id")
    dataset_path: str = setting("", "a .jsonl or .json file, in place of the rows that training held out")
    output_dir: Path = setting(Path("evaluation_results"), "where the results go")
    eval_ratio: float = setting(0.1, "share of the rows to take where training stored none; 1: all")
    seed: int = setting(42, "which rows that are, as in training")
    limit: int = setting(None, "judge by this many rows at most; None: all", type=int)
    skip_bad_rows: bool = setting(False, "leave out rows that can not be used, instead of stopping")
    max_seq_length: int = setting(2048, "cut longer rows for the loss; stored rows are as training cut them")
    rouge: bool = setting(False, "ROUGE-1, ROUGE-2 and ROUGE-L, with 95 % intervals")
    bleu: bool = setting(False, "BLEU, with a 95 % interval")
    metrics: tuple = setting((), "the evaluate library's; runs their code", nargs="+", type=str)
    compare_base: bool = setting(False, "the same with the adapter switched off, side by side")
    batch_size: int = setting(32, "prompts that are answered together")
    max_new_tokens: int = setting(512, "longest answer in tokens")
    resume: bool = setting(False, "go on with an evaluation that was killed")

    def __post_init__(self) -> None:
        for name in ("limit", "max_seq_length", "batch_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be 1 or more")
        if not 0 < self.eval_ratio <= 1:
            raise ValueError(f"--eval_ratio is {self.eval_ratio}; it is a share, above 0 and up to 1")


# Same in: chat.py, data_integration.py, data_set_generation.py, evaluate.py, inference.py, merge_model.py
def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line; an unknown or shortened flag is an error (exit 2)."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return Config(**vars(cli.parse_args(argv)))


def main(config: Config) -> None:
    if config.compare_base and not Path(config.model, "adapter_config.json").is_file():
        raise ValueError(f"--compare_base switches an adapter off; {config.model} is none")
    library = library_metrics(config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    file = config.output_dir / "predictions.unfinished.jsonl"
    if file.is_file() and not config.resume:
        raise ValueError(f"{file} is of an evaluation that was killed: pass --resume, or delete it")
    rows, source = rows_to_judge(config)
    model, tokenizer = load_model(config.model)
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    model.generation_config = type(model.generation_config)(eos_token_id=ends)  # greedy, without penalties
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    limit = min(config.max_seq_length, positions)
    rows = usable(rows, partial(with_ids, tokenizer, ends, limit), config.skip_bad_rows)
    sides, predictions = {}, [{"prompt": row["prompt"], "reference": row["reference"]} for row in rows]
    for side, prefix in [("model", ""), ("base", "base_")][: 1 + config.compare_base]:
        if side == "base":
            model.base_model.disable_adapter_layers()
        loss = mean_loss(model, [example for row in rows for example in row["examples"]])
        answers = answer_all(model, tokenizer, [row["prompt_ids"] for row in rows], side, file, config)
        values, scores = judge(answers, predictions, tokenizer, config, library)
        sides[side] = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700))} | values
        for row, (text, stopped), score in zip(predictions, answers, scores, strict=True):
            row |= {f"{prefix}prediction": text, f"{prefix}stopped": stopped, f"{prefix}score": score}
    write_results(config, source, sides, rows, predictions)
    file.unlink()


def library_metrics(config: Config) -> dict:
    """--metrics by name. Raises ImportError, before hours of answers, where a score's library is missing."""
    for name in ["jieba", "rouge_score"] * config.rouge + ["sacrebleu"] * config.bleu:
        import_module(name)
    here = Path(__file__).resolve().parent  # this file has the name of the library, and would be found first
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    return {Path(name).stem: import_module("evaluate").load(name) for name in config.metrics}


def rows_to_judge(config: Config) -> tuple[list[dict], dict]:
    """(rows of `read_rows`, facts about their file): those that training stored, or others that it left."""
    from datasets import Dataset

    record = Path(config.model, "finetune_config.json")
    run = json.loads(record.read_bytes()) if record.is_file() else {}
    trained = run.get("dataset", {}).get("path", "")
    source = config.dataset_path or trained
    own = Path(source).resolve() == Path(trained).resolve()  # the file that was trained on
    stored, listed = (Path(run.get(name) or os.devnull) for name in ("held_out", "trained_on"))
    sha256 = hashlib.sha256(stored.read_bytes()).hexdigest() if stored.is_file() else ""
    if sha256 and sha256 != run.get("held_out_sha256", sha256):  # a later run wrote both files
        if own:
            raise ValueError(f"{stored} is of another run than {config.model}: pass a --dataset_path")
        listed = Path(os.devnull)
    if own and stored.is_file():
        rows = chosen = read_rows(str(stored), config.skip_bad_rows)
        facts, told = {"path": str(stored)}, "as training stored them, whatever --eval_ratio and --seed say"
    else:
        used = set(listed.read_text(encoding="utf-8").split()) if listed.is_file() else set()
        rows = read_rows(source, config.skip_bad_rows)  # whose ids, if any, may be another tokenizer's
        rows = {text: row | {"examples": []} for text, row in rows.items()}
        chosen = [text for text in rows if hashlib.sha256(text.encode()).hexdigest()[:16] not in used]
        facts = {"path": source, "rows": len(rows), "trained_on": len(rows) - len(chosen)}
        if chosen and config.eval_ratio != 1 and not (own and used):
            split = Dataset.from_dict({"text": chosen}).train_test_split(config.eval_ratio, seed=config.seed)
            chosen = split["test"]["text"]
        told = f"{facts['trained_on']} trained on are left out" if used else "no list of those trained on"
    print(f"{len(chosen)} of {len(rows)} rows of {facts['path']}: {told}", file=sys.stderr)
    if not chosen:
        raise ValueError("no row is left to judge by; pass another --dataset_path")
    return [rows[text] for text in chosen][: config.limit], facts


def read_rows(path: str, skip: bool) -> dict[str, dict]:
    """Rows of a file by their messages and tools as JSON text, of which training keeps digests."""
    if not path.lower().endswith((".jsonl", ".json")):
        raise ValueError(f"rows to judge by: {path!r} is no .jsonl or .json file; pass a --dataset_path")
    text, rows = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape"), {}
    sign, records = ":", [from_json(line) if line.strip() else ... for line in text.split("\n")]
    if path.lower().endswith(".json") and text.lstrip().startswith("["):
        sign, records = ", row ", from_json(text)
        if isinstance(records, str):  # nobody knows how many rows were lost
            raise ValueError(f"{path}: {records}")
    lines = [{"where": f"{path}{sign}{n}", "record": r} for n, r in enumerate(records, 1) if r is not ...]
    for row in usable(lines, row_of, skip):
        rows.setdefault(row["text"], row | {"examples": []})["examples"] += row["examples"]
    return rows


def usable(rows: list[dict], convert, skip: bool) -> list[dict]:
    """Each row with what `convert` finds in it. Raises ValueError naming ten bad ones, unless `skip`."""
    good, bad = [], []
    for row in rows:
        try:
            good.append(row | convert(row))
        except Exception as error:  # a record may be of any form, and a chat template may refuse it
            bad.append(f"\n  {row['where']}: {error}")
    wrong = f"{len(bad)} of {len(rows)} rows can not be used{''.join(bad[:10])}"
    if bad and not (skip and good):
        raise ValueError(f"{wrong}\nmend them or pass --skip_bad_rows")
    if bad:
        print(wrong, file=sys.stderr)
    return good


def row_of(line: dict) -> dict:
    """A record as training writes it (`text`), its `messages` up to the last answer, `tools`, `examples`."""
    record, (messages, tools) = line["record"], messages_of(line["record"])
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
    if not answers:
        raise ValueError(NO_ANSWER)
    text = json.dumps([messages, tools], ensure_ascii=False)
    stored = [{key: record[key] for key in ("input_ids", "labels")}] if "input_ids" in record else []
    return {"text": text, "messages": messages[: answers[-1] + 1], "tools": tools, "examples": stored}


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


# Same in: evaluate.py, qwen_finetuning.py
def messages_of(record: dict | str) -> tuple[list[dict], list[dict]]:
    """A record of any shape as (chat messages, tools). Raises ValueError that says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object: {str(record)[:200]}")
    if not (turns := objects(record, "messages", "conversations")):
        parts = text_of(record, "instruction", "prompt"), text_of(record, "input", "context")
        last = ["\n补充信息：".join(filter(None, parts)), text_of(record, "output", "response", "completion")]
        if not any(last):
            raise ValueError(f"unknown shape with keys {sorted(map(str, record))}")
        for pair in [*objects(record, "history", kind=list), last]:
            if len(pair) != 2:
                raise ValueError("history is no list of pairs, question and answer")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    whole = [key for key in ("weight", "train", "loss", "label") if record.get(key) in (0,)]  # 0 or false
    if unread := whole + [key for item in (record, *turns) for key in NOT_READ if item.get(key)]:
        raise ValueError(f"{unread[0]!r} holds what can not be trained on here")
    messages = [message_of(turn) for turn in turns]
    told = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    system = text_of({"system": record.get("system"), "a system message": told}, "system", "a system message")
    roles = [message["role"] for message in messages]
    if roles[:1] != ["user"] or "assistant" not in roles or "system" in roles:
        raise ValueError(f"roles are {roles}; expected user first, an assistant, system at the start alone")
    tools = [tool.get("function", tool) for tool in objects(record, "tools", "functions")]
    conversation = [{"role": "system", "content": system}] * bool(system) + messages
    json.dumps([conversation, tools], ensure_ascii=False).encode()  # half a character is a ValueError
    return conversation, [{"type": "function", "function": tool} for tool in tools]


# Same in: evaluate.py, qwen_finetuning.py
def message_of(turn: dict) -> dict:
    """A turn as role and content; an assistant's may have tool_calls, reasoning_content, weight 0."""
    name, weight = either(turn, "role", "from"), either(turn, "weight", "train", "loss")
    role = ROLES.get(str(name).lower())
    if role is None or weight not in ("", 0, 1):
        raise ValueError(f"role {name!r} or weight {weight!r} is none of {', '.join(ROLES)}; 0, 1")
    called = role == "call"  # ShareGPT: the text of the turn is the call
    role, keys = ("assistant", ("content", "value")) if called else (role, ("tool_calls", "function_call"))
    message = {"role": role, "content": "" if called else text_of(turn, "content", "value")}
    more = {"tool_calls": [call_of(call) for call in objects(turn, *keys)]}
    more |= {"reasoning_content": text_of(turn, "reasoning_content", "reasoning", "thinking")}
    more |= {"name": turn.get("name"), "tool_call_id": turn.get("tool_call_id")}
    if role in ("user", "assistant") and not (message["content"] or more["tool_calls"]):
        raise ValueError(NO_ANSWER if role == "assistant" else "the user says nothing")
    message |= {key: value for key, value in more.items() if value}
    return message | ({"weight": 0} if weight == 0 and role == "assistant" else {})


# Same in: evaluate.py, qwen_finetuning.py
def call_of(call: dict) -> dict:
    """A tool call in OpenAI's form, with its arguments as an object."""
    function = (objects(call, "function") or [call])[0]
    if not (name := text_of(function, "name")):
        raise ValueError("a tool call has no name")
    function = {"name": name, "arguments": (objects(function, "arguments", "parameters") or [{}])[0]}
    return {"type": "function", "function": function} | ({"id": call["id"]} if call.get("id") else {})


# Same in: evaluate.py, qwen_finetuning.py
def either(item: dict, *names: str):
    """The value of that key of `names` that says something, or "". ValueError where two differ."""
    said = [value for name in names if (value := item.get(name)) not in (None, [], {}) and str(value).strip()]
    if any(value != said[0] for value in said):
        raise ValueError(f"{' and '.join(names)} say different things")
    return said[0] if said else ""


# Same in: evaluate.py, qwen_finetuning.py
def text_of(item: dict, *names: str) -> str:
    """`either` as text; a list of text parts is joined. ValueError for anything else."""
    value = either(item, *names)
    try:
        return value if isinstance(value, str) else "".join(part["text"] for part in value)
    except (TypeError, KeyError):
        raise ValueError(f"{'/'.join(names)} is no text, nor a list of text parts: {value!r:.80}") from None


# Same in: evaluate.py, qwen_finetuning.py
def objects(item: dict, *names: str, kind: type = dict) -> list:
    """`either` as a list of objects; one may stand alone, and all may be JSON text (in tables, ShareGPT)."""
    value = either(item, *names) or []
    value = from_json(value) if isinstance(value, str) else value
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(part, kind) for part in value):
        raise ValueError(f"{names[0]} is of no known form: {str(value)[:80]}")
    return list(value)


# Same in: chat.py, evaluate.py, inference.py
def load_model(name: str):
    """(model, tokenizer) of an adapter folder, a model folder or a hub id. An adapter comes on its base, in 4
    bits where the training had it so: it learnt to correct those weights."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its notes come with its import
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("error", message="Found missing adapter keys")  # half an adapter is none
    cpu = torch.cpu.get_capabilities()
    dtype = torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32
    if torch.cuda.is_available():
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    options, run, source = {"dtype": dtype, "device_map": "auto", "use_safetensors": True}, {}, name
    if adapter := Path(name, "adapter_config.json").is_file():
        own, record = peft.PeftConfig.from_pretrained(name), Path(name, "finetune_config.json")
        source, options["revision"] = own.base_model_name_or_path, own.revision
        run = json.loads(record.read_text(encoding="utf-8")).get("settings", {}) if record.is_file() else {}
    if run.get("load_in_4bit"):
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    if adapter:  # by PEFT, in the types that are stored: transformers 5.23 loses DoRA's magnitudes
        model = peft.PeftModel.from_pretrained(model, name, autocast_adapter_dtype=False)
    for module in model.modules() if run.get("use_dora") else []:
        module.support_avx512bf16_for_cpu = False  # else bitsandbytes repacks weights, which DoRA reads
    if Path(name, "generation_config.json").is_file():  # an adapter's own is not loaded by itself
        model.generation_config = transformers.GenerationConfig.from_pretrained(name)
    words = name if Path(name, "tokenizer_config.json").is_file() else model.name_or_path
    return model, transformers.AutoTokenizer.from_pretrained(words)


def with_ids(tokenizer, ends: list[int], limit: int, row: dict) -> dict:
    """What a row is judged by; where no example is stored, it is the last answer's, cut at `limit`."""
    *turns, last = row["messages"]
    options = {"tools": row["tools"] or None, "sanitize_control_tokens": True, "return_dict": False}
    chat = partial(tokenizer.apply_chat_template, **options)
    prompt_ids = chat(turns, add_generation_prompt=True)
    ids = chat([*turns, last | {"content": last["content"].lstrip()}])  # as in training
    start = len(os.path.commonprefix([prompt_ids, ids]))
    if start < len(prompt_ids) and start < len(os.path.commonprefix([prompt_ids, chat(turns)])):
        raise ValueError("the chat template writes earlier turns otherwise once this answer follows")
    end = next((i for i in range(start, len(ids)) if ids[i] in ends), None)
    if end is None:  # as in training, where a template writes no end
        while not tokenizer.decode(ids[-1]).strip():
            ids.pop()
        end, ids = len(ids), [*ids, tokenizer.eos_token_id]
    end += 1
    labels = [-100] * start + ids[start:end] + [-100] * (len(ids) - end)
    examples = row["examples"] or [{"input_ids": ids[:limit], "labels": labels[:limit]}]
    # a whole example ends with the end of a turn, and white space perhaps
    cut = any(set(ends).isdisjoint(example["input_ids"][-2:]) for example in examples)
    talk = [f"{turn['role']}: {turn['content']}" for turn in turns if turn["role"] != "system"]
    texts = {"reference": answer_of(tokenizer.decode(ids[start:end], skip_special_tokens=True))}
    texts["prompt"] = "\n".join(talk) if len(talk) > 1 else turns[-1]["content"]
    return texts | {"prompt_ids": prompt_ids, "examples": examples, "cut": cut}


def mean_loss(model, examples: list[dict]) -> float:
    """Sum of -log p over all supervised tokens / their number, in nats."""
    import torch
    from tqdm import tqdm

    total, count = 0.0, 0
    for example in tqdm(examples, desc="loss", disable=None, leave=False):
        ids, labels = (torch.tensor(example[key], device=model.device) for key in ("input_ids", "labels"))
        places = (labels[1:] != -100).nonzero().flatten()  # the logits at a place are for the token after it
        first = int(places[0]) if len(places) else len(ids) - 1
        with torch.inference_mode():
            logits = model(ids[None], logits_to_keep=len(ids) - first, use_cache=False).logits[0]
            logits = logits[places - first].float()
            total += torch.nn.functional.cross_entropy(logits, labels[places + 1], reduction="sum").item()
        count += len(places)
    return total / count if count else math.nan


def answer_all(model, tokenizer, prompts: list, side: str, file: Path, config: Config) -> list[list]:
    """[text, why it stopped] for each prompt (token ids); `file` keeps them, and gives earlier ones."""
    from tqdm import tqdm

    file.touch()
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # a kill may have cut the last line
    done = {asked: answer for asked, *answer in map(json.loads, file.read_bytes().splitlines())}
    # an answer's key is all that it depends on: what was answered under other settings does not count
    weights = [path.stat().st_mtime_ns for path in sorted(Path(config.model).glob("*.safetensors"))]
    keys = [json.dumps([side, config.model, weights, config.max_new_tokens, ids]) for ids in prompts]
    order = [i for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if keys[i] not in done]
    if config.resume:
        print(f"{len(prompts) - len(order)} answers of the {side} are there already", file=sys.stderr)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = [min(config.max_new_tokens, positions - len(ids)) for ids in prompts]
    # the longest come first; those with less room than an answer may take alone, at every --batch_size
    batches = [[i] for i in order if room[i] < config.max_new_tokens]
    batches += [order[n : n + config.batch_size] for n in range(len(batches), len(order), config.batch_size)]
    with open(file, "a", encoding="utf-8", buffering=1) as log:  # each line at once
        for batch in tqdm(batches, desc=f"answers of the {side}", unit="batch", disable=None):
            made = generate(model, [prompts[i] for i in batch], room[batch[0]])
            for i, (ids, stopped) in zip(batch, made, strict=True):
                opened = "<think>" * tokenizer.decode(prompts[i][-9:]).rstrip().endswith("<think>")
                done[keys[i]] = [opened + tokenizer.decode(ids, skip_special_tokens=True), stopped]
                log.write(json.dumps([keys[i], *done[keys[i]]], ensure_ascii=False) + "\n")
    return [done[key] for key in keys]


def generate(model, prompts: list[list[int]], room: int) -> list[tuple[list[int], str]]:
    """(token ids, why it stopped: `end_of_turn`, `limit`, `no_room`) of the greedy answer to each prompt."""
    import torch

    if room < 1:
        return [([], "no_room")] * len(prompts)
    ids = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(ids, True, -1, padding_side="left")
    try:
        output = model.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(), max_new_tokens=room)
    except torch.OutOfMemoryError:
        raise ValueError("out of memory: take a smaller --batch_size, and go on by --resume") from None
    ends, answers = model.generation_config.eos_token_id, []
    for new in output[:, ids.shape[1] :].tolist():
        stop = next((place for place, id in enumerate(new) if id in ends), None)
        answers.append((new[:stop], "limit" if stop is None else "end_of_turn"))
    return answers


def judge(answers, rows: list[dict], tokenizer, config: Config, library: dict) -> tuple[dict, list[float]]:
    """Metrics of the answers, and a score of each: ROUGE-L with --rouge, else the share of common words."""
    texts, references = [answer_of(text) for text, _ in answers], [row["reference"] for row in rows]
    lengths = [fmean(map(len, tokenizer(t, add_special_tokens=False).input_ids)) for t in (texts, references)]
    values = {"empty_rate": fmean(not text for text in texts)}
    values["stop_rate"] = fmean(stopped == "end_of_turn" for _, stopped in answers)
    values |= {"avg_pred_len_tokens": lengths[0], "avg_ref_len_tokens": lengths[1]}
    values["len_ratio_pred_over_ref"] = lengths[0] / lengths[1] if lengths[1] else None
    for n in (1, 2):  # different runs of n words over all of them (arXiv:1510.03055)
        runs = [tuple(found[i : i + n]) for found in map(words, texts) for i in range(len(found) - n + 1)]
        values[f"distinct-{n}"] = len(set(runs)) / max(len(runs), 1)
    pairs = zip(map(words, texts), map(words, references), strict=True)
    scores = [SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs]
    if config.rouge:
        found, scores = rouge(texts, references)
        values |= found
    if config.bleu:
        from sacrebleu.metrics import BLEU

        metric = BLEU(tokenize="zh" if any(map(HAN.search, references)) else "13a", effective_order=True)
        spaced = [[ALONE.sub(r" \g<0> ", text) for text in side] for side in (texts, references)]
        score = metric.corpus_score(spaced[0], spaced[1:], n_bootstrap=1000)
        interval = [max(0.0, score._mean - score._ci), min(100.0, score._mean + score._ci)]
        values |= {"bleu": score.score, "bleu_interval": interval}
        values["bleu_signature"] = str(metric.get_signature())
    for name, metric in library.items():
        for key, value in metric.compute(predictions=texts, references=references).items():
            values[key if key == name and key not in values else f"{name}_{key}"] = value
    return values, scores


def answer_of(text: str) -> str:
    """What a person is told: `text` without thoughts. A thought that never ends is no answer."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).rpartition("</think>")[2].strip()


def words(text: str, cut=list) -> list[str]:
    """The words of a text in small letters, of "?!" its characters; `cut` divides runs of Chinese."""
    spaced = HAN.sub(lambda run: f" {' '.join(cut(run[0]))} ", unicodedata.normalize("NFC", text.lower()))
    spaced = ALONE.sub(r" \g<0> ", spaced)
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or ALONE.match(c) else " " for c in spaced)
    return kept.split() or list("".join(text.split()))


def rouge(texts: list[str], references: list[str]) -> tuple[dict, list[float]]:
    """Mean F-measures with 95 % bootstrap intervals, and the ROUGE-L of each text."""
    import jieba
    import numpy
    from rouge_score.rouge_scorer import RougeScorer

    jieba.setLogLevel("WARNING")
    tokenizer = SimpleNamespace(tokenize=partial(words, cut=jieba.lcut))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer)
    scores, values, chance = list(map(scorer.score, references, texts)), {}, numpy.random.RandomState(0)
    for kind in scorer.rouge_types:
        found = numpy.array([score[kind].fmeasure for score in scores])
        means = found[chance.randint(len(found), size=(1000, len(found)))].mean(axis=1)
        values |= {kind: found.mean(), f"{kind}_interval": numpy.percentile(means, [2.5, 97.5]).tolist()}
    return values, found.tolist()  # ROUGE-L came last


def write_results(config: Config, source: dict, sides: dict, rows: list, predictions: list[dict]) -> None:
    """Write metrics.json, predictions.jsonl and report.html; print the scores."""
    from jinja2 import Environment

    sizes = sorted(len(example["input_ids"]) for row in rows for example in row["examples"])
    p95 = sizes[math.ceil(0.95 * len(sizes)) - 1]
    length = {"min": sizes[0], "median": median(sizes), "p95": p95, "max": sizes[-1]}
    sides["model"] = {"length": length, "truncation_rate": fmean(row["cut"] for row in rows)} | sides["model"]
    text = json.dumps(sides, default=lambda number: number.tolist())  # a metric may give numpy's numbers
    sides = json.loads(text, parse_constant=lambda name: None)  # or NaN, which is no JSON
    table, names = [["", *sides]], [name for name in sides["model"] if name != "bleu_signature"]
    table += [[name, *(side.get(name, "") for side in sides.values())] for name in names]
    scores = "\n".join("".join(f"{shown(cell):<27} " for cell in row).rstrip() for row in table)
    columns = ["score", "prompt", "reference", "prediction"] + ["base_prediction"] * config.compare_base
    answers = [columns, *sorted([row[name] for name in columns] for row in predictions)]
    page = Environment(autoescape=True, finalize=shown).from_string(REPORT)
    page = page.render(title=f"Evaluation of {config.model}", scores=scores, answers=answers)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    print(scores, f"Perplexity: {shown(sides['model']['perplexity'])}", sep="\n")
    if config.bleu:
        print(f"BLEU: {shown(sides['model']['bleu'])}")
    facts = {"model": config.model, "dataset": source | {"evaluated": len(rows)}} | sides.pop("model") | sides
    text = json.dumps(facts, ensure_ascii=False, indent=2)
    for name, content in {"report.html": page, "predictions.jsonl": lines, "metrics.json": text}.items():
        beside = Path(config.output_dir, name + ".partial")  # so that none is ever half written
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, Path(config.output_dir, name))


def shown(value: object) -> str:
    """A value as text for a person, without control characters."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return CONTROL.sub("\ufffd", text)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (ImportError, OSError, ValueError, UserWarning) as error:  # a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
