"""Ask a fine-tuned model one question and watch the answer come, or a file of questions and keep the answers.

    python inference.py                                       # a built-in question to Qwen_finetuning_model/
    python inference.py --model models/merged --instruction "What is LoRA?"
    echo "解释LoRA" | python inference.py --instruction -          # - reads the question from stdin
    python inference.py --input_file questions.jsonl --output_file answers.jsonl

Reads   --model: the adapter folder that qwen_finetuning.py writes, a merged folder, or a hub id
        --input_file: a question a line, {"instruction": "什么是LoRA？"} or {"messages": [...]}
Writes  the answer to stdout; to stderr how long it took and why it ended
        --output_file: the same lines in the same order, each with "answer" and "ended"; a killed run goes on

The folder brings all that an answer depends on: the chat template with the training's system prompt, the
tokens that end an answer, and whether the base was in 4 bits. For a conversation there is chat.py.
"""

import json
import logging
import os
import re
import sys
import time
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could steer a terminal; unlike line breaks and tabs
REFUSED = {"prompt", "history", "conversations", "functions", "images", "image", "audio", "video"}
REFUSED |= {"answer", "ended"}  # these two are written
INSTRUCTION = "用三句话解释什么是LoRA微调，以及它为什么节省显存。"


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
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

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.batch_size) < 1:
            raise ValueError("--max_new_tokens and --batch_size are 1 or more")
        if self.input_file and (self.input or self.instruction != INSTRUCTION):
            raise ValueError("--input_file brings the questions: leave --instruction and --input out")


# Same in: chat.py, data_integration.py, data_set_generation.py, evaluate.py, inference.py, merge_model.py
def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line; an unknown or shortened flag is an error (exit 2)."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return Config(**vars(cli.parse_args(argv)))


def main(config: Config) -> None:
    import torch
    from transformers import TextStreamer

    model, tokenizer = load_model(config.model)
    torch.manual_seed(config.seed)
    if config.input_file:
        return answer_file(config, model, tokenizer)
    instruction = sys.stdin.read().strip() if config.instruction == "-" else config.instruction
    prompt = prompt_of({"instruction": instruction, "input": config.input}, config, tokenizer)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    show = streamer.on_finalized_text
    streamer.on_finalized_text = lambda text, stream_end=False: show(CONTROL.sub("\ufffd", text), stream_end)
    started = time.monotonic()
    [(_, tokens, ended)] = answers_to([prompt], config, model, tokenizer, streamer=streamer)
    speed = tokens / (time.monotonic() - started)
    print(f"{tokens} tokens, {speed:.1f} tokens/s, {ended}", file=sys.stderr)


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


def prompt_of(record: dict, config: Config, tokenizer) -> list[int]:
    """Token ids of a question that waits for its answer; control tokens that a person typed stay text."""
    if unread := sorted(REFUSED & {key for key, value in record.items() if value}):
        raise ValueError(f"{', '.join(unread)}: this is not read here")
    question = "\n补充信息：".join(record[key] for key in ("instruction", "input") if record.get(key))
    messages = list(record.get("messages") or [{"role": "user", "content": question}])
    while messages and messages[-1]["role"] == "assistant":  # a training record brings its answer along
        messages.pop()
    if not messages or not messages[-1].get("content"):
        raise ValueError("there is no question: expected instruction or messages")
    if system := config.system_prompt or record.get("system"):
        others = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": system}, *others]
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
    if config.thinking != "auto":
        template = str(tokenizer.chat_template)
        if "enable_thinking" not in template or template.startswith("{%- set enable_thinking"):
            raise ValueError("--thinking: the chat template has no enable_thinking, or the training fixed it")
        options["enable_thinking"] = config.thinking == "on"
    try:
        return tokenizer.apply_chat_template(messages, tools=record.get("tools") or None, **options)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template refuses it: {error}") from None


def answers_to(prompts: list[list[int]], config: Config, model, tokenizer, streamer=None) -> list[tuple]:
    """(text, number of tokens, how it ended) of each answer; greedy ones are as if asked alone."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    longest = max(map(len, prompts))
    room = min(config.max_new_tokens, positions - longest)
    if room < 1:
        raise ValueError(f"{longest} tokens leave no room for an answer in {positions} positions")
    if len(prompts) > 1 and room < config.max_new_tokens:  # a long one must not take the others' room
        return [answers_to([prompt], config, model, tokenizer)[0] for prompt in prompts]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    options = {"do_sample": config.temperature != 0, "temperature": config.temperature, "top_p": config.top_p}
    options |= {"top_k": 0, "repetition_penalty": 1.0, "use_cache": True}  # whatever the model's own are
    output = model.generate(**batch, **options, max_new_tokens=room, streamer=streamer)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for ids in output[:, batch["input_ids"].shape[1] :].tolist():
        tokens = next((n for n, token in enumerate(ids, 1) if token in ends), None)
        text = tokenizer.decode(ids[:tokens], skip_special_tokens=True).strip()
        answers.append((text, tokens or len(ids), "ended by itself" if tokens else "cut at the limit"))
    return answers


def answer_file(config: Config, model, tokenizer) -> None:
    """Answer a file of questions, longest first. What is done lies in OUTPUT.partial until all are: a killed
    run goes on from there."""
    from tqdm import tqdm

    records, prompts, done = [], {}, {}  # both by number, prompt ids and settings
    weights = [path.stat().st_mtime_ns for path in sorted(Path(config.model).glob("*.safetensors"))]
    same = [config.model, weights, config.max_new_tokens, config.temperature, config.top_p, config.seed]
    for n, line in enumerate(Path(config.input_file).read_text(encoding="utf-8-sig").split("\n"), 1):
        try:
            if line.strip():
                records.append(json.loads(line))
                prompt = prompt_of(records[-1], config, tokenizer)
                prompts[str([n, prompt, *same])] = prompt
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{config.input_file}:{n}: no question: {error}") from None
    partial, whole = (Path(f"{config.output_file}.{word}") for word in ("partial", "whole"))
    if partial.is_file():
        os.truncate(partial, partial.read_bytes().rfind(b"\n") + 1)  # a kill may have cut its last line
        done = dict(map(json.loads, partial.read_text(encoding="utf-8").split("\n")[:-1]))
    waiting = sorted(prompts.keys() - done.keys(), key=lambda key: (-len(prompts[key]), key))
    with open(partial, "a", encoding="utf-8", buffering=1) as file:  # each line at once
        for start in tqdm(range(0, len(waiting), config.batch_size), desc="batches", disable=None):
            keys = waiting[start : start + config.batch_size]
            answers = answers_to([prompts[key] for key in keys], config, model, tokenizer)
            for key, (text, _, ended) in zip(keys, answers, strict=True):
                done[key] = {"answer": text, "ended": ended}
                file.write(json.dumps([key, done[key]]) + "\n")
    rows = [record | done[key] for record, key in zip(records, prompts, strict=True)]
    whole.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    whole.replace(config.output_file)
    partial.unlink()
    print(f"{len(rows)} answers: {config.output_file}", file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError, UserWarning) as error:  # a person's mistake; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
