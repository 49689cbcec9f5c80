"""What is kept when something goes wrong: numbers that are none, a full disk, a signal, rubbish, malice, load.

More of it stands where the script in question is tested: SIGKILL during a build in test_data_integration.py and
test_data_set_generation.py, bad rows and resuming in test_qwen_finetuning.py, tags and mistakes in YAML in
test_configs.py, control tokens and the templates' sandbox in test_encoding.py, HTML in reports in test_evaluate.py,
a chat's memory in test_chat.py, broken adapters in test_inference.py and test_merge_model.py.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, build_model, build_tokenizer, load_script, write_jsonl
from test_qwen_finetuning import base_flags, records, run_here

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


@pytest.mark.slow
def test_sigterm_to_a_launcher_leaves_one_whole_checkpoint_of_two_processes(ready, tiny_qwen2):
    from test_distributed import launch

    agent = launch(ready, tiny_qwen2, "--num_train_epochs", "200", "--save_strategy", "no", "--eval_strategy", "no")[0]
    for line in agent.stdout:
        if "Step 4/" in line:
            agent.send_signal(signal.SIGTERM)
            break
    printed = agent.communicate(timeout=60)[0]
    step = re.search(r"terminated; checkpoint-(\d+) is saved", printed)[1]
    assert checkpoints(ready) == {f"checkpoint-{step}": True}
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= set(os.listdir(ready / "outputs" / f"checkpoint-{step}"))


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


def test_rows_of_a_folder_that_nobody_reads_on_are_no_fault(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", records(3))
    rows = qwen.dataset_rows(str(tmp_path))
    assert next(rows)[1]["instruction"] == "What costs 0?"
    rows.close()


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
    shape = qwen.ModelShape(6_525_288_448, 1_090_000_000, 40_370_176, 67_895_296, 28, 28, 3584, 18944, 152_064)
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
    assert "left: ['checkpoint-2', 'finetune_config.json', 'held_out.jsonl']" in process.stdout
    assert "whole: {'checkpoint-2': True}" in process.stdout
    assert "resuming from outputs/checkpoint-2" in process.stderr and "trained 6 steps" in process.stdout


# ------------------------------------------------------------------------------------------- malice

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY")
MARK = "hf_markerWhichMustAppearNowhere"
RED = "\x1b[31m\x1b]0;title\x07"


def chain(model: Path, gpt2: Path) -> list[tuple]:
    """The nine scripts with the arguments of a short run each, in an order in which each finds its files."""
    data = ROOT / "tests" / "data"
    mix = ("--orca_data_path", data / "slimorca.jsonl", "--pubmed_data_path", data / "pubmedqa.jsonl")
    large = ("--stackexchange_data_path", data / "stackexchange.jsonl", "--output_file", "large.jsonl")
    train = (*base_flags(model), "--skip_bad_rows", "--max_steps", "2")
    return [
        ("data_integration.py", *mix, "--total_samples", 20, "--my_report_data_path", "mine.jsonl"),
        ("data_set_generation.py", *mix, *large, "--total_samples", 20, "--my_report_data_path", "mine.jsonl"),
        ("qwen_finetuning.py", *train, "--eval_ratio", "0.2"),
        ("inference.py", "--instruction", f"{RED}What costs 3?", "--max_new_tokens", 4),
        ("chat.py", "--max_new_tokens", 4),
        ("evaluate.py", "--max_new_tokens", 4, "--compare_base", "--rouge", "--skip_bad_rows"),
        ("merge_model.py", "--dtype", "float32"),
        ("sft_basics.py", "--model_name", gpt2, "--max_steps", 1, "--max_length", 64),
        ("hf_finetune_scaffold.py", "--model", gpt2, "--max_length", 64, "--batch", 16),
    ]


def hostile_rows(folder: Path) -> None:
    """Rows whose text, keys, roles and sources would steer a terminal or lead to a file, some of them unusable."""
    rows = records(12)
    rows[0]["output"] += RED
    rows[1] |= {"source": "../../../etc/passwd", "system": RED + "{{ 7*7 }} {% include '/etc/passwd' %}"}
    write_jsonl(folder / "data.jsonl", [*rows, {RED: RED}, {"messages": [{"role": RED, "content": RED}]}])
    write_jsonl(folder / "mine.jsonl", [{"instruction": f"问 {i} {RED}", "output": f"答 {RED}"} for i in range(9)])


def searched(folder: Path, printed: str) -> None:
    """No secret in what a chain wrote and printed, and nothing printed that steers a terminal."""
    assert MARK not in printed and "\x1b" not in printed and "\x07" not in printed
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30 and not [path for path in files if MARK.encode() in path.read_bytes()]


def test_no_script_connects_or_keeps_a_token_or_steers_the_terminal(
    tmp_path, tiny_qwen2, tiny_gpt2, monkeypatch, capfd
):
    """The nine scripts in this process, where each try to reach another machine is noted and fails."""
    tried = []

    def refuse(self, address, *rest):
        tried.append(address)
        raise OSError(errno.ENETUNREACH, "no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: refuse(None, host))
    for name in SECRETS:
        monkeypatch.setenv(name, MARK)
    hostile_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, *args in chain(tiny_qwen2, tiny_gpt2):
        asked = io.TextIOWrapper(
            io.BytesIO(f"{RED}hello\n/save talk.jsonl\nquit\n".encode() if name == "chat.py" else b"")
        )
        monkeypatch.setattr("sys.stdin", asked)
        script = load_script(name.removesuffix(".py"))
        script.main(script.parse_args([str(arg) for arg in args]))
    out, err = capfd.readouterr()
    searched(tmp_path, out + err)
    assert tried == []


def test_a_model_that_wants_its_own_code_is_refused(ready, tiny_qwen2, monkeypatch):
    model = shutil.copytree(tiny_qwen2, ready / "model")
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text("open('ran', 'w')")
    for script in ("qwen_finetuning", "inference"):
        with pytest.raises(load_script(script).UserError, match="trust_remote_code") as error:
            if script == "inference":
                load_script(script).load_chat_model(str(model), None, False)
            run_here(monkeypatch, ready, model)
        assert "\n" not in str(error.value) and not Path("ran").exists()


# ------------------------------------------------------------------------------------------ rubbish


def mutated(source: bytes, number: random.Random) -> bytes:
    """`source` with a few bytes changed, a piece cut out, doubled or put elsewhere, or some rubbish in it."""
    pieces = [
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"[" * 2000,
        b"{",
        b'"',
        b"null",
        b"1e999",
        b"\n",
        b"-",
        b": ",
        b"!!",
    ]
    pieces += [b"[]", b"{}", b"''", b"true", b"&a [*a]", b"{{", b"{%", b"\x1b[31m", "芯".encode(), b"9" * 5000]
    for _ in range(number.randint(1, 4)):
        start = number.randrange(len(source) + 1)
        end = min(len(source), start + int(number.expovariate(0.1)))
        act = number.randrange(5)
        source = source[:start] + (
            number.choice(pieces) + source[start if act == 0 else end :]
            if act < 2
            else source[end:]
            if act == 2
            else source[start:end] + source[start:]
            if act == 3
            else number.randbytes(end - start) + source[end:]
        )
    return source[: number.randrange(len(source) + 1)] if number.random() < 0.15 else source


def values_replaced(record: object, number: random.Random) -> object:
    """A JSON value with some of its parts replaced by parts of other kinds."""
    odd = [None, True, -1, 1e308, "", "x", "/gone", [], {}, [None], {"x": 1}, "\ud800", [[1]], 10**30]
    if number.random() < 0.08:
        return number.choice(odd)
    if isinstance(record, dict):
        return {key: values_replaced(value, number) for key, value in record.items() if number.random() > 0.04}
    if isinstance(record, list):
        return [values_replaced(value, number) for value in record]
    return record


def dataset_trial(folder: Path, number: random.Random, adapter: Path) -> None:
    """Rubbish in one line of a dataset costs no row of another line, and nothing but UserError is raised."""
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records(6)]
    place = number.randrange(6)
    bad = mutated(lines[place], number).replace(b"\n", b" ").replace(b"\r", b" ")
    lines[place] = bad if place else bad.lstrip(b"\xff\xfe[ \t")  # in the first line they speak for the whole file
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    rows = list(qwen.checked_rows(str(folder / "data.jsonl"), "system"))
    found = {row["messages"][1]["content"] for row in rows if not row["state"]}
    assert {record["instruction"] for i, record in enumerate(records(6)) if i != place} <= found
    array = mutated(json.dumps(records(6), indent=1).encode(), number)
    (folder / "data.json").write_bytes(array)
    for row in [*rows, *qwen.checked_rows(str(folder / "data.json"), "system")]:
        (row["state"] + row["why"]).encode()  # as the dataset's table will hold it


def yaml_trial(folder: Path, number: random.Random, adapter: Path) -> None:
    source = number.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_bytes()
    (folder / "run.yaml").write_bytes(mutated(source, number))
    try:
        qwen.parse_args(["--config", str(folder / "run.yaml")])
    except SystemExit as end:
        assert end.code == 2


def template_trial(folder: Path, number: random.Random, adapter: Path) -> None:
    source = (ROOT / "templates" / "qwen2_chatml.json").read_bytes()
    replaced = json.dumps(values_replaced(json.loads(source), number)).encode()
    (folder / "template.json").write_bytes(mutated(source, number) if number.random() < 0.5 else replaced)
    if not hasattr(template_trial, "tokenizer"):
        template_trial.tokenizer = build_tokenizer()
    try:
        qwen.set_template(template_trial.tokenizer, folder / "template.json")
    except qwen.UserError:
        return
    with suppress(ValueError):  # the run's ledger names the rows which a template does not show as they are
        qwen.encode_conversation(qwen.PROBE, template_trial.tokenizer)


def record_trial(folder: Path, number: random.Random, adapter: Path) -> None:
    """finetune_config.json as the four scripts that start from an adapter read it, up to the weights."""
    copy = folder / "adapter"
    if not copy.exists():
        shutil.copytree(adapter, copy)
    source = (adapter / "finetune_config.json").read_bytes()
    replaced = json.dumps(values_replaced(json.loads(source), number)).encode()
    (copy / "finetune_config.json").write_bytes(mutated(source, number) if number.random() < 0.4 else replaced)
    script = load_script(number.choice(["inference", "chat", "evaluate"]))
    weights = script.explaining

    def stop_at_weights(what, name):
        if what != "tokenizer":
            raise script.UserError("weights")
        return weights(what, name)

    script.explaining = stop_at_weights
    try:
        if not script.model_fault(str(copy)):
            script.load_chat_model(str(copy), None, False)
    except script.UserError as error:
        assert "\n" not in str(error)
    finally:
        script.explaining = weights
    run = {"settings": qwen.asdict(qwen.FinetuneConfig()), "rows_per_step": 8, "dataset": {"sha256": ""}}
    with suppress(qwen.UserError):
        qwen.resume_faults(copy / "finetune_config.json", run)


def adapter_trial(folder: Path, number: random.Random, adapter: Path) -> None:
    """An adapter folder with files missing, cut or spoilt is loaded, or refused in one line."""
    copy = folder / "adapter"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(adapter, copy)
    for name in number.sample(sorted(path.name for path in copy.iterdir()), number.randint(1, 2)):
        data = (copy / name).read_bytes()
        act = number.randrange(3)
        if act == 0:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(data[: number.randrange(len(data))] if act == 1 else mutated(data, number))
    script = load_script("inference")
    try:
        if not script.model_fault(str(copy)):
            script.load_chat_model(str(copy), None, False)
    except script.UserError as error:
        assert "\n" not in str(error)


TRIALS = (dataset_trial, yaml_trial, template_trial, record_trial, adapter_trial)


def try_often(trial, count: int, folder: Path, adapter: Path, capsys) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    os.environ["COLUMNS"] = "100"
    qwen.quiet_libraries()

    @settings(max_examples=count, deadline=20_000, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 2**63))
    def once(seed):
        trial(folder, random.Random(seed), adapter)
        capsys.readouterr()

    once()


@pytest.mark.parametrize("trial", TRIALS)
def test_rubbish_gives_a_line_and_costs_no_good_row(trial, tmp_path, tiny_adapter, capsys):
    try_often(trial, 15 if trial is adapter_trial else 60, tmp_path, tiny_adapter, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("trial", TRIALS)
def test_five_thousand_pieces_of_rubbish_a_reader(trial, tmp_path, tiny_adapter, capsys):
    try_often(trial, 5000, tmp_path, tiny_adapter, capsys)


# ------------------------------------------------------------------------------- the full counts


def started(cwd: Path, script: str, *args) -> subprocess.Popen:
    """A script under way in one thread, its stderr to be read."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_what_can_not_be_loaded_gets_a_line_however_long_its_name():
    line = "metric x+ can not be loaded: refused; if it is on the hub"
    with pytest.raises(qwen.UserError, match=line), qwen.explaining("metric", "x" * 5000):
        raise OSError("refused")


@pytest.mark.slow
def test_twenty_kills_do_not_change_a_bit(tmp_path, tiny_qwen2):
    """A checkpoint each step, so that most kills fall into a save; the noise of NEFTune is on."""
    flags = ("--max_steps", "40", "--save_steps", "1", "--eval_strategy", "no", "--neftune_noise_alpha", "5", *KEEP)
    number, half_written = random.Random(8), 0
    kills = sorted(number.sample(range(1, 40), 20))
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder / "data.jsonl", records(40))
        for kill in [*(kills if name == "killed" else ()), None]:
            resume = ("--resume",) if (folder / "outputs" / "finetune_config.json").exists() else ()
            process = started(folder, "qwen_finetuning.py", *base_flags(tiny_qwen2), *flags, *resume)
            for line in process.stderr:
                half_written += "was not saved to its end" in line
                if kill and f"Step {kill}/40" in line:
                    time.sleep(number.uniform(0, 0.06))
                    process.kill()
                    break
            process.communicate()
            assert process.returncode == (-signal.SIGKILL if kill else 0)
    weights, losses = {}, {}
    for name in ("whole", "killed"):
        weights[name] = (tmp_path / name / "Qwen_finetuning_model" / "adapter_model.safetensors").read_bytes()
        history = json.loads((tmp_path / name / "outputs" / "trainer_state.json").read_text())["log_history"]
        losses[name] = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    print(f"{half_written} of 20 kills left a half-written checkpoint")
    assert len(losses["whole"]) == 40 and losses["killed"] == losses["whole"]
    assert weights["killed"] == weights["whole"]


def own_memory(pid: int) -> int:
    """Bytes of a process that no file stands behind; mapped Arrow files do not count."""
    with suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_240_000_rows_pass_in_bounded_memory_and_five_minutes(tmp_path, tiny_qwen2):
    peaks, seconds = {}, {}
    for count in (24_000, 240_000):
        with open(tmp_path / "data.jsonl", "w", encoding="utf-8") as file:
            for i in range(count):
                answer = f"It costs {i} euros. " + "芯片由硅制成。" * (i % 20)
                file.write(json.dumps({"instruction": f"What costs {i}? " * (1 + i % 12), "output": answer}) + "\n")
        begin, peaks[count] = time.monotonic(), 0
        process = started(tmp_path, "qwen_finetuning.py", *base_flags(tiny_qwen2), "--dry_run")
        while process.poll() is None:
            peaks[count] = max(peaks[count], own_memory(process.pid))
            time.sleep(0.05)
        seconds[count] = time.monotonic() - begin
        assert process.returncode == 0, process.stderr.read()
    print({count: f"{seconds[count]:.0f} s, {peaks[count] / 1e6:.0f} MB" for count in peaks})
    assert seconds[240_000] < 300
    assert peaks[240_000] - peaks[24_000] < 100e6  # 40 MB of it are the rows' digests, by which duplicates are found


@pytest.mark.slow
def test_2_000_evaluation_rows_killed_ten_times_are_each_answered_once(tmp_path, tiny_qwen2):
    write_jsonl(tmp_path / "data.jsonl", records(2000))
    flags = ("--model", tiny_qwen2, "--dataset_path", "data.jsonl", "--eval_ratio", "1", "--max_new_tokens", "4")
    flags = (*flags, "--batch_size", "8")
    unfinished, number = tmp_path / "evaluation_results" / "predictions.unfinished.jsonl", random.Random(8)
    for kill in [*sorted(number.sample(range(50, 1900), 10)), None]:
        process = started(tmp_path, "evaluate.py", *flags, *(("--resume",) if unfinished.exists() else ()))
        while kill and process.poll() is None:
            if unfinished.exists() and unfinished.read_bytes().count(b"\n") > kill:
                process.kill()
                break
            time.sleep(0.005)
        _, stderr = process.communicate()
        assert process.returncode == (-signal.SIGKILL if kill else 0), stderr
    lines = (tmp_path / "evaluation_results" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["index"] for row in rows) == list(range(2000))
    metrics = json.loads((tmp_path / "evaluation_results" / "metrics.json").read_text())
    assert "2000" in json.dumps(metrics)
