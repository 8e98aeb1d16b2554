"""Exact match against greedy generation by Hugging Face's model, and metrics that do not depend on the layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mindspeed_mm.checkpoint.best import higher_is_better
from mindspeed_mm.config.checks import METRICS
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.evaluation.sample_views import target_spans
from mindspeed_mm.evaluation.teacher_forcing import RankScores, Scores, ScoreSums
from mindspeed_mm.models.layers.loss_head import LossHead
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.parallel.context_parallel import split_batch
from tests.helpers.hf_model import hf_inputs, random_sample, run_samples, tiny_model
from tests.helpers.mcore_model import model_like


def samples_of(count: int, *, seed: int = 3) -> list[Sample]:
    """With an image, without, and of two turns; answers of few tokens."""
    rng = np.random.default_rng(seed)
    turns = [[([(1, 4, 4)], 4, 3)], [([], 5, 2)], [([], 4, 2), ([(1, 2, 2)], 2, 2)]]
    return [random_sample(rng, index=index, turns=turns[index % 3]) for index in range(count)]


def scored(model: torch.nn.Module, batch, shown=()) -> RankScores:
    sums = ScoreSums(shown)
    places = sums.describe(batch)
    with torch.no_grad():
        output = model.eval()(batch, torch.ones(len(batch.labels)))
    sums.add(batch, output.token_losses, output.predicted, places)
    return sums.read()


@pytest.fixture(scope="module")
def trained():
    """Hugging Face's model after some steps, so that it reproduces some of its samples' answers; ours alike.

    The last three samples are the first ones with another last token: the model gives all others of their answers.
    """
    hf_model, samples = tiny_model(dense=True), samples_of(14)
    optimizer = torch.optim.AdamW(hf_model.parameters(), lr=2e-3)
    for _ in range(8):
        optimizer.zero_grad()
        run_samples(hf_model, samples[:7])
        optimizer.step()
    for place in range(3):
        ids = samples[place].input_ids.copy()
        ids[-1] = (ids[-1] + 1) % 80
        samples[11 + place] = dataclasses.replace(samples[place], input_ids=ids, index=11 + place)
    model, model_config = model_like(hf_model)
    return hf_model.eval(), model, model_config, samples


def generated(hf_model, sample: Sample) -> list[list[int]]:
    """Each answer as greedy decoding continues the expected conversation before it."""
    answers = []
    for start, end in target_spans(sample.loss_mask):
        before = hf_inputs(dataclasses.replace(
            sample, input_ids=sample.input_ids[:start], loss_mask=sample.loss_mask[:start],
            media=sample.media if any(sample.input_ids[:start] == 90) else (),
        ))
        del before["labels"]
        ids = hf_model.generate(
            **before, do_sample=False, max_new_tokens=end - start, min_new_tokens=end - start, eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(ids[0, start:].tolist())
    return answers


def test_exact_match_if_and_only_if_greedy_decoding_reproduces_the_answers(trained):
    hf_model, model, model_config, samples = trained
    scores = Scores.join([scored(model, collate(samples, SPEC, model_config), shown=range(len(samples)))])
    expected = [[sample.input_ids[a:b].tolist() for a, b in target_spans(sample.loss_mask)] for sample in samples]
    reproduced = [generated(hf_model, sample) == answers for sample, answers in zip(samples, expected, strict=True)]
    assert (scores.sums[1] == scores.sums[2]).tolist() == reproduced
    assert 4 <= sum(reproduced) <= 10, "both outcomes must occur"
    assert scores.metrics()["validation_exact_match"] == sum(reproduced) / len(samples)
    # one wrong token in an answer of several is no match, though most of its tokens are right
    near = [r < n and r > 0 for r, n in zip(scores.sums[1], scores.sums[2], strict=True)]
    assert any(near) and not any(np.array(reproduced)[near])
    given = [(scores.predicted[index], answers) for index, answers in enumerate(expected)]
    assert [tokens.tolist() == sum(answers, []) for tokens, answers in given] == reproduced


def test_every_split_gives_the_same_metrics(trained):
    """Micro-batches of other sizes, ranks of unequal numbers of samples, stand-ins, and parts of sequences."""
    _, model, model_config, samples = trained
    samples = [dataclasses.replace(sample, channel=index % 2, record_channel=["", "x", "y"][index % 3])
               for index, sample in enumerate(samples)]
    stand_in = Sample(np.zeros(1, np.int64), np.zeros(1, bool), (), -1)

    def batch(chosen):
        return collate([samples[index] for index in chosen] or [stand_in], SPEC, model_config)

    whole = Scores.join([scored(model, batch(range(14)))]).metrics(["a", "b"])
    uneven = Scores.join([scored(model, batch(c)) for c in ([9, 1, 13], [0, 2, 3, 4, 5, 6, 7, 8, 10, 11], [12], [])])
    assert_same(uneven.metrics(["a", "b"]), whole)
    # of a context-parallel group: both ranks have every sample, and a part of its tokens
    whole_batch = batch(range(14))
    with torch.no_grad():
        output = model.eval()(whole_batch, torch.ones(len(whole_batch.labels)))
    parts = []
    for rank in range(2):
        part, sums = split_batch(whole_batch, rank=rank, size=2, merge_unit=4), ScoreSums(range(14))
        places = sums.describe(part)
        start = 0 if rank == 0 else len(output.predicted) - len(part.labels)
        mine = slice(start, start + len(part.labels))
        sums.add(part, output.token_losses[mine], output.predicted[mine], places)
        parts.append(sums.read())
    joined = Scores.join(parts)
    assert_same(joined.metrics(["a", "b"]), whole)
    alone = Scores.join([scored(model, whole_batch, shown=range(14))])
    assert all(np.array_equal(joined.predicted[index], alone.predicted[index]) for index in range(14))
    assert whole["validation_samples"] == 14 and set(whole) == {"validation_samples", *METRICS, *(
        f"{metric}/{name}" for metric in METRICS for name in ("a", "a/x", "a/y", "b", "b/x", "b/y")
    )}


def assert_same(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if name.startswith("validation_loss"):
            assert ours[name] == pytest.approx(value, rel=1e-6)
        else:
            assert ours[name] == value, name


def rank_scores(table: dict[int, tuple[str, int, int]]) -> RankScores:
    """Of index -> channel, right and all target tokens."""
    sums = np.array([(2.0 * count, right, count) for _, right, count in table.values()], dtype=np.float32).T
    return RankScores(list(table), [-1] * len(table), [name for name, _, _ in table.values()], sums, {})


def test_channels_and_what_does_not_count():
    scores = Scores.join([rank_scores({3: ("ocr", 2, 2), -1: ("", 0, 0), 0: ("", 1, 4)}),
                          rank_scores({1: ("ocr", 1, 2), 2: ("chart", 0, 0)})])
    metrics = scores.metrics()
    assert scores.indices.tolist() == [0, 1, 3]  # neither the stand-in nor the sample without a target token
    assert metrics == {
        "validation_loss": 2.0, "validation_token_accuracy": 0.5, "validation_exact_match": 1 / 3,
        "validation_samples": 3.0, "validation_loss/ocr": 2.0, "validation_token_accuracy/ocr": 0.75,
        "validation_exact_match/ocr": 0.5,
    }
    assert Scores.join([rank_scores({-1: ("", 0, 0)})]).metrics() == {}
    many = Scores.join([rank_scores({index: (f"c{index}", 1, 1) for index in range(65)})])
    assert many.too_many_channels and not any("/" in name for name in many.metrics())


def test_losses_that_are_not_finite_are_no_matches():
    batch = dataclasses.replace(collate(samples_of(1), SPEC, model_like(tiny_model(dense=True))[1]))
    sums = ScoreSums()
    losses = torch.zeros(len(batch.labels))
    losses[-1] = float("nan")
    sums.add(batch, losses, batch.labels.clone(), sums.describe(batch))
    metrics = Scores.join([sums.read()]).metrics()
    assert metrics["validation_exact_match"] == 0 and np.isnan(metrics["validation_loss"])


def test_metrics_have_a_direction():
    assert [higher_is_better(f"{name}/a") for name in METRICS] == [False, True, True]


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_predicts_outside_training_alone(chunk_size, tied):
    """With a kernel that overwrites the logits, as fused ones do; of equal logits the first, as torch.argmax."""

    def overwriting(logits, labels, loss_weight, *, with_gradient):
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        logits.fill_(float("nan"))
        return losses, torch.zeros_like(logits) if with_gradient else None

    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 6, generator=generator), torch.randn(11, 6, generator=generator)
    weight[5] = weight[4]
    head = LossHead(6, 11, chunk_size=chunk_size, dtype=torch.float32, tied=tied, cross_entropy=overwriting)
    if not tied:
        head.weight.data.copy_(weight)
    labels, keywords = torch.arange(7), {"tied_weight": weight} if tied else {}
    assert head.train()(hidden, labels, torch.ones(7), **keywords)[2] is None
    predicted = head.eval()(hidden, labels, torch.ones(7), **keywords)[2]
    assert torch.equal(predicted, (hidden @ weight.t()).argmax(dim=-1)) and 5 not in predicted
    assert head(hidden[:0], labels[:0], torch.ones(0), **keywords)[2].shape == (0,)
