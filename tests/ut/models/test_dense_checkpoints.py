"""A dense model through the recipe: converted, loaded under FSDP2, trained a step, saved, exported, loaded by HF."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState, load_checkpoint
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from tests.helpers.hf_model import hf_inputs, mixed_samples, tiny_model
from tests.helpers.mcore_model import PIXEL_NORM, relative

pytestmark = pytest.mark.usefixtures("process_group")


@torch.no_grad()
def hf_logits(model, samples):
    """[S, V] of the target positions of all samples."""
    parts = []
    for sample in samples:
        inputs = hf_inputs(sample)
        labels = inputs.pop("labels")[0, 1:]
        parts.append(model(**inputs).logits[0, :-1][labels != -100])
    return torch.cat(parts)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_converted_trained_and_exported(tmp_path, tied):
    from transformers import Qwen3VLForConditionalGeneration

    hf_model, samples = tiny_model(dense=True, tied=tied), mixed_samples()
    hf_model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    release = hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    model_config = Qwen3VLConfig.from_pretrained(tmp_path / "hf")
    assert model_config.text.tie_word_embeddings is tied

    backend = select_backend("cpu")
    with torch.device("meta"):
        model = build_model(model_config, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device="cpu")
    layout = build_layout(device_type="cpu")
    parallelize(model, layout=layout, config=FSDPConfig(param_dtype="fp32"))
    model.to_empty(device="cpu")
    model.reset_buffers()
    load_checkpoint(release, model=model, optimizer=None, backend=backend, with_rng=False)
    batch = collate(samples, SPEC, model_config)
    with torch.no_grad():
        assert relative(model(batch), hf_logits(hf_model, samples)) <= 1e-5

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens)).loss.backward()
    optimizer.step()
    state = TrainingState(model, None, backend, with_rng=False)
    CheckpointManager(state, SaveOptions(tmp_path / "save"), backend=backend).start(Progress(iteration=1))
    saved = tmp_path / "save/iter_0000001"
    with torch.no_grad():
        trained = model(batch)
    dcp_to_hf(saved, tmp_path / "out", tmp_path / "hf", dtype="keep")
    exported = Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", attn_implementation="eager", torch_dtype=torch.float32
    )
    assert (exported.lm_head.weight is exported.model.language_model.embed_tokens.weight) is tied
    assert relative(hf_logits(exported, samples), trained) <= 1e-5
    assert relative(trained, hf_logits(hf_model, samples)) > 1e-3
