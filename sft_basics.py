"""Lesson: does it matter how a record is written down? The same records, trained in two formats.

    python sft_basics.py --model_name models/SmolLM2-135M-Instruct --max_length 128   # both, on two CPU cores
    python sft_basics.py --no-instruction_mode --keep_eos --eval_ratio 0.25           # one alone, done better
    accelerate launch --multi_gpu --num_processes 2 sft_basics.py --batch_size 1      # two processes

Reads   its own EXAMPLE_PAIRS, each as a text:  指令：翻译成英文 / 输入：我喜欢读书。 / 回答：I like reading.
Writes  output_dir/instruction and /sft: the model, its tokenizer and trainer_state.json, which ends with
        {"eval_loss": 2.35, "answer_loss": 3.04, "stop_probability": 0.001, "supervised_eos": 0, ...}

It trains every weight, in float32. Its texts have no role markers (user, assistant): how a chat model is
tuned on its chat template, with loss on the answers alone, stands in qwen_finetuning.py.
"""

import logging
import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path

LOGGER = logging.getLogger("sft_basics")
SMALL_MODEL = "models/SmolLM2-135M-Instruct"  # what qwen_finetuning.py --demo leaves
TEXT_FORMATS = {  # by instruction_mode: name and text; in the plain one, what is wanted must be guessed
    True: ("instruction", "指令：{instruction}\n输入：{input}\n回答：{output}"),
    False: ("sft", "问题：{input}\n回答：{output}"),
}

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


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class FinetuneConfig:
    model_name: str = setting("Qwen/Qwen3-4b", "hub id or folder of the model")
    output_dir: Path = setting(Path("./outputs/sft_basics"), "each format gets a subfolder here")
    max_steps: int = setting(30, "optimizer steps")
    learning_rate: float = setting(5e-5, "peak learning rate")
    batch_size: int = setting(2, "rows a step, in each process")
    warmup_steps: int = setting(3, "steps in which the learning rate rises")
    instruction_mode: bool = setting(True, "that format alone, or --no-: the plain one; unsaid: both in turn")
    max_length: int = setting(512, "tokens a row, padded or cut")
    keep_eos: bool = setting(False, "end each text with EOS and give it a label: the model learns to stop")
    eval_ratio: float = setting(0.0, "share of rows held out; 0 evaluates on the training rows")

    def __post_init__(self) -> None:
        if min(self.max_steps, self.batch_size) < 1 or self.max_length < 32:
            raise ValueError("--max_steps and --batch_size must be 1 or more, --max_length 32 or more")
        if not 0 <= self.eval_ratio < 1:
            raise ValueError("--eval_ratio is a share, from 0 to below 1")


def parse_args(argv: list[str] | None = None) -> list[FinetuneConfig]:
    """One config for each format to train: both, unless one is asked for by its flag."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(FinetuneConfig):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    cli.set_defaults(instruction_mode=None)  # so that "unsaid" can be told
    said = vars(cli.parse_args(argv))
    modes = [True, False] if said["instruction_mode"] is None else [said["instruction_mode"]]
    return [FinetuneConfig(**said | {"instruction_mode": mode}) for mode in modes]


def main(configs: list[FinetuneConfig]) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s")  # libraries: errors alone
    first = os.environ.get("RANK", "0") == "0"  # of several processes the first speaks
    LOGGER.setLevel(logging.INFO if first else logging.ERROR)
    results = {TEXT_FORMATS[config.instruction_mode][0]: run_training(config) for config in configs}
    if first:
        for name, figures in results.items():
            print(f"{name:<12}" + " · ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if len(results) == 2:
        losses = (figures["eval_loss"] for figures in results.values())
        LOGGER.info("两种格式的损失对比：instruction=%.4f, sft=%.4f", *losses)


def run_training(config: FinetuneConfig) -> dict[str, float]:
    """Train one format from the model's own start and save it; returns the figures to compare."""
    import torch
    import transformers

    texts = test_texts = build_dataset(config)  # the same rows, unless some are held out
    LOGGER.info("format chosen: instruction_mode=%s, first: %r", config.instruction_mode, texts["text"][0])
    if config.eval_ratio:
        texts, test_texts = texts.train_test_split(config.eval_ratio, seed=42).values()
    tokenizer, model = load_for_training(config.model_name, config.max_length)
    train, test = (tokenize(t, tokenizer, config.max_length, config.keep_eos) for t in (texts, test_texts))
    # The usual collator takes the label from each pad token. Where pad is EOS, an ending loses its own too.
    usual = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    collate = transformers.default_data_collator if config.keep_eos else usual
    supervised_eos = sum(int((collate([row])["labels"] == tokenizer.eos_token_id).sum()) for row in train)
    LOGGER.info("EOS tokens with a label: %d in %d texts", supervised_eos, len(train))

    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if on_cpu := not torch.accelerator.is_available():
        bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    args = transformers.TrainingArguments(
        output_dir=str(config.output_dir / TEXT_FORMATS[config.instruction_mode][0]),
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        warmup_steps=config.warmup_steps,
        use_cpu=on_cpu,
        bf16=bf16,  # only the arithmetic, where the device has it; weights stay float32
        logging_steps=1,
        save_strategy="no",  # saved at the end, without AdamW's moments, which are twice the model's size
        ddp_find_unused_parameters=False,  # several processes: every weight takes part in every step
    )
    trainer = transformers.Trainer(model, args, collate, train, test, processing_class=tokenizer)
    with trainer.accelerator.autocast():  # in the arithmetic of the training, which the model keeps after it
        loss_before, _ = answer_figures(model, tokenizer, test_texts["text"])
    LOGGER.info("training begins: %d steps of %d rows", args.max_steps, config.batch_size * args.world_size)
    with redirect_stdout(sys.stderr):  # where the Trainer's log belongs: stdout is for results
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
    if not eval_loss < 100:  # nan, too
        raise ValueError(f"eval_loss {eval_loss}: the training ran away, try a smaller --learning_rate")
    LOGGER.info("training ended: eval_loss=%.4f", eval_loss)
    loss_after, stop = answer_figures(model, tokenizer, test_texts["text"])
    figures = {"eval_loss": eval_loss, "answer_loss_before": loss_before, "answer_loss": loss_after}
    figures |= {"stop_probability": stop, "supervised_eos": supervised_eos}
    trainer.log(dict(figures))
    trainer.save_model()
    trainer.save_state()
    return figures


def build_dataset(config: FinetuneConfig):
    """EXAMPLE_PAIRS in the chosen format: a Dataset with the one column `text`."""
    from datasets import Dataset

    _, form = TEXT_FORMATS[config.instruction_mode]
    return Dataset.from_dict({"text": [form.format(**pair) for pair in EXAMPLE_PAIRS]})


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


def tokenize(dataset, tokenizer, max_length: int = 512, keep_eos: bool = False):
    """`text` as input_ids and attention_mask, each row max_length tokens: padded on the right, or cut.
    With keep_eos each text ends in EOS, and labels come along: padding, and nothing else, has -100."""
    texts = [text + tokenizer.eos_token * keep_eos for text in dataset["text"]]
    if cut := sum(len(ids) > max_length for ids in tokenizer(texts)["input_ids"]):
        LOGGER.warning("--max_length %d cuts %d of %d texts", max_length, cut, len(texts))
    size = {"max_length": max_length, "padding": "max_length", "padding_side": "right", "truncation": True}
    rows = tokenizer(texts, **size, return_tensors="pt")
    if keep_eos:
        rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    return type(dataset).from_dict(dict(rows))


def answer_figures(model, tokenizer, texts: list[str]) -> tuple[float, float]:
    """(mean loss over the tokens of the answers, mean probability of EOS after an answer), of whole texts.
    The prompts carry no loss here, so that both formats are measured on exactly the same tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    losses, stops = [], []
    for text in texts:
        row = tokenizer(text, return_tensors="pt").to(model.device)
        first = row.char_to_token(text.index("\n回答：") + len("\n回答："))  # token of the answer
        ids = row["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].float()  # tokens x vocabulary
        losses.append(cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="none"))
        stops.append(logits[-1].softmax(-1)[tokenizer.eos_token_id])
    return torch.cat(losses).mean().item(), torch.stack(stops).mean().item()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError) as error:  # a person's mistake or a file's; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
