"""The training script: settings, ledger, a whole run and what it writes, killed runs that go on."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build_model, build_tokenizer, load_script, run_script, write_jsonl

training = load_script("qwen_finetuning")
FLOAT32 = ("--no-load_in_4bit", "--dtype", "float32", "--optim", "adamw_torch", "--neftune_noise_alpha", "0")


def records(count: int) -> list[dict]:
    """Short records that a tiny model can learn by heart; no two are the same."""
    return [
        {"instruction": f"What costs {i}?", "input": "", "output": f"It costs {i} euros."}
        for i in range(count)
    ]


def flags_for(model: Path, *more) -> list[str]:
    """A training on data.jsonl in float32; `more` wins."""
    flags = ("--model_name", model, "--dataset_path", "data.jsonl", "--learning_rate", "1e-2", *FLOAT32)
    return [str(flag) for flag in (*flags, "--system_prompt", "Be brief.", *more)]


def train(monkeypatch, cwd: Path, model: Path, *more) -> None:
    """Run the script's main here, which saves the seconds that a new process takes to import."""
    monkeypatch.chdir(cwd)
    training.main(training.parse_args(flags_for(model, *more)))


def record_in(folder: Path) -> dict:
    return json.loads((folder / "finetune_config.json").read_text(encoding="utf-8"))


def adapter_in(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_qwen2):
    """(folder, process) of a run over 40 records that has finished."""
    folder = tmp_path_factory.mktemp("finished")
    write_jsonl(folder / "data.jsonl", records(40))
    flags = flags_for(tiny_qwen2, "--num_train_epochs", "2", "--show_answers", "1")
    process = run_script("qwen_finetuning.py", *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, process


# ------------------------------------------------------------------------------------- a whole run


def test_a_run_writes_what_it_promises(finished):
    folder, process = finished
    complete = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"}
    complete |= {"chat_template.jinja", "generation_config.json", "finetune_config.json"}
    for name in ("outputs/checkpoint-final", "outputs/checkpoint-5", "Qwen_finetuning_model"):
        assert complete <= {path.name for path in (folder / name).iterdir()}, name
    assert (folder / "outputs/loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "Qwen_finetuning_tokenizer/chat_template.jinja").is_file()
    assert not list(folder.rglob("*.partial"))
    line = r"Epoch 1/2 · Step 3/10 \| Loss: \d+\.\d{3} \| LR: \d\.\de[+-]\d\d \| "
    line += r"Time: 0:00:\d\d \| left 0:\d\d:\d\d \| "
    assert re.search(line + r"\d+ tok/s", process.stderr), process.stderr
    assert re.search(
        r"Step 5/10 \| Eval loss: \d\.\d{3}\n  reference  It costs \d+ euros\.\n  answer ", process.stderr
    )
    held_out = [json.loads(line) for line in (folder / "outputs/held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 4 and set(held_out[0]) == {"input_ids", "labels", "where", "messages", "tools"}
    stop = json.loads((folder / "Qwen_finetuning_model/generation_config.json").read_text())["eos_token_id"]
    assert stop == [build_tokenizer().eos_token_id]
    template = (folder / "Qwen_finetuning_model/chat_template.jinja").read_text()
    assert template.startswith("{%- if messages[0]['role'] != 'system' %}") and '"Be brief."' in template


def test_a_run_learns_and_its_record_says_so(finished):
    folder, process = finished
    record = record_in(folder / "Qwen_finetuning_model")
    assert record["losses"]["after"] < record["losses"]["before"] - 0.5
    printed = re.findall(r"training: loss (\d+\.\d{3}) \| Perplexity: (\d+\.\d\d)", process.stdout)
    for (loss, perplexity), value in zip(printed, record["losses"].values(), strict=True):
        assert (loss, perplexity) == (f"{value:.3f}", f"{math.exp(value):.2f}")
    assert [record["ledger"][key] for key in ("rows_read", "train", "eval")] == [40, 36, 4]
    assert record["settings"]["load_in_4bit"] is False and record["settings"]["dtype"] == "float32"
    assert "[[It costs" in process.stdout and "<|im_end|>]]" in process.stdout  # the preview
    history = json.loads((folder / "outputs/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [5, 10]  # 36 rows, 8 a step


def test_the_reported_loss_equals_a_plain_loop(finished):
    reported_loss_is_a_plain_loops(finished[0])


def reported_loss_is_a_plain_loops(folder: Path) -> None:
    """-log p of each supervised token, one row at a time, on the adapter that was saved."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "Qwen_finetuning_model", dtype=torch.float64)
    total, count = 0.0, 0
    for line in (folder / "outputs/held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert record_in(folder / "Qwen_finetuning_model")["losses"]["after"] == pytest.approx(
        total / count, rel=1e-5
    )


def test_plain_transformers_code_meets_the_same_model(finished, tiny_qwen2):
    """Five lines that know nothing of this project; the system prompt comes with the template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(finished[0] / "Qwen_finetuning_model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    chat = [{"role": "user", "content": "What costs 7?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    plain = tokenizer.decode(output, skip_special_tokens=True)
    assert "Be brief." in tokenizer.decode(inputs["input_ids"][0])
    process = run_script(
        "inference.py", "--model", name, "--instruction", "What costs 7?", "--max_new_tokens", "20", cwd=ROOT
    )
    assert process.stdout.strip() == plain.strip()


def test_gpt2_and_phi3_get_adapters_on_all_linear_layers(tmp_path, tiny_qwen2, monkeypatch, capsys):
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    phi3 = Phi3ForCausalLM(Phi3Config(vocab_size=len(tokenizer), **sizes, pad_token_id=0))
    phi3.save_pretrained(tmp_path / "phi3")
    tokenizer.save_pretrained(tmp_path / "phi3")
    build_model("gpt2", tmp_path / "gpt2")
    write_jsonl(tmp_path / "data.jsonl", records(12))
    wanted = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    }
    for name, layers in wanted.items():
        train(monkeypatch, tmp_path, tmp_path / name, "--max_steps", "1", "--overwrite", "--packing")
        assert f"all linear layers: {', '.join(sorted(layers))}" in capsys.readouterr().err
        settings = json.loads((tmp_path / "Qwen_finetuning_model/adapter_config.json").read_text())
        assert {target.split(".")[-1] for target in settings["target_modules"]} == layers
    with pytest.raises(ValueError, match="--lora_target_modules q_proj: this model has c_attn, c_fc, c_proj"):
        train(monkeypatch, tmp_path, tmp_path / "gpt2", "--overwrite", "--lora_target_modules", "q_proj")


@pytest.mark.parametrize("kind", ["Falcon", "Qwen3_5Text", "StableLm"])
def test_rows_that_a_model_does_not_keep_apart_are_padded(kind, tmp_path, monkeypatch, capsys):
    """Falcon's mask takes no positions, Qwen3.5 wants a library; StableLM only does without `by_rows`."""
    import transformers

    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "data.jsonl", records(20))
    train(monkeypatch, tmp_path, tmp_path / "model", "--max_steps", "2", "--eval_ratio", "0.3")
    words = capsys.readouterr().err
    assert ("no adapter on in_proj_a, in_proj_b" in words) == (kind == "Qwen3_5Text")
    padded = "rows are padded: in this model" in words
    assert padded == (kind != "StableLm")
    reported_loss_is_a_plain_loops(tmp_path)
    if padded:
        with pytest.raises(ValueError, match="--packing: in this model rows"):
            train(monkeypatch, tmp_path, tmp_path / "model", "--overwrite", "--packing")


# -------------------------------------------------------------------- 4 bits, gradients, early ends


def test_4_bit_training_goes_on_learning_after_evaluations(tmp_path, tiny_qwen2, monkeypatch, capsys):
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode; gradients would then be 0."""
    write_jsonl(tmp_path / "data.jsonl", records(40))
    flags = ["--load_in_4bit", "--optim", "adamw_8bit", "--dtype", "auto", "--num_train_epochs", "4"]
    flags += ["--eval_steps", "2", "--save_steps", "2", "--use_dora", "--use_rslora"]
    train(monkeypatch, tmp_path, tiny_qwen2, *flags)
    history = json.loads((tmp_path / "outputs/trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.5 and losses[len(losses) // 2] < losses[0] - 0.2
    assert record_in(tmp_path / "Qwen_finetuning_model")["settings"]["load_in_4bit"] is True
    best = json.loads((tmp_path / "outputs/trainer_state.json").read_text())["best_model_checkpoint"]
    kept, wanted = adapter_in(tmp_path / "Qwen_finetuning_model"), adapter_in(tmp_path / best)
    assert all(value.dtype == kept[name].dtype for name, value in wanted.items())  # not float32 for bfloat16
    assert all((kept[name] == value).all() for name, value in wanted.items())
    assert any("magnitude" in name for name in kept)


def test_the_loss_on_a_cpu_is_the_one_that_trl_computes(tmp_path, tiny_qwen2, monkeypatch):
    import torch
    from trl import SFTTrainer

    found = []

    def compare(self, model, inputs, *args, **kwargs):
        if not found:
            for compute in (SFTTrainer.compute_loss, own):
                model.zero_grad()
                loss = compute(self, model, dict(inputs), num_items_in_batch=torch.tensor(50))
                loss.backward()
                grads = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
                found.append([loss.item(), *grads])
            model.zero_grad()
        return own(self, model, inputs, *args, **kwargs)

    sparse = training.trainer_class()
    own = sparse.compute_loss
    sparse.compute_loss = compare
    monkeypatch.setattr(training, "trainer_class", lambda: sparse)
    write_jsonl(tmp_path / "data.jsonl", records(12))
    train(monkeypatch, tmp_path, tiny_qwen2, "--max_steps", "1", "--eval_ratio", "0")
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) > 10


def test_rows_that_lie_end_to_end_attend_each_to_itself(tiny_qwen2):
    """On a CPU by plain products, long rows by PyTorch's kernel: the same logits as each row alone."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("by_rows", training.attend_by_rows)
    options = {"dtype": torch.float64, "max_position_embeddings": 4096}
    joined = AutoModelForCausalLM.from_pretrained(tiny_qwen2, attn_implementation="by_rows", **options)
    alone = AutoModelForCausalLM.from_pretrained(tiny_qwen2, attn_implementation="eager", **options)
    rows = [torch.randint(5, 300, (length,)) for length in (3, 1100, 40)]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    ends = torch.tensor([0, 3, 1103, 1143], dtype=torch.int32)
    with torch.no_grad():
        logits = joined(
            torch.cat(rows)[None], position_ids=places, cu_seq_lens_q=ends, use_cache=False
        ).logits[0]
        wanted = torch.cat([alone(row[None]).logits[0] for row in rows])
    assert torch.allclose(logits, wanted, atol=1e-6)  # eager computes its softmax in float32


def test_a_step_that_is_not_finite_is_not_taken_and_its_rows_are_named(tmp_path, tiny_qwen2, monkeypatch):
    write_jsonl(tmp_path / "data.jsonl", records(12))
    sparse = training.trainer_class()
    own = sparse.compute_loss
    broken = lambda self, *args, **kwargs: (
        own(self, *args, **kwargs) * (math.nan if self.state.global_step == 1 else 1)
    )
    sparse.compute_loss = broken
    monkeypatch.setattr(training, "trainer_class", lambda: sparse)
    flags = (
        "--max_steps",
        "3",
        "--save_steps",
        "1",
        "--eval_steps",
        "1",
        "--gradient_accumulation_steps",
        "2",
    )
    with pytest.raises(ValueError, match=r"step 2 is not finite.*data.jsonl:\d+, data.jsonl:\d+") as error:
        train(monkeypatch, tmp_path, tiny_qwen2, *flags)
    assert len(re.findall(r"data\.jsonl:", str(error.value))) == 2  # of that batch
    assert record_in(tmp_path / "outputs/checkpoint-1") and not (tmp_path / "Qwen_finetuning_model").exists()


def test_early_stopping_and_an_adapter_that_learns_on(tmp_path, tiny_qwen2, finished, monkeypatch, capsys):
    write_jsonl(tmp_path / "data.jsonl", records(30))
    flags = (
        "--adapter",
        finished[0] / "Qwen_finetuning_model",
        "--learning_rate",
        "0.3",
        "--eval_steps",
        "1",
    )
    train(monkeypatch, tmp_path, tiny_qwen2, *flags, "--save_steps", "1", "--early_stopping_patience", "2")
    out = capsys.readouterr().out
    assert re.search(r"trained [34] steps of \d+: 2 evaluations without a better loss", out), out
    record, earlier = (record_in(folder / "Qwen_finetuning_model") for folder in (tmp_path, finished[0]))
    assert record["losses"]["before"] < earlier["losses"]["before"] - 0.5  # it began where the other ended
    with pytest.raises(ValueError, match="has lora_r 16, and --lora_r is 8"):
        train(monkeypatch, tmp_path, tiny_qwen2, *flags, "--overwrite", "--lora_r", "8")
    with pytest.raises(ValueError, match="has lora_alpha 32, and --lora_alpha is 64"):
        train(monkeypatch, tmp_path, tiny_qwen2, *flags, "--overwrite", "--lora_alpha", "64")
    with pytest.raises(ValueError, match="belongs to"):
        other = build_model("qwen2", tmp_path / "other")
        train(monkeypatch, tmp_path, other, *flags, "--overwrite")


# ------------------------------------------------------------------------------ killed, and going on


def test_killed_and_resumed_ends_where_an_undisturbed_run_ends(tmp_path, tiny_qwen2):
    """Equal bit for bit; a checkpoint that was cut in half is passed over."""
    flags = flags_for(
        tiny_qwen2, "--num_train_epochs", "4", "--eval_steps", "5", "--save_steps", "5", "--lora_dropout"
    )
    flags += ["0.1", "--logging_steps", "1"]
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "data.jsonl", records(40))
    command = [sys.executable, str(ROOT / "qwen_finetuning.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path / "killed", stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "Step 13/20" in line:  # three steps after the second checkpoint
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    half = tmp_path / "killed/outputs/checkpoint-13"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    for name, more in (("undisturbed", []), ("killed", ["--resume"])):
        process = run_script("qwen_finetuning.py", *flags, *more, cwd=tmp_path / name)
        assert process.returncode == 0, process.stderr
    assert "going on from outputs/checkpoint-10" in process.stderr
    kept, wanted = (
        adapter_in(tmp_path / name / "Qwen_finetuning_model") for name in ("killed", "undisturbed")
    )
    assert kept.keys() == wanted.keys() and all((kept[name] == wanted[name]).all() for name in kept)


def test_sigterm_saves_and_ends_with_143_without_a_result(tmp_path, tiny_qwen2):
    write_jsonl(tmp_path / "data.jsonl", records(40))
    flags = flags_for(tiny_qwen2, "--num_train_epochs", "40", "--logging_steps", "1")
    command = [sys.executable, str(ROOT / "qwen_finetuning.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "Step 2/" in line:
            process.terminate()
            break
    rest = process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM and "--resume goes on from it" in rest
    newest = max((tmp_path / "outputs").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert record_in(newest) and not (tmp_path / "Qwen_finetuning_model").exists()


def test_resuming_another_run_is_refused(finished, tiny_qwen2, monkeypatch, tmp_path):
    folder, _ = finished
    same = ("--num_train_epochs", "2", "--resume")
    flags = ("--lora_r", "8", "--optim", "sgd", "--learning_rate", "0.5", "--system_prompt", "Be long.")
    with pytest.raises(
        ValueError, match="lora_r was 16, is 8; .*system_prompt was 'Be brief.', is 'Be long.'"
    ) as error:
        train(monkeypatch, folder, tiny_qwen2, *same, *flags)
    assert "optim was 'adamw_torch', is 'sgd'" in str(error.value)
    assert "learning_rate was 0.01, is 0.5" in str(error.value) and "chat_template" in str(error.value)
    write_jsonl(tmp_path / "other.jsonl", records(41))
    with pytest.raises(ValueError, match=r"holds another run: data \(SHA-256\) was"):
        train(monkeypatch, folder, tiny_qwen2, *same, "--dataset_path", tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="num_train_epochs was 2.0, is 1.0"):
        train(monkeypatch, folder, tiny_qwen2, "--num_train_epochs", "1", "--resume")
    with pytest.raises(ValueError, match="there is no run in nowhere"):
        train(monkeypatch, folder, tiny_qwen2, *same, "--output_dir", "nowhere")
    with pytest.raises(ValueError, match="outputs holds an earlier run: pass --resume, --overwrite"):
        train(monkeypatch, folder, tiny_qwen2)


def test_more_epochs_are_allowed_and_said_and_no_picture_costs_no_result(finished, tiny_qwen2, tmp_path):
    import shutil

    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("raise ImportError('no matplotlib here')")
    flags = flags_for(tiny_qwen2, "--num_train_epochs", "3", "--resume", "--show_answers", "0")
    process = run_script("qwen_finetuning.py", *flags, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert process.returncode == 0, process.stderr
    assert "num_train_epochs was 2.0, is 3.0" in process.stderr and "Step 15/15" in process.stderr
    assert "no loss_curve.png (no matplotlib here); everything else is saved" in process.stderr
    assert record_in(tmp_path / "Qwen_finetuning_model")["settings"]["num_train_epochs"] == 3


# ------------------------------------------------------------------------------ rows and their ledger


def prepare(tmp_path: Path, lines: list[str], **settings) -> dict:
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = training.FinetuneConfig(dataset_path=str(tmp_path / "data.jsonl"), **settings)
    return training.prepare_data(config, build_tokenizer())


def test_the_ledger_counts_every_row_once(tmp_path, capsys):
    lines = [json.dumps(record) for record in records(20)]
    lines += [lines[3], "{broken", '{"question": 1}', '{"input": "x", "output": " "}', "[1]", ""]
    lines += [
        json.dumps({"input": "long " * 500, "output": "y"}),
        json.dumps({"input": "q", "output": "long " * 200}),
    ]
    silent = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    }
    lines += [json.dumps({"input": "<|im_end|>", "output": "typed"}), json.dumps(silent)]
    data = prepare(tmp_path, lines, skip_bad_rows=True, max_seq_length=150)
    assert capsys.readouterr().err.count("4 rows can not be used") == 1
    ledger = data["ledger"]
    wanted = {"rows_read": 28, "unreadable_or_wrong_shape": 3, "empty_answer": 1, "exact_duplicate": 1}
    wanted |= {"no_supervised_token": 2, "answers_cut": 1, "examples": 22}
    assert {name: ledger[name] for name in wanted} == wanted | {"rows_read": 29}
    assert ledger["train"] + ledger["eval"] == 22 == len(data["train"]) + len(data["eval"])
    labels = [example["labels"] for part in ("train", "eval") for example in data[part]]
    assert ledger["supervised_tokens"] == sum(int((row != -100).sum()) for row in labels)
    assert data["stop_ids"] == {build_tokenizer().eos_token_id}  # also of answers that were cut
    dropped = prepare(tmp_path, lines, skip_bad_rows=True, max_seq_length=150, overlong="drop")["ledger"]
    assert dropped["over_length"] == 2 and dropped["answers_cut"] == 0
    with pytest.raises(ValueError, match="4 rows can not be used"):
        prepare(tmp_path, lines)


def test_no_length_moves_a_row_across_the_split(tmp_path):
    lines = [json.dumps(record) for record in records(30)]
    sides = [prepare(tmp_path, lines, max_seq_length=length)["eval"] for length in (60, 2048)]
    assert [example["where"] for example in sides[0]] == [example["where"] for example in sides[1]]
    assert len(sides[0]) == 3


def test_bad_rows_stop_the_run_by_name(tmp_path):
    lines = [json.dumps(record) for record in records(6)] + ["{oops"] + ['{"input": "x"}'] * 12
    with pytest.raises(ValueError, match="(?s)13 rows can not be used.*--skip_bad_rows") as error:
        prepare(tmp_path, lines)
    assert "data.jsonl:7: no JSON object: not JSON" in str(error.value)
    assert "data.jsonl:16: the assistant says nothing" in str(error.value) and "data.jsonl:17" not in str(
        error.value
    )


# --------------------------------------------------------------------------------- settings and limits


def test_what_can_not_work_is_said_before_training(tmp_path, tiny_qwen2, tiny_gpt2, monkeypatch):
    row = {"instruction": "q", "output": "It costs 12 euros. " * 500}
    write_jsonl(tmp_path / "data.jsonl", [*records(10), row])
    gpt2 = build_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match="data.jsonl:11 has 2048 tokens, the model 1024 positions: pass --max_seq"
    ):
        train(monkeypatch, tmp_path, gpt2, "--max_seq_length", "2048")
    small = build_model("qwen2", tmp_path / "small", vocab_size=300)
    with pytest.raises(ValueError, match="the tokenizer gives token .* embedding has 300 rows"):
        train(monkeypatch, tmp_path, small, "--max_seq_length", "512")
    with pytest.raises(ValueError, match="its tokenizer has no chat template, or no EOS; --template_path"):
        train(monkeypatch, tmp_path, tiny_gpt2)
    for flag in ("max_seq_length=-1", "lora_r=0", "learning_rate=nan", "show_answers=-1"):
        with pytest.raises(ValueError, match=f"^below what makes sense: --{flag.split('=')[0]}$"):
            train(monkeypatch, tmp_path, tiny_qwen2, f"--{flag}")
    zero = ("--max_seq_length", "512", "--deepspeed", ROOT / "configs/deepspeed/ds_config.json")
    with pytest.raises(ValueError, match="deepspeed is not installed; its version stands in requirements"):
        train(monkeypatch, tmp_path, tiny_qwen2, *zero)
    real = importlib.util.find_spec
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="--deepspeed needs CUDA GPUs and"):
        patch.setattr("importlib.util.find_spec", lambda name, *a: name == "deepspeed" or real(name, *a))
        train(monkeypatch, tmp_path, tiny_qwen2, *zero)
    (tmp_path / "data/processed").mkdir(parents=True)
    (tmp_path / "data/processed/my_data.jsonl").touch()
    with pytest.raises(ValueError, match="no.jsonl: no such dataset; there is data/processed/my_data.jsonl"):
        train(monkeypatch, tmp_path, tiny_qwen2, "--dataset_path", "no.jsonl")
    (tmp_path / "Qwen_finetuning_model").mkdir()
    (tmp_path / "Qwen_finetuning_model/mine.txt").touch()
    with pytest.raises(ValueError, match="Qwen_finetuning_model is replaced whole, and holds other files"):
        train(monkeypatch, tmp_path, tiny_qwen2)
    with pytest.raises(ValueError, match="new is replaced whole, and holds other files or --output_dir"):
        train(monkeypatch, tmp_path, tiny_qwen2, "--model_dir", "new", "--output_dir", "new/outputs")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**8}))
    with pytest.raises(
        ValueError, match="needs about .* GB free. Take a smaller --per_device_train_batch_size"
    ):
        train(monkeypatch, tmp_path, tiny_qwen2, "--model_dir", "other", "--max_seq_length", "512")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("load_in_4bit: [[true]]", "a.yaml:1: load_in_4bit is set twice, or holds a section or lists"),
        ("lora_rank: 8", "a.yaml:1: unknown setting 'lora_rank'; the nearest known one is 'lora"),
        ("lora:\n  r: 8\nlora_r: 4", "a.yaml:3: lora_r is set twice"),
        ("lora: {r: {x: 1}}", "a.yaml:1: lora_r is set twice, or holds a section"),
        ("- lora_r", "expected lines such as"),
        ("a: [", "no YAML"),
    ],
)
def test_mistakes_in_a_yaml_file_get_one_line(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        training.parse_args(["--config", str(tmp_path / "a.yaml")])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["overlong: explode", "lora_r: [1, 2]", "lora_r: many", "packing: [true, false]"]
)
def test_what_a_flag_can_not_be_a_yaml_file_can_not_say(tmp_path, text, capsys):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        training.parse_args(["--config", str(tmp_path / "a.yaml")])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_yaml_flat_or_in_sections_and_the_command_line_wins(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model:\n  name: m\n  load_in_4bit: false\nlora: {r: 8, target_modules: [a, b]}\n"
        "training:\n  epochs: 2\n"
        "  learning_rate: 2e-5\neval_strategy: no\ndeepspeed: null\ntraining_args:\n  output_dir: o\n"
    )
    config = training.parse_args(["--config", str(file), "--lora_r", "4"])
    assert (config.model_name, config.load_in_4bit, config.lora_r) == ("m", False, 4)
    assert (config.num_train_epochs, config.learning_rate, config.eval_strategy) == (2.0, 2e-5, "no")
    assert (config.lora_target_modules, config.deepspeed, config.output_dir) == (["a", "b"], "", "o")
    for name in (*training.ALIASES, "lora_r"):
        file.write_text(
            f"{name.split('.')[-1]}: 1"
            if "." not in name
            else f"{name.split('.')[0]}: {{{name.split('.')[1]}: 1}}"
        )
        training.parse_args(["--config", str(file)])


def test_the_files_of_configs_load(monkeypatch):
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        config = training.parse_args(["--config", str(file)])
        if file.name == "finetune_reference.yaml":  # every setting with its default
            assert vars(config) == vars(training.FinetuneConfig()) | {"config": str(file)}
            named = re.findall(r"^(\w+):", file.read_text(), re.M)
            only_once = {"demo", "config", "dry_run", "resume", "local_rank"}
            assert set(named) == set(vars(config)) - only_once
    demo = training.parse_args(["--demo"])
    assert demo.output_dir.startswith("outputs/demo") and demo.overwrite and demo.load_in_4bit
    taught = json.loads((ROOT / "configs/demo_dataset.json").read_text(encoding="utf-8"))
    assert not {record["instruction"] for record in taught} & set(training.DEMO_QUESTIONS)


def test_flags_that_are_unknown_or_shortened_exit_with_2(tmp_path):
    for flag in ("--lora_rang", "--learning"):
        process = run_script("qwen_finetuning.py", flag, "1", cwd=tmp_path)
        assert process.returncode == 2 and f"unrecognized arguments: {flag}" in process.stderr
    for flags, words in (
        (["--eval_strategy", "epoch"], "saves what was evaluated"),
        (
            ["--eval_strategy", "no", "--early_stopping_patience", "3"],
            "--early_stopping_patience needs a best evaluation",
        ),
        (
            ["--demo", "--config", str(ROOT / "configs/finetune.yaml")],
            "--demo and --config exclude each other",
        ),
        (["--model_dir", "outputs/", "--eval_ratio", "0"], "must be three folders"),
        (["--eval_ratio", "1"], "is a share"),
    ):
        with pytest.raises(ValueError, match=words):
            training.parse_args(flags)
    assert training.parse_args(["--model_dir", "mine/"]).model_dir == "mine"
    process = run_script("qwen_finetuning.py", "--resume", "--overwrite", cwd=tmp_path)
    assert process.returncode == 1 and process.stderr.startswith(
        "error: --resume and --overwrite exclude each other"
    )


# ----------------------------------------------------------------------------------- several, GPU, demo


@pytest.mark.slow
def test_two_processes_train_the_same_as_one(tmp_path, tiny_qwen2):
    """torchrun with gloo: the same rows in a step give the same adapter; SIGTERM leaves a checkpoint."""
    losses = {}
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        write_jsonl(folder / "data.jsonl", records(36))
        flags = flags_for(
            tiny_qwen2, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 1
        )
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        command = [*launcher, str(ROOT / "qwen_finetuning.py"), *flags, "--learning_rate", "1e-3"]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("rows read") == 1  # only the first process speaks
        losses[processes] = record_in(folder / "Qwen_finetuning_model")["losses"]["after"]
    assert losses[1] == pytest.approx(losses[2], rel=2e-2)
    flags = [*command, "--overwrite", "--num_train_epochs", "100", "--logging_steps", "1"]
    process = subprocess.Popen(flags, cwd=folder, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "Step 2/" in line:
            process.terminate()
            break
    assert "--resume goes on from it" in process.stderr.read()
    assert (
        process.wait() != 0 and len(list((folder / "outputs").glob("checkpoint-*/finetune_config.json"))) >= 1
    )


@pytest.mark.slow
def test_twenty_kills_do_not_change_a_bit(tmp_path, tiny_qwen2):
    import random

    flags = flags_for(tiny_qwen2, "--num_train_epochs", "4", "--eval_steps", "1", "--save_steps", "1")
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "data.jsonl", records(40))
    assert run_script("qwen_finetuning.py", *flags, cwd=tmp_path / "undisturbed").returncode == 0
    chance = random.Random(0)
    for _ in range(20):
        resume = (
            ["--resume"] if (tmp_path / "killed/outputs/finetune_config.json").is_file() else ["--overwrite"]
        )
        command = [sys.executable, str(ROOT / "qwen_finetuning.py"), *flags, *resume]
        process = subprocess.Popen(command, cwd=tmp_path / "killed", stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(5, 14))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert run_script("qwen_finetuning.py", *flags, *resume, cwd=tmp_path / "killed").returncode == 0
    kept, wanted = (
        adapter_in(tmp_path / name / "Qwen_finetuning_model") for name in ("killed", "undisturbed")
    )
    assert all((kept[name] == wanted[name]).all() for name in wanted)


@pytest.mark.gpu
def test_qlora_on_a_gpu(tmp_path, tiny_qwen2, monkeypatch, capsys):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    write_jsonl(tmp_path / "data.jsonl", records(40))
    flags = ("--load_in_4bit", "--dtype", "auto", "--optim", "adamw_8bit", "--num_train_epochs", "4")
    train(monkeypatch, tmp_path, tiny_qwen2, *flags)
    record = record_in(tmp_path / "Qwen_finetuning_model")
    assert record["losses"]["after"] < record["losses"]["before"] - 0.5
    assert record["settings"]["optim"] == "paged_adamw_8bit" and "cuda" in capsys.readouterr().out


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_learns_name_format_and_stopping(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (ROOT / "models").mkdir(exist_ok=True)  # where an earlier demo left the model
    (tmp_path / "models").symlink_to(ROOT / "models")
    process = run_script(
        "qwen_finetuning.py", "--demo", cwd=tmp_path, env={"OMP_NUM_THREADS": "2"}, timeout=900
    )
    assert process.returncode == 0, process.stderr
    answers = re.findall(r"^  tuned     (.*)", process.stdout, re.M)
    assert len(answers) == 3 and all(re.fullmatch(r"Lumi: .+ Shine on!", answer) for answer in answers), (
        answers
    )
    losses = record_in(tmp_path / "outputs/demo/Qwen_finetuning_model")["losses"]
    assert losses["after"] < 0.6 < 3 < losses["before"]
