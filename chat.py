"""Talk to a fine-tuned model in the terminal.

    python chat.py                                                     # the model in Qwen_finetuning_model/
    python chat.py --temperature 0 --repetition_penalty 1 --no_repeat_ngram_size 0    # lists, code, JSON

Writes  the answers to stdout; with /save FILE.jsonl the conversation, as a line that can be trained on:
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}

By default no three tokens come twice in an answer, and what it has said becomes less likely: small models go
in circles less, but lists, tables, code and JSON are spoilt; for those take the second line.
/compare asks the base model the last question, /system TEXT sets a system message (alone: the training's).
Lines that are pasted, or stand between two lines of \"\"\", are one message and no command.
"""

import json
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could steer a terminal; unlike line breaks and tabs
HELP = "/compare  /reset  /system TEXT  /save FILE.jsonl  /help  exit; Ctrl-C stops an answer, Ctrl-D leaves"


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class Config:
    model: str = setting("Qwen_finetuning_model", "adapter folder, model folder or hub id")
    system_prompt: str = setting("", "another system message than the training's")
    max_new_tokens: int = setting(512, "longest answer in tokens")
    temperature: float = setting(0.8, "0 always takes the likeliest token; higher is freer")
    top_p: float = setting(0.9, "sample from the likeliest tokens up to this share")
    repetition_penalty: float = setting(1.3, "makes what the answer has said less likely; 1 is off")
    no_repeat_ngram_size: int = setting(3, "no run of this many tokens twice in an answer; 0 is off")


# Same in: chat.py, data_integration.py, data_set_generation.py, evaluate.py, inference.py, merge_model.py
def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line; an unknown or shortened flag is an error (exit 2)."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return Config(**vars(cli.parse_args(argv)))


def main(config: Config) -> None:
    from jinja2 import TemplateError

    if sys.stdin is None:
        raise ValueError("stdin is closed: there is nothing to answer")
    sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end a conversation
    with suppress(ImportError):  # Windows has none; Python switches off what tells a pasted text
        import_module("readline").parse_and_bind("set enable-bracketed-paste on")
    talk = Talk(config, *load_model(config.model))
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").removeprefix("\ufeff").strip()
            if line.lower() in ("exit", "quit"):
                return
            if line == '"""':
                lines = []
                with suppress(EOFError):  # the end of a piped text closes it too
                    lines.extend(iter(input, '"""'))
                talk.ask("\n".join(lines))
            elif line.startswith("/") and "\n" not in line:  # a pasted text is no command
                talk.obey(*line.split(maxsplit=1))
                print("[done]", file=sys.stderr)
            elif line:
                talk.ask(line)
        except (EOFError, BrokenPipeError):  # nobody asks any more, or reads the answers
            return
        except KeyboardInterrupt:  # at the prompt
            print()
        except (OSError, ValueError, TemplateError, RuntimeError) as error:  # also out of memory
            print(f"[{error}]", file=sys.stderr)


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


class Talk:
    """A conversation: its turns, and the key-value cache of the ids that the model has read."""

    def __init__(self, config: Config, model, tokenizer):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.turns, self.cache, self.read = [], None, []
        self.obey("/system", config.system_prompt)

    def obey(self, command: str, text: str = "") -> None:
        """Carry out a command. Raises ValueError for one that is unknown or can not be done."""
        if command == "/reset":
            self.turns = []
        elif command == "/system":
            self.system = [{"role": "system", "content": text}] if text else []
        elif command == "/compare" and self.turns and hasattr(self.model, "disable_adapter"):
            base = Talk(self.config, self.model, self.tokenizer)  # its answer to the last question
            base.system, base.turns = self.system, self.turns[:-2]
            with self.model.disable_adapter():
                base.generate(self.turns[-2])
        elif command == "/save" and text.endswith(".jsonl") and self.turns:
            path = Path(text).expanduser()
            gap = "\n" * (path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"))  # a line left open
            with open(path, "a", encoding="utf-8") as log:
                log.write(gap + json.dumps({"messages": self.system + self.turns}, ensure_ascii=False) + "\n")
        else:
            raise ValueError(HELP if command == "/help" else f"{command} {text} can not be done now. {HELP}")

    def ask(self, text: str) -> None:
        """Stream an answer; both join the conversation. One that was cut has weight 0: it is not learnt."""
        question = {"role": "user", "content": text}
        answer, cut = self.generate(question)
        if not answer:
            raise ValueError("no answer; the question is forgotten")
        self.turns += [question, {"role": "assistant", "content": answer} | ({"weight": 0} if cut else {})]

    def generate(self, question: dict) -> tuple[str, str]:
        """(the answer, streamed; how it was cut, or ""). What the cache holds is not read again."""
        import torch
        import transformers

        config, ids, parts, cut = self.config, self.prompt(question), [], "stopped"
        same = min(len(os.path.commonprefix([self.read, ids])), len(ids) - 1)  # the last one is read again
        try:
            self.cache.crop(same - len(self.read))
        except (AttributeError, RuntimeError):  # there is none; or sliding windows can not go back
            self.cache = transformers.DynamicCache(config=self.model.config)
        cache, self.cache = self.cache, None  # after Ctrl-C nobody knows what it holds

        def show(text: str, stream_end: bool = False) -> None:
            parts.append(text)
            print(CONTROL.sub("\ufffd", text), end="\n" if stream_end else "", flush=True)

        streamer = transformers.TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = show
        ngrams = transformers.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size or 2**31)
        penalty = transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty, len(ids))
        penalties = [lambda seen, scores: ngrams(seen[:, len(ids) :], scores), penalty]  # not of the prompt
        prompt = torch.tensor([ids], device=self.model.device)
        options = {"attention_mask": torch.ones_like(prompt), "past_key_values": cache, "streamer": streamer}
        options |= {"logits_processor": penalties, "repetition_penalty": 1.0, "top_k": 0}
        options |= {"do_sample": config.temperature != 0, "temperature": config.temperature}
        options |= {"top_p": config.top_p, "max_new_tokens": config.max_new_tokens, "use_cache": True}
        try:
            output = self.model.generate(prompt, **options)[0].tolist()
            self.cache, self.read, ends = cache, output[:-1], self.model.generation_config.eos_token_id
            whole = output[-1] in (ends if isinstance(ends, list) else [ends])
            cut = "" if whole else f"cut at --max_new_tokens {config.max_new_tokens}"
        except KeyboardInterrupt:
            streamer.end()
        if cut:
            print(f"[{cut}]", file=sys.stderr)
        return "".join(parts).strip().rstrip("\ufffd" if cut else ""), cut  # half a character is none

    def prompt(self, question: dict) -> list[int]:
        """Ids of the conversation with a question; where they outgrow the context, the oldest turns go."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", 2**31)
        options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
        for turns in (self.turns[n:] for n in range(0, len(self.turns) + 1, 2)):
            ids = self.tokenizer.apply_chat_template([*self.system, *turns, question], **options)
            if len(ids) + self.config.max_new_tokens <= context:
                if dropped := len(self.turns) - len(turns):
                    print(f"[context full: the {dropped} oldest messages are forgotten]", file=sys.stderr)
                self.turns = turns
                return ids
        raise ValueError(f"{len(ids)} tokens and the answer's are more than the {context} that fit")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError, UserWarning) as error:  # a person's mistake; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
