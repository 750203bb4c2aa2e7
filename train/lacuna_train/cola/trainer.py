"""Both stages of Cola DLM, and the autoregressive model that is compared with it: one loop, resumable, for any number
of GPUs under torchrun.

Everything random of a step depends on (seed, rank, step) alone, everything scheduled on the share of the run that is
over (recipe.Clock), so a resumed run is the same run.
"""
import json
import math
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ..model import Decoder, ModelConfig, count_parameters
from ..optim import Muon, make_adam
from ..recipe import Clock
from ..trainer import SAVE_SECONDS, Update, peak_memory
from . import losses as L
from .attention import packed
from .data import Text
from .dit import Dit, DitConfig
from .vae import TextVae, VaeConfig

KIND_STREAM = 3  # of a step's random numbers
AHEAD = 4  # steps that the host may be ahead of the GPU


@dataclass
class Settings:
    stage: str = "vae"            # vae: stage 1; joint: stage 2; ar: the autoregressive model
    tokens: int = 65536           # a step and rank
    length: int = 512
    seed: int = 1
    muon_lr: float = 0.01
    adam_lr: float = 0.002
    optimizer: str = "muon"       # or adamw: everything with AdamW, weight decay 0.01
    warm_up: float = 0.02         # shares of the run
    decay_from: float = 0.45
    round_from: float = 0.8       # from here on matrices are used as int8; 1: never
    final_rate: float = 0.0
    gates: float | None = 1.0     # see Dit
    attention: str = "auto"
    constants: L.Constants = field(default_factory=L.Constants)

    def to_dict(self):
        return asdict(self)

    def rate(self, progress):
        if progress < self.warm_up:
            return (progress + 1e-3) / (self.warm_up + 1e-3)
        decay = min(1.0, max(0.0, (1 - progress) / (1 - self.decay_from)))
        return self.final_rate + (1 - self.final_rate) * decay


class Models(torch.nn.Module):
    """What a stage trains and what it looks at."""

    def __init__(self, settings, vae_config, dit_config, compute, compiled, start=None, ar_config=None):
        """start: state dict {"encoder....": ...} of a stage-1 VAE; stage 2 must have it."""
        super().__init__()
        self.vae = self.dit = self.reference = self.ar = None
        if settings.stage == "ar":
            self.ar = Decoder(ar_config, compute, compiled)
            return
        self.vae = TextVae(vae_config, compute, compiled)
        if start is not None:
            self.vae.load_state_dict(start)
        if settings.stage == "joint":
            if start is None:
                raise ValueError("stage 2 starts from the VAE of stage 1, and there is none")
            self.dit = Dit(dit_config, compute, compiled, gates=settings.gates)
            if settings.constants.ref_weight and not settings.constants.freeze_vae:
                self.reference = TextVae(vae_config, compute, compiled)
                self.reference.load_state_dict(start)
                self.reference.requires_grad_(False)
                self.reference.rounding = None
        if settings.stage == "joint" and settings.constants.freeze_vae:
            self.vae.requires_grad_(False)

    def trained(self):
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]

    def set_rounding(self, value):
        for part in (self.vae, self.dit, self.ar):
            if part is not None:
                part.rounding.fill_(value)


def optimizers(models, settings, device):
    """Muon for the matrices of all layers, AdamW for the rest."""
    named = models.trained()
    layered = lambda n: ".blocks." in n or ".layers." in n
    matrices = [(n, p) for n, p in named if settings.optimizer == "muon" and p.ndim == 2 and layered(n)]
    chosen = {id(p) for _, p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = 0.01 if settings.optimizer == "adamw" else 0.0
    return Muon(matrices, settings.muon_lr, device=device), make_adam(rest, settings.adam_lr, decay)


class Step:
    """Losses and gradients of one batch; a CUDA graph per row length and block."""

    NAMES = {"vae": ("recon", "kl", "masked", "logvar"), "joint": ("flow", "recon", "entropy", "masked", "ref", "logvar"),
             "ar": ("text",)}

    def __init__(self, models, settings, device):
        self.models, self.s, self.device = models, settings, device
        c = settings.constants
        self.names = self.NAMES[settings.stage]
        self.lengths = [settings.length] + ([c.short] if c.short_share > 0 and settings.stage != "ar" else [])
        for n in self.lengths:
            if settings.tokens % n:
                raise ValueError(f"{settings.tokens} tokens a step are no whole number of rows of {n}")
        self.parameters = [p for _, p in models.trained()]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.sums = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=device)
        self.generator = torch.Generator(device)
        d = models.dit and models.dit.config
        self.blocks = {d.block_size if d else 1: 1.0}  # and their shares of the steps
        if d and c.block_shares:
            others = {int(b): share for b, share in c.block_shares.items()}
            self.blocks = {d.block_size: 1.0 - sum(others.values())} | others
        self.kinds = [(n, b) for n in self.lengths for b in self.blocks]
        self.batches = {kind: self.make_batch(*kind) for kind in self.kinds}
        self.graphs, self.pool = {}, None
        shape = lambda n: (settings.tokens // n, d.heads, 2 * n, d.head_dim)
        self.attend = {(n, b): packed(n, b, device, settings.attention, shape(n)) for n, b in self.kinds} if d else {}

    def make_batch(self, n, block):
        rows = self.s.tokens // n
        batch = {"ids": torch.zeros(rows, n, dtype=torch.long, device=self.device)}
        if self.s.stage == "ar":
            return batch
        c, latent = self.s.constants, self.models.vae.config.latent_dim
        masked = max(1, round(rows * c.mask_rows)) if c.mask_weight and not c.freeze_vae else 0
        shapes = {"eps": (rows + masked, n, latent)}
        uniform = {"mask": (masked, n)}
        if self.models.dit is not None:
            shapes |= {"z1": (rows, n, latent), "t": (rows, n // block if c.t_per_block else 1)}
            uniform |= {"chance": (rows, n // block), "split": (rows, n // block)}
        self.drawn = {"normal": tuple(shapes), "uniform": tuple(uniform)}
        return batch | {k: torch.zeros(v, device=self.device) for k, v in (shapes | uniform).items()}

    def kind_of(self, step):
        """(row length, block) of a step, the same on every rank."""
        length, block = np.random.default_rng([self.s.seed, KIND_STREAM, step]).random(2)
        bounds = np.cumsum(list(self.blocks.values()))[:-1]
        return (self.lengths[int(len(self.lengths) > 1 and length < self.s.constants.short_share)],
                list(self.blocks)[int(np.searchsorted(bounds, block, "right"))])

    def load(self, text, rank, step, kind):
        rng = np.random.default_rng([self.s.seed, rank, step])
        batch = self.batches[kind]
        batch["ids"].copy_(text.rows(rng, *batch["ids"].shape))
        if self.s.stage == "ar":
            return
        self.generator.manual_seed(int(rng.integers(2 ** 62)))
        for name in self.drawn["normal"]:
            batch[name].normal_(generator=self.generator)
        for name in self.drawn["uniform"]:
            batch[name].uniform_(generator=self.generator)

    def vae_losses(self, batch):
        """z of the clean rows, their posterior, the mean cross-entropies of clean and of masked tokens."""
        vae, c, ids = self.models.vae, self.s.constants, batch["ids"]
        rows = len(ids)
        masked = len(batch["mask"])
        hidden = batch["mask"] < c.mask_ratio
        both = torch.cat([ids, ids[:masked].masked_fill(hidden, vae.config.mask_id)])
        mean, logvar = vae.encode(both)
        if c.fixed_logsnr:
            logvar = torch.full_like(logvar, -c.fixed_logsnr)
        z = L.sample(mean, logvar, batch["eps"])
        states = vae.decode_states(z).flatten(0, 1)
        each = vae.losses(states, torch.cat([ids, ids[:masked]]).flatten()).unflatten(0, both.shape)
        recon = each[:rows].mean()
        blind = (each[rows:] * hidden).sum() / hidden.sum().clamp_min(1) if masked else recon.new_zeros(())
        return vae.to_prior(z[:rows]), mean[:rows], logvar[:rows], recon, blind

    def stage_1(self, batch, _):
        c = self.s.constants
        _, mean, logvar, recon, blind = self.vae_losses(batch)
        kl = L.kl_standard(mean, logvar).mean()
        return recon + c.beta * kl + c.mask_weight * blind, (recon, kl, blind, logvar.mean())

    def stage_2(self, batch, kind):
        m, c = self.models, self.s.constants
        if c.freeze_vae:  # nobody needs the decoder
            with torch.no_grad():
                mean, logvar = m.vae.encode(batch["ids"])
                clean = m.vae.to_prior(L.sample(mean, logvar, batch["eps"]))
                recon = blind = mean.new_zeros(())
        else:
            clean, mean, logvar, recon, blind = self.vae_losses(batch)
        z0 = m.vae.to_prior(mean) if c.flow_on_mean else clean
        entropy = L.expected_log_q(logvar).mean()
        ref = entropy.new_zeros(())
        if m.reference is not None:
            with torch.no_grad():
                mean_r, logvar_r = m.reference.encode(batch["ids"])
            ref = L.kl_between(mean, logvar, mean_r, logvar_r).mean()
        length, block = kind
        t = L.timesteps(batch["t"], c.loc, c.scale)
        t = t.repeat_interleave(length // t.shape[1], 1)
        prefix = L.prefix_mask(batch["chance"], batch["split"], block)(c.prefix_share)
        noisy, t_noisy = L.noisy_copy(z0, batch["z1"], t, prefix)
        velocity = L.packed_velocity(m.dit, clean, noisy, t_noisy, self.attend[kind])
        flow = L.flow_loss(velocity, z0, batch["z1"], (~prefix).float(), c.detach_target)
        loss = c.flow_weight * flow
        if not c.freeze_vae:
            loss = loss + c.vae_weight * (recon + c.beta * entropy + c.mask_weight * blind) + c.ref_weight * ref
        return loss, (flow, recon, entropy, blind, ref, logvar.mean())

    def autoregressive(self, batch, _):
        ar, ids = self.models.ar, batch["ids"]
        x = ar.run(ids)
        each = ar.losses(x, ids.roll(-1, 1).flatten()).unflatten(0, ids.shape)
        loss = each[:, :-1].mean()
        return loss, (loss,)

    def body(self, kind):
        torch._foreach_zero_([p.grad for p in self.parameters])
        stage = {"vae": self.stage_1, "joint": self.stage_2, "ar": self.autoregressive}[self.s.stage]
        loss, parts = stage(self.batches[kind], kind)
        loss.backward()
        one = torch.ones((), device=self.device)
        self.sums += torch.stack([p.detach().double() for p in (*parts, one)])

    def capture(self, kind):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        kept = self.sums.clone()
        with torch.cuda.stream(side):
            for _ in range(2):
                self.body(kind)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.body(kind)
        self.pool = self.pool or graph.pool()
        self.graphs[kind] = graph
        self.sums.copy_(kept)

    def __call__(self, kind):
        if self.device.type != "cuda":
            self.body(kind)
            return
        if kind not in self.graphs:
            self.capture(kind)
        self.graphs[kind].replay()


class Run:
    """A run of one stage. `train` goes on until the budget or this call's time is over."""

    def __init__(self, settings, text, device, vae_config=None, dit_config=None, start=None, ar_config=None, rank=0,
                 ranks=1, token_budget=math.inf, total_seconds=math.inf):
        torch.manual_seed(settings.seed)
        torch._dynamo.config.cache_size_limit = 64
        cuda = device.type == "cuda"
        self.settings, self.text, self.device, self.rank, self.ranks = settings, text, device, rank, ranks
        self.budget, self.total = token_budget, total_seconds
        self.models = Models(settings, vae_config or VaeConfig(), dit_config or DitConfig(),
                             torch.bfloat16 if cuda else torch.float32, cuda, start, ar_config or ModelConfig()).to(device)
        self.step_of = Step(self.models, settings, device)
        if cuda:  # compiling is no training
            for kind in self.step_of.kinds:
                self.step_of.load(text, 0, 0, kind)
                self.step_of.capture(kind)
        self.update = Update(optimizers(self.models, settings, device), self.step_of.parameters, settings.muon_lr,
                             settings.adam_lr)
        self.step = self.tokens = 0
        self.seconds = 0.0

    def shape(self):
        m = self.models
        return {name: part.config.to_dict() for name, part in (("vae", m.vae), ("dit", m.dit), ("ar", m.ar)) if part is not None}

    def save(self, path):
        temporary = Path(path).with_suffix(".part")
        torch.save({"stage": self.settings.stage, "settings": self.settings.to_dict(), "shape": self.shape(),
                    "models": self.models.state_dict(), "update": self.update.state_dict(), "step": self.step,
                    "tokens": self.tokens, "seconds": self.seconds}, temporary)
        temporary.replace(path)

    def load(self, path):
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if (saved["stage"], saved["shape"]) != (self.settings.stage, self.shape()):
            raise ValueError(f"{path} holds another stage or shape: {saved['stage']} {saved['shape']}")
        self.models.load_state_dict(saved["models"])
        self.update.load_state_dict(saved["update"])
        self.step, self.tokens, self.seconds = saved["step"], saved["tokens"], saved["seconds"]

    def agreed(self, value):
        """Rank 0's number, on every rank."""
        if self.ranks == 1:
            return value
        shared = torch.tensor([float(value)], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def train(self, seconds=math.inf, steps=math.inf, say=None, log_seconds=5.0, save=None, save_seconds=math.inf):
        """True if the run is over. seconds: of this call; save: path of the checkpoint."""
        clock = Clock(self.seconds, self.total, self.budget)
        begun = logged = saved = time.monotonic()
        deadline = begun + seconds
        clock.begin()
        last = self.step, self.tokens
        queued = deque()
        while True:
            # Of tokens alone where there is no time limit: then a resumed run is the same run to the bit.
            progress = self.agreed(min(1.0, clock.progress(self.tokens)))
            ended = self.agreed(progress >= 1.0 or time.monotonic() >= deadline or self.step >= steps)
            now = time.monotonic()
            if (now - logged >= log_seconds or ended) and self.step > last[0]:
                self.report(say, progress, clock, now - logged, last)
                logged, last = time.monotonic(), (self.step, self.tokens)
            if ended:
                break
            kind = self.step_of.kind_of(self.step)
            self.step_of.load(self.text, self.rank, self.step, kind)
            self.models.set_rounding(float(progress >= self.settings.round_from))
            self.step_of(kind)
            if self.ranks > 1:
                for p in self.step_of.parameters:
                    dist.all_reduce(p.grad)
                    p.grad.div_(self.ranks)
            self.update(self.settings.rate(progress))
            if self.device.type == "cuda":  # the host must not run ahead of the clock
                queued.append(torch.cuda.Event())
                queued[-1].record()
                if len(queued) > AHEAD:
                    queued.popleft().synchronize()
            self.step += 1
            self.tokens += self.settings.tokens * self.ranks
            self.seconds = clock.seconds()
            if save and self.rank == 0 and time.monotonic() - saved >= save_seconds:
                saved = time.monotonic()
                self.save(save)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = clock.seconds()
        if save and self.rank == 0:
            self.save(save)
        return bool(progress >= 1.0)

    def report(self, say, progress, clock, passed, last):
        *sums, count = self.step_of.sums.tolist()
        self.step_of.sums.zero_()
        if not all(map(math.isfinite, sums)):
            raise FloatingPointError(f"a loss is not finite at step {self.step}: {dict(zip(self.step_of.names, sums))}")
        if say:
            say(step=self.step, seconds=clock.seconds(), progress=progress, tokens=self.tokens,
                **{n: v / max(count, 1) for n, v in zip(self.step_of.names, sums)}, dropped=int(self.update.dropped),
                rate=(self.tokens - last[1]) / max(passed, 1e-9))


def printer(path=None, **always):
    log = open(path, "a") if path else None

    def say(**fields):
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in (always | fields).items()})
        if log:
            print(line, file=log, flush=True)
        print(line, flush=True)
    return say
