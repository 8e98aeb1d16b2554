"""Evaluation by a server: what it is sent, and what becomes of its answers and errors."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.checkpoint import lock
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation import cli, server
from mindspeed_mm.evaluation.generation import Answer
from mindspeed_mm.evaluation.questions import Prompt
from mindspeed_mm.evaluation.results import AnswerFile
from mindspeed_mm.interfaces.conversation import Message
from tests.helpers.evaluation import qa, write_records
from tests.helpers.log_lines import assert_one_line
from tests.helpers.openai_server import StubServer, completion, pictures

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Between two tries; and no proxy between the client and this machine."""
    monkeypatch.setattr(server, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture()
def pixels(tmp_path):
    """Noise as PNG ``a.png``, and as a JPEG that lies on its side, ``b.jpg``."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "b.jpg", exif=exif)
    Image.fromarray(noise).save(tmp_path / "c.jpg")
    return noise


def answer_file(directory, *, restart=False):
    return AnswerFile(directory, {}, {"model": None, "adapter": None}, count=2, restart=restart)


def evaluate(stub, data, tmp_path, capsys, *options):
    """Status, error line and results of a run."""
    output = tmp_path / "out"
    words = ["--server", stub.url if hasattr(stub, "url") else stub, "--data", *map(str, [data] if isinstance(data, str)
             else data), "--output", str(output), *map(str, options)]
    status = cli.main(words)
    captured = capsys.readouterr()
    results = json.loads((output / "results.json").read_text()) if (output / "results.json").exists() else None
    return status, captured.err, results, captured.out


def test_the_protocol(tmp_path, capsys, pixels, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    turns = [("system", "Be brief."), ("user", "<image>\nWhat?"), ("assistant", "Noise."), ("user", "And <image>?"),
             ("assistant", "More.")]
    data = write_records(tmp_path / "d.json", {
        "messages": [{"role": role, "content": text} for role, text in turns], "images": ["a.png", "b.jpg"],
        "channel": "noise"})
    replies = {1: "Noise.", 2: "Less."}
    with StubServer(lambda body: completion(replies[len(pictures(body))])) as stub:
        status, error, results, out = evaluate(
            stub, data, tmp_path, capsys, "--api-key-env", "MY_KEY", "--max-new-tokens", 7, "--concurrency", 1)
    assert (status, error) == (0, "")
    (path, headers, first), (_, _, second) = stub.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (first["model"], first["max_tokens"], first["temperature"], first["stream"]) == ("stub", 7, 0, False)
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == "Noise."  # the data's answer, not the model's
    assert [part["type"] for part in second["messages"][1]["content"]] == ["image_url", "text"]
    assert [part["type"] for part in second["messages"][3]["content"]] == ["text", "image_url", "text"]
    assert second["messages"][3]["content"][2]["text"] == "?"
    upright, turned = pictures(second)
    assert np.array_equal(np.asarray(upright), pixels)
    assert turned.size == (40, 60) and turned.format == "PNG"
    assert [answer["answer"] for answer in results["answers"]] == ["Noise.", "Less."]
    assert results["summary"]["overall"]["metrics"]["exact_match"]["right"] == 1
    assert results["summary"]["channel noise"]["questions"] == 2
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert KEY.encode() not in written and KEY not in out


def test_a_plain_jpeg_is_sent_as_it_is(tmp_path, pixels):
    uri = server.image_uri(str(tmp_path / "c.jpg"))
    prompt = Prompt((Message("user", "<image>"),), (uri,))
    body = server.request_body(prompt, server.GenerationSettings(), model="m")
    assert body["messages"][0]["content"] == [{"type": "image_url", "image_url": {"url": uri}}]
    with Image.open(tmp_path / "c.jpg") as file:
        assert np.array_equal(np.asarray(pictures(body)[0]), np.asarray(file))
    grey = io.BytesIO()
    Image.new("L", (8, 8), 7).save(grey, "PNG")
    (tmp_path / "grey.png").write_bytes(grey.getvalue())
    assert pictures({"messages": [{"content": [{"type": "image_url", "image_url": {
        "url": server.image_uri(str(tmp_path / "grey.png"))}}]}]})[0].mode == "RGB"


def test_answers_keep_their_questions_whatever_their_order(tmp_path, capsys):
    """The first question is answered last."""
    data = write_records(tmp_path / "d.json", *(qa(f"say {i}", str(i)) for i in range(12)))
    others = threading.Event()

    def reply(body):
        text = body["messages"][0]["content"].removeprefix("say ")
        if text == "0":
            assert others.wait(20)
        elif text == "11":
            others.set()
        return completion(text, "length" if text == "3" else "stop")

    with StubServer(reply) as stub:
        status, _, results, out = evaluate(stub, data, tmp_path, capsys, "--concurrency", 4)
    assert status == 0
    assert [answer["answer"] for answer in results["answers"]] == [str(i) for i in range(12)]
    assert [answer["truncated"] for answer in results["answers"]] == [i == 3 for i in range(12)]
    assert "1 answers reached --max-new-tokens" in out
    numbers = [json.loads(line)["question"] for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()[1:]]
    assert numbers.index(0) >= 8 and sorted(numbers) == list(range(12))


@pytest.mark.parametrize("failure", [500, 503, 429, 408])
def test_a_failure_that_may_pass_is_tried_again(tmp_path, capsys, failure):
    data = write_records(tmp_path / "d.json", qa("Who?", "Me"))
    replies = iter([(failure, {"error": {"message": "busy"}}), (failure, "no JSON"), completion(" Me ")])
    with StubServer(lambda body: next(replies)) as stub:
        for _ in range(2):  # the second start only scores
            status, error, results, out = evaluate(stub, data, tmp_path, capsys)
            assert "1 requests had to be sent again" in out and results["retried_requests"] == 1
    assert (status, error) == (0, "") and len(stub.requests) == 3
    assert results["answers"][0]["answer"] == "Me" and results["answers"][0]["scores"]["exact_match"] == 1


@pytest.mark.parametrize(
    ("reply", "pieces", "requests"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), ("refuses", "401", "--api-key-env"), 1),
        ((500, {"error": "broken"}), ("answers 500 broken (3 tries)",), 3),
        ((400, {"error": {"message": "maximum context length"}}),
         ("answers 400 maximum context length", "'Now:\\nwho?'"), 1),
        ((302, ""), ("answers 302", "the address that it redirects to"), 1),
        ((429, "slow"), ("answers 429 slow (3 tries); lower --concurrency",), 3),
        ((200, {"choices": []}), ("no chat completion",), 1), ((200, "<html>"), ("no chat completion", "<html>"), 1),
        ((200, {"choices": [{"message": {"content": 3}}]}), ("no chat completion",), 1),
        ((200, [1]), ("no chat completion",), 1), ((200, "[" * 100_000), ("no chat completion", "[[[["), 1),
        ((200, '{"choices": [{"mess'), ("no chat completion",), 1), ((200, "9" * 10_000), ("no chat completion",), 1),
    ],
    ids=["401", "500", "400", "302", "429", "no choice", "html", "number", "list", "deep", "cut off", "long number"],
)
def test_other_failures_are_one_line_without_the_key(tmp_path, capsys, monkeypatch, reply, pieces, requests):
    monkeypatch.setenv("MY_KEY", KEY)
    data = write_records(tmp_path / "d.json", qa("Now:\nwho?", "Me"))
    with StubServer(lambda body: reply) as stub:
        status, error, results, out = evaluate(
            stub, data, tmp_path, capsys, "--api-key-env", "MY_KEY", "--retries", 2)
    assert_one_line((status, error), stub.url, *pieces, "0 of 1 answers")
    assert "\\\\" not in error
    assert KEY not in error + out and len(stub.requests) == requests and results is None


def test_an_answer_that_does_not_end_is_given_up(tmp_path, capsys, monkeypatch):
    """A byte now and then is no answer, although no single read takes long; neither is an endless one."""
    data = write_records(tmp_path / "d.json", qa("Who?", "Me"))
    monkeypatch.setattr(server, "_PIECE", 4)

    def drips():
        for _ in range(200):
            time.sleep(0.05)
            yield b" "

    with StubServer(lambda body: (200, drips())) as stub:
        outcome = evaluate(stub, data, tmp_path, capsys, "--timeout", 1, "--retries", 0)
    assert_one_line(outcome[:2], "does not answer within 1 s; raise --timeout")
    monkeypatch.setattr(server, "_MOST_BYTES", 1000)
    with StubServer(lambda body: (200, " " * 2000)) as stub:
        outcome = evaluate(stub, data, tmp_path / "b", capsys, "--retries", 0)
    assert_one_line(outcome[:2], "sends more than 1000 bytes")


def test_a_later_start_goes_on_from_the_answers(tmp_path, capsys):
    data = write_records(tmp_path / "d.json", *(qa(f"q{i}", f"a{i}") for i in range(5)))
    works = {"until": 3}

    def reply(body):
        number = int(body["messages"][0]["content"][1:])
        return completion(f"a{number}") if number < works["until"] else (500, {})

    with StubServer(reply) as stub:
        options = ("--retries", 0, "--concurrency", 1)
        status, error, *_ = evaluate(stub, data, tmp_path, capsys, *options)
        assert_one_line((status, error), "3 of 5 answers are in", "same command goes on")
        answers = tmp_path / "out" / "answers.jsonl"
        answers.write_bytes(answers.read_bytes() + b'{"question": 3, "ans')  # killed while it wrote
        works["until"], before = 5, len(stub.requests)
        status, _, results, out = evaluate(stub, data, tmp_path, capsys, *options, "--metrics", "anls,exact_match")
        assert status == 0 and "3 of 5 answers are there" in out and len(stub.requests) == before + 2
        assert [answer["answer"] for answer in results["answers"]] == [f"a{i}" for i in range(5)]
        # other settings are refused, unless the answers may go
        status, error, *_ = evaluate(stub, data, tmp_path, capsys, *options, "--max-new-tokens", 3)
        assert_one_line((status, error), "max_new_tokens 128, now 3", "--restart")
        status, _, results, _ = evaluate(stub, data, tmp_path, capsys, *options, "--max-new-tokens", 3, "--restart")
        assert status == 0 and results["settings"]["max_new_tokens"] == 3 and len(stub.requests) == before + 7
        write_records(tmp_path / "d.json", *(qa(f"q{i}", f"a{i + 1}") for i in range(5)))
        outcome = evaluate(stub, data, tmp_path, capsys, *options, "--max-new-tokens", 3)
        assert_one_line(outcome[:2], "other settings: data")


HEADER = {"format": 1, "settings": {}, "maker": {"model": None, "adapter": None}}
LINE = {"question": 0, "answer": "x", "truncated": False}


@pytest.mark.parametrize(
    ("lines", "piece"),
    [([{**LINE, "answer": None}], "line 2: answer is null, not a string"),
     ([{**LINE, "truncated": "no"}], "line 2: truncated is a string, not a boolean"),
     ([{**LINE, "question": True}], "line 2: question is a boolean, not a whole number"),
     ([{**LINE, "question": math.inf}], "line 2: question is Infinity, not a whole number"),
     ([LINE, 5], "line 3: it is a number"),
     ([LINE, {**LINE, "question": 2}], "line 3: question is 2, of 2"), ([{"question": 0}], "line 2: answer is missing"),
     ([LINE, {**LINE, "answer": "y"}], "line 3: question 0 has another answer before")],
    ids=["null", "no flag", "flag", "infinity", "number", "count", "missing", "twice"],
)
def test_damaged_answers_are_one_line(tmp_path, lines, piece):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (HEADER, *lines)))
    before = path.read_bytes()
    with pytest.raises(UserError) as raised:
        answer_file(tmp_path)
    assert f"{path} is damaged: {piece}" in str(raised.value) and "\n" not in str(raised.value)
    assert path.read_bytes() == before and not (tmp_path / ".answers.jsonl.lock").exists()


@pytest.mark.parametrize(
    "content", ["notes", '{"a": 1}\n', "[" * 100_000 + "\n", "5\n", '{"format": 1, "settings": 3}\n', "\n"],
    ids=["text", "object", "deep", "number", "settings", "empty line"],
)
def test_the_file_of_another_program_is_kept(tmp_path, content):
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(UserError, match="has no answers of an evaluation; give another --output, or --restart"):
        answer_file(tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == content
    answer_file(tmp_path, restart=True).close()
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == HEADER


def test_a_first_line_that_was_cut_off_is_written_again(tmp_path):
    for content in ("", '{"for', '{"format": 1, "settin'):
        (tmp_path / "answers.jsonl").write_text(content)
        answer_file(tmp_path).close()
        assert json.loads((tmp_path / "answers.jsonl").read_text()) == HEADER


def test_answers_have_one_writer(tmp_path, monkeypatch):
    """A second process is refused while the first one is there, --restart too, and may go on from it afterwards."""
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.0)
    first = answer_file(tmp_path)
    first.append([(0, Answer("x", False))])
    child = os.fork()
    if not child:
        status = 1
        try:
            answer_file(tmp_path, restart=True)
        except UserError as error:
            status = 0 if f"--output {tmp_path} is being written by another run" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    first.close()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert answer_file(tmp_path).answers == {0: Answer("x", False)}


def test_the_model_of_the_server(tmp_path, capsys):
    data = write_records(tmp_path / "d.json", qa("Who?", "Me"))
    with StubServer(lambda body: completion(body["model"]), models=("one", "two")) as stub:
        assert_one_line(evaluate(stub, data, tmp_path, capsys)[:2], "one, two", "--server-model")
        assert_one_line(evaluate(stub, data, tmp_path, capsys, "--server-model", "three")[:2], "does not have", "three")
        status, _, results, _ = evaluate(stub, data, tmp_path, capsys, "--server-model", "two")
        assert status == 0 and results["answers"][0]["answer"] == "two" and results["name"] == "out"
        assert not any("Authorization" in headers for _, headers, _ in stub.requests)
    assert_one_line(evaluate(stub, data, tmp_path, capsys)[:2], "cannot be reached: Connection refused (2 tries)")


@pytest.mark.parametrize(
    ("url", "options", "piece"),
    [("localhost:8000", (), "http or https"), ("http://user:pw@host/v1", (), "--api-key-env"),
     ("http://host", ("--api-key-env", "NOT_SET_HERE"), "NOT_SET_HERE is not set"),
     ("http://host", ("--device", "cpu"), "--device goes with --model"),
     ("http://host", ("--metrics", "bleu"), "--metrics bleu is unknown")],
)
def test_mistakes_are_found_before_anything_is_sent(tmp_path, capsys, url, options, piece):
    data = write_records(tmp_path / "d.json", qa("Who?", "Me"))
    assert_one_line(evaluate(url, data, tmp_path, capsys, *options)[:2], piece)
    assert not (tmp_path / "out").exists()


def test_boxes_data_sets_and_the_report(tmp_path, capsys, pixels):
    """Boxes in pixels of a 60 x 40 image become thousandths; an answer is off by a fifth of the width."""
    for name, box in (("x", [6, 8, 36, 32]), ("y", [0, 0, 30, 20])):
        write_records(tmp_path / f"{name}.json", {
            "messages": [{"role": "user", "content": "<image>Where is the <ref-object>?"},
                         {"role": "assistant", "content": "<bbox>"}],
            "images": ["a.png"], "objects": {"ref": ["dog"], "bbox": [box]}})
    given = iter(["[200, 200, 700, 800]", "nowhere"])
    with StubServer(lambda body: completion(next(given))) as stub:
        status, _, results, out = evaluate(
            stub, [f"left={tmp_path / 'x.json'}", tmp_path / "y.json"], tmp_path, capsys, "--concurrency", 1)
    assert status == 0 and results["answers"][0]["references"] == ["[100, 200, 600, 800]"]
    summary = results["summary"]
    assert summary["data set left"]["metrics"]["box_iou"]["value"] == pytest.approx(400 / 600)
    assert summary["overall"]["metrics"]["box_iou"]["value"] == pytest.approx(400 / 600 / 2)
    assert summary["overall"]["metrics"]["box_ap50"]["value"] == pytest.approx(51 / 101)
    assert summary["data set y"]["metrics"]["box_f1"]["value"] == 0 and "data set left" in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 and "boxes: expected in green" in page
    assert "Answers below the best score, worst first (2 of 2)" in page
    assert page.index("sample 1 ") < page.index("sample 0 ")
    assert "<h1>Evaluation of stub</h1>" in page and "0 of 2 answers have the best score in every metric." in page
    assert f"{tmp_path}/x.json\n{tmp_path}/y.json\n(hash" in page and results["data_files"]["left"]
    assert "top-p" not in page and "max_new_tokens" not in page and "<td>128 tokens</td>" in page
