"""Lesson: the smallest honest use of transformers.Trainer, on every weight; and which LoRA rank was enough?

    python hf_finetune_scaffold.py --model models/SmolLM2-135M-Instruct --dynamic_padding     # two CPU cores
    python hf_finetune_scaffold.py --data my_records.jsonl --epochs 3 --gradient_checkpointing

Reads   JSONL, a record a line: {"instruction": "译成中文", "input": "The lamp is on.", "output": "灯亮着。"}
Writes  to --output the model with its tokenizer, trainer_state.json, lora_rank_error.png and
        lora_rank_error.json: {"ranks": [1, ...], "projections": {"self_attn.q_proj": {"median": [0.9, ...]}}}
"""

import json
import logging
import math
import os
import re
import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path

EXAMPLE_DATA = Path("outputs/examples_translation_en_zh.jsonl")
SMALL_MODEL = "models/SmolLM2-135M-Instruct"  # what qwen_finetuning.py --demo leaves
KEYS = ("instruction", "input", "output")
RANKS = range(1, 129)  # LoRA ranks to judge
SHORT_FLAGS = ("data", "model", "output", "lr", "batch", "epochs")  # of the first six settings
TRANSLATIONS = """
The lamp is on. = 灯亮着。 | He left early. = 他走得早。 | It snowed. = 下雪了。 | It is free. = 免费的。
The soup is hot. = 汤很烫。 | Speak slowly. = 说慢一点。 | Read it. = 读一读。 | The cat sleeps. = 猫在睡。
I lost my key. = 我丢了钥匙。 | Nobody answered. = 没人回答。 | Turn left. = 向左转。 | Run fast. = 快跑。
You are right. = 你是对的。 | Tea is ready. = 茶好了。 | He can swim. = 他会游泳。 | I am hungry. = 我饿了。
Cells divide. = 细胞会分裂。 | Open the window. = 打开窗。 | The road is wet. = 路湿了。 | Sit down. = 请坐。
We walk home. = 我们走回家。 | Trains run late. = 火车晚点。 | It is ten. = 十块钱。 | Wait here. = 等一下。
He writes well. = 他写得好。 | Trees grow. = 树在长。 | Rivers flow. = 河在流。 | The moon is up. = 月亮升起。
Water boils. = 水开了。 | May I pay? = 可以付款吗？ | The code stops. = 代码停了。 | It is spring. = 春天了。
We eat at noon. = 我们中午吃。 | The bank is shut. = 银行关了。 | Blood is red. = 血是红的。 | Go on. = 继续。
A nurse reads. = 护士在看书。 | Chips are tiny. = 芯片很小。 | She sings. = 她唱歌。 | Prices rose. = 涨价了。
"""


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class CliConfig:
    data_path: Path = setting(EXAMPLE_DATA, "JSONL file; the default is written if it is missing")
    model_name: str = setting("Qwen/Qwen3-4b", "hub id or folder of the model")
    output_dir: Path = setting(Path("./outputs/hf_trainer"), "where everything is written")
    learning_rate: float = setting(2e-5, "peak learning rate")
    batch_size: int = setting(2, "rows a step")
    num_train_epochs: int = setting(1, "passes over the training rows")
    test_size: float = setting(0.2, "share of rows held out for evaluation")
    max_length: int = setting(1024, "tokens a row, padded or cut")
    dynamic_padding: bool = setting(False, "pad to the longest row of a batch, not to max_length")
    gradient_checkpointing: bool = setting(False, "compute activations twice, not keep them: less memory")
    skip_bad_rows: bool = setting(False, "count bad lines and go on, instead of stopping")


def parse_args(argv: list[str] | None = None) -> CliConfig:
    """Settings from the command line; six flags have a short form, an unknown one is an error (exit 2)."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f, short in zip_longest(fields(CliConfig), SHORT_FLAGS):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        names = [f"--{name}" for name in (f.name, short) if name]
        cli.add_argument(*names, default=f.default, **(options | f.metadata))
    return CliConfig(**vars(cli.parse_args(argv)))


def main() -> None:
    config = parse_args()
    if min(config.num_train_epochs, config.batch_size) < 1 or config.max_length < 32:
        raise ValueError("--epochs and --batch must be 1 or more, --max_length 32 or more")
    # 1. Formatting and joining: records from a file, of which some are held out
    if config.data_path == EXAMPLE_DATA and not EXAMPLE_DATA.exists():
        write_example_data()
    records = load_dataset(config.data_path, config.skip_bad_rows)
    parts = records.train_test_split(config.test_size, seed=42).values()
    import torch  # from here on it takes seconds: a mistake in the data is told at once
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    # 2. Tokenizer and padding: each record as one text, each text as ids and labels
    tokenizer, model = load_for_training(config.model_name, config.max_length)
    train, test = (tokenize_dataset(p, tokenizer, config.max_length, config.dynamic_padding) for p in parts)
    # 3. Training arguments
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if on_cpu := not torch.accelerator.is_available():
        bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    args = TrainingArguments(
        output_dir=str(config.output_dir),
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        num_train_epochs=config.num_train_epochs,
        activation_checkpointing=config.gradient_checkpointing,
        use_cpu=on_cpu,
        bf16=bf16,  # only the arithmetic, where the device has it; weights stay float32
        logging_steps=1,
        save_strategy="no",  # saved at the end, without AdamW's moments, which are twice the model's size
        include_num_input_tokens_seen="all",  # padding too: what --dynamic_padding saves
    )
    # 4. Trainer: its collator pads the rows of a batch to one length, their labels with -100
    trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), train, test, processing_class=tokenizer)
    # 5. Training and evaluation
    with redirect_stdout(sys.stderr):  # where the Trainer's log belongs: stdout is for results
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    if not loss < 100:  # nan, too
        raise ValueError(f"eval_loss {loss}: the training ran away, try a smaller --lr")
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():  # of several processes the first speaks
        return
    print(f"eval_loss {loss:.4f} · perplexity {math.exp(loss):.2f}")
    print(f"trained on {trainer.state.num_input_tokens_seen} tokens, padding too")
    # And a question: which LoRA rank would have been enough for this update?
    base = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=model.dtype)
    for kind, errors in write_rank_errors(base, model, config.output_dir).items():
        print(f"{kind:<20}" + " · ".join(f"r={r}: {errors['median'][r - 1]:.2f}" for r in (4, 16, 64, 128)))


def write_example_data() -> None:
    EXAMPLE_DATA.parent.mkdir(parents=True, exist_ok=True)
    with EXAMPLE_DATA.open("w", encoding="utf-8") as file:
        for english, chinese in re.findall(r"(\w[^|\n]*) = (\S+)", TRANSLATIONS):
            record = {"instruction": "把下面的英文翻译成中文。", "input": english, "output": chinese}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def load_dataset(path: Path, skip_bad_rows: bool = False):
    """The records of a JSONL file, line by line. Raises ValueError that names the first ten bad lines."""
    from datasets import Dataset

    records, faults = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = {"input": ""} | {key: text for key, text in json.loads(line).items() if text is not None}
            if unread := [key for key in ("system", "history", "messages") if record.get(key)]:
                raise ValueError(f"{', '.join(unread)} would not be trained on")
            wrong = [key for key in KEYS if not isinstance(record.get(key), str)]
            if wrong or not record["output"].strip():
                raise ValueError(f"{', '.join(wrong) or 'output'} is missing, empty or no text")
            format_example(record).encode()  # half a surrogate pair, as in "\ud800", is no text either
            records.append({key: record[key] for key in KEYS})
        except (AttributeError, ValueError, RecursionError) as error:
            faults.append(f"{path}:{number}: no record: {error}")
    if faults and not skip_bad_rows:
        raise ValueError("\n".join([*faults[:10], f"{len(faults)} bad lines: mend them or --skip_bad_rows"]))
    print(f"{path}: {len(records)} records, {len(faults)} bad lines left out", file=sys.stderr)
    if len(records) < 2:
        raise ValueError(f"{path}: one record to train on and one to test on are the least")
    return Dataset.from_list(records)


def format_example(example: dict[str, str]) -> str:
    """A record as the one text that the model is trained on."""
    return "### 指令:\n{instruction}\n### 输入:\n{input}\n### 回答:\n{output}".format(**example)


def tokenize_dataset(dataset, tokenizer, max_length: int = 1024, dynamic_padding: bool = False):
    """Records as input_ids, attention_mask, labels: max_length tokens each or, if dynamic, their own length.
    Prompt, answer and EOS carry loss. Padding (-100) is told by the attention mask: its id may be EOS."""
    padding = False if dynamic_padding else "max_length"
    size = {"max_length": max_length, "truncation": True, "padding": padding, "padding_side": "right"}

    def encode(example: dict[str, str]) -> dict[str, list[int]]:
        row = tokenizer(format_example(example) + tokenizer.eos_token, **size)
        row["labels"] = [i if m else -100 for i, m in zip(row.input_ids, row.attention_mask, strict=True)]
        return dict(row)

    rows = dataset.map(encode, remove_columns=dataset.column_names)
    if cut := sum(labels[-1] not in (-100, tokenizer.eos_token_id) for labels in rows["labels"]):
        print(f"--max_length {max_length} cuts {cut} of {len(rows)} rows", file=sys.stderr)
    return rows


def write_rank_errors(base, tuned, folder: Path) -> dict[str, dict]:
    """lora_rank_error.json and .png: rank_errors of W_tuned - W_base over all layers, by kind of projection.
    They say how much of *this* update a rank holds; LoRA may find another within its rank, as good."""
    import torch
    from tqdm import tqdm

    kinds, figures, before = {}, {}, dict(base.named_parameters())
    for name, weight in tqdm(list(tuned.named_parameters()), desc="SVD"):
        if weight.ndim == 2 and (kind := re.search(r"\.\d+\.(.+)\.weight$", name)):  # of a numbered layer
            update = weight.detach() - before[name].to(weight.device)
            kinds.setdefault(kind[1], []).append(rank_errors(update))
    for kind, layers in kinds.items():
        low, median, high = torch.tensor(layers).quantile(torch.tensor([0, 0.5, 1]), dim=0).tolist()
        figures[kind] = {"layers": len(layers), "lowest": low, "median": median, "highest": high}
    (folder / "lora_rank_error.json").write_text(json.dumps({"ranks": list(RANKS), "projections": figures}))
    try:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(8, 5)).subplots()
        for kind, errors in figures.items():
            axes.fill_between(RANKS, errors["lowest"], errors["highest"], alpha=0.15)
            axes.plot(RANKS, errors["median"], label=kind)
        axes.set(xlabel="rank r", ylabel="relative error: median and range over layers")
        axes.legend()
        axes.figure.savefig(folder / "lora_rank_error.png", dpi=150)
    except Exception as error:  # no matplotlib, for one: a picture never costs a result
        print(f"no lora_rank_error.png: {error}", file=sys.stderr)
    return figures


def rank_errors(update) -> list[float]:
    """Relative error of a matrix's best approximation of each rank: truncated SVD (Eckart and Young 1936)."""
    import torch

    squares = torch.linalg.svdvals(update.float()).square()
    missed = squares.flip(0).cumsum(0).flip(0)  # [r]: what an approximation of rank r misses
    errors = (missed / missed[0].clamp(min=1e-38)).sqrt().tolist()
    return [errors[r] if r < len(errors) else 0.0 for r in RANKS]


# Same in: hf_finetune_scaffold.py, sft_basics.py
def load_for_training(name: str, max_length: int):
    """(tokenizer, float32 model). Raises ValueError in one line where it can not be read or does not fit."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its notes come with its import
    import psutil
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    try:
        base, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        with torch.device("meta"):  # shapes alone; 16 bytes a parameter: weight, gradient, two AdamW moments
            need = 16 * AutoModelForCausalLM.from_config(base).num_parameters()
        if need > free:
            raise ValueError(f"training takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free.")
        if max_length > (positions := getattr(base, "max_position_embeddings", max_length)):
            raise ValueError(f"it has {positions} positions, --max_length is {max_length}.")
        if tokenizer.eos_token is None:
            raise ValueError("its tokenizer has no EOS token, by which a text ends.")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())} Try --model_name {SMALL_MODEL}") from None
    return tokenizer, model


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main()
    except (OSError, ValueError) as error:  # a person's mistake or a file's; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
