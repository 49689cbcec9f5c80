"""merge_model.py on tiny adapters: the sum is exact, 4-bit training is kept, and a bad merge leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build_adapter, build_model, load_script, run_script
from safetensors import SafetensorError
from test_inference import broken, demo, json_change  # noqa: F401  fixtures of the same adapters


@pytest.fixture(scope="session")
def four_bit_adapter(tiny_qwen2, tmp_path_factory) -> Path:
    """Folder of an adapter whose record says that it was trained on 4-bit weights."""
    return build_adapter(tiny_qwen2, tmp_path_factory.mktemp("run4") / "checkpoint-final", four_bit=True)


def merge(adapter: Path, output: Path, **settings) -> dict:
    """Run merge_model.py in this process; returns what it recorded of the merge."""
    script = load_script("merge_model")
    script.main(script.Config(adapter=adapter, output=output, **settings))
    return json.loads((output / "finetune_config.json").read_text(encoding="utf-8"))["merged"]


def logits(model, tokenizer):
    return load_script("merge_model").logits_on_prompts(model.eval(), tokenizer)


def plain(folder: Path, dtype=None):
    """A folder opened in plain transformers, in float32 unless told otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_in_float32_the_merged_model_is_the_adapter(kind, tiny_adapter, tmp_path):
    from peft import PeftModel

    adapter = tiny_adapter
    if kind != "tied":
        changes = {"tie_word_embeddings": False} if kind == "untied" else {}
        base = build_model("gpt2" if kind == "gpt2" else "qwen2", tmp_path / "base", **changes)
        adapter = build_adapter(base, tmp_path / "run" / "checkpoint-final")
    found = merge(adapter, tmp_path / "merged", dtype="float32")
    assert found["verified"]["mean_kl"] < 1e-10 and found["verified"]["same_top_token"] == 1
    assert (found["base_weights"], found["dtype"], found["measured"]) == ("original", "float32", [])

    model, tokenizer = plain(tmp_path / "merged")
    run = json.loads((adapter / "finetune_config.json").read_text(encoding="utf-8"))
    base = plain(Path(run["base_model"]))[0]
    untouched = logits(base, tokenizer)
    expected = logits(PeftModel.from_pretrained(base, adapter), tokenizer)
    assert (logits(model, tokenizer) - expected).abs().max() < 1e-4
    assert (expected - untouched).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_stay_within_their_limit(dtype, tiny_adapter, tmp_path):
    found = merge(tiny_adapter, tmp_path / "merged", dtype=dtype)
    assert 0 < found["verified"]["mean_kl"] < load_script("merge_model").LIMITS[dtype]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_an_adapter_of_a_4_bit_model_is_merged_into_the_weights_it_was_trained_on(
    four_bit_adapter, tiny_qwen2, tmp_path, capsys
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    found = merge(four_bit_adapter, tmp_path / "merged")
    table = {(row["base_weights"], row["dtype"]): row["loss"] for row in found["measured"]}
    assert len(table) == 5 and found["base_weights"] == "dequantized"
    trained = table["as trained", "adapter"]
    assert abs(table["dequantized", found["dtype"]] - trained) < 1e-3 < abs(table["original", "float16"] - trained)
    printed = capsys.readouterr().out
    assert "loss on 4 held-out rows" in printed and f"as trained    adapter    {trained:.4f}" in printed

    model, tokenizer = plain(tmp_path / "merged")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32, quantization_config=quantization)
    compare = load_script("merge_model").compare
    expected = logits(PeftModel.from_pretrained(base, four_bit_adapter), tokenizer)
    near = compare(expected, logits(model, tokenizer))["mean_kl"]
    merge(four_bit_adapter, tmp_path / "other", base_weights="original", dtype="float32")
    far = compare(expected, logits(plain(tmp_path / "other")[0], tokenizer))["mean_kl"]
    assert near < 1e-5 and far > 20 * near


@pytest.mark.parametrize("trained_in, held_in", [("float32", "float16"), ("bfloat16", "bfloat16")])
def test_the_dequantised_base_takes_sixteen_bits(trained_in, held_in, four_bit_adapter):
    """Without its 4-bit layers, and as the library dequantises: what trained in float32 would take twice the room."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    script = load_script("merge_model")
    run = script.read_run(four_bit_adapter) | {"dtype": trained_in}
    merge = script.Merge(script.Config(adapter=four_bit_adapter), run)
    model = merge.with_adapter("dequantized", "float16")
    assert {str(p.dtype) for name, p in model.named_parameters() if "lora_" not in name} == {f"torch.{held_in}"}
    quantization = BitsAndBytesConfig(**script.NF4)
    base = AutoModelForCausalLM.from_pretrained(merge.base, dtype=held_in, quantization_config=quantization)
    expected = base.dequantize().state_dict()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert len(layers) == 14  # seven in each of two blocks
    for name, layer in layers.items():
        assert type(layer.get_base_layer()) is torch.nn.Linear
        assert torch.equal(layer.get_base_layer().weight, expected[name.removeprefix("base_model.model.") + ".weight"])


def test_the_folder_is_an_ordinary_model(four_bit_adapter, tmp_path):
    merge(four_bit_adapter, tmp_path / "merged", base_weights="dequantized", dtype="float16")
    folder = tmp_path / "merged"
    assert leftovers(folder) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "finetune_config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = plain(folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "dequantized (4-bit NF4, as in training)" in card and "stored as: float16" in card
    assert "held-out loss after training: not measured" in card  # such an adapter's record holds none
    loaded, _, run = load_script("inference").load_chat_model(str(folder), None, False)
    assert run["system_prompt"] == "You know chips. 你懂芯片。" and not hasattr(loaded, "disable_adapter")


def test_it_stops_at_the_token_with_which_training_ends_an_answer(broken, tmp_path):  # noqa: F811
    """Also where the base model names another, and its generation config contradicts itself."""
    import torch

    folder = build_model("qwen2", tmp_path / "base")
    contradiction = {"eos_token_id": 0, "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(contradiction))
    adapter = broken("finetune_config.json", json_change(base_model=str(folder)))
    merge(adapter, tmp_path / "merged", dtype="float32", verify=False)
    model, tokenizer = plain(tmp_path / "merged")
    assert model.generation_config.eos_token_id == [0, tokenizer.eos_token_id]
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data[tokenizer.eos_token_id] = 9.0  # now it wants to say nothing but the end of turn
    ids = tokenizer("chips", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=5)[0, ids["input_ids"].shape[1] :].tolist() == [tokenizer.eos_token_id]


def test_without_held_out_rows_it_says_so(broken, four_bit_adapter, tmp_path, capsys):  # noqa: F811
    lone = tmp_path / "lone"
    shutil.copytree(four_bit_adapter, lone)
    run = json.loads((lone / "finetune_config.json").read_text(encoding="utf-8"))
    (lone / "finetune_config.json").write_text(json.dumps(run | {"held_out_file": "gone.jsonl"}))
    found = merge(lone, tmp_path / "merged")
    assert (found["base_weights"], found["dtype"]) == ("dequantized", "float16")
    assert "no held-out rows to measure with: taking dequantized base weights and float16" in capsys.readouterr().out


def huge(data: bytes) -> bytes:
    """The adapter's weights, with one update far beyond float16."""
    from safetensors.torch import load, save

    weights = load(data)
    name = next(key for key in weights if "lora_B" in key)
    weights[name] = weights[name] * 0 + 1e6
    return save(weights)


def not_a_number(data: bytes) -> bytes:
    from safetensors.torch import load, save

    weights = load(data)
    name = next(key for key in weights if "lora_B" in key)
    weights[name] = weights[name] * math.nan
    return save(weights)


def test_float16_is_left_out_where_a_weight_overflows(broken, tmp_path):  # noqa: F811
    adapter = broken("adapter_model.safetensors", huge)
    script = load_script("merge_model")
    assert merge(adapter, tmp_path / "merged", verify=False)["dtype"] == "bfloat16"  # without held-out rows
    with pytest.raises(script.UserError, match="a weight does not fit in float16"):
        merge(adapter, tmp_path / "second", dtype="float16")
    assert not (tmp_path / "second").exists()


def test_an_adapter_with_nan_is_refused(broken, tiny_adapter, tmp_path):  # noqa: F811
    adapter = broken("adapter_model.safetensors", not_a_number)
    shutil.copy(tiny_adapter.parent / "held_out.jsonl", adapter.parent)
    script = load_script("merge_model")
    with pytest.raises(script.UserError, match="its loss is no number"):
        merge(adapter, tmp_path / "merged")
    with pytest.raises(script.UserError, match="or the adapter holds NaN"):
        merge(adapter, tmp_path / "merged", dtype="float32")
    assert leftovers(tmp_path) == ["copy", "held_out.jsonl"]


def test_a_merge_that_is_not_what_was_trained_leaves_nothing(tiny_adapter, tmp_path, monkeypatch):
    script = load_script("merge_model")
    right = script.Merge.merged

    def wrong(self, base_weights, dtype):
        model = right(self, base_weights, dtype)
        model.model.layers[0].mlp.up_proj.weight.data *= 1.05
        return model

    monkeypatch.setattr(script.Merge, "merged", wrong)
    with pytest.raises(script.UserError, match="not what was trained: mean KL .*, allowed for float32 1e-06"):
        merge(tiny_adapter, tmp_path / "merged", dtype="float32")
    assert leftovers(tmp_path) == []
    assert "verified" not in merge(tiny_adapter, tmp_path / "merged", dtype="float32", verify=False)


FULL = "No space left on device"


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError(28, FULL), SafetensorError(f"I/O error: {FULL}")])
def test_an_interrupted_merge_leaves_the_old_folder(end, tiny_adapter, tmp_path, monkeypatch):
    script = load_script("merge_model")
    merge(tiny_adapter, tmp_path / "merged", dtype="float32", verify=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}

    def stop(*_):
        raise end

    monkeypatch.setattr(script, "verify", stop)
    with pytest.raises(KeyboardInterrupt if end is KeyboardInterrupt else script.UserError):
        merge(tiny_adapter, tmp_path / "merged", dtype="float16")
    assert leftovers(tmp_path) == ["merged"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}


def test_what_can_not_be_is_said_before_anything_is_loaded(tiny_adapter, tiny_qwen2, broken, tmp_path):  # noqa: F811
    script = load_script("merge_model")

    def faults(**settings):
        return script.merge_faults(script.Config(**{"adapter": tiny_adapter, "output": tmp_path / "out"} | settings))

    assert faults() == []
    assert "no adapter there" in faults(adapter=tiny_qwen2)[0]
    assert "was not trained on 4-bit weights" in faults(base_weights="dequantized")[0]
    assert "is the base model of this adapter" in faults(output=tiny_qwen2)[0]
    (tmp_path / "other").mkdir()
    assert "exists and is no merged model of this script" in faults(output=tmp_path / "other")[0]
    assert "no LoRA adapter" in faults(adapter=broken("adapter_config.json", json_change(peft_type="IA3")))[0]
    (tmp_path / "copy" / "finetune_config.json").write_text("{")
    assert "not the record of a run" in faults(adapter=tmp_path / "copy")[0]


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("adapter_model.safetensors", lambda data: data[:500], "can not be loaded: Error while deserializing"),
        ("finetune_config.json", json_change(base_model="no/body"), "base model no/body can not be loaded"),
        ("chat_template.jinja", lambda data: data.replace(b"assistant", b"model"), "as the training did"),
    ],
)
def test_a_broken_adapter_gets_one_line(broken, file, change, words, tmp_path):  # noqa: F811
    with pytest.raises(load_script("merge_model").UserError) as error:
        merge(broken(file, change), tmp_path / "merged", dtype="float32")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert leftovers(tmp_path) == ["copy"]


def test_held_out_rows_of_a_later_training_are_not_measured_with(broken, tmp_path, capsys):  # noqa: F811
    adapter = broken("README.md", lambda data: data)
    (tmp_path / "held_out.jsonl").write_bytes(b'{"input_ids": [1, 2], "labels": [1, 2]}\n')
    script = load_script("merge_model")
    run = script.read_run(adapter)
    assert len(script.rows_to_measure(adapter, run)) == 1
    (tmp_path / "finetune_config.json").write_text(json.dumps(run | {"held_out": ["0123"]}))
    assert script.rows_to_measure(adapter, run) == []
    assert "held_out.jsonl is of another training than this adapter" in capsys.readouterr().err
    (tmp_path / "finetune_config.json").write_text(json.dumps(run))
    assert len(script.rows_to_measure(adapter, run)) == 1


@pytest.mark.parametrize("line", [b'{"input_ids": [1', b"\xff\xfe", b"[" * 5000, b"3"])
def test_a_held_out_row_that_can_not_be_read_is_named(broken, line, tmp_path):  # noqa: F811
    adapter = broken("README.md", lambda data: data)
    (tmp_path / "held_out.jsonl").write_bytes(b'{"input_ids": [1], "labels": [1]}\n' + line + b"\n")
    with pytest.raises(load_script("merge_model").UserError, match="held_out.jsonl:2: no row of input_ids and labels"):
        merge(adapter, tmp_path / "merged")


def test_as_a_person_runs_it(tiny_adapter, tmp_path):
    done = run_script("merge_model.py", "--adapter", tiny_adapter, "--output", "models/merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss on 4 held-out rows" in done.stdout and "mean KL" in done.stdout
    assert done.stdout.endswith("try it: python inference.py --model models/merged\n")
    assert leftovers(tmp_path / "models") == ["merged"]
    wrong = run_script("merge_model.py", "--dtype", "int8", cwd=tmp_path)
    assert wrong.returncode == 2 and "invalid choice: 'int8'" in wrong.stderr
    missing = run_script("merge_model.py", cwd=tmp_path)
    assert missing.returncode == 1
    assert (
        missing.stderr == "error: outputs/checkpoint-final: no adapter there (no adapter_config.json); pass --adapter\n"
    )


@pytest.mark.real
def test_the_merged_demo_loses_nothing(demo, tmp_path, monkeypatch):  # noqa: F811
    """The loss of the merged folder, opened in plain transformers, within 0.02 of the trained function's."""
    import torch

    monkeypatch.chdir(demo.parent.parent)
    adapter = Path("outputs/demo/checkpoint-final")
    found = merge(adapter, tmp_path / "merged")
    script = load_script("merge_model")
    run = script.read_run(adapter)
    rows = script.rows_to_measure(adapter, run)
    loss = script.held_out_loss(plain(tmp_path / "merged", getattr(torch, found["dtype"]))[0].eval(), rows)
    assert len(rows) == run["ledger"]["eval"]
    assert abs(loss - found["measured"][0]["loss"]) < 0.02
    assert abs(loss - run["result"]["loss_after"]) < 0.02


@pytest.mark.slow
def test_loading_in_4_bit_and_merging_keep_to_their_memory(tiny_qwen2, tmp_path):
    """A model of Qwen2.5-7B's shape is loaded, one of Qwen2.5-1.5B's trained for a step and merged."""
    if shutil.disk_usage(tmp_path).free < 25e9:
        pytest.skip("needs 25 GB of disk")
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_memory.py"), "--tokenizer", str(tiny_qwen2)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("limit") == 2, done.stdout + done.stderr
