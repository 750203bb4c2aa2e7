import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lacuna_train import evict
from lacuna_train.evaluate import Generator
from lacuna_train.export import dequantize, load_model, quantize_rows, write_checkpoint
from lacuna_train.model import Decoder, ModelConfig, round_rows
from lacuna_train.optim import polar_factor

try:
    import transformers
except ImportError:
    transformers = None

SMALL = ModelConfig(vocab_size=128, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=8, max_position_embeddings=256)


def small_model(seed=0):
    torch.manual_seed(seed)
    model = Decoder(SMALL, torch.float32)
    for p in model.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    return model.eval()


def hf_tensors(model):
    return {"model." + k: v for k, v in model.state_dict().items()}


def test_int8_codes_and_scales(tmp_path):
    model = small_model()
    write_checkpoint(SMALL, hf_tensors(model), tmp_path, int8=True)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in hf_tensors(model).items():
        if tensor.ndim == 1:
            assert stored[name].dtype == torch.float32 and torch.equal(stored[name], tensor)
            continue
        codes, scale = stored[name], stored[name + "_scale"]
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (tensor.shape[0],)
        assert codes.min() >= -127 and codes.abs().amax(dim=1).eq(127).all()
        assert (codes.float() * scale[:, None] - tensor).abs().max() <= 0.5001 * scale.max()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lacuna-int8", "bits": 8, "granularity": "per_row"}
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"]


def test_int8_of_int8_is_the_same(tmp_path):
    weight = torch.randn(20, 30)
    weight[3] = 0
    codes, scale = quantize_rows(weight)
    again, _ = quantize_rows(dequantize({"a.weight": codes, "a.weight_scale": scale})["a.weight"])
    assert torch.equal(codes, again)
    # Training's rounding is the export's.
    assert torch.allclose(round_rows(weight), codes.float() * scale[:, None], atol=1e-7)


def test_layout_names(tmp_path):
    write_checkpoint(SMALL, hf_tensors(small_model()), tmp_path, int8=False)
    names = set(load_file(tmp_path / "model.safetensors"))
    layer = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight",
             "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
    layer += [f"self_attn.{p}_proj.{k}" for p in "qkv" for k in ("weight", "bias")]
    wanted = {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= {f"model.layers.{i}.{n}" for i in range(SMALL.num_hidden_layers) for n in layer}
    assert names == wanted


@pytest.mark.parametrize("reference", ["own", "transformers"])
def test_logits_after_export(tmp_path, reference):
    """The exported folder gives back the model; transformers, where it is installed, computes the same logits."""
    write_checkpoint(SMALL, hf_tensors(small_model()), tmp_path, int8=False)
    model = load_model(tmp_path, torch.float32, "cpu")
    ids = torch.randint(0, SMALL.vocab_size, (2, 70))
    with torch.no_grad():
        logits = model.logits(model.run(ids)).view(2, 70, -1)
        if reference == "transformers" and transformers is not None:
            other = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        else:
            other = load_model(tmp_path, torch.float32, "cpu")
            other = other.logits(other.run(ids)).view(2, 70, -1)
    assert (logits - other).abs().max() < 2e-4


def test_a_reply_after_no_eviction_is_the_plain_forward_pass():
    model = small_model()
    ids = torch.randint(0, SMALL.vocab_size, (2, 60))
    seen = []
    with torch.no_grad():
        full = model.run(ids).view(2, 60, -1)[:, 50:]
        model.run(ids[:, :50], lambda i, l, q, k, v: seen.append((k.unflatten(0, (2, 50)), v.unflatten(0, (2, 50)))))
        keys, values = zip(*seen)
        reply = evict.reply_states(model, ids[:, 50:], 50, keys, values, [torch.zeros(2, 2, 50)] * 3).view(2, 10, -1)
    assert (reply - full).abs().max() < 1e-4


def test_decoding_equals_running_the_whole_sequence():
    """Prompts of different lengths, right-padded, then one token at a time."""
    model = small_model()
    prompts = [np.arange(1, 50) % 100, np.arange(7, 70) % 90]
    generator = Generator(model, torch.device("cpu"))
    generator.prefill(prompts, 6, True)
    replies = generator.decode(6, -1)
    for prompt, reply in zip(prompts, replies):
        ids = torch.tensor(prompt)[None]
        for token in reply:
            with torch.no_grad():
                best = model.logits(model.run(ids))[-1].argmax()
            assert best == token
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
    # A budget that holds every candidate changes nothing.
    for policy in ("snapkv", "laprox"):
        assert torch.equal(generator.decode(6, -1, policy, 1.0), replies)


def test_scores_against_the_written_out_definition():
    torch.manual_seed(0)
    n, heads, groups, d, width = 45, 4, 2, 6, 10
    q, k, v = torch.randn(1, n, heads, d), torch.randn(1, n, groups, d), torch.randn(1, n, groups, d)
    wo = torch.randn(width, heads * d)
    snap, lap = evict.window_scores(q, k, v, wo, torch.tensor([n]))
    w, m = evict.WINDOW, n - evict.WINDOW
    for g in range(groups):
        mean, product = torch.zeros(m), torch.zeros(m)
        for h in (2 * g, 2 * g + 1):
            logits = q[0, m:, h] @ k[0, :, g].T / d ** 0.5
            logits = logits.masked_fill(torch.arange(n)[None] > torch.arange(m, n)[:, None], float("-inf"))
            a = logits.softmax(-1)[:, :m]
            mean += a.mean(0) / 2
            product += a.norm(dim=0) * (v[0, :m, g] @ wo[:, h * d:(h + 1) * d].T).norm(dim=1) / 2
        pool = lambda x, size: torch.stack([x[max(0, i - size // 2):i + size // 2 + 1].sum() / size for i in range(m)])
        assert torch.allclose(snap[0, g, :m], pool(mean, 5), atol=1e-6)
        ratio = lap[0, g, :m] / pool(product, 7)
        assert torch.allclose(ratio, ratio[0].expand(m), rtol=1e-4)
    assert lap.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert not snap[..., m:].any() and not lap[..., m:].any()


def test_thresholds_keep_the_budget():
    torch.manual_seed(0)
    scores = [torch.rand(3, 2, 40) for _ in range(4)]
    keep = torch.tensor([3, 5, 9])
    kept = (scores[0] >= evict.head_threshold(scores[0], keep)).sum(-1)
    assert kept.tolist() == [[3, 3], [5, 5], [9, 9]]
    threshold = evict.model_threshold(scores, keep)
    assert sum((s >= threshold).sum((1, 2)) for s in scores).tolist() == [24, 40, 72]


def test_polar_factor_stays_bounded():
    """Also for low ranks and tiny scales, where a faster iteration would run away."""
    torch.manual_seed(0)
    for shape in ((384, 96), (96, 384), (96, 96)):
        for rank in (1, 4, 96):
            matrix = torch.randn(2, shape[0], rank) @ torch.randn(2, rank, shape[1]) * 1e-7
            assert torch.linalg.svdvals(polar_factor(matrix).float()).max() < 1.4
    assert not polar_factor(torch.zeros(1, 96, 96)).isnan().any()
