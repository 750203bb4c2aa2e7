"""What changes over a run: rates, lengths, rounding, spiking, by the share of it that is over.

`Base` trains from nothing; `Conversion` turns a trained Qwen2 folder into gla_swa (spec of
SpikingBrain, section 4: projections are reused, only the gates and the norms behind linear
attention are new, everything is trained, at lower rates and with a short warm-up).
"""
import math
import time
from pathlib import Path

import numpy as np
import torch

from .books import Books
from .export import load_model, read_source
from .hybrid import Hybrid, HybridConfig, spread_bias
from .mixture import draw_step
from .model import Decoder, ModelConfig
from .spike import DEFAULT_K

DECAY_FROM = 0.45
ROUND_FROM = 0.8
LOOK_FROM = 0.15
MATCH_TOKENS = 4096


def learning_rate_factor(progress):
    """1, then linearly to 0 at the end of the run."""
    return 1.0 if progress < DECAY_FROM else max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM))


class Base:
    muon_lr, adam_lr = 0.01, 0.002
    lengths = ()  # row lengths to capture before the clock starts

    def __init__(self, args):
        self.args = args

    def model(self, compute, compiled, device):
        a = self.args
        config = ModelConfig(hidden_size=a.hidden, intermediate_size=a.intermediate, num_hidden_layers=a.layers,
                             num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, vocab_size=a.vocab)
        return Decoder(config, compute, compiled).to(device)

    def teacher(self, compute, compiled, device):
        return None

    def draw(self, rng, progress, longest):
        """(kind, row length) of a step."""
        return draw_step(rng, progress, longest, self.args.evict_share)

    def mix(self, progress):
        """The share of a run that the mixture of documents is drawn for."""
        return progress

    def rate(self, progress):
        return learning_rate_factor(progress)

    def look(self, progress):
        return self.args.look_weight if progress >= LOOK_FROM else 0.0

    def rounding(self, progress):
        return float(progress >= ROUND_FROM)

    def spiking(self, progress):
        """k of every coded site; 0: not coded."""
        return 0.0


# Qwen2's names of the parts that gla_swa calls otherwise (spec section 4).
RENAMED = {"embed_tokens": "embeddings", "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
           "self_attn": "attn"}


def rename(name):
    return ".".join(RENAMED.get(part, part) for part in name.removeprefix("model.").split("."))


def convert(folder, window, full_attention_layers, gate_bias, compute=torch.bfloat16, compiled=False):
    """A Hybrid with the weights of a Qwen2 folder. gate_bias: a number for all channels, or "spread"."""
    parent, tensors = read_source(folder)
    if isinstance(parent, HybridConfig):
        raise ValueError(f"{folder} is gla_swa already; --from takes a Qwen2 folder")
    shape = parent.to_dict()
    if not full_attention_layers:  # all distances that RoPE sees are below the window
        shape["max_position_embeddings"] = max(shape["max_position_embeddings"], HybridConfig.max_position_embeddings)
    config = HybridConfig(window=window, full_attention_layers=list(full_attention_layers), **shape)
    model = Hybrid(config, compute, compiled)
    missing, unexpected = model.load_state_dict({rename(n): t for n, t in tensors.items()}, strict=False)
    strange = [n for n in missing if ".gk_proj." not in n and ".g_norm." not in n] + list(unexpected)
    if strange:
        raise ValueError(f"{folder} does not have the tensors of a Qwen2 model with tied embeddings: {strange[:4]}")
    bias = spread_bias(config) if gate_bias == "spread" else float(gate_bias)
    for layer in model.layers:
        if layer.kind == "gla":
            layer.attn["gk_proj"][1].bias.data[:] = bias
    return model


@torch.no_grad()
def match_norms(model, parent, ids):
    """Sets every g_norm so that linear attention's output is as large as the parent's attention on ids [B, n].

    At the spec's 1 the untrained branch is up to seven times too loud for the layers after it: 14.1 nats a token
    at first where this gives 4.8 (shipped base model, 3.7 nats), and a small budget goes into undoing that."""
    rows, length = ids.shape
    positions = torch.arange(length, device=ids.device).repeat(rows)
    x = parent.embed(ids.reshape(-1))
    for layer, own in zip(parent.layers, model.layers):
        mixed = parent.rows_attention(*parent.qkv(layer, x, positions, compiled=False), rows)
        if own.kind == "gla":
            own.attn["g_norm"].weight.fill_(mixed.float().square().mean().sqrt())
        x = parent.rest(layer, x, mixed, compiled=False)


class Conversion(Base):
    muon_lr, adam_lr = 0.005, 0.001
    WARM_UP = 0.04
    # Share of the steps, and so of the tokens. Long rows teach what states must keep; short ones keep the rest alive.
    SHARES = {512: 0.02, 1024: 0.05, 2048: 0.08, 4096: 0.20, 8192: 0.50, 16384: 0.15}

    def __init__(self, args):
        super().__init__(args)
        self.lengths = tuple(n for n in self.SHARES if n <= min(args.longest, args.tokens))

    def model(self, compute, compiled, device):
        a = self.args
        model = convert(getattr(a, "from"), a.window, a.full_attention, a.gate_bias, compute, compiled)
        model.coded = a.spike_from < 1.0
        model = model.to(device)
        if a.norm_init == "match":
            text = Books(Path(a.data) / "train").passage(np.random.default_rng(a.seed), MATCH_TOKENS)[0]
            ids = torch.from_numpy(text.astype(np.int64)).to(device)[None]
            match_norms(model, load_model(getattr(a, "from"), compute, device), ids)
        return model

    def teacher(self, compute, compiled, device):
        if not self.args.distill:
            return None
        return load_model(getattr(self.args, "from"), compute, device, compiled).requires_grad_(False)

    def draw(self, rng, progress, longest):
        shares = np.array([self.SHARES[n] for n in self.lengths])
        return "pack", self.lengths[int(rng.choice(len(self.lengths), p=shares / shares.sum()))]

    def mix(self, progress):
        return 1.0  # the parent is past the early mixture

    def rate(self, progress):
        return min(1.0, (progress + 1e-3) / self.WARM_UP) * max(0.0, 1.0 - progress) / (1.0 - self.WARM_UP)

    def look(self, progress):
        return 0.0  # it serves eviction, and there is no cache to evict from

    def spiking(self, progress):
        return DEFAULT_K if progress >= self.args.spike_from else 0.0


def recipe_of(args):
    if (args.arch == "gla_swa") != bool(getattr(args, "from")):
        raise ValueError("--arch gla_swa and --from go together: a gla_swa model is made from a trained Qwen2 folder")
    if args.arch == "gla_swa":
        return Conversion(args)
    given = [n for n in ("distill", "full_attention") if getattr(args, n)] + ["spike_from"] * (args.spike_from < 1.0)
    if given:
        raise ValueError(f"{', '.join('--' + n.replace('_', '-') for n in given)}: only for --arch gla_swa")
    return Base(args)


class Clock:
    """Training time: what earlier calls used plus this call's, counted from its first step.

    The run is over when its time or its tokens are, whichever is first."""

    def __init__(self, before, total, budget=math.inf):
        self.before, self.total, self.budget, self.start = before, total, budget, None

    def begin(self):
        self.start = time.monotonic()

    def seconds(self):
        return self.before + (time.monotonic() - self.start if self.start else 0.0)

    def progress(self, tokens=0):
        return max(self.seconds() / self.total, tokens / self.budget)
