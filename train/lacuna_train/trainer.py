"""The training loop: right for any number of GPUs under torchrun, resumable, ended by the clock.

Everything that changes over the run (lengths, learning rate, when int8 rounding
starts) is a function of `progress`, the share of --total-seconds of training time, or
of --token-budget, that is over; a checkpoint carries both, so a resumed run goes on where it was.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import evict
from .check import check
from .feed import Feed, slot_arrays
from .mixture import draw_step
from .model import count_parameters, rms_norm, used
from .optim import drop_bad_gradients, make_optimizers
from .recipe import Clock, recipe_of
from .tasks import ANSWER, TEXT

REPLY_WEIGHT = 0.3
SAVE_SECONDS = 8  # kept free at the end of a call for the checkpoint
CHECK_STEP = 10 ** 9  # batches of the check are none of the run's
AHEAD = 24  # steps requested from the data workers before they are needed


class Step:
    """Forward, losses and backward of one batch; captured as a CUDA graph per kind and length."""

    def __init__(self, model, bridge, device, tokens, teacher=None, distill=0.0):
        self.model, self.bridge, self.device = model, bridge, device
        self.teacher, self.distill = teacher, distill
        host, _ = slot_arrays(tokens)
        self.batch = {k: torch.from_numpy(v).to(device) for k, v in host.items()}
        self.scalars = {k: torch.zeros((), device=device) for k in ("look", "share", "temperature", "laprox")}
        # Sums and counts of the losses of text, answers, replies after eviction, looks, and of the teacher's divergence.
        self.sums = torch.zeros(10, dtype=torch.float64, device=device)
        self.parameters = [p for p in model.parameters()] + [bridge]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.graphs, self.pool = {}, None

    def load(self, arrays):
        for name, tensor in self.batch.items():
            tensor.copy_(torch.from_numpy(arrays[name]), non_blocking=False)

    def look_loss(self, x):
        """From the end of a question, predict the set of the answer's tokens (through a matrix that does not ship)."""
        b, m = self.batch, self.model
        h = rms_norm(x[b["look_at"].long()], m.norm.weight, m.config.rms_norm_eps, m.compute)
        logits = h @ self.bridge.to(m.compute) @ used(m.table, m.rounding, m.compute).T
        return -(logits.float().log_softmax(-1).gather(1, b["look_ids"].long()) * b["look_weights"]).sum()

    def reply_loss(self, ids, watched):
        """Loss of the replies when their prompts' caches are softly evicted."""
        m, b, s = self.model, self.batch, self.scalars
        rows, length = ids.shape
        lengths = torch.full((rows,), length, device=ids.device)
        keep = evict.kept_per_head(lengths, s["share"])
        keys, values, snap, lap = zip(*watched)
        threshold = evict.model_threshold(lap, keep)
        biases = []
        for a, l in zip(snap, lap):
            one = evict.log_gates(a, evict.head_threshold(a, keep), s["temperature"], lengths)
            two = evict.log_gates(l, threshold, s["temperature"], lengths)
            biases.append(torch.where(s["laprox"] > 0, two, one))
        x = evict.reply_states(m, b["reply_ids"][:rows], length, keys, values, biases)
        losses = m.losses(x, b["reply_targets"][:rows].reshape(-1).long(), compiled=False)
        weights = b["reply_weights"][:rows].reshape(-1)
        return (losses * weights).sum(), weights.sum()

    def body(self, kind, length):
        torch._foreach_zero_([p.grad for p in self.parameters])
        m, b = self.model, self.batch
        ids = b["ids"].view(-1, length).long()
        watched = []

        def watch(_, layer, q, k, v):
            q, k, v = (t.unflatten(0, ids.shape) for t in (q, k, v))
            lengths = torch.full((ids.shape[0],), length, device=ids.device)
            wo = used(layer.self_attn["o_proj"].weight, m.rounding, torch.float32).detach()
            watched.append((k, v, *evict.window_scores(q, k, v, wo, lengths)))

        x = m.run(ids, watch if kind == "evict" else None)
        if self.teacher is None:
            losses, divergence = m.losses(x, b["targets"].long()), None
            loss = (losses * b["weights"]).sum()
        else:
            with torch.no_grad():
                aim = self.teacher.run(ids)
            losses, divergence = m.losses_and_divergence(x, b["targets"].long(), aim, self.teacher)
            loss = ((losses + self.distill * divergence) * b["weights"]).sum()
        look = self.look_loss(x)
        loss = loss + self.scalars["look"] * look
        with torch.no_grad():
            text, answers = b["classes"] == TEXT, b["classes"] == ANSWER
            sums = [(losses * text).sum(), text.sum(), (losses * answers).sum(), answers.sum()]
        if kind == "evict":
            reply, count = self.reply_loss(ids, watched)
            loss = loss + REPLY_WEIGHT * reply / count.clamp_min(1)
            sums += [reply.detach(), count]
        else:
            sums += [torch.zeros((), device=x.device)] * 2
        sums += [look.detach(), torch.ones((), device=x.device)]
        with torch.no_grad():
            weights = b["weights"]
            sums += [(divergence * weights).sum() if divergence is not None else torch.zeros((), device=x.device), weights.sum()]
        loss.backward()
        self.sums += torch.stack([s.double() for s in sums])

    def capture(self, kind, length):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        kept = self.sums.clone()
        with torch.cuda.stream(side):
            for _ in range(2):
                self.body(kind, length)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Graphs share memory: they never run at the same time and nothing in it outlives a replay.
        with torch.cuda.graph(graph, pool=self.pool):
            self.body(kind, length)
        self.pool = self.pool or graph.pool()
        self.graphs[kind, length] = graph
        self.sums.copy_(kept)

    def __call__(self, kind, length):
        if self.device.type != "cuda":
            self.body(kind, length)
            return
        if (kind, length) not in self.graphs:
            self.capture(kind, length)
        self.graphs[kind, length].replay()


class Update:
    """Both optimisers' step; one CUDA graph on a GPU."""

    def __init__(self, optimizers, everything, muon_lr, adam_lr):
        """everything: the parameters of both optimisers, (muon, adam)."""
        self.rates = muon_lr, adam_lr
        self.muon, self.adam = optimizers
        self.parameters = self.adam.param_groups[0]["params"]
        self.everything = everything
        self.dropped = torch.zeros((), device=everything[0].device)  # batches without effect so far
        self.graph = None
        if self.parameters[0].is_cuda:
            self.set_factor(0.0)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            for p in self.parameters:  # the warm-up steps had no gradient and a rate of 0
                self.adam.state[p]["step"].zero_()

    def step(self):
        self.muon.valid.copy_(drop_bad_gradients(self.everything))
        self.dropped += 1 - self.muon.valid
        self.muon.step()
        self.adam.step()

    def set_factor(self, factor):
        self.muon.lr.fill_(self.rates[0] * factor)
        group = self.adam.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(self.rates[1] * factor)
        else:
            group["lr"] = self.rates[1] * factor

    def __call__(self, factor):
        self.set_factor(factor)
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adam": [self.adam.state[p] for p in self.parameters]}

    def load_state_dict(self, state):
        """In place: the captured graph knows these tensors' addresses."""
        self.muon.load_state_dict(state["muon"])
        for p, saved in zip(self.parameters, state["adam"]):
            own = self.adam.state[p]
            for name, value in saved.items():
                if name in own:
                    own[name].copy_(value)
                else:
                    own[name] = value.clone()


def save_checkpoint(path, model, bridge, update, state):
    temporary = path.with_suffix(".part")
    torch.save({"config": model.config.to_dict(), "model": model.state_dict(), "bridge": bridge.detach(),
                "update": update.state_dict(), **state}, temporary)
    temporary.replace(path)


def peak_memory(device):
    """Bytes, 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def start_device():
    """(device, rank, number of ranks)."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend)
        local = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            torch.cuda.set_device(local)
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        return device, dist.get_rank(), dist.get_world_size()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0, 1


def plan_step(seed, step, progress, ranks, longest, draw=draw_step):
    """(kind, length, progress) of a step, the same on every rank."""
    if ranks > 1:
        shared = torch.tensor([progress], dtype=torch.float64)
        shared = shared.cuda() if torch.cuda.is_available() else shared
        dist.broadcast(shared, 0)
        progress = float(shared)
    kind, length = draw(np.random.default_rng([seed, 7, step]), progress, longest)
    return kind, length, progress


def train(args):
    begun = time.monotonic()
    torch.set_float32_matmul_precision("high")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device, rank, ranks = start_device()
    feed = Feed(Path(args.data), Path(args.prompts), args.tokens, args.seed, rank, args.workers)
    try:
        return run(args, begun, out, device, rank, ranks, feed)
    finally:
        feed.close()
        if ranks > 1:
            dist.destroy_process_group()


def run(args, begun, out, device, rank, ranks, feed):
    torch.manual_seed(args.seed)
    cuda = device.type == "cuda"
    recipe = recipe_of(args)
    compute = torch.bfloat16 if cuda else torch.float32
    model = recipe.model(compute, cuda, device)
    config = model.config
    bridge = torch.nn.Parameter(torch.eye(config.hidden_size, device=device))
    step_of = Step(model, bridge, device, args.tokens, recipe.teacher(compute, cuda, device), args.distill)
    rates = args.muon_lr or recipe.muon_lr, args.adam_lr or recipe.adam_lr
    update = Update(make_optimizers(model, [bridge], *rates), [*model.parameters(), bridge], *rates)
    checkpoint = out / "checkpoint.pt"
    state = {"step": 0, "tokens": 0, "seconds": 0.0}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["config"] != config.to_dict():
            raise ValueError(f"{checkpoint} holds a model of another shape: {saved['config']}")
        model.load_state_dict(saved["model"])
        bridge.data.copy_(saved["bridge"])
        update.load_state_dict(saved["update"])
        state = {k: saved[k] for k in state}
    deadline = begun + args.seconds - SAVE_SECONDS
    log = open(out / "log.jsonl", "a") if rank == 0 else None

    def say(**fields):
        if log:
            line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()})
            print(line, file=log, flush=True)
            print(line, flush=True)

    say(event="start", parameters=count_parameters(model), ranks=ranks, device=str(device), resumed_at=state["step"])
    asked = step = state["step"]
    tokens = state["tokens"]
    if cuda:  # compiling is no training
        for length in recipe.lengths:
            step_of.capture("pack", length)
    if args.check:
        def batch_of(length):
            feed.request(CHECK_STEP + length, "pack", length, recipe.mix(0.0))
            _, _, _, arrays, release = feed.next()
            step_of.load(arrays)
            release()

        check(model, step_of, recipe.lengths or (args.longest,), args.tokens, batch_of, device, say)
        if args.check == "only":
            return
    total = args.total_seconds
    if args.end_with_call:
        total = min(total, state["seconds"] + deadline - time.monotonic())
    clock = Clock(state["seconds"], total, args.token_budget)
    say(event="ready", wall=time.monotonic() - begun, total_seconds=total, memory=peak_memory(device))
    clock.begin()
    logged, last = time.monotonic(), (step, tokens)
    saved_at = logged
    while True:
        while feed.wants() and asked - step < AHEAD:
            ahead = min(clock.progress(tokens + (asked - step) * args.tokens * ranks), 1.0)
            kind, length, progress = plan_step(args.seed, asked, ahead, ranks, args.longest, recipe.draw)
            feed.request(asked, kind, length, recipe.mix(progress))
            asked += 1
        _, kind, length, arrays, release = feed.next()
        step_of.load(arrays)
        release()
        progress = clock.progress(tokens)
        draw = np.random.default_rng([args.seed, 8, step])
        model.rounding.fill_(recipe.rounding(progress))
        if model.coded:
            model.spike_k.fill_(recipe.spiking(progress))
        step_of.scalars["look"].fill_(recipe.look(progress))
        step_of.scalars["share"].fill_(math.exp(draw.uniform(math.log(0.03), math.log(0.3))))
        step_of.scalars["temperature"].fill_(math.exp(draw.uniform(math.log(0.15), 0.0)))
        step_of.scalars["laprox"].fill_(float(draw.random() < 0.5))
        step_of(kind, length)
        if ranks > 1:
            for p in step_of.parameters:
                dist.all_reduce(p.grad)
                p.grad.div_(ranks)
        update(recipe.rate(progress))
        step += 1
        tokens += args.tokens * ranks
        now = time.monotonic()
        ended = clock.progress(tokens) >= 1.0 or now >= deadline or step >= args.steps
        if ranks > 1:  # one rank's clock decides for all
            flag = torch.tensor([float(ended)], device=device)
            dist.broadcast(flag, 0)
            ended = bool(flag.item())
        if now - logged >= args.log_seconds or ended:
            text, texts, answer, answers, reply, replies, look, looks, teach, taught = step_of.sums.tolist()
            step_of.sums.zero_()
            if not math.isfinite(text + answer + reply + look + teach):  # gradients were dropped, so the weights are bad
                raise FloatingPointError(f"the loss is not finite at step {step}")
            more = {"divergence": teach / max(taught, 1e-9)} if step_of.teacher else {}
            say(step=step, seconds=clock.seconds(), progress=clock.progress(tokens), tokens=tokens,
                text=text / max(texts, 1), answer=answer / max(answers, 1), reply=reply / max(replies, 1),
                look=look / max(looks, 1), dropped=int(update.dropped), longest=length, waiting=len(feed.done),
                rate=(tokens - last[1]) / (time.monotonic() - logged), **more)
            logged, last = time.monotonic(), (step, tokens)
        if ended:
            break
        if rank == 0 and now - saved_at >= args.save_seconds:
            saved_at = now
            save_checkpoint(checkpoint, model, bridge, update,
                            {"step": step, "tokens": tokens, "seconds": clock.seconds()})
    if cuda:
        torch.cuda.synchronize()
    state = {"step": step, "tokens": tokens, "seconds": clock.seconds()}
    if rank == 0:
        save_checkpoint(checkpoint, model, bridge, update, state)
        say(event="saved", finished=clock.progress(tokens) >= 1.0, wall=time.monotonic() - begun, memory=peak_memory(device), **state)
        log.close()
    sys.stdout.flush()
