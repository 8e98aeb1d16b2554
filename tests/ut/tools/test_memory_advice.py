"""Settings that the memory estimate offers: followed to the letter, as a user would, they fit."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from mindspeed_mm.tools.memory import advice as module
from mindspeed_mm.tools.memory.__main__ import main, read_run
from mindspeed_mm.tools.memory.advice import advise
from mindspeed_mm.tools.memory.estimate import estimate
from mindspeed_mm.tools.memory.plan import Run
from mindspeed_mm.tools.memory.report import warning
from tests.helpers.published import published_config

ROOT = Path(__file__).resolve().parents[3]
FLAGS = {"EP": "--expert-model-parallel-size", "CP": "--context-parallel-size", "MBS": "--micro-batch-size",
         "SEQ_LEN": "--seq-length", "LORA_TARGETS": "--lora-target-modules", "LORA_R": "--lora-r",
         "LORA_ALPHA": "--lora-alpha"}  # fmt: skip
LORA = "LORA_TARGETS=all LORA_R=16 LORA_ALPHA=32"
LAUNCHER = {"NPROC": "8", "EP": "1", "CP": "1", "MBS": "1", "SEQ_LEN": "1024", "GRAD_ACC_STEP": "1",
            "RECOMPUTE_ARGS": "", "LORA_TARGETS": "", "LORA_R": "", "LORA_ALPHA": ""}  # fmt: skip


class Place:
    """The guide's files for one model, whose directory holds nothing but config.json, and the launcher's variables."""

    def __init__(self, directory: Path, model: str, *, config: dict | None = None, fsdp: dict | None = None,
                 **variables: object) -> None:  # fmt: skip
        self.directory, self.variables = directory, LAUNCHER | {name: str(v) for name, v in variables.items()}
        self.flags: list[str] = []
        content = published_config(model)
        content["text_config"].update(config or {})
        (directory / "config.json").write_text(json.dumps(content))
        self.model, self.fsdp = directory / "model.json", directory / "fsdp.yaml"
        options = json.loads((ROOT / f"examples/qwen3vl/model_{model}.json").read_text())
        self.model.write_text(json.dumps({**options, "init_from_hf_path": str(directory)}))
        fields = yaml.safe_load((ROOT / "examples/qwen3vl/fsdp2_config.yaml").read_text())
        self.fsdp.write_text(yaml.safe_dump({**fields, **(fsdp or {})}))

    def words(self) -> list[str]:
        """The memory command's, with the launcher's flags."""
        values = self.variables
        samples = int(values["MBS"]) * int(values["GRAD_ACC_STEP"]) * (int(values["NPROC"]) // int(values["CP"]))
        words = ["--nproc", values["NPROC"], "--mm-model", str(self.model), "--fsdp2-config-path", str(self.fsdp),
                 "--global-batch-size", str(samples), *shlex.split(values["RECOMPUTE_ARGS"]), *self.flags]  # fmt: skip
        return words + [word for name, flag in FLAGS.items() if values[name] for word in (flag, values[name])]

    def run(self) -> Run:
        return read_run(self.words())[0]

    def follow(self, text: str) -> None:
        """Set variables and edit files as an offer says, refusing whatever it cannot mean."""
        for part in text.split(", "):
            if ranks := re.fullmatch(r"NPUS_PER_NODE x NNODES = (\d+) devices", part):
                self.variables["NPROC"] = ranks[1]
            elif flag := re.fullmatch(r"(--moment-dtype) (\w+)", part):
                self.flags += flag.groups()
            elif fields := re.fullmatch(r"(.*: .*) in (\S+)", part):
                for field in fields[1].split(" and "):
                    self.edit(Path(fields[2]), *field.split(": "))
            else:
                for word in shlex.split(part):
                    name, value = word.split("=")
                    assert name in LAUNCHER, word
                    self.variables[name] = value

    def edit(self, file: Path, field: str, value: str) -> None:
        assert file in (self.model, self.fsdp)
        content = yaml.safe_load(file.read_text())
        *parents, last = field.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = yaml.safe_load(value)
        file.write_text(json.dumps(content) if file == self.model else yaml.safe_dump(content))


def device(words: list[str]):
    return read_run(words)[1]


CASES = {
    "the guide's recipe": {},
    "few devices": {"NPROC": 2},
    "long samples": {"SEQ_LEN": 8192},
    "long samples, several at once": {"SEQ_LEN": 8192, "MBS": 4},
    "very long samples": {"SEQ_LEN": 65536, "NPROC": 16},
    "accumulation": {"GRAD_ACC_STEP": 4, "EP": 8},
    "much recomputed already": {"SEQ_LEN": 16384, "RECOMPUTE_ARGS": "--recompute-granularity full"},
    "block recomputation": {
        "SEQ_LEN": 16384, "NPROC": 16,
        "RECOMPUTE_ARGS": "--recompute-granularity full --recompute-method block --recompute-num-layers 8",
    },
    "several copies": {"NPROC": 16, "fsdp": {"sharding_size": 8}},
    "kept after forward": {"NPROC": 16, "fsdp": {"reshard_after_forward": False, "num_to_forward_prefetch": 3}},
    "experts in the file": {"fsdp": {"expert_parallel_size": 1}, "EP": ""},
    "experts in both": {"fsdp": {"expert_parallel_size": 1}, "EP": 1},
    "96 experts on 6 ranks": {"NPROC": 6, "config": {"num_experts": 96}},
    "offloaded already": {"fsdp": {"offload_to_cpu": True}, "SEQ_LEN": 32768},
    "dense": {"model": "32B"},
    "dense, long": {"model": "8B", "SEQ_LEN": 65536},
    "235B": {"model": "235B", "NPROC": 64},
    "235B on eight": {"model": "235B"},
    "235B, long": {"model": "235B", "NPROC": 64, "SEQ_LEN": 32768},
}


@pytest.mark.parametrize("case", CASES)
def test_an_offer_followed_to_the_letter_fits(tmp_path, case):
    arguments = {"model": "30B", **CASES[case]}
    place = Place(tmp_path, **arguments)
    run = place.run()
    found = advise(run, device(place.words()))
    assert found.estimate.peak.total > 60 << 30 and found.fitting
    for offer in found.fitting:
        assert offer.fits and offer.total <= 60 << 30
        tried = Place(tmp_path, **arguments)
        tried.follow(offer.text)
        followed = tried.run()  # every check of the configuration passes
        result = estimate(followed.plan)
        assert (result.peak.total, result.host) == (offer.total, offer.host)
        samples = followed.args.global_batch_size
        assert (samples == run.args.global_batch_size) is not any("samples per step" in note for note in offer.notes)


def offers(tmp_path, **arguments) -> list[str]:
    place = Place(tmp_path, "30B", **arguments)
    return [offer.text for offer in advise(place.run(), device(place.words())).fitting]


def test_offers_for_the_guides_recipe(tmp_path):
    place = Place(tmp_path, "30B")
    assert offers(tmp_path) == [
        "EP=8", "--moment-dtype bf16", "NPUS_PER_NODE x NNODES = 16 devices", f"offload_to_cpu: true in {place.fsdp}",
        LORA,
    ]


def test_moments_in_fewer_bits_are_offered_where_they_help(tmp_path):
    place = Place(tmp_path, "30B")
    singles = {one.text: one.total for one in advise(place.run(), device(place.words())).single}
    bf16, int8 = (singles[f"--moment-dtype {dtype}"] for dtype in ("bf16", "int8"))
    before = estimate(place.run().plan).peak.total
    trained = 30.53e9 / 8
    assert before - bf16 == pytest.approx(4 * trained, rel=0.01)
    assert before - int8 == pytest.approx((8 - 2 * (1 + 4 / 256)) * trained, rel=0.01)
    # bf16 does not suffice here; and what is rounded already is not offered as something else
    words = [*place.words(), "--memory-gb", "46"]
    run, small, _ = read_run(words)
    assert [one.text for one in advise(run, small).fitting if "--moment-dtype" in one.text] == ["--moment-dtype int8"]
    place.flags = ["--moment-dtype", "int8"]
    assert not any("--moment-dtype" in one.text for one in advise(place.run(), small).single)
    offloaded = Place(tmp_path, "30B", fsdp={"offload_to_cpu": True})
    assert not any("--moment-dtype" in one.text for one in advise(offloaded.run(), small).single)


def test_expert_size_is_named_where_the_run_has_it(tmp_path):
    place = Place(tmp_path, "30B")
    in_file = f"expert_parallel_size: 8 in {place.fsdp}"
    for flag, expected in (("", in_file), (1, f"EP=8, {in_file}")):
        assert offers(tmp_path, EP=flag, fsdp={"expert_parallel_size": 1})[0] == expected


def test_ranks_and_offload_are_not_added_to_what_fits_without(tmp_path):
    found = offers(tmp_path, NPROC=16, fsdp={"reshard_after_forward": False})
    assert found[0].startswith("reshard_after_forward: true in ")
    assert not any("reshard_after_forward" in text for text in found[1:])


def test_one_change_is_preferred_and_several_are_the_fewest(tmp_path):
    # gradients of the earlier micro-batches are there while activations are
    assert offers(tmp_path, EP=8, GRAD_ACC_STEP=4)[0] == 'RECOMPUTE_ARGS="--recompute-granularity full"'
    combined = offers(tmp_path, GRAD_ACC_STEP=4)[0]
    assert combined == 'EP=8 RECOMPUTE_ARGS="--recompute-granularity full"'
    for without in combined.split(" ", 1):
        place = Place(tmp_path, "30B", GRAD_ACC_STEP=4)
        place.follow(without)
        assert estimate(place.run().plan).peak.total > 60 << 30


def test_samples_of_a_step_are_kept_and_shortened_last(tmp_path):
    place = Place(tmp_path, "235B", NPROC=64, SEQ_LEN=32768)
    first, *more = advise(place.run(), device(place.words())).fitting
    assert "CP=16" in first.text and "GRAD_ACC_STEP=16" in first.text
    assert "SEQ_LEN=16384" in first.text and "longer samples are truncated" in first.notes
    assert more and not any("SEQ_LEN" in offer.text for offer in more)


def test_warning_is_one_line_with_offers_or_none(tmp_path):
    place = Place(tmp_path, "30B")
    run, eight = place.run(), device(place.words())
    line = warning(run, eight)
    assert "62.5 GiB of 64 GiB" in line and "2.5 GiB are missing" in line and "\n" not in line
    assert "these settings fit, the fastest first: EP=8 (58.9 GiB); " in line
    assert re.search(r"offload_to_cpu: true in \S+ \(13.3 GiB, 57 GiB of host memory per rank, slow\)", line)
    tiny = device([*place.words(), "--memory-gb", "4.5"])
    assert "; no setting was found that fits. Details: " in warning(run, tiny)
    assert warning(run, device([*place.words(), "--memory-gb", "80"])) is None


def test_command_prints_the_offers_of_the_warning(tmp_path, capsys):
    words = Place(tmp_path, "30B").words()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "settings that fit, the fastest first\n  EP=8 (58.9 GiB)\n" in text
    table = text.partition("with one change")[2]
    assert re.search(r"\n  EP=8 +58\.89   fits\n", table)
    totals = [float(row) for row in re.findall(r"([\d.]+)   fits\n", table)]
    assert len(totals) == 6 and totals == sorted(totals)
    assert main([*words, "--memory-gb", "4.5"]) == 0 and "no setting was found that fits\n" in capsys.readouterr().out
    assert main([*words, "--memory-gb", "80"]) == 0
    text = capsys.readouterr().out
    assert "settings that fit" not in text and "no setting" not in text and "with one change" in text
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [setting["text"] for setting in report["settings"]][0] == "EP=8"
    assert {knob["text"] for knob in report["knobs"]} >= {"EP=8", "CP=8 GRAD_ACC_STEP=8"}


@pytest.mark.parametrize(("case", "most"), [("the guide's recipe", 20), ("235B on eight", 35), ("235B, long", 70)])
def test_few_estimates_are_made(tmp_path, monkeypatch, case, most):
    """Each takes some milliseconds, and the launcher waits for them."""
    place = Place(tmp_path, **{"model": "30B", **CASES[case]})
    count = []
    monkeypatch.setattr(module, "estimate", lambda plan: count.append(plan) or estimate(plan))
    advise(place.run(), device(place.words()))
    assert 5 < len(count) <= most
