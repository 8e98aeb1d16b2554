"""Broken inputs of the inference demo and the LLaVA converter: one line each, status 2, and no code of others run."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from PIL import Image

from mindspeed_mm.data import chat_rendering
from tests.helpers.log_lines import assert_one_line

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
sys.path[:0] = [str(EXAMPLES / "qwen3vl"), str(EXAMPLES / "qwen3vl" / "quickstart")]

import inference_demo  # noqa: E402 - scripts, found only through the path above
import make_digits  # noqa: E402
import make_tiny_model  # noqa: E402
import plot  # noqa: E402

CONVERTER = EXAMPLES / "qwen2vl" / "llava_instruct_2_mllm_demo_format.py"
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    make_tiny_model.write_model(directory, make_digits.all_texts())
    return directory


@pytest.fixture()
def model(whole_model, tmp_path):
    """A copy to break; the weights are links, so a test replaces them and never writes into them."""
    copy_of = {True: os.link, False: shutil.copyfile}
    directory = tmp_path / "model"
    directory.mkdir()
    for path in whole_model.iterdir():
        copy_of[path.suffix == ".safetensors"](path, directory / path.name)
    return directory


@pytest.fixture(scope="module")
def answerer(whole_model):
    torch.set_num_threads(1)
    return inference_demo.Answerer(str(whole_model), device_map="cpu", dtype="auto")


@pytest.fixture()
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def demo(capsys, *options, device="cpu"):
    """Status and error line of a call."""
    status = inference_demo.main([*map(str, options), "--device-map", device, "--max-new-tokens", "1"])
    return status, capsys.readouterr().err


def _edit(directory, name, **values):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _replace(directory, name, content):
    (directory / name).unlink()
    (directory / name).write_bytes(content)


def _forget(directory, *tokens):
    text = (directory / "tokenizer.json").read_text()
    for token in tokens:
        text = text.replace(token, f"<|no{token[2:]}")
    (directory / "tokenizer.json").write_text(text)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _no_tokenizer(directory):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (directory / name).unlink()


def _shard(directory):
    return sorted(path.name for path in directory.glob("*.safetensors"))[0]


def _change_weights(directory, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / _shard(directory))
    change(weights, sorted(weights)[0])
    (directory / _shard(directory)).unlink()
    save_file(weights, directory / "model-00001-of-00002.safetensors", metadata={"format": "pt"})


def _pickled(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BROKEN_MODELS = {
    "config: no file": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config: no JSON": (lambda d: _replace(d, "config.json", b"{"), "config.json"),
    "config: list": (lambda d: _replace(d, "config.json", b"[]"), "a list"),
    "config: deep": (lambda d: _replace(d, "config.json", b"[" * 100_000), "nested too deep"),
    "config: other model": (lambda d: _edit(d, "config.json", model_type="llama"), "not a Qwen3-VL"),
    "config: no type": (lambda d: _edit(d, "config.json", model_type=7), "not a Qwen3-VL"),
    "config: text part": (lambda d: _edit(d, "config.json", text_config="x"), "cannot be read"),
    "config: image token": (lambda d: _edit(d, "config.json", image_token_id=3), "image_pad"),
    "config: video token": (lambda d: _edit(d, "config.json", video_token_id=3), "number of <|video_pad|> is"),
    "config: end token": (lambda d: _edit(d, "config.json", vision_end_token_id=3), "number of <|vision_end|> is"),
    "weights: none": (lambda d: _pickled(d), "safetensors"),
    "weights: no shard": (lambda d: (d / _shard(d)).unlink(), "cannot be read"),
    "weights: cut off": (lambda d: _replace(d, _shard(d), (d / _shard(d)).read_bytes()[:5000]), "cannot be read"),
    "weights: one missing": (lambda d: _change_weights(d, lambda w, name: w.pop(name)), "do not fit its config.json"),
    "weights: one of another shape": (
        lambda d: _change_weights(d, lambda w, name: w.update({name: w[name][:1].clone()})), "do not fit its config"
    ),
    "weights: zeros": (lambda d: _replace(d, _shard(d), bytes(100)), "cannot be read"),
    "weights: index": (lambda d: _replace(d, "model.safetensors.index.json", b"{"), "cannot be read"),
    "tokenizer: none": (_no_tokenizer, "neither tokenizer.json nor vocab.json"),
    "tokenizer: no JSON": (lambda d: _replace(d, "tokenizer.json", b"{"), "tokenizer"),
    "tokenizer: other JSON": (lambda d: _replace(d, "tokenizer.json", b"{}"), "tokenizer"),
    "tokenizer: config": (lambda d: _replace(d, "tokenizer_config.json", b"{"), "tokenizer"),
    "tokenizer: no chat": (lambda d: _forget(d, "<|im_start|>", "<|im_end|>"), "<|im_start|>, <|im_end|>"),
    "tokenizer: no image": (lambda d: _forget(d, "<|image_pad|>"), "does not know <|image_pad|>"),
    "processor: none": (lambda d: (d / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "processor: no JSON": (lambda d: _replace(d, "preprocessor_config.json", b"{"), "preprocessor_config.json"),
    "processor: patches": (lambda d: _edit(d, "preprocessor_config.json", patch_size=14), "patch_size is 14"),
    "processor: merging": (lambda d: _edit(d, "preprocessor_config.json", merge_size="x"), "merge_size"),
    "processor: mean": (lambda d: _edit(d, "preprocessor_config.json", image_mean="x"), "cannot be read"),
    "generation": (lambda d: _replace(d, "generation_config.json", b"["), "generation_config.json"),
    "generation: end": (lambda d: _edit(d, "generation_config.json", repetition_penalty="x"), "generation_config.json"),
    "template: syntax": (lambda d: _edit(d, "tokenizer_config.json", chat_template="{% if %}"), "template"),
    "template: failure": (lambda d: _edit(d, "tokenizer_config.json", chat_template="{{ 1 // 0 }}"), "template"),
    "template: loop": (lambda d: _edit(d, "tokenizer_config.json", chat_template=_LOOP), "does not end within 2 s"),
    "template: no image": (lambda d: _edit(d, "tokenizer_config.json", chat_template="x"), "0 places for 1 images"),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_model_is_one_line(model, picture, capsys, monkeypatch, case):
    monkeypatch.setattr(chat_rendering, "_SECONDS", 2)
    damage, piece = BROKEN_MODELS[case]
    damage(model)
    if case.startswith("template"):
        (model / "chat_template.json").unlink()
    assert_one_line(demo(capsys, "--model", model, "--image", picture), piece)


@pytest.mark.parametrize(
    ("device", "piece"),
    [("gpux", "--device-map gpux cannot be used"), ("cuda:99", "--device-map cuda:99 cannot be used"),
     ("meta", "--device-map meta cannot be used"), ("", "--device-map")],
)
def test_an_absent_device_is_one_line(whole_model, picture, capsys, device, piece):
    assert_one_line(demo(capsys, "--model", whole_model, "--image", picture, device=device), piece, "such as cpu")


def test_without_accelerate_auto_names_the_remedy(whole_model, picture, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = demo(capsys, "--model", whole_model, "--image", picture, device="auto")
    assert_one_line(outcome, "needs the package accelerate")


@pytest.mark.parametrize(
    ("error", "piece"),
    [(torch.OutOfMemoryError("CUDA out of memory.\nTried 3 GiB"), "smaller --batch"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "smaller --batch"),
     (IndexError("index out of range"), "index out of range")],
)
def test_a_failure_while_generating_is_one_line(answerer, picture, capsys, monkeypatch, error, piece):
    def fail(**_):
        raise error

    monkeypatch.setattr(answerer.model, "generate", fail)
    monkeypatch.setattr(inference_demo, "Answerer", lambda *_, **__: answerer)
    assert_one_line(demo(capsys, "--model", "m", "--image", picture), "cannot answer", piece)


@pytest.mark.parametrize(
    ("name", "entry"),
    [("config.json", {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}),
     ("config.json", {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model", "unknown": "type"}),
     ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
     ("preprocessor_config.json", {"AutoImageProcessor": "evil.Processor"}), (None, None)],
)
def test_no_code_of_the_model_directory_is_run(model, picture, capsys, monkeypatch, name, entry):
    ran = model / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    (model / "evil.py").write_text(code)
    (model / "custom_generate").mkdir()
    if name:
        # a type that transformers does not know, and for which it would need the code
        unknown = {"model_type": "qwen3_vl_evil"} if "unknown" in entry else {}
        _edit(model, name, auto_map=entry, **unknown)
    else:
        (model / "custom_generate" / "generate.py").write_text(code + "def generate(model, **_): return None\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    status, error = demo(capsys, "--model", model, "--image", picture)
    assert status in (0, 2) and error.count("\n") <= 1
    assert not asked and not ran.exists()


def _write_data(directory, *records):
    path = directory / "data.json"
    path.write_text(json.dumps(records))
    return path


def _messages(*turns):
    return [{"role": role, "content": text} for role, text in turns]


GOOD = {"images": [], "messages": _messages(("user", "Hi"), ("assistant", "Hello"))}


@pytest.mark.parametrize(
    ("content", "piece"),
    [(b"\xff\xfe[", "UTF-16"), (b"[" * 100_000, "nested too deep"), (b"[" + b"9" * 5000 + b"]", "digits"),
     (b"[7]", "record 0"), (b"[]", "has no records"), (b'[{"messages": 3}]', "record 0"),
     (b'[{"messages": [{"role": ["user"], "content": "x"}]}]', "record 0"),
     (b'[{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}]', "no answer follows"),
     (b'[{"images": [3], "messages": [{"role": "user", "content": "x"}]}]', "record 0"),
     (b'[{"images": {"a": 1}, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]',
      "record 0"),
     (b'[{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "y"}]}]', "its text"),
     (b'[{"image": "a\\u0000", "conversations": [{"from": "human", "value": "<image>"}, '
      b'{"from": "gpt", "value": "y"}]}]', "does not exist")],
)
def test_broken_data_is_one_line(tmp_path, capsys, content, piece):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    assert_one_line(demo(capsys, "--model", "none", "--data", path), str(path), piece)


@pytest.mark.parametrize(
    ("options", "piece"),
    [((), "either --image and --question, or --data"), (("--data", "d.json", "--question", "Q"), "either --image"),
     (("--image", "a.png", "--limit", "3"), "--limit goes with --data"),
     (("--data", "d.json", "--batch", "0"), "--batch is 0"),
     (("--data", "d.json", "--limit", "x"), "--limit"), (("--pictures", "a.png"), "--pictures")],
)
def test_a_wrong_command_line_is_one_line(capsys, options, piece):
    assert_one_line(demo(capsys, "--model", "none", *options), piece)


def test_data_as_json_lines_or_parquet(tmp_path):
    rows = [GOOD, {"images": [], "messages": _messages(("user", "Who?"), ("assistant", "Me"))}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    for name in ("data.jsonl", "data.parquet"):
        questions = inference_demo.read_questions(tmp_path / name, None, None)
        assert [(question.text, question.reference) for question in questions] == [("Hi", "Hello"), ("Who?", "Me")]
        assert len(inference_demo.read_questions(tmp_path / name, None, 1)) == 1


@pytest.mark.parametrize("kind", ["fifo", "directory", "missing"])
def test_data_that_is_no_file_is_one_line(tmp_path, capsys, kind):
    path = tmp_path / "data.json"
    {"fifo": os.mkfifo, "directory": os.mkdir, "missing": lambda path: None}[kind](path)
    assert_one_line(demo(capsys, "--model", "none", "--data", path), "--data")


def test_records_with_videos_are_skipped_and_counted(tmp_path, capsys):
    film = {"videos": ["a.mp4"], "messages": _messages(("user", "<video>?"), ("assistant", "A"))}
    questions = inference_demo.read_questions(_write_data(tmp_path, film, GOOD, film), None, None)
    assert [question.text for question in questions] == ["Hi"]
    assert "skipped 2 records with videos" in capsys.readouterr().out
    assert_one_line(demo(capsys, "--model", "none", "--data", _write_data(tmp_path, film)), "all 1 records have videos")


def test_the_first_user_message_is_asked_and_the_system_message_shown(answerer, tmp_path, picture):
    turns = (("system", "Be brief."), ("user", "<image>A?"), ("assistant", "a"), ("user", "<image>B?"),
             ("assistant", "b"))
    converted = {"images": [str(picture), "other.png"], "messages": _messages(*turns)}
    llava = {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                               {"from": "gpt", "value": "A"}]}
    first, second = inference_demo.read_questions(_write_data(tmp_path, converted, llava), None, None)
    assert first == inference_demo.Question("<image>A?", (str(picture),), "a", "Be brief.")
    assert (second.text, second.reference, second.system) == ("Q", "A", "S")
    prompt = answerer.rendered([first.prompt])[0]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [("7 dogs", "number 7 jersey", False), ("number  7\njersey ", "number 7 jersey", True), ("There are 7.", "7", True),
     ("It is the number seven.", "I see a 7.", True), ("seven", "The digit is seven.", True), ("8", "seven", False),
     ("17", "17", True), ("17 ", "17.", False), ("Seven of nine", "7", False), ("9" * 5000, "9", False)],
)
def test_what_counts_as_right(answer, reference, right):
    assert inference_demo.is_right(answer, reference) is right


def test_every_answer_of_the_quickstart_is_judged_by_its_digit():
    for _, form in make_digits.QUESTIONS:
        for digit, word in enumerate(make_digits.WORDS):
            reference = form.format(word=word, numeral=digit)
            assert inference_demo.is_right(str(digit), reference)
            assert not inference_demo.is_right(str((digit + 1) % 10), reference)


@pytest.mark.parametrize("kind", ["directory", "fifo", "below a file", "the data"])
def test_an_unusable_output_is_found_before_the_model_is_loaded(tmp_path, capsys, kind):
    data, output = _write_data(tmp_path, GOOD), tmp_path / "out"
    if kind == "directory":
        output.mkdir()
    elif kind == "fifo":
        os.mkfifo(output)
    elif kind == "below a file":
        output = data / "out"
    else:
        output = data
    before = data.read_bytes()
    outcome = demo(capsys, "--model", "none", "--data", data, "--output", output)
    assert_one_line(outcome, f"--output {output} cannot be written")
    assert data.read_bytes() == before


def test_the_output_is_written_whole_or_not_at_all(answerer, tmp_path, capsys, monkeypatch):
    data, output = _write_data(tmp_path, GOOD), tmp_path / "new" / "out.json"
    monkeypatch.setattr(inference_demo, "Answerer", lambda *_, **__: answerer)
    options = ("--model", "m\udc80", "--data", data, "--output", output)
    assert demo(capsys, *options) == (0, "")
    result = json.loads(output.read_text())
    assert result["total"] == 1 and result["model"] == "m\udc80"
    before = output.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert_one_line(demo(capsys, *options), "No space left on device")
    assert output.read_bytes() == before and [path.name for path in output.parent.iterdir()] == ["out.json"]


def _whole(kind):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, kind)
    return file.getvalue()


BROKEN_IMAGES = {
    "empty": b"",
    "text": b"no image",
    "cut off": _whole("PNG")[:900],
    "checksum": _whole("PNG")[:29] + b"\0\0\0\0" + _whole("PNG")[33:],
    "bomb": b"P6 60000 60000 255\n",
    "zero": b"P6 0 0 255\n",
    "format that is not for photos": _whole("PCX"),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
    "gif": b"GIF89a\x01\0\x01\0\x80\0\0",
    "thin": b"P6 1 500 255\n" + bytes(1500),
}


@pytest.mark.parametrize("case", BROKEN_IMAGES)
def test_a_damaged_image_is_one_line(answerer, tmp_path, capsys, monkeypatch, case):
    monkeypatch.setattr(inference_demo, "Answerer", lambda *_, **__: answerer)
    path = tmp_path / "image.png"
    path.write_bytes(BROKEN_IMAGES[case])
    assert_one_line(demo(capsys, "--model", "m", "--image", path), "image", str(path))


@pytest.mark.parametrize(
    ("predictions", "png", "piece"),
    [("{", "a.png", "not valid JSON"), ("[]", "a.png", "a list"), ("{}", "a.png", "name a file that"),
     ('{"predictions": [{"images": [], "text": "Q", "answer": "A", "right": true}], "right": 1, "total": 1, '
      '"accuracy": 1}', "in.json/a.png", "cannot be written")],
)
def test_unusable_predictions_are_one_line(tmp_path, capsys, predictions, png, piece):
    (tmp_path / "in.json").write_text(predictions)
    status = plot.main(["--predictions", str(tmp_path / "in.json"), "--samples-png", str(tmp_path / png)])
    assert_one_line((status, capsys.readouterr().err), piece)


@pytest.mark.parametrize(
    "step", [{"loss": "abc"}, {"loss": {}}, {"iteration": 10**400}, {"learning_rate": [1]}, {"iteration": None}]
)
def test_unusable_metrics_are_one_line(tmp_path, capsys, step):
    (tmp_path / "m.jsonl").write_text(json.dumps({"iteration": 1, "loss": 1.0, "learning_rate": 0.1} | step))
    status = plot.main(["--metrics", str(tmp_path / "m.jsonl"), "--loss-png", str(tmp_path / "a.png")])
    assert_one_line((status, capsys.readouterr().err), "m.jsonl, line 1", "has no step")


def test_images_are_read_from_either_column(tmp_path, picture):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "y"}]
    messages = _messages(("user", "<image>?"), ("assistant", "y"))
    rows = [{"conversations": turns, "images": [str(picture)], "image": "none.png"},
            {"conversations": turns, "image": str(picture)}, {"messages": messages, "image": str(picture)}]
    questions = inference_demo.read_questions(_write_data(tmp_path, *rows), None, None)
    assert [question.images for question in questions] == [(str(picture),)] * 3


def test_a_question_is_no_formula(tmp_path):
    prediction = {"images": [], "text": "Is $x_{$ odd?", "answer": "$5^{", "reference": "$", "right": False}
    result = {"predictions": [prediction], "right": 0, "total": 1, "accuracy": 0}
    (tmp_path / "in.json").write_text(json.dumps(result))
    assert plot.main(["--predictions", str(tmp_path / "in.json"), "--samples-png", str(tmp_path / "a.png")]) == 0


def test_answers_are_greedy_whatever_the_model_says(model, picture, capsys):
    """A beam search of 20,000 takes gigabytes."""
    _edit(model, "generation_config.json", num_beams=20000, num_return_sequences=2)
    assert demo(capsys, "--model", model, "--image", picture) == (0, "")


def _convert(directory, *options, content=None, plain=False):
    """Call the converter; ``plain`` hides orjson from it."""
    if content is not None:
        (directory / "in.json").write_bytes(content)
    (directory / "no").mkdir(exist_ok=True)
    (directory / "no" / "orjson.py").write_text("raise ImportError")
    command = [sys.executable, str(CONVERTER), "--input", "in.json", "--output", "out.json", "--image-root", "images"]
    environment = {**os.environ, "PYTHONPATH": "no" if plain else ""}
    return subprocess.run(
        [*command, *options], cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


CHAT = b'{"conversations": [%b{"from": "human", "value": "%b"}, {"from": "gpt", "value": "A"}]}'


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("content", "piece"),
    [(b"[" * 200_000, "cannot be read as JSON"), (b"[" + b"9" * 5000 + b"]", "error: "),
     (b"\xff\xfe[\0]\0", "cannot be read as JSON"), (b'["\xff"]', "cannot be read as JSON"),
     (b"[" + CHAT % (b"", b"\\ud800") + b"]", "error: "),
     (b'[{"image": "a\\n\\u0000/b", "conversations": [{"from": "human", "value": "<image>"}, '
      b'{"from": "gpt", "value": "y"}]}]', "error: ")],
    ids=["deep", "huge integer", "UTF-16", "no UTF-8", "half a character", "NUL"],
)
def test_broken_llava_files_are_one_line(tmp_path, content, piece, plain):
    (tmp_path / "images").mkdir()
    done = _convert(tmp_path, content=content, plain=plain)
    assert_one_line((done.returncode, done.stderr), piece)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_a_llava_input_that_is_no_file_is_one_line(tmp_path, kind):
    {"fifo": os.mkfifo, "directory": os.mkdir}[kind](tmp_path / "in.json")
    done = _convert(tmp_path)
    assert_one_line((done.returncode, done.stderr), "in.json cannot be read")


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_an_output_that_is_no_file_is_one_line(tmp_path, kind):
    {"fifo": os.mkfifo, "directory": os.mkdir}[kind](tmp_path / "out.json")
    done = _convert(tmp_path, content=b"[" + CHAT % (b"", b"Q") + b"]")
    assert_one_line((done.returncode, done.stderr), "out.json cannot be written")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_the_system_tag_is_asked_for_where_it_is_needed(tmp_path, system, plain):
    turn = b'{"from": "system", "value": "S"}, ' if system else b""
    done = _convert(tmp_path, content=b"\xef\xbb\xbf[" + CHAT % (turn, b"Q") + b"]", plain=plain)
    assert done.returncode == 0, done.stderr
    assert ('attr.system_tag to "system"' in done.stdout.splitlines()[-1]) is system
