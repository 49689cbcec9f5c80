"""Lesson: does it matter how a record is written down? The same records, trained in two formats.

    python sft_basics.py --model_name models/SmolLM2-135M-Instruct --max_length 128   # both formats, on two CPU cores
    python sft_basics.py --no-instruction_mode --keep_eos --eval_ratio 0.25           # one format alone, done better
    accelerate launch --multi_gpu --num_processes 2 sft_basics.py --batch_size 1      # two processes, on CPUs too

Reads   its own EXAMPLE_PAIRS, each as one text:   指令：翻译成英文 / 输入：我喜欢读书。 / 回答：I like reading.
Writes  output_dir/instruction, output_dir/sft:    the model, its tokenizer and trainer_state.json, which ends with
                                                   {"eval_loss": 2.35, "answer_loss": 3.04, "supervised_eos": 0, ...}

It trains every weight, in float32. There are no role markers in its texts (user, assistant): how a chat model is
tuned on its own chat template, with loss on the answers alone, stands in qwen_finetuning.py.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for annotations only: importing these takes seconds, and --help should not
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL_MODEL = "models/SmolLM2-135M-Instruct"
SEED = 42
INSTRUCTION_FORMAT = "指令：{instruction}\n输入：{input}\n回答：{output}"
PLAIN_FORMAT = "问题：{input}\n回答：{output}"  # no instruction: what is wanted must be guessed
logger = logging.getLogger("sft_basics")

EXAMPLE_PAIRS = [
    {"instruction": "翻译成英文", "input": "我喜欢读书。", "output": "I like reading."},
    {"instruction": "翻译成英文", "input": "火车几点出发？", "output": "When does the train leave?"},
    {"instruction": "翻译成英文", "input": "请把窗户关上。", "output": "Please close the window."},
    {"instruction": "翻译成中文", "input": "The river is wide.", "output": "这条河很宽。"},
    {"instruction": "翻译成中文", "input": "He forgot his keys.", "output": "他忘了带钥匙。"},
    {"instruction": "判断情感：正面或负面", "input": "这家店的面真好吃。", "output": "正面"},
    {"instruction": "判断情感：正面或负面", "input": "等了两个小时也没人理。", "output": "负面"},
    {"instruction": "判断情感：正面或负面", "input": "电池只用了一天就坏了。", "output": "负面"},
    {"instruction": "判断情感：正面或负面", "input": "老师讲得清楚又有趣。", "output": "正面"},
    {"instruction": "找出地名", "input": "小李上周从成都飞到了青岛。", "output": "成都、青岛"},
    {"instruction": "找出日期", "input": "会议改到五月六日上午。", "output": "五月六日"},
    {"instruction": "找出人名", "input": "王芳和陈明一起做实验。", "output": "王芳、陈明"},
    {"instruction": "回答问题", "input": "一年有几个季节？", "output": "四个：春、夏、秋、冬。"},
    {"instruction": "回答问题", "input": "水由哪两种元素组成？", "output": "氢和氧。"},
    {"instruction": "回答问题", "input": "人体最大的器官是什么？", "output": "皮肤。"},
    {"instruction": "回答问题", "input": "芯片主要用什么材料制造？", "output": "主要是硅。"},
    {"instruction": "改写得更礼貌", "input": "把文件给我。", "output": "麻烦您把文件给我，谢谢。"},
    {"instruction": "改写得更礼貌", "input": "别说话。", "output": "请您稍微安静一下，好吗？"},
    {"instruction": "缩成一句短话", "input": "因为昨夜雨下得太大，比赛取消了。", "output": "比赛因雨取消。"},
    {"instruction": "缩成一句短话", "input": "新桥修好以后，上班能省半小时。", "output": "新桥省半小时。"},
    {"instruction": "写出反义词", "input": "明亮", "output": "昏暗"},
    {"instruction": "写出反义词", "input": "勤劳", "output": "懒惰"},
    {"instruction": "计算", "input": "三十七加五", "output": "四十二"},
    {"instruction": "计算", "input": "六乘以八", "output": "四十八"},
]

# ----------------------------------------------------------------------------------------- settings


# Same in: all nine scripts
def setting(default, help: str, **extra):
    """A dataclass field that is also a command-line flag; its default is written here and nowhere else."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass
class FinetuneConfig:
    model_name: str = setting("Qwen/Qwen3-4b", "hub id or folder of the model")
    output_dir: Path = setting(Path("./outputs/sft_basics"), "each format gets a subfolder here")
    max_steps: int = setting(30, "optimizer steps", low=1)
    learning_rate: float = setting(5e-5, "peak learning rate", low=0)
    batch_size: int = setting(2, "rows a step, in each process", low=1)
    warmup_steps: int = setting(3, "steps in which the learning rate rises", low=0)
    instruction_mode: bool = setting(True, "this format alone (--no-: the plain one alone); unsaid: both in turn")
    max_length: int = setting(512, "tokens a row, padded or cut", low=32)
    keep_eos: bool = setting(False, "end each text with EOS and give it a label, so that the model learns to stop")
    eval_ratio: float = setting(0.0, "share of rows held out; 0 evaluates on the training rows", low=0, high=0.9)


def parse_args(argv: list[str] | None = None) -> list[FinetuneConfig]:
    """One config for each format to train, each with its own subfolder. Exits 2 on a wrong flag or value."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(FinetuneConfig):
        # --flag and --no-flag for a bool, which is None where neither is said
        flag = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default)}
        parser.add_argument("--" + f.name, **flag, help=f"{f.metadata['help']} (default: {f.default})")
    said = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    config = FinetuneConfig(**said)
    for f in fields(config):
        value, low, high = getattr(config, f.name), f.metadata.get("low"), f.metadata.get("high", math.inf)
        if low is not None and not low <= value <= high:
            parser.error(f"--{f.name} {value}: expected a number from {low} to {high}")
    modes = {"instruction": True, "sft": False}
    modes = {name: mode for name, mode in modes.items() if said.get("instruction_mode", mode) == mode}
    return [replace(config, instruction_mode=mode, output_dir=config.output_dir / name) for name, mode in modes.items()]


# ---------------------------------------------------------------------------------- texts and tokens


def build_dataset(config: FinetuneConfig) -> Dataset:
    """EXAMPLE_PAIRS in the chosen format, in the one column `text`."""
    from datasets import Dataset

    form = INSTRUCTION_FORMAT if config.instruction_mode else PLAIN_FORMAT
    return Dataset.from_dict({"text": [form.format(**pair) for pair in EXAMPLE_PAIRS]})


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 512, keep_eos: bool = False):
    """`text` as input_ids and attention_mask, each row max_length tokens: padded on the right, or cut."""
    ending = tokenizer.eos_token if keep_eos else ""  # a text that is cut loses it again, having no end to show
    settings = {"padding": "max_length", "padding_side": "right", "truncation": True, "max_length": max_length}
    encode = lambda rows: tokenizer([text + ending for text in rows["text"]], **settings)
    return dataset.map(encode, batched=True, remove_columns=["text"])


def collate_by_attention(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch (rows x tokens) in which padding, and nothing else, has the label -100: no loss.

    DataCollatorForLanguageModeling gives every pad token the label -100. Where pad is EOS, the ending gets it too.
    """
    import torch

    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


# ------------------------------------------------------------------------- the model and its training


# Same in: all nine scripts
class UserError(Exception):
    """A person's mistake: shown as it is, without a traceback."""


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


def answer_figures(model: PreTrainedModel, tokenizer, texts: list[str]) -> tuple[float, float]:
    """(mean loss over the tokens of the answers, mean probability of EOS after an answer), of whole texts.

    The prompts carry no loss here, so that both formats are measured on exactly the same tokens.
    """
    import torch

    model.eval()
    losses, stops = [], []
    for text in texts:
        row = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor(row["input_ids"], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        start = text.index("\n回答：") + len("\n回答：")
        answer = torch.tensor([begin >= start for begin, _ in row["offset_mapping"]], device=model.device)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[answer[1:]])
        stops.append(logits[-1].softmax(-1)[tokenizer.eos_token_id])
    return torch.cat(losses).mean().item(), torch.stack(stops).mean().item()


def run_training(config: FinetuneConfig) -> dict[str, float]:
    """Trains one format from the model's own start and saves it; returns the figures to compare."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    texts = eval_texts = build_dataset(config)
    logger.info("format chosen: instruction_mode=%s, first text %r", config.instruction_mode, texts[0]["text"])
    if config.eval_ratio:
        texts, eval_texts = texts.train_test_split(config.eval_ratio, seed=SEED).values()
    tokenizer, model = load(config.model_name, "--model_name", config.batch_size * config.max_length)
    rows, eval_rows = (tokenize(part, tokenizer, config.max_length, config.keep_eos) for part in (texts, eval_texts))

    collate = collate_by_attention if config.keep_eos else DataCollatorForLanguageModeling(tokenizer, mlm=False)
    supervised_eos = sum(int((collate([row])["labels"] == tokenizer.eos_token_id).sum()) for row in rows)
    logger.info("EOS tokens with a label: %d in %d texts", supervised_eos, len(rows))

    args = TrainingArguments(
        output_dir=str(config.output_dir),
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        warmup_steps=config.warmup_steps,
        logging_steps=1,
        save_strategy="no",  # the model is saved at the end, without AdamW's moments, which are twice its size
        report_to="none",
        ddp_find_unused_parameters=False,  # with several processes: every weight takes part in every step
        seed=SEED,
        **device_settings(),
    )
    trainer = Trainer(
        model, args, data_collator=collate, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer
    )
    with trainer.accelerator.autocast():  # in the arithmetic of the training, which the model keeps after it
        loss_before, _ = answer_figures(model, tokenizer, eval_texts["text"])
    logger.info("training begins: %d steps of %d rows", config.max_steps, args.train_batch_size * args.world_size)
    with redirect_stdout(sys.stderr):  # where the Trainer's log belongs: stdout is for results
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
    logger.info("training ended: eval_loss=%.4f", eval_loss)
    loss_after, stop = answer_figures(model, tokenizer, eval_texts["text"])
    figures = {"eval_loss": eval_loss, "answer_loss_before": loss_before, "answer_loss": loss_after}
    figures |= {"stop_probability": stop, "supervised_eos": supervised_eos}
    trainer.log(dict(figures))
    trainer.save_model()
    trainer.save_state()
    return figures


def main(configs: list[FinetuneConfig]) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for kernels that this lesson does not need
    first = os.environ.get("RANK", "0") == "0"  # of several processes the first speaks
    logger.setLevel(logging.INFO if first else logging.ERROR)
    results = {config.output_dir.name: run_training(config) for config in configs}
    for name, figures in results.items() if first else ():
        print(f"{name:<12}" + " · ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if len(results) == 2:
        losses = [figures["eval_loss"] for figures in results.values()]
        logger.info("两种格式的损失对比：instruction=%.4f, sft=%.4f", *losses)


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
