"""evaluate.py: the loss against a plain loop, scores against the libraries, the real script on tiny runs."""

from __future__ import annotations

import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run_script, write_jsonl

METRIC = """
import datasets
import evaluate


class Exact(evaluate.Metric):
    def _info(self):
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references))
        return {"exact": sum(a == b for a, b in pairs) / len(pairs), "odd": float("nan")}
"""
ATTACK = "<script>document.title = 'ran'</script><img src=\"ADDRESS/pixel\"><b>芯片</b>"


@pytest.fixture(scope="module")
def evaluate():
    return load_script("evaluate")


def records(number: int) -> list[dict]:
    """Records of different lengths, Chinese and English by turns; the questions teach one answer."""
    texts = ["芯片由硅制成" * (i % 4 + 1) if i % 2 else "What does it cost? " * (i % 5 + 1) for i in range(number)]
    return [
        {"instruction": f"{text} {i}", "output": f"It costs {i % 7} euros." + " and more" * (i % 3 * 10)}
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def run(tiny_qwen2, tmp_path_factory) -> Path:
    """A folder in which qwen_finetuning.py trained an adapter in float32, with 18 of 60 rows held out."""
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "rows.jsonl", records(60))
    flags = ["--no-load_in_4bit", "--dtype", "float32", "--max_steps", "12", "--learning_rate", "1e-2", "--optim"]
    flags += ["adamw_torch", "--eval_ratio", "0.3", "--system_prompt", "Be brief.", "--max_seq_length", "80"]
    done = run_script(
        "qwen_finetuning.py", "--model_name", tiny_qwen2, "--dataset_path", "rows.jsonl", *flags, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    (folder / "exact").mkdir()
    (folder / "exact" / "exact.py").write_text(METRIC)
    return folder


@pytest.fixture(scope="module")
def judged(run) -> tuple[dict, list[dict], subprocess.CompletedProcess]:
    """metrics.json, the predictions, and the process of one full evaluation of that adapter."""
    flags = ["--rouge", "--bleu", "--compare_base", "--max_new_tokens", "48", "--batch_size", "4"]
    done = run_script("evaluate.py", *flags, "--metrics", run / "exact", cwd=run)
    assert done.returncode == 0, done.stderr
    results = run / "evaluation_results"
    predictions = [json.loads(line) for line in (results / "predictions.jsonl").read_text().splitlines()]
    return json.loads((results / "metrics.json").read_text()), predictions, done


# ------------------------------------------------------------------------------------------- the whole


def test_loss_is_the_one_that_training_reported(run, judged):
    metrics, _, _ = judged
    result = json.loads((run / "Qwen_finetuning_model" / "finetune_config.json").read_text())["result"]
    assert metrics["eval_loss"] == pytest.approx(result["loss_after"], abs=1e-5)
    assert metrics["base"]["eval_loss"] == pytest.approx(result["loss_before"], abs=1e-5)
    assert metrics["base"]["eval_loss"] > metrics["eval_loss"] + 0.1
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


def test_same_rows_as_training_held_out(run, judged):
    metrics, predictions, _ = judged
    record = json.loads((run / "Qwen_finetuning_model" / "finetune_config.json").read_text())
    assert metrics["dataset"]["evaluated"] == len(record["held_out"]) == len(predictions) == 18
    assert metrics["dataset"]["sha256"] == record["dataset"]["sha256"] and metrics["dataset"]["changed"] is False
    by_question = {row["instruction"]: row["output"] for row in records(60)}
    assert all(by_question[row["instruction"]] == row["reference"] for row in predictions)


def test_metrics_add_up(judged):
    metrics, predictions, done = judged
    stopped = [row["stopped"] for row in predictions]
    assert set(stopped) <= {"end_of_turn", "limit"}
    assert metrics["stop_rate"] == pytest.approx(stopped.count("end_of_turn") / 18)
    assert metrics["empty_rate"] == pytest.approx(sum(not row["prediction"].strip() for row in predictions) / 18)
    assert metrics["exact"] == pytest.approx(sum(row["prediction"] == row["reference"] for row in predictions) / 18)
    assert metrics["exact_odd"] is None  # not a number, so none
    ratio = metrics["avg_pred_len_tokens"] / metrics["avg_ref_len_tokens"]
    assert metrics["len_ratio_pred_over_ref"] == pytest.approx(ratio)
    assert (
        metrics["length"]["min"] <= metrics["length"]["median"] <= metrics["length"]["p95"] <= metrics["length"]["max"]
    )
    assert metrics["truncation_rate"] > 0 and metrics["length"]["max"] > metrics["max_seq_length"] == 80
    low, high = metrics["rougeL_interval"]
    assert low <= metrics["rougeL"] <= high
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert {"perplexity", "stop_rate", "rouge1", "bleu", "exact"} <= set(names)
    assert done.stdout.split()[:2] == ["model", "base"]


def test_killed_evaluation_resumes_after_the_last_whole_prediction(evaluate, run, judged):
    flags = ["--rouge", "--compare_base", "--max_new_tokens", "48", "--batch_size", "1", "--output_dir", "killed"]
    unfinished = run / "killed" / "predictions.unfinished.jsonl"
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags]
    process = subprocess.Popen(command, cwd=run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (unfinished.is_file() and unfinished.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    with open(unfinished, "ab") as file:
        file.write('{"index": 17, "prediction": "芯'.encode()[:-1])
    kept = [json.loads(line) for line in unfinished.read_bytes().split(b"\n")[1:-1]]
    assert 3 <= len(kept) < 18
    assert not (run / "killed" / "metrics.json").exists()

    again = run_script("evaluate.py", *flags, cwd=run)
    assert again.returncode == 1 and "--resume" in again.stderr and "unfinished evaluation" in again.stderr
    with pytest.raises(evaluate.UserError, match="max_new_tokens was 48, is 9"):
        evaluate.earlier_predictions(unfinished, {"max_new_tokens": 9})
    done = run_script("evaluate.py", *flags, "--resume", cwd=run)
    assert done.returncode == 0, done.stderr
    assert f"resuming after {len(kept)} predictions" in done.stderr and f"{18 - len(kept)} prompts" in done.stderr
    assert not unfinished.exists()
    resumed = [json.loads(line) for line in (run / "killed" / "predictions.jsonl").read_text().splitlines()]
    # one at a time and four at a time, resumed and not: in float32 the answers are the same
    assert resumed == judged[1]


# --------------------------------------------------------------------------------------- what is judged


def test_split_without_a_run_is_the_one_of_training(evaluate, run):
    record = evaluate.read_run(run / "Qwen_finetuning_model")
    config = evaluate.Config(dataset_path=str(run / "rows.jsonl"), eval_ratio=0.3, system_prompt="Be brief.")
    split, about = evaluate.rows_to_judge(config, {})
    assert [evaluate.digest_of(row["messages"]) for row in split] == record["held_out"]
    assert "split" in about["chosen_by"]
    every, _ = evaluate.rows_to_judge(evaluate.Config(dataset_path=str(run / "rows.jsonl"), eval_ratio=1), {})
    assert len(every) == 60
    assert len(evaluate.rows_to_judge(evaluate.Config(dataset_path=config.dataset_path, limit=4), record)[0]) == 4


def test_changed_dataset_is_said(evaluate, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = evaluate.read_run(run / "Qwen_finetuning_model")
    write_jsonl(tmp_path / "rows.jsonl", [*records(60)[:40], {"instruction": "new", "output": "row"}])
    rows, about = evaluate.rows_to_judge(evaluate.Config(), record)
    assert about["changed"] and 0 < len(rows) < 18
    assert f"{len(rows)} of the 18 held-out rows" in capsys.readouterr().err
    assert {row["digest"] for row in rows} < set(record["held_out"])
    with pytest.raises(evaluate.UserError, match="held no rows out"):
        evaluate.rows_to_judge(evaluate.Config(), record | {"held_out": []})
    write_jsonl(tmp_path / "one.jsonl", records(1))
    with pytest.raises(evaluate.UserError, match="no row to judge by among 1"):
        evaluate.rows_to_judge(evaluate.Config(dataset_path="one.jsonl"), record)


def test_last_answer_of_several_turns_is_the_reference(evaluate):
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = evaluate.shown_row({"messages": [{"role": role, "content": text} for role, text in turns]}, "")
    assert row["reference"] == "d" and row["instruction"] == "user: a\nassistant: b\nuser: c"
    assert [message["content"] for message in row["messages"]] == ["S", "a", "b", "c", "d"]
    assert evaluate.shown_row({"input": "q", "output": "r"}, "")["input"] == "q"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--limit", "0"], 2, "--limit is 0"),
        (["--eval_ratio", "0"], 2, "--eval_ratio is 0.0"),
        (["--batch_size", "0", "--top_p", "2"], 2, "--top_p is 2.0"),
        (["--no_such_flag"], 2, "unrecognized arguments"),
        (["--model", "nowhere"], 1, "nowhere: no such folder"),
        (["--dataset_path", "nothing.jsonl"], 1, "nothing.jsonl: no such dataset"),
        (
            ["--model", "BASE", "--compare_base", "--dataset_path", "rows.jsonl"],
            1,
            "--compare_base switches an adapter",
        ),
        (["--dataset_path", "bad.jsonl"], 1, "bad.jsonl:2: empty answer"),
    ],
)
def test_mistakes_get_one_clear_line(run, tiny_qwen2, flags, code, words):
    (run / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": " "}\n')
    done = run_script("evaluate.py", *[tiny_qwen2 if flag == "BASE" else flag for flag in flags], cwd=run)
    assert done.returncode == code
    assert words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_library_of_the_same_name_is_found_from_the_repository_too(run):
    model = run / "Qwen_finetuning_model"
    flags = ["--model", model, "--dataset_path", run / "rows.jsonl", "--output_dir", run / "other"]
    done = run_script("evaluate.py", *flags, "--metrics", run / "exact", "no/metric", cwd=ROOT)
    assert done.returncode == 1 and "metric no/metric can not be loaded: Couldn't find a module" in done.stderr


# ------------------------------------------------------------------------------------------- the model


def plain_loss(folder: Path, rows: list[dict]) -> float:
    """Mean of -log p over all labels, one example at a time in float64, with nothing but a forward and a softmax."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        scores = torch.log_softmax(logits, dim=-1)
        losses += [-scores[i - 1, label].item() for i, label in enumerate(row["labels"]) if i and label != -100]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["tiny_qwen2", "tiny_gpt2"])
def test_perplexity_equals_a_plain_loop_in_float64(evaluate, kind, request):
    import torch
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(kind)
    random = torch.Generator().manual_seed(1)
    rows = []
    for length in (3, 40, 9, 200, 17, 1):
        ids = torch.randint(3, 300, (length,), generator=random).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    padded = [{"input_ids": row["input_ids"] + [0] * 5, "labels": row["labels"] + [-100] * 5} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    truth = math.exp(plain_loss(folder, rows))
    for way in (
        evaluate.teacher_forced(model, rows)["perplexity"],
        evaluate.teacher_forced(model, padded)["perplexity"],
        math.exp(evaluate.held_out_loss(model, rows, tokens_per_forward=1)),
        math.exp(evaluate.held_out_loss(model, rows, tokens_per_forward=64)),
    ):
        assert way == pytest.approx(truth, rel=1e-5)
    assert evaluate.teacher_forced(model, [{"input_ids": [5], "labels": [5]}]) == {
        "eval_loss": None,
        "perplexity": None,
    }


def test_batched_answers_equal_single_ones(evaluate, tiny_qwen2):
    config = evaluate.Config(max_new_tokens=40)
    model, tokenizer, _ = evaluate.load_chat_model(str(tiny_qwen2), False, False)
    model = model.float()
    texts = ["芯片", "What does the lamp cost? " * 6, "你好，世界！" * 3, "Proteins", "0 1 2 3 4 5"]
    prompts = [evaluate.encode_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    single = [evaluate.generate_batch(model, [prompt], config)[0] for prompt in prompts]
    assert evaluate.generate_batch(model, prompts, config) == single
    assert {stopped for _, stopped in single} <= {"limit", "end_of_turn"}
    # an answer ends at the first end-of-turn token, whatever stands after it
    model.generation_config.eos_token_id = [single[0][0][5]]
    ids, stopped = evaluate.generate_batch(model, prompts, config)[0]
    assert stopped == "end_of_turn" and ids == single[0][0][: single[0][0].index(single[0][0][5])]
    # the context holds 1024 tokens
    assert len(evaluate.generate_batch(model, [[5] * 1014], config)[0][0]) <= 10
    assert evaluate.generate_batch(model, [[5] * 1024], config) == [([], "no_room")]


def test_base_made_plain_keeps_the_function(evaluate, tiny_qwen2):
    import bitsandbytes

    ids = list(range(10, 90))
    rows = [{"input_ids": ids, "labels": ids}]
    model, _, _ = evaluate.load_chat_model(str(tiny_qwen2), True, False)
    assert not evaluate.dequantise_for_many(model, 15)
    before = evaluate.teacher_forced(model, rows)["eval_loss"]
    model, _, _ = evaluate.load_chat_model(str(tiny_qwen2), True, False)
    assert evaluate.dequantise_for_many(model, 16)
    assert not any(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in model.modules())
    assert evaluate.teacher_forced(model, rows)["eval_loss"] == pytest.approx(before, abs=0.01)


# ------------------------------------------------------------------------------------------ the scores


def test_rouge_of_chinese(evaluate):
    reference = "大语言模型需要很多数据和算力"
    half = "大语言模型吃掉苹果香蕉橘子"
    equal, some, none, mixed = evaluate.rouge_scores(
        [reference, half, "", "用LoRA微调Qwen2模型"], [reference] * 3 + ["用 LoRA 微调 Qwen2 模型"]
    )
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert equal[kind].fmeasure == 1.0 and none[kind].fmeasure == 0.0 and mixed[kind].fmeasure == 1.0
        assert 0.1 < some[kind].fmeasure < 0.9
    assert {"用", "lora", "微调", "qwen2"} <= set(evaluate.Words().tokenize("用LoRA微调Qwen2模型！"))


def test_english_scores_equal_the_libraries_to_the_last_digit(evaluate):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    references = ["The naïve lamp costs 12 euros.", "It's made of silicon, isn't it?", "Yes. No. Maybe so."]
    answers = ["A naïve lamp costs 14 euros", "Chips: it's made of sand, not silicon.", ""]
    ours = evaluate.rouge_scores(answers, references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    assert ours == [scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    summary = evaluate.rouge_summary(ours, seed=42)
    assert summary["rouge1"] == sum(score["rouge1"].fmeasure for score in ours) / 3
    assert summary == evaluate.rouge_summary(ours, seed=42)
    found = evaluate.bleu_summary(answers, references)
    assert found["bleu"] == corpus_bleu(answers, [references]).score > 0
    assert "tok:13a" in found["bleu_signature"]
    low, high = found["bleu_interval"]
    assert low <= found["bleu"] <= high


def test_bleu_of_chinese(evaluate):
    from sacrebleu import corpus_bleu

    references = ["大语言模型需要很多数据和算力。", "芯片由硅制成，价格是12欧元。"]
    answers = ["大语言模型需要数据和算力。", "芯片由砂制成，价格是12欧元。"]
    found = evaluate.bleu_summary(answers, references)
    assert found["bleu"] == corpus_bleu(answers, [references], tokenize="zh").score
    assert 20 < found["bleu"] < 100 and "tok:zh" in found["bleu_signature"]
    assert evaluate.bleu_summary(references, references)["bleu"] == pytest.approx(100)


def test_odd_texts_give_numbers(evaluate, tiny_qwen2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    config = evaluate.Config(rouge=True, bleu=True)
    for answers, references in ((["  ", "\n\t"], ["😀", "🎉🎉"]), (["😀"], ["😀"]), ([" "], ["字"])):
        stops = ["limit"] * len(answers)
        values, order = evaluate.judge_answers(answers, stops, references, tokenizer, config, {})
        json.dumps(values, allow_nan=False)
        assert values["empty_rate"] == float(answers != ["😀"])
        assert values["stop_rate"] == values["rougeL"] == values["distinct-2"] == 0
        assert order == [0.0] * len(answers)
    assert evaluate.distinct(["a b", "a b"], 1) == 0.5


# ------------------------------------------------------------------------------------------ the report


def page(evaluate, address: str) -> str:
    attack = ATTACK.replace("ADDRESS", address)
    rows = [
        {"instruction": "q1", "input": attack, "reference": attack, "prediction": "good", "score": 0.9},
        {"instruction": "q2", "input": "", "reference": "r\x1b[2J", "prediction": attack, "score": 0.1},
    ]
    for row in rows:
        row["base_prediction"] = attack
    sides = {"model": {"perplexity": 1.5, "rouge1": 0.5, "rouge1_interval": [0.4, 0.6]}, "base": {"perplexity": None}}
    return evaluate.report(f"Evaluation of {attack}", sides, [3, 5, 5, 900], 512, rows)


def test_report_escapes_everything(evaluate):
    tags, texts = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not {"src", "href", "onload"} & {name for name, _ in attrs}

        def handle_data(self, data):
            texts.append(data)

    text = page(evaluate, "http://127.0.0.1:9")
    Reader().feed(text)
    assert not {"script", "img", "b", "link"} & set(tags)
    assert tags.count("rect") == 2 or tags.count("rect") > 10 and "line" in tags
    assert texts.count(ATTACK.replace("ADDRESS", "http://127.0.0.1:9")) == 4
    assert "0.5 [0.4, 0.6]" in texts and "none" in texts and "\x1b" not in text
    assert text.index("q2") < text.index("q1")  # the lowest score first


def test_report_in_a_browser_runs_nothing_and_asks_for_nothing(evaluate, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        doms = []
        # the second page is an open door: it shows that the trap works
        for name, text in (("report", page(evaluate, address)), ("door", ATTACK.replace("ADDRESS", address + "/door"))):
            (tmp_path / f"{name}.html").write_text(f"{text}", encoding="utf-8")
            command = [browser, *flags.split(), f"--user-data-dir={tmp_path / name}", f"file://{tmp_path}/{name}.html"]
            doms.append(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
    finally:
        server.shutdown()
    assert "<title>Evaluation of &lt;script&gt;" in doms[0] and "&lt;script&gt;document.title" in doms[0]
    assert asked == ["/door/pixel"] and "<title>ran</title>" in doms[1]


# --------------------------------------------------------------------------------------- a real model


@pytest.mark.real
def test_real_four_bit_adapter(tmp_path):
    model = Path(os.environ.get("SFT_MODEL_DIR", ROOT / "models" / "SmolLM2-135M-Instruct"))
    if not (model / "config.json").is_file():
        pytest.skip("no SmolLM2-135M-Instruct: set SFT_MODEL_DIR, or run qwen_finetuning.py --demo once")
    flags = ["--dataset_path", ROOT / "configs" / "demo_dataset.json", "--learning_rate", "1e-3", "--max_steps", "15"]
    flags += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    done = run_script("qwen_finetuning.py", "--model_name", model.resolve(), *flags, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    flags = ["--max_new_tokens", "32", "--rouge", "--bleu"]
    for extra in ([], ["--compare_base"]):  # 13 answers on packed 4-bit weights, then 26 on a plain base
        done = run_script("evaluate.py", *flags, *extra, cwd=tmp_path, timeout=900)
        assert done.returncode == 0, done.stderr
        assert ("made plain" in done.stderr) == bool(extra)
        metrics = json.loads((tmp_path / "evaluation_results" / "metrics.json").read_text())
        record = json.loads((tmp_path / "Qwen_finetuning_model" / "finetune_config.json").read_text())
        assert metrics["eval_loss"] == pytest.approx(record["result"]["loss_after"], abs=0.01)
    assert metrics["base"]["eval_loss"] > metrics["eval_loss"] + 0.5
    assert metrics["rougeL"] > metrics["base"]["rougeL"]
