"""The diffusion prior over latents (spec section 1.4), its parameters under the official names."""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..model import used, wide

FREQUENCIES = 128
T = 1000.0  # timesteps run from 0 (clean) to this (noise)


@dataclass
class DitConfig:
    txt_dim: int = 192
    heads: int = 3
    head_dim: int = 64
    num_layers: int = 7
    expand_ratio: int = 4
    txt_in_channels: int = 16
    rope_dim: int = 48
    block_size: int = 16
    norm_eps: float = 1e-5

    def to_dict(self):
        return asdict(self)


def rotate_pairs(x, cos, sin):
    """x [T, H, d]: pairs (2i, 2i + 1) of the first 2·cos.shape[1] channels turn, the others pass."""
    x = x.float()
    turned, rest = x[..., :2 * cos.shape[-1]], x[..., 2 * cos.shape[-1]:]
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def before_attention(x, emb, ada, ada_bias, qkv, q_norm, q_bias, k_norm, k_bias, cos, sin, rounding, heads, eps, dtype):
    """x [T, D], emb [T, D] (after SiLU) -> q, k, v [T, H, d], queries and keys normed and rotated."""
    shift, scale = (emb @ used(ada, rounding, dtype).T + ada_bias.to(dtype)).chunk(2, dim=-1)
    h = (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(dtype)
    q, k, v = (h @ used(qkv, rounding, dtype).T).unflatten(-1, (3, heads, -1)).unbind(1)
    q = F.layer_norm(q.float(), q.shape[-1:], q_norm, q_bias, eps)
    k = F.layer_norm(k.float(), k.shape[-1:], k_norm, k_bias, eps)
    return rotate_pairs(q, cos, sin).to(dtype), rotate_pairs(k, cos, sin).to(dtype), v.contiguous()


def after_attention(x, mixed, emb, out, gate_a, gate_a_bias, ada, ada_bias, up, up_bias, down, down_bias, gate_f,
                    gate_f_bias, rounding, eps):
    """x [T, D], mixed [T, H·d] -> x after attention's gated residual, and after the feed-forward's."""
    dtype = mixed.dtype
    modulate = lambda weight, bias: emb @ used(weight, rounding, dtype).T + bias.to(dtype)
    x = x + modulate(gate_a, gate_a_bias) * (mixed @ used(out, rounding, dtype).T)
    shift, scale = modulate(ada, ada_bias).chunk(2, dim=-1)
    h = (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(dtype)
    h = F.gelu(h @ used(up, rounding, dtype).T + up_bias.to(dtype), approximate="tanh")
    return x + modulate(gate_f, gate_f_bias) * (h @ used(down, rounding, dtype).T + down_bias.to(dtype))


class Freqs(nn.Module):
    """The official buffer `rope.rope.freqs`, derivable but stored."""

    def __init__(self, rope_dim):
        super().__init__()
        self.rope = nn.Module()
        self.rope.register_buffer("freqs", 1.0 / 10000.0 ** (torch.arange(0, rope_dim, 2).float() / rope_dim))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        inner = c.heads * c.head_dim
        self.proj_qkv = nn.Linear(c.txt_dim, 3 * inner, bias=False)
        self.proj_out = nn.Linear(inner, c.txt_dim, bias=False)
        self.norm_q, self.norm_k = (nn.LayerNorm(c.head_dim, c.norm_eps) for _ in range(2))
        self.rope = Freqs(c.rope_dim)


class FeedForward(nn.Module):
    def __init__(self, dim, ratio):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)


def ada_head(dim, parts):
    """SiLU and a linear layer; the SiLU is applied once for all of them."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.msa, self.mlp = Attention(c), FeedForward(c.txt_dim, c.expand_ratio)
        self.ada = nn.ModuleDict({name: ada_head(c.txt_dim, parts) for name, parts in
                                  (("msa_in", 2), ("msa_out", 1), ("mlp_in", 2), ("mlp_out", 1))})

    def before(self):
        a, ada = self.msa, self.ada["msa_in"][1]
        return (ada.weight, ada.bias, a.proj_qkv.weight, a.norm_q.weight, a.norm_q.bias, a.norm_k.weight, a.norm_k.bias)

    def after(self):
        parts = self.ada["msa_out"][1], self.ada["mlp_in"][1], self.mlp.proj_in, self.mlp.proj_out, self.ada["mlp_out"][1]
        return [self.msa.proj_out.weight, *(t for p in parts for t in (p.weight, p.bias))]


class TimestepEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj_in, self.proj_hid, self.proj_out = (nn.Linear(n, dim) for n in (2 * FREQUENCIES, dim, dim))


def sinusoid(t):
    """t [T] in 0 … 1000 -> [T, 256], sines first; formed in float32."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device) / FREQUENCIES)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def holder(name, module):
    """A module with one child, for names of two parts."""
    return nn.ModuleDict({name: module})


class Dit(nn.Module):
    """`gates`: where the gates of the residual branches start. None: every linear layer Xavier, as the official code
    does. A number: the adaptive heads' weights and the output are 0 and the gates' biases that number."""

    def __init__(self, config, compute=torch.float32, compiled=False, positions=1024, gates=1.0):
        super().__init__()
        c = self.config = config
        self.compute = compute
        self.txt_in = holder("proj", nn.Linear(c.txt_in_channels, c.txt_dim))
        self.emb_in = TimestepEmbedding(c.txt_dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.txt_out_norm = nn.LayerNorm(c.txt_dim, c.norm_eps)
        self.txt_out_ada = holder("out_in", ada_head(c.txt_dim, 2))
        self.txt_out = holder("proj", nn.Linear(c.txt_dim, c.txt_in_channels))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if gates is not None:
            heads = [(n, m) for n, m in self.named_modules() if "ada." in n and isinstance(m, nn.Linear)]
            for name, module in [*heads, ("", self.txt_out_ada["out_in"][1]), ("", self.txt_out["proj"])]:
                nn.init.zeros_(module.weight)
                if "_out." in name:
                    nn.init.constant_(module.bias, gates)
        angles = torch.arange(positions).float()[:, None] * Freqs(c.rope_dim).rope.freqs
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("rounding", torch.zeros(()), persistent=False)
        wrap = lambda body: torch.compile(body, dynamic=False) if compiled else body
        self._before, self._after = wrap(before_attention), wrap(after_attention)

    def linear(self, x, layer):
        return x.to(self.compute) @ used(layer.weight, self.rounding, self.compute).T + layer.bias.to(self.compute)

    def embed_time(self, t):
        """t [T] in 0 … 1000 -> [T, D]."""
        e = self.emb_in
        x = F.silu(self.linear(sinusoid(t), e.proj_in))
        return self.linear(F.silu(self.linear(x, e.proj_hid)), e.proj_out)

    def run(self, x, t, positions, attend, watch=None):
        """Velocities [B, n, C] of x [B, n, C]; t [B, n] in 0 … 1000, positions [n].

        attend(layer, q, k, v) over [B, H, n, d]; watch(name, layer, tensor [B, n, ...]) sees what lies between."""
        c, shape = self.config, x.shape[:2]
        at = positions.repeat(shape[0])
        cos, sin = self.cos[at], self.sin[at]
        emb = F.silu(self.embed_time(t.reshape(-1)))
        x = self.linear(x.flatten(0, 1), self.txt_in["proj"]).to(wide(self.compute))
        see = (lambda name, layer, y: watch(name, layer, y.unflatten(0, shape))) if watch else lambda *_: None
        see("hidden", -1, x)
        for i, block in enumerate(self.blocks):
            q, k, v = self._before(x, emb, *block.before(), cos, sin, self.rounding, c.heads, c.norm_eps, self.compute)
            q, k, v = (y.unflatten(0, shape).transpose(1, 2) for y in (q, k, v))
            mixed = attend(i, q, k, v).transpose(1, 2).flatten(0, 1).flatten(1, 2)
            x = self._after(x, mixed, emb, *block.after(), self.rounding, c.norm_eps)
            see("hidden", i, x)
        shift, scale = self.linear(emb, self.txt_out_ada["out_in"][1]).chunk(2, dim=-1)
        norm = self.txt_out_norm
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, c.norm_eps) * (1 + scale) + shift
        return self.linear(x, self.txt_out["proj"]).float().unflatten(0, shape)
