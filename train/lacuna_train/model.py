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
    """`weight` in the precision of the matrix product; `rounding` is a 0/1 scalar tensor."""
    return (weight + rounding * (round_rows(weight) - weight).detach()).to(dtype)


def rms_norm(x, weight, eps, dtype):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def rotate(x, cos, sin):
    """x [T, H, d], cos and sin [T, d/2]; the two halves of a head form the pairs."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def before_attention(x, norm, wq, bq, wk, bk, wv, bv, cos, sin, rounding, heads, groups, eps, dtype):
    """x [T, D] -> q [T, H, d], k and v [T, G, d], keys and queries rotated."""
    h = rms_norm(x, norm, eps, dtype)
    weight = torch.cat([used(w, rounding, dtype) for w in (wq, wk, wv)])
    qkv = h @ weight.T + torch.cat([bq, bk, bv]).to(dtype)
    q, k, v = qkv.split([wq.shape[0], wk.shape[0], wv.shape[0]], dim=-1)
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, heads), (k, groups), (v, groups)))
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def after_attention(x, mixed, wo, norm, wg, wu, wd, rounding, eps):
    """Output projection, residual, gated feed-forward, residual. x and mixed [T, D]."""
    dtype = mixed.dtype
    x = x + mixed @ used(wo, rounding, dtype).T
    h = rms_norm(x, norm, eps, dtype)
    gate, up = (h @ torch.cat([used(wg, rounding, dtype), used(wu, rounding, dtype)]).T).chunk(2, dim=-1)
    return x + (F.silu(gate) * up) @ used(wd, rounding, dtype).T


def token_losses(x, norm, embedding, targets, rounding, eps, dtype):
    """Cross-entropy of every token, [T]."""
    logits = rms_norm(x, norm, eps, dtype) @ used(embedding, rounding, dtype).T
    return F.cross_entropy(logits.float(), targets, reduction="none")


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c.num_attention_heads * c.head_dim
        narrow = c.num_key_value_heads * c.head_dim
        self.input_layernorm = nn.RMSNorm(c.hidden_size)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(c.hidden_size, width), "k_proj": nn.Linear(c.hidden_size, narrow),
            "v_proj": nn.Linear(c.hidden_size, narrow), "o_proj": nn.Linear(width, c.hidden_size, bias=False)})
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
            "up_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
            "down_proj": nn.Linear(c.intermediate_size, c.hidden_size, bias=False)})

    def attention_weights(self):
        a = self.self_attn
        return (self.input_layernorm.weight, a["q_proj"].weight, a["q_proj"].bias, a["k_proj"].weight,
                a["k_proj"].bias, a["v_proj"].weight, a["v_proj"].bias)

    def rest_weights(self):
        m = self.mlp
        return (self.self_attn["o_proj"].weight, self.post_attention_layernorm.weight, m["gate_proj"].weight,
                m["up_proj"].weight, m["down_proj"].weight)


class Decoder(nn.Module):
    def __init__(self, config, compute=torch.bfloat16, compiled=False):
        super().__init__()
        self.config, self.compute = config, compute
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.register_buffer("rounding", torch.zeros(()), persistent=False)
        half = config.head_dim // 2
        rates = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * rates
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for layer in self.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                nn.init.zeros_(layer.self_attn[name].bias)
            # Residual writers start small, so that depth does not grow the stream.
            for matrix in (layer.self_attn["o_proj"].weight, layer.mlp["down_proj"].weight):
                matrix.data.mul_((2 * config.num_hidden_layers) ** -0.5)
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._before, self._after, self._losses = wrap(before_attention), wrap(after_attention), wrap(token_losses)

    def embed(self, ids):
        return F.embedding(ids, used(self.embed_tokens.weight, self.rounding, torch.float32))

    def qkv(self, layer, x, positions, compiled=True):
        c = self.config
        body = self._before if compiled else before_attention
        return body(x, *layer.attention_weights(), self.cos[positions], self.sin[positions], self.rounding,
                    c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps, self.compute)

    def rest(self, layer, x, mixed, compiled=True):
        body = self._after if compiled else after_attention
        return body(x, mixed, *layer.rest_weights(), self.rounding, self.config.rms_norm_eps)

    def rows_attention(self, q, k, v, rows):
        """Causal attention within rows; q [T, H, d], k and v [T, G, d] -> [T, H·d]."""
        repeat = q.shape[1] // k.shape[1]
        q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (q, k, v))
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        # cuDNN's kernel is about 1.6 times flash attention for these shapes on Hopper.
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order if q.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def run(self, ids, watch=None, compiled=True):
        """ids [B, n] -> hidden states [B·n, D] before the last norm.

        `watch(layer_index, layer, q, k, v)` sees every layer's attention inputs.
        """
        rows, length = ids.shape
        positions = torch.arange(length, device=ids.device).repeat(rows)
        x = self.embed(ids.reshape(-1))
        for index, layer in enumerate(self.layers):
            q, k, v = self.qkv(layer, x, positions, compiled)
            if watch is not None:
                watch(index, layer, q, k, v)
            x = self.rest(layer, x, self.rows_attention(q, k, v, rows), compiled)
        return x

    def losses(self, x, targets, compiled=True):
        body = self._losses if compiled else token_losses
        return body(x, self.norm.weight, self.embed_tokens.weight, targets, self.rounding, self.config.rms_norm_eps,
                    self.compute)

    def logits(self, x):
        h = rms_norm(x, self.norm.weight, self.config.rms_norm_eps, self.compute)
        return (h @ used(self.embed_tokens.weight, self.rounding, self.compute).T).float()


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())
