"""Metrics of an answer against one or more acceptable answers; each definition names its source.

A score of a question is a :class:`Score`; the value of a metric over many questions is the mean of their values, or,
where a metric says so, the ratio of sums (``cer``, ``wer``), or an average precision over all boxes.
"""

from __future__ import annotations

import dataclasses
import decimal
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.boxes import RankedBoxes, match_boxes, mean_iou

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Han, kana and Hangul, which are written without spaces between words
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_CJK_CHARACTER = re.compile(f"([{_CJK}])")
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)
_THOUGHT = re.compile(r".*</think>", re.DOTALL)
_LETTER_ALONE = re.compile(r"[(\[]?([A-Z])[)\].:,]?")
_LETTER_FIRST = re.compile(r"(?:[(\[]([A-Z])[)\]]|([A-Z])[).:])(?:\s|$)")
# "A" and "I" are words, too: before another word they are letters only if no article or pronoun can stand there
_LETTER = (
    r"(?:[B-HJ-Z](?![\w'\u2019+#]|[-.]\w)|[AI](?![+#]|[-.]\w)(?=\s*(?:$|[^\w\s'\u2019])"
    r"|\s+(?:and|as|at|because|but|by|due|for|from|given|in|is|not|on|or|since|so|where|which|with)\b))"
)
_OPENING, _CLOSING = r"[*_(\[\"']*", r"[*_)\]\"']*"
_LETTER_IS_ANSWER = re.compile(
    rf"\b(?i:answer|option|choice)\s*(?i:is\s*:?|:)\s*(?i:option\s*)?{_OPENING}({_LETTER}){_CLOSING}"
)
_LETTER_NAMED = re.compile(rf"\b(?i:option|choice|answer)[ \t]*{_OPENING}({_LETTER})|\(([A-Z])\)")
_ANOTHER_LETTER = re.compile(rf"\s*(?:,|/|&|\bor\b|\band\b)\s*(?:or\s+|and\s+)?(?i:option\s*)?{_OPENING}{_LETTER}")
_GOES_ON = re.compile(r"\s*(?:\b(?:is|are|was|were|isn['\u2019]t|can|cannot|or|and)\b|[/&])")
_CLAUSE = re.compile(r"[.,;:!?\n]|\b(?:because|since|but|so)\b")
_NEGATION = re.compile(
    r"\b(?:not?|nor|neither|never|cannot|wrong|incorrect|false|except|excluded|unlike|unlikely|instead|than)\b|n['\u2019]t\b",
    re.IGNORECASE,
)
# more digits than an answer has; exponents of any size
_DECIMAL = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])
NO_VALUE = "no expected answer has a box"
"""Why a metric has no value: those of boxes are the only ones that a question may lack."""
RELAXED_TOLERANCE, ANLS_THRESHOLD = decimal.Decimal("0.05"), 0.5


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of one answer.

    Attributes:
        value: of this answer alone.
        errors: of a ratio of sums: the numerator.
        length: the denominator.
        ranked: of an average precision: whether each given box is right, in the order of the answer; ``length`` is the
            number of expected boxes.
    """

    value: float
    errors: float = 0.0
    length: float = 1.0
    ranked: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: on the command line.
        score: answer, acceptable answers and model family -> score; None where the question has no such score.
        kind: ``rate``: every value is 0 or 1; ``mean``; ``ratio``: of sums; ``precision``: average precision.
        lower_is_better: of error rates.
    """

    name: str
    score: Callable[[str, Sequence[str], ModelSpec], Score | None]
    kind: Literal["rate", "mean", "ratio", "precision"] = "mean"
    lower_is_better: bool = False

    def value(self, scores: Sequence[Score], weights: np.ndarray | None = None) -> float:
        """The metric over questions, each of which counts ``weights`` [n] times; None: once."""
        return self.over(scores)(np.ones(len(scores)) if weights is None else weights)

    def over(self, scores: Sequence[Score]) -> Callable[[np.ndarray], float]:
        """The metric over questions as a function of their weights, for many draws."""
        if self.kind == "precision":
            return RankedBoxes([one.ranked for one in scores], [one.length for one in scores]).average_precision
        names = ("errors", "length") if self.kind == "ratio" else ("value", "")
        tops, bottoms = (np.array([getattr(one, name) if name else 1.0 for one in scores]) for name in names)

        def ratio(weights: np.ndarray) -> float:
            total = float(weights @ bottoms)
            return float(weights @ tops) / total if total else 0.0

        return ratio


def final_answer(text: str) -> str:
    """An answer without the thought before it (``<think>...</think>``) and surrounding white space."""
    return _THOUGHT.sub("", text, count=1).strip() if "</think>" in text else text.strip()


def normalized(text: str) -> str:
    """Lower case, without punctuation, the articles a, an, the, and repeated white space.

    Source: ``normalize_answer`` of SQuAD's evaluation script v1.1 (Rajpurkar et al., 2016). Beyond it, punctuation
    that is not ASCII counts, and Unicode is normalised (NFKC), so that full-width forms are equal.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, reference: str) -> bool:
    """The same text, but for white space."""
    return answer.split() == reference.split()


def normalized_match(answer: str, reference: str) -> bool:
    """The same text after :func:`normalized`: SQuAD's exact match (Rajpurkar et al., 2016)."""
    return normalized(answer) == normalized(reference)


def numeric(answer: str, reference: str) -> bool:
    """Relaxed accuracy: a number within 5% of the reference; other texts must be equal, but for case.

    Source: Methani et al. (PlotQA, 2020) and Masry et al. (ChartQA, 2022): ``|answer - reference| <= 0.05 |reference|``
    if both are numbers, in decimal arithmetic: 1.05 is within 5% of 1. ``25%`` is 0.25, and commas between thousands
    and a currency sign in front are left out. A reference of 0 needs 0.
    """
    given, expected = as_number(answer), as_number(reference)
    if given is None or expected is None:
        return " ".join(answer.lower().split()) == " ".join(reference.lower().split())
    error = _DECIMAL.abs(_DECIMAL.subtract(given, expected))
    return error <= _DECIMAL.multiply(RELAXED_TOLERANCE, _DECIMAL.abs(expected))


def as_number(text: str) -> decimal.Decimal | None:
    """The number that a text is; None if it is none."""
    text = text.strip().rstrip(".").replace("\u2212", "-")
    negative, text = text.startswith("-"), text.removeprefix("-").lstrip("$\u20ac\u00a3\u00a5").strip()
    percent, text = text.endswith("%"), text.removesuffix("%").strip()
    if not any(c.isdigit() for c in text) or not text.isascii() or not _NUMBER.fullmatch(text):
        return None
    if negative and text.startswith(("-", "+")):
        return None
    value = _DECIMAL.create_decimal(text.replace(",", ""))
    if not value.is_finite():  # an exponent of 19 digits or more
        return None
    return _DECIMAL.multiply(value, decimal.Decimal(("-" if negative else "") + ("0.01" if percent else "1")))


def choice_of(text: str) -> str | None:
    """The letter of the option that an answer chooses; None if it is not clear.

    In this order: a letter alone (``B``, ``(B)``, ``B.``); one at the start (``B. A dog``, ``(B) A dog``); the last one
    that is said to be the answer, option or choice (``The answer is B``); the only one that is called an option or
    stands in parentheses (``I choose option B``). This follows the extraction in MMMU's evaluation (Yue et al., 2024),
    but never guesses: letters of a clause with a negation do not count, "A" and "I" before another word are words, and
    the answer ``A or B`` is not clear.
    """
    text = text.strip().strip("*").strip()
    if match := _LETTER_ALONE.fullmatch(text.upper() if len(text) <= 3 else text):
        return match[1]
    if (match := _LETTER_FIRST.match(text)) and not _GOES_ON.match(text, match.end()):
        return match[1] or match[2]
    if answers := [match for match in _LETTER_IS_ANSWER.finditer(text) if not _is_denied(match)]:
        return None if _ANOTHER_LETTER.match(text, answers[-1].end()) else answers[-1][1]
    clauses = [clause for clause in _CLAUSE.split(text) if not _NEGATION.search(clause)]
    letters = {match[1] or match[2] for clause in clauses for match in _LETTER_NAMED.finditer(clause)}
    return letters.pop() if len(letters) == 1 else None


def _is_denied(match: re.Match[str]) -> bool:
    """Whether a negation stands before "the answer is B" in its clause, or a statement about it follows."""
    before = _CLAUSE.split(match.string[:match.start()])[-1]
    follows = re.match(r"\s+(?:is|was|would|cannot)\b", match.string[match.end():])
    return follows is not None or _NEGATION.search(before) is not None


def multiple_choice(answer: str, reference: str) -> bool:
    """The answer chooses the reference's option, by :func:`choice_of`; a reference without one must be equal."""
    expected = choice_of(reference)
    return exact_match(answer, reference) if expected is None else choice_of(answer) == expected


def token_f1(answer: str, reference: str) -> float:
    """F1 of the bags of words after :func:`normalized`.

    Source: SQuAD (Rajpurkar et al., 2016). A Chinese, Japanese or Korean character is a word, as in CMRC 2018. Both
    empty: 1.
    """
    given, expected = (_CJK_CHARACTER.sub(r" \1 ", normalized(text)).split() for text in (answer, reference))
    common = sum((Counter(given) & Counter(expected)).values())
    if not given or not expected:
        return float(given == expected)
    return 2 * common / (len(given) + len(expected))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words: ``2 LCS / (words of answer + words of reference)``.

    Source: Lin (ROUGE, 2004), with beta 1. Words are runs of letters and digits in lower case, without stemming; a
    Chinese, Japanese or Korean character is a word. Both empty: 1, as for the other metrics.
    """
    given, expected = (_WORD.findall(text.lower()) for text in (answer, reference))
    if not given or not expected:
        return float(given == expected)
    return 2 * LCSseq.similarity(given, expected) / (len(given) + len(expected))


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity, or 0 where the distance is 0.5 or more.

    Source: Biten et al. (ST-VQA, 2019), as in DocVQA: ``1 - distance / longer length``, in lower case and without
    repeated white space.
    """
    given, expected = (" ".join(text.lower().split()) for text in (answer, reference))
    distance = Levenshtein.normalized_distance(given, expected)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def cer(answer: str, reference: str) -> Score:
    """Character error rate: edits / characters of the reference, both without repeated white space.

    Source: Levenshtein distance, as usual for OCR and speech; over questions edits and characters are summed.
    """
    return _error_rate(" ".join(answer.split()), " ".join(reference.split()))


def wer(answer: str, reference: str) -> Score:
    """Word error rate: ``(substitutions + deletions + insertions) / words of the reference``.

    Source: as in NIST's scoring, with words between white space; over questions edits and words are summed.
    """
    return _error_rate(answer.split(), reference.split())


def _error_rate(given: Sequence[str], expected: Sequence[str]) -> Score:
    edits = Levenshtein.distance(given, expected)
    return Score(edits / len(expected) if expected else float(edits > 0), edits, len(expected))


def box_iou(answer: str, reference: str, spec: ModelSpec) -> Score | None:
    """Mean intersection over union of the expected boxes with the given ones that are matched to them.

    See :func:`~mindspeed_mm.evaluation.boxes.match_boxes`. None for a reference without boxes.
    """
    expected = _boxes(reference, spec)
    return Score(mean_iou(_boxes(answer, spec), expected)) if expected else None


def box_f1(answer: str, reference: str, spec: ModelSpec) -> Score | None:
    """``2 matched / (given + expected)`` boxes, where matched ones have an intersection over union of at least 0.5.

    For one expected and one given box it is the accuracy of referring expressions, Acc@0.5 (Mao et al., 2016).
    """
    given, expected = _boxes(answer, spec), _boxes(reference, spec)
    if not expected:
        return None
    return Score(2 * sum(match_boxes(given, expected)) / (len(given) + len(expected)))


def box_ap50(answer: str, reference: str, spec: ModelSpec) -> Score | None:
    """Average precision of boxes at an intersection over union of 0.5, over all questions.

    Source: COCO (Lin et al., 2014), precision at 101 levels of recall, one class. Answers have no confidences: a box
    counts as the more confident the earlier it is in its answer. See
    :class:`~mindspeed_mm.evaluation.boxes.RankedBoxes`.
    """
    expected = _boxes(reference, spec)
    if not expected:
        return None
    ranked = tuple(match_boxes(_boxes(answer, spec), expected))
    value = RankedBoxes([ranked], [len(expected)]).average_precision(np.ones(1))
    return Score(value, 0.0, len(expected), ranked)


def _boxes(text: str, spec: ModelSpec) -> list[list[float]]:
    """Boxes of a text, without points."""
    return [box for box in spec.boxes_in(text) if len(box) == 4]


def _best(metric: Callable[[str, str], float | bool]) -> Callable[[str, Sequence[str], ModelSpec], Score]:
    """The highest value over the acceptable answers."""
    return lambda answer, references, spec: Score(max(float(metric(answer, one)) for one in references))


def _least(metric: Callable[[str, str], Score]) -> Callable[[str, Sequence[str], ModelSpec], Score]:
    """The lowest rate over the acceptable answers."""
    return lambda answer, references, spec: min((metric(answer, one) for one in references), key=lambda s: s.value)


def _of_boxes(
    metric: Callable[[str, str, ModelSpec], Score | None]
) -> Callable[[str, Sequence[str], ModelSpec], Score | None]:
    def score(answer: str, references: Sequence[str], spec: ModelSpec) -> Score | None:
        found = [one for one in (metric(answer, reference, spec) for reference in references) if one is not None]
        return max(found, key=lambda one: one.value, default=None)

    return score


METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("exact_match", _best(exact_match), "rate"),
    Metric("normalized_match", _best(normalized_match), "rate"),
    Metric("numeric", _best(numeric), "rate"),
    Metric("multiple_choice", _best(multiple_choice), "rate"),
    Metric("token_f1", _best(token_f1)),
    Metric("rouge_l", _best(rouge_l)),
    Metric("anls", _best(anls)),
    Metric("cer", _least(cer), "ratio", lower_is_better=True),
    Metric("wer", _least(wer), "ratio", lower_is_better=True),
    Metric("box_iou", _of_boxes(box_iou)),
    Metric("box_f1", _of_boxes(box_f1)),
    Metric("box_ap50", _of_boxes(box_ap50), "precision"),
)}


def choose_metrics(
    names: str | None, references: Sequence[Sequence[str]], spec: ModelSpec, *, option: str = "--metrics"
) -> list[Metric]:
    """The metrics that are named, or those that fit the data.

    Without names: ``exact_match`` and ``normalized_match``; the metrics of boxes if every reference has a box;
    ``numeric`` if every one is a number; ``multiple_choice`` if every one is a letter from A to H.

    Raises:
        UserError: for an unknown name.
    """
    if names is None:
        firsts = [one[0] for one in references]
        fitting = {
            "box_iou box_f1 box_ap50": lambda text: bool(_boxes(text, spec)),
            "numeric": lambda text: as_number(text) is not None,
            "multiple_choice": lambda text: re.fullmatch(r"\(?[A-H]\)?\.?", text.strip()) is not None,
        }
        chosen = ["exact_match", "normalized_match"]
        chosen += [name for key, fits in fitting.items() if all(map(fits, firsts)) for name in key.split()]
    else:
        chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise UserError(f"{option} is empty; choose of {', '.join(METRICS)}")
    if unknown := [name for name in chosen if name not in METRICS]:
        raise UserError(f"{option} {unknown[0]} is unknown; choose of {', '.join(METRICS)}")
    return [METRICS[name] for name in chosen]


def score_answer(
    metrics: Sequence[Metric], answer: str, references: Sequence[str], spec: ModelSpec
) -> dict[str, Score]:
    """The scores of one answer, by metric; those that the question has."""
    answer, references = final_answer(answer), [final_answer(reference) for reference in references]
    scores = {metric.name: metric.score(answer, references, spec) for metric in metrics}
    return {name: score for name, score in scores.items() if score is not None}


def goodness(scores: Mapping[str, Score], metrics: Sequence[Metric]) -> float:
    """Mean of an answer's scores, error rates as ``1 - rate``."""
    values = [1 - scores[m.name].value if m.lower_is_better else scores[m.name].value
              for m in metrics if m.name in scores]
    return sum(values) / len(values) if values else 0.0
