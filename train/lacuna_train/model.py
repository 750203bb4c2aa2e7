"""A Qwen2-style decoder whose parameter names are those of the Hugging Face layout.

Token-wise work runs on tokens flattened to [T, D], whatever the row length, so
that one compiled body serves every length; only attention sees rows.
Parameters are float32 and matrix products run in `compute` precision; the residual
stream stays float32, or bfloat16 rounding swallows small contributions. With `rounding` on,
a matrix is used as its int8 export would be (scale per row, straight-through
gradient), so the last part of training sees the weights that ship.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .spike import ATTN_IN, DOWN_IN, MLP_IN, O_IN, SITES, sent

INT8_MAX = 127


@dataclass
class ModelConfig:
    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int = 768
    num_hidden_layers: int = 9
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 20480

    def to_dict(self):
        return asdict(self)


def round_rows(weight):
    """The matrix as int8 codes times a scale per row would give it back."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp_min(1e-12)
    return torch.round(weight / scale).clamp(-INT8_MAX, INT8_MAX) * scale


def used(weight, rounding, dtype):
    """`weight` in the precision of the matrix product; `rounding` is a 0/1 scalar tensor, or None: as it is."""
    if rounding is None:
        return weight.to(dtype)
    return (weight + rounding * (round_rows(weight) - weight).detach()).to(dtype)


def rms_norm(x, weight, eps, dtype):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def rotate(x, cos, sin):
    """x [T, H, d], cos and sin [T, d/2]; the two halves of a head form the pairs."""
    a, b = x.to(wide(x.dtype)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def project(x, norm, wq, bq, wk, bk, wv, bv, rounding, heads, groups, eps, dtype, spike):
    """x [T, D] -> the normalised input of the projections [T, D], q [T, H, d], k and v [T, G, d]."""
    h = sent(rms_norm(x, norm, eps, dtype if spike is None else wide(dtype)), spike, ATTN_IN, dtype)
    weight = torch.cat([used(w, rounding, dtype) for w in (wq, wk, wv)])
    qkv = h @ weight.T + torch.cat([bq, bk, bv]).to(dtype)
    q, k, v = qkv.split([wq.shape[0], wk.shape[0], wv.shape[0]], dim=-1)
    return h, *(t.unflatten(-1, (n, -1)) for t, n in ((q, heads), (k, groups), (v, groups)))


def before_attention(x, norm, wq, bq, wk, bk, wv, bv, cos, sin, rounding, heads, groups, eps, dtype, spike=None):
    """x [T, D] -> q [T, H, d], k and v [T, G, d], keys and queries rotated."""
    _, q, k, v = project(x, norm, wq, bq, wk, bk, wv, bv, rounding, heads, groups, eps, dtype, spike)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def after_attention(x, mixed, wo, norm, wg, wu, wd, rounding, eps, spike=None, head_norm=None):
    """Output projection, residual, gated feed-forward, residual. x and mixed [T, D].

    `head_norm` [d], where given, is the weight of an RMS norm over each head of `mixed` before the projection."""
    dtype = mixed.dtype
    inner = dtype if spike is None else wide(dtype)
    if head_norm is not None:
        mixed = rms_norm(mixed.to(wide(dtype)).unflatten(-1, (-1, head_norm.shape[0])), head_norm, eps, inner).flatten(-2)
    x = x + sent(mixed, spike, O_IN, dtype) @ used(wo, rounding, dtype).T
    h = sent(rms_norm(x, norm, eps, inner), spike, MLP_IN, dtype)
    gate, up = (h @ torch.cat([used(wg, rounding, dtype), used(wu, rounding, dtype)]).T).chunk(2, dim=-1)
    return x + sent(F.silu(gate) * up, spike, DOWN_IN, dtype) @ used(wd, rounding, dtype).T


def token_losses(x, norm, head, targets, rounding, eps, dtype):
    """Cross-entropy of every token, [T]. head [vocabulary, D]: the embedding, where the two are tied."""
    logits = rms_norm(x, norm, eps, dtype) @ used(head, rounding, dtype).T
    return F.cross_entropy(logits.float(), targets, reduction="none")


def taught_losses(x, norm, head, targets, aim, aim_norm, aim_head, rounding, eps, dtype):
    """Cross-entropy of every token, and the divergence KL(teacher || x) of its whole distribution, [T] each.

    aim [T, D]: the teacher's hidden states, before its last norm."""
    own = (rms_norm(x, norm, eps, dtype) @ used(head, rounding, dtype).T).float().log_softmax(-1)
    other = (rms_norm(aim, aim_norm, eps, dtype) @ aim_head.to(dtype).T).float().log_softmax(-1)
    return -own.gather(1, targets[:, None])[:, 0], (other.exp() * (other - own)).sum(-1)


def projections(c):
    width, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return nn.ModuleDict({
        "q_proj": nn.Linear(c.hidden_size, width), "k_proj": nn.Linear(c.hidden_size, narrow),
        "v_proj": nn.Linear(c.hidden_size, narrow), "o_proj": nn.Linear(width, c.hidden_size, bias=False)})


def feed_forward(c):
    return nn.ModuleDict({
        "gate_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
        "up_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
        "down_proj": nn.Linear(c.intermediate_size, c.hidden_size, bias=False)})


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.index = index
        self.input_layernorm = nn.RMSNorm(c.hidden_size)
        self.self_attn = projections(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size)
        self.mlp = feed_forward(c)

    @property
    def mixer(self):
        return self.self_attn

    def norms(self):
        return self.input_layernorm.weight, self.post_attention_layernorm.weight

    def head_norm(self):
        return None

    def attention_weights(self):
        a = self.mixer
        return (self.norms()[0], a["q_proj"].weight, a["q_proj"].bias, a["k_proj"].weight, a["k_proj"].bias,
                a["v_proj"].weight, a["v_proj"].bias)

    def rest_weights(self):
        m = self.mlp
        return (self.mixer["o_proj"].weight, self.norms()[1], m["gate_proj"].weight, m["up_proj"].weight,
                m["down_proj"].weight)


def rotary_table(c):
    """cos and sin of every position and pair of channels, [positions, d/2]."""
    half = c.head_dim // 2
    rates = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(c.max_position_embeddings, dtype=torch.float64)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def causal_attention(q, k, v):
    """q, k, v [B, H, n, d] -> the same."""
    # cuDNN's kernel is about 1.6 times flash attention for these shapes on Hopper.
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order if q.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Decoder(nn.Module):
    def __init__(self, config, compute=torch.bfloat16, compiled=False):
        super().__init__()
        self.config, self.compute, self.compiled = config, compute, compiled
        self.build(config)
        self.norm = nn.RMSNorm(config.hidden_size)
        self.register_buffer("rounding", torch.zeros(()), persistent=False)
        for name, table in zip(("cos", "sin"), rotary_table(config)):
            self.register_buffer(name, table, persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for layer in self.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                nn.init.zeros_(layer.mixer[name].bias)
            # Residual writers start small, so that depth does not grow the stream.
            for matrix in (layer.mixer["o_proj"].weight, layer.mlp["down_proj"].weight):
                matrix.data.mul_((2 * config.num_hidden_layers) ** -0.5)
        self._before, self._after, self._losses = map(self.wrap, (before_attention, after_attention, token_losses))
        self._taught = self.wrap(taught_losses)
        # k of every layer and site where activations are spike-coded, 0 where they go as they are.
        self.register_buffer("spike_k", torch.zeros(config.num_hidden_layers, len(SITES)), persistent=False)
        self.coded = False  # whether the bodies look at spike_k at all

    def build(self, c):
        """The embedding and the layers, under the names of their layout."""
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))

    def wrap(self, body):
        return torch.compile(body, dynamic=False) if self.compiled else body

    @property
    def table(self):
        """The embedding, [vocabulary, D]."""
        return self.embed_tokens.weight

    @property
    def head(self):
        """What hidden states become logits with, [vocabulary, D]."""
        return self.table

    def code(self, k):
        """Spike-codes activations with k [layers, 4] from now on, 0 where they go as they are; None: nowhere."""
        self.coded = k is not None
        if self.coded:
            self.spike_k.copy_(torch.as_tensor(k))

    def spike_of(self, layer):
        """k of the layer's sites [4], or None where activations are not coded."""
        return self.spike_k[layer.index] if self.coded else None

    def embed(self, ids):
        return F.embedding(ids, used(self.table, self.rounding, wide(self.compute)))

    def qkv(self, layer, x, positions, compiled=True):
        c = self.config
        body = self._before if compiled else before_attention
        return body(x, *layer.attention_weights(), self.cos[positions], self.sin[positions], self.rounding,
                    c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps, self.compute, self.spike_of(layer))

    def rest(self, layer, x, mixed, compiled=True):
        body = self._after if compiled else after_attention
        return body(x, mixed, *layer.rest_weights(), self.rounding, self.config.rms_norm_eps, self.spike_of(layer),
                    layer.head_norm())

    def rows_attention(self, q, k, v, rows):
        """Causal attention within rows; q [T, H, d], k and v [T, G, d] -> [T, H·d]."""
        repeat = q.shape[1] // k.shape[1]
        q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (q, k, v))
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        return causal_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def run_layer(self, layer, x, rows, positions, watch=None, compiled=True, inside=None):
        """x [T, D] through one layer; inside [T, 1, 1]: 0 behind a row's end, which no earlier token sees anyway."""
        q, k, v = self.qkv(layer, x, positions, compiled)
        if watch is not None:
            watch(layer.index, layer, q, k, v)
        return self.rest(layer, x, self.rows_attention(q, k, v, rows), compiled)

    def run(self, ids, watch=None, compiled=True, lengths=None):
        """ids [B, n] -> hidden states [B·n, D] before the last norm; lengths [B]: what is behind them is padding.

        `watch(layer_index, layer, q, k, v)` sees every layer's attention inputs.
        """
        rows, length = ids.shape
        column = torch.arange(length, device=ids.device)
        inside = None if lengths is None else (column < lengths[:, None]).reshape(-1, 1, 1)
        positions = column.repeat(rows)
        x = self.embed(ids.reshape(-1))
        for layer in self.layers:
            x = self.run_layer(layer, x, rows, positions, watch, compiled, inside)
        return x

    def losses(self, x, targets, compiled=True):
        body = self._losses if compiled else token_losses
        return body(x, self.norm.weight, self.head, targets, self.rounding, self.config.rms_norm_eps,
                    self.compute)

    def losses_and_divergence(self, x, targets, aim, teacher):
        return self._taught(x, self.norm.weight, self.head, targets, aim, teacher.norm.weight, teacher.head, self.rounding,
                            self.config.rms_norm_eps, self.compute)

    def logits(self, x):
        h = rms_norm(x, self.norm.weight, self.config.rms_norm_eps, self.compute)
        return (h @ used(self.head, self.rounding, self.compute).T).float()


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())
