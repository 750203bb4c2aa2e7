"""The text VAE (spec section 1.3), its parameters under the official names.

As in model.py, token-wise bodies run on [T, D] so that one compiled body serves every row length; parameters and the
residual stream are float32, products run in `compute` precision, and `rounding` uses matrices as int8 would.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..model import used, wide
from .attention import block_causal

LOGVAR_RANGE = -30.0, 20.0


@dataclass
class VaeConfig:
    vocab_size: int = 4096
    dim: int = 128
    ffn_dim: int = 256
    num_heads: int = 4
    encoder_num_blocks: int = 2
    decoder_num_blocks: int = 2
    latent_dim: int = 16
    patch_size: int = 1
    block_size: int = 1
    layer_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    scaling_factor: float = 1.0
    shifting_factor: float = 0.0

    def to_dict(self):
        return asdict(self)

    @property
    def mask_id(self):
        """The embedding's last row, which stands for a masked token."""
        return self.vocab_size


def half_split_table(positions, head_dim, theta):
    """cos and sin [positions, head_dim / 2]; formed in float32 as the official code does."""
    rates = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.arange(positions).float()[:, None] * rates
    return angles.cos(), angles.sin()


def rotate_halves(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def before_attention(x, qkv, q_norm, q_bias, k_norm, k_bias, cos, sin, rounding, heads, eps, dtype):
    """x [T, D] -> q, k, v [T, H, d]; queries and keys normed over the whole vector, then rotated."""
    q, k, v = (x.to(dtype) @ used(qkv, rounding, dtype).T).chunk(3, dim=-1)
    q = F.layer_norm(q.float(), q.shape[-1:], q_norm, q_bias, eps)
    k = F.layer_norm(k.float(), k.shape[-1:], k_norm, k_bias, eps)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    return rotate_halves(q, cos, sin).to(dtype), rotate_halves(k, cos, sin).to(dtype), v.contiguous()


def after_attention(x, mixed, out, out_bias, norm_a, bias_a, proj, proj_bias, down, down_bias, norm_f, bias_f, rounding, eps):
    """x, mixed [T, D]: the norm of attention is on the skip branch, that of the feed-forward on its output."""
    dtype = mixed.dtype
    a = mixed @ used(out, rounding, dtype).T + out_bias.to(dtype)
    x = F.layer_norm(x, x.shape[-1:], norm_a, bias_a, eps) + a
    value, gate = (x.to(dtype) @ used(proj, rounding, dtype).T + proj_bias.to(dtype)).chunk(2, dim=-1)
    h = (F.silu(gate) * value) @ used(down, rounding, dtype).T + down_bias.to(dtype)
    return x + F.layer_norm(h.float(), h.shape[-1:], norm_f, bias_f, eps)


def reconstruction_losses(x, norm, norm_bias, head, head_bias, targets, rounding, eps, dtype):
    """Cross-entropy [T] of decoder states x [T, D]."""
    logits = decoder_logits(x, norm, norm_bias, head, head_bias, rounding, eps, dtype)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def decoder_logits(x, norm, norm_bias, head, head_bias, rounding, eps, dtype):
    h = F.layer_norm(x, x.shape[-1:], norm, norm_bias, eps).to(dtype)
    return h @ used(head, rounding, dtype).T + head_bias.to(dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        norm = lambda: nn.LayerNorm(c.dim, c.layer_norm_eps)
        self.norm_attn, self.q_norm, self.k_norm, self.norm_ffn = norm(), norm(), norm(), norm()
        self.qkv_proj = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.attn_out_proj = nn.Linear(c.dim, c.dim)
        self.ffn_proj = nn.Linear(c.dim, c.ffn_dim)
        self.ffn_out = nn.Linear(c.ffn_dim // 2, c.dim)

    def before(self):
        return (self.qkv_proj.weight, self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias)

    def after(self):
        parts = self.attn_out_proj, self.norm_attn, self.ffn_proj, self.ffn_out, self.norm_ffn
        return [t for p in parts for t in (p.weight, p.bias)]


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size + 1, c.dim)
        self.patch_embedder = nn.Conv1d(c.dim, c.dim, c.patch_size, c.patch_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.encoder_num_blocks))
        self.final_layer = nn.Linear(c.dim, 2 * c.latent_dim)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.in_layer = nn.Linear(c.latent_dim, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.decoder_num_blocks))
        self.unpatch_layer = nn.Linear(c.dim, c.patch_size * c.dim)
        self.final_norm = nn.LayerNorm(c.dim, c.layer_norm_eps)
        self.final_layer = nn.Linear(c.dim, c.vocab_size)


class TextVae(nn.Module):
    def __init__(self, config, compute=torch.float32, compiled=False, positions=1024):
        super().__init__()
        c = self.config = config
        self.compute, self.compiled = compute, compiled
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        for name, table in zip(("cos", "sin"), half_split_table(positions, c.dim // c.num_heads, c.rope_theta)):
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("rounding", torch.zeros(()), persistent=False)
        for module in self.modules():  # as the official config says: normal, 0.02, cut at 3 deviations
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        wrap = lambda body: torch.compile(body, dynamic=False) if compiled else body
        self._before, self._after = wrap(before_attention), wrap(after_attention)
        self._losses = wrap(reconstruction_losses)

    def linear(self, x, layer):
        return x.to(self.compute) @ used(layer.weight, self.rounding, self.compute).T + layer.bias.to(self.compute)

    def run(self, x, blocks, attend, start=0, watch=None):
        """x [B, n, D] at positions start … through blocks; attend(index, q, k, v) over [B, H, n, d]."""
        c, (rows, n) = self.config, x.shape[:2]
        at = torch.arange(start, start + n, device=x.device).repeat(rows)
        cos, sin = self.cos[at], self.sin[at]
        x = x.flatten(0, 1).to(wide(self.compute))
        for i, block in enumerate(blocks):
            q, k, v = self._before(x, *block.before(), cos, sin, self.rounding, c.num_heads, c.layer_norm_eps, self.compute)
            q, k, v = (t.unflatten(0, (rows, n)).transpose(1, 2) for t in (q, k, v))
            mixed = attend(i, q, k, v).transpose(1, 2).flatten(0, 1).flatten(1, 2)
            x = self._after(x, mixed, *block.after(), self.rounding, c.layer_norm_eps)
            if watch is not None:
                watch(i, x.unflatten(0, (rows, n)))
        return x.unflatten(0, (rows, n))

    def whole(self, n, device):
        attend = block_causal(n, self.config.block_size, device)
        return lambda _, q, k, v: attend(q, k, v)

    def encode(self, ids, watch=None):
        """ids [B, n], n a multiple of the patch -> mean and logvar of the posterior, [B, n / patch, latent]."""
        c = self.config
        table = used(self.encoder.wte.weight, self.rounding, wide(self.compute))
        x = F.embedding(ids, table).to(self.compute)
        x = x.unflatten(1, (-1, c.patch_size)).transpose(2, 3).flatten(2)  # channel-major, as the convolution's weight
        conv = self.encoder.patch_embedder
        weight = used(conv.weight.flatten(1), self.rounding, self.compute)
        x = x @ weight.T + conv.bias.to(self.compute)
        x = self.run(x, self.encoder.blocks, self.whole(x.shape[1], x.device), watch=watch)
        mean, logvar = self.linear(x, self.encoder.final_layer).float().chunk(2, dim=-1)
        return F.layer_norm(mean, mean.shape[-1:], eps=1e-6), logvar.clamp(*LOGVAR_RANGE)

    def decode_states(self, z, attend=None, start=0, watch=None):
        """z [B, m, latent] -> states [B, m · patch, D] that the final norm and head make logits of."""
        x = self.linear(z, self.decoder.in_layer)
        x = self.run(x, self.decoder.blocks, attend or self.whole(x.shape[1], x.device), start, watch)
        x = self.linear(x, self.decoder.unpatch_layer).to(wide(self.compute))
        return x.unflatten(-1, (-1, self.config.patch_size)).transpose(2, 3).flatten(1, 2)

    def head(self):
        d = self.decoder
        return d.final_norm.weight, d.final_norm.bias, d.final_layer.weight, d.final_layer.bias

    def logits(self, states):
        return decoder_logits(states, *self.head(), self.rounding, self.config.layer_norm_eps, self.compute).float()

    def losses(self, states, targets):
        """Cross-entropy of every token, [T]; states [T, D]."""
        return self._losses(states, *self.head(), targets, self.rounding, self.config.layer_norm_eps, self.compute)

    def to_prior(self, z):
        return (z - self.config.shifting_factor) * self.config.scaling_factor
