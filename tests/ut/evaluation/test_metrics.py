"""Metrics against worked examples of their definitions."""

from __future__ import annotations

import decimal
import math

import numpy as np
import pytest

from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation import statistics
from mindspeed_mm.evaluation.boxes import RankedBoxes, iou, match_boxes, mean_iou
from mindspeed_mm.evaluation.metrics import METRICS, Score, as_number, choice_of, choose_metrics, score_answer
from mindspeed_mm.models.qwen3_vl.spec import SPEC


def value(name: str, answer: str, *references: str) -> float:
    return score_answer([METRICS[name]], answer, references, SPEC)[name].value


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("exact_match", " A  dog.\n", "A dog.", 1), ("exact_match", "a dog.", "A dog.", 0),
        ("exact_match", "<think>\nHm.\n</think>\n\nA dog.", "A dog.", 1),
        # SQuAD's normalize_answer: lower case, punctuation, articles, white space
        ("normalized_match", "The Eiffel-Tower!", "eiffeltower", 1), ("normalized_match", "a cat", "an cat", 1),
        ("normalized_match", "cats", "cat", 0), ("normalized_match", "\u4f60\u597d\u3002", "\u4f60\u597d", 1),
        # ChartQA: 5% of the reference
        ("numeric", "95", "100", 1), ("numeric", "94.9", "100", 0), ("numeric", "105", "100", 1),
        ("numeric", "1,050", "1000", 1), ("numeric", "-10", "10", 0), ("numeric", "0.25", "25%", 1),
        ("numeric", "$3.10", "3", 1), ("numeric", "0", "0", 1), ("numeric", "0.01", "0", 0),
        # exactly 5%, which binary fractions miss; numbers beyond those of a float; what is no number
        ("numeric", "1.05", "1", 1), ("numeric", "2.1", "2", 1), ("numeric", "0.315", "0.3", 1),
        ("numeric", "0.285", "0.3", 1), ("numeric", "1.0500001", "1", 0), ("numeric", "1e400", "1e400", 1),
        ("numeric", "1.06e400", "1e400", 0), ("numeric", f"1e{10**20}", f"1e{10**20}", 1), ("numeric", "--5", "5", 0),
        ("numeric", "Yes", "yes", 1), ("numeric", "no", "yes", 0), ("numeric", "", "3", 0), ("numeric", "3.", "3", 1),
        ("multiple_choice", "(B)", "B", 1), ("multiple_choice", "B. A dog", "B", 1), ("multiple_choice", "c", "C", 1),
        ("multiple_choice", "The answer is (D).", "D", 1), ("multiple_choice", "Answer: **A**", "A", 1),
        ("multiple_choice", "A dog is shown, so the correct option is C", "C", 1),
        ("multiple_choice", "It is either (A) or (B)", "A", 0), ("multiple_choice", "A dog", "A", 0),
        ("multiple_choice", "I choose (A), because", "(A) red", 1), ("multiple_choice", "red", "red", 1),
        # bag of words: precision 2/3, recall 2/2
        ("token_f1", "the quick brown fox", "brown fox", 2 * 2 / (3 + 2)), ("token_f1", "cat cat", "cat", 2 / 3),
        ("token_f1", "", "", 1), ("token_f1", "", "x", 0), ("token_f1", "\u7ea2\u8272\u72d7", "\u7ea2\u72d7", 4 / 5),
        # Lin (2004), section 3.1: S2 has the LCS "police the gunman" with S1, S3 "the gunman"
        ("rouge_l", "police kill the gunman", "police killed the gunman", 3 / 4),
        ("rouge_l", "the gunman kill police", "police killed the gunman", 2 / 4), ("rouge_l", "", "x", 0),
        ("rouge_l", "", "", 1), ("rouge_l", ".", "x", 0),
        ("rouge_l", "a b c d", "a x b", 2 * 2 / 7),
        # ST-VQA: 1 - distance / longer, 0 from 0.5 on; "kitten" to "sitting" is 3 of 7
        ("anls", "sitting", "Kitten", 1 - 3 / 7), ("anls", "ab", "cb", 0), ("anls", "dog ", "DOG", 1),
        ("anls", "abcde", "abxyz", 0),
        ("cer", "sitting", "kitten", 3 / 6), ("cer", "", "abc", 1), ("cer", "", "", 0),
        # 1 substitution, 1 deletion, 1 insertion of 4 words
        ("wer", "a x c e", "a b c d", 2 / 4), ("wer", "the cat", "the black cat sat", 2 / 4), ("wer", "a b c", "a", 2),
    ],
)
def test_worked_examples(name, answer, reference, expected):
    assert value(name, answer, reference) == pytest.approx(expected, abs=1e-12)


def test_the_best_of_several_references_counts():
    assert value("exact_match", "b", "a", "b") == 1
    assert value("cer", "abd", "xyz", "abc") == pytest.approx(1 / 3)
    assert value("token_f1", "red dog", "cat", "red") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.5", "1234.5"), ("12,34", None), ("-$5", "-5"), ("7%", "0.07"), ("1e3", "1000"), ("\u22123", "-3"),
     ("3 dogs", None), ("", None), (".", None), ("nan", None), ("\u0663", None), (".5", "0.5"), ("--5", None),
     ("-+5", None), ("$-5", "-5"), (f"1e{10**20}", None), ("1e400", "1e400")],
)
def test_numbers(text, number):
    assert as_number(text) == (None if number is None else decimal.Decimal(number))


@pytest.mark.parametrize(
    "text",
    ["I see a dog and a Cat", "The answer is a dog", "option (c)", "the choice A is wrong, so B", "(A) is wrong",
     "The answer is I don't know", "The answer: I think B", "The answer is A dog", "Answer\nA dog", "the choice I made",
     "I don't think the answer is A", "The answer is not option A", "The answer is A or B", "(A) or (B)",
     "Saying that the answer is B is wrong", "B) is incorrect", "The answer is X-ray", "It is option B, or option C"],
)
def test_a_letter_is_not_guessed(text):
    assert choice_of(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [("The answer is B. Option C is wrong", "B"), ("It is not option A but option B", "B"), ("(A) is correct", "A"),
     ("(A) is wrong, so (B)", "B"), ("The answer is A because it is red", "A"), ("The answer is B, not A", "B"),
     ("The answer is A. Wait: the answer is B", "B"), ("The answer is I.", "I"), ("The answer is A, I think", "A"),
     ("I choose option C.", "C"), ("The correct answer is: **B**", "B"), ("B. A dog that is not red", "B")],
)
def test_a_letter_that_is_clear(text, letter):
    assert choice_of(text) == letter


def test_rates_are_sums_over_all_questions():
    scores = [METRICS["wer"].score("a", ["a b c"], SPEC), METRICS["wer"].score("x", ["y"], SPEC)]
    assert METRICS["wer"].value(scores) == pytest.approx((2 + 1) / (3 + 1))
    assert METRICS["wer"].value(scores, np.array([0, 2])) == 1.0
    assert METRICS["exact_match"].value([Score(1.0), Score(0.0)], np.array([3, 1])) == 0.75


BOX = '{{"bbox_2d": [{}, {}, {}, {}]}}'


def test_boxes():
    assert iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(50 / 150)
    assert iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0 and iou([5, 5, 5, 5], [5, 5, 5, 5]) == 0
    expected = [[0, 0, 10, 10], [20, 0, 30, 10]]
    assert mean_iou([[20, 0, 30, 10], [0, 0, 10, 5]], expected) == pytest.approx((1 + 0.5) / 2)
    assert mean_iou([], expected) == 0
    assert match_boxes([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], expected) == [True, False, False]
    assert value("box_iou", "at [0, 0, 10, 5]", "at [0, 0, 10, 10]") == 0.5
    assert value("box_f1", "[0, 0, 10, 5] and [1, 1, 2, 2]", BOX.format(0, 0, 10, 10)) == pytest.approx(2 / 3)
    assert value("box_f1", "nothing", "[0, 0, 10, 10]") == 0
    assert score_answer([METRICS["box_iou"]], "[0, 0, 1, 1]", ["no box"], SPEC) == {}


def average_precision(ranked, expected, weights):
    return RankedBoxes(ranked, expected).average_precision(weights)


def test_average_precision_of_a_worked_example():
    """Ranked right, wrong, right of 4 boxes: precision 1 up to recall 1/4, 2/3 up to 2/4, then 0."""
    ones = np.ones(1)
    expected = (26 * 1 + 25 * 2 / 3) / 101
    assert average_precision([[True, False, True]], [4], ones) == pytest.approx(expected)
    # a later box ranks behind all first ones, whatever the question
    assert average_precision([[True, False], [True]], [1, 1], np.ones(2)) == 1
    assert average_precision([[False, True], [True]], [1, 1], np.ones(2)) == pytest.approx(2 / 3, abs=0.01)
    assert average_precision([[]], [2], ones) == 0
    once = average_precision([[True], [False, True]], [2, 1], np.ones(2))
    assert average_precision([[True], [False, True]], [2, 1], np.array([2, 2])) == once
    first = average_precision([[True]], [2], ones)
    assert average_precision([[True], [False, True]], [2, 1], np.array([1, 0])) == first != once


def test_metrics_are_chosen_by_name_or_by_the_data():
    def names(*references, given=None):
        return [metric.name for metric in choose_metrics(given, [(reference,) for reference in references], SPEC)]

    basic = ["exact_match", "normalized_match"]
    assert names("A dog", "7") == basic
    assert names("7", "1,000", "3%") == [*basic, "numeric"]
    assert names("A", "(B)") == [*basic, "multiple_choice"]
    assert names("It is at [1, 2, 3, 4].") == [*basic, "box_iou", "box_f1", "box_ap50"]
    assert names("x", given=" anls,cer,anls") == ["anls", "cer"]
    with pytest.raises(UserError, match="--metrics bleu is unknown; choose of exact_match"):
        names("x", given="bleu")
    with pytest.raises(UserError, match="--metrics is empty"):
        names("x", given=",")


def test_intervals():
    low, high = statistics.wilson_interval(81, 263)  # Newcombe (1998), table 1, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert statistics.wilson_interval(0, 20)[0] == 0 and round(statistics.wilson_interval(0, 20)[1], 4) == 0.1611
    metric, scores = METRICS["token_f1"], [Score(float(value)) for value in np.linspace(0, 1, 101)]
    low, high = statistics.bootstrap_interval(metric, scores)
    error = 1.96 * np.std([score.value for score in scores]) / math.sqrt(101)
    assert abs(low - (0.5 - error)) < 0.01 and abs(high - (0.5 + error)) < 0.01
    assert statistics.bootstrap_interval(metric, scores) == (low, high)
    better = [Score(score.value + 0.1) for score in scores]
    assert statistics.paired_interval(metric, scores, better) == pytest.approx((0.1, 0.1))


def test_mcnemar():
    assert statistics.mcnemar(0, 0) == 1 and statistics.mcnemar(3, 3) == 1
    assert statistics.mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert statistics.mcnemar(2, 8) == statistics.mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
