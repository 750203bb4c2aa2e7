"""Generation block by block as the engine does it (spec section 2), for many prompts of one length at a time."""
import torch

from .attention import block_causal_mask, masked, with_history
from .dit import T


class Memory:
    """Keys and values of clean blocks, a pair a layer, [B, H, n, d]."""

    def __init__(self, layers):
        self.pairs = [(None, None)] * layers

    def attend(self, keep):
        """attend(layer, q, k, v) that sees the memory and the rows themselves; keep: and appends those."""
        def attend(layer, q, k, v):
            out = with_history(*self.pairs[layer])(q, k, v)
            if keep:
                old = self.pairs[layer]
                self.pairs[layer] = (k, v) if old[0] is None else tuple(torch.cat([a, b], 2) for a, b in zip(old, (k, v)))
            return out
        return attend

    def prefill(self, mask):
        """As attend(keep=True) on an empty memory, under a mask."""
        see = masked(mask)

        def attend(layer, q, k, v):
            self.pairs[layer] = k, v
            return see(q, k, v)
        return attend


def penalise(logits, seen, penalty):
    """logits [..., V], seen [..., V] bool: positive logits of seen ids divided by the penalty, negative multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@torch.no_grad()
def generate(vae, dit, ids, new_tokens, steps=16, guidance=7.0, seed=66, penalty=1.1, noise=None,
             bf16_time=False):
    """Greedy continuations [B, at least new_tokens] of prompts ids [B, n], n of any size (0: none).

    Whole blocks are made, so the result's length is new_tokens rounded up to where a block ends.
    noise [blocks, B, block, latent], if given, is each block's start; bf16_time: the DiT sees timesteps rounded
    as the published code under autocast does."""
    bs, device = dit.config.block_size, ids.device
    rows, n = ids.shape
    z = vae.to_prior(vae.encode(ids)[0]) if n else torch.zeros(rows, 0, vae.config.latent_dim, device=device)
    start = n // bs * bs
    known = n - start
    history, decoded = Memory(dit.config.num_layers), Memory(vae.config.decoder_num_blocks)
    zero = lambda length: torch.zeros(rows, length, device=device)
    if start:
        mask = block_causal_mask(start, bs, device)
        dit.run(z[:, :start], zero(start), torch.arange(start, device=device), history.prefill(mask))
        decoded_mask = block_causal_mask(start, vae.config.block_size, device)
        vae.decode_states(z[:, :start], decoded.prefill(decoded_mask))
    generator = torch.Generator(device).manual_seed(seed)
    own = Memory(dit.config.num_layers).attend(keep=False)
    decoder_mask = masked_tail(vae.config.block_size, bs, device)
    seen = torch.zeros(rows, vae.config.vocab_size, dtype=torch.bool, device=device)
    out, block, made = [], 0, -known
    pinned = torch.arange(bs, device=device) < known
    while made < new_tokens:
        at = start + block * bs
        positions = torch.arange(at, at + bs, device=device)
        if noise is None:
            x = torch.randn(rows, bs, z.shape[-1], device=device, generator=generator)
        else:
            x = noise[block].to(device)
        pin = pinned if block == 0 and known else None
        if pin is not None:
            x[:, pin] = z[:, start:]
        scale = 1.0 if at == 0 else guidance
        for k in range(steps):
            t_now, t_next = T * (1 - k / steps), T * (1 - (k + 1) / steps)
            t = torch.full((rows, bs), t_now, device=device)
            t = t.bfloat16().float() if bf16_time else t
            if pin is not None:
                t[:, pin] = 0.0
            v = dit.run(x, t, positions, own)
            if at:
                v = v + scale * (dit.run(x, t, positions, history.attend(keep=False)) - v)
            x = x - (t_now - t_next) / T * v
            if pin is not None:
                x[:, pin] = z[:, start:]
        logits = vae.logits(vae.decode_states(x, decoded_attend(decoded, decoder_mask), at).flatten(0, 1))
        logits = logits.unflatten(0, (rows, -1))
        if penalty != 1.0:
            logits = penalise(logits, seen[:, None], penalty)
        chosen = logits.argmax(-1)
        seen.scatter_(1, chosen, True)
        out.append(chosen)
        dit.run(x, zero(bs), positions, history.attend(keep=True))
        made += bs
        block += 1
    return torch.cat(out, 1)[:, known:]


def masked_tail(block, rows, device):
    """mask_of(history): [rows, history + rows] of a decoder with `block`, whose memory ends at a multiple of it."""
    own = block_causal_mask(rows, block, device)
    return lambda past: torch.cat([torch.ones(rows, past, dtype=torch.bool, device=device), own], 1)


def decoded_attend(memory, mask_of):
    def attend(layer, q, k, v):
        old = memory.pairs[layer]
        if old[0] is not None:
            k, v = (torch.cat([a, b], 2) for a, b in zip(old, (k, v)))
        memory.pairs[layer] = k, v
        return masked(mask_of(k.shape[2] - q.shape[2]))(q, k, v)
    return attend


@torch.no_grad()
def continue_greedily(decoder, ids, new_tokens, temperature=0.0, top_p=1.0, seed=66):
    """The autoregressive model's continuations, [B, new_tokens]; temperature 0: greedy."""
    rows, n = ids.shape
    layers = decoder.layers
    cache = [None] * len(layers)
    generator = torch.Generator(ids.device).manual_seed(seed)

    def run(tokens, at):
        length = tokens.shape[1]
        positions = torch.arange(at, at + length, device=ids.device).repeat(rows)
        x = decoder.embed(tokens.flatten())
        for layer in layers:
            q, k, v = (y.unflatten(0, (rows, length)).transpose(1, 2) for y in decoder.qkv(layer, x, positions, compiled=False))
            old = cache[layer.index]
            k, v = (k, v) if old is None else (torch.cat([a, b], 2) for a, b in zip(old, (k, v)))
            cache[layer.index] = k, v
            repeat = q.shape[1] // k.shape[1]
            mask = block_causal_mask(k.shape[2], 1, ids.device)[-length:]
            mixed = masked(mask)(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
            x = decoder.rest(layer, x, mixed.transpose(1, 2).flatten(0, 1).flatten(1, 2), compiled=False)
        return decoder.logits(x.unflatten(0, (rows, length))[:, -1])

    logits, out = run(ids, 0), []
    for i in range(new_tokens):
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            shares, order = (logits / temperature).softmax(-1).sort(descending=True)
            shares[shares.cumsum(-1) - shares > top_p] = 0
            token = order.gather(1, torch.multinomial(shares, 1, generator=generator))[:, 0]
        out.append(token)
        if i + 1 < new_tokens:
            logits = run(token[:, None], n + i)
    return torch.stack(out, 1)
