"""Merge an adapter into its base model, and prove that the result still does what was trained.

    python merge_model.py --adapter outputs/demo/checkpoint-final --output models/demo-merged
    python merge_model.py --base_weights dequantized --dtype float32        # nothing rounded; twice the size

Reads   the adapter with its finetune_config.json, its base model, the rows that the training held out
Writes  models/merged/: model, tokenizer, finetune_config.json with what was measured, model card, Modelfile

An adapter trained on 4-bit weights learnt to correct *those*; the original ones it has never seen. Which base
is nearer to what was trained is measured. All runs on the CPU, in twice the size of the 16-bit model.
"""

import gc
import json
import logging
import shutil
import sys
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from pathlib import Path

PROMPT = [{"role": "user", "content": "Who are you? 用三句话解释什么是LoRA微调。 Sort a list in Python."}]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-2}  # of the mean KL in nats, for rounding
ROWS = 32  # held-out rows to measure by; all candidates meet the same
NEAR = 0.02  # nats per token: losses that differ by less count as the same
ROOM = 65504 / 4  # a quarter of float16's range: other texts reach higher than the held-out rows
CARD = """An adapter merged into {base} ({base_weights} weights, {dtype}), whose licence applies.

    vllm serve . --served-model-name my-model
    python llama.cpp/convert_hf_to_gguf.py . --outfile model.gguf && llama-server -m model.gguf --jinja
    ollama create my-model -f Modelfile && ollama run my-model    # needs model.gguf as well
"""


# Same in: all nine scripts
def setting(default, help: str, **options):
    """A dataclass field that is also a flag; its default is written here and nowhere else."""
    help = f"{help} (default: {default})".replace("%", "%%")
    return field(default=default, metadata={"help": help} | options)


@dataclass
class Config:
    adapter: str = setting("outputs/checkpoint-final", "adapter folder to merge")
    output: str = setting("models/merged", "folder of the merged model")
    base_weights: str = setting("auto", "to merge into", choices=("auto", "original", "dequantized"))
    dtype: str = setting("auto", "stored weights; auto measures", choices=("auto", *LIMITS))


# Same in: chat.py, data_integration.py, data_set_generation.py, evaluate.py, inference.py, merge_model.py
def parse_args(argv: list[str] | None = None) -> Config:
    """Settings from the command line; an unknown or shortened flag is an error (exit 2)."""
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        options = {"action": BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        cli.add_argument(f"--{f.name}", default=f.default, **(options | f.metadata))
    return Config(**vars(cli.parse_args(argv)))


def main(config: Config) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its notes come with its import
    import torch
    from peft import PeftConfig
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    warnings.simplefilter("ignore")  # but where PEFT would go on, with half an adapter or a wrong sum:
    warnings.filterwarnings("error", message="Found missing adapter keys|Model with `tie_word_embeddings=")
    adapter, output = Path(config.adapter).absolute(), Path(config.output)  # absolute: no name of the hub
    new, earlier = (output.with_name(f"{output.name}.{word}") for word in ("partial", "replaced"))
    peft, record = PeftConfig.from_pretrained(adapter), read_json(adapter / "finetune_config.json")
    if output.exists() and "merged" not in read_json(output / "finetune_config.json"):
        raise ValueError(f"{output} exists and is no merged model of this script; pass another --output")
    try:
        base, dtype, table = choose(config, peft, record)
        model = load(adapter, record, base)
        own = (adapter / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter if own else peft.base_model_name_or_path)
        expected = log_probs(model.float(), tokenizer)
        model = model.merge_and_unload().to(getattr(torch, dtype))  # each layer's sum was made in float32
        record["merged"] = {"base_weights": base, "dtype": dtype, "measured": table}
        write_folder(new, adapter, record, model, tokenizer)
        del model  # before it is read again, as an engine will read it
        found = log_probs(*(kind.from_pretrained(new) for kind in (AutoModelForCausalLM, AutoTokenizer)))
        kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
        print(f"read again: mean KL {kl:.1e} from the adapter, same top token {same:.3f}")
        if not kl <= LIMITS[dtype]:  # also where it is no number
            raise ValueError(f"not what was trained: mean KL above {LIMITS[dtype]:.0e}; nothing is left")
        record["merged"]["verified"] = {"mean_kl": kl, "same_top_token": same}
        (new / "finetune_config.json").write_text(json.dumps(record, ensure_ascii=False, indent=2), "utf-8")
        shutil.rmtree(earlier, ignore_errors=True)  # which a killed run left
        if output.exists():  # an earlier merge; it is kept until the new one is in its place
            output.rename(earlier)
        new.rename(output)
        shutil.rmtree(earlier, ignore_errors=True)
    except (OSError, LookupError, SafetensorError, RuntimeError, UserWarning) as error:  # in their own words
        words = f"{adapter} on {peft.base_model_name_or_path}: {error}"
        raise ValueError(" ".join(words.split())[:400]) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"merged: {output} ({base} base weights, {dtype}); try python chat.py --model {output}")


def read_json(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def choose(config: Config, peft, record: dict) -> tuple[str, str, list[dict]]:
    """(base weights, dtype, table): the merge whose held-out loss is nearest to the trained function's."""
    from transformers import AutoConfig

    settings, bases, dtype = record.get("settings", {}), [config.base_weights], config.dtype
    if config.base_weights == "auto":
        bases = ["original", "dequantized"] if settings.get("load_in_4bit") else ["original"]
    if dtype == "auto":  # the base's own 16-bit type
        own = AutoConfig.from_pretrained(peft.base_model_name_or_path, revision=peft.revision).dtype
        dtype = "float16" if str(own) == "torch.float16" else "bfloat16"
    path = Path(record.get("held_out", ""))
    path = path if path.is_file() else Path(config.adapter).parent / path.name  # after a move
    lines = path.read_text(encoding="utf-8").split("\n")[:ROWS] if path.is_file() else []
    rows = [json.loads(line) for line in lines if line]
    if not rows:
        print(f"no held-out rows to measure by: taking {bases[-1]} base weights, stored as {dtype}")
        return bases[-1], dtype, []
    print(f"base weights  type          loss    away  largest activation   on {len(rows)} held-out rows")
    trained = measure(config.adapter, record, rows, "as trained", settings.get("dtype", ""))
    table = [measure(config.adapter, record, rows, base, dtype, trained) for base in bases]
    best = min(table, key=lambda row: row["away"])  # nearest, not lowest: that is luck on few rows
    if config.dtype == "auto" and dtype != "float16" and best["away"] > NEAR and best["largest"] <= ROOM:
        table.append(measure(config.adapter, record, rows, best["base"], "float16", trained))
        best = table[-1] if best["away"] - table[-1]["away"] > NEAR else best
    if best["away"] > NEAR:
        print(f"more than {NEAR} nats away: --dtype float32, or other --base_weights, may be nearer")
    return best["base"], best["dtype"], [trained, *table]


def measure(adapter: str, record: dict, rows: list[dict], base: str, dtype: str, trained=None) -> dict:
    """A row of the table: loss in nats a token, largest activation; merged, except for the first row."""
    import torch

    model, total, count, peaks = load(adapter, record, base), 0.0, 0, []
    model = model.float().merge_and_unload().to(getattr(torch, dtype)) if trained else model

    def watch(module, inputs, output) -> None:
        parts = [part for part in (*inputs, output) if torch.is_tensor(part) and part.is_floating_point()]
        peaks.extend(part.abs().max().item() for part in parts)

    with torch.inference_mode(), torch.nn.modules.module.register_module_forward_hook(watch):
        for row in rows:
            ids, labels = torch.tensor([[row["input_ids"]], [row["labels"]]])
            tokens = (labels[:, 1:] != -100).sum().item()
            total, count = total + model(ids, labels=labels).loss.item() * tokens, count + tokens
    loss = total / count if total == total else float("inf")  # NaN
    away = abs(loss - trained["loss"]) if trained else 0.0
    print(f"{base:<14}{dtype:<10}{loss:8.4f}{away:8.4f}{max(peaks):20.0f}", flush=True)
    return {"base": base, "dtype": dtype, "loss": loss, "away": away, "largest": max(peaks)}


def load(adapter: str | Path, record: dict, base: str):
    """The adapter beside its base, which is `as trained`, `original` or `dequantized`."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import BitsAndBytesConfig

    gc.collect()  # the model before this one: PEFT's references go in circles
    run = record.get("settings", {})
    options = {"dtype": run.get("dtype", "auto"), "device_map": "cpu", "use_safetensors": True}
    if base == "dequantized" or (base == "as trained" and run.get("load_in_4bit")):
        options["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=run.get("dtype"))
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **options)
    for module in model.modules():  # else bitsandbytes repacks weights that DoRA reads
        module.support_avx512bf16_for_cpu = False
    if base == "dequantized":  # a merge into 4-bit layers would round once more
        model = PeftModel.from_pretrained(model.unload().dequantize(), adapter)
    return model


def log_probs(model, tokenizer):
    """Log-probabilities after each token of PROMPT, asked as a question, in nats: (tokens, vocabulary)."""
    inputs = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")
    return model(**inputs).logits[0].detach().float().log_softmax(-1)


def write_folder(folder: Path, adapter: Path, record: dict, model, tokenizer) -> None:
    """Save all so that transformers 4, which many engines pin, opens it right too."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (adapter / "generation_config.json").is_file():  # with the tokens that end an answer
        shutil.copy(adapter / "generation_config.json", folder)
    config, words = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    for part in (config, config.get("text_config", {})):  # where it finds no RoPE it takes 10,000
        rope = part.get("rope_parameters") or {}
        rope = rope.get("full_attention", rope)  # Gemma 3 has two; of the other, 10,000 is right
        part |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        part |= {"torch_dtype": part["dtype"]} if "dtype" in part else {}
        if (kind := rope.get("rope_type", "default")) != "default":  # Phi-3's reader takes two factors alone
            keys = ("short_factor", "long_factor") if kind == "longrope" else set(rope) - {"rope_theta"}
            part["rope_scaling"] = {"type": kind} | {key: rope[key] for key in keys}
    words["additional_special_tokens"] = words.pop("extra_special_tokens", [])
    # transformers 4 would add token_type_ids, which generate() refuses
    words |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=2))
    (folder / "README.md").write_text(CARD.format(base=model.name_or_path, **record["merged"]), "utf-8")
    ends = read_json(folder / "generation_config.json").get("eos_token_id", tokenizer.eos_token_id)
    stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    (folder / "Modelfile").write_text(modelfile(tokenizer, stops), encoding="utf-8")


def modelfile(tokenizer, stops: list[str]) -> str:
    """Ollama's file, its template read off a rendered conversation; a comment where that can not be."""
    system, user, assistant = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"
    turns = [("system", system), ("user", user), ("assistant", assistant), ("user", user)]
    chat, bos = [{"role": role, "content": text} for role, text in turns], tokenizer.bos_token or ""
    try:  # first: all before a question; turn: from one to the next; start: first, without a system message
        texts = tokenizer.apply_chat_template([chat, chat[1:2]], tokenize=False)
        (first, turn, _), (start, _) = (text.split(user) for text in texts)
        before, behind = first.split(system)
        [stop] = [stop for stop in stops if assistant + stop in turn and '"""' not in start]
    except Exception:  # a template may raise anything
        return "# Ollama can not be told what this chat template or system prompt writes\n"
    ask = turn.partition(assistant + stop)[2].lstrip()
    first = first if ask.startswith(bos) else first.removeprefix(bos)  # which Ollama writes
    told = start.removeprefix(before).removesuffix(behind) if start.startswith(before) else ""
    turn = "{{ if .System }}" + first + "{{ else }}" + ask + "{{ end }}{{ .Prompt }}" + turn.removesuffix(ask)
    lines = ["FROM ./model.gguf", f'TEMPLATE """{turn}"""', f'SYSTEM """{told}"""']
    return "\n".join(lines + [f'PARAMETER stop "{stop}"' for stop in stops]) + "\n"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        main(parse_args())
    except (OSError, ValueError) as error:  # a person's mistake or a file's; a bug keeps its traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
