"""Evaluation by transformers on a tiny model: data, batches, checkpoints, interruption, and comparison."""

from __future__ import annotations

import base64
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from mindspeed_mm.checkpoint.directory import read_manifest
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.files import load_config
from mindspeed_mm.data.dataset import build_datasets
from mindspeed_mm.evaluation import cli, held_out, model_source
from mindspeed_mm.evaluation.comparison import compared
from mindspeed_mm.evaluation.generation import GenerationSettings, Generator, batches
from mindspeed_mm.evaluation.model_source import find_model
from mindspeed_mm.evaluation.questions import Prompt, data_config, read_questions
from mindspeed_mm.interfaces.conversation import Message
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.evaluation import qa, write_evaluation, write_records
from tests.helpers.log_lines import assert_one_line
from tests.helpers.tiny_recipe import write_data_file


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    torch.set_num_threads(1)
    return write_evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def generator(recipe):
    return Generator(str(recipe / "checkpoint"), device_map="cpu", dtype="float32")


def questions_of(*data, **options):
    return read_questions(data_config(SPEC, list(map(str, data)), None, model="m"), SPEC, **options).questions


def run(capsys, *words):
    status = cli.main([*map(str, words)])
    captured = capsys.readouterr()
    return status, captured.err, captured.out


def evaluate(capsys, recipe, output, *options, model=None):
    return run(capsys, "--model", model or recipe / "checkpoint", "--data", recipe / "data.json", "--device", "cpu",
               "--max-new-tokens", 4, "--output", output, *options)


def results(output):
    return json.loads((output / "results.json").read_text())


def test_batches_give_the_answers_of_single_questions(recipe, generator):
    """Texts with and without an image and turns, of different lengths; fp32."""
    prompts = [question.prompt for question in questions_of(recipe / "data.json")]
    assert {len(prompt.images) for prompt in prompts} == {0, 1} and max(len(p.messages) for p in prompts) == 3
    settings = GenerationSettings(max_new_tokens=5)
    single = [generator.generate([prompt], settings)[0] for prompt in prompts]
    assert len({answer.text for answer in single}) > 1
    for size in (3, len(prompts)):
        for batch in batches(prompts, size):
            assert generator.generate([prompts[one] for one in batch], settings) == [single[one] for one in batch]


def test_batches_are_of_similar_lengths_and_complete(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    texts = [Prompt((Message("user", "x" * length),)) for length in (5, 900, 30, 1300)]
    shown = Prompt((Message("user", "<image>"),), (str(tmp_path / "a.png"),))  # 1200 characters' worth
    assert batches([*texts, shown], 2) == [[3, 4], [1, 2], [0]]


def test_drawn_answers_depend_on_the_seed(recipe, generator):
    prompts = [question.prompt for question in questions_of(recipe / "data.json", turns="first")]

    def drawn(seed, draw=0):
        return generator.generate(prompts, GenerationSettings(max_new_tokens=4, temperature=1.5, seed=seed), draw=draw)

    assert drawn(1) == drawn(1) != drawn(2) and drawn(1) != drawn(1, draw=5)
    assert all(answer.truncated for answer in drawn(1) if len(answer.text) > 40)


def test_the_true_conversation_precedes_each_question(tmp_path):
    turns = [("system", "S"), ("user", "<image>1?"), ("assistant", "one"), ("user", "2? <image>"), ("assistant", "two")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns], "images": ["a.png", "b.png"],
              "channel": "c"}
    for name in record["images"]:
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    path = write_records(tmp_path / "d.json", record, {**record, "answers": ["deux"], "channel": None})
    first, second, _, last = questions_of(f"set={path}")
    assert [message.text for message in second.prompt.messages] == ["S", "<image>1?", "one", "2? <image>"]
    assert (first.prompt.images, second.prompt.images) == (
        (f"{tmp_path}/a.png",), (f"{tmp_path}/a.png", f"{tmp_path}/b.png"))
    assert (first.references, first.channel, first.data_set, first.turn) == (("one",), "c", "set", 0)
    assert (last.references, last.channel, last.turn) == (("two", "deux"), "", 1)
    assert [q.turn for q in questions_of(path, turns="first")] == [0, 0]
    assert [q.turn for q in questions_of(path, turns="last", limit=1)] == [1]
    record["messages"][2]["loss"] = False  # context only, in training too
    assert [q.turn for q in questions_of(write_records(tmp_path / "d.json", record))] == [1]


def _image_bytes(path):
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["openai", "sharegpt", "llava", "alpaca", "qa", "csv", "parquet", "arrow"])
def test_every_format_and_type_of_file_is_read(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = _image_bytes(tmp_path / "a.png")
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    turns = [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A"}]
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Q?"}]
    rows = {
        "openai": {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]},
        "sharegpt": {"conversations": turns, "images": ["a.png"]}, "llava": {"conversations": turns, "image": "a.png"},
        "alpaca": {"instruction": "<image>Q?", "input": "", "output": "A", "images": ["a.png"]},
        "qa": qa("Q?", ["A", "B"], image="a.png"),
    }
    if kind == "csv":
        path = tmp_path / "d.csv"
        path.write_text("question,answer,image\nQ?,A,a.png\n")
    elif kind in ("parquet", "arrow"):
        table = pa.Table.from_pylist([{**qa("Q?", "A"), "image": {"bytes": data, "path": None}}])
        path = tmp_path / f"d.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    else:
        path = write_records(tmp_path / "d.json", rows[kind])
    (question,) = questions_of(path)
    assert question.prompt.question == "<image>Q?" and len(question.prompt.images) == 1
    assert question.references == (("A", "B") if kind == "qa" else ("A",))
    from mindspeed_mm.data.images import load_pixels

    assert np.array_equal(load_pixels(question.prompt.images[0]), load_pixels(str(tmp_path / "a.png")))


@pytest.mark.parametrize(
    ("record", "piece"),
    [(qa("Q?", ["A", 3]), "list of acceptable answers"), (qa("Q?", "A", channel=3), "'channel' is a number"),
     (qa("<image>Q?", "A", image="none.png"), "none.png does not exist (looked for"), (qa("Q?", ""), None),
     (7, "record 0")],
)
def test_unusable_records_are_one_line(tmp_path, recipe, capsys, record, piece):
    path = write_records(tmp_path / "d.json", record)
    if piece is None:
        assert questions_of(path)[0].references == ("",)
        return
    status, error, _ = run(capsys, "--model", recipe / "checkpoint", "--data", path, "--device", "cpu")
    assert_one_line((status, error), path, piece)
    assert "dataset_dir" not in error and ("--data-dir" in error) == ("none.png" in piece)


@pytest.fixture()
def no_model(monkeypatch):
    """Loading a model is an error of the test."""
    monkeypatch.setattr(Generator, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("options", "piece"),
    [(("--metrics", "bleu"), "--metrics bleu is unknown"), (("--data", "none.json"), "--data none.json does not exist"),
     (("--device", "gpux"), "--device gpux cannot be used"), (("--adapter", "none"), "no adapter_config.json"),
     (("--best",), "has no best_checkpointed_iteration.txt"), (("--server-model", "x"), "--server-model goes with"),
     (("--top-p", "0.9"), "--top-p goes with --temperature"), (("--batch-size", "0"), "--batch-size"),
     (("--output", "FILE"), "cannot be written"), (("--model", "none"), "--model none is not a directory"),
     (("--model", "DATA"), "neither latest_checkpointed_iteration.txt nor manifest.json"),
     (("--mm-data", "x.json"), "either --data FILE, or --mm-data"), (("--val-seed", "1"), "goes with --mm-data")],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, recipe, capsys, no_model, options, piece):
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    places = {"FILE": tmp_path / "file", "DATA": tmp_path / "data"}
    status, error, _ = evaluate(capsys, recipe, tmp_path / "out", *(places.get(word, word) for word in options))
    assert_one_line((status, error), piece)
    assert not (tmp_path / "out").exists()


def test_interrupted_and_continued(recipe, tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert evaluate(capsys, recipe, whole, "--batch-size", 3)[0] == 0
    generate, calls = Generator.generate, []

    def interrupt(self, prompts, *args, **options):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **options)

    monkeypatch.setattr(Generator, "generate", interrupt)
    status, error, _ = evaluate(capsys, recipe, parts, "--batch-size", 3)
    assert (status, error) == (130, "interrupted; the same command goes on from the answers that are there\n")
    status, _, out = evaluate(capsys, recipe, parts, "--batch-size", 3)
    assert status == 0 and "6 of 10 answers are there from an earlier start" in out and calls == [3, 3, 3, 3, 1]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (parts, *parts.iterdir())} == {
        "parts": "0o750", "answers.jsonl": "0o640", "results.json": "0o640", "report.html": "0o640"}
    first, second = results(whole), results(parts)
    assert first["answers"] == second["answers"] and len(first["answers"]) == 10
    assert first["truncated_answers"] > 0
    page = (parts / "report.html").read_text()
    assert "0 of 10 answers are right by every metric." in page and "Wrong answers, worst first (10 of 10)" in page
    status, _, out = evaluate(capsys, recipe, parts, "--metrics", "cer,box_iou")
    assert results(parts)["metrics"] == ["cer", "box_iou"] and "\nbox_iou: no expected answer has a box\n" in out
    status, _, out = evaluate(capsys, recipe, parts, "--metrics", "cer")
    assert status == 0 and len(calls) == 5 and results(parts)["metrics"] == ["cer"]
    assert_one_line(evaluate(capsys, recipe, parts, "--dtype", "bfloat16")[:2], "dtype", "now \"bfloat16\"")


def test_a_checkpoint_is_exported_once(recipe, tmp_path, capsys):
    hf_to_dcp(recipe / "checkpoint", tmp_path / "dcp")
    with pytest.raises(Exception, match="give --assets DIR"):
        find_model(str(tmp_path / "dcp"))
    options = ("--assets", recipe / "checkpoint", "--limit", 2)
    status, error, out = evaluate(capsys, recipe, tmp_path / "a", *options, model=tmp_path / "dcp")
    assert status == 0 and f"exporting {tmp_path}/dcp/release to {tmp_path}/dcp/hf/release" in out, error
    stamp = os.stat(tmp_path / "dcp/hf/release/model.safetensors").st_mtime_ns
    status, _, out = evaluate(capsys, recipe, tmp_path / "b", *options, model=tmp_path / "dcp" / "release")
    assert status == 0 and "exporting" not in out
    assert os.stat(tmp_path / "dcp/hf/release/model.safetensors").st_mtime_ns == stamp
    evaluate(capsys, recipe, tmp_path / "c", "--limit", 2)
    assert results(tmp_path / "a")["answers"] == results(tmp_path / "c")["answers"]
    # the file of another program is never replaced
    shutil.rmtree(tmp_path / "dcp" / "hf")
    (tmp_path / "dcp" / "hf" / "release").mkdir(parents=True)
    assert_one_line(evaluate(capsys, recipe, tmp_path / "d", *options, model=tmp_path / "dcp")[:2], "--export-dir")


def test_the_best_checkpoint_and_that_of_training(recipe, tmp_path, monkeypatch):
    """The manifest of a training names the directory that the export takes its small files from."""
    release = hf_to_dcp(recipe / "checkpoint", tmp_path)
    manifest = read_manifest(release)
    manifest["metadata"] |= {"model": {"init_from_hf_path": str(recipe / "checkpoint")}}
    monkeypatch.setattr(model_source, "verify_directory", lambda *_, **__: manifest)
    shutil.copytree(release, tmp_path / "iter_0000007")
    (tmp_path / "best_checkpointed_iteration.txt").write_text("7\n")
    best, latest = find_model(str(tmp_path), best=True), find_model(str(tmp_path))
    assert (best.checkpoint, latest.checkpoint) == (f"{tmp_path}/iter_0000007", f"{tmp_path}/release")
    assert best.directory == f"{tmp_path}/hf/iter_0000007" and best.assets == str(recipe / "checkpoint")
    assert (best.name, latest.name) == (f"{tmp_path}/iter_0000007", f"{tmp_path}/release")
    assert find_model(str(tmp_path / "best")) == best
    (tmp_path / "best_checkpointed_iteration.txt").write_text("x")
    with pytest.raises(Exception, match="must hold an iteration number"):
        find_model(str(tmp_path), best=True)
    (tmp_path / "best_checkpointed_iteration.txt").unlink()
    with pytest.raises(Exception, match=r"/best: .* has no best_checkpointed_iteration.txt"):
        find_model(str(tmp_path / "best"))


def test_checkpoints_of_a_run_have_results_of_their_own(recipe, tmp_path, capsys, monkeypatch):
    """The checkpoint is recorded, not its --save directory; equal weights elsewhere keep the first name."""
    monkeypatch.chdir(tmp_path)
    release = hf_to_dcp(recipe / "checkpoint", tmp_path / "save")
    shutil.copytree(release, tmp_path / "save" / "iter_0000007")
    (tmp_path / "save" / "best_checkpointed_iteration.txt").write_text("7")
    words = ("--data", recipe / "data.json", "--device", "cpu", "--max-new-tokens", 2, "--limit", 1)
    words += ("--assets", recipe / "checkpoint")
    for options, name in ((("save",), "release"), (("save", "--best"), "iter_0000007")):
        assert run(capsys, "--model", *options, *words)[0] == 0
        assert results(tmp_path / "evaluation" / f"save-{name}")["model"] == f"save/{name}"
    _, _, out = run(capsys, "--model", "save/hf/iter_0000007", *words[:-2])
    assert "the answers were given by save/iter_0000007, which has the same weights" in out
    assert results(tmp_path / "evaluation" / "save-iter_0000007")["model"] == "save/iter_0000007"
    page = (tmp_path / "evaluation" / "save-iter_0000007" / "report.html").read_text()
    assert "<h1>Evaluation of save/iter_0000007</h1>" in page and "0, the most probable token" in page


def test_the_held_out_data_of_a_training(recipe, tmp_path, capsys):
    path = write_data_file(recipe, "held_out.json", basic={"val_dataset": {"digits": str(recipe / "data.json")}})
    words = ("--model", recipe / "checkpoint", "--device", "cpu", "--max-new-tokens", 2, "--limit", 1)
    assert run(capsys, *words, "--mm-data", path, "--output", tmp_path / "out")[0] == 0
    assert {answer["data_set"] for answer in results(tmp_path / "out")["answers"]} == {"digits"}
    bad = write_records(tmp_path / "d.json", qa("Q?", "A"), qa("<image>", "A", image="none.png"))
    for skipped, options in ((False, {}), (True, {"on_bad_sample": "skip"})):
        path = write_data_file(recipe, "held_out.json", basic={"val_dataset": bad}, **options)
        status, error, out = run(capsys, *words[:-2], "--mm-data", path, "--output", tmp_path / "bad")
        assert (status, "skipped 1 records" in out, "none.png" in error) == (0 if skipped else 2, skipped, not skipped)
    outcome = run(capsys, *words, "--mm-data", recipe / "data_tiny.json")
    assert_one_line(outcome[:2], "has neither val_dataset nor val_rate")
    outcome = run(capsys, *words, "--mm-data", path, "--seq-length", 256)
    assert_one_line(outcome[:2], "--seq-length goes with val_rate")


def test_the_records_that_val_rate_holds_out(recipe, tmp_path, capsys, monkeypatch):
    """The questions are those of the records that training with this seed does not see."""
    path = write_data_file(recipe, "rate.json", basic={"val_rate": 0.5})
    words = ("--device", "cpu", "--max-new-tokens", 2, "--turns", "first", "--mm-data", path)
    outcome = run(capsys, "--model", recipe / "checkpoint", *words)
    assert_one_line(outcome[:2], "val_rate 0.5 holds out depends on --seq-length and --seed", "--val-seed N")
    config = load_config(str(path), DataConfig, flag="--mm-data")
    media = SPEC.read_media_settings(config, SPEC.read_config(recipe / "checkpoint"))
    found = {}
    for seed in (3, 4):
        output = tmp_path / str(seed)
        options = ("--seq-length", 256, "--val-seed", seed, "--output", output)
        assert run(capsys, "--model", recipe / "checkpoint", *words, *options)[0] == 0
        found[seed] = {answer["source"] for answer in results(output)["answers"]}
        train, held = build_datasets(config, spec=SPEC, media=media, seq_length=256, seed=seed)
        assert found[seed] == {held.describe(index) for index in range(len(held))} and len(found[seed]) == len(held) > 1
        assert found[seed].isdisjoint({train.describe(index) for index in range(len(train))})
    assert found[3] != found[4]
    # a checkpoint of training knows both
    hf_to_dcp(recipe / "checkpoint", tmp_path / "save")
    manifest = read_manifest(tmp_path / "save" / "release")
    manifest["metadata"] |= {"flags": {"--seed": 4, "--seq-length": 256}, "data": config.model_dump(mode="json")}
    monkeypatch.setattr(held_out, "read_manifest", lambda _: manifest)
    words = ("--model", tmp_path / "save", "--assets", recipe / "checkpoint", *words, "--output", tmp_path / "dcp")
    assert run(capsys, *words, "--limit", 1)[0] == 0
    (answer,) = results(tmp_path / "dcp")["answers"]
    assert answer["source"] == min(found[4])
    manifest["metadata"]["data"]["dataset_param"]["basic_parameters"]["val_rate"] = 0.25
    assert_one_line(run(capsys, *words)[:2], "has val_rate 0.5, and --model was trained with 0.25")


def _results_of(path, answers, *, data="d", metrics=("exact_match", "numeric")):
    path.write_text(json.dumps({
        "format": 1, "name": path.stem, "model_type": "qwen3_vl_moe", "settings": {"data": data},
        "metrics": list(metrics), "answers": [
            {"messages": [{"role": "user", "text": f"<b>{place}"}], "images": [], "references": ["10"], "source": "s",
             "turn": 0, "answer": answer} for place, answer in enumerate(answers)
        ],
    }))
    return str(path)


def test_comparison(tmp_path, capsys):
    """Of 8 answers 4 are fixed by the first metric; by the second 5 are fixed and 1 is broken."""
    first = _results_of(tmp_path / "first.json", ["10", "9.8", *["0"] * 5, "1"])
    second = _results_of(tmp_path / "second.json", ["10", "0", *["10"] * 4, "10.1", "1"])
    comparison = compared([first, second], metrics=None)
    assert comparison.rows[0] == ["metric", "questions", "first", "second", "second - first", "95% interval", "p"]
    exact, numeric = comparison.rows[1:]
    assert exact[1:5] == ["8", "0.1250", "0.6250", "+0.5000"] and exact[6] == "0.125"  # 4 to 0: 2 / 2^4
    assert numeric[1:5] == ["8", "0.2500", "0.7500", "+0.5000"] and numeric[6] == "0.219"  # 2 (1 + 6) / 2^6
    assert comparison.changes[0].kinds == {"fixed": [2, 3, 4, 5], "broken": []}
    assert compared([first, second], metrics=None, by="numeric").changes[0].kinds == {
        "fixed": [2, 3, 4, 5, 6], "broken": [1]}
    assert compared([first, second], metrics=None, by="anls").changes[0].kinds == {
        "better": [2, 3, 4, 5], "worse": []}  # 10.1 and 9.8 are too far
    status, _, out = run(capsys, "compare", first, second, "--output", tmp_path / "page.html")
    assert status == 0 and "second, by exact_match: 4 fixed, 0 broken" in out
    page = (tmp_path / "page.html").read_text()
    assert "second: fixed by exact_match (4 of 4)" in page and "second: broken" not in page
    assert "&lt;b&gt;5" in page and "<b>5" not in page and "<dt>first</dt><dd tabindex=0><ins>0</ins></dd>" in page
    run(capsys, "compare", first, second, "--by", "numeric", "--metrics", "box_f1,anls", "--output",
        tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "second: broken by numeric (1 of 1)" in page and "box_f1: no expected answer has a box" in page
    same = _results_of(tmp_path / "third.json", ["10", "9.8", *["0"] * 5, "1"])
    run(capsys, "compare", first, same, "--output", tmp_path / "page.html")
    assert "By exact_match no answer is better or worse." in (tmp_path / "page.html").read_text()
    assert [row[0] for row in compared([first, second], metrics="anls").rows[1:]] == ["anls"]


def test_results_that_cannot_be_compared_are_one_line(tmp_path, capsys):
    first, other = _results_of(tmp_path / "a.json", ["1"]), _results_of(tmp_path / "b.json", ["1"], data="e")
    (tmp_path / "c.json").write_text('{"format": 1}')
    for words, piece in (
        ((first,), "needs two results"), ((first, other), "are of different questions"),
        ((first, tmp_path / "c.json"), "results.json of python -m mindspeed_mm.evaluation"),
        ((first, tmp_path / "none.json"), "none.json"), ((first, first), "twice"),
        ((first, first, "--output", tmp_path), "it is a directory"),
        ((first, first, "--by", "bleu"), "--by bleu is unknown"),
        ((first, first, "--metrics", "box_f1"), "--metrics box_f1: no expected answer has a box"),
        ((first, first, "--by", "box_f1"), "--by box_f1: no expected answer has a box"),
    ):
        assert_one_line(run(capsys, "compare", *words)[:2], piece)


_MISSING = object()


@pytest.mark.parametrize(
    ("place", "value", "piece"),
    [(("answers", 1, "answer"), 5, "answers[1].answer is a number, not a string"),
     (("answers", 1, "references"), [], "answers[1].references is empty"),
     (("answers", 1, "references"), "", "answers[1].references is a string, not a list"),
     (("answers", 1, "references", 0), None, "answers[1].references[0] is null, not a string"),
     (("answers", 1, "images"), [7], "answers[1].images[0] is a number, not a string"),
     (("answers", 1, "messages"), [], "answers[1].messages is empty"),
     (("answers", 1, "messages", 0), {"a": 1}, "answers[1].messages[0].role is missing"),
     (("answers", 1), "x", "answers[1] is a string, not an object"), (("answers",), [], "answers is empty"),
     (("settings", "questions"), 3, "answers has 2 elements, settings.questions is 3"),
     (("settings", "data"), _MISSING, "settings.data is missing"), (("metrics",), 5, "metrics is a number, not a list"),
     (("metrics",), None, "metrics is null, not a list"), (("metrics", 0), 5, "metrics[0] is a number, not a string"),
     (("metrics", 0), "bleu", "metrics bleu is unknown"), (("name",), ["x"], "name is a list, not a string"),
     (("format",), True, "format is a boolean, not a whole number"), (("model_type",), "x", "model_type")],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_changed_field_of_results_is_named(tmp_path, capsys, place, value, piece):
    path = _results_of(tmp_path / "a.json", ["1", "2"])
    other, content = _results_of(tmp_path / "b.json", ["1", "2"]), json.loads((tmp_path / "a.json").read_text())
    parent = content
    for name in place[:-1]:
        parent = parent[name]
    parent[place[-1]] = value
    if value is _MISSING:
        del parent[place[-1]]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert_one_line(run(capsys, "compare", path, other)[:2], path, piece)


def test_results_of_other_questions_under_one_digest_are_refused(tmp_path, capsys):
    first, second = (_results_of(tmp_path / f"{name}.json", ["1", "2"]) for name in "ab")
    content = json.loads((tmp_path / "b.json").read_text())

    def refused(answers, *pieces):
        (tmp_path / "b.json").write_text(json.dumps({**content, "answers": answers}))
        assert_one_line(run(capsys, "compare", first, second)[:2], first, second, *pieces)

    one, two = content["answers"]
    refused([two, one], "answers[0].messages is", "<b>0", "<b>1")
    refused([one, {**two, "references": ["11"]}], 'answers[1].references is ["10"] in', '["11"] in')
    refused([one], "have 2 and 1 answers")
    (tmp_path / "b.json").write_text(json.dumps({**content, "answers": [{**one, "source": "moved"}, two]}))
    assert run(capsys, "compare", first, second)[0] == 0  # data files may be elsewhere


def test_adapters_name_their_base(recipe, tmp_path):
    """A PEFT directory, and the checkpoint of a LoRA run as --adapter."""
    run_directory = tmp_path / "iter_0000005"
    adapter = run_directory / "adapter"
    adapter.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(recipe / "checkpoint")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = find_model(str(adapter))
    assert (found.directory, found.adapter, found.checkpoint) == (str(recipe / "checkpoint"), str(adapter), None)
    assert find_model(str(recipe / "checkpoint"), adapter=str(run_directory)).adapter == str(adapter)
    with pytest.raises(Exception, match="--adapter names others"):
        find_model(str(adapter), adapter=str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/hub-name"}))
    with pytest.raises(Exception, match="some/hub-name is not there; give --model BASE --adapter"):
        find_model(str(adapter))
