"""One evaluation: checks, answers, results."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.directory import RELEASE
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.adapters import check_adapter
from mindspeed_mm.evaluation.comparison import compared
from mindspeed_mm.evaluation.files import check_directory, write_output, writing
from mindspeed_mm.evaluation.generation import Answer, GenerationSettings, Generator, batches, check_device
from mindspeed_mm.evaluation.held_out import held_out_data
from mindspeed_mm.evaluation.metrics import NO_VALUE, Metric, choose_metrics
from mindspeed_mm.evaluation.model_source import EXPORTS, ModelSource, find_model
from mindspeed_mm.evaluation.questions import Prompt, QuestionSet, data_config, read_questions
from mindspeed_mm.evaluation.result_pages import write_comparison, write_report
from mindspeed_mm.evaluation.results import (
    OVERALL,
    REPORT_FILE,
    RESULTS_FILE,
    AnswerFile,
    as_result,
    score_all,
    summary_table,
    text_table,
)
from mindspeed_mm.evaluation.server import Server
from mindspeed_mm.inputs import shorten
from mindspeed_mm.models.spec import ModelSpec, get_spec, known_model_types, spec_of

_REPORT_SECONDS = 5.0  # between two lines of progress
# of a missing image, by the reader that training uses as well
_TRAINING_REMEDY = 'basic_parameters.dataset_dir, or set dataloader_param.on_bad_sample to "skip"'
_SHOWN = 5  # changed answers on the terminal, of each kind


@dataclasses.dataclass(frozen=True)
class _Plan:
    """An evaluation, checked.

    Attributes:
        source: of the model; None with a server.
        server: that answers; None without.
        spec: of the model.
        settings: of decoding.
        data: the questions.
        metrics: of the results.
        output: directory of the results.
    """

    source: ModelSource | None
    server: Server | None
    spec: ModelSpec
    settings: GenerationSettings
    data: QuestionSet
    metrics: list[Metric]
    output: Path


def run(args: argparse.Namespace, api_key: str | None) -> None:
    """Run the command line.

    Raises:
        UserError: for a mistake in an option or a file, before the model is loaded where that can be known.
    """
    logging.basicConfig(format="%(message)s")
    plan = _checked(args, api_key)
    _print_data(plan)
    if plan.source is not None:
        plan.source.export()
    facts = _settings(plan, args)
    maker = {
        "model": args.model if plan.source is None else plan.source.name,
        "adapter": args.adapter if plan.source is None else plan.source.adapter,
    }
    answers = AnswerFile(plan.output, facts, maker, count=len(plan.data.questions), restart=args.restart)
    if answers.maker != maker:
        print(f"the answers were given by {answers.maker['model']}, which has the same weights", flush=True)
    try:
        _answer_all(plan, args, answers)
    finally:
        answers.close()
    scored = score_all(plan.data.questions, answers.answers, plan.metrics, plan.spec)
    about = {
        "name": plan.output.name, "model_type": plan.spec.model_types[0], **answers.maker, "server": args.server,
        "data_files": plan.data.files,
    }
    result = as_result(facts, about, scored, plan.metrics)
    write_output(plan.output / RESULTS_FILE, result)
    with writing(plan.output / REPORT_FILE):
        write_report(plan.output / REPORT_FILE, result, scored, plan.metrics, plan.spec)
    print(f"\n{summary_table(result['summary'], result['metrics'])}")
    print("values with their 95% intervals; docs/evaluation_generation.md defines the metrics")
    for name in result["metrics"]:
        if name not in result["summary"][OVERALL]["metrics"]:
            print(f"{name}: {NO_VALUE}")
    if truncated := result["truncated_answers"]:
        print(f"{truncated} answers reached --max-new-tokens {plan.settings.max_new_tokens} and are cut off")
    if retried := result["retried_requests"]:
        print(f"{retried} requests had to be sent again after a lost connection, a 408, 409, 425, 429 or 5xx")
    print(f"results: {plan.output / RESULTS_FILE}, {plan.output / REPORT_FILE}")
    for name, fact in result["summary"][OVERALL]["metrics"].items():
        if "right" in fact:
            print(f"{name}: {100 * fact['value']:.1f}% ({fact['right']} of {fact['questions']})")


def _checked(args: argparse.Namespace, api_key: str | None) -> _Plan:
    """Everything that can be checked before the model is loaded."""
    source = None
    if args.server is None:
        source = find_model(
            args.model, adapter=args.adapter, best=args.best, assets=args.assets, export_dir=args.export_dir
        )
        spec = spec_of(source.config_directory)
        spec.read_config(source.config_directory)
        check_device(args.device)
        if source.adapter is not None:
            check_adapter(source.adapter, source.config_directory)
    else:
        spec = get_spec(known_model_types()[0]) if args.model is None else spec_of(args.model)
    choose_metrics(args.metrics or "exact_match", (), spec)  # names
    only = None
    if args.mm_data is not None:
        data_sets, only = held_out_data(args.mm_data, source, spec, seq_length=args.seq_length, seed=args.val_seed)
    else:
        named = args.model if source is None else source.config_directory
        data_sets = data_config(spec, args.data, args.data_dir, model=named or "server")
    try:
        data = read_questions(data_sets, spec, turns=args.turns, limit=args.limit, only=only)
    except UserError as error:
        if args.data is None or _TRAINING_REMEDY not in str(error):
            raise
        raise UserError(str(error).replace(_TRAINING_REMEDY, "--data-dir")) from error
    metrics = choose_metrics(args.metrics, [question.references for question in data.questions], spec)
    settings = GenerationSettings(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        repetition_penalty=args.repetition_penalty, seed=args.seed,
    )
    server = None
    if args.server is not None:
        server = Server(
            args.server, model=args.server_model, api_key=api_key, timeout=args.timeout, retries=args.retries
        )
        server.check()
    return _Plan(source, server, spec, settings, data, metrics, Path(args.output or _default_output(args, source)))


def _settings(plan: _Plan, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the answers depend on."""
    facts: dict[str, Any] = {"data": plan.data.digest, "questions": len(plan.data.questions)}
    if plan.server is not None:
        facts |= {"server": plan.server.url, "server_model": plan.server.model}
    elif plan.source is not None:
        facts |= {"weights": plan.source.identity(), "dtype": args.dtype}
    return facts | dataclasses.asdict(plan.settings)


def _print_data(plan: _Plan) -> None:
    names = list(dict.fromkeys(question.data_set for question in plan.data.questions))
    print(f"{len(plan.data.questions)} questions of {', '.join(names)}; metrics: "
          f"{', '.join(metric.name for metric in plan.metrics)}", flush=True)
    if plan.data.skipped_videos:
        print(f"skipped {plan.data.skipped_videos} records with videos", flush=True)
    if plan.data.skipped_records:
        print(f"skipped {plan.data.skipped_records} records that cannot be used", flush=True)


def _answer_all(plan: _Plan, args: argparse.Namespace, answers: AnswerFile) -> None:
    """Get the answers that are missing, with progress on the terminal."""
    total, started, said = len(plan.data.questions), time.perf_counter(), 0.0
    there = len(answers.answers)
    if there:
        print(f"{there} of {total} answers are there from an earlier start", flush=True)
    if there == total:
        return
    prompts = [question.prompt for question in plan.data.questions]
    missing = [number for number in range(total) if number not in answers.answers]
    if plan.server is not None:
        new = _from_server(plan.server, prompts, missing, plan.settings, args.concurrency)
    else:
        assert plan.source is not None
        new = _from_model(plan.source, prompts, missing, plan.settings, args)
    try:
        for some in new:
            answers.append(some)
            seconds = time.perf_counter() - started
            if seconds - said >= _REPORT_SECONDS or len(answers.answers) == total:
                said = seconds
                rate = (len(answers.answers) - there) / seconds
                left = (total - len(answers.answers)) / rate
                print(f"  {len(answers.answers)}/{total} answers, {rate:.1f} per s, {left:.0f} s left", flush=True)
    except UserError as error:
        raise UserError(f"{error}; {len(answers.answers)} of {total} answers are in {answers.path}, from which the "
                        "same command goes on") from error


def _from_server(
    server: Server, prompts: list[Prompt], missing: list[int], settings: GenerationSettings, concurrency: int
) -> Iterator[list[tuple[int, Answer]]]:
    for place, answer in server.answers([prompts[number] for number in missing], settings, concurrency=concurrency):
        yield [(missing[place], answer)]


def _from_model(
    source: ModelSource, prompts: list[Prompt], missing: list[int], settings: GenerationSettings,
    args: argparse.Namespace,
) -> Iterator[list[tuple[int, Answer]]]:
    """Batches of all questions, so that an answer that is drawn does not depend on where an earlier start ended."""
    planned, wanted = batches(prompts, args.batch_size), set(missing)
    generator = Generator(source.directory, device_map=args.device, dtype=args.dtype, adapter=source.adapter)
    for number, batch in enumerate(planned):
        if not wanted.isdisjoint(batch):
            found = generator.generate([prompts[one] for one in batch], settings, draw=number)
            yield [(one, answer) for one, answer in zip(batch, found, strict=True) if one in wanted]


def _default_output(args: argparse.Namespace, source: ModelSource | None) -> Path:
    """Directory of the results: ``evaluation/`` and the name of what answers."""
    if source is None:
        names = [args.server_model or "server"]
    else:
        model = Path(source.name).resolve()
        names = [model.name]
        if model.name == RELEASE or model.name.startswith("iter_") or args.adapter:
            run = model.parent.parent if model.parent.name == EXPORTS else model.parent
            names.insert(0, run.name)
    if args.adapter:
        names.append(Path(args.adapter).resolve().parent.name)
    return Path("evaluation") / "-".join("".join(c if c.isalnum() or c in "._-" else "-" for c in n) for n in names)


def run_comparison(paths: Sequence[str], *, metrics: str | None, by: str | None, output: str | None) -> None:
    """Print a comparison, and write its page.

    Args:
        paths: of the results.
        metrics: see :func:`~mindspeed_mm.evaluation.comparison.compared`.
        by: likewise.
        output: path of the page; None: no page.

    Raises:
        UserError: if results cannot be read or are of different questions, or the page cannot be written.
    """
    if output is not None:
        with writing(output):
            if Path(output).is_dir():
                raise ValueError("it is a directory; name a file, such as report.html")
            check_directory(Path(output).resolve().parent)
    comparison = compared(paths, metrics=metrics, by=by)
    print(text_table(comparison.rows))
    print("\n".join(comparison.notes))
    for name, changed in zip(comparison.names[1:], comparison.changes, strict=True):
        print(f"\n{name}, {changed.described()}")
        for kind, places in changed.kinds.items():
            for place in places[:_SHOWN]:
                first, second = comparison.answers[0][place], comparison.answers[comparison.names.index(name)][place]
                question, expected, before, after = (shorten(text, 60) for text in (
                    first["messages"][-1]["text"], first["references"][0], first["answer"], second["answer"]))
                print(f"  {kind} {place}: '{question}' expected '{expected}': '{before}' -> '{after}'")
    if output is not None:
        with writing(output):
            write_comparison(Path(output), comparison)
        print(f"\nreport: {output}")
