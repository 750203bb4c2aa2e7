"""Who sees whom: block-causal attention, and the packed sequence [clean | noisy] of training.

Rules of the packed sequence (spec section 1.5), both halves at positions 0 … L - 1: a clean query sees the
clean blocks up to its own; a noisy one the clean blocks before its own and its own noisy block.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..model import causal_attention

_flex = {}  # compiled once a process


def block_causal_mask(length, block, device=None):
    """[length, length], true where the query (row) sees the key."""
    at = torch.arange(length, device=device) // block
    return at[:, None] >= at[None]


def packed_mask(length, block, device=None):
    """[2·length, 2·length] of the sequence [clean | noisy]."""
    at = torch.arange(length, device=device) // block
    earlier, same = at[:, None] > at[None], at[:, None] == at[None]
    return torch.cat([torch.cat([earlier | same, torch.zeros_like(same)], 1), torch.cat([earlier, same], 1)])


def masked(mask):
    """attend(q, k, v) over [B, H, n, d] with a mask [n, n]."""
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attend


def block_causal(length, block, device=None):
    return causal_attention if block == 1 else masked(block_causal_mask(length, block, device))


def packed_dense(length, block, device=None):
    """The packed rules by scaled-dot-product attention, in pieces of rows that leave out most of what nobody sees."""
    step = max(block, 128 // block * block)
    if length <= step or length % step:
        return masked(packed_mask(length, block, device))
    whole = packed_mask(length, block, device)
    pieces = []
    for start in range(0, length, step):
        end = start + step
        rows = torch.cat([torch.arange(start, end), torch.arange(length + start, length + end)])
        keys = torch.cat([torch.arange(end), torch.arange(length + start, length + end)])
        rows, keys = rows.to(device), keys.to(device)
        pieces.append((start, end, whole[rows][:, keys].contiguous()))

    def attend(q, k, v):
        clean, noisy = [], []
        for start, end, mask in pieces:
            own = slice(length + start, length + end)
            cut = lambda x: torch.cat([x[:, :, :end], x[:, :, own]], 2)
            rows = torch.cat([q[:, :, start:end], q[:, :, own]], 2)
            out = F.scaled_dot_product_attention(rows, cut(k), cut(v), attn_mask=mask)
            a, b = out.split(end - start, 2)
            clean.append(a)
            noisy.append(b)
        return torch.cat(clean + noisy, 2)
    return attend


def packed_flex(length, block, device, compiled=True):
    # A clean position's number is twice its block, a noisy one's twice its block plus 1; in a tensor, so that another
    # block size is no other kernel.
    at = torch.arange(length, device=device) // block * 2
    number = torch.cat([at, at + 1]).int()

    def rule(b, h, q, k):
        mine, other = number[q], number[k]
        return torch.where(other % 2 == 0, other <= mine - mine % 2 * 2, other == mine)

    mask = create_block_mask(rule, None, None, 2 * length, 2 * length, device=device)
    if compiled and "body" not in _flex:
        _flex["body"] = torch.compile(flex_attention, dynamic=False)
    body = _flex["body"] if compiled else flex_attention

    def attend(q, k, v):
        return body(q, k, v, block_mask=mask)
    return attend


def packed(length, block, device, kind="auto", shape=None, say=print):
    """attend(q, k, v) over [B, H, 2·length, d] for training. kind: flex, dense, or auto: flex on a GPU if it compiles
    and agrees with dense on random q, k, v of shape [B, H, 2·length, d] (bfloat16, with gradients)."""
    device = torch.device(device or "cpu")
    if kind == "dense" or (kind == "auto" and device.type != "cuda"):
        return packed_dense(length, block, device)
    try:
        attend = packed_flex(length, block, device, device.type == "cuda")
        if kind == "flex" or shape is None:
            return attend
        error = disagreement(attend, packed_dense(length, block, device), shape, device)
    except Exception as problem:  # a compiler's errors have no common type
        if kind == "flex":
            raise
        error = f"{type(problem).__name__}: {str(problem)[:300]}"
    if isinstance(error, float) and error < 0.05:
        return attend
    say(f"flex attention is not used for rows of {length}: {error}")
    return packed_dense(length, block, device)


def disagreement(a, b, shape, device):
    """Largest difference of outputs and gradients of two attentions, the second seen on two rows only."""
    generator = torch.Generator(device).manual_seed(1)
    rows, heads, length, d = shape
    made = [torch.randn(rows, length, heads, d, generator=generator, device=device) for _ in range(3)]
    full = [t.bfloat16().transpose(1, 2).requires_grad_() for t in made]  # laid out as in a layer
    few = [t.detach()[:2].requires_grad_() for t in full]
    out, same = a(*full), b(*few)
    out.float().square().sum().backward()
    same.float().square().sum().backward()
    pairs = [(out[:2], same), *((x.grad[:2], y.grad) for x, y in zip(full, few))]
    return max(float((x.float() - y.float()).detach().abs().max() / y.detach().float().abs().max().clamp_min(1e-6)) for x, y in pairs)


def with_history(keys, values):
    """attend(q, k, v) where every query also sees keys and values [B, H, m, d] of clean blocks before."""
    def attend(q, k, v):
        if keys is not None:
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v)
    return attend
