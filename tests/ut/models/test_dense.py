"""Dense Qwen3-VL, with and without tied embeddings, against ``Qwen3VLForConditionalGeneration`` in fp32 on CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.helpers.hf_model import hf_inputs, mixed_samples, tiny_model
from tests.helpers.mcore_model import model_like, relative, to_mcore

LOSS, LOGITS, GRADIENT = 1e-6, 1e-5, 1e-5


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_packed_batch_equals_hf(tied, chunk_size):
    hf_model, samples = tiny_model(dense=True, tied=tied), mixed_samples()
    count = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    hf_loss, logits = 0.0, []
    for sample in samples:
        inputs = hf_inputs(sample)
        labels = inputs.pop("labels")[0, 1:]
        predicted = hf_model(**inputs).logits[0, :-1][labels != -100]
        logits.append(predicted.detach())
        loss = F.cross_entropy(predicted, labels[labels != -100], reduction="sum") / count
        loss.backward()
        hf_loss += float(loss.detach())

    model, model_config = model_like(hf_model, ModelBuildOptions(loss_chunk_size=chunk_size))
    assert model_config.model_type == "qwen3_vl" and model_config.text.tie_word_embeddings is tied
    names = dict(model.named_parameters()).keys()
    assert ("text_decoder.output_layer.weight" in names) is not tied
    batch = collate(samples, SPEC, model_config)
    output = model(batch, torch.full((batch.num_target_tokens,), 1.0 / count))
    output.loss.backward()
    assert abs(output.loss.item() - hf_loss) <= LOSS * hf_loss
    assert output.router_load is None
    with torch.no_grad():
        assert relative(model(batch), torch.cat(logits)) <= LOGITS
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    errors = {name: relative(parameter.grad, theirs[name]) for name, parameter in model.named_parameters()}
    assert errors.keys() == theirs.keys()
    assert max(errors.values()) <= GRADIENT, sorted(errors.items(), key=lambda item: -item[1])[:3]


def test_tied_embeddings_are_in_no_unit_that_is_freed_between_their_two_uses():
    model, _ = model_like(tiny_model(dense=True, tied=True))
    in_units = {name for unit in model.parallel_plan().wrap_units for name, _ in unit.named_parameters()}
    assert not any("word_embeddings" in name for name in in_units)
    assert model.parallel_plan().wrap_units[-1] is model.text_decoder.output_layer
