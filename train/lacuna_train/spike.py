"""Spike coding of activations, simulated (spec of SpikingBrain, sections 3.1, 3.2 and 3.5).

A neuron with threshold V_th(x) = mean|x| / k (one a token, over the channels) and soft
reset sends round(x / V_th) spikes, signed; what the next matrix sees is V_th times that
count. Four kinds of input of a layer's matrices are coded, the SITES.
"""
from contextlib import contextmanager

import torch

SITES = ("attn_in", "o_in", "mlp_in", "down_in")
ATTN_IN, O_IN, MLP_IN, DOWN_IN = range(4)
LEAST, MOST = 1e-5, 1e4  # limits of a threshold
DEFAULT_K = 3.0
WINDOW_BITS, WINDOWS = 3, 3  # a count's magnitude in 9 slots, seen through windows of 3


def spikes(x, k):
    """x [..., D], in float32 at least -> (signed counts, as floats, and thresholds [..., 1]); never clipped."""
    threshold = (x.abs().mean(-1, keepdim=True) / k).clamp(LEAST, MOST)
    return torch.round(x / threshold), threshold


_listener = None


@contextmanager
def listening(listener):
    """Inside, `listener(site, x)` is told every input of a coded model's matrices (not in compiled bodies)."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def sent(x, spike, site, dtype):
    """What a matrix sees of x, in its precision. spike [4]: k of each site, 0 where x goes as it is; or None.

    Gradients pass straight through."""
    if spike is None:
        return x.to(dtype)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if _listener is not None:
        _listener(site, x)
    k = spike[site]
    counts, threshold = spikes(x, k.clamp_min(1e-3))
    return (x + torch.where(k > 0, counts * threshold - x, 0.0).detach()).to(dtype)


def silent_windows(counts):
    """The share of silent windows when every magnitude stands in WINDOWS windows of WINDOW_BITS bits.

    The definition that spec section 3.5 reconstructs behind the paper's 69.15 %. The topmost window also
    holds the bits of magnitudes that need more than 9."""
    size = counts.abs()
    silent = (size < 2.0 ** (WINDOW_BITS * (WINDOWS - 1))).double().mean()
    for i in range(WINDOWS - 1):
        below, above = 2.0 ** (WINDOW_BITS * i), 2.0 ** (WINDOW_BITS * (i + 1))
        silent = silent + (size - above * torch.floor(size / above) < below).double().mean()
    return silent / WINDOWS


class Tally:
    """Sums over spike counts, and the shares that are reported, each under its own name."""

    NAMES = ("zero_count_share", "mean_popcount", "silent_window_share", "at_most_7_share", "mean_count")

    def __init__(self):
        self.sums, self.count, self.largest = None, 0, 0.0

    def add(self, counts):
        size, n = counts.abs().double(), counts.numel()
        popcount, rest = torch.zeros((), dtype=torch.float64, device=size.device), size
        while bool((rest > 0).any()):
            half = torch.floor(rest / 2)
            popcount, rest = popcount + (rest - 2 * half).sum(), half
        sums = torch.stack([(size == 0).double().sum(), popcount, silent_windows(counts) * n, (size <= 7).double().sum(),
                            size.sum()])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += n
        self.largest = max(self.largest, float(size.max()))

    def shares(self):
        return dict(zip(self.NAMES, (self.sums / self.count).tolist()), largest_count=self.largest)
