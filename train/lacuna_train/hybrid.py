"""A SpikingBrain decoder (gla_swa): gated linear attention and sliding windows in turn, Hugging Face names.

Spec of SpikingBrain, section 1: even layers are linear attention without positions (ReLU on
q and k, log gates per KV head and key channel from a low-rank pair, an RMS norm per head
after it), odd layers softmax over the last `window` keys, the query's own included, with
RoPE; odd layers listed in full_attention_layers see everything. Bodies, norms, rounding and
losses are those of model.py.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import gla
from .model import Decoder, Layer, ModelConfig, causal_attention, feed_forward, project, projections, wide

GATE_GAIN = 2 ** -2.5  # of the gate's matrices, Xavier uniform (spec section 4)
HALF_LIVES = 16, 16384  # tokens: the range of `spread_bias`


@dataclass
class HybridConfig(ModelConfig):
    # Windows bound the distances that RoPE sees, so positions may go on beyond the training's.
    max_position_embeddings: int = 131072
    window: int = 512
    full_attention_layers: list = field(default_factory=list)
    gate_rank: int = 16
    gate_divisor: float = 16.0
    tied: bool = True

    def __post_init__(self):
        wrong = [i for i in self.full_attention_layers if i % 2 == 0 or not 0 <= i < self.num_hidden_layers]
        if wrong or self.window < 1:
            raise ValueError(f"full attention takes the place of a window, in odd layers below {self.num_hidden_layers}: "
                             f"not {wrong}" if wrong else f"a window of {self.window} keys")

    def kind(self, index):
        """gla, window or full."""
        if index % 2 == 0:
            return "gla"
        return "full" if index in self.full_attention_layers else "window"


def before_gla(x, norm, wq, bq, wk, bk, wv, bv, w0, w1, b1, rounding, heads, groups, divisor, eps, dtype, spike=None):
    """x [T, D] -> q [T, H, d], k and v [T, G, d], log decay [T, G, d] in float32 at least."""
    h, q, k, v = project(x, norm, wq, bq, wk, bk, wv, bv, rounding, heads, groups, eps, dtype, spike)
    low = h @ w0.to(dtype).T
    z = low.to(wide(dtype)) @ w1.T + b1
    return F.relu(q), F.relu(k), v.contiguous(), (F.logsigmoid(z) / divisor).unflatten(-1, (groups, -1))


def window_attention(q, k, v, rows, window):
    """Each query sees the last `window` keys of its row, its own included. q [T, H, d], k and v [T, G, d] -> [T, H·d].

    By blocks of `window` queries, against their own block and the one before."""
    length, repeat = q.shape[0] // rows, q.shape[1] // k.shape[1]
    blocks = -(-length // window)
    if blocks == 1:
        q, k, v = (t.unflatten(0, (rows, length)).transpose(1, 2) for t in (q, k, v))
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        return causal_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    fill = blocks * window - length
    q, k, v = (t.unflatten(0, (rows, length)) for t in (q, k, v))
    if fill:
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, fill)) for t in (q, k, v))
    q, k, v = (t.unflatten(1, (blocks, window)).transpose(2, 3) for t in (q, k, v))  # [rows, blocks, H or G, window, d]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    first = causal_attention(q[:, 0], k[:, 0], v[:, 0])
    two_k, two_v = (torch.cat([t[:, :-1], t[:, 1:]], dim=3).flatten(0, 1) for t in (k, v))
    query = torch.arange(window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)
    hidden = (key <= query) | (key > query + window)
    mask = torch.zeros(window, 2 * window, dtype=q.dtype, device=q.device).masked_fill(hidden, float("-inf"))
    order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # flash attention takes no mask
    with sdpa_kernel(order if q.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        rest = F.scaled_dot_product_attention(q[:, 1:].flatten(0, 1), two_k, two_v, attn_mask=mask)
    out = torch.cat([first[:, None], rest.unflatten(0, (rows, blocks - 1))], dim=1).transpose(2, 3).flatten(1, 2)
    return out[:, :length].flatten(0, 1).flatten(1, 2)


class HybridLayer(Layer):
    def __init__(self, c, index):
        nn.Module.__init__(self)
        self.index, self.kind = index, c.kind(index)
        self.attn_norm = nn.RMSNorm(c.hidden_size)
        self.attn = projections(c)
        if self.kind == "gla":
            narrow = c.num_key_value_heads * c.head_dim
            self.attn["gk_proj"] = nn.Sequential(nn.Linear(c.hidden_size, c.gate_rank, bias=False),
                                                 nn.Linear(c.gate_rank, narrow))
            self.attn["g_norm"] = nn.RMSNorm(c.head_dim)
        self.mlp_norm = nn.RMSNorm(c.hidden_size)
        self.mlp = feed_forward(c)

    @property
    def mixer(self):
        return self.attn

    def norms(self):
        return self.attn_norm.weight, self.mlp_norm.weight

    def head_norm(self):
        return self.attn["g_norm"].weight if self.kind == "gla" else None

    def gate_weights(self):
        down, up = self.attn["gk_proj"]
        return down.weight, up.weight, up.bias


def spread_bias(c):
    """Gate biases [G·d] whose half-lives, at z = bias, range log-uniformly over HALF_LIVES.

    sigmoid(b)^(1/divisor) halves in h tokens where sigmoid(b) = 2^(-divisor/h). The longest lives
    go to the channels whose rotary pair turned slowest in the parent: they hold what a key is
    rather than where it stands. The two halves of a head are the pairs, so they are alike.
    """
    half = c.head_dim // 2
    share = torch.arange(half, dtype=torch.float64) / max(1, half - 1)
    lives = HALF_LIVES[0] * (HALF_LIVES[1] / HALF_LIVES[0]) ** share
    open_share = 2.0 ** (-c.gate_divisor / lives)
    return torch.log(open_share / (1 - open_share)).float().repeat(2 * c.num_key_value_heads)


class Hybrid(Decoder):
    def __init__(self, config, compute=torch.bfloat16, compiled=False):
        super().__init__(config, compute, compiled)
        for layer in self.layers:
            if layer.kind == "gla":
                for part in layer.attn["gk_proj"]:
                    nn.init.xavier_uniform_(part.weight, gain=GATE_GAIN)
                nn.init.zeros_(layer.attn["gk_proj"][1].bias)
        self._gla, self._terms = self.wrap(before_gla), self.wrap(gla.chunk_terms)

    def build(self, c):
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(HybridLayer(c, i) for i in range(c.num_hidden_layers))
        self.lm_head = None if c.tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    @property
    def table(self):
        return self.embeddings.weight

    @property
    def head(self):
        return self.table if self.lm_head is None else self.lm_head.weight

    def gla_inputs(self, layer, x, compiled=True):
        c = self.config
        body = self._gla if compiled else before_gla
        return body(x, *layer.attention_weights(), *layer.gate_weights(), self.rounding, c.num_attention_heads,
                    c.num_key_value_heads, c.gate_divisor, c.rms_norm_eps, self.compute, self.spike_of(layer))

    def run_layer(self, layer, x, rows, positions, watch=None, compiled=True, inside=None):
        """x [T, D] through one layer. `watch` is told (index, layer, q, k, v), or (index, layer, state) of a linear layer.

        inside [T, 1, 1]: 0 for the padding behind a row's end, which then leaves a state as it was."""
        if layer.kind == "gla":
            q, k, v, g = self.gla_inputs(layer, x, compiled)
            if inside is not None:
                k, g = k * inside.to(k.dtype), g * inside
            mixed, state = gla.chunked(q, k, v, g, rows, terms=self._terms if compiled else gla.chunk_terms)
            mixed, seen = mixed.flatten(1, 2), (state,)
        else:
            seen = q, k, v = self.qkv(layer, x, positions, compiled)
            if layer.kind == "full":
                mixed = self.rows_attention(q, k, v, rows)
            else:
                mixed = window_attention(q, k, v, rows, self.config.window)
        if watch is not None:
            watch(layer.index, layer, *seen)
        return self.rest(layer, x, mixed, compiled)
