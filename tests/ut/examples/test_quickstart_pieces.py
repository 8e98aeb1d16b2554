"""What the quickstart is put together from: the digits, the tiny model, its answers' judge, and the plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mindspeed_mm.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "qwen3vl"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE / "quickstart")]

import configure  # noqa: E402 - scripts, found only through the path above
import inference_demo  # noqa: E402
import make_digits  # noqa: E402
import make_tiny_model  # noqa: E402
import plot  # noqa: E402


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits")
    return output, make_digits.write_digits(output)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_tiny_model.write_model(directory, make_digits.all_texts())
    return directory


def _records(output, name):
    return json.loads((output / name).read_text())


def test_digits_are_split_into_disjoint_parts(digits):
    output, counts = digits
    assert list(counts.values()) == [1500, 297]
    train, held_out = (_records(output, name) for name in (make_digits.TRAIN_FILE, make_digits.HELD_OUT_FILE))
    images = [[record["image"] for record in part] for part in (train, held_out)]
    assert [len(set(part)) for part in images] == [1500, 297]
    assert not set(images[0]) & set(images[1])
    assert all((output / make_digits.IMAGE_DIR / name).is_file() for part in images for name in part)


def test_every_record_is_a_llava_conversation_about_its_digit(digits):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for record in _records(digits[0], make_digits.TRAIN_FILE):
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        assert question.count("<image>") == 1
        assert inference_demo.digit_of(answer) == target[int(record["id"].removeprefix("digit_"))]


def test_the_same_seed_gives_the_same_files(digits, tmp_path):
    make_digits.write_digits(tmp_path)
    for name in (make_digits.TRAIN_FILE, f"{make_digits.IMAGE_DIR}/digit_0000.jpg"):
        assert (tmp_path / name).read_bytes() == (digits[0] / name).read_bytes()


def test_an_image_is_four_text_tokens(digits):
    with Image.open(digits[0] / make_digits.IMAGE_DIR / "digit_0000.jpg") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_widths_are_all_different(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    widths = [
        text["hidden_size"], text["num_attention_heads"] * text["head_dim"],
        text["num_key_value_heads"] * text["head_dim"], text["moe_intermediate_size"],
        2 * text["moe_intermediate_size"], vision["hidden_size"], vision["intermediate_size"],
    ]
    assert len(set(widths)) == len(widths)
    assert text["num_experts"] >= 8
    assert 2 * sum(text["rope_scaling"]["mrope_section"]) == text["head_dim"]
    assert len(vision["deepstack_visual_indexes"]) == 3


def test_special_tokens_are_single_and_known_to_the_config(model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    for token in make_tiny_model.SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.convert_ids_to_tokens(config["image_token_id"]) == "<|image_pad|>"
    assert tokenizer.convert_ids_to_tokens(config["vision_start_token_id"]) == "<|vision_start|>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) <= config["text_config"]["vocab_size"]
    text = "Is it 42, or Ümlaut?\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_transformers_loads_the_model_whole_and_it_answers(model_dir, digits):
    torch.set_num_threads(1)
    answerer = inference_demo.Answerer(str(model_dir), device_map="cpu", dtype="auto")  # refuses missing weights
    assert 2.2e6 < sum(parameter.numel() for parameter in answerer.model.parameters()) < 2.6e6
    path = digits[0] / make_digits.HELD_OUT_FILE
    questions = inference_demo.read_questions(path, str(digits[0] / make_digits.IMAGE_DIR), limit=3)
    inputs = answerer.inputs([question.prompt for question in questions])
    assert (inputs["input_ids"] == answerer.model.config.image_token_id).sum() == 3 * 4
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert torch.isfinite(answerer.model(**inputs, labels=labels).loss)
    text_only = inference_demo.Question("Is it odd or even?", (), "It is odd.")
    assert len(answerer.answer([*questions, text_only], max_new_tokens=2)) == 4


def test_a_batch_gives_the_answers_of_single_questions(model_dir, digits):
    answerer = inference_demo.Answerer(str(model_dir), device_map="cpu", dtype="auto")
    path = digits[0] / make_digits.HELD_OUT_FILE
    questions = inference_demo.read_questions(path, str(digits[0] / make_digits.IMAGE_DIR), limit=4)
    together = answerer.answer(questions, max_new_tokens=4)
    assert together == [answerer.answer([question], max_new_tokens=4)[0] for question in questions]


@pytest.mark.parametrize(
    ("answer", "digit"),
    [("The digit is seven.", 7), ("7", 7), ("I see a 0.", 0), ("Seven, or 7", 7), ("seven or eight", None),
     ("None", None), ("17", None), ("", None)],
)
def test_digit_of(answer, digit):
    assert inference_demo.digit_of(answer) == digit


def test_answers_without_a_digit_must_be_equal():
    assert inference_demo.is_right(" A dog. ", "A dog.")
    assert not inference_demo.is_right("A cat.", "A dog.")


_MESSAGES = '[{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A"}]'


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("{}", "not a list of records"), ('[{"image": "a.jpg"}]', "record 0"),
     (f'[{{"images": ["no.jpg"], "messages": {_MESSAGES}}}]', "no.jpg does not exist"),
     (f'[{{"images": [], "messages": {_MESSAGES}}}]', "0 images and 1")],
)
def test_unusable_questions_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    assert inference_demo.main(["--model", "none", "--data", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_configuration_names_the_run_directory_and_is_accepted():
    from mindspeed_mm.config.data_config import DataConfig
    from mindspeed_mm.config.model_options import ModelOptions

    files = configure.fill_in("/somewhere/run 1")
    data = DataConfig(**files["data_tiny.json"])
    assert data.dataset_param.basic_parameters.dataset_files == ["/somewhere/run 1/data/mllm_format_digits_train.json"]
    model = ModelOptions(**files["model_tiny.json"])
    assert model.init_from_hf_path == data.dataset_param.preprocess_parameters.model_name_or_path
    assert not model.image_encoder.vision_encoder.freeze


def test_the_metrics_are_read_and_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"iteration": 1, "loss": 6.2, "learning_rate": 0.0, "seconds": 1.2},
        {"iteration": 2, "loss": None, "learning_rate": 1e-4},
        {"iteration": 3, "loss": 4.5, "learning_rate": 1e-4, "validation_loss": 4.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = plot.read_metrics(path)
    assert [(step.iteration, step.loss) for step in steps[::2]] == [(1, 6.2), (3, 4.5)]
    assert steps[1].loss != steps[1].loss
    assert (steps[0].learning_rate, steps[2].learning_rate) == (0.0, 1e-4)
    plot.main(["--metrics", str(path), "--loss-png", str(tmp_path / "loss.png")])
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 600


@pytest.mark.parametrize(
    ("content", "message"), [("", "has no step: training"), ("{", "line 1, has no step"), ('{"a": 1}', "('loss')")]
)
def test_a_file_without_steps_is_an_error(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        plot.read_metrics(path)
    assert message in str(error.value)


def test_the_sample_sheet_shows_wrong_answers(digits, tmp_path):
    image = str(digits[0] / make_digits.IMAGE_DIR / "digit_0000.jpg")
    right = {"text": "<image>\nWhich?", "images": [image], "reference": "one", "answer": "one", "right": True}
    wrong = {**right, "answer": "two", "right": False}
    assert [sample["right"] for sample in plot.choose_samples([wrong, *[right] * 9], 6)] == [True] * 5 + [False]
    result = {"predictions": [right, wrong], "right": 1, "total": 2, "accuracy": 0.5}
    plot.plot_samples(result, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 1000
