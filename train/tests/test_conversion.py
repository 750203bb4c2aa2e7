import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_hybrid import SMALL, small_hybrid

from lacuna_train.export import coded_k, dequantize, load_model, read_config, write_checkpoint
from lacuna_train.generate import HybridGenerator
from lacuna_train.hybrid import HybridConfig
from lacuna_train.model import Decoder, ModelConfig
from lacuna_train.recipe import Clock, convert, match_norms

PARENT = ModelConfig(vocab_size=128, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=8, max_position_embeddings=256)


def write_parent(folder, config=PARENT):
    torch.manual_seed(0)
    model = Decoder(config, torch.float32)
    write_checkpoint(config, {"model." + k: v for k, v in model.state_dict().items()}, folder, int8=True)


def test_decoding_equals_running_the_whole_sequence():
    """Prompts of different lengths, beyond the window, right-padded, then a token at a time."""
    model = small_hybrid()
    prompts = [np.arange(1, 30) % 100, np.arange(7, 80) % 90]
    generator = HybridGenerator(model, torch.device("cpu"))
    generator.prefill(prompts, 9)
    replies = generator.decode(9, -1)
    assert torch.equal(replies, generator.decode(9, -1))
    for prompt, reply in zip(prompts, replies):
        ids = torch.tensor(prompt)[None]
        for token in reply:
            with torch.no_grad():
                best = model.logits(model.run(ids))[-1].argmax()
            assert best == token
            ids = torch.cat([ids, best.view(1, 1)], dim=1)


@pytest.mark.parametrize("full", [[], [3]])
def test_conversion_takes_over_the_parents_weights(tmp_path, full):
    write_parent(tmp_path)
    model = convert(tmp_path, 16, full, "spread", torch.float32)
    parent = load_model(tmp_path, torch.float32, "cpu")
    assert model.config.max_position_embeddings == (256 if full else 131072)
    assert torch.equal(model.table, parent.table) and torch.equal(model.norm.weight, parent.norm.weight)
    for ours, theirs in zip(model.layers, parent.layers):
        assert all(torch.equal(a, b) for a, b in zip(ours.attention_weights(), theirs.attention_weights()))
        assert all(torch.equal(a, b) for a, b in zip(ours.rest_weights(), theirs.rest_weights()))
    gate = model.layers[0].attn["gk_proj"]
    assert gate[1].bias.max() > 7 and (model.layers[2].attn["g_norm"].weight == 1).all()
    limit = 2 ** -2.5 * (6 / (48 + 16)) ** 0.5
    assert 0.8 * limit < gate[0].weight.abs().max() <= limit
    # The odd layers are the parent's while rows are no longer than the window.
    x = torch.randn(16, 48)
    with torch.no_grad():
        assert torch.allclose(model.run_layer(model.layers[1], x, 1, torch.arange(16)),
                              parent.run_layer(parent.layers[1], x, 1, torch.arange(16)), atol=1e-5)
    assert not convert(tmp_path, 16, full, "0", torch.float32).layers[0].attn["gk_proj"][1].bias.any()


def test_matched_norms_are_as_loud_as_the_parent(tmp_path):
    write_parent(tmp_path)
    model, parent = convert(tmp_path, 16, [], "0", torch.float32), load_model(tmp_path, torch.float32, "cpu")
    for p in parent.layers.parameters():
        p.data.mul_(3.0)  # away from the start, where everything is small
    ids = torch.randint(0, 128, (2, 60))
    match_norms(model, parent, ids)
    seen = {}
    with torch.no_grad():
        parent.run(ids, lambda i, layer, q, k, v: seen.update({i: parent.rows_attention(q, k, v, 2)}))
    for layer in model.layers:
        if layer.kind == "gla":
            weight = layer.attn["g_norm"].weight
            assert torch.allclose(weight, seen[layer.index].square().mean().sqrt().expand(8))


def test_conversion_refuses_what_is_no_parent(tmp_path):
    model = small_hybrid()
    write_checkpoint(SMALL, {"model." + k: v for k, v in model.state_dict().items()}, tmp_path, int8=True)
    with pytest.raises(ValueError, match="gla_swa already"):
        convert(tmp_path, 16, [], "0")


@pytest.mark.parametrize("int8", [True, False])
def test_export_and_back(tmp_path, int8):
    config = HybridConfig(**(SMALL.to_dict() | {"full_attention_layers": [3]}))
    model = small_hybrid(config=config)
    write_checkpoint(config, {"model." + k: v for k, v in model.state_dict().items()}, tmp_path, int8)
    assert read_config(tmp_path) == config
    back = load_model(tmp_path, torch.float32, "cpu")
    tensors = dict(back.named_parameters())
    for name, tensor in model.named_parameters():
        error = (tensors[name] - tensor).abs().max()
        exact = int8 and (tensor.ndim == 1 or "gk_proj" in name)
        assert error == 0 if exact else error < 0.01 * tensor.abs().max(), name
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "gla_swa" and written["architectures"] == ["GLAswaForCausalLM"]
    assert written["norm_eps"] == config.rms_norm_eps and written["sliding_window"] == 16 and written["hidden_act"] == "swish"
    assert written["attn_layers"] == [1, 3] and written["full_attention_layers"] == [3] and written["tie_word_embeddings"]
    assert written["window_rule"] == "exact" and ("quantization_config" in written) == int8
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.attn.gk_proj.0.weight"].dtype == (torch.float32 if int8 else torch.bfloat16)
    assert stored["model.embeddings.weight"].dtype == (torch.int8 if int8 else torch.bfloat16)
    assert ("model.layers.1.attn.q_proj.weight_scale" in stored) == int8
    assert set(dequantize(stored)) == {"model." + n for n in model.state_dict()}


def test_divergence_from_the_teacher():
    model, teacher = small_hybrid(0), small_hybrid(1)
    ids = torch.randint(0, 128, (1, 40))
    targets = ids.roll(-1, 1).reshape(-1)
    with torch.no_grad():
        x, aim = model.run(ids), teacher.run(ids)
        losses, divergence = model.losses_and_divergence(x, targets, aim, teacher)
        assert torch.allclose(losses, model.losses(x, targets), atol=1e-5)
        p, q = teacher.logits(aim).softmax(-1).double(), model.logits(x).softmax(-1).double()
        assert torch.allclose(divergence.double(), (p * (p / q).log()).sum(-1), atol=1e-4) and divergence.min() > 0
        _, none = model.losses_and_divergence(x, targets, x, model)
        assert none.abs().max() < 1e-5


def test_spiking_changes_the_coded_sites_alone():
    model = small_hybrid()
    ids = torch.randint(0, 128, (1, 50))
    with torch.no_grad():
        plain = model.run(ids)
        model.code(torch.zeros(4, 4))
        assert torch.equal(model.run(ids), plain)
        model.code(coded_k("3", SMALL, "."))
        coarse = model.run(ids)
        model.code(coded_k("300", SMALL, "."))
        fine = model.run(ids)
        model.code(None)
        assert torch.equal(model.run(ids), plain)
    size = lambda x: ((x - plain).norm() / plain.norm()).item()
    assert size(fine) < 0.02 < size(coarse)


def test_a_budget_of_tokens_ends_a_run():
    clock = Clock(300.0, 400.0, budget=1000)
    assert clock.progress(0) == 0.75 and clock.progress(900) == 0.9 and clock.progress(1000) == 1.0
