"""Talk to a fine-tuned model in the terminal.

    python chat.py                                             # the model in Qwen_finetuning_model/
    python chat.py --model outputs/demo/Qwen_finetuning_model --temperature 0

Reads   --model: an adapter folder, a checkpoint, a merged folder, a hub id or a .gguf file
Writes  the answers to stdout; with /save FILE the conversation, as a line that can be trained on:
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}

In the conversation:  /compare  the base model's answer to the last question (the adapter is switched off for it)
                      /reset  forget all   /system TEXT  another system message   /save FILE   /help   exit or quit
Ctrl-C stops an answer, Ctrl-D leaves. It keeps no conversation on disk unless told to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:  # for annotations only: importing transformers takes seconds, and --help should not
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# 4 bits as in the training: NF4, double quantisation
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# One fixed conversation; its token ids are part of the fingerprint that training and inference compare.
PROBE = [
    {"role": "user", "content": "你好, 1+1=?"},
    {"role": "assistant", "content": "2。"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]
# Marks a control token that a person typed, on its way to token ids: half a character (a lone surrogate), which no
# message holds.
BREAK = "\ud800"
HELP = "/compare  /reset  /system TEXT  /save FILE  /help  exit, quit or Ctrl-D to leave; Ctrl-C stops an answer"

# ----------------------------------------------------------------------------------------- settings


# Same in: all nine scripts
def setting(default, help: str, **extra):
    """A dataclass field that is also a command-line flag; its default is written here and nowhere else."""
    return field(default=default, metadata={"help": help, **extra})


# What a setting must be: a test of its value, and the words for it.
POSITIVE = (lambda value: 0 < value < math.inf, "above 0")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
UTF8_TEXT = (lambda value: not re.search("[\ud800-\udfff]", value), "text in UTF-8")
PART = (lambda value: 0 < value <= 1, "above 0 and at most 1")


@dataclass
class Config:
    model: str = setting("Qwen_finetuning_model", "adapter or model folder, checkpoint, hub id or .gguf file")
    system_prompt: str | None = setting(
        None, "system message; None takes the one of the training, '' none", must=UTF8_TEXT
    )
    max_new_tokens: int = setting(512, "longest answer in tokens", must=POSITIVE)
    temperature: float = setting(0.8, "0 always takes the likeliest token; higher is freer", must=NOT_NEGATIVE)
    top_p: float = setting(0.9, "sample from the likeliest tokens up to this share", must=PART)
    repetition_penalty: float = setting(1.3, "above 1: tokens of the answer so far become less likely", must=POSITIVE)
    no_repeat_ngram_size: int = setting(
        3, "no run of this many tokens twice in an answer; 0: no limit", must=NOT_NEGATIVE
    )
    seed: int = setting(3407, "the same seed and the same words give the same answers")
    load_in_4bit: bool | None = setting(None, "4-bit base weights; None does as the training did")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")


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


def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line. Exits with 2 for what can not be."""
    parser = settings_parser(Config, __doc__)
    config = Config(**vars(parser.parse_args(argv)))
    if faults := range_faults(config):
        parser.error("\n".join(faults))
    return config


# Same in: all nine scripts
class UserError(Exception):
    """A person's mistake: shown as it is, without a traceback."""


# ------------------------------------------------------------------------------------------ the prompt


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


# Same in: chat.py, evaluate.py, inference.py, merge_model.py, qwen_finetuning.py
def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What tells two chat formats apart: the template's SHA-256 and the token ids of one fixed conversation."""
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    probe_ids = tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=False)
    return {"sha256": hashlib.sha256(template.encode()).hexdigest(), "probe_ids": list(probe_ids)}


# Same in: chat.py, evaluate.py, inference.py, qwen_finetuning.py
def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


# ------------------------------------------------------------------------------------------- the model


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


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def model_fault(name: str, mend: str = "Train one with qwen_finetuning.py, or pass --model") -> str:
    """What keeps `name` from being a model to load, seen from its files alone; "" if nothing does."""
    path = Path(name)
    if os.path.isfile(name):  # unlike Path.is_file it answers for every text, however long
        wrong = f"{name} is a file; --model takes an adapter or model folder, a hub id or a .gguf file"
        return "" if path.suffix == ".gguf" else wrong
    if not os.path.isdir(name):
        hub_id = name.count("/") == 1 and not name.startswith((".", "/", "models/", "outputs/")) and len(name) <= 96
        return "" if hub_id else f"{name}: no such folder. {mend}"
    if not any(path.glob("*.safetensors")):
        return f"{name}: no *.safetensors in this folder; only that format (or a .gguf file) is read"
    if not (path / "adapter_config.json").is_file():
        return "" if (path / "config.json").is_file() else f"{name}: neither adapter_config.json nor config.json in it"
    try:
        base = base_of(path, read_run(path))
    except UserError as error:
        return str(error)
    fault = model_fault(base, "Put it there, or start from the folder where the training was started")
    return fault and f"{name} is an adapter whose base model is missing: {fault}"


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def read_run(folder: Path) -> dict:
    """The record of the run that made a model, from `finetune_config.json` beside it; {} where there is none.

    Raises UserError where a part that the scripts use is of another kind than the training writes.
    """
    path, sections = folder / "finetune_config.json", ("settings", "chat_template", "dataset", "merged")
    if not path.is_file():
        return {}
    kinds = dict.fromkeys(sections, dict) | {"max_seq_length": int, "held_out": list, "end_of_turn_ids": list}
    kinds |= dict.fromkeys(("base_model", "dtype", "held_out_file", "path", "system_prompt", "tokenizer_dir"), str)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        for part in (run, *(run.get(section, {}) for section in sections)):
            for key, value in part.items():
                if not isinstance(value, kinds.get(key, object)):
                    raise ValueError(f"{key} is {str(value)[:80]!r}")
        if not all(isinstance(id, int) for id in run.get("chat_template", {}).get("end_of_turn_ids", [])):
            raise ValueError("end_of_turn_ids are no numbers")
        return run
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{path}: not the record of a run ({error}); take the one of the training again") from None


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def base_of(folder: Path, run: dict) -> str:
    """Name of an adapter's base model, as its run or PEFT's own settings have it. Raises UserError if they are cut."""
    path = folder / "adapter_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the settings of an adapter ({error}); take the training's again") from None
    return run.get("base_model") or str(named)


# Same in: chat.py, evaluate.py, inference.py, merge_model.py
def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: dict) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, the tokenizer's, and those that the training used."""
    own = model.generation_config.eos_token_id
    trained = run.get("chat_template", {}).get("end_of_turn_ids", [])
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *trained} - {None})


# Same in: chat.py, evaluate.py, inference.py
def load_tokenizer(name: str, source: dict, run: dict) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder, else where its training left it, else that of `source`.

    `source` is what `from_pretrained` takes for the base model. Raises UserError where the tokenizer does not write
    conversations as the training did.
    """
    from transformers import AutoTokenizer

    of_training = run.get("settings", {}).get("tokenizer_dir", "Qwen_finetuning_tokenizer")
    places = (of_training, name) if os.path.isdir(name) else ()
    for folder in places:  # the last one counts: the model's own, where there is one
        if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
            source = {"pretrained_model_name_or_path": folder, "trust_remote_code": source["trust_remote_code"]}
    place = name if "gguf_file" in source else source["pretrained_model_name_or_path"]
    trained = run.get("chat_template", {})
    with explaining("tokenizer", place):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if not tokenizer.chat_template:
            raise UserError(f"{name}: its tokenizer has no chat template; take the model's chat (Instruct) form")
        if trained and trained | fingerprint(tokenizer) != trained:
            raise UserError(
                f"{name}: the tokenizer in {place} does not write conversations as the training did (its fingerprint "
                "differs from finetune_config.json); put the training's own tokenizer beside the model"
            )
    return tokenizer


# Same in: chat.py, evaluate.py, inference.py
def load_chat_model(name: str, load_in_4bit: bool | None, trust_remote_code: bool):
    """A model to talk to, its tokenizer, and the record of the run that made it ({} where there is none).

    `name` is an adapter or model folder, a checkpoint, a hub id or a .gguf file. An adapter comes back on its base
    model, in 4 bits where it was trained so. Raises UserError, before any weights are read where it can.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig

    folder, run, quantization = Path(name), read_run(Path(name)), None
    adapter, settings = (folder / "adapter_config.json").is_file(), run.get("settings", {})
    base = base_of(folder, run) if adapter else name
    source = {"pretrained_model_name_or_path": base, "revision": run.get("base_revision") or "main"}
    if folder.suffix == ".gguf":
        source |= {"pretrained_model_name_or_path": str(folder.parent), "gguf_file": folder.name}
        quantization = GgufConfig(dequantize=True)
    source["trust_remote_code"] = trust_remote_code
    tokenizer = load_tokenizer(name, source, run)

    if load_in_4bit is None:
        load_in_4bit = adapter and bool(settings.get("load_in_4bit"))
    with explaining("base model" if adapter else "model", base):
        # a merged model runs in the type that its merge found to keep what was trained
        device = find_device(load_in_4bit, run.get("merged", {}).get("dtype") or settings.get("dtype", "auto"))
        if device.four_bit:
            quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=device.dtype)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source,
            output_loading_info=True,
            dtype=device.dtype,
            quantization_config=quantization,
            attn_implementation=device.attention,
            device_map=device.device_map,
            use_safetensors=True,
        )
        if missing := sorted(report["missing_keys"]):  # the library fills them with random numbers and goes on
            raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer, run)
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    if adapter:
        from peft import PeftModel

        with explaining("adapter", name):
            model = PeftModel.from_pretrained(model, name)
    return model.eval(), tokenizer, run


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


# ------------------------------------------------------------------------------------ the conversation


# Same in: chat.py, evaluate.py, inference.py
def generation_options(config: Config, prompt_length: int) -> dict:
    """The decoding settings for `generate`. The penalties count what the model writes, not the words of the prompt."""
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    sample, processors = config.temperature > 0, []
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty, prompt_length))
    if config.no_repeat_ngram_size:
        ngrams = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        processors.append(lambda input_ids, scores: ngrams(input_ids[:, prompt_length:], scores))
    # the model's own generation_config may hold any of these; what a person did not ask for is switched off
    options = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_p": None, "typical_p": None}
    if sample:
        options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return options | {"max_new_tokens": config.max_new_tokens, "do_sample": sample, "logits_processor": processors}


# Same in: chat.py, inference.py
def safe_streamer(tokenizer: PreTrainedTokenizerBase):
    """A TextStreamer that writes the answer to stdout as it comes, and keeps it in `.text`.

    Control characters that could steer the terminal are replaced.
    """
    from transformers import TextStreamer

    class SafeStreamer(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            super().on_finalized_text(printable(text), stream_end)

    return SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Conversation:
    """The messages so far and the key-value cache of what the model has already read of them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, system: str):
        self.model, self.tokenizer, self.config, self.system = model, tokenizer, config, system
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.room = context - config.max_new_tokens
        if self.room < 1:
            raise UserError(f"--max_new_tokens must be below {context}, which is all this model can read and write")
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.turns: list[dict[str, str]] = []
        self.cache, self.read = None, []

    def messages(self) -> list[dict[str, str]]:
        """System message and turns, as a record holds them."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def prompt(self) -> list[int]:
        """Token ids of the conversation; where it outgrows the context, the oldest turns go. Raises UserError."""
        system = self.messages()[: -len(self.turns)]
        for dropped in range(0, len(self.turns), 2):
            try:
                ids = encode_prompt(system + self.turns[dropped:], self.tokenizer)
            except ValueError as error:
                raise UserError(str(error)) from None
            if len(ids) <= self.room:
                break
        else:
            raise UserError(f"{len(ids)} tokens are too long for this model: {self.room} fit before the answer")
        if dropped:
            del self.turns[:dropped]
            note = f"[the conversation outgrew the context: its {dropped} oldest messages are forgotten]"
            print(note, file=sys.stderr)
        return ids

    def ask(self, question: str) -> None:
        """Answer, streamed; question and answer join the conversation. Ctrl-C keeps what has come of the answer."""
        self.turns.append({"role": "user", "content": question})
        answer = ""
        try:
            answer = self.generate(self.prompt(), reuse=True)
        finally:
            if answer:
                self.turns.append({"role": "assistant", "content": answer})
            else:  # a question without an answer would leave two of one role in a row
                self.turns.pop()
                print("[no answer; the question is forgotten]", file=sys.stderr)

    def compare(self) -> None:
        """The base model's answer to the last question, streamed; it does not join the conversation."""
        if not hasattr(self.model, "disable_adapter"):
            raise UserError("this model has no adapter to switch off; /compare works on an adapter folder")
        if not self.turns:
            raise UserError("ask something first")
        print("[the base model:]", file=sys.stderr)
        last = self.turns.pop()
        try:
            with self.model.disable_adapter():
                self.generate(self.prompt(), reuse=False)
        finally:
            self.turns.append(last)

    def cache_for(self, ids: list[int]) -> DynamicCache:
        """The cache, cut back to what `ids` begin with, so that only the rest is read; a new one if it can not be."""
        from transformers import DynamicCache

        same = len(os.path.commonprefix([self.read, ids]))  # works on lists of any kind
        same = min(same, len(ids) - 1)  # the last token is read again: its logits begin the answer
        if self.cache is not None:
            with suppress(RuntimeError):  # layers with a sliding window may not go back
                self.cache.crop(same - len(self.read))
                return self.cache
        return DynamicCache(config=self.model.config)

    def generate(self, ids: list[int], reuse: bool) -> str:
        """Stream the answer to a prompt, given as token ids; returns its text.

        With `reuse`, what the cache holds of the prompt is not read again.
        """
        import torch

        cache = None
        if reuse:
            cache = self.cache_for(ids)
            self.cache, self.read = None, []  # after an interruption nobody knows how much a cache holds
        streamer = safe_streamer(self.tokenizer)
        input_ids = torch.tensor([ids], device=self.model.device)
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    past_key_values=cache,
                    streamer=streamer,
                    **generation_options(self.config, len(ids)),
                )
            if reuse:
                self.cache, self.read = cache, output[0, :-1].tolist()
        except KeyboardInterrupt:
            streamer.end()
            print("[stopped]", file=sys.stderr)
        return streamer.text.strip()


def save(path: Path, talk: Conversation) -> None:
    """Add the conversation to a JSONL file, as a record that can be trained on. Raises UserError where it can not."""
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: a line can only be added to a file whose name ends in .jsonl")
    if not talk.turns:
        raise UserError("there is nothing to save yet")
    try:
        with open(path, "a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            gap = b"" if file.read() in (b"", b"\n") else b"\n"  # an editor may have left the last line open
            file.write(gap + json.dumps({"messages": talk.messages()}, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    print(f"[one record added to {path}]", file=sys.stderr)


def obey(line: str, talk: Conversation) -> None:
    """Carry out a line that begins with a slash. Raises UserError for one that is unknown or can not be done."""
    command, _, text = line.partition(" ")
    text = text.strip()
    if command == "/reset":
        talk.reset()
        print("[forgotten]", file=sys.stderr)
    elif command == "/system":
        talk.system = text
        print(f"[system message: {text or 'none'}]", file=sys.stderr)
    elif command == "/compare":
        talk.compare()
    elif command == "/save" and text:
        save(Path(os.path.expanduser(text)), talk)  # unlike Path's it leaves ~nobody as it is
    elif command == "/help":
        print(HELP, file=sys.stderr)
    else:
        raise UserError(f"unknown or incomplete command {command!r}. {HELP}")


def main(config: Config) -> None:
    if not sys.stdin:
        raise UserError("chat.py needs a terminal, or a pipe on stdin")
    if fault := model_fault(config.model):
        raise UserError(fault)
    quiet_libraries()
    model, tokenizer, run = load_chat_model(config.model, config.load_in_4bit, config.trust_remote_code)

    import torch

    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  line editing and history for input()
    sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end a conversation
    torch.manual_seed(config.seed)
    system = run.get("system_prompt", "") if config.system_prompt is None else config.system_prompt
    talk = Conversation(model, tokenizer, config, system)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
            if line.lower() in ("exit", "quit"):
                return
            if line.startswith("/"):
                obey(line, talk)
            elif line:
                talk.ask(line)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # at the prompt, or before the first word of an answer
            print(file=sys.stderr)
        except torch.OutOfMemoryError:
            print("[out of memory; /save keeps the conversation, /reset makes room]", file=sys.stderr)
        except UserError as error:
            print(f"[{error}]", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads has enough, as in `python chat.py < questions.txt | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has nowhere to go
