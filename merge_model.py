"""Merge an adapter into its base model, and prove that the result still does what was trained.

    python merge_model.py --adapter outputs/checkpoint-final --output models/merged
    python merge_model.py --adapter outputs/demo/checkpoint-final --output models/demo-merged

Reads   the adapter with its finetune_config.json, its base model, the rows that the training held out
Writes  models/merged/: model, tokenizer, finetune_config.json with what was measured, model card, Modelfile

An adapter trained on 4-bit weights learnt to correct *those*; the original ones it has never seen. Which base
is nearer to what was trained is measured. All runs on the CPU, in twice the size of the 16-bit model.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

PROMPT = "Who are you? 用三句话解释什么是LoRA微调。 Write a Python function that sorts a list."
LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-2}  # of the mean KL in nats, for rounding
ROWS = 32  # held-out rows to measure by; all candidates meet the same
NEAR = 0.02  # nats per token: losses that differ by less count as the same
ROOM = 65504 / 4  # a quarter of float16's range: other texts reach higher than the held-out rows
CARD = """---
base_model: {base}
---
An adapter, of held-out loss {loss}, merged into `{base}` ({base_weights} weights), stored as {dtype}.
The base's licence applies. System prompt and stop tokens need not be told: the files bring them.

    vllm serve . --served-model-name my-model
    python llama.cpp/convert_hf_to_gguf.py . --outfile model.gguf && llama-server -m model.gguf --jinja
    ollama create my-model -f Modelfile && ollama run my-model    # needs model.gguf as well
"""


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    shown = " ".join(default) if isinstance(default, tuple) else default
    help = f"{help} (default: {shown})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class Config:
    adapter: str = setting("outputs/checkpoint-final", "adapter folder to merge")
    output: str = setting("models/merged", "folder of the merged model")
    base_weights: str = setting("auto", "under the adapter", choices=("auto", "original", "dequantized"))
    dtype: str = setting("auto", "type of the stored weights", choices=("auto", *LIMITS))


# Same in: all nine scripts
def parser_of(config_class: type) -> argparse.ArgumentParser:
    """A parser with one flag a field of the dataclass; an unknown or shortened flag is an error (exit 2)."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    for f in fields(config_class):
        yes_no = {"action": argparse.BooleanOptionalAction}  # --flag and --no-flag
        options = yes_no if type(f.default) is bool else {"type": type(f.default)}
        parser.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return parser


def parse_args(argv: list[str] | None = None) -> Config:
    return Config(**vars(parser_of(Config).parse_args(argv)))


def main(config: Config) -> None:
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for words in ("Found missing adapter keys", "Model with `tie_word_embeddings=True` and the"):
        warnings.filterwarnings("error", message=words)  # PEFT would go on: half an adapter, a wrong sum
    adapter, output = Path(config.adapter), Path(config.output)
    peft, record = (read_json(adapter / f"{name}_config.json") for name in ("adapter", "finetune"))
    if (kind := peft.get("peft_type")) != "LORA":
        raise ValueError(f"{adapter}: no LoRA adapter there, but {kind or 'no adapter_config.json'}")
    if output.exists() and "merged" not in read_json(output / "finetune_config.json"):
        raise ValueError(f"{output} exists and is no merged model of this script; pass another --output")
    partial, earlier = (output.with_name(f"{output.name}.{word}") for word in ("partial", "replaced"))
    try:
        base, dtype, table = choose(config, peft, record)
        record["merged"] = {"base_weights": base, "dtype": dtype, "measured": table}
        model, tokenizer = load(adapter, record, base)
        expected = log_probs(model.float(), tokenizer)
        model = model.merge_and_unload().to(getattr(torch, dtype))  # each layer's sum was made in float32
        write_folder(partial, adapter, record, model, tokenizer)
        del model  # before it is read again
        record["merged"]["verified"] = compare(partial, expected, dtype)
        write_json(partial / "finetune_config.json", record)
        if output.exists():  # an earlier merge; it is kept until the new one is in its place
            shutil.rmtree(earlier, ignore_errors=True)
            output.rename(earlier)
        partial.rename(output)
        shutil.rmtree(earlier, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError, UserWarning) as error:  # in the libraries' words
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{adapter} on {peft['base_model_name_or_path']}: {text}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"merged: {output} ({base} base weights, {dtype}); try python chat.py --model {output}")


def read_json(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def choose(config: Config, peft: dict, record: dict) -> tuple[str, str, list[dict]]:
    """(base weights, dtype, table): the merge whose held-out loss is nearest to the trained function's."""
    from transformers import AutoConfig

    settings, bases, dtype = record.get("settings", {}), [config.base_weights], config.dtype
    if config.base_weights == "auto":
        bases = ["original", "dequantized"] if settings.get("load_in_4bit") else ["original"]
    if dtype == "auto":  # the base's own 16-bit type
        own = AutoConfig.from_pretrained(peft["base_model_name_or_path"], revision=peft.get("revision")).dtype
        dtype = "float16" if str(own) == "torch.float16" else "bfloat16"
    path = Path(record.get("held_out", ""))
    path = path if path.is_file() else Path(config.adapter).parent / path.name  # after a move
    rows = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not rows:
        print(f"no held-out rows to measure by: taking {bases[-1]} base weights, stored as {dtype}")
        return bases[-1], dtype, []
    lines = rows.split("\n")[:ROWS]
    print(f"base weights  type          loss    away  largest activation   on {len(lines)} held-out rows")
    trained = measure(config.adapter, record, lines, "as trained", settings.get("dtype", ""))
    if trained["loss"] == float("inf"):
        raise ValueError(f"{config.adapter}: its loss is no number, it is broken; take another checkpoint")
    table = [measure(config.adapter, record, lines, base, dtype, trained) for base in bases]
    best = min(table, key=lambda row: row["away"])  # nearest, not lowest: that is luck on few rows
    if config.dtype == "auto" and dtype != "float16" and best["away"] > NEAR and best["largest"] <= ROOM:
        table.append(measure(config.adapter, record, lines, best["base"], "float16", trained))
        best = table[-1] if best["away"] - table[-1]["away"] > NEAR else best
    if best["away"] > NEAR:
        print(f"more than {NEAR} away (float16 holds activations to {ROOM:.0f}); see --dtype float32")
    return best["base"], best["dtype"], [trained, *table]


def measure(adapter: str, record: dict, lines: list[str], base: str, dtype: str, trained=None) -> dict:
    """A row of the table: loss in nats a token, largest activation; merged, except for the first row."""
    import torch
    from torch.nn.functional import cross_entropy

    model, losses, peaks = load(adapter, record, base)[0], [], []
    model = model.float().merge_and_unload().to(getattr(torch, dtype)) if trained else model

    def watch(module, inputs, output) -> None:
        parts = [part for part in (*inputs, output) if torch.is_tensor(part) and part.is_floating_point()]
        peaks.extend(part.abs().max().item() for part in parts)

    with torch.inference_mode(), torch.nn.modules.module.register_module_forward_hook(watch):
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                ids, labels = torch.tensor([row["input_ids"], row["labels"]])
                logits = model(ids[None]).logits[0, :-1].float()  # each for the next token
            except (ValueError, TypeError, LookupError) as error:  # also ids that the model does not have
                raise ValueError(f"{record['held_out']}:{number}: no ids and labels: {error}") from error
            losses.append(cross_entropy(logits, labels[1:], reduction="none")[labels[1:] != -100])
    loss = torch.cat(losses).mean().nan_to_num(float("inf")).item()
    away = abs(loss - trained["loss"]) if trained else 0.0
    print(f"{base:<14}{dtype:<10}{loss:8.4f}{away:8.4f}{max(peaks):20.0f}", flush=True)
    return {"base": base, "dtype": dtype, "loss": loss, "away": away, "largest": max(peaks)}


def load(adapter: str | Path, record: dict, base_weights: str):
    """(adapter beside its base, tokenizer); the base `as trained`, `original` or `dequantized`."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoTokenizer, BitsAndBytesConfig

    gc.collect()  # the model before this one: PEFT's references go in circles
    settings = record.get("settings", {})
    options = {"dtype": settings.get("dtype", "auto"), "device_map": "cpu", "use_safetensors": True}
    if base_weights == "dequantized" or (base_weights == "as trained" and settings.get("load_in_4bit")):
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        nf4["bnb_4bit_compute_dtype"] = settings.get("dtype")
        options["quantization_config"] = BitsAndBytesConfig(**nf4)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **options)
    for module in model.modules():  # else bitsandbytes repacks weights that DoRA reads
        module.support_avx512bf16_for_cpu = False
    if base_weights == "dequantized":  # a merge into 4-bit layers would round once more
        model = PeftModel.from_pretrained(model.unload().dequantize(), adapter)
    words = adapter if Path(adapter, "tokenizer_config.json").is_file() else model.name_or_path
    return model, AutoTokenizer.from_pretrained(words)


def log_probs(model, tokenizer):
    """Log-probabilities after each token of PROMPT, asked as a question, in nats: (tokens, vocabulary)."""
    import torch

    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits[0].float().log_softmax(-1)


def write_folder(folder: Path, adapter: Path, record: dict, model, tokenizer) -> None:
    """Save all so that transformers 4, which many engines pin, opens it right too."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (adapter / "generation_config.json").is_file():  # with the tokens that end an answer
        shutil.copy(adapter / "generation_config.json", folder)
    config, words = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    for part in (config, config.get("text_config", {})):  # without RoPE in these places: 10,000, in silence
        rope = part.get("rope_parameters") or {}
        local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)  # Gemma 3 has two
        part |= {"rope_local_base_freq": local["rope_theta"]} if local else {}
        part |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type") == "longrope":  # of which Phi-3's reader takes these alone
            factors = {key: rope[key] for key in ("short_factor", "long_factor")}
            part["rope_scaling"] = {"type": "longrope"} | factors
        elif rope.get("rope_type", "default") != "default":
            part["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        part |= {"torch_dtype": part["dtype"]} if "dtype" in part else {}
    words["additional_special_tokens"] = words.pop("extra_special_tokens", [])
    if words["tokenizer_class"] == "TokenizersBackend":
        words["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", words)
    card = {"base": model.name_or_path, "loss": record.get("losses", {}).get("after", "not measured")}
    (folder / "README.md").write_text(CARD.format(**card, **record["merged"]), encoding="utf-8")
    ends = read_json(folder / "generation_config.json").get("eos_token_id", tokenizer.eos_token_id)
    stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    if text := modelfile(tokenizer, stops):
        (folder / "Modelfile").write_text(text, encoding="utf-8")


def modelfile(tokenizer, stops: list[str]) -> str:
    """Ollama's file, its template read off rendered conversations; "" and a line where that can not be."""
    from jinja2 import TemplateError

    def around(*roles: str) -> list[str]:  # what is written before, between and behind the turns' texts
        chat = [{"role": role, "content": "\ue000"} for role in roles]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).split("\ue000")

    try:
        before, behind, ask, between, _ = around("system", "user", "assistant", "user")
        start, _ = around("user")
        [stop] = [stop for stop in stops if between.startswith(stop) and '"""' not in start]
    except (TemplateError, ValueError):
        print("no Modelfile: Ollama can not be told what the chat template or the system prompt writes")
        return ""
    user = between.removeprefix(stop).lstrip()
    end, bos = between.removesuffix(user), tokenizer.bos_token or ""
    system = start.removeprefix(before).removesuffix(behind) if start.startswith(before) else ""
    before = before if user.startswith(bos) else before.removeprefix(bos)  # Ollama writes it
    template = "{{ if .System }}%s{{ .System }}%s{{ else }}%s{{ end }}{{ .Prompt }}%s{{ .Response }}%s"
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template % (before, behind, user, ask, end)}"""']
    lines += [f'SYSTEM """{system}"""'] + [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def compare(folder: Path, expected, dtype: str) -> dict:
    """How far the folder, read anew, is from the adapter in float32. Raises ValueError past LIMITS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    found = log_probs(model, tokenizer)
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    print(f"read again: mean KL {kl:.1e} from the adapter at {len(found)} tokens, same top token {same:.3f}")
    if not kl <= LIMITS[dtype]:  # also where it is no number
        raise ValueError(f"not what was trained: mean KL above {LIMITS[dtype]:.0e}; nothing is left behind")
    return {"mean_kl": kl, "same_top_token": same}


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError) as error:  # a person's mistake or a file's; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
