"""The memory estimate of a run with Muon: one moment for the matrices, two for all other parameters."""

from __future__ import annotations

import json

import pytest

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.tools.memory.__main__ import main, read_run
from mindspeed_mm.tools.memory.estimate import estimate
from mindspeed_mm.tools.memory.plan import checkpoint_bytes, units_of
from tests.helpers.published import config_30b

MUON = ["--optimizer-selection", "muon"]


@pytest.fixture
def words(tmp_path):
    """Flags of a run on a model file whose directory holds nothing but config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config_30b()))
    switches = {name: {"freeze": False} for name in ("vision_encoder", "vision_projector")}
    model = {"model_id": "qwen3_vl_moe", "init_from_hf_path": str(tmp_path), "image_encoder": switches}
    (tmp_path / "model.json").write_text(json.dumps(model))
    return ["--nproc", "16", "--mm-model", str(tmp_path / "model.json")]


def test_optimizer_state_by_hand(words):
    settings = SPEC.parameter_settings(Qwen3VLConfig.from_config(config_30b()), muon=True)
    matrices = sum(setting.size for setting in settings.values() if setting.matrices)
    others = sum(setting.size for setting in settings.values() if not setting.matrices)
    assert matrices > 0.97 * (matrices + others)
    plan, adamw = read_run([*words, *MUON])[0].plan, read_run(words)[0].plan
    names = {parameter.name for unit in units_of(plan) for parameter in unit.parameters}
    assert names == settings.keys()
    found, usual = estimate(plan), estimate(adamw)
    assert found.optimizer == pytest.approx((4 * matrices + 8 * others) / 16, rel=1e-3)
    assert usual.optimizer - found.optimizer == pytest.approx(4 * matrices / 16, rel=1e-3)
    assert usual.peak.total - found.peak.total == usual.optimizer - found.optimizer
    assert checkpoint_bytes(plan, moments=True) == 8 * matrices + 12 * others


def test_report_names_the_state_and_offers_nothing_that_muon_refuses(words, capsys):
    assert main([*words, *MUON]) in (0, 1)
    text = capsys.readouterr().out
    assert "Muon's momentum, AdamW's moments of the rest, fp32, this rank's shards" in text
    assert "offload_to_cpu" not in text and "LORA_TARGETS" not in text
    assert main([*words, "--nproc", "8", *MUON]) in (0, 1)
    assert "offload_to_cpu" not in capsys.readouterr().out
    assert main([*words, "--nproc", "8"]) in (0, 1)
    assert "offload_to_cpu" in capsys.readouterr().out
