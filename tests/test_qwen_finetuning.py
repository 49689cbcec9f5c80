"""The training script: rows and ledger, labels and noise, a whole run, its end by force and its going on."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, build_tokenizer, load_script, run_script, write_jsonl

qwen = load_script("qwen_finetuning")

FLOAT32 = ("--no-load_in_4bit", "--dtype", "float32", "--optim", "adamw_torch", "--neftune_noise_alpha", "0")


def records(count: int) -> list[dict]:
    """Short records that a tiny model can learn by heart; no two are the same."""
    return [{"instruction": f"What costs {i}?", "input": "", "output": f"It costs {i} euros."} for i in range(count)]


def base_flags(model: Path) -> tuple:
    """Train on data.jsonl in float32, without 4-bit."""
    flags = ("--model_name", model, "--dataset_path", "data.jsonl", "--learning_rate", "1e-2", "--logging_steps", "1")
    return (*flags, "--system_prompt", "", *FLOAT32)


def run(cwd: Path, model: Path, *flags, **options):
    """The finished process of a training in `cwd`; the flags win over `base_flags`."""
    return run_script("qwen_finetuning.py", *base_flags(model), *flags, cwd=cwd, **options)


def run_here(monkeypatch, cwd: Path, model: Path, *flags) -> None:
    """The same without a new process, which saves the seconds that the imports take."""
    monkeypatch.chdir(cwd)
    qwen.main(qwen.parse_args([str(flag) for flag in (*base_flags(model), *flags)]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_qwen2):
    """A folder in which a run over 40 records has finished, and the process."""
    folder = tmp_path_factory.mktemp("finished")
    write_jsonl(folder / "data.jsonl", records(40))
    process = run(folder, tiny_qwen2, "--num_train_epochs", "2")
    assert process.returncode == 0, process.stderr
    return folder, process


# ------------------------------------------------------------------------------------ a whole run


def test_a_run_writes_what_it_promises(finished):
    folder, process = finished
    for name in ("outputs/loss_curve.png", "outputs/trainer_state.json", "outputs/held_out.jsonl"):
        assert (folder / name).stat().st_size > 0
    for name in ("outputs/checkpoint-final", "Qwen_finetuning_model"):
        assert (folder / name / "adapter_model.safetensors").is_file()
        assert (folder / name / "finetune_config.json").is_file()
        assert (folder / name / "tokenizer.json").is_file()
    assert (folder / "Qwen_finetuning_tokenizer" / "tokenizer.json").is_file()
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.old"))
    line = r"Epoch 1/2 · Step 1/10 · loss \d+\.\d{3} · lr \d\.\de[+-]\d\d · \d+ tok/s · "
    line += r"\d:\d\d:\d\d elapsed · \d:\d\d:\d\d left"
    assert re.search(line, process.stderr), process.stderr


def test_a_run_learns_and_its_record_says_so(finished):
    folder, process = finished
    record = json.loads((folder / "Qwen_finetuning_model" / "finetune_config.json").read_text())
    assert record["result"]["loss_after"] < record["result"]["loss_before"] - 0.5
    printed = re.findall(r"training: loss (\d+\.\d{3}), perplexity", process.stdout)
    assert printed == [f"{record['result'][key]:.3f}" for key in ("loss_before", "loss_after")]
    assert record["ledger"]["rows_read"] == 40 and record["ledger"]["train"] == 36 and record["ledger"]["eval"] == 4
    assert len(record["held_out"]) == 4 and len(set(record["held_out"])) == 4
    assert record["settings"]["lora_r"] == 16 and record["split"] == {"eval_ratio": 0.1, "split_seed": 42}
    sha256 = subprocess.run(["sha256sum", folder / "data.jsonl"], capture_output=True, text=True).stdout.split()[0]
    assert record["dataset"] == {"path": "data.jsonl", "rows": 40, "sha256": sha256}


def test_a_short_run_still_evaluates_and_saves_every_epoch(finished):
    folder, _ = finished
    history = json.loads((folder / "outputs" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [5, 10]  # 36 rows, 8 a step
    assert {path.name for path in (folder / "outputs").glob("checkpoint-*")} == {
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-final",
    }


def test_the_best_checkpoint_is_what_is_kept(tmp_path, tiny_qwen2, monkeypatch):
    """At a rate that ruins the model after the first evaluation, the adapter saved is the first one."""
    write_jsonl(tmp_path / "data.jsonl", records(40))
    flags = ("--learning_rate", "0.02", "--num_train_epochs", "6", "--eval_steps", "2", "--save_steps", "2")
    run_here(monkeypatch, tmp_path, tiny_qwen2, *flags)
    state = json.loads((tmp_path / "outputs" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    saved = (tmp_path / "Qwen_finetuning_model" / "adapter_model.safetensors").read_bytes()
    from safetensors.torch import load

    checkpoint = (tmp_path / "outputs" / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    kept, wanted = load(saved), load(checkpoint)
    assert kept.keys() == wanted.keys() and all((kept[name] == wanted[name]).all() for name in kept)


def test_a_second_run_needs_a_word_about_the_first(finished, tiny_qwen2):
    folder, _ = finished
    process = run(folder, tiny_qwen2)
    assert process.returncode == 1
    assert "--resume" in process.stderr and "--overwrite" in process.stderr and "Traceback" not in process.stderr


def test_gpt2_gets_adapters_on_all_linear_layers(tmp_path, monkeypatch, capsys):
    from conftest import build_model

    model = build_model("gpt2", tmp_path / "gpt2")
    write_jsonl(tmp_path / "data.jsonl", records(12))
    run_here(monkeypatch, tmp_path, model, "--max_steps", "2")
    assert "adapters go on all linear layers" in capsys.readouterr().out
    settings = json.loads((tmp_path / "Qwen_finetuning_model" / "adapter_config.json").read_text())
    assert {name.split(".")[-1] for name in settings["target_modules"]} == {"c_attn", "c_proj", "c_fc"}


def test_packing_trains_on_the_same_tokens(tmp_path, tiny_qwen2, monkeypatch, capsys):
    write_jsonl(tmp_path / "data.jsonl", records(40))
    run_here(monkeypatch, tmp_path, tiny_qwen2, "--packing", "--max_seq_length", "200", "--max_steps", "3")
    assert re.search(r"^(\d+) training rows", capsys.readouterr().out, re.M)[1] in (
        "5",
        "6",
        "7",
    )  # 36 of 30 to 40 tokens each


# ------------------------------------------------------------------------------ killed, and going on


def test_killed_and_resumed_ends_where_an_undisturbed_run_ends(tmp_path, tiny_qwen2):
    flags = ("--num_train_epochs", "4", "--eval_steps", "5", "--save_steps", "5", "--seed", "1")
    losses = {}
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder / "data.jsonl", records(40))
        if name == "killed":
            command = [sys.executable, ROOT / "qwen_finetuning.py", *base_flags(tiny_qwen2), *flags]
            process = subprocess.Popen(list(map(str, command)), cwd=folder, stderr=subprocess.PIPE, text=True)
            for line in process.stderr:
                if "Step 13/20" in line:  # three steps after the second checkpoint
                    process.send_signal(signal.SIGKILL)
                    break
            process.wait()
            assert process.returncode == -signal.SIGKILL
            flags = (*flags, "--resume")
        process = run(folder, tiny_qwen2, *flags)
        assert process.returncode == 0, process.stderr
        if name == "killed":
            assert "resuming from outputs/checkpoint-10" in process.stderr
        record = json.loads((folder / "Qwen_finetuning_model" / "finetune_config.json").read_text())
        losses[name] = record["result"]["loss_after"]
    assert losses["killed"] == pytest.approx(losses["undisturbed"], abs=1e-4)


def test_a_half_written_checkpoint_is_passed_over(tmp_path, capsys):
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_st'), (15, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").touch()
        (folder / "optimizer.pt").touch()
        if state:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-final").mkdir()
    assert qwen.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert "checkpoint-15 was not saved to its end" in capsys.readouterr().err


def test_resuming_another_run_is_refused(finished, tiny_qwen2, monkeypatch):
    folder, _ = finished
    with pytest.raises(qwen.UserError, match="lora_r was 16, is 8; .*split_seed was 42, is 1"):
        flags = ("--num_train_epochs", "2", "--resume", "--lora_r", "8", "--split_seed", "1")
        run_here(monkeypatch, folder, tiny_qwen2, *flags)


def test_overwrite_removes_only_what_a_run_wrote(tmp_path):
    for name in ("checkpoint-5/x", "checkpoint-final/x", "loss_curve.png", "README.md", "mine/x", "checkpoint-mine/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    qwen.remove_earlier_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "checkpoint-mine", "mine"]


# ------------------------------------------------------------------------------ rows and their ledger


def prepare(tmp_path: Path, lines: list[str], **settings):
    """`prepare_data` on a file with these lines."""
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = qwen.FinetuneConfig(dataset_path=str(tmp_path / "data.jsonl"), system_prompt="", **settings)
    return qwen.prepare_data(config, build_tokenizer(), qwen.sha256_of(tmp_path / "data.jsonl"))


def test_the_ledger_counts_every_row_once(tmp_path):
    lines = [json.dumps(record) for record in records(20)]
    lines += [lines[3], "{broken", '{"question": 1}', '{"input": "x", "output": " "}', "[1]", ""]
    lines += [json.dumps({"input": "long " * 500, "output": "y"}), json.dumps({"input": "q", "output": "long " * 200})]
    lines += [json.dumps({"input": "<|im_end|>", "output": "typed"})]
    train, held_out, ledger, digests = prepare(tmp_path, lines, skip_bad_rows=True, max_seq_length=150)
    assert ledger["rows_read"] == 28
    wanted = {"unreadable": 2, "wrong_shape": 1, "empty_answer": 1, "exact_duplicate": 1, "no_supervised_token": 1}
    assert {name: ledger[name] for name in wanted} == wanted
    assert ledger["train"] + ledger["eval"] == 22 == len(train) + len(held_out)
    assert ledger["answers_cut"] == 1 and ledger["answers_without_end_of_turn"] == 1
    assert ledger["records_with_control_tokens"] == 1
    assert ledger["supervised_tokens"] == sum(
        label != -100 for part in (train, held_out) for row in part for label in row["labels"]
    )
    assert len(digests) == len(held_out)
    _, _, ledger, _ = prepare(tmp_path, lines, skip_bad_rows=True, max_seq_length=150, overlong="drop")
    assert ledger["over_length"] == 2 and ledger["answers_cut"] == 0


def test_no_length_moves_a_row_across_the_split(tmp_path):
    lines = [json.dumps(record) for record in records(30)]
    _, _, _, short = prepare(tmp_path, lines, max_seq_length=60)
    _, _, _, long = prepare(tmp_path, lines, max_seq_length=2048)
    assert sorted(short) == sorted(long) and len(long) == 3


def test_bad_rows_stop_the_run_by_name(tmp_path):
    lines = [json.dumps(record) for record in records(6)] + ["{oops"] + ['{"input": "x"}'] * 12
    with pytest.raises(qwen.UserError) as error:
        prepare(tmp_path, lines)
    assert "13 rows can not be used" in str(error.value)
    assert "data.jsonl:7: not JSON" in str(error.value) and "data.jsonl:8: unknown shape" in str(error.value)
    assert "data.jsonl:16" in str(error.value) and "data.jsonl:17" not in str(error.value)
    with pytest.raises(qwen.UserError, match=r"data.jsonl:[56]: longer than --max_seq_length 20"):
        prepare(tmp_path, lines[:6], overlong="error", max_seq_length=20)


def test_what_was_prepared_is_read_again_until_something_changes(tmp_path, monkeypatch):
    data, tokenizer = write_jsonl(tmp_path / "data.jsonl", records(30)), build_tokenizer()
    read, encoded = [], []
    for name, calls in (("dataset_rows", read), ("encode_conversation", encoded)):
        work = getattr(qwen, name)
        monkeypatch.setattr(qwen, name, lambda *args, work=work, calls=calls: calls.append(args) or work(*args))

    def rows_of(**settings) -> list:
        config = qwen.FinetuneConfig(dataset_path=str(data), **settings)
        train, held_out, ledger, digests = qwen.prepare_data(config, tokenizer, qwen.sha256_of(data))
        return [train.to_list(), held_out.to_list(), ledger, digests]

    first = rows_of()
    assert rows_of() == first == rows_of(learning_rate=1.0)
    assert rows_of(split_seed=1) != first and (len(read), len(encoded)) == (1, 30)
    rows_of(max_seq_length=1000)
    assert (len(read), len(encoded)) == (1, 60)
    write_jsonl(data, records(31))
    assert rows_of()[2]["rows_read"] == 31 and (len(read), len(encoded)) == (2, 91)
    tokenizer.chat_template += "\n"
    rows_of()
    rows_of(system_prompt="other")
    assert (len(read), len(encoded)) == (3, 153)


def test_arrays_and_byte_order_marks_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(records(3), indent=1).encode())
    rows = list(qwen.read_rows(tmp_path / "a.json"))
    assert [record for _, record, _ in rows] == records(3)
    assert rows[1][0].endswith("a.json:7")


def rows_in(path: Path, text: str) -> list[tuple]:
    """(line, record, fault) of each row that is read from a file with this text."""
    path.write_text(text, encoding="utf-8")
    return [(int(where.rpartition(":")[2]), record, fault) for where, record, fault in qwen.read_rows(path)]


def test_no_good_row_around_a_damaged_one_is_lost_in_an_array(tmp_path):
    array = json.dumps(records(4), indent=1, ensure_ascii=False)
    found = rows_in(tmp_path / "a.json", array.replace("What costs 1?", 'What "costs 1?'))
    assert [record for _, record, _ in found if record] == [record for i, record in enumerate(records(4)) if i != 1]
    assert [(line, fault[:8]) for line, _, fault in found if fault] == [(7, "not JSON")]
    lines = "[" + ",\n".join(map(json.dumps, records(3)))  # an array that is cut, in a file of either name
    for name in ("cut.json", "cut.jsonl"):
        found = rows_in(tmp_path / name, lines)
        assert [record for _, record, _ in found] == [*records(3), None] and "not JSON" in found[-1][2]


def test_what_stands_behind_an_array_is_named_and_lines_are_still_read(tmp_path):
    first, second = (json.dumps([record]) for record in records(2))
    found = rows_in(tmp_path / "two.json", f"{first}\n\n{second}\n")
    assert found[0][1] == records(2)[0] and found[1][0] == 3 and "text behind the array" in found[1][2]
    found = rows_in(tmp_path / "two.jsonl", f"{first}\n{json.dumps(records(2)[1])}\n")
    assert found == [(1, None, "expected an object, found list"), (2, records(2)[1], "")]


def test_an_empty_column_of_a_table_is_no_shape(tmp_path):
    record = {"instruction": "q", "output": "a", "messages": None, "conversations": None, "system": None}
    assert [message["content"] for message in qwen.messages_of(record)] == ["q", "a"]


def test_the_preview_tells_what_carries_loss():
    tokenizer = build_tokenizer()
    encoded = qwen.encode_conversation(qwen.messages_of({"input": "ask\x1b[31m", "output": "answer"}), tokenizer)
    text = qwen.preview(encoded, tokenizer)
    assert text == "<|im_start|>user\nask\ufffd[31m<|im_end|>\n<|im_start|>assistant\n[[answer<|im_end|>]]\n"


# ----------------------------------------------------------------------- losses, gradients and noise


def encoded_rows(count: int) -> list[dict]:
    tokenizer = build_tokenizer()
    texts = [{"input": f"q{i}" * (i + 1), "output": f"answer {i} " * (i + 1)} for i in range(count)]
    return [qwen.encode_conversation(qwen.messages_of(text), tokenizer) for text in texts]


def test_held_out_loss_equals_a_plain_loop(tiny_qwen2, tiny_gpt2):
    import torch
    from transformers import AutoModelForCausalLM

    for folder in (tiny_qwen2, tiny_gpt2):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        rows, total, count = encoded_rows(7), 0.0, 0
        for row in rows:
            with torch.no_grad():
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += (labels != -100).sum().item()
        for size in (1, 100, 10_000):  # alone, a few together, all in one
            assert qwen.held_out_loss(model, rows, size) == pytest.approx(total / count, rel=1e-5)
    assert math.isnan(qwen.held_out_loss(model, []))


def test_neftune_scales_its_noise_by_each_rows_own_length(tiny_qwen2):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    ids, positions = torch.zeros(1, 400, dtype=torch.long), torch.tensor([[*range(16), *range(384)]])
    plain, seen = model.get_input_embeddings()(ids).detach(), []
    qwen.add_neftune(model, 5.0)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.train()
    model(input_ids=ids, position_ids=positions, use_cache=False)
    noise = (seen[0] - plain)[0].abs()
    for part, length in ((noise[:16], 16), (noise[16:], 384)):
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.97 * bound < part.max() <= bound * 1.0001
    model.eval()
    model(input_ids=ids, position_ids=positions, use_cache=False)
    assert (seen[1] == plain).all()


def test_the_loss_on_a_cpu_is_the_one_that_trl_computes(tmp_path, tiny_qwen2):
    """Same value and same gradients in float32, alone and in a step of several forwards, with either attention."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    config = qwen.FinetuneConfig(model_name=str(tiny_qwen2), output_dir=tmp_path / "outputs", neftune_noise_alpha=0)
    rows = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in encoded_rows(6)])
    device = qwen.find_device(False, "float32")
    args = qwen.training_args(config, device, len(rows), held_out=True, recompute=False)
    model, tokenizer = qwen.load_model(config, device), AutoTokenizer.from_pretrained(tiny_qwen2)
    trainer = qwen.build_trainer(config, args, model, tokenizer, rows, rows, config.lora_target_modules, {})
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = trainer.data_collator([rows[i] for i in range(3)])
    found = []
    for compute, attention in ((type(trainer).compute_loss, "by_rows"), (SFTTrainer.compute_loss, "sdpa")):
        trainer.model.get_base_model().set_attn_implementation(attention)
        for count in (None, torch.tensor(50)):
            trainer.model.zero_grad()
            loss = compute(trainer, trainer.model, dict(batch), num_items_in_batch=count)
            loss.backward()
            norms = [p.grad.norm().item() for p in trainer.model.parameters() if p.grad is not None]
            found.append([loss.item(), *norms])
    assert found[0] == pytest.approx(found[2], rel=1e-4) and found[1] == pytest.approx(found[3], rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-2)


def four_bit_trainer(tmp_path: Path, tiny_qwen2: Path):
    """A trainer of a 4-bit model over a few rows, as `plan_and_train` builds it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    config = qwen.FinetuneConfig(model_name=str(tiny_qwen2), output_dir=tmp_path / "outputs", neftune_noise_alpha=0)
    rows = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in encoded_rows(6)])
    device = qwen.find_device(True, "bfloat16")
    args = qwen.training_args(config, device, len(rows), held_out=True, recompute=False)
    model, tokenizer = qwen.load_model(config, device), AutoTokenizer.from_pretrained(tiny_qwen2)
    return qwen.build_trainer(config, args, model, tokenizer, rows, rows, config.lora_target_modules, {}), rows


def first_gradient(trainer) -> float:
    """Norm of the gradient of the first layer's adapter after one backward pass."""
    import torch

    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # starts at zero, which would keep lora_A's gradient at zero
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = {name: p.grad.norm().item() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return next(value for name, value in gradients.items() if "layers.0" in name and "lora_A" in name)


def test_an_evaluation_does_not_end_learning_in_4_bit(tmp_path, tiny_qwen2):
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode; after that gradients would be 0."""
    trainer, rows = four_bit_trainer(tmp_path, tiny_qwen2)
    wanted = first_gradient(trainer)
    trainer.evaluate()
    qwen.held_out_loss(trainer.model, list(rows))
    assert wanted > 1e-6
    assert first_gradient(trainer) == pytest.approx(wanted, rel=1e-6)


def test_the_demo_answers_from_packed_weights_only_where_the_cpu_reads_them(tmp_path, tiny_qwen2, monkeypatch):
    """Without AVX512-BF16 the packed layout is read as if it were the plain one: the answers would be rubbish."""
    import bitsandbytes
    import torch

    trainer, rows = four_bit_trainer(tmp_path, tiny_qwen2)
    model, input_ids = trainer.model.eval(), torch.tensor([rows[0]["input_ids"]])
    monkeypatch.setattr(bitsandbytes.functional, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(qwen, "DEMO_QUESTIONS", qwen.DEMO_QUESTIONS[:1])
    with torch.inference_mode():
        before = model(input_ids).logits
        qwen.show_demo_answers(model, trainer.processing_class, qwen.FinetuneConfig())
        assert torch.equal(model(input_ids).logits, before)


def test_4_bit_training_goes_on_learning_after_evaluations(tmp_path, tiny_qwen2, monkeypatch):
    write_jsonl(tmp_path / "data.jsonl", records(40))
    flags = ("--load_in_4bit", "--dtype", "bfloat16", "--optim", "adamw_8bit", "--eval_steps", "2", "--save_steps", "2")
    run_here(monkeypatch, tmp_path, tiny_qwen2, *flags, "--num_train_epochs", "4")
    history = json.loads((tmp_path / "outputs" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.5 and losses[len(losses) // 2] < losses[0] - 0.2


# ------------------------------------------------------------------------------- decisions on figures


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        (("cuda", True, True, True), ("bfloat16", True, "flash_attention_2", {"": 0})),
        (("cuda", True, False, True), ("bfloat16", True, "sdpa", {"": 0})),
        (("cuda", False, True, True), ("float16", True, "sdpa", {"": 0})),
        (("cpu", True, False, True), ("bfloat16", True, "sdpa", {"": "cpu"})),
        (("cpu", False, False, True), ("float32", True, "sdpa", {"": "cpu"})),
        (("cpu", False, False, False), ("float32", False, "sdpa", {"": "cpu"})),
        (("mps", True, False, True), ("bfloat16", False, "sdpa", {"": "mps"})),
        (("mps", False, False, True), ("float16", False, "sdpa", {"": "mps"})),
    ],
)
def test_device_policy(facts, wanted):
    device = qwen.device_policy(*facts)
    assert (device.dtype, device.four_bit, device.attention, device.device_map) == wanted


def test_each_process_takes_its_own_gpu():
    assert qwen.device_policy("cuda", True, False, True, rank=3).device_map == {"": 3}
    assert qwen.device_policy("cuda", True, True, False, dtype="float32").attention == "sdpa"


@pytest.mark.parametrize("longest", [1024, 8])  # by products, and by PyTorch's own attention
def test_rows_that_attend_one_by_one_get_the_logits_of_each_row_alone(tiny_qwen2, tiny_gpt2, monkeypatch, longest):
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    monkeypatch.setattr(qwen, "LONGEST_BY_PRODUCTS", longest)
    AttentionInterface.register("by_rows", qwen.attend_by_rows)
    rows = [torch.tensor(row["input_ids"]) for row in encoded_rows(4)]
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    for folder in (tiny_qwen2, tiny_gpt2):
        alone = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="by_rows").eval()
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        inputs = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None], "cu_seq_lens_q": starts}
        wanted = torch.cat([alone(row[None]).logits[0] for row in rows])
        assert torch.allclose(model(**inputs, use_cache=False).logits[0], wanted, atol=1e-5)


def test_only_plain_attention_goes_row_by_row():
    from transformers import Gemma2Config, MistralConfig, Qwen2Config

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16}
    kinds = {Qwen2Config: True, MistralConfig: False, Gemma2Config: False}  # the others look through a window
    assert {kind: qwen.shape_of(kind(**sizes), qwen.FinetuneConfig())[0].plain_attention for kind in kinds} == kinds


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("cuda", {}, "paged_adamw_8bit"),
        ("cuda", {"optim": "adamw_torch"}, "adamw_torch"),
        ("cuda", {"deepspeed": Path("ds.json")}, "adamw_8bit"),
        ("cpu", {}, "adamw_8bit"),
        ("mps", {}, "adamw_torch"),
        ("mps", {"optim": "sgd"}, "sgd"),
    ],
)
def test_the_optimiser_is_one_that_the_device_has(kind, settings, wanted):
    from transformers.training_args import OptimizerNames

    assert qwen.optimizer_of(qwen.FinetuneConfig(**settings), kind) == OptimizerNames(wanted)


def test_a_model_that_does_not_fit_is_refused_with_figures():
    # Qwen2.5-7B: 7.6 billion weights, 6.5 of them in linear layers; adapter of rank 16
    shape = qwen.ModelShape(6_525_288_448, 1_090_000_000, 40_370_176, 67_895_296, 28, 28, 3584, 18944, 152_064)
    config = qwen.FinetuneConfig()
    four_bit = qwen.device_policy("cuda", True, False, True)
    plain = qwen.device_policy("cuda", True, False, False)
    small = sum(qwen.estimate_memory(shape, config, four_bit, 2 * 2048, recompute=True).values())
    large = sum(qwen.estimate_memory(shape, config, plain, 2 * 2048, recompute=False).values())
    assert 7e9 < small < 12e9 and large > 4 * small
    fault = qwen.memory_fault(small, int(6e9), four_bit, "Qwen/Qwen2.5-7B-Instruct")
    assert f"needs about {small / 1e9:.1f} GB" in fault and "cuda has 6.0 GB free" in fault and "--demo" in fault
    assert qwen.memory_fault(small, small, four_bit, "m") == ""


def test_steps():
    config = qwen.FinetuneConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert qwen.steps_of(111, config) == (14, 42)
    assert qwen.steps_of(1, config) == (1, 3)
    config.max_steps = 7
    assert qwen.steps_of(111, config) == (14, 7)


# ------------------------------------------------------------------------------ settings and mistakes


def test_yaml_is_taken_over_by_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 2e-4\nsystem_prompt: no\nload_in_4bit: off\nlora_r: 8\nlora_target_modules: [q_proj]\n"
    )
    config = qwen.parse_args(["--config", str(file), "--lora_r", "4"])
    assert (config.learning_rate, config.system_prompt, config.load_in_4bit, config.lora_r) == (2e-4, "no", False, 4)
    assert config.lora_target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_r", "0"], "--lora_r is 0"),
        (["--lora_r", "x"], "invalid int value: 'x'"),
        (["--lora", "8"], "unrecognized arguments"),
        (["--eval_ratio", "1.5"], "from 0 to below 1"),
        (["--save_steps", "30"], "no multiple of --eval_steps"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--model_dir", "x", "--tokenizer_dir", "x"], "neither may hold the other"),
        (["--model_dir", "."], "neither may hold the other or --output_dir"),
        (["--num_train_epochs", "inf", "--split_seed", "-1"], "--split_seed is -1; it must be from 0 to 4294967295"),
        (["--config", "missing.yaml"], "can not be read"),
        (["--config", "wrong.yaml"], "the nearest known one is 'lora_r'"),
        (["--overlong", "cut"], "invalid choice"),
    ],
)
def test_wrong_settings_end_with_2(tmp_path, flags, words):
    (tmp_path / "wrong.yaml").write_text("lora_rr: 8\n")
    process = run_script("qwen_finetuning.py", *flags, cwd=tmp_path)
    assert process.returncode == 2 and words in process.stderr and "Traceback" not in process.stderr


def test_wrong_files_end_with_1_before_any_weight_is_read(tmp_path, tiny_qwen2):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "seven.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(6)) + "{no json\n")
    (tmp_path / "shape.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text("{}")
    (tmp_path / "pickle" / "pytorch_model.bin").touch()
    cases = [
        (["--dataset_path", "none.jsonl"], "none.jsonl: no such dataset"),
        (["--dataset_path", "x" * 5000], "no such dataset"),
        (["--dataset_path", "empty.jsonl", "--model_name", "hollow"], "hollow: no *.safetensors"),
        (
            ["--dataset_path", "seven.jsonl", "--model_dir", "pickle"],
            "pickle would be replaced, and it holds no",
        ),
        (["--dataset_path", "seven.jsonl", "--output_dir", "seven.jsonl/out"], "nothing can be written there"),
        (["--dataset_path", "seven.jsonl", "--skip_bad_rows", "--eval_ratio", "0.9"], "none is left to train on"),
        (["--dataset_path", "empty.jsonl", "--model_name", "pickle"], "pickle: no *.safetensors"),
        (["--dataset_path", "empty.jsonl", "--model_name", "./gone"], "./gone: no such folder"),
        (["--dataset_path", "empty.jsonl", "--model_name", "seven.jsonl"], "seven.jsonl is a file; a model is"),
        (["--dataset_path", "empty.jsonl"], "empty.jsonl: no rows in it"),
        (["--dataset_path", "seven.jsonl"], "seven.jsonl:7: not JSON"),
        (["--dataset_path", "shape.jsonl"], "shape.jsonl:1: unknown shape"),
        (["--dataset_path", "seven.jsonl", "--model_name", "no/where"], "model no/where can not be loaded"),
    ]
    for flags, words in cases:
        process = run_script("qwen_finetuning.py", "--model_name", tiny_qwen2, *flags, cwd=tmp_path)
        assert (process.returncode, words in process.stderr) == (1, True), (flags, process.stderr)
        assert "Traceback" not in process.stderr


def test_a_base_with_weights_missing_is_not_trained_on_random_numbers(tmp_path, tiny_qwen2):
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_qwen2, tmp_path / "half")
    weights = {name: value for name, value in load_file(model / "model.safetensors").items() if "layers.1" not in name}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(qwen.UserError, match="12 weights are missing from its files, such as model.layers.1"):
        qwen.load_model(qwen.FinetuneConfig(model_name=str(model)), qwen.find_device(False, "float32"))


def test_dry_run_reads_no_weights(tmp_path, tiny_qwen2, monkeypatch, capsys):
    import shutil

    model = shutil.copytree(tiny_qwen2, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    write_jsonl(tmp_path / "data.jsonl", records(20))
    run_here(monkeypatch, tmp_path, model, "--dry_run")
    printed = capsys.readouterr().out
    assert "[[It costs" in printed and "3 optimiser steps an epoch, 9 in all" in printed
    assert "cpu, float32, by_rows attention, plain loss at labels, adamw_torch" in printed
    assert "memory, estimated" in printed and not (tmp_path / "outputs").exists()


def test_help_is_instant_and_ctrl_c_ends_with_130(tmp_path):
    modules = (
        "import sys; before = set(sys.modules); import qwen_finetuning; print([m for m in ('torch', 'transformers', "
    )
    modules += "'datasets', 'peft', 'trl', 'yaml') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", modules], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stdout + process.stderr
    write_jsonl(tmp_path / "data.jsonl", records(5))
    command = [
        sys.executable,
        str(ROOT / "qwen_finetuning.py"),
        "--dataset_path",
        "data.jsonl",
        "--model_name",
        "no/where",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"X": "1"})
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
