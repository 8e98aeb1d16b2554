"""The data options by the launcher: packing at two world sizes and over a resume; bad samples with two processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.st.test_recipe import edited, logged, place, train  # noqa: F401  place is a fixture

pytestmark = pytest.mark.st


def data_json(place: Path, name: str, *, basic: dict | None = None, loader: dict | None = None) -> str:  # noqa: F811
    """A copy of the data file with some fields changed, under a name of its own."""

    def change(config: dict) -> None:
        config["dataset_param"]["basic_parameters"].update(basic or {})
        config["dataloader_param"].update(loader or {})

    return str(Path(edited(place, "data_tiny.json", change)).rename(place / f"{name}.json"))


def test_packing_at_another_world_size_and_resumed(place):  # noqa: F811
    file = data_json(place, "packing", basic={"packing": True}, loader={"drop_last": False})
    output = train(place, "packed", MM_DATA=file, MBS="1", GRAD_ACC_STEP="4")
    whole = logged(output)
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    found = re.search(r"data: 96 samples in (\d+) packs of up to 256 tokens, (\S+)% full", output)
    assert found and 24 > int(found[1]) > 6 and float(found[2]) > 85  # six steps run into the second epoch
    assert re.search(r"\| data wait: \d+\.\d% \|", output)
    assert re.search(r"s\] .*mllm_format_digits_train.json: 96 records, 96 kept whole", output)
    counted = [float(value) for value in re.findall(r"samples per iteration: (\S+) \|", output)]
    assert len(counted) == 6 and 96 <= sum(counted) <= 96 * 2 and "global batch size:     4 |" in output
    milliseconds = [float(value) for value in re.findall(r"per iteration \(ms\): (\S+) \|", output)]
    rate = 1000 * sum(counted[1:]) / sum(milliseconds[1:])  # the first iteration is warm-up
    assert float(re.search(r"Average Samples per Second: (\S+)", output)[1]) == pytest.approx(rate, rel=1e-2)
    layout = {"MM_DATA": file, "MBS": "1", "GRAD_ACC_STEP": "2", "NPUS_PER_NODE": "2", "NUM_WORKERS": "1"}
    (place / "packed/latest_checkpointed_iteration.txt").write_text("3")
    second = logged(train(place, "packed", load="packed", **layout))
    assert sorted(second) == [4, 5, 6]
    for iteration, loss in second.items():
        assert float(loss) == pytest.approx(float(whole[iteration]), rel=1e-5)


@pytest.mark.parametrize("basic", [
    pytest.param({}, id="built"),
    pytest.param({"preprocess_on_fly": True}, id="on_the_fly", marks=pytest.mark.slow),
    pytest.param({"streaming": True}, id="streaming", marks=pytest.mark.slow),
])
def test_bad_sample_stops_all_ranks_or_is_skipped(place, basic):  # noqa: F811
    layout = {"NPUS_PER_NODE": "2", "MBS": "6", "TRAIN_ITERS": "9"}  # 108 samples: more than an epoch
    stop = data_json(place, "stop", basic=basic)
    skip = data_json(place, "skip", basic=basic, loader={"on_bad_sample": "skip", "max_bad_samples": 5})
    used = re.findall(r"[^\"]+\.\w+(?=\")", (place / "data/mllm_format_digits_train.json").read_text())
    image = Path(sorted(name for name in used if "images" in name)[0])
    shutil.copy(image, place / "kept")
    image.write_bytes(image.read_bytes()[:-40])  # its size can be read, its pixels cannot
    try:
        output = train(place, "bad", status=2, MM_DATA=stop, **layout)
        (line,) = {line for line in output.splitlines() if line.startswith("error: ")}  # all processes agree
        assert image.name in line and "record" in line and "cannot be used" in line
        output = train(place, "bad", MM_DATA=skip, **layout)
        assert re.search(rf"skipped bad sample: .*record \d+.*: image .*{image.name} cannot be used", output)
        assert "bad samples skipped so far: 1 of at most 5" in output
        assert sorted(logged(output)) == list(range(1, 10))
    finally:
        shutil.copy(place / "kept", image)
