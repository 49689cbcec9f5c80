"""Merge an adapter into its base model and prove that the result still does what was trained.

    python merge_model.py --adapter outputs/checkpoint-final --output models/merged
    python merge_model.py --adapter outputs/demo/checkpoint-final --output models/demo-merged

Reads   the adapter with its finetune_config.json, the base model, the held-out rows of the training (held_out.jsonl)
Writes  models/merged/   an ordinary model folder: sharded safetensors, tokenizer with chat template, generation_config
                         with the stop tokens, finetune_config.json, a model card

An adapter trained on 4-bit weights learnt to correct *those* weights. Added to the original 16-bit ones it meets a
base it has never seen, and bfloat16's 8 bits of precision round much of a small update away. So the sum is made in
float32, layer by layer, and `auto` measures on which base and in which type the result stays closest to what was
trained.
Merging into 4-bit layers would round once more and is not offered.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:  # for annotations only: importing transformers takes seconds, and --help should not
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# 4 bits as in the training: NF4, double quantisation
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# One fixed conversation; its token ids are part of the fingerprint that training and inference compare.
PROBE = [
    {"role": "user", "content": "你好, 1+1=?"},
    {"role": "assistant", "content": "2。"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]
# What the merged model and the adapter are compared on: their logits at every position of these prompts.
PROMPTS = (
    "Who are you?",
    "用三句话解释什么是LoRA微调。",
    "What is the capital of France?",
    "静态随机存储器（SRAM）为什么比DRAM快？",
    "Write a Python function that reverses a string.",
    "CRISPR-Cas9 如何识别目标DNA序列？",
)
# Largest mean KL divergence, in nats, that storing and running in a type may cost.
LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-2}
HELD_OUT_ROWS = 32  # enough to tell the candidates apart
CARD = """---
base_model: {base}
library_name: transformers
---
# Merged model

An adapter from supervised fine-tuning, merged into `{base}`.

- base weights under the adapter: {base_weights}
- stored as: {dtype}
- training data: {rows} rows of a file with the SHA-256 `{sha256}`
- held-out loss after training: {loss}

`finetune_config.json` holds all settings of the run. The base model's licence applies.
"""

# ----------------------------------------------------------------------------------------- settings


# Same in: all nine scripts
def setting(default, help: str, **extra):
    """A dataclass field that is also a command-line flag; its default is written here and nowhere else."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass
class Config:
    adapter: Path = setting(Path("outputs/checkpoint-final"), "adapter folder to merge")
    output: Path = setting(Path("models/merged"), "folder of the merged model")
    base_weights: str = setting(
        "auto",
        "weights under the adapter: the original ones, or the dequantised 4-bit ones it was trained on",
        choices=("auto", "original", "dequantized"),
    )
    dtype: str = setting("auto", "type of the stored weights", choices=("auto", "float16", "bfloat16", "float32"))
    verify: bool = setting(True, "reload the result and compare it with the adapter")
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


def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line."""
    return Config(**vars(settings_parser(Config, __doc__).parse_args(argv)))


# -------------------------------------------------------------------------------------------- files


# Same in: all nine scripts
class UserError(Exception):
    """A person's mistake: shown as it is, without a traceback."""


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


# Same in: evaluate.py, merge_model.py, qwen_finetuning.py
def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)


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


# Same in: chat.py, evaluate.py, inference.py, merge_model.py, qwen_finetuning.py
def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What tells two chat formats apart: the template's SHA-256 and the token ids of one fixed conversation."""
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    probe_ids = tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=False)
    return {"sha256": hashlib.sha256(template.encode()).hexdigest(), "probe_ids": list(probe_ids)}


def merge_faults(config: Config) -> list[str]:
    """What is wrong with the folders that the settings name, one line each."""
    settings, faults = config.adapter / "adapter_config.json", []
    if not settings.is_file():
        faults.append(f"{config.adapter}: no adapter there (no adapter_config.json); pass --adapter")
    elif fault := model_fault(str(config.adapter)):
        faults.append(fault)
    elif json.loads(settings.read_text(encoding="utf-8")).get("peft_type") != "LORA":
        faults.append(f"{config.adapter}: no LoRA adapter; only those are merged here")
    elif config.base_weights == "dequantized" and not read_run(config.adapter).get("settings", {}).get("load_in_4bit"):
        faults.append("--base_weights dequantized: this adapter was not trained on 4-bit weights; take original")
    elif os.path.isdir(base := base_of(config.adapter, read_run(config.adapter))) and (
        os.path.realpath(base) == os.path.realpath(config.output)
    ):
        faults.append(f"{config.output} is the base model of this adapter; pass another --output")
    if config.output.exists() and "merged" not in read_run(config.output):
        faults.append(f"{config.output} exists and is no merged model of this script; pass another --output")
    return faults


def rows_to_measure(adapter: Path, run: dict) -> list[dict]:
    """The first rows that training held out, as `input_ids` and `labels`, from the file it left; [] without one.

    Raises UserError with file:line for one that can not be read.
    """
    places = [adapter.parent / "held_out.jsonl", run.get("held_out_file", "")]  # the first also after a move
    path, rows = next(filter(os.path.isfile, places), os.devnull), []
    beside = read_run(Path(path).parent)  # a later training may have left others there
    if beside and any(beside.get(key) != run.get(key) for key in ("held_out", "chat_template")):
        print(f"{path} is of another training than this adapter, so nothing is measured with it", file=sys.stderr)
        return []
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, HELD_OUT_ROWS), start=1):
            try:
                row = json.loads(line)
                rows.append({"input_ids": list(row["input_ids"]), "labels": list(row["labels"])})
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                fault = f"no row of input_ids and labels ({error}); delete the file to merge without measuring"
                raise UserError(f"{path}:{number}: {fault}") from None
    return rows


# --------------------------------------------------------------------------------------- the merge


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


def dequantize(model: PreTrainedModel) -> None:
    """Turn the 4-bit layers into plain ones of the model's type, each freed before the next one is turned.

    The library's `model.dequantize()` keeps them all until the last: 0.7 GiB more for a model of 2.9. Must come before
    any forward, which repacks 4-bit weights on CPUs with AVX512-BF16: packed ones dequantise to rubbish (bitsandbytes
    0.50.2).
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            with torch.device("meta"):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = torch.nn.Parameter(dequantize_bnb_weight(layer.weight).to(model.dtype), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
            layer.weight = None  # it refers back to its layer, so that neither would go by itself
    model.hf_quantizer.remove_quantization_config(model)


class Merge:
    """Loads the base model as often as it takes: 4-bit, dequantised or as it is, with the adapter beside or in it."""

    def __init__(self, config: Config, run: dict):
        self.adapter, self.trust_remote_code = str(config.adapter), config.trust_remote_code
        self.base, self.revision = base_of(config.adapter, run), run.get("base_revision") or "main"
        self.four_bit = bool(run.get("settings", {}).get("load_in_4bit"))
        self.dtype = run.get("dtype", "bfloat16")  # in which the training computed

    def with_adapter(self, base_weights: str, dtype: str) -> PreTrainedModel:
        """Base on the CPU, adapter beside it.

        Its weights are `original`, in the type of their files, or `quantized` or `dequantized`, in the type of the
        training. Where that was float32 they are in `dtype`: a dequantised base would take twice the room.
        """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        gc.collect()  # the model before this one; PEFT's and the hooks' references go in circles
        four_bit = base_weights != "original"
        if base_weights == "original":
            dtype = "auto"
        elif self.dtype != "float32":
            dtype = self.dtype
        with explaining("base model", self.base), reading_in_pieces():
            quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype) if four_bit else None
            model, report = AutoModelForCausalLM.from_pretrained(
                self.base,
                revision=self.revision,
                dtype=dtype,
                quantization_config=quantization,
                device_map={"": "cpu"},
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
            if missing := sorted(report["missing_keys"]):  # the library fills them with random numbers and goes on
                raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
        if base_weights == "dequantized":
            dequantize(model)
        with explaining("adapter", self.adapter):
            return PeftModel.from_pretrained(model, self.adapter).eval()  # keeps the adapter in float32

    def merged(self, base_weights: str, dtype: str) -> PreTrainedModel:
        """The merged model, stored in `dtype`; each layer's sum is made in float32.

        One layer at a time is in float32, so that the peak is little above the 16-bit model.
        """
        import torch
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self.with_adapter(base_weights, dtype)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.get_base_layer().float()
                module.merge()
                module.get_base_layer().to(getattr(torch, dtype))
        return model.unload().to(getattr(torch, dtype))  # takes the adapter layers out; the sums stay


def run_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Let a 16-bit model compute in float32 without holding a float32 copy.

    Each layer is wide only while it runs. The vocabulary's two matrices, the largest of all, never are: what is looked
    up is widened, and the output head works in slices.
    """
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stored = {parameter: parameter.dtype for parameter in model.parameters()}

    def widen(module, args):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(module, args, output):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(stored[parameter])

    def score(hidden):
        parts = [torch.nn.functional.linear(hidden, rows.float()) for rows in head.weight.split(8192)]
        return torch.cat(parts, dim=-1) + (0 if head.bias is None else head.bias.float())

    sliced = type(head) is torch.nn.Linear  # and no adapter on it
    if sliced:
        head.forward = score
    embedding.register_forward_hook(lambda module, args, output: output.float())
    for module in model.modules():
        if module is not embedding and not (sliced and module is head):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)
    return model


def logits_on_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Logits at every position of PROMPTS, float32, shape (positions, vocabulary)."""
    import torch

    parts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            parts.append(model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float())
    return torch.cat(parts)


def compare(reference: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    """How far two models are apart on the same positions: largest logit difference, mean KL in nats, equal top tokens.

    Both tensors have the shape (positions, vocabulary); the KL divergence is of `found` from `reference`.
    """
    largest, divergence, same = 0.0, 0.0, 0
    for one, other in zip(reference.split(8), found.split(8), strict=True):  # float64 takes room
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        largest = max(largest, (one - other).abs().max().item())
        divergence += (p.exp() * (p - q)).sum().item()
        same += (one.argmax(-1) == other.argmax(-1)).sum().item()
    positions = len(reference)
    mean_kl = max(divergence / positions, 0.0)
    return {"largest_logit_difference": largest, "mean_kl": mean_kl, "same_top_token": same / positions}


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


def return_freed_memory() -> None:
    """Have glibc hand back each block above 1 MiB when it is freed.

    By default it learns to keep blocks of up to 32 MiB for later, and several models in a row leave gigabytes behind.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # -3 is M_MMAP_THRESHOLD


def is_finite(model: PreTrainedModel) -> bool:
    """Whether all weights are numbers: float16 ends at 65504, and a training that went astray leaves NaN."""
    parts = (part for parameter in model.parameters() for part in parameter.detach().flatten().split(2**24))
    return all(part.isfinite().all() for part in parts)  # of a whole matrix it would make several copies


def measured(model: PreTrainedModel, base_weights: str, dtype: str, rows: list[dict]) -> dict:
    """A line of the table, also printed: the loss on held-out rows; infinite where a weight or sum overflows."""
    loss = held_out_loss(model, rows)
    loss = loss if math.isfinite(loss) and is_finite(model) else math.inf
    print(f"{base_weights:<14}{dtype:<11}{loss:.4f}", flush=True)
    return {"base_weights": base_weights, "dtype": dtype, "loss": loss}


def choose(merge: Merge, config: Config, rows: list[dict]) -> tuple[str, str, list[dict]]:
    """(base weights, dtype, table of measured losses) for the merge.

    With held-out rows and something left to choose, each candidate is made and its loss measured. The one closest to
    the loss of the function that was trained wins: what was judged is what is kept. (A lower loss on another base is
    luck on few rows, as a higher one is.) Raises UserError where the adapter itself is broken.
    """
    bases = ["original", "dequantized"] if merge.four_bit else ["original"]
    bases = bases if config.base_weights == "auto" else [config.base_weights]
    dtypes = ["float16", "bfloat16"] if config.dtype == "auto" else [config.dtype]
    if len(bases) * len(dtypes) == 1:
        return bases[0], dtypes[0], []
    if not rows:
        base, dtype = bases[-1], dtypes[0]
        if dtype != dtypes[-1] and not is_finite(merge.merged(base, dtype)):
            dtype = dtypes[-1]
        print(f"no held-out rows to measure with: taking {base} base weights and {dtype}")
        return base, dtype, []

    print(f"{'base weights':<14}{'stored as':<11}loss on {len(rows)} held-out rows")
    as_trained = merge.with_adapter("quantized" if merge.four_bit else "original", merge.dtype)
    trained = measured(as_trained, "as trained", "adapter", rows)
    del as_trained  # before the others are loaded
    if trained["loss"] == math.inf:
        raise UserError(f"{merge.adapter}: its loss is no number, so the adapter is broken; take a checkpoint")
    table = [measured(merge.merged(base, dtype), base, dtype, rows) for base in bases for dtype in dtypes]
    best = min(table, key=lambda entry: abs(entry["loss"] - trained["loss"]))
    return best["base_weights"], best["dtype"], [trained, *table]


def verify(merge: Merge, folder: Path, base_weights: str, dtype: str, tokenizer) -> dict[str, float]:
    """Reload what was written, compare it with the adapter on the same base weights. Raises UserError past LIMITS."""
    from transformers import AutoModelForCausalLM

    reference = logits_on_prompts(run_in_float32(merge.with_adapter(base_weights, dtype)), tokenizer)
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=merge.trust_remote_code)
    found = compare(reference, logits_on_prompts(model, tokenizer))
    print(
        f"reloaded against the adapter on {len(reference)} positions: largest logit difference "
        f"{found['largest_logit_difference']:.3f}, mean KL {found['mean_kl']:.1e}, "
        f"same top token {found['same_top_token']:.3f}"
    )
    if not found["mean_kl"] <= LIMITS[dtype]:
        raise UserError(
            f"the merged model is not what was trained: mean KL {found['mean_kl']:.1e}, allowed for {dtype} "
            f"{LIMITS[dtype]:.0e}. Nothing was written; try --dtype float32, or serve the adapter beside its base"
        )
    return found


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


def write_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: dict) -> None:
    """Save model, tokenizer and a model card."""
    generation = model.generation_config
    if not generation.do_sample:  # saving refuses sampling settings that nothing uses, and some models have them
        generation.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
    generation.eos_token_id = stop_tokens(model, tokenizer, run)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    base_weights, loss = run["merged"]["base_weights"], run.get("result", {}).get("loss_after")
    card = CARD.format(
        base=run["base_model"],
        base_weights=base_weights + " (4-bit NF4, as in training)" * (base_weights == "dequantized"),
        dtype=run["merged"]["dtype"],
        rows=run.get("ledger", {}).get("train", "unknown"),
        sha256=run.get("dataset", {}).get("sha256", "unknown"),
        loss=f"{loss:.3f} nats per token" if isinstance(loss, float) else "not measured",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(config: Config) -> None:
    if faults := merge_faults(config):
        raise UserError("\n".join(faults))
    run = read_run(config.adapter)
    rows = rows_to_measure(config.adapter, run)
    quiet_libraries()
    return_freed_memory()
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    merge, trained = Merge(config, run), run.get("chat_template", {})
    place = str(config.adapter) if (config.adapter / "tokenizer_config.json").is_file() else merge.base
    with explaining("tokenizer", place):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=config.trust_remote_code)
        if trained and trained | fingerprint(tokenizer) != trained:
            raise UserError(
                f"{config.adapter}: the tokenizer in {place} does not write conversations as the training did"
            )

    base_weights, dtype, table = choose(merge, config, rows)
    model = merge.merged(base_weights, dtype)
    if not is_finite(model):
        raise UserError(f"a weight does not fit in {dtype} (or the adapter holds NaN); try --dtype bfloat16")
    for entry in table:
        entry["loss"] = entry["loss"] if math.isfinite(entry["loss"]) else None  # JSON has no infinity
    run["base_model"] = merge.base
    run["merged"] = {"base_weights": base_weights, "dtype": dtype, "measured": table}
    try:
        with replacing_folder(config.output) as partial:
            write_folder(partial, model, tokenizer, run)
            del model  # before two others are loaded
            if config.verify:
                run["merged"]["verified"] = verify(merge, partial, base_weights, dtype, tokenizer)
            write_json(partial / "finetune_config.json", run)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{config.output} can not be written: {error}") from None
    print(f"merged: {config.output}  ({base_weights} base weights, {dtype})")
    print(f"try it: python inference.py --model {config.output}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
