"""Tiny real models and tokenizers, built on the spot, and a way to run the real scripts as a person does."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# No test may reach a hub; and tiny models are faster on one thread, above all beside others.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)
# Nor may one find what an earlier one prepared.
CACHE = tempfile.TemporaryDirectory(prefix="sft-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Chips are made of silicon. 芯片由硅制成。What does the lamp cost? It costs 12 euros. 你好，世界！",
    "The quick brown fox jumps over the lazy dog. 深度学习模型需要数据和算力。Proteins fold; genes are read.",
    "user assistant system 补充信息 指令 输入 回答 问题 Question Answer Instruction Input Output 0123456789",
]


def build_tokenizer(chat_template: str | None = CHATML):
    """A byte-level BPE tokenizer of about 700 tokens with ChatML control tokens; pad is not EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def build_model(kind: str, folder: Path, chat_template: str | None = CHATML, **changes) -> Path:
    """Save a tiny model (`qwen2` or `gpt2`, random weights, float32) and its tokenizer; returns its place."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer(chat_template)
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    if kind == "qwen2":
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
        model = Qwen2ForCausalLM(Qwen2Config(**({"vocab_size": len(tokenizer)} | sizes | ids | changes)))
    else:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **(sizes | ids | changes)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory) -> Path:
    """Folder of a two-layer Qwen2 with a ChatML tokenizer."""
    return build_model("qwen2", tmp_path_factory.mktemp("models") / "tiny-qwen2")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    """Folder of a two-layer GPT-2 whose tokenizer has neither a chat template nor a pad token."""
    folder = build_model("gpt2", tmp_path_factory.mktemp("models") / "tiny-gpt2", chat_template=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run_script(
    name: str, *args, cwd: Path, input: str | None = None, env: dict | None = None, timeout: int = 300
):
    """Run a script of the project as a person would; returns the finished process."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)],
        cwd=cwd,
        input=input,
        env=os.environ | (env or {}),
        timeout=timeout,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Write records, one a line; returns the path."""
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


@pytest.fixture(autouse=True)
def path_of_its_own(monkeypatch):
    """evaluate.py takes its folder out of sys.path; the next test needs it there."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def load_script(name: str):
    """A script as a module, to call its pure functions (`evaluate.py` hides the library of the same name)."""
    return importlib.import_module(name)


def build_adapter(base: Path, folder: Path, four_bit: bool = False, targets="all-linear", **lora) -> Path:
    """Save what a training on `base` saves, with random LoRA weights; returns the folder.

    Four held-out rows lie in held_out.jsonl beside the folder.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    training = load_script("qwen_finetuning")
    tokenizer = AutoTokenizer.from_pretrained(base)
    training.set_defaults(tokenizer, "You know chips. 你懂芯片。")
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **({"init_lora_weights": False} | lora),
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    questions = ["What does the lamp cost?", "What are chips made of?", "芯片由什么制成？", "Do genes fold?"]
    rows = []
    for question in questions:
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "硅 silicon 12 euros."},
        ]
        examples, _ = training.encode(messages, tokenizer)
        rows += [{"messages": messages, "tools": [], **example} for example in examples]
    write_jsonl(folder.parent / "held_out.jsonl", rows)
    record = {
        "settings": {
            "model_name": str(base),
            "load_in_4bit": four_bit,
            "dtype": "float32",
            "use_dora": bool(lora.use_dora),
            "max_seq_length": 2048,
        },
        "dataset": {"path": str(folder.parent / "train.jsonl"), "rows": 40, "sha256": ""},
        "held_out": str(folder.parent / "held_out.jsonl"),
        "losses": {"before": 6.0, "after": 5.0},
    }
    (folder / "finetune_config.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_qwen2, tmp_path_factory) -> Path:
    """Folder of an adapter on the tiny Qwen2, as a training in float32 leaves it."""
    return build_adapter(tiny_qwen2, tmp_path_factory.mktemp("run") / "checkpoint-final")
