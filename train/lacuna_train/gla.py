"""Gated linear attention in chunks (spec of SpikingBrain, sections 1.3 and 1.4; Yang et al., arXiv 2312.06635).

    S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t · d^-1/2

One state S [d, d] (rows: key channels) serves all query heads of a group, because
k, v and the log decay g ≤ 0 are the group's. Everything is batched matrix products:
inside a chunk by sub-chunks, between chunks by the matrix of decays from every chunk
to every later one, which is as long as a row has chunks. No loop over tokens, no
shape that depends on values: a CUDA graph can hold it.

Exponents. A decay over many tokens must not be split into exp(G_i)·exp(−G_j): the
second factor overflows. Here the two factors meet in the middle of the query's
sub-chunk, so that neither spans more than SUB/2 tokens in the growing direction.
"""
import torch

CHUNK = 64  # tokens between two states
SUB = 16  # tokens of a sub-chunk
# With SUB/2 tokens at this log decay a factor is exp(80), times any activation below the
# largest float32 and bfloat16 (exp(88.7)). Stronger decay than exp(-10) in one token is cut to it.
LOWEST = -10.0
SPAN = 256  # chunks that meet in one matrix of decays; longer rows go on from span to span


def wide(dtype):
    """Gates and states are float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def chunk_terms(q, k, v, g):
    """q [T, H, d], k and v [T, G, d] in the dtype of the products, g [T, G, d] wide; T a multiple of CHUNK, n = T / CHUNK.

    -> what each token gets from its own chunk [n, G, CHUNK·r, d], queries as the state before the chunk
    sees them (same shape), what the chunk adds to the state [n, G, d, d], the chunk's log decay [n, G, d].
    Rows of the first two: token by token, in each the group's r query heads. The length of rows is no matter here.
    """
    dtype, (count, heads, d), groups = q.dtype, q.shape, k.shape[1]
    n, repeat, subs = count // CHUNK, heads // groups, CHUNK // SUB
    total = g.clamp_min(LOWEST).view(n, CHUNK, groups, d).transpose(1, 2).cumsum(2)  # inclusive, [n, G, CHUNK, d]
    q = q.view(n, CHUNK, groups, repeat, d).transpose(1, 2) * d ** -0.5
    k, v = (t.view(n, CHUNK, groups, d).transpose(1, 2) for t in (k, v))

    middle = total[:, :, SUB // 2 - 1::SUB]  # [n, G, subs, d]
    mine = (total.unflatten(2, (subs, SUB)) - middle[:, :, :, None]).exp()
    mine = (q.unflatten(2, (subs, SUB)) * mine[..., None, :]).to(dtype).flatten(3, 4)  # [n, G, subs, SUB·r, d]
    token = torch.arange(CHUNK, device=q.device)
    later = token[None] >= (torch.arange(subs, device=q.device)[:, None] + 1) * SUB  # keys after a sub-chunk
    theirs = middle[:, :, :, None] - total[:, :, None]
    theirs = (k[:, :, None] * theirs.masked_fill(later[..., None], float("-inf")).exp()).to(dtype)  # [n, G, subs, CHUNK, d]
    scores = (mine @ theirs.mT).flatten(2, 3)  # [n, G, CHUNK·r, CHUNK]
    ahead = token[None] > token.repeat_interleave(repeat)[:, None]
    local = scores.masked_fill(ahead, 0.0) @ v

    from_start = (q * total.exp()[..., None, :]).to(dtype).flatten(2, 3)
    end = total[:, :, -1]
    kept = k * (end[:, :, None] - total).exp()  # wide: the sum that a state is stays so
    return local, from_start, kept.mT @ v.to(kept.dtype), end


def states_before(added, decay, rows, state):
    """The state before every chunk [n, G, d, d], and after each row's last [rows, G, d, d].

    added [n, G, d, d], decay [n, G, d] from chunk_terms, state [rows, G, d, d] at the rows' start or None.
    """
    added = added.unflatten(0, (rows, -1)).permute(0, 2, 3, 1, 4)  # [rows, G, d, N, d]
    decay = decay.unflatten(0, (rows, -1)).permute(0, 2, 3, 1)  # [rows, G, d, N]
    before = []
    for added, decay in zip(added.split(SPAN, 3), decay.split(SPAN, 3)):
        size = decay.shape[-1]
        until = decay.cumsum(-1)
        since = torch.cat([torch.zeros_like(until[..., :1]), until], dim=-1)  # before chunk 0 … size
        step = torch.arange(size + 1, device=decay.device)
        exponent = since[..., :, None] - until[..., None, :]
        matrix = exponent.masked_fill(step[:, None] <= step[:size], float("-inf")).exp()  # [rows, G, d, size + 1, size]
        states = matrix @ added
        if state is not None:
            states = states + since.exp()[..., None] * state[..., None, :]
        before.append(states[..., :size, :])
        state = states[..., size, :]
    before = torch.cat(before, dim=3) if len(before) > 1 else before[0]
    return before.permute(0, 3, 1, 2, 4).flatten(0, 1), state


def chunked(q, k, v, g, rows, state=None, terms=chunk_terms):
    """q [T, H, d], k, v, g [T, G, d] of `rows` rows of one length -> [T, H, d] and the states at their ends.

    A length that is no multiple of CHUNK is filled up with tokens that neither decay nor add. `terms` is
    chunk_terms or a compiled one."""
    length = q.shape[0] // rows
    fill = -length % CHUNK
    if fill:
        q, k, v, g = (torch.nn.functional.pad(t.unflatten(0, (rows, length)), (0, 0, 0, 0, 0, fill)).flatten(0, 1)
                      for t in (q, k, v, g))
    groups, d = k.shape[1:]
    local, queries, added, decay = terms(q, k, v, g)
    before, last = states_before(added, decay, rows, state)
    out = torch.baddbmm(local.flatten(0, 1), queries.flatten(0, 1), before.to(q.dtype).flatten(0, 1))
    out = out.view(-1, groups, CHUNK, q.shape[1] // groups, d).transpose(1, 2).reshape(rows, length + fill, -1, d)
    return out[:, :length].flatten(0, 1), last


def one_token(q, k, v, g, state):
    """The recurrence: q [B, H, d], k, v, g [B, G, d], state [B, G, d, d] -> [B, H, d] and the new state."""
    state = g.exp()[..., None] * state + (k[..., None] * v[..., None, :]).to(state.dtype)
    q = q.unflatten(1, (k.shape[1], -1))
    out = (q.to(state.dtype) * q.shape[-1] ** -0.5) @ state
    return out.to(q.dtype).flatten(1, 2), state
