"""Judge a model on the rows that training held out: loss, free answers with scores, and a report to read.

    python evaluate.py --rouge --bleu --compare_base
    python evaluate.py --model models/merged --dataset_path test.jsonl --eval_ratio 1
    python evaluate.py --rouge --resume            # goes on with an evaluation that was killed

Reads   --model: adapter folder, model folder or hub id; finetune_config.json there names the held-out rows
        --dataset_path: .jsonl or .json, a row as in training; those that it was trained on are left out
Writes  evaluation_results/metrics.json       {"eval_loss": 0.445, "perplexity": 1.56, "stop_rate": 1.0, ...}
        evaluation_results/predictions.jsonl  {"prompt": "解释LoRA", "prediction": "…", "score": 0.57, ...}
        evaluation_results/report.html        the same to read by eye, lowest score first

The loss is teacher-forced: on stored rows over the tokens that training supervised, on others over the last
answer. Free, greedy answers stand in for a conversation's last one; <think>…</think> is kept and not scored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

# Runs of Chinese; and what else stands without spaces: kana, Thai, Lao, Tibetan, Burmese, Khmer, emoji.
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
ALONE = re.compile("[\u3040-\u30ff\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2600-\u27bf\U0001f000-\U0001faff]")
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool", "user": "user"}
SPEAKERS |= {"assistant": "assistant", "system": "system", "tool": "tool"}
KEPT = ("tool_calls", "reasoning_content", "name", "tool_call_id", "weight")  # of a turn, as in training
NOT_JUDGED = {"history", "train", "loss", "function_call", "reasoning", "image", "images", "audio", "video"}
REPORT = """<!DOCTYPE html><meta charset="utf-8"><title>{{ title }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>td { border: 1px solid #ccc; padding: 0.4em; vertical-align: top; white-space: pre-wrap }</style>
<h1>{{ title }}</h1>
{% for heading, rows in tables.items() %}<h2>{{ heading }}</h2><table>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}"""


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    shown = " ".join(default) if isinstance(default, tuple) else default
    help = f"{help} (default: {shown})".replace("%", "%%")
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


# Same in: all nine scripts
def parser_of(config_class: type) -> argparse.ArgumentParser:
    """A parser with one flag a field of the dataclass; an unknown or shortened flag is an error (exit 2)."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    for f in fields(config_class):
        yes_no = {"action": argparse.BooleanOptionalAction}  # --flag and --no-flag
        options = yes_no if type(f.default) is bool else {"type": type(f.default)}
        parser.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return parser


def parse_args(argv: list[str] | None = None) -> Config:
    return Config(**vars(parser_of(Config).parse_args(argv)))


def main(config: Config) -> None:
    if config.compare_base and not Path(config.model, "adapter_config.json").is_file():
        raise ValueError(f"--compare_base switches an adapter off; {config.model} is none")
    needed = ["jieba", "rouge_score"] * config.rouge + ["sacrebleu"] * config.bleu
    if missing := [name for name in needed if not find_spec(name)]:
        raise ValueError(f"--rouge or --bleu needs what is not here: pip install {' '.join(missing)}")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    file = config.output_dir / "predictions.unfinished.jsonl"
    done = earlier_answers(file, config.resume)
    rows, source = rows_to_judge(config)
    library = library_metrics(config.metrics)
    model, tokenizer = load_model(config.model)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = usable(rows, partial(with_ids, tokenizer, ends, config.max_seq_length), config.skip_bad_rows)
    sides, predictions = {}, [{"prompt": row["prompt"], "reference": row["reference"]} for row in rows]
    for side, prefix in (("model", ""), ("base", "base_"))[: 1 + config.compare_base]:
        if side == "base":
            model.disable_adapters()  # the base comes last: enable_adapters forgets modules_to_save
        loss = mean_loss(model, [example for row in rows for example in row["examples"]])
        answers = answer_all(model, tokenizer, [row["prompt_ids"] for row in rows], side, done, file, config)
        values, scores = judge(answers, predictions, tokenizer, config, library)
        sides[side] = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700))} | values
        for row, (text, stopped), score in zip(predictions, answers, scores, strict=True):
            row |= {f"{prefix}prediction": text, f"{prefix}stopped": stopped, f"{prefix}score": score}
    write_results(config, source, sides, rows, predictions)
    file.unlink()


def earlier_answers(file: Path, resume: bool) -> dict[str, list[str]]:
    """The answers that an evaluation left when it was killed, by what was asked (`answer_all`)."""
    if file.is_file() and not resume:
        raise ValueError(f"{file} is of an evaluation that was killed: pass --resume, or delete it")
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []  # the last may be cut
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    try:
        return {asked: [text, stopped] for asked, text, stopped in map(json.loads, lines)}
    except (ValueError, TypeError):
        raise ValueError(f"{file} is broken; delete it to start anew") from None


def rows_to_judge(config: Config) -> tuple[list[dict], dict]:
    """(rows of `read_rows`, facts about their file): those that training stored, or others that it left."""
    from datasets import Dataset

    record = Path(config.model, "finetune_config.json")
    run = loads(record.read_text(encoding="utf-8"), record) if record.is_file() else {}
    trained, used = run.get("dataset", {}).get("path", ""), set()
    stored, listed = (Path(run.get(name, "-")) for name in ("held_out", "trained_on"))
    source = config.dataset_path or trained
    if not source:
        raise ValueError(f"{config.model} names no rows to judge by; pass --model or --dataset_path")
    own = Path(source).resolve() == Path(trained).resolve()
    if own and run.get("settings", {}).get("eval_ratio") == 0:
        raise ValueError(f"{config.model}: its training held no rows out; pass another --dataset_path")
    if own and stored.is_file():
        rows = list(read_rows(str(stored), config.skip_bad_rows).values())
        asked = (config.eval_ratio, config.seed) != (Config.eval_ratio, Config.seed)
        without = "; --eval_ratio and --seed choose none of them" if asked else ""
        note(f"{len(rows)} rows as training stored them{without}")
        return rows[: config.limit], {"path": str(stored)}
    if own:
        note(f"{stored} is not there: the training's split is made again, by --eval_ratio and --seed")
    elif listed.is_file():
        used = set(listed.read_text(encoding="utf-8").split())
    else:
        note("rows that the model was trained on can not be told from others: no list of them is there")
    rows = read_rows(source, config.skip_bad_rows)
    fresh = [text for text in rows if hashlib.sha256(text.encode()).hexdigest()[:16] not in used]
    facts = {"path": source, "rows": len(rows), "trained_on": len(rows) - len(fresh)}
    if config.eval_ratio != 1 and fresh:
        split = Dataset.from_dict({"text": fresh}).train_test_split(config.eval_ratio, seed=config.seed)
        fresh = list(split["test"]["text"])
    note(
        f"{len(fresh)} of {len(rows)} rows of {source}; {facts['trained_on']} that training used are left out"
    )
    if not fresh:
        raise ValueError(f"{source}: no row is left to judge by")
    return [rows[text] for text in fresh[: config.limit]], facts


def loads(text: str, source: Path | str):
    """What a JSON text means. Raises ValueError that names its file."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is broken: {error}") from None


def note(text: str) -> None:
    print(text, file=sys.stderr)


def read_rows(path: str, skip: bool) -> dict[str, dict]:
    """Rows of a file by their messages and tools as JSON text, of which training keeps digests."""
    if not path.endswith((".jsonl", ".json")):
        raise ValueError(f"{path}: what is judged by must be a .jsonl or .json file")
    text, rows = Path(path).read_text(encoding="utf-8-sig"), {}
    lines = map(json.dumps, loads(text, path)) if text.lstrip().startswith("[") else text.split("\n")
    lines = [{"where": f"{path}:{n}", "text": line} for n, line in enumerate(lines, 1) if line.strip()]
    for row in usable(lines, row_of, skip):
        text = json.dumps([row["messages"], row["tools"]], ensure_ascii=False)
        rows.setdefault(text, row | {"examples": []})["examples"] += row["examples"]
    return rows


def usable(rows: list[dict], convert, skip: bool) -> list[dict]:
    """Each row with what `convert` finds in it. Raises ValueError naming ten bad ones, unless `skip`."""
    from jinja2 import TemplateError

    good, bad = [], []
    for row in rows:
        try:
            good.append(row | convert(row))
        except (ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
            bad.append(f"\n  {row['where']}: {error}")
    wrong = f"{len(bad)} of {len(rows)} rows can not be used"
    if bad and not (skip and good):
        raise ValueError(f"{wrong}; mend them or pass --skip_bad_rows{''.join(bad[:10])}")
    if bad:
        note(f"{wrong}; they are left out")
    return good


def row_of(line: dict) -> dict:
    """A record's `messages` as training writes them, place of the `last_answer`, `tools`, `examples`."""
    record = json.loads(line["text"])
    question = "\n补充信息：".join(record[key] for key in ("instruction", "input") if record.get(key))
    pair = {"user": question, "assistant": record.get("output") or record.get("response")}
    turns = [{"role": role, "content": text} for role, text in pair.items()]
    turns = record.get("messages") or record.get("conversations") or turns
    if record.get("system") and turns[0].get("role") != "system":
        turns = [{"role": "system", "content": record["system"]}, *turns]
    if unread := NOT_JUDGED & {key for item in (record, *turns) for key in item if item[key]}:
        raise ValueError(f"{', '.join(sorted(unread))}: this is not read here")
    messages = []
    for turn in turns:
        message = {"role": SPEAKERS.get(turn.get("role") or turn.get("from"))}
        message["content"] = turn.get("content") or turn.get("value") or ""
        messages.append(message | {key: turn[key] for key in KEPT if turn.get(key) not in (None, [], 1)})
    said = [turn["role"] and (turn["content"] or turn.get("tool_calls")) for turn in messages]
    answers = [
        n for n, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight") != 0
    ]
    if not all(said) or not answers:
        raise ValueError("expected messages with an assistant's answer, or instruction, input and output")
    stored = [{key: record[key] for key in ("input_ids", "labels")}] if "input_ids" in record else []
    tools = record.get("tools") or []
    return {"messages": messages, "last_answer": answers[-1], "tools": tools, "examples": stored}


def library_metrics(names: tuple[str, ...]) -> dict:
    """Metrics of the library `evaluate` by name. This file has its name too, and would be found first."""
    if not names:
        return {}
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    try:
        import evaluate

        return {Path(name).stem: evaluate.load(name) for name in names}
    except ImportError as error:
        raise ValueError(f"--metrics: {error}") from None


# Same in: chat.py, evaluate.py, inference.py
def load_model(name: str):
    """(model, tokenizer) of an adapter folder, a model folder or a hub id.

    An adapter comes on its base, in 4 bits where the training had it so: it learnt to correct those weights.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    cpu, cuda = torch.cpu.get_capabilities(), torch.cuda.is_available()
    bfloat16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else bfloat16
    dtype = torch.bfloat16 if bfloat16 else torch.float16 if cuda else torch.float32
    options, run = {"dtype": dtype, "device_map": "auto", "use_safetensors": True}, {}
    if Path(name, "adapter_config.json").is_file() and Path(name, "finetune_config.json").is_file():
        run = json.loads(Path(name, "finetune_config.json").read_text(encoding="utf-8"))["settings"]
    if run.get("load_in_4bit"):
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, **options).eval()
    for module in model.modules() if run.get("use_dora") else ():
        module.support_avx512bf16_for_cpu = False  # else bitsandbytes repacks weights, which DoRA reads
    if Path(name, "generation_config.json").is_file():  # an adapter's own is not loaded by itself
        model.generation_config = transformers.GenerationConfig.from_pretrained(name)
    model.generation_config.use_cache = True  # some models are saved with it off, as in training
    words = name if Path(name, "tokenizer_config.json").is_file() else model.name_or_path
    return model, transformers.AutoTokenizer.from_pretrained(words)


def with_ids(tokenizer, ends: list[int], limit: int, row: dict) -> dict:
    """A row's `prompt`, `prompt_ids`, `reference`, `examples` (if none is stored: the last answer, cut at
    `limit`), and whether one is `cut`."""
    *turns, last = row["messages"][: row["last_answer"] + 1]
    options = {"tools": row["tools"] or None, "sanitize_control_tokens": True, "return_dict": False}
    prompt_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    ids = tokenizer.apply_chat_template([*turns, last], **options)
    start = len(os.path.commonprefix([prompt_ids, ids]))
    end = next((i for i in range(start, len(ids)) if ids[i] in ends), len(ids) - 1) + 1
    labels = [-100] * start + ids[start:end] + [-100] * (len(ids) - end)
    examples = row["examples"] or [{"input_ids": ids[:limit], "labels": labels[:limit]}]
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in last.get("tool_calls", ())]
    talk = [f"{turn['role']}: {turn['content']}" for turn in turns if turn["role"] != "system"]
    prompt = "\n".join(talk) if len(talk) > 1 else turns[-1]["content"]
    reference = answer_of(last["content"]) or "\n".join(calls)
    # a whole example ends with the end of a turn, and white space perhaps
    cut = any(set(ends).isdisjoint(example["input_ids"][-2:]) for example in examples)
    answer = {"prompt": prompt, "prompt_ids": prompt_ids, "reference": reference}
    return answer | {"examples": examples, "cut": cut}


def mean_loss(model, examples: list[dict]) -> float:
    """Sum of -log p over all supervised tokens / their number, in nats."""
    import torch
    from tqdm import tqdm

    total, count = 0.0, 0
    for example in tqdm(examples, desc="loss", disable=None, leave=False):
        ids, labels = (torch.tensor(example[key], device=model.device) for key in ("input_ids", "labels"))
        places = (labels[1:] != -100).nonzero().flatten()  # the logits at a place are for the token after it
        with torch.inference_mode():
            logits = model(ids[None], logits_to_keep=places, use_cache=False).logits[0].float()
            total += torch.nn.functional.cross_entropy(logits, labels[places + 1], reduction="sum").item()
        count += len(places)
    return total / count if count else math.nan


def answer_all(model, tokenizer, prompts, side: str, done: dict, file: Path, config: Config) -> list[list]:
    """[text, why it stopped] for each prompt (token ids); what is not `done` is answered and kept in `file`.

    A prompt that leaves less room in the model's positions than an answer may take is answered alone, so that
    no answer depends on --batch_size.
    """
    from tqdm import tqdm

    # an answer's key is all that it depends on: what was answered under other settings does not count
    weights = [path.stat().st_mtime_ns for path in sorted(Path(config.model).glob("*.safetensors"))]
    keys = [json.dumps([side, config.model, weights, config.max_new_tokens, ids]) for ids in prompts]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = [min(config.max_new_tokens, positions - len(ids)) for ids in prompts]
    order = [i for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if keys[i] not in done]
    full = [i for i in order if room[i] == config.max_new_tokens]
    batches = [[i] for i in order if room[i] < config.max_new_tokens]
    batches += [full[n : n + config.batch_size] for n in range(0, len(full), config.batch_size)]
    if config.resume:
        note(f"{len(prompts) - len(order)} answers of the {side} are there already")
    with open(file, "a", encoding="utf-8", buffering=1) as log:  # each line at once
        for batch in tqdm(batches, desc=f"answers of the {side}", unit="batch", disable=None):
            made = generate(model, [prompts[i] for i in batch], room[batch[0]])
            for i, (ids, stopped) in zip(batch, made, strict=True):
                opened = "<think>" * tokenizer.decode(prompts[i][-9:]).rstrip().endswith("<think>")
                done[keys[i]] = [opened + tokenizer.decode(ids, skip_special_tokens=True), stopped]
                log.write(json.dumps([keys[i], *done[keys[i]]], ensure_ascii=False) + "\n")
    return [done[key] for key in keys]


def generate(model, prompts: list[list[int]], room: int) -> list[tuple[list[int], str]]:
    """(token ids, why it stopped: `end_of_turn`, `limit`, `no_room`) of the answer to each prompt."""
    import torch

    if room < 1:
        return [([], "no_room")] * len(prompts)
    longest, ends = len(prompts[0]), torch.tensor(model.generation_config.eos_token_id).flatten().tolist()
    ids = torch.tensor([[ends[0]] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"attention_mask": mask.to(model.device), "max_new_tokens": room, "pad_token_id": ends[0]}
    # greedy, whatever the model's own settings say
    options |= {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    try:
        output = model.generate(ids.to(model.device), **options)[:, longest:].tolist()
    except torch.OutOfMemoryError:
        raise ValueError("out of memory: take a smaller --batch_size, and go on by --resume") from None
    stops = [next((place for place, id in enumerate(new) if id in ends), None) for new in output]
    whys = ["limit" if stop is None else "end_of_turn" for stop in stops]
    return [(new[:stop], why) for new, stop, why in zip(output, stops, whys, strict=True)]


def judge(answers, rows: list[dict], tokenizer, config: Config, library: dict) -> tuple[dict, list[float]]:
    """Metrics of the answers, and a score of each: ROUGE-L with --rouge, else the share of common words."""
    texts, references = [answer_of(text) for text, _ in answers], [row["reference"] for row in rows]
    lengths = [fmean(map(len, tokenizer(t, add_special_tokens=False).input_ids)) for t in (texts, references)]
    values = {
        "empty_rate": fmean(not text for text in texts),
        "stop_rate": fmean(stopped == "end_of_turn" for _, stopped in answers),
        "avg_pred_len_tokens": lengths[0],
        "avg_ref_len_tokens": lengths[1],
        "len_ratio_pred_over_ref": lengths[0] / lengths[1] if lengths[1] else None,
        "distinct-1": distinct(texts, 1),
        "distinct-2": distinct(texts, 2),
    }
    scores = list(map(overlap, texts, references))
    if config.rouge:
        found, scores = rouge(texts, references)
        values |= found
    if config.bleu:
        values |= bleu(texts, references)
    for name, metric in library.items():
        found = metric.compute(predictions=texts, references=references)
        found = {key if key == name else f"{name}_{key}": value for key, value in found.items()}
        values |= {f"{key} (library)" if key in values else key: value for key, value in found.items()}
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


def distinct(texts: list[str], n: int) -> float:
    """Different runs of n words over all of them (arXiv:1510.03055); 0 where there is none."""
    runs = [tuple(found[i : i + n]) for found in map(words, texts) for i in range(len(found) - n + 1)]
    return len(set(runs)) / max(len(runs), 1)


def overlap(text: str, reference: str) -> float:
    """The words that two texts share, as a part of all their words."""
    a, b = Counter(words(text)), Counter(words(reference))
    return 2 * (a & b).total() / max((a + b).total(), 1)


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


def bleu(texts: list[str], references: list[str]) -> dict:
    """Corpus BLEU, 0 to 100, with its 95 % interval and sacreBLEU's signature."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="zh" if any(map(HAN.search, references)) else "13a")
    texts, references = ([ALONE.sub(r" \g<0> ", text) for text in side] for side in (texts, references))
    score = metric.corpus_score(texts, [references], n_bootstrap=1000)
    interval = [max(0.0, score._mean - score._ci), min(100.0, score._mean + score._ci)]
    return {"bleu": score.score, "bleu_interval": interval, "bleu_signature": str(metric.get_signature())}


def write_results(config: Config, source: dict, sides: dict, rows: list, predictions: list[dict]) -> None:
    """Write metrics.json, predictions.jsonl and report.html; print the scores."""
    from jinja2 import Environment

    sizes = sorted(len(example["input_ids"]) for row in rows for example in row["examples"])
    p95, wide = sizes[math.ceil(0.95 * len(sizes)) - 1], sizes[-1] // 30 + 1  # for a picture of 30 bars
    facts = {"model": config.model, "dataset": source | {"evaluated": len(rows)}}
    facts["length"] = {"min": sizes[0], "median": median(sizes), "p95": p95, "max": sizes[-1]}
    facts |= {"truncation_rate": fmean(row["cut"] for row in rows)} | sides.pop("model") | sides
    text = json.dumps(facts, default=lambda number: number.tolist())  # a metric may give numpy's numbers
    facts = json.loads(text, parse_constant=lambda name: None)  # or NaN, which is no JSON
    names = [name for name in facts if name not in ("model", "dataset", "base", "bleu_signature")]
    scores = [["", "model", *sides]]
    scores += [[name, facts[name], *(side.get(name, "") for side in sides.values())] for name in names]
    counts = sorted(Counter(size // wide * wide for size in sizes).items())
    bars = [[f"from {size}", "█" * math.ceil(40 * count / len(sizes)), count] for size, count in counts]
    columns = ["score", "prompt", "reference", "prediction"] + ["base_prediction"] * config.compare_base
    answers = sorted([row[name] for name in columns] for row in predictions)
    tables = {"Scores": scores, "Lengths in tokens": bars, "Answers, lowest score first": [columns, *answers]}
    page = Environment(autoescape=True, finalize=shown).from_string(REPORT)
    page = page.render(title=f"Evaluation of {config.model}", tables=tables)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    text = json.dumps(facts, ensure_ascii=False, indent=2)
    files = {"report.html": page, "predictions.jsonl": lines, "metrics.json": text}
    for name, content in files.items():  # written beside its place, so that it is never half written
        partial = Path(config.output_dir, name + ".partial")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, Path(config.output_dir, name))
    for row in scores:
        print("".join(f"{shown(cell):<28}" for cell in row).rstrip())
    print(f"Perplexity: {shown(facts['perplexity'])}")
    if config.bleu:
        print(f"BLEU: {shown(facts['bleu'])}")


def shown(value: object) -> str:
    """A value as text for a person, without control characters."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError) as error:  # a person's mistake or a file's; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
