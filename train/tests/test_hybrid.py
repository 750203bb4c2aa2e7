import numpy as np
import pytest
import torch

from lacuna_train import gla
from lacuna_train.hybrid import HALF_LIVES, Hybrid, HybridConfig, spread_bias, window_attention

SMALL = HybridConfig(vocab_size=128, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=8, max_position_embeddings=512, window=16, gate_rank=4)


def small_hybrid(seed=0, config=SMALL):
    torch.manual_seed(seed)
    model = Hybrid(config, torch.float32)
    for p in model.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    return model.eval()


def recurrence(q, k, v, g, rows, state):
    """Token by token, straight from the definition."""
    length, repeat, d = q.shape[0] // rows, q.shape[1] // k.shape[1], q.shape[2]
    out, ends = [], []
    for row in range(rows):
        s = state[row]
        for t in range(row * length, (row + 1) * length):
            s = g[t].exp()[:, :, None] * s + torch.einsum("gc,gd->gcd", k[t], v[t])
            out.append(torch.einsum("grc,gcd->grd", q[t].unflatten(0, (-1, repeat)), s).flatten(0, 1) * d ** -0.5)
        ends.append(s)
    return torch.stack(out), torch.stack(ends)


def draw(rows, length, strength, heads=6, groups=2, d=8):
    torch.manual_seed(length)
    make = lambda n, scale=1.0: torch.randn(rows * length, n, d, dtype=torch.float64) * scale
    g = -strength * torch.rand(rows * length, groups, d, dtype=torch.float64)
    state = torch.randn(rows, groups, d, d, dtype=torch.float64)
    return [t.requires_grad_() for t in (make(heads).relu(), make(groups).relu(), make(groups), g, state)]


@pytest.mark.parametrize("rows, length, strength", [(2, 150, 1.0), (1, 64, 4.0), (1, 130, 9.9), (3, 7, 0.01)])
def test_chunks_against_the_recurrence(rows, length, strength):
    """Values, end states and all gradients in float64; float32 stays close, and finite where decay is extreme."""
    inputs = draw(rows, length, strength)
    out, ends = gla.chunked(*inputs[:4], rows, inputs[4])
    want, want_ends = recurrence(*inputs[:4], rows, inputs[4])
    weights = torch.randn_like(out), torch.randn_like(ends)
    loss = lambda a, b: (a * weights[0]).sum() + (b * weights[1]).sum()
    for ours, theirs in zip((out, ends, *torch.autograd.grad(loss(out, ends), inputs)),
                            (want, want_ends, *torch.autograd.grad(loss(want, want_ends), inputs))):
        assert (ours - theirs).abs().max() < 1e-11 * max(1.0, theirs.abs().max())
    single = [t.detach().float().requires_grad_() for t in inputs]
    close, _ = gla.chunked(*single[:4], rows, single[4])
    assert (close - want).abs().max() < 1e-5 * want.abs().max()
    close.sum().backward()
    assert all(t.grad.isfinite().all() for t in single)


def test_decay_beyond_what_a_factor_can_hold():
    """Stronger than exp(-10) in one token: nothing overflows and the past is as good as gone."""
    q, k, v, g, _ = (t.detach().float() for t in draw(1, 96, 1.0))
    g = torch.full_like(g, -40.0)
    out, _ = gla.chunked(q, k, v, g, 1)
    alone = torch.einsum("tgrc,tgc->tgr", q.unflatten(1, (2, 3)), k)[..., None] * v[:, :, None] * 8 ** -0.5
    assert out.isfinite().all() and (out - alone.flatten(1, 2)).abs().max() < 1e-3 * alone.abs().max()


def test_spans_of_chunks(monkeypatch):
    """A row of more chunks than one matrix of decays holds."""
    inputs = [t.detach() for t in draw(2, 64 * 7, 0.05)]
    whole, end = gla.chunked(*inputs[:4], 2, inputs[4])
    monkeypatch.setattr(gla, "SPAN", 3)
    parts, part_end = gla.chunked(*inputs[:4], 2, inputs[4])
    assert torch.allclose(whole, parts, atol=1e-11) and torch.allclose(end, part_end, atol=1e-11)


def test_a_state_goes_on_where_a_prompt_ended():
    q, k, v, g, state = (t.detach() for t in draw(1, 100, 0.3))
    whole, end = gla.chunked(q, k, v, g, 1, state)
    first, middle = gla.chunked(q[:70], k[:70], v[:70], g[:70], 1, state)
    out = [first]
    for t in range(70, 100):
        token, middle = gla.one_token(q[t:t + 1], k[t:t + 1], v[t:t + 1], g[t:t + 1], middle)
        out.append(token)
    assert torch.allclose(torch.cat(out), whole, atol=1e-12) and torch.allclose(middle, end, atol=1e-12)


@pytest.mark.parametrize("rows, length, window", [(2, 50, 16), (1, 64, 16), (3, 9, 16), (2, 20, 3)])
def test_window_attention(rows, length, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows * length, n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 2, 2))
    out = window_attention(q, k, v, rows, window)
    column = torch.arange(length)
    seen = (column[None] <= column[:, None]) & (column[None] > column[:, None] - window)
    assert seen.sum(1).max() == min(window, length)
    rq, rk, rv = (t.unflatten(0, (rows, length)).transpose(1, 2) for t in (q, k, v))
    rk, rv = rk.repeat_interleave(3, 1), rv.repeat_interleave(3, 1)
    weights = (rq @ rk.mT * 8 ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    want = (weights @ rv).transpose(1, 2).reshape(rows * length, -1)
    assert torch.allclose(out, want, atol=1e-12)
    pull = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad((out * pull).sum(), (q, k, v)),
                            torch.autograd.grad((want * pull).sum(), (q, k, v))):
        assert torch.allclose(ours, theirs, atol=1e-11)


def test_padding_leaves_states_and_outputs_alone():
    model = small_hybrid()
    ids = torch.randint(0, 128, (2, 90))
    lengths = torch.tensor([90, 37])
    states, short = [], []
    with torch.no_grad():
        out = model.run(ids, lambda i, layer, *seen: states.append(seen[0]) if len(seen) == 1 else None, lengths=lengths)
        alone = model.run(ids[1:, :37], lambda i, layer, *seen: short.append(seen[0]) if len(seen) == 1 else None)
    assert (out.view(2, 90, -1)[1, :37] - alone).abs().max() < 1e-4
    assert len(states) == 2 and all((a[1] - b[0]).abs().max() < 1e-4 for a, b in zip(states, short))


def test_full_attention_in_place_of_a_window():
    torch.manual_seed(0)
    config = HybridConfig(**(SMALL.to_dict() | {"full_attention_layers": [3]}))
    model = small_hybrid(config=config)
    assert [layer.kind for layer in model.layers] == ["gla", "window", "gla", "full"]
    ids = torch.randint(0, 128, (1, 60))
    with torch.no_grad():
        full = model.run(ids)
        model.layers[3].kind = "window"
        cut = model.run(ids)
    assert (full[:16] - cut[:16]).abs().max() < 1e-5 and (full[17:] - cut[17:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="odd layers"):
        HybridConfig(**(SMALL.to_dict() | {"full_attention_layers": [2]}))


def test_spread_bias_gives_the_half_lives():
    bias = spread_bias(SMALL).double().view(2, 2, 4)  # KV heads, halves of a head, pairs
    per_token = torch.sigmoid(bias) ** (1 / SMALL.gate_divisor)
    lives = np.log(0.5) / per_token.log().numpy()
    assert np.allclose(lives, np.geomspace(*HALF_LIVES, 4)[None, None], rtol=1e-3)
