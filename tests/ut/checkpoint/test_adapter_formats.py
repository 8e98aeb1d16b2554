"""Forms of adapter files: each is read back as it was written, by PEFT too, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mindspeed_mm.checkpoint.adapter_formats import FORMS, form_notes, one_rank, refit, write_adapter
from mindspeed_mm.checkpoint.adapters import AdapterDirectory
from mindspeed_mm.errors import UserError
from tests.helpers.hf_model import hf_inputs, mixed_samples, tiny_model
from tests.ut.checkpoint.tiny import random_config
from tests.ut.checkpoint.tiny_adapters import PEFT_FORMS, TinyAdapters, delta, edit_config, options

FLAT = ("peft", "peft-transformers4", "vllm")
WEIGHTS = "adapter_model.safetensors"


def moe_config(seed=0, **arguments):
    return random_config(random.Random(seed), moe=True, **arguments)


def read(tiny, directory):
    return AdapterDirectory(directory, tiny.spec, tiny.model_config)


def edit(directory, change):
    """Let ``change`` work on the tensors of a directory, which have no metadata afterwards."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def rename(directory, old, new):
    edit(directory, lambda tensors: [tensors.update({key.replace(old, new): tensors.pop(key)}) for key in [*tensors]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["experts", "dense", "2I = H", "I = H", "layers 0", "rslora", "one rank"])
def test_written_and_read_back(tmp_path, form, case):
    square = {"2I = H": 2, "I = H": 1}.get(case, 0)
    config = random_config(random.Random(len(case)), moe=case != "dense", square=square)
    changes = {
        "layers 0": {"targets": ("*.layers.0.self_attn.q_proj", "*.layers.0.mlp.*", "linear_fc1")},
        "rslora": {"use_rslora": True}, "one rank": {"expert_r": 6},
    }.get(case, {})
    tiny = TinyAdapters(config, options(**changes))
    found = read(tiny, tiny.write(tmp_path / "adapter", form))
    expected = [a for a in tiny.adapters if form != "sglang" or ".visual." not in a.module]
    assert [a.module for a in found.adapters] == [a.module for a in expected]
    exact = 0
    for adapter, source in zip(found.adapters, expected, strict=True):
        ours, theirs = [tiny.factors[n] for n in source.names], [found.read(n) for n in adapter.names]
        assert [tuple(t.shape) for t in theirs] == list(adapter.shapes.values())
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in theirs)
        if form in FLAT or case == "one rank":
            assert adapter.rank == source.rank and math.isclose(adapter.scale, source.scale, rel_tol=1e-15)
        else:
            ours = refit(source, adapter, *ours)  # padding and a scale in B
        assert all(map(torch.equal, ours, theirs))
        exact += torch.equal(delta(adapter, *theirs), delta(source, *(tiny.factors[n] for n in source.names)))
        torch.testing.assert_close(delta(adapter, *theirs), delta(source, *(tiny.factors[n] for n in source.names)),
                                   rtol=1e-6, atol=1e-7)
    assert exact == len(expected) or (form not in FLAT and case == "rslora")  # the ratio 2 of ranks is exact


def test_axis_order_of_flat_experts(tmp_path):
    """The example by which the order was found out: E = 2, r = 2."""
    from mindspeed_mm.checkpoint.adapter_formats import flatten

    lora_a = torch.tensor([[[0, 3], [1, 4], [2, 5]], [[6, 9], [7, 10], [8, 11]]])
    lora_b = torch.tensor([[[100, 101], [102, 103]], [[104, 105], [106, 107]]])
    flat_a, flat_b = flatten(lora_a, lora_b)
    assert flat_a.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert flat_b.tolist() == [[100, 104, 101, 105], [102, 106, 103, 107]]


def test_config_and_metadata(tmp_path):
    tiny = TinyAdapters(moe_config(text={"decoder_sparse_step": 1, "mlp_only_layers": []}))
    directory = tiny.write(tmp_path / "adapter")
    assert json.loads((directory / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True, "r": 6, "lora_alpha": 12,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "qkv", "attn.proj", "linear_fc1", "linear_fc2"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"mlp.experts.gate_up_proj": 3, "mlp.experts.down_proj": 3},
    }
    with safe_open(directory / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", "form": "peft", "version": "1", "orientation": "canonical"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}


def test_a_module_is_named_by_as_few_words_as_tell_it_apart(tmp_path):
    tiny = TinyAdapters(moe_config(), options(targets=("merger", "model.language_model.layers.0.self_attn.q_proj")))
    for place, weights in (("exact", tiny.weights), ("brief", None)):
        (tmp_path / place).mkdir()
        write_adapter(tmp_path / place, tiny.adapters, tiny.factors.__getitem__, base="b", weights=weights)
    modules = {place: json.loads((tmp_path / place / "adapter_config.json").read_text())["target_modules"]
               for place in ("exact", "brief")}
    assert modules["exact"][:2] == ["layers.0.self_attn.q_proj", "merger.linear_fc1"]
    assert modules["brief"][:2] == ["self_attn.q_proj", "merger.linear_fc1"]


def test_rslora_is_written_as_alpha(tmp_path):
    tiny = TinyAdapters(moe_config(), options(use_rslora=True))
    content = json.loads((tiny.write(tmp_path / "adapter") / "adapter_config.json").read_text())
    assert "use_rslora" not in content
    assert content["lora_alpha"] == pytest.approx(12 * math.sqrt(6))
    assert content["alpha_pattern"]["mlp.experts.down_proj"] == pytest.approx(12 * math.sqrt(3))
    edit_config(tmp_path / "adapter", lora_alpha=12, alpha_pattern={}, use_rslora=True)
    found = read(tiny, tmp_path / "adapter")
    assert [a.scale for a in found.adapters] == pytest.approx([a.scale for a in tiny.adapters])


# --- other programs' readers, by their documented formulas ---


def vllm_experts(tensors, module, experts):
    """vLLM's 3-D experts: A [E, r, in] of rows expert-slowest, B [E, out, r] of columns expert-fastest."""
    result = {}
    for name, key in (("gate_up", f"{module}.base_layer"), ("down", module)):
        lora_a, lora_b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        rank = lora_a.shape[0] // experts
        result[name] = (
            torch.stack([lora_a[e * rank : (e + 1) * rank] for e in range(experts)]),
            torch.stack([lora_b[:, e::experts] for e in range(experts)]),
        )
    return result


def test_vllm_reads_the_same_deltas(tmp_path):
    tiny = TinyAdapters(moe_config())
    tensors = load_file(tiny.write(tmp_path / "adapter", "vllm") / WEIGHTS)
    experts = [a for a in tiny.adapters if a.is_experts]
    for gate_up, down in zip(experts[::2], experts[1::2], strict=True):
        module = "base_model.model." + gate_up.module.rpartition(".")[0]
        found = vllm_experts(tensors, module, gate_up.source[1][0])
        for adapter, (lora_a, lora_b) in ((gate_up, found["gate_up"]), (down, found["down"])):
            ours = [tiny.factors[name] for name in adapter.names]
            assert torch.equal(lora_a.transpose(1, 2), ours[0]) and torch.equal(lora_b, ours[1])


def test_sglang_reads_the_same_deltas(tmp_path):
    """One rank and one scale alpha / r, [E, r, in] and [E, out, r] under the parameter's own name."""
    tiny = TinyAdapters(moe_config())
    directory = tiny.write(tmp_path / "adapter", "sglang")
    tensors, content = load_file(directory / WEIGHTS), json.loads((directory / "adapter_config.json").read_text())
    scale, rank = content["lora_alpha"] / content["r"], content["r"]
    assert {"gate_up_proj", "down_proj", "q_proj"} <= set(content["target_modules"])
    assert not any("." in name or name == "qkv" for name in content["target_modules"])
    assert not {"rank_pattern", "alpha_pattern", "target_parameters", "use_rslora"} & content.keys()
    text = [a for a in tiny.adapters if ".visual." not in a.module]
    assert len(tensors) == 2 * len(text)
    for adapter in text:
        lora_a, lora_b = (tensors[f"base_model.model.{adapter.module}.lora_{f}.weight"] for f in "AB")
        experts, inputs, outputs = ((), *adapter.source[1][::-1]) if not adapter.is_experts else adapter.source[1]
        lead = (experts,) if adapter.is_experts else ()
        assert lora_a.shape == (*lead, rank, inputs) and lora_b.shape == (*lead, outputs, rank)
        product = lora_b @ lora_a * scale
        expected = delta(adapter, *(tiny.factors[name] for name in adapter.names))
        torch.testing.assert_close(product.mT if adapter.is_experts else product, expected, rtol=1e-5, atol=1e-7)


# --- PEFT itself ---


@pytest.fixture(scope="module", params=["experts", "dense"])
def model_and_adapters(request):
    model = tiny_model(dense=request.param == "dense").eval()
    tiny = TinyAdapters(model.config.to_dict(), size=0.15)
    inputs = hf_inputs(mixed_samples()[1])
    with torch.no_grad():
        base = model(**inputs).logits
        merged = tiny_model(dense=request.param == "dense").eval()
        state = dict(merged.named_parameters())
        for name, change in tiny.deltas().items():
            target = state[name]
            target += change.mT if target.shape != change.shape else change  # transformers 5 holds out before in
        expected = merged(**inputs).logits
    assert (expected - base).abs().max() > 0.5
    return request.param, tiny, inputs, expected


def peft_logits(directory, inputs, *, dense):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(dense=dense).eval(), str(directory))
        return model(**inputs).logits


def test_peft_computes_base_plus_delta(tmp_path, model_and_adapters):
    kind, tiny, inputs, expected = model_and_adapters
    found = peft_logits(tiny.write(tmp_path / "adapter", PEFT_FORMS[0]), inputs, dense=kind == "dense")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert (found - expected).norm() / expected.norm() < 1e-6


def test_peft_refuses_the_other_orientation(tmp_path, model_and_adapters):
    kind, tiny, inputs, _ = model_and_adapters
    if kind == "dense":
        pytest.skip("no experts")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_logits(tiny.write(tmp_path / "adapter", PEFT_FORMS[1]), inputs, dense=False)


def test_columns_of_b_with_the_expert_slowest_are_seen(tmp_path, model_and_adapters):
    kind, tiny, inputs, expected = model_and_adapters
    if kind == "dense":
        pytest.skip("no experts")
    directory, experts = tiny.write(tmp_path / "adapter", PEFT_FORMS[0]), tiny.model_config.num_experts

    def slowest(tensors):
        for key in tensors:
            if ".mlp.experts." in key and "lora_B" in key:
                tensors[key] = tensors[key].unflatten(1, (-1, experts)).transpose(1, 2).flatten(1).contiguous()

    edit(directory, slowest)
    found = peft_logits(directory, inputs, dense=False)
    assert (found - expected).norm() / expected.norm() > 0.01


# --- files of other programs ---


def test_names_of_a_state_dict_are_read(tmp_path):
    tiny = TinyAdapters(moe_config())
    directory = tiny.write(tmp_path / "adapter")
    rename(directory, ".weight", ".default.weight")
    rename(directory, "base_model.model.", "")
    found = read(tiny, directory)
    assert found.adapters == tiny.adapters
    assert all(torch.equal(found.read(name), factor) for name, factor in tiny.factors.items())


@pytest.mark.parametrize("form", ["per-expert", "sglang"])
def test_gate_and_up_with_factors_of_their_own_become_one_pair(tmp_path, form):
    """Twice the rank, A side by side and B block-diagonal, at the same scale."""
    tiny = TinyAdapters(moe_config(), options(targets=("experts",)))
    directory = tiny.write(tmp_path / "adapter", "per-expert")
    generator = torch.Generator().manual_seed(1)
    edit(directory, lambda tensors: tensors.update(
        {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items() if "up_proj" in key}))
    tensors = load_file(directory / WEIGHTS)
    experts = tiny.model_config.num_experts
    if form == "sglang":  # one tensor of all experts for each of gate and up
        stacked = {}
        for key in tensors:
            if ".experts.0." in key:
                parts = [tensors[key.replace(".experts.0.", f".experts.{e}.")] for e in range(experts)]
                stacked[key.replace(".experts.0.", ".experts.")] = torch.stack(parts)
        save_file(stacked, directory / WEIGHTS)
    found = read(tiny, directory)
    for adapter in found.adapters:
        parts = ("gate_proj", "up_proj") if adapter.key == "gate_up_proj" else ("down_proj",)
        assert adapter.rank == 3 * len(parts) and adapter.scale == 4
        module = "base_model.model." + adapter.module.rpartition(".")[0]
        expected = torch.stack([
            torch.cat([4 * tensors[f"{module}.{e}.{p}.lora_B.weight"] @ tensors[f"{module}.{e}.{p}.lora_A.weight"]
                       for p in parts]).t()
            for e in range(experts)
        ])
        torch.testing.assert_close(delta(adapter, *(found.read(n) for n in adapter.names)), expected)


def test_half_precision_is_read_as_fp32(tmp_path):
    tiny = TinyAdapters(moe_config())
    directory = tiny.write(tmp_path / "adapter")
    edit(directory, lambda tensors: tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()}))
    name = tiny.adapters[0].names[0]
    assert torch.equal(read(tiny, directory).read(name), tiny.factors[name].bfloat16().float())


def q_proj(factor):
    return f"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{factor}.weight"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config.json: peft_type is \"IA3\" and must be \"LORA\"; only LoRA"),
        ({"use_dora": True}, "use_dora is true, and DoRA scales the base weights, too; merge these adapters"),
        ({"lora_bias": True}, "lora_bias is true, and lora_bias adds to biases; merge"),
        ({"bias": "all"}, 'bias is "all", so biases were trained, too; merge these adapters with the program'),
        ({"modules_to_save": ["merger"]}, r'modules_to_save is \["merger"\], and modules that train in full have no'),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights is "pissa_niter_4", which changes the base'),
        ({"r": "8"}, 'r is "8" and must be a number above 0, at most 1e.06; save the adapters again'),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.* and must be a number above 0, at most 1e"),
        ({"r": 10**400}, "r is 1000.* and must be a number above 0, at most 1e"),
        ({"use_rslora": "false"}, 'use_rslora is "false" and must be true or false; save'),
        ({"rank_pattern": {"a{99999999999999}": 3}}, "rank_pattern has a.9+., which is no regular expression"),
        ({"rank_pattern": {"(([a-z_0-9.])+)+!": 3}}, "rank_pattern has .*, which is no regular expression: a repeated"),
        ({"rank_pattern": {"(" * 3000 + ")" * 3000: 3}}, "rank_pattern has .*, which is no regular expression"),
        ({"lora_alpha": None}, "lora_alpha is null and must be a number above 0"),
        ({"rank_pattern": [1]}, "rank_pattern is a list and must be an object"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern has \(, which is no regular expression: .*; correct it"),
        ({"r": 7, "rank_pattern": {}}, "the factors of .*q_proj have rank 6, and .*config.json says 7; restore"),
    ],
)
def test_refused_configs(tmp_path, fields, message):
    tiny = TinyAdapters(moe_config())
    edit_config(tiny.write(tmp_path / "adapter"), **fields)
    with pytest.raises(UserError, match=message):
        read(tiny, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({q_proj("A").replace("weight", "bias"): torch.zeros(1)}),
         "is not a factor lora_A or lora_B"),
        (lambda t: t.update({q_proj("A").replace("lora_A", "lora_magnitude_vector"): torch.zeros(1)}),
         "is a DoRA magnitude, so the adapters are not all that was trained; merge"),
        (lambda t: t.update({"model.visual.merger.norm.weight": torch.zeros(1)}), "merger.norm.weight is not a factor"),
        (lambda t: t.update({q_proj("A").replace("self_attn.q_proj", "mlp.gate"): torch.zeros(2, 2)}),
         "layers.0.mlp.gate is not adapted here; name the base model of these adapters, or train them again without"),
        (lambda t: t.update({"x.lora_A.weight": torch.zeros(2, 2)}), "x is no module of this model; name the base"),
        (lambda t: t.pop(q_proj("B")), "adapter_model.safetensors has no lora_B of .*q_proj; save the adapters again"),
        (lambda t: t.update({q_proj("A"): torch.zeros(6, 7)}), r"q_proj.lora_A.weight is \[6, 7\], and adapters"),
        (lambda t: t.update({q_proj("A").replace("base_model.model.", ""): torch.zeros(6, 7)}), "is there twice"),
        (lambda t: [t.pop(key) for key in [*t] if ".experts.base_layer." in key],
         "has adapters of some weights of experts and none of .*gate_up_proj; PEFT's .* adapt both"),
        (lambda t: t.clear(), "holds no adapters; save the adapters again"),
        (lambda t: [t.update({key: torch.zeros(2, 3)}) for key in t if ".experts.lora_B" in key],
         "the experts' adapters have shapes of another model, or of factors that are neither in PEFT's order; name"),
    ],
)
def test_refused_tensors(tmp_path, change, message):
    tiny = TinyAdapters(moe_config(text={"mlp_only_layers": [], "decoder_sparse_step": 1}))
    edit(tiny.write(tmp_path / "adapter"), change)
    with pytest.raises(UserError, match=message):
        read(tiny, tmp_path / "adapter")


def test_refused_files(tmp_path):
    tiny = TinyAdapters(moe_config())
    directory = tiny.write(tmp_path / "adapter")
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(UserError, match="adapter_model.safetensors is truncated"):
        read(tiny, directory)
    (directory / WEIGHTS).unlink()
    with pytest.raises(UserError, match="adapter has no adapter_model.safetensors; copy the whole directory"):
        read(tiny, directory)
    (directory / "adapter_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="adapter_model.bin is a pickle, which can run code .*; convert it to"):
        read(tiny, directory)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter has no adapter_config.json, so it is no directory of adapters"):
        read(tiny, directory)


def test_an_orientation_that_contradicts_the_file_is_refused(tmp_path):
    tiny = TinyAdapters(moe_config())
    directory = tiny.write(tmp_path / "adapter", "peft-transformers4")
    assert read(tiny, directory).experts == "swapped"
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, metadata={"orientation": "canonical"})
    with pytest.raises(UserError, match="or of factors that are not in PEFT's order"):
        read(tiny, directory)


def test_adapters_of_a_model_of_another_size_are_refused(tmp_path):
    tiny = TinyAdapters(moe_config(text={"hidden_size": 40}))
    other = TinyAdapters(moe_config(text={"hidden_size": 32}))
    with pytest.raises(UserError, match="name the base model of these adapters"):
        read(other, tiny.write(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda t: t.pop(next(k for k in t if ".experts.1.up_proj.lora_A" in k)),
         "has no lora_A of .*experts.1.up_proj"),
        (lambda t: [t.pop(k) for k in [*t] if ".layers.0.mlp.experts.1.up_proj" in k],
         "adapters of .*experts are 1 tensor missing: .*experts.1.up_proj; name the base"),
        (lambda t: t.update({k.replace("experts.1.", "experts.99."): t[k].clone() for k in [*t] if "experts.1." in k}),
         "unexpected: .*experts.99"),
    ],
)
def test_refused_tensors_of_single_experts(tmp_path, alter, message):
    tiny = TinyAdapters(moe_config(text={"mlp_only_layers": [], "decoder_sparse_step": 1}))
    edit(tiny.write(tmp_path / "adapter", "per-expert"), alter)
    with pytest.raises(UserError, match=message):
        read(tiny, tmp_path / "adapter")


def test_scales_that_differ_within_one_weight_are_refused(tmp_path):
    tiny = TinyAdapters(moe_config())
    directory = tiny.write(tmp_path / "adapter", "per-expert")
    edit_config(directory, alpha_pattern={"experts.1.gate_proj": 5})
    with pytest.raises(UserError, match="alpha_pattern differs among the experts of .*; set one lora_alpha"):
        read(tiny, directory)
    edit_config(directory, alpha_pattern={r"experts.\d.gate_proj": 5})
    with pytest.raises(UserError, match="gives .*gate_up_proj several scales, 0.833333 and 2; set one lora_alpha"):
        read(tiny, directory)


def test_notes_and_refusals_of_forms():
    tiny = TinyAdapters(moe_config())
    assert form_notes(tiny.adapters, "peft") == []
    (note,) = form_notes(tiny.adapters, "per-expert")
    assert note.startswith("PEFT ignores the experts' adapters of the form per-expert without a message")
    notes = form_notes(tiny.adapters, "vllm")
    assert notes[0] == "vLLM needs --enable-lora --max-lora-rank 8"
    assert "ignores the" in notes[1] and "--enable-tower-connector-lora" in notes[1]
    assert "are left out: SGLang does not adapt them" in form_notes(tiny.adapters, "sglang")[0]
    vision = [a for a in tiny.adapters if ".visual." in a.module]
    with pytest.raises(UserError, match="--format sglang: all adapters are of the vision tower"):
        form_notes(vision, "sglang")
    large = [dataclasses.replace(a, rank=600) for a in tiny.adapters]
    with pytest.raises(UserError, match="--format vllm: vLLM takes a rank of at most 512, and the adapters' is 600"):
        form_notes(large, "vllm")


def test_one_rank_for_all_or_for_each_kind():
    tiny = TinyAdapters(moe_config())
    for by_kind, ranks in ((False, {6}), (True, {6, 3})):
        found = one_rank(tiny.adapters, by_kind=by_kind)
        assert {a.rank for a in found} == ranks
        assert {a.scale * a.rank for a in found} == {12}
