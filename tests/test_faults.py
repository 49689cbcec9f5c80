"""What is kept when something goes wrong: numbers that are none, a full disk, a signal, rubbish, malice, load.

More of it stands where the script in question is tested: SIGKILL during a build in test_data_integration.py and
test_data_set_generation.py, bad rows and resuming in test_qwen_finetuning.py, tags and mistakes in YAML in
test_configs.py, control tokens and the templates' sandbox in test_encoding.py, HTML in reports in test_evaluate.py,
a chat's memory in test_chat.py, broken adapters in test_inference.py and test_merge_model.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build_model, load_script, write_jsonl
from test_qwen_finetuning import records, run_here

qwen = load_script("qwen_finetuning")

KEEP = ("--no-load_best_model_at_end",)


@pytest.fixture
def ready(tmp_path) -> Path:
    """A folder with 40 records in data.jsonl."""
    write_jsonl(tmp_path / "data.jsonl", records(40))
    return tmp_path


def with_trainer(monkeypatch, change) -> None:
    """Let `change(trainer)` run as soon as the training script has built its trainer."""
    build = qwen.build_trainer

    def built(*args):
        trainer = build(*args)
        change(trainer)
        return trainer

    monkeypatch.setattr(qwen, "build_trainer", built)


def after_step(trainer, step: int, act) -> None:
    """Call `act()` right after the optimiser's step number `step`."""
    from transformers import TrainerCallback

    class Act(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **_):
            if state.global_step + 1 == step:
                act()

    trainer.add_callback(Act())


def checkpoints(folder: Path) -> dict[str, bool]:
    """Name of each checkpoint, and whether it is whole."""
    return {path.name: qwen.is_whole(path) for path in sorted((folder / "outputs").glob("checkpoint-*"))}


# ------------------------------------------------------------------------------------------ numbers


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(tmp_path, monkeypatch):
    """One token of the model has NaN as its embedding, and one record has that token."""
    import torch
    from safetensors.torch import load_file, save_file

    model = build_model("qwen2", tmp_path / "model", tie_word_embeddings=False)
    weights = load_file(model / "model.safetensors")
    from conftest import build_tokenizer

    token = build_tokenizer()("~").input_ids[0]
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = records(40)
    rows[20]["output"] += " ~"
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(qwen.UserError) as error:
        run_here(monkeypatch, tmp_path, model, "--eval_ratio", "0", "--save_steps", "1", "--eval_strategy", "no", *KEEP)
    words = re.fullmatch(
        r"the loss is nan in step (\d), which is not taken; look at these rows: (.*?)\. .*", str(error.value)
    )
    assert "data.jsonl:21" in words[2].split(", ") and len(words[2].split(", ")) == 2  # of 8 rows in a step
    saved = checkpoints(tmp_path)
    assert all(saved.values()) and max([0, *(int(name[11:]) for name in saved)]) == int(words[1]) - 1
    assert not (tmp_path / "Qwen_finetuning_model").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_step(ready, tiny_qwen2, monkeypatch):
    seen = []

    def spoil(trainer):
        parameter = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        parameter.register_hook(lambda gradient: gradient * (math.inf if trainer.state.global_step == 3 else 1))
        seen.append(parameter)

    with_trainer(monkeypatch, spoil)
    with pytest.raises(qwen.UserError, match=r"gradient's norm is (nan|inf) in step 4, .* data.jsonl:\d+") as error:
        run_here(monkeypatch, ready, tiny_qwen2, "--eval_steps", "1", "--save_steps", "1")
    assert len(re.findall(r"data.jsonl:\d+", str(error.value))) == 8
    assert seen[0].isfinite().all() and checkpoints(ready) == dict.fromkeys(
        ("checkpoint-1", "checkpoint-2", "checkpoint-3"), True
    )


@pytest.mark.parametrize("step", [3, 5])
def test_an_adapter_with_nan_is_never_saved(ready, tiny_qwen2, monkeypatch, step):
    """Spoilt by a step before a checkpoint, or by the very last one."""

    def spoil(trainer):
        parameter = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
        after_step(trainer, step, lambda: parameter.data[0].fill_(math.nan))

    with_trainer(monkeypatch, spoil)
    flags = ("--max_steps", "5", "--eval_strategy", "no", *KEEP, *(("--save_strategy", "no") if step == 5 else ()))
    with pytest.raises(qwen.UserError, match="lora_A.* not finite, so this adapter is not saved"):
        run_here(monkeypatch, ready, tiny_qwen2, "--save_steps", "3", *flags)
    assert checkpoints(ready) == {} and not (ready / "Qwen_finetuning_model").exists()


# ------------------------------------------------------------------------------------ a signal to end


def test_sigterm_saves_after_the_step_and_the_run_goes_on_from_it(ready, tiny_qwen2, monkeypatch, capsys):
    earlier = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        with_trainer(patch, lambda trainer: after_step(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit) as end:
            run_here(patch, ready, tiny_qwen2, "--max_steps", "5")
    signal.signal(signal.SIGTERM, earlier)
    assert end.value.code == 143 and checkpoints(ready) == {"checkpoint-3": True}
    assert "checkpoint-3 is saved, and --resume goes on from it" in capsys.readouterr().err
    run_here(monkeypatch, ready, tiny_qwen2, "--max_steps", "5", "--resume")
    assert "resuming from outputs/checkpoint-3" in capsys.readouterr().err
    history = json.loads((ready / "outputs" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5]
    assert signal.getsignal(signal.SIGTERM) == earlier


# -------------------------------------------------------------------------------- no room left


def test_the_five_remedies_stand_in_order_with_the_runs_own_figures():
    config = qwen.FinetuneConfig(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    device = qwen.device_policy("cuda", True, False, True)
    assert qwen.memory_remedies(config, device, 240_000, 1500, recompute=False) == (
        "cuda ran out of memory. In this order: (1) --per_device_train_batch_size 2 --gradient_accumulation_steps 8 "
        "(now 4 and 4); (2) --max_seq_length 750 (now 2048; the longest row has 1500 tokens); "
        "(3) --gradient_checkpointing on (it is off); (4) fewer rows to try first (now 240,000); "
        "(5) a larger GPU, or a second one"
    )


def shortages():
    """What the libraries raise, and the words that are wanted."""
    import torch
    from safetensors import SafetensorError

    memory, disk = "remedies", "the disk of outputs is full: "
    yield torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), memory
    yield RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), memory
    yield (
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        memory,
    )
    yield MemoryError(), memory
    yield OSError(errno.ENOSPC, "No space left on device"), disk
    yield SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), disk
    yield RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), disk
    yield RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), disk


def test_each_shortage_becomes_one_line_and_other_errors_stay():
    for raised, words in shortages():
        for cause in (None, raised):  # as it is, and wrapped by `explaining` while a model is loaded
            with pytest.raises(qwen.UserError) as error, qwen.explaining_shortage("remedies", Path("outputs")):
                if cause:
                    with qwen.explaining("model", "m"):
                        raise raised
                raise raised
            assert str(error.value).startswith(words) and "\n" not in str(error.value), raised
    for other in (ValueError("shapes differ"), OSError(errno.EACCES, "Permission denied"), qwen.UserError("a line")):
        with pytest.raises(type(other), match=str(other).replace("[", r"\[")), qwen.explaining_shortage("", Path()):
            raise other


def test_memory_that_runs_out_in_training_ends_with_the_remedies(ready, tiny_qwen2, monkeypatch):
    import torch

    def spoil(trainer):
        def refuse(module, args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        trainer.model.register_forward_pre_hook(refuse)

    with_trainer(monkeypatch, spoil)
    with pytest.raises(
        qwen.UserError, match=r"^cpu ran out of memory.*\(now 2 and 4\).*longest row has \d\d.*now 36\)"
    ):
        run_here(monkeypatch, ready, tiny_qwen2, "--max_steps", "1")


def test_room_for_the_checkpoints_in_figures():
    # Qwen2.5-7B, rank 16: 40.4 million adapter weights, 152,064 tokens
    shape = qwen.ModelShape(6_525_288_448, 1_090_000_000, 40_370_176, 67_895_296, 28, 3584, 18944, 152_064)
    device = qwen.device_policy("cuda", True, False, True)
    config = qwen.FinetuneConfig()
    adapter, states = 2 * 40_370_176 + 15_206_400, 2 * 40_370_176
    need = 4 * (adapter + states) + 2 * adapter
    assert qwen.disk_fault(shape, config, device, 9, need) == ""
    fault = qwen.disk_fault(shape, config, device, 9, need - 1)
    assert f"need about {need / 1e6:,.1f} MB" in fault and "--lora_r (now 16)" in fault
    assert qwen.disk_fault(shape, config, device, 1, 3 * adapter + states) == ""
    assert qwen.disk_fault(shape, config, device, 0, 2 * adapter) == ""
    config.optim = "adamw_torch"
    assert qwen.disk_fault(shape, config, device, 9, need) != ""


def test_too_little_room_is_said_before_training(ready, tiny_qwen2, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(qwen.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    with pytest.raises(qwen.UserError, match=r"outputs: its disk has 0.1 MB free; .* need about \d\.\d MB"):
        run_here(monkeypatch, ready, tiny_qwen2)
    assert not (ready / "outputs").exists()


def fill_until_the_second_checkpoint(folder: Path) -> None:
    """Leave on the disk of `folder` half the room that one checkpoint takes."""
    size = sum(file.stat().st_size for file in (folder / "checkpoint-2").iterdir())
    spare = shutil.disk_usage(folder).free - size // 2
    with open(folder / "filler", "wb") as file:
        file.write(bytes(spare))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a tmpfs in a namespace of its own")
def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_file(tmp_path, tiny_qwen2):
    """A real tmpfs of 6 MB as output_dir, and a file that grows there until the second checkpoint does not fit."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    write_jsonl(tmp_path / "data.jsonl", records(24))
    (tmp_path / "outputs").mkdir()
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pytest, test_faults as t
from pathlib import Path
patch, folder = pytest.MonkeyPatch(), Path({str(tmp_path)!r})
t.with_trainer(patch, lambda trainer: t.after_step(
    trainer, 4, lambda: t.fill_until_the_second_checkpoint(folder / "outputs")))
flags = ("--eval_strategy", "no", "--save_steps", "2", "--max_steps", "6", "--no-load_best_model_at_end")
try:
    t.run_here(patch, folder, Path({str(tiny_qwen2)!r}), *flags)
except t.qwen.UserError as error:
    print("error:", error)
(folder / "outputs" / "filler").unlink()
patch.undo()
print("left:", sorted(p.name for p in (folder / "outputs").rglob("*") if p.parent.name == "outputs"))
print("whole:", t.checkpoints(folder))
t.run_here(patch, folder, Path({str(tiny_qwen2)!r}), *flags, "--resume")
"""
    script = f'mount -t tmpfs -o size=6m tmpfs outputs && exec "{sys.executable}" -c "$CODE"'
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"CODE": code},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "error: the disk of outputs is full: " in process.stdout
    assert "left: ['README.md', 'checkpoint-2', 'finetune_config.json', 'held_out.jsonl']" in process.stdout
    assert "whole: {'checkpoint-2': True}" in process.stdout
    assert "resuming from outputs/checkpoint-2" in process.stderr and "trained 6 steps" in process.stdout
