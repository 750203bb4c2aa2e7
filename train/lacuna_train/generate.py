"""Greedy replies to prompts of different lengths: one prefill together, then token by token."""
import torch

from . import evict, gla
from .tokenizer import EOS_ID

PREFILL_TOKENS = 1 << 18  # a chunk of prompts read at once; bounds the activations' memory


def batches(prompts, width, device):
    """Parts of the prompts, right-padded, that fit in memory at once: (their slice, ids [B, width])."""
    step = max(1, PREFILL_TOKENS // width)
    for start in range(0, len(prompts), step):
        part = prompts[start:start + step]
        ids = torch.full((len(part), width), EOS_ID, dtype=torch.long)
        for i, p in enumerate(part):
            ids[i, :len(p)] = torch.from_numpy(p)
        yield slice(start, start + len(part)), ids.to(device)


class Generator:
    """Prompts of one cell, prefilled together, then decoded under several policies."""

    def __init__(self, model, device):
        self.model, self.device = model, device

    @torch.no_grad()
    def prefill(self, prompts, new_tokens, scored):
        m, c = self.model, self.model.config
        self.lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.width = int(self.lengths.max())
        rows = len(prompts)
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, self.width + new_tokens, c.head_dim)
        self.keys = torch.zeros(shape, dtype=m.compute, device=self.device)
        self.values = torch.zeros_like(self.keys)
        names = ("snapkv", "laprox") if scored else ()
        collected = {name: [[] for _ in range(c.num_hidden_layers)] for name in names}
        first = []
        for part, ids in batches(prompts, self.width, self.device):
            lengths = self.lengths[part]

            def watch(index, layer, q, k, v):
                q, k, v = (t.unflatten(0, ids.shape) for t in (q, k, v))
                self.keys[index, part, :, :self.width] = k.transpose(1, 2)
                self.values[index, part, :, :self.width] = v.transpose(1, 2)
                if scored:
                    both = evict.window_scores(q, k, v, layer.self_attn["o_proj"].weight, lengths)
                    for name, s in zip(names, both):
                        collected[name][index].append(s)

            x = m.run(ids, watch, compiled=False).view(*ids.shape, -1)
            first.append(m.logits(x[torch.arange(len(ids)), lengths - 1]).argmax(-1))
        self.first = torch.cat(first)
        self.scores = {name: [torch.cat(s) for s in layers] for name, layers in collected.items()}

    def visible(self, policy, share):
        """Per layer, the prompt entries a reply may see, [B, G, width]."""
        c = self.model.config
        column = torch.arange(self.width, device=self.device)[None]
        prompt = (column < self.lengths[:, None])[:, None].expand(-1, c.num_key_value_heads, -1)
        if policy == "full":
            return [prompt] * c.num_hidden_layers
        window = prompt & (column >= (self.lengths - evict.WINDOW)[:, None])[:, None]
        keep = evict.kept_per_head(self.lengths, share)
        layers = self.scores[policy]
        if policy == "laprox":
            thresholds = [evict.model_threshold(layers, keep)] * len(layers)
        else:
            thresholds = [evict.head_threshold(s, keep) for s in layers]
        return [window | (prompt & (s >= t) & (s > 0)) for s, t in zip(layers, thresholds)]

    @torch.no_grad()
    def decode(self, new_tokens, newline, policy="full", share=1.0):
        """Greedy replies, [B, new_tokens]."""
        m, c = self.model, self.model.config
        groups, repeat, d = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim
        rows = len(self.lengths)
        total = self.keys.shape[3]
        masks = []
        for seen in self.visible(policy, share):
            mask = torch.full((rows, groups, 1, total), float("-inf"), device=self.device)
            mask[..., :self.width].masked_fill_(seen[:, :, None], 0.0)
            masks.append(mask)
        token, out = self.first, [self.first]
        done = (token == newline) | (token == EOS_ID)
        for step in range(new_tokens - 1):
            if bool(done.all()):
                break
            x = m.embed(token)
            at = self.width + step
            for index, layer in enumerate(m.layers):
                q, k, v = m.qkv(layer, x, self.lengths + step, compiled=False)
                self.keys[index, :, :, at], self.values[index, :, :, at] = k, v
                masks[index][..., at] = 0.0
                q = q.view(rows, groups, repeat, d)
                end = at + 1
                logits = (q @ self.keys[index, :, :, :end].mT).float() * d ** -0.5 + masks[index][..., :end]
                mixed = logits.softmax(-1).to(m.compute) @ self.values[index, :, :, :end]
                x = m.rest(layer, x, mixed.reshape(rows, -1), compiled=False)
            token = m.logits(x).argmax(-1)
            out.append(token)
            done |= (token == newline) | (token == EOS_ID)
        return torch.stack(out, dim=1)


class HybridGenerator:
    """The same of a gla_swa model: states instead of a cache in linear layers, a window of it in the others."""

    def __init__(self, model, device):
        self.model, self.device = model, device

    @torch.no_grad()
    def prefill(self, prompts, new_tokens, scored=False):
        m, c = self.model, self.model.config
        self.lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.width = int(self.lengths.max())
        shape = (len(prompts), c.num_key_value_heads, self.width + new_tokens, c.head_dim)
        softmax = [layer.index for layer in m.layers if layer.kind != "gla"]
        self.keys = {i: torch.zeros(shape, dtype=m.compute, device=self.device) for i in softmax}
        self.values = {i: torch.zeros_like(k) for i, k in self.keys.items()}
        states, first = {}, []
        for part, ids in batches(prompts, self.width, self.device):
            def watch(index, layer, *seen):
                if layer.kind == "gla":
                    states.setdefault(index, []).append(seen[0])
                    return
                for store, t in zip((self.keys, self.values), seen[1:]):
                    store[index][part, :, :self.width] = t.unflatten(0, ids.shape).transpose(1, 2)

            x = m.run(ids, watch, compiled=False, lengths=self.lengths[part]).view(*ids.shape, -1)
            first.append(m.logits(x[torch.arange(len(ids)), self.lengths[part] - 1]).argmax(-1))
        self.first = torch.cat(first)
        self.states = {i: torch.cat(s) for i, s in states.items()}

    def masks(self, step):
        """Additive masks over the columns up to this step's, [B, 1, 1, columns]: all of the row, and the window."""
        column = torch.arange(self.width + step + 1, device=self.device)[None]
        lengths = self.lengths[:, None]
        position = torch.where(column < self.width, column, lengths + column - self.width)
        seen = (column < lengths) | (column >= self.width)
        near = seen & (position > lengths + step - self.model.config.window)
        return {kind: torch.zeros(s.shape, device=self.device).masked_fill(~s, float("-inf"))[:, None, None]
                for kind, s in (("full", seen), ("window", near))}

    def attend(self, layer, x, step, masks):
        m, c = self.model, self.model.config
        q, k, v = m.qkv(layer, x, self.lengths + step, compiled=False)
        keys, values, end = self.keys[layer.index], self.values[layer.index], self.width + step + 1
        keys[:, :, end - 1], values[:, :, end - 1] = k, v
        q = q.unflatten(1, (c.num_key_value_heads, -1))
        logits = (q @ keys[:, :, :end].mT).float() * c.head_dim ** -0.5 + masks[layer.kind]
        return (logits.softmax(-1).to(m.compute) @ values[:, :, :end]).flatten(1)

    @torch.no_grad()
    def decode(self, new_tokens, newline, policy="full", share=1.0):
        """Greedy replies, [B, new_tokens]."""
        m = self.model
        states = dict(self.states)
        token, out = self.first, [self.first]
        done = (token == newline) | (token == EOS_ID)
        for step in range(new_tokens - 1):
            if bool(done.all()):
                break
            x = m.embed(token)
            masks = self.masks(step)
            for layer in m.layers:
                if layer.kind == "gla":
                    mixed, states[layer.index] = gla.one_token(*m.gla_inputs(layer, x, compiled=False), states[layer.index])
                    mixed = mixed.flatten(1)
                else:
                    mixed = self.attend(layer, x, step, masks)
                x = m.rest(layer, x, mixed, compiled=False)
            token = m.logits(x).argmax(-1)
            out.append(token)
            done |= (token == newline) | (token == EOS_ID)
        return torch.stack(out, dim=1)
