"""One-shot eviction scores, and a soft version of eviction to train with.

Scores follow spec section 2 of LaProx (arXiv 2605.07234) and SnapKV (arXiv
2404.14469): the last WINDOW prompt queries look at the prompt, the window itself
is always kept, `share` of the prompt counts it.

Training: the reply is read in a second pass whose attention to a prompt entry is
scaled by gate = sigmoid((log score − log threshold) / temperature). A threshold
that keeps the budget makes this eviction as the temperature falls; at higher ones
the reply's loss reaches the scores, that is the window's attention, and teaches
the question to look at everything that its answer will need.
"""
import torch
import torch.nn.functional as F

WINDOW = 32


def window_scores(q, k, v, wo, lengths):
    """q [B, n, H, d], k and v [B, n, G, d], wo [D, H·d], lengths [B] -> snapkv and laprox scores [B, G, n].

    Zero outside the candidates (positions 0 … length − WINDOW − 1). Float32 throughout.
    """
    rows, n, heads, d = q.shape
    groups = k.shape[2]
    at = lengths[:, None] - WINDOW + torch.arange(WINDOW, device=q.device)  # [B, w]
    window = torch.gather(q, 1, at[:, :, None, None].expand(-1, -1, heads, d)).float()
    window = window.unflatten(2, (groups, heads // groups)).permute(0, 2, 3, 1, 4)  # [B, G, r, w, d]
    keys = k.float().permute(0, 2, 3, 1)[:, :, None]  # [B, G, 1, d, n]
    logits = window @ keys * d ** -0.5
    column = torch.arange(n, device=q.device)
    seen = column[None, None, :] <= at[:, :, None]
    attention = logits.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    candidate = (column[None] < (lengths - WINDOW)[:, None])[:, None]  # [B, 1, n]

    mean = attention.mean(3) * candidate[:, :, None]
    snapkv = F.avg_pool1d(mean.mean(2), 5, 1, 2) * candidate

    # |v W_O^h| from the Gram matrix of the head's output rows: d·d instead of d·D products a token.
    out = wo.float().T.unflatten(0, (groups, heads // groups, d))  # [G, r, d, D]
    gram = out @ out.mT
    values = v.float().permute(0, 2, 1, 3)[:, :, None]  # [B, G, 1, n, d]
    reach = ((values @ gram) * values).sum(-1).clamp_min(0).sqrt().detach()  # [B, G, r, n]
    weight = (attention.square().sum(3) + 1e-20).sqrt() * reach
    laprox = F.avg_pool1d(weight.mean(2) * candidate, 7, 1, 3) * candidate
    laprox = laprox / laprox.sum((1, 2), keepdim=True).clamp_min(1e-20)
    return snapkv, laprox


def kept_per_head(lengths, share):
    """How many candidates a head keeps when `share` of the prompt is kept, window included; at least 1."""
    return ((lengths * share).round().long() - WINDOW).clamp_min(1)


def head_threshold(scores, keep):
    """scores [B, G, n], keep [B] -> the keep-th largest of each head, [B, G, 1]."""
    ordered = scores.detach().sort(-1, descending=True).values
    index = (keep - 1).clamp_max(scores.shape[-1] - 1)[:, None, None].expand(-1, scores.shape[1], 1)
    return ordered.gather(-1, index)


def model_threshold(layer_scores, keep):
    """One threshold over every (layer, head, token): list of [B, G, n] -> [B, 1, 1]."""
    scores = torch.cat([s.detach().flatten(1) for s in layer_scores], dim=1)
    ordered = scores.sort(-1, descending=True).values
    count = keep * sum(s.shape[1] for s in layer_scores)
    return ordered.gather(1, (count - 1).clamp_max(scores.shape[1] - 1)[:, None])[:, :, None]


def log_gates(scores, threshold, temperature, lengths):
    """Additive attention bias [B, G, n]: log gate for candidates, 0 for the window."""
    n = scores.shape[-1]
    candidate = (torch.arange(n, device=scores.device)[None] < (lengths - WINDOW)[:, None])[:, None]
    soft = F.logsigmoid(((scores + 1e-12).log() - (threshold + 1e-12).log()) / temperature)
    return torch.where(candidate, soft, torch.zeros_like(soft))


def reply_states(model, reply_ids, first, keys, values, biases):
    """Reads replies after evicted prompts. reply_ids [B, A]; keys, values: per layer [B, n, G, d];
    biases: per layer [B, G, n]; first: the position of the reply's first token. -> [B·A, D]"""
    rows, size = reply_ids.shape
    c = model.config
    groups, repeat, d = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim
    positions = (first + torch.arange(size, device=reply_ids.device)).repeat(rows)
    x = model.embed(reply_ids.reshape(-1))
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    for layer, old_k, old_v, bias in zip(model.layers, keys, values, biases):
        q, k, v = model.qkv(layer, x, positions, compiled=False)
        q = q.view(rows, size, groups, repeat, d).permute(0, 2, 3, 1, 4)
        k, v = (t.view(rows, size, groups, d).permute(0, 2, 1, 3)[:, :, None] for t in (k, v))
        old_k, old_v = (t.permute(0, 2, 1, 3)[:, :, None] for t in (old_k, old_v))
        to_prompt = (q @ old_k.mT).float() * d ** -0.5 + bias[:, :, None, None]
        to_reply = ((q @ k.mT).float() * d ** -0.5).masked_fill(later, float("-inf"))
        weights = torch.cat([to_prompt, to_reply], dim=-1).softmax(-1).to(v.dtype)
        n = old_k.shape[-2]
        mixed = weights[..., :n] @ old_v + weights[..., n:] @ v
        x = model.rest(layer, x, mixed.permute(0, 3, 1, 2, 4).reshape(rows * size, -1), compiled=False)
    return x
