"""evaluate.py: the loss against a plain loop, scores against the libraries, whole runs on a tiny adapter."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from argparse import Namespace

import pytest
from conftest import CHATML, build_tokenizer, load_script, run_script, write_jsonl

METRIC = """
import datasets
import evaluate

class Exact(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        texts = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references):
        return {"exact": sum(map(str.__eq__, predictions, references)), "odd": float("nan")}
"""
ATTACK = "<script>alert(1)</script><img src=x>\x1b[2J"
# A sentence in each script, and one of the same script that has nothing to do with it.
SCRIPTS = {
    "English": ("The lamp costs twelve euros today.", "Cats sleep near warm windows!"),
    "Chinese": ("大语言模型需要很多数据和算力。", "苹果香蕉橘子都是水果吗？"),
    "Russian": ("Большая модель требует много данных.", "Кошка спит на тёплом окне!"),
    "Korean": ("큰 모델은 많은 데이터가 필요합니다", "고양이는 창가에서 잠을 잔다"),
    "Arabic": ("النموذج الكبير يحتاج إلى بيانات كثيرة", "القطة تنام قرب نافذة دافئة"),
    "Hindi": ("बड़े मॉडल को बहुत सारा डेटा चाहिए", "बिल्ली गर्म खिड़की के पास सोती है"),
    "Greek": ("Το μεγάλο μοντέλο χρειάζεται δεδομένα", "Μια γάτα κοιμάται δίπλα στη ζέστη"),
    "Thai": ("โมเดลใหญ่ต้องการข้อมูลจำนวนมาก", "แมวหลับ"),
    "Japanese": ("大きなモデルには多くのデータが必要です", "ねこは窓辺で眠っている"),
    "emoji": ("😀🎉🚀❤✨", "🐱🐶🌧🍎⚽"),
}


@pytest.fixture(scope="module")
def evaluate():
    """The script, in float32 on every machine, so that numbers can be compared to the last digits."""
    import torch

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cpu, "get_capabilities", dict)
    yield load_script("evaluate")
    patch.undo()


@pytest.fixture
def run(evaluate, tiny_adapter, tmp_path, monkeypatch, capsys):
    """Run evaluate.py in this process: (metrics, predictions, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, model=tiny_adapter):
        evaluate.main(evaluate.parse_args([*map(str, flags), "--model", str(model), "--max_new_tokens", "8"]))
        lines = (tmp_path / "evaluation_results/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = json.loads((tmp_path / "evaluation_results/metrics.json").read_text(encoding="utf-8"))
        return metrics, list(map(json.loads, lines)), capsys.readouterr().err

    return run


def plain_loss(folder, rows: list[dict]) -> float:
    """Mean of -log p over all labels, one example at a time in float64: a forward and a softmax."""
    import torch
    from transformers import AutoModelForCausalLM

    model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), []
    for row in rows:
        with torch.no_grad():
            scores = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-scores[i - 1, y].item() for i, y in enumerate(row["labels"]) if i and y != -100]
    return math.fsum(losses) / len(losses)


def test_the_whole_as_a_person_runs_it(tiny_adapter, tmp_path):
    (tmp_path / "exact").mkdir()
    (tmp_path / "exact/exact.py").write_text(METRIC)
    flags = [
        "--rouge",
        "--bleu",
        "--compare_base",
        "--metrics",
        "exact",
        "--max_new_tokens",
        "8",
        "--seed",
        "7",
    ]
    done = run_script("evaluate.py", "--model", tiny_adapter, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held_out.jsonl: as training stored them, whatever --eval_ratio and --seed say" in done.stderr
    results = tmp_path / "evaluation_results"
    assert sorted(p.name for p in results.iterdir()) == ["metrics.json", "predictions.jsonl", "report.html"]
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["exact"] == 0 and metrics["exact_odd"] is None  # not a number, so none
    assert metrics["dataset"]["evaluated"] == 4 and metrics["truncation_rate"] == 0
    assert abs(metrics["eval_loss"] - metrics["base"]["eval_loss"]) > 0.01
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    low, high = metrics["bleu_interval"]
    assert 0 <= low <= high <= 100 and metrics["rougeL_interval"][0] <= metrics["rougeL"]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "base"] and lines[1].startswith("length") and "'p95': " in lines[1]
    assert lines[-2] == f"Perplexity: {metrics['perplexity']:.4g}" and lines[-1].startswith("BLEU: ")


def test_losses_equal_a_plain_loop(run, evaluate, tiny_adapter, tiny_qwen2, tiny_gpt2):
    from transformers import AutoModelForCausalLM

    lines = (tiny_adapter.parent / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = list(map(json.loads, lines))
    metrics, _, _ = run("--compare_base")
    assert metrics["eval_loss"] == pytest.approx(plain_loss(tiny_adapter, rows), rel=1e-5)
    assert metrics["base"]["eval_loss"] == pytest.approx(plain_loss(tiny_qwen2, rows), rel=1e-5)
    texts = list(range(5, 90)), [5, 6, 7, 8], [9]
    rows = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in texts]
    gpt2 = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert evaluate.mean_loss(gpt2, rows) == pytest.approx(plain_loss(tiny_gpt2, rows), rel=1e-5)
    assert math.isnan(evaluate.mean_loss(gpt2, rows[2:]))


def test_the_same_numbers_at_every_batch_size(run, evaluate, tiny_adapter, tmp_path):
    """The tiny model has 1,024 positions: 491 leaves no room, 489 four tokens; these and 1,100 are cut."""
    import torch

    lengths = [1, 40, 3, 491, 16, 2, 489, 1100]
    rows = [{"instruction": "0 " * n + f"{n}", "output": "It costs 12 euros."} for n in lengths]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--dataset_path", "rows.jsonl", "--eval_ratio", "1", "--rouge", "--bleu"]
    once, *others = [run(*flags, "--batch_size", size) for size in (1, 3, 32)]
    assert once[0]["eval_loss"] > 0 and all(other[:2] == once[:2] for other in others)
    assert once[0]["truncation_rate"] == 3 / 8 and once[0]["empty_rate"] < 0.5
    assert [i for i, row in enumerate(once[1]) if row["stopped"] == "no_room"] == [3, 7]
    model, tokenizer = evaluate.load_model(str(tiny_adapter))
    for place, tokens in ((1, 8), (6, 4)):  # greedy, by hand
        messages = [{"role": "user", "content": rows[place]["instruction"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([prompt])
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        wanted = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        assert once[1][place]["prediction"] == wanted != ""


def test_killed_in_the_middle_of_300_rows_it_goes_on(run, evaluate, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", [{"input": f"What is {n}?", "output": "12"} for n in range(300)])
    flags = ["--dataset_path", "rows.jsonl", "--eval_ratio", "1"]
    whole = run(*flags)
    file, own, left = tmp_path / "evaluation_results/predictions.unfinished.jsonl", evaluate.generate, [12]

    def killed_in_batch_13(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "generate", killed_in_batch_13)
        run(*flags, "--batch_size", 4)
    kept = file.read_bytes().count(b"\n")
    assert kept == 48
    with open(file, "ab") as cut:
        cut.write('["0123", "芯'.encode()[:-1])
    with pytest.raises(ValueError, match="pass --resume, or delete it"):
        run(*flags)
    text = file.read_bytes()
    metrics, predictions, words = run(*flags, "--resume")
    assert f"{kept} answers of the model are there already" in words
    assert (metrics, predictions) == whole[:2] and not file.exists()

    file.write_bytes(text.replace(b'["', b'{"', 1))
    with pytest.raises(ValueError, match="Expecting ':' delimiter"):
        run(*flags, "--resume")
    assert file.read_bytes().count(b"\n") == kept  # the half line is gone
    file.write_bytes(b"")
    assert "0 answers of the model are there already" in run("--limit", "2", "--resume")[2]


def test_rows_that_were_trained_on_are_left_out_of_another_file(run, tiny_adapter, tmp_path):
    model = shutil.copytree(tiny_adapter, tmp_path / "model")
    trained = [{"instruction": f"Trained {n}", "output": "yes"} for n in range(5)]
    talk = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]
    trained += [{"conversations": talk, "system": "s"}]
    talk = [{"from": "human", "value": "q", "weight": 0}, {"weight": 0, "content": "a", "role": "assistant"}]
    trained += [{"conversations": talk + talk[:1] + [{"from": "gpt", "value": "b", "x": 1}], "system": "s"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    trained += [{"messages": [*talk, {"role": "tool", "content": ""}, {"role": "assistant", "content": "b"}]}]
    training = load_script("qwen_finetuning")
    texts = [json.dumps(training.messages_of(record), ensure_ascii=False) for record in trained]
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    (tmp_path / "trained_on.txt").write_text("\n".join(digests))
    record = json.loads((model / "finetune_config.json").read_text(encoding="utf-8"))
    record |= {"trained_on": str(tmp_path / "trained_on.txt")}
    (model / "finetune_config.json").write_text(json.dumps(record), encoding="utf-8")
    fresh = [{"instruction": f"Fresh {n}", "output": "yes"} for n in range(2)]
    write_jsonl(tmp_path / "test.jsonl", [*trained, *fresh, *fresh])

    flags = ["--dataset_path", "test.jsonl", "--eval_ratio", "1"]
    metrics, predictions, words = run(*flags, model=model)
    assert "2 of 10 rows of test.jsonl: 8 trained on are left out" in words
    assert [row["prompt"] for row in predictions] == ["Fresh 0", "Fresh 1"]
    assert metrics["dataset"] == {"path": "test.jsonl", "rows": 10, "trained_on": 8, "evaluated": 2}
    (tmp_path / "trained_on.txt").unlink()
    assert "10 of 10 rows of test.jsonl: no list of those trained on" in run(*flags, model=model)[2]
    (tmp_path / "nothing.jsonl").write_text("")  # as a training with --eval_ratio 0 leaves it
    record |= {"held_out": str(tmp_path / "nothing.jsonl")}
    (model / "finetune_config.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match="no row is left to judge by"):
        run(model=model)
    (tmp_path / "trained_on.txt").write_text("\n".join(digests))
    (model / "finetune_config.json").write_text(json.dumps(record | {"held_out_sha256": "other"}))
    with pytest.raises(ValueError, match="nothing.jsonl is of another run than .*: pass a --dataset_path"):
        run(model=model)
    assert "10 of 10 rows of test.jsonl: no list of those trained on" in run(*flags, model=model)[2]


def judged(evaluate, tokenizer, **record) -> dict:
    """What a record of a file is judged by."""
    row = evaluate.row_of({"record": record})
    return evaluate.with_ids(tokenizer, [tokenizer.eos_token_id], 99, row)


def test_the_last_answer_is_labelled_as_in_training(evaluate):
    tokenizer = build_tokenizer()
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a <|im_end|> b"}]
    row = judged(evaluate, tokenizer, messages=talk)
    [wanted], _ = load_script("qwen_finetuning").encode(talk, tokenizer)
    assert row["examples"] == [wanted] and not row["cut"]
    assert judged(evaluate, tokenizer, messages=talk, **wanted) == row  # as training stores it
    for template in (
        CHATML,
        CHATML.replace("<|im_end|>", ""),
    ):  # an answer that begins with a line break; no end
        tokenizer, talk[1]["content"] = build_tokenizer(template), "\n\nThe lamp"
        [wanted], _ = load_script("qwen_finetuning").encode(talk, tokenizer)
        row = judged(evaluate, tokenizer, messages=talk)
        assert row["examples"] == [wanted] and not row["cut"]
    tokenizer.chat_template = CHATML.replace("{{ message.content }}", "{{ messages[-1].content }}")
    with pytest.raises(ValueError, match="writes earlier turns otherwise once this answer follows"):
        judged(evaluate, tokenizer, messages=talk)


def test_without_stored_rows_the_split_is_the_trainings(evaluate, tiny_qwen2, tmp_path):
    from datasets import Dataset

    rows = [{"instruction": f"q{n}", "output": "a", "input_ids": [9], "labels": [9]} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows + rows[:10]), encoding="utf-8")
    config = evaluate.Config(model=str(tiny_qwen2), dataset_path=str(tmp_path / "rows.json"))
    found = evaluate.rows_to_judge(config)[0]
    assert not any(row["examples"] for row in found)  # ids of another file are another tokenizer's, perhaps
    chosen = [row["messages"][0]["content"] for row in found]
    wanted = Dataset.from_list(rows).train_test_split(0.1, seed=42)["test"]["instruction"]
    assert chosen == list(wanted) and len(chosen) == 4


def test_the_last_answer_is_the_reference_and_thoughts_are_not_scored(evaluate, monkeypatch, tmp_path):
    tokenizer = build_tokenizer(CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"))
    turns = {"S": "system", "a": "user", "b": "assistant", "c": "user", "<think>x</think>d": "assistant"}
    talk = [{"role": role, "content": content} for content, role in turns.items()]
    row = judged(evaluate, tokenizer, messages=talk)
    assert (row["prompt"], row["reference"], row["cut"]) == ("user: a\nassistant: b\nuser: c", "d", False)
    texts = ["so</think>\nIt is 12.", "and so on"]  # <think> stands in the prompt, as of some thinking models
    made = [(tokenizer(text).input_ids, "limit") for text in texts]
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, room: made)
    model = Namespace(config=Namespace(get_text_config=lambda: None))  # its number of positions is asked for
    prompts, config = [[5] + row["prompt_ids"], row["prompt_ids"]], evaluate.Config()
    answers = evaluate.answer_all(model, tokenizer, prompts, "model", tmp_path / "kept.jsonl", config)
    assert [answer for answer, _ in answers] == ["<think>" + text for text in texts]
    assert [evaluate.answer_of(answer) for answer, _ in answers] == ["It is 12.", ""]
    assert evaluate.answer_of("a <think>b") == "a" and evaluate.answer_of("b</think> c") == "c"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size", "0"], "--batch_size is 0; it must be 1 or more"),
        (["--model", "nowhere"], "rows to judge by: '' is no .jsonl or .json file; pass"),
        (["--model", "nowhere", "--compare_base"], "--compare_base switches an adapter off; nowhere is none"),
        (["--model", "x", "--dataset_path", "nothing.jsonl"], "No such file or directory: 'nothing.jsonl'"),
        (["--model", "x", "--dataset_path", "rows.csv"], "rows.csv' is no .jsonl or .json file"),
        (
            ["--model", "x", "--dataset_path", "bad.jsonl"],
            "2 of 3 rows can not .*bad.jsonl:3: no JSON object: not JSON: Unterminated",
        ),
        (["--model", "x", "--dataset_path", "array.json"], "Expecting property name"),
        (["--model", "x", "--rouge"], "import of jieba"),
        (["--model", "held"], "1 of 1 rows can not be used.*held_out.jsonl:1: roles are"),
        (["--model", "broken"], "Expecting value"),
    ],
)
def test_mistakes_get_one_clear_line(evaluate, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "jieba", None)  # as where it is not installed
    (tmp_path / "broken").mkdir()
    (tmp_path / "held").mkdir()
    (tmp_path / "broken/finetune_config.json").write_text('{"dataset": ')
    (tmp_path / "bad.jsonl").write_text('{"input": ""}\n{"input": "a", "output": "b"}\n{"in\n\n')
    (tmp_path / "array.json").write_text('[{"input": "a", "output": "b"}, {]')
    (tmp_path / "held/held_out.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    record = {"dataset": {"path": "t.jsonl"}, "held_out": "held/held_out.jsonl"}
    (tmp_path / "held/finetune_config.json").write_text(json.dumps(record))
    with pytest.raises((ValueError, OSError, ImportError), match=f"(?s){words}"):
        evaluate.main(evaluate.parse_args(flags))


def scored(evaluate, answers: list[str], references: list[str]) -> tuple[dict, list[float]]:
    """(metrics with BLEU, the shares of common words) of some answers."""
    answers, rows = [(text, "limit") for text in answers], [{"reference": text} for text in references]
    return evaluate.judge(answers, rows, build_tokenizer(), evaluate.Config(bleu=True), {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_copies_score_one_and_unrelated_texts_nothing_in_every_script(evaluate, script):
    text, other = SCRIPTS[script]
    copy, apart = (evaluate.rouge([answer], [text])[0] for answer in (text, other))
    assert [copy[kind] for kind in ("rouge1", "rouge2", "rougeL")] == [1, 1, 1]
    assert apart["rouge2"] == 0 and max(apart["rouge1"], apart["rougeL"]) < 0.25
    assert scored(evaluate, [text], [text])[0]["bleu"] == pytest.approx(100)
    assert scored(evaluate, [other], [text])[0]["bleu"] < 3
    same, unlike, shorter = scored(evaluate, [text, other, text], [text, text, text[:-3]])[1]
    assert same == 1 > unlike + 0.7 and shorter < 1


def test_english_equals_the_libraries_and_chinese_is_cut_by_jieba(evaluate):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    references = ["A lamp costs 12.50 euros.", "It’s silicon, isn't it? “Yes” — a_b", "Yes. Maybe so."]
    answers = ["A lamp costs 14 euros", "Chips: it’s sand, not silicon…", ""]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = list(map(scorer.score, references, answers))
    values, order = evaluate.rouge(answers, references)
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert values[kind] == pytest.approx(sum(score[kind].fmeasure for score in expected) / 3, abs=1e-15)
    assert order == [score["rougeL"].fmeasure for score in expected]
    assert scored(evaluate, ["a"], ["a"])[0]["bleu"] == pytest.approx(100)  # also below four words
    found, _ = scored(evaluate, answers, references)
    assert found["bleu"] == corpus_bleu(answers, [references]).score > 0
    chinese = ["大语言模型需要数据和算力。"], ["大语言模型需要很多数据和算力。"]
    assert (
        scored(evaluate, *chinese)[0]["bleu"]
        == corpus_bleu(chinese[0], [chinese[1]], tokenize="zh").score
        > 20
    )
    assert scored(evaluate, ["a b a b"], ["a"])[0]["distinct-2"] == 2 / 3
    assert evaluate.words("?!") == ["?", "!"]


def test_the_report_escapes_everything_and_begins_with_the_lowest_score(evaluate, tmp_path):
    row = {"reference": "r", "prediction": ATTACK, "base_prediction": ATTACK}
    rows = [row | {"prompt": "q1", "score": 1.0}, row | {"prompt": "q2", "score": 0.1}]
    config = evaluate.Config(model=ATTACK, output_dir=tmp_path, compare_base=True)
    sides = {"model": {"perplexity": 1.5, "rouge1_interval": [0.4, 0.6]}, "base": {"perplexity": math.nan}}
    lengths = [{"examples": [{"input_ids": [1] * n}], "cut": n > 5} for n in (3, 90)]
    evaluate.write_results(config, {"path": "p"}, sides, lengths, rows)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x&gt;\ufffd[2J"
    assert text.count(escaped) == 6 and not any(bad in text for bad in ("<script", "<img", "\x1b"))
    assert text.index("q2") < text.index("q1") and "[0.4, 0.6]" in text
    assert json.loads((tmp_path / "metrics.json").read_text())["base"] == {"perplexity": None}
