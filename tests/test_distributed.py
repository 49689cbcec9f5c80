"""Several processes: the same rows in each step, the same losses, one voice, and what happens when one dies."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script, write_jsonl
from test_qwen_finetuning import base_flags, records

qwen = load_script("qwen_finetuning")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(folder: Path, model: Path, *flags, nodes: int = 1, processes: int = 2) -> list[subprocess.Popen]:
    """Start torchrun, one agent a node, all on this machine; returns the agents."""
    port, agents = free_port(), []
    for node in range(nodes):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--nnodes={nodes}"]
        command += [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command += [str(ROOT / "qwen_finetuning.py"), *map(str, base_flags(model)), *map(str, flags)]
        agents.append(
            subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return agents


def finish(agents: list[subprocess.Popen]) -> str:
    """Wait for all agents, all well; returns what the first one's processes printed."""
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * len(agents), "\n".join(outputs)
    return outputs[0]


def train_losses(folder: Path) -> list[float]:
    """Loss of every step of a run."""
    state = json.loads((folder / "outputs" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_one_process_two_processes_and_two_nodes_train_the_same(tmp_path, tiny_qwen2):
    losses, answers = {}, {}
    for name, nodes, processes in (("one", 1, 1), ("two", 1, 2), ("nodes", 2, 1)):
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder / "data.jsonl", records(40))  # 36 to train on: they divide evenly
        if name == "one":
            process = run_script("qwen_finetuning.py", *base_flags(tiny_qwen2), cwd=folder)
            assert process.returncode == 0, process.stderr
        else:
            flags = ("--gradient_accumulation_steps", "2")
            printed = finish(launch(folder, tiny_qwen2, *flags, nodes=nodes, processes=processes))
            assert printed.count("the first training example") == printed.count("Step 1/15 ·") == 1  # one voice
        losses[name] = train_losses(folder)
        flags = ("--model", "Qwen_finetuning_model", "--max_new_tokens", "12")
        answers[name] = run_script("inference.py", *flags, cwd=folder, input="What costs 7?").stdout
    assert len(losses["one"]) == 15
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-3)
    assert losses["nodes"] == pytest.approx(losses["one"], abs=1e-3)
    assert answers["one"] == answers["two"] == answers["nodes"] != ""


@pytest.mark.slow
def test_4_bit_under_two_processes_trains_and_resumes_with_one(tmp_path, tiny_qwen2):
    write_jsonl(tmp_path / "data.jsonl", records(40))
    flags = ("--load_in_4bit", "--dtype", "bfloat16", "--optim", "adamw_8bit", "--num_train_epochs", "6")
    agents = launch(tmp_path, tiny_qwen2, *flags, "--gradient_accumulation_steps", "2")
    for line in agents[0].stdout:
        if "Step 17/30" in line:
            agents[0].send_signal(signal.SIGTERM)
            break
    agents[0].communicate(timeout=60)
    process = run_script("qwen_finetuning.py", *base_flags(tiny_qwen2), *flags, "--resume", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    # SIGTERM saves the step that was running, or the one after it where the signal came between two
    assert re.search(r"resuming from outputs/checkpoint-(1[7-9]|2\d)\n", process.stderr), process.stderr
    record = json.loads((tmp_path / "Qwen_finetuning_model/finetune_config.json").read_text())
    assert record["result"]["loss_after"] < record["result"]["loss_before"] - 0.5


@pytest.mark.slow
def test_a_process_that_dies_takes_the_run_down_and_resume_goes_on(tmp_path, tiny_qwen2):
    wanted = None
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder / "data.jsonl", records(40))
        flags = ("--gradient_accumulation_steps", "2", "--num_train_epochs", "4")
        agents = launch(folder, tiny_qwen2, *flags)
        if name == "undisturbed":
            finish(agents)
            wanted = train_losses(folder)
            continue
        for line in agents[0].stdout:
            if "Step 13/20" in line:
                break
        children = Path(f"/proc/{agents[0].pid}/task/{agents[0].pid}/children").read_text().split()
        ranks = {p: Path(f"/proc/{p}/environ").read_text().split("\0") for p in children}
        victim = next(int(p) for p, environ in ranks.items() if "RANK=1" in environ)
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        printed = agents[0].communicate(timeout=90)[0]
        assert agents[0].returncode != 0 and time.monotonic() - started < 60
        assert re.search("SIGKILL|Signal 9", printed)
        finish(launch(folder, tiny_qwen2, *flags, "--resume"))
        assert train_losses(folder) == pytest.approx(wanted, abs=1e-3)


def test_deepspeed_is_never_silently_something_else(tmp_path, tiny_qwen2):
    write_jsonl(tmp_path / "data.jsonl", records(10))
    flags = ("--deepspeed", ROOT / "configs/deepspeed/ds_config.json")
    process = run_script("qwen_finetuning.py", *base_flags(tiny_qwen2), *flags, cwd=tmp_path)
    assert process.returncode == 1 and "--deepspeed wants a launcher" in process.stderr
    if not importlib.util.find_spec("deepspeed"):
        assert "deepspeed is not installed" in process.stderr
        return
    env = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    process = run_script("qwen_finetuning.py", *base_flags(tiny_qwen2), *flags, cwd=tmp_path, env=env)
    assert process.returncode == 1 and "works on CUDA GPUs only" in process.stderr


@pytest.mark.parametrize(("name", "stage"), [("ds_config.json", 2), ("ds_config_zero3.json", 3)])
def test_deepspeed_reads_its_configurations(name, stage, monkeypatch, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    device = qwen.device_policy("cpu", True, False, False)
    args = qwen.training_args(qwen.FinetuneConfig(output_dir=tmp_path), device, 100, held_out=True, recompute=False)
    settings = HfTrainerDeepSpeedConfig(str(ROOT / "configs" / "deepspeed" / name))
    settings.trainer_config_process(args)
    settings.fill_match("zero_optimization.reduce_bucket_size", 1)  # the Trainer fills these from the model's width
    for key in ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        settings.fill_match(f"zero_optimization.{key}", 1)
    assert '"auto"' not in json.dumps(settings.config), settings.config
    monkeypatch.setenv("WORLD_SIZE", "1")
    parsed = DeepSpeedConfig(settings.config)
    assert parsed.zero_config.stage == stage and parsed.gradient_accumulation_steps == 4
    assert parsed.train_micro_batch_size_per_gpu == 2


@pytest.mark.parametrize("library", ["wandb", "swanlab"])
def test_a_tracked_run_leaves_its_loss_curve_on_disk(library, tmp_path, tiny_qwen2):
    write_jsonl(tmp_path / "data.jsonl", records(20))
    if not importlib.util.find_spec(library):
        process = run_script("qwen_finetuning.py", *base_flags(tiny_qwen2), "--trace", library, cwd=tmp_path)
        assert process.returncode == 1 and f"pip install {library}" in process.stderr
        return
    env = {"WANDB_MODE": "offline", "SWANLAB_MODE": "local"}
    flags = ("--trace", library, "--max_steps", "4")
    process = run_script("qwen_finetuning.py", *base_flags(tiny_qwen2), *flags, cwd=tmp_path, env=env)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / {"wandb": "wandb", "swanlab": "swanlog"}[library]
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"train/loss" in written and b"eval/loss" in written and b"rows_read" in written


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ds_config.json", "ds_config_zero3.json"])
def test_deepspeed_on_gpus_trains_as_one_process_does(name, tmp_path, tiny_qwen2):
    torch = pytest.importorskip("torch")
    pytest.importorskip("deepspeed")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    losses = {}
    for label, processes, flags in (("one", 1, ()), ("two", 2, ("--deepspeed", ROOT / "configs/deepspeed" / name))):
        folder = tmp_path / label
        folder.mkdir()
        write_jsonl(folder / "data.jsonl", records(40))
        accumulation = ("--gradient_accumulation_steps", 4 // processes)
        finish(launch(folder, tiny_qwen2, *accumulation, *flags, processes=processes))
        losses[label] = train_losses(folder)
        assert list((folder / "Qwen_finetuning_model").glob("adapter_model.safetensors"))
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-3)
