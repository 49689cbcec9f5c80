"""Ask a fine-tuned model one question and watch the answer come, or a file of questions and keep the answers.

    python inference.py                                       # a built-in question to Qwen_finetuning_model/
    python inference.py --model models/merged --instruction "What is LoRA?"
    echo "解释LoRA" | python inference.py --instruction -          # - reads the question from stdin
    python inference.py --input_file questions.jsonl --output_file answers.jsonl

Reads   --model: the adapter folder that qwen_finetuning.py writes, a merged folder, or a hub id
        --input_file: a question a line, {"instruction": "什么是LoRA？"} or {"messages": [...]}
Writes  the answer to stdout; to stderr how long it took and why it ended
        --output_file: the same lines in the same order, each with its "answer"; a killed run goes on

The folder brings all that an answer depends on: the chat template with the training's system prompt, the
tokens that end an answer, and whether the base was in 4 bits. For a conversation there is chat.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

INSTRUCTION = "用三句话解释什么是LoRA微调，以及它为什么节省显存。"


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    shown = " ".join(default) if isinstance(default, tuple) else default
    help = f"{help} (default: {shown})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class Config:
    model: str = setting("Qwen_finetuning_model", "adapter folder, model folder or hub id")
    instruction: str = setting(INSTRUCTION, "what to ask; - reads it from stdin")
    input: str = setting("", "further material, set under the instruction as in training")
    input_file: str = setting("", "JSONL file of questions, in place of one")
    output_file: str = setting("answers.jsonl", "where their answers go")
    batch_size: int = setting(8, "with a file: questions answered at once")
    system_prompt: str = setting("", "another system message than the training's")
    thinking: str = setting("auto", "switch the template's enable_thinking", choices=("auto", "on", "off"))
    max_new_tokens: int = setting(512, "longest answer in tokens")
    temperature: float = setting(0.0, "0 always takes the likeliest token; higher is freer")
    top_p: float = setting(0.9, "with a temperature: sample from the likeliest tokens up to this share")
    seed: int = setting(3407, "with a temperature: the same seed gives the same answer")


# Same in: all nine scripts
def parser_of(config_class: type) -> argparse.ArgumentParser:
    """A parser with one flag a field of the dataclass; an unknown or shortened flag is an error (exit 2)."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    kinds = get_type_hints(config_class)
    for f in fields(config_class):
        yes_no = {"action": argparse.BooleanOptionalAction}  # --flag and --no-flag
        options = (yes_no if kinds[f.name] is bool else {"type": kinds[f.name]}) | f.metadata
        parser.add_argument(f"--{f.name}", default=f.default, **options)
    return parser


def parse_args(argv: list[str] | None = None) -> Config:
    return Config(**vars(parser_of(Config).parse_args(argv)))


def main(config: Config) -> None:
    import torch
    from transformers import TextStreamer

    model, tokenizer = load_model(config.model)
    torch.manual_seed(config.seed)
    if config.input_file:
        return answer_file(config, model, tokenizer)
    instruction = sys.stdin.read().strip() if config.instruction == "-" else config.instruction
    prompt = prompt_of({"instruction": instruction, "input": config.input}, config, tokenizer)
    streamer, started = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), time.monotonic()
    show = streamer.on_finalized_text
    streamer.on_finalized_text = lambda text, stream_end=False: show(printable(text), stream_end)
    [(_, tokens, ended)] = answers_to([prompt], config, model, tokenizer, streamer=streamer)
    speed = tokens / (time.monotonic() - started)
    print(f"{tokens} tokens, {speed:.1f} tokens/s, {ended}", file=sys.stderr)


# Same in: chat.py, evaluate.py, inference.py
def load_model(name: str):
    """(model, tokenizer) of an adapter folder, a model folder or a hub id.

    An adapter comes on its base, as adapter_config.json names it, and in 4 bits where the training had it so:
    the adapter learnt to correct exactly those rounded weights.
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
    options, words = {"dtype": dtype, "device_map": "auto", "use_safetensors": True}, name
    adapter, record = Path(name, "adapter_config.json"), Path(name, "finetune_config.json")
    if adapter.is_file():
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        options["revision"] = settings.get("revision") or "main"  # of the base
        words = name if Path(name, "tokenizer_config.json").is_file() else settings["base_model_name_or_path"]
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["settings"]["load_in_4bit"]:
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            nf4 = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
            options["quantization_config"] = nf4
    model = transformers.AutoModelForCausalLM.from_pretrained(name, **options).eval()
    if adapter.is_file() and settings.get("use_dora"):  # reads weights that bitsandbytes repacks on some CPUs
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False
    if Path(name, "generation_config.json").is_file():  # an adapter's own is not loaded by itself
        model.generation_config = transformers.GenerationConfig.from_pretrained(name)
    model.generation_config.use_cache = True  # some models are saved with it off, as in training
    return model, transformers.AutoTokenizer.from_pretrained(words)


def prompt_of(record: dict, config: Config, tokenizer) -> list[int]:
    """Token ids of a question that waits for its answer; control tokens that a person typed stay text."""
    from jinja2 import TemplateError

    question = "\n补充信息：".join(record[key] for key in ("instruction", "input") if record.get(key))
    messages = record.get("messages") or [{"role": "user", "content": question}]
    while messages and messages[-1]["role"] == "assistant":  # a training record brings its answer along
        messages = messages[:-1]
    if not messages or not messages[-1].get("content"):
        raise ValueError("there is no question: expected instruction or messages")
    if config.system_prompt:
        others = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": config.system_prompt}, *others]
    elif record.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": record["system"]}, *messages]
    options, template = {"tools": record.get("tools") or None}, str(tokenizer.chat_template)
    if config.thinking != "auto":
        if "enable_thinking" not in template or "set enable_thinking" in template[:30]:
            raise ValueError("--thinking: the chat template has no enable_thinking, or the training fixed it")
        options["enable_thinking"] = config.thinking == "on"
    options |= {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses it: {error}") from None


def answers_to(prompts: list[list[int]], config: Config, model, tokenizer, **options) -> list[tuple]:
    """(text, number of tokens, how it ended) of the answer to each prompt."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    room = min(config.max_new_tokens, positions - max(map(len, prompts)))
    if room < 1:
        raise ValueError(f"a question leaves no room for an answer: the model has {positions} positions")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    options |= {"temperature": config.temperature, "top_p": config.top_p} if config.temperature else {}
    options |= {"top_k": 0, "repetition_penalty": 1.0}  # whatever the model's own settings say
    output = model.generate(**batch, max_new_tokens=room, do_sample=config.temperature > 0, **options)
    stop, answers = model.generation_config.eos_token_id, []
    stop = stop if isinstance(stop, list) else [stop]
    for ids in output[:, batch["input_ids"].shape[1] :].tolist():
        tokens = next((n for n, token in enumerate(ids, 1) if token in stop), None)
        text = tokenizer.decode(ids[:tokens], skip_special_tokens=True).strip()
        answers.append((text, tokens or len(ids), "ended by itself" if tokens else "cut at the limit"))
    return answers


# Same in: chat.py, inference.py, qwen_finetuning.py
def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def answer_file(config: Config, model, tokenizer) -> None:
    """Answer a file of questions, longest first. What is done lies in OUTPUT.partial until all are: a killed
    run goes on from there."""
    from tqdm import tqdm

    lines = Path(config.input_file).read_text(encoding="utf-8-sig").split("\n")
    records, prompts, done = [], [], {}
    for n, line in enumerate(lines, start=1):
        try:
            if line.strip():
                records.append(json.loads(line))
                prompts.append(prompt_of(records[-1], config, tokenizer))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{config.input_file}:{n}: no question: {error}") from None
    same = [config.model, config.max_new_tokens, config.temperature, config.top_p, config.seed]
    keys = [str([n, prompt, *same]) for n, prompt in enumerate(prompts)]
    partial = Path(config.output_file + ".partial")
    if partial.is_file():
        lines = partial.read_text(encoding="utf-8").split("\n")[:-1]  # a kill may have cut the last one
        done = dict(map(json.loads, lines))
    waiting = [n for n in sorted(range(len(keys)), key=lambda n: -len(prompts[n])) if keys[n] not in done]
    with open(partial, "w", encoding="utf-8", buffering=1) as file:  # each line at once
        file.writelines(json.dumps(pair) + "\n" for pair in done.items())
        for start in tqdm(range(0, len(waiting), config.batch_size), desc="batches", disable=None):
            batch = waiting[start : start + config.batch_size]
            answers = answers_to([prompts[n] for n in batch], config, model, tokenizer)
            for n, (text, _, ended) in zip(batch, answers, strict=True):
                done[keys[n]] = {"answer": text, "ended": ended}
                file.write(json.dumps([keys[n], done[keys[n]]]) + "\n")
    rows = [records[n] | done[key] for n, key in enumerate(keys)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(config.output_file + ".whole").write_text(text, encoding="utf-8")
    os.replace(config.output_file + ".whole", config.output_file)
    partial.unlink()
    print(f"{len(rows)} answers: {config.output_file}", file=sys.stderr)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError) as error:  # a person's mistake or a file's; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
