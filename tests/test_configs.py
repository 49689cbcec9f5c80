"""YAML files that describe a run: they load, nested and flat ones agree, and a run can be repeated from its own."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

qwen = load_script("qwen_finetuning")

FILES = sorted((ROOT / "configs").glob("*.yaml"))
REFERENCE = ROOT / "configs" / "finetune_reference.yaml"
# Qwen2.5-7B: 7.6 billion weights, 6.5 of them in linear layers; adapter of rank 16
SHAPE_7B = (6_525_288_448, 1_090_000_000, 40_370_176, 67_895_296, 28, 28, 3584, 18944, 152_064)


def settings_of(*flags) -> dict:
    """What a run with these flags would do, without the file that said so."""
    return asdict(qwen.parse_args([str(flag) for flag in flags])) | {"config": None}


def write_yaml(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def fault_of(capsys, *flags) -> str:
    """The error that ends the parsing of these flags with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        qwen.parse_args([str(flag) for flag in flags])
    assert stop.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2].strip()


# ----------------------------------------------------------------------------- the files of the project


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_loads_and_opens_with_its_command(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    opening = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))[0]
    command = re.search(r"python qwen_finetuning\.py (.*)", opening)[1]
    assert settings_of(*shlex.split(command)) == settings_of("--config", file) | {"demo": "--demo" in command}
    assert re.search(r"For (one GPU|two CPU cores)", opening)
    assert re.search(r"needs\s(#\s)?about [\d.]+ GB", opening)


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "demo.yaml"], ids=lambda file: file.name)
def test_the_memory_that_a_file_names_is_the_estimate(file):
    config = qwen.parse_args(["--config", str(file)])
    tokens = config.per_device_train_batch_size * config.max_seq_length
    device = qwen.device_policy("cuda", True, False, config.load_in_4bit)
    need = qwen.estimate_memory(qwen.ModelShape(*SHAPE_7B), config, device, tokens, recompute=True)
    assert f"needs about {sum(need.values()) / 1e9:.1f} GB" in file.read_text(encoding="utf-8").replace("\n# ", " ")
    assert config.model_name == "Qwen/Qwen2.5-7B-Instruct" and config.lora_r == 16


def test_the_medical_data_is_made_by_the_command_that_stands_there():
    text = (ROOT / "configs" / "finetune_medical.yaml").read_text(encoding="utf-8")
    command = re.search(r"python data_integration\.py (.*)", text)[1]
    made = load_script("data_integration").parse_args(shlex.split(command))
    config = qwen.parse_args(["--config", str(ROOT / "configs" / "finetune_medical.yaml")])
    assert (made.ratios, made.total_samples) == (["pubmed=1"], 1000)
    assert str(made.output_file) == config.dataset_path


def test_the_reference_equals_the_dataclass(tmp_path):
    text = REFERENCE.read_text(encoding="utf-8")
    entries = re.findall(r"^# (.*) \[(.*)\]\n(\w+): .*$", text, re.M)
    wanted = [f for f in fields(qwen.FinetuneConfig) if f.name not in qwen.COMMAND_LINE_ONLY]
    assert [(help, name) for help, _, name in entries] == [(f.metadata["help"], f.name) for f in wanted]
    assert settings_of("--config", REFERENCE) == settings_of() == asdict(qwen.FinetuneConfig())
    assert all(f"--{name}" in text for name in qwen.COMMAND_LINE_ONLY)


def test_the_ranges_in_the_reference_are_those_that_are_checked(capsys):
    choices = {f.name: f.metadata.get("choices") for f in fields(qwen.FinetuneConfig)}
    entries = re.findall(r"\[(.*)\]\n(\w+): ", REFERENCE.read_text(encoding="utf-8"))
    for allowed, name in entries:
        if allowed.endswith(" above 0") and "-1" not in allowed:
            assert "must be above 0" in fault_of(capsys, f"--{name}=0")
        if allowed.endswith("0 or more"):
            assert "must be 0 or more" in fault_of(capsys, f"--{name}=-1")
        if allowed.endswith("from 0 to 4294967295"):
            assert "must be from 0 to 4294967295" in fault_of(capsys, f"--{name}=4294967296")
        if allowed.startswith("a whole number"):
            assert "invalid int value" in fault_of(capsys, f"--{name}=1.5")
        if allowed == "0 to below 1":
            assert "from 0 to below 1" in fault_of(capsys, f"--{name}=1")
        if allowed == "true or false":
            qwen.parse_args([f"--no-{name}"])
        assert choices[name] == (tuple(allowed[7:].split(", ")) if allowed.startswith("one of ") else None)


# --------------------------------------------------------------------------- nested, flat, command line

NESTED = """
model: {name: Qwen/Qwen2.5-1.5B-Instruct, load_in_4bit: off}
lora: {r: 8, alpha: 16, dropout: 0.05, target_modules: [q_proj, v_proj]}
dataset: {path: my.jsonl}
training: {epochs: 2, batch_size: 4, learning_rate: 1e-4, system_prompt: no, max_length: 512}
training_args: {output_dir: out/a b, gradient_accumulation_steps: 2, warmup_steps: 0}
eval: {strategy: no, ratio: 0.2}
save_strategy: no
"""
FLAT = """
model_name: Qwen/Qwen2.5-1.5B-Instruct
load_in_4bit: false
lora_r: 8
lora_alpha: 16
lora_dropout: 5e-2
lora_target_modules:
  - q_proj
  - v_proj
dataset_path: my.jsonl
num_train_epochs: 2
per_device_train_batch_size: 4
learning_rate: 0.0001
system_prompt: "no"
max_seq_length: 512
output_dir: 'out/a b'
gradient_accumulation_steps: 2
warmup_steps: 0
eval_strategy: "no"
eval_ratio: .2
save_strategy: 'no'
"""


def test_nested_and_flat_files_resolve_to_the_same_run(tmp_path):
    nested = settings_of("--config", write_yaml(tmp_path / "nested.yaml", NESTED))
    assert nested == settings_of("--config", write_yaml(tmp_path / "flat.yaml", FLAT))
    values = {"lora_r": 8, "lora_dropout": 0.05, "learning_rate": 1e-4, "system_prompt": "no", "eval_strategy": "no"}
    values |= {"lora_target_modules": ("q_proj", "v_proj"), "output_dir": Path("out/a b"), "load_in_4bit": False}
    assert {name: nested[name] for name in values} == values
    assert sum(nested[name] != value for name, value in settings_of().items()) == 18  # each line of FLAT


def test_the_sections_that_people_write(tmp_path):
    text = (
        "model: {name: Qwen/Qwen2.5-1.5B-Instruct}\nlora: {r: 16, alpha: 32, dropout: 0.05}\n"
        "training: {epochs: 3, batch_size: 4, learning_rate: 2e-4}\n"
    )
    config = qwen.parse_args(["--config", str(write_yaml(tmp_path / "a.yaml", text)), "--lora_alpha", "64"])
    assert (config.model_name, config.num_train_epochs) == ("Qwen/Qwen2.5-1.5B-Instruct", 3.0)
    assert (config.per_device_train_batch_size, config.learning_rate) == (4, 2e-4)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (16, 64, 0.05)


def test_every_alias_leads_to_a_setting(tmp_path):
    names = {f.name for f in fields(qwen.FinetuneConfig)}
    for alias, name in qwen.ALIASES.items():
        section, _, key = alias.rpartition(".")
        file = write_yaml(tmp_path / "a.yaml", f"{section or 'training'}:\n  {key}: 7\n")
        assert name in names and name not in qwen.COMMAND_LINE_ONLY
        assert str(settings_of("--config", file)[name]) in ("7", "7.0")


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "template_path:\nlora_r: 16\n", "template_path: ~\n", "\ufefflora: {r: 16}\n"]
)
def test_files_that_change_nothing(tmp_path, text):
    assert settings_of("--config", write_yaml(tmp_path / "a.yaml", text)) == settings_of()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_rr: 8\n", "a.yaml:1: unknown setting 'lora_rr'; the nearest known one is 'lora_r'"),
        ("lora:\n  rr: 8\n", "a.yaml:2: unknown setting 'lora.rr'; the nearest known one is 'lora_r'"),
        ("training: {epoch: 8}\n", "unknown setting 'training.epoch'; the nearest known one is 'num_train_epochs'"),
        ("? [a]\n: 8\n", "a.yaml:1: unknown setting"),
        ("x: 1\n", "a.yaml:1: unknown setting 'x'"),
        ("\nlora_r: eight\n", "a.yaml:2: argument --lora_r: invalid int value: 'eight'"),
        ("lora_r: 1.5\n", "a.yaml:1: argument --lora_r: invalid int value: '1.5'"),
        ("overlong: cut\n", "a.yaml:1: argument --overlong: invalid choice: 'cut'"),
        ("packing: maybe\n", "a.yaml:1: packing is 'maybe'; expected true or false"),
        ("packing: [true]\n", "a.yaml:1: packing: expected one value, found a sequence"),
        ("lora_r: [8, 16]\n", "a.yaml:1: lora_r: expected one value, found a sequence"),
        ("lora_target_modules: []\n", "a.yaml:1: argument --lora_target_modules: expected at least one argument"),
        ("lora_target_modules: [[a]]\n", "a.yaml:1: lora_target_modules: expected one value, found a sequence"),
        ("lora: {r: {x: 8}}\n", "a.yaml:1: lora_r: expected one value, found a mapping"),
        ("system_prompt: null\n", "a.yaml:1: system_prompt has no value; leave the line out, or write ''"),
        ("lora_r:\n", "a.yaml:1: lora_r has no value"),
        ("lora_r: 8\nlora: {r: 8}\n", "a.yaml:2: lora_r is set twice"),
        ("lora_r: 8\nlora_r: 16\n", "a.yaml:2: lora_r is set twice"),
        ("config: b.yaml\n", "a.yaml:1: config belongs on the command line"),
        ("demo: true\n", "a.yaml:1: demo belongs on the command line"),
        ("lora_r: 8\nseed: !!python/object/apply:os.getcwd []\n", "a.yaml:2: the tag tag:yaml.org,2002:python/object"),
        ("!!python/object/new:int {lora_r: 8}\n", "a.yaml:1: the tag"),
        ("seed: !mine 8\n", "a.yaml:1: the tag !mine is refused; write plain values"),
        ("- lora_r\n", "a.yaml: expected lines like 'lora_r: 16', found a sequence"),
        ("just text\n", "a.yaml: expected lines like 'lora_r: 16', found a scalar"),
        ("lora_r: [8\n", "a.yaml: can not be read as YAML"),
        ("lora_r: 8\n---\nlora_r: 16\n", "a.yaml: can not be read as YAML"),
        ("[" * 1200, "a.yaml: can not be read as YAML"),
        ("lora_r: *missing\n", "a.yaml: can not be read as YAML"),
        ("lora_r: &a [*a]\n", "a.yaml:1: lora_r: expected one value"),
    ],
)
def test_mistakes_get_one_line_that_says_where(tmp_path, text, words, capsys):
    fault = fault_of(capsys, "--config", write_yaml(tmp_path / "a.yaml", text))
    assert words in fault and "\n" not in fault


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.yaml", "missing.yaml", "."):
        assert "can not be read as YAML" in fault_of(capsys, "--config", tmp_path / name)


def test_a_tag_builds_nothing(tmp_path):
    file = write_yaml(tmp_path / "a.yaml", "seed: !!python/object/apply:os.mkdir ['built']\n")
    process = run_script("qwen_finetuning.py", "--config", file, cwd=tmp_path)
    assert process.returncode == 2 and "Traceback" not in process.stderr and "is refused" in process.stderr
    assert not (tmp_path / "built").exists()


# ------------------------------------------------------------------------------------- repeating a run


def test_resolved_settings_survive_being_written(tmp_path):
    config = qwen.FinetuneConfig(
        model_name="~/models/a: b # c",
        system_prompt="null\n  'quoted' \"twice\" {x} \\ \t你好 😀 \u2028 \x1b[31m\n\n",
        output_dir=Path("out put/2024-01-01"),
        lora_target_modules=("q_proj", "no", "1e3"),
        learning_rate=1e-05,
        dataset_path="007",
        eval_ratio=0.0,
        load_in_4bit=False,
        overwrite=True,
        resume=True,
        template_path=Path("null"),
    )
    qwen.write_resolved(config, tmp_path / "resolved.yaml")
    assert settings_of("--config", tmp_path / "resolved.yaml") == asdict(config) | {"resume": False}


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.floats(1e-12, 1e6))
def test_any_text_and_number_survives(tmp_path_factory, text, number):
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    config = qwen.FinetuneConfig(system_prompt=text, learning_rate=number, lora_target_modules=("x" + text, "y"))
    qwen.write_resolved(config, file)
    assert settings_of("--config", file) == asdict(config)


def test_a_run_is_repeated_from_what_it_saved(tmp_path, tiny_qwen2, monkeypatch):
    records = [{"input": f"What costs {i}?", "output": f"It costs {i} euros."} for i in range(20)]
    write_jsonl(tmp_path / "data.jsonl", records)
    text = f"""
model: {{name: {tiny_qwen2}, load_in_4bit: false, dtype: float32}}
data: {{path: data.jsonl, system_prompt: "Be: brief\\n"}}
training: {{epochs: 1, lr: 1e-2, optim: adamw_torch, overwrite: true}}
"""
    monkeypatch.chdir(tmp_path)
    losses, files = [], []
    for file in (write_yaml(tmp_path / "run.yaml", text), Path("Qwen_finetuning_model/resolved.yaml")):
        qwen.main(qwen.parse_args(["--config", str(file)]))
        record = json.loads(Path("Qwen_finetuning_model/finetune_config.json").read_text(encoding="utf-8"))
        losses.append(record["result"])
        files.append(Path("Qwen_finetuning_model/resolved.yaml").read_bytes())
        assert Path("outputs/checkpoint-final/resolved.yaml").read_bytes() == files[-1]
    assert losses[0] == losses[1] and files[0] == files[1]
    assert losses[0]["loss_after"] < losses[0]["loss_before"]
