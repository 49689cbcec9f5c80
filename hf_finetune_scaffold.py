"""Lesson: the smallest honest use of transformers.Trainer, on every weight; and which LoRA rank was enough?

    python hf_finetune_scaffold.py --model models/SmolLM2-135M-Instruct --dynamic_padding     # two CPU cores
    python hf_finetune_scaffold.py --data my_records.jsonl --epochs 3 --gradient_checkpointing

Reads   JSONL, a record a line:  {"instruction": "翻译成中文", "input": "The lamp is on.", "output": "灯亮着。"}
Writes  to --output the model with its tokenizer, checkpoint-*, trainer_state.json, lora_rank_error.png and
        lora_rank_error.json:    {"ranks": [1, ...], "projections": {"self_attn.q_proj": {"median": [0.9, ...], ...}}}
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for annotations only: importing these takes seconds, and --help should not
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL_MODEL = "models/SmolLM2-135M-Instruct"
EXAMPLE_DATA = Path("outputs/examples_translation_en_zh.jsonl")
KEYS = ("instruction", "input", "output")
RANKS = range(1, 129)  # LoRA ranks to judge
TRANSLATIONS = """
The lamp is on. = 灯亮着。 | He left early. = 他走得早。 | The soup is hot. = 汤很烫。
We walk to school. = 我们走路上学。 | It snowed. = 下雪了。 | The train was late. = 火车晚点了。
She writes a letter. = 她在写信。 | Speak slowly. = 说慢一点。 | The chip is small. = 芯片很小。
They planted trees. = 他们种了树。 | I lost my key. = 我丢了钥匙。 | The shop opens at nine. = 商店九点开门。
Water boils here. = 水在这里沸腾。 | You are right. = 你是对的。 | The river flows east. = 河向东流。
Can I pay by card? = 可以刷卡吗？ | Turn left. = 向左转。 | A word has two meanings. = 一个词有两个意思。
We need a long cable. = 我们需要长电缆。 | Tea is ready. = 茶好了。 | The moon is bright. = 月亮很亮。
The program stopped. = 程序停了。 | He can swim. = 他会游泳。 | The meeting was long. = 会议很长。
Blood carries oxygen. = 血液输送氧气。 | I am hungry. = 我饿了。 | The price has not changed. = 价格没变。
The cat is asleep. = 猫睡着了。 | Spring came early. = 春天来得早。 | She plays the violin. = 她拉小提琴。
The test found an error. = 测试发现一个错误。 | We leave at noon. = 我们中午出发。 | It is free. = 这是免费的。
Cells divide. = 细胞会分裂。 | The bridge is closed. = 桥封了。 | My brother repairs clocks. = 我哥哥修钟表。
The doctor is reading. = 医生在看书。 | Open the window. = 打开窗户。 | The paper is blue. = 纸是蓝色的。
Nobody answered. = 没人回答。 | The road is wet. = 路是湿的。 | Machines learn from data. = 机器从数据中学习。
"""

# ----------------------------------------------------------------------------------------- settings


# Same in: all nine scripts
def setting(default, help: str, **extra):
    """A dataclass field that is also a command-line flag; its default is written here and nowhere else."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass
class CliConfig:
    data_path: Path = setting(EXAMPLE_DATA, "JSONL file; the default is written if it is missing", flag="data")
    model_name: str = setting("Qwen/Qwen3-4b", "hub id or folder of the model", flag="model")
    output_dir: Path = setting(Path("./outputs/hf_trainer"), "where everything is written", flag="output")
    learning_rate: float = setting(2e-5, "peak learning rate", flag="lr")
    batch_size: int = setting(2, "rows a step", flag="batch")
    num_train_epochs: int = setting(1, "passes over the training rows", flag="epochs")
    test_size: float = setting(0.2, "share of rows held out for evaluation")
    max_length: int = setting(1024, "tokens a row, padded or cut")
    dynamic_padding: bool = setting(False, "pad to the longest row of a batch, not to max_length")
    gradient_checkpointing: bool = setting(False, "compute activations twice instead of keeping them: less memory")
    skip_bad_rows: bool = setting(False, "count bad lines and go on, instead of stopping")


def parse_args(argv: list[str] | None = None) -> CliConfig:
    """The settings from the command line. Exits 2 on a wrong flag or value."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(CliConfig):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default)}
        kind |= {"dest": f.name, "default": f.default, "help": f"{f.metadata['help']} (default: {f.default})"}
        parser.add_argument("--" + f.metadata.get("flag", f.name), **kind)
    config = CliConfig(**vars(parser.parse_args(argv)))
    numbers = (config.batch_size, config.num_train_epochs, config.max_length)
    if min(numbers) < 1 or not config.learning_rate > 0 or not 0 < config.test_size < 1:
        parser.error("--batch, --epochs, --max_length must be 1 or more, --lr above 0, --test_size between 0 and 1")
    return config


# --------------------------------------------- 1. formatting and joining, 2. tokenizer and padding


# Same in: all nine scripts
class UserError(Exception):
    """A person's mistake: shown as it is, without a traceback."""


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path` and moves it into place, so that it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_dataset(path: Path, skip_bad_rows: bool = False) -> Dataset:
    """The records of a JSONL file, line by line. Raises UserError that names the first ten bad ones, as file:line."""
    from datasets import Dataset

    if not os.path.isfile(path):  # unlike Path.is_file it answers for every text, however long
        raise UserError(f"{path}: {'a folder' if os.path.isdir(path) else 'no such file'}; --data takes a JSONL file.")
    records, faults = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            if line.strip():
                record = {"input": "", **json.loads(line.decode("utf-8-sig"))}  # -sig: a byte-order mark may come first
                texts = {key: record[key] for key in KEYS}
                if not all(isinstance(text, str) for text in texts.values()) or not texts["output"].strip():
                    raise ValueError("all three must be text, and output not empty")
                "".join(texts.values()).encode()  # ValueError for half a character, which Arrow can not hold
                records.append(texts)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            faults.append(f"{path}:{number}: {'missing key' if isinstance(error, KeyError) else 'no record:'} {error}")
    if faults and not skip_bad_rows:
        raise UserError("\n".join([*faults[:10], f"Bad lines: {len(faults)}. Mend them or pass --skip_bad_rows."]))
    if len(records) < 2:
        raise UserError(f"{path}: {len(records)} records; two are the least, one to train on and one to test on.")
    print(f"{path}: {len(records)} records, {len(faults)} bad lines left out", file=sys.stderr)
    return Dataset.from_list(records)


def format_example(example: dict[str, str]) -> str:
    """A record as the one text that the model is trained on.

    >>> format_example({"instruction": "翻译成中文", "input": "Hello.", "output": "你好。"})
    '### 指令:\\n翻译成中文\\n### 输入:\\nHello.\\n### 回答:\\n你好。'
    """
    return f"### 指令:\n{example['instruction']}\n### 输入:\n{example['input']}\n### 回答:\n{example['output']}"


def tokenize_dataset(dataset, tokenizer, max_length: int = 1024, dynamic_padding: bool = False) -> Dataset:
    """Records as input_ids, attention_mask and labels: max_length tokens each or, if dynamic, their own length.

    The prompt carries loss too (in qwen_finetuning.py the answer alone), and so does the EOS at the end. Padding has
    the label -100. It is found by the attention mask and not by its id: where pad equals EOS, that would be the ending.
    """
    padding = False if dynamic_padding else "max_length"

    def encode(example: dict[str, str]) -> dict[str, list[int]]:
        text = format_example(example) + tokenizer.eos_token
        row = tokenizer(text, truncation=True, max_length=max_length, padding=padding, padding_side="right")
        return {**row, "labels": [i if m else -100 for i, m in zip(row.input_ids, row.attention_mask, strict=True)]}

    return dataset.map(encode, remove_columns=dataset.column_names)


# Same in: hf_finetune_scaffold.py, sft_basics.py
def training_memory(parameters: int, tokens: int, layers: int, hidden: int, vocabulary: int) -> int:
    """Bytes that full fine-tuning needs at least, with `tokens` in a batch (padding counted).

    16 a parameter: float32 weight, gradient, two AdamW moments. A token takes its float32 logits three times, and 34
    a layer and hidden unit (Korthikanti et al. 2022, "Reducing Activation Recomputation").

    >>> training_memory(1_000_000, 100, layers=2, hidden=64, vocabulary=1000)
    17635200
    """
    return 16 * parameters + tokens * (34 * layers * hidden + 12 * vocabulary)


# Same in: hf_finetune_scaffold.py, sft_basics.py
def load(name: str, flag: str, tokens: int) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer (pad = EOS where it has no pad) and float32 model. UserError where they can not be read or not fit."""
    import psutil
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):  # shapes, no memory: the check comes before any weight
            parameters = AutoModelForCausalLM.from_config(config).num_parameters()
        size = config.get_text_config()
        need = training_memory(parameters, tokens, size.num_hidden_layers, size.hidden_size, size.vocab_size)
        memory = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process
        free = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0] if torch.cuda.is_available() else memory
        if need > free:
            small = training_memory(134_515_008, tokens, layers=30, hidden=576, vocabulary=49_152)
            raise UserError(
                f"{name}: full fine-tuning needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free. "
                f"Pass {flag} {SMALL_MODEL} ({small / 2**30:.1f} GiB), or a smaller --max_length or batch."
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer, AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # for a cut file the libraries raise what they like
        cause = "no whole model in this folder" if Path(name).is_dir() else "no such folder, and no hub model reached"
        fault = UserError(
            f"{name}: {cause} ({' '.join(str(error).split())[:200]}). Look at the name, the network, HF_HUB_OFFLINE, "
            f"or pass {flag} with a model folder such as {SMALL_MODEL} (qwen_finetuning.py --demo makes it)."
        )
        raise error if isinstance(error, UserError) else fault from None


# Same in: hf_finetune_scaffold.py, sft_basics.py
def device_settings() -> dict[str, bool]:
    """Training arguments for this machine: bfloat16 autocast where the device has it; weights stay float32."""
    import torch

    if torch.accelerator.is_available():
        return {"bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)}
    cpu = torch.cpu.get_capabilities()
    return {"use_cpu": True, "bf16": bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))}


def rank_errors(update) -> list[float]:
    """Relative error of a matrix's best rank-r approximation, the truncated SVD (Eckart and Young 1936), r in RANKS."""
    import torch

    energy = torch.linalg.svdvals(update.float()).square().flip(0)  # smallest first: float32 loses none in the sum
    errors = (energy.cumsum(0) / energy.sum().clamp(min=1e-38)).sqrt().flip(0).tolist()  # [r]: without the first r
    return [errors[r] if r < len(errors) else 0.0 for r in RANKS]


def write_rank_errors(base: PreTrainedModel, tuned: PreTrainedModel, folder: Path) -> dict[str, dict[str, list[float]]]:
    """lora_rank_error.json and .png: rank_errors of W_tuned - W_base over all layers, by kind of projection.

    It says how much of *this* update a rank holds. LoRA trains within its rank and may find another, as good.
    """
    from matplotlib.figure import Figure
    from tqdm import tqdm

    curves, before = {}, dict(base.named_parameters())
    for name, weight in tqdm(list(tuned.named_parameters()), desc="SVD"):
        if weight.ndim == 2 and (kind := re.search(r"\.\d+\.(.+)\.weight$", name)):  # a matrix in a numbered layer
            curves.setdefault(kind[1], []).append(rank_errors(weight.detach() - before[name].to(weight.device)))
    axes, figures = Figure(figsize=(8, 5)).subplots(), {}
    for kind, layers in curves.items():
        of_rank = list(zip(*layers, strict=True))  # for each rank the errors of all layers
        low, median, high = (list(map(f, of_rank)) for f in (min, statistics.median, max))
        figures[kind] = {"layers": len(layers), "lowest": low, "median": median, "highest": high}
        axes.fill_between(RANKS, low, high, alpha=0.15)
        axes.plot(RANKS, median, label=kind)
    axes.set(xlabel="rank r", ylabel="relative error of the best rank-r update", title="median, range over layers")
    axes.legend()
    axes.figure.savefig(folder / "lora_rank_error.partial.png", dpi=150)
    os.replace(folder / "lora_rank_error.partial.png", folder / "lora_rank_error.png")
    write_whole(folder / "lora_rank_error.json", json.dumps({"ranks": list(RANKS), "projections": figures}, indent=1))
    return figures


# ------------------------------- 3. training arguments, 4. Trainer, 5. training and evaluation


def main(config: CliConfig) -> None:
    if config.data_path == EXAMPLE_DATA and not EXAMPLE_DATA.exists():
        pairs = [pair.split(" = ") for line in TRANSLATIONS.strip().splitlines() for pair in line.split(" | ")]
        records = [dict(zip(KEYS, ["把下面的英文翻译成中文。", *pair], strict=True)) for pair in pairs]
        write_whole(EXAMPLE_DATA, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        print(f"{EXAMPLE_DATA}: {len(records)} translation records written", file=sys.stderr)
    dataset = load_dataset(config.data_path, config.skip_bad_rows)
    least = 1 if config.dynamic_padding or config.gradient_checkpointing else config.max_length  # tokens a row keeps
    tokenizer, model = load(config.model_name, "--model", config.batch_size * least)
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    held_out = min(math.ceil(config.test_size * len(dataset)), len(dataset) - 1)  # one row at least to train on
    parts = dataset.train_test_split(held_out, seed=42).values()
    train, test = (tokenize_dataset(p, tokenizer, config.max_length, config.dynamic_padding) for p in parts)
    args = TrainingArguments(
        output_dir=str(config.output_dir),
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        num_train_epochs=config.num_train_epochs,
        gradient_checkpointing=config.gradient_checkpointing,
        include_num_input_tokens_seen="all",  # padding too: what --dynamic_padding saves
        **device_settings() | {"logging_steps": 1, "save_strategy": "epoch", "report_to": "none"},
    )
    trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), train, test, processing_class=tokenizer)
    with redirect_stdout(sys.stderr):  # where the Trainer's log belongs: stdout is for results
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    print(f"eval_loss {loss:.4f} · perplexity {math.exp(loss):.2f}")
    if config.dynamic_padding:
        seen, full = trainer.state.num_input_tokens_seen, len(train) * config.max_length * config.num_train_epochs
        print(f"trained on {seen} tokens, not the {full} of rows padded to max_length: {1 - seen / full:.0%} saved")
    base = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=model.dtype)  # as it was before training
    for kind, figure in write_rank_errors(base, model, config.output_dir).items():
        print(f"{kind:<20}" + " · ".join(f"r={r}: {figure['median'][r - 1]:.2f}" for r in (4, 16, 64, 128)))


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
