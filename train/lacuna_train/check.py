"""A look before a run: does this machine compute what the CPU computes, and how fast and large is a step?

Costs seconds, changes no weight, and leaves the captured graphs to the run.
"""
import copy
import time

import torch

CLOSE, ROUGH = 2e-3, 0.03  # relative error of hidden states in float32, and in the run's precision
REPEATS = 4
PROBE_TOKENS = 256  # behind the first window


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def numerics(model, device):
    """Relative errors of the hidden states against float32 on the CPU: plain float32 here, then the run's precision."""
    length = getattr(model.config, "window", 512) + PROBE_TOKENS
    ids = torch.randint(1, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    bodies = {n: v for n, v in vars(model).items() if n.startswith("_") and callable(v)}
    for name in bodies:  # compiled bodies can't be copied, and the reference must not use them
        delattr(model, name)
    try:
        twin = copy.deepcopy(model).cpu()
    finally:
        vars(model).update(bodies)
    compute, twin.compute = model.compute, torch.float32
    reference = twin.run(ids, compiled=False)
    precision = torch.get_float32_matmul_precision()
    found = {}
    for name, dtype in (("float32", torch.float32), (str(compute).removeprefix("torch."), compute)):
        model.compute = dtype
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else precision)
        found[name] = relative(model.run(ids.to(device), compiled=False).cpu(), reference)
    model.compute = compute
    torch.set_float32_matmul_precision(precision)
    return found


def timed(step_of, length, device):
    """Seconds of one step, best of REPEATS."""
    best = float("inf")
    for _ in range(REPEATS if device.type == "cuda" else 1):
        begun = time.monotonic()
        step_of("pack", length)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - begun)
    return best


def check(model, step_of, lengths, tokens, batch_of, device, say):
    """`batch_of(length)` loads a batch of the run. Raises RuntimeError where something is wrong."""
    begun = time.monotonic()
    errors = numerics(model, device)
    say(event="check", what="numerics", **errors, wall=time.monotonic() - begun)
    wrong = [f"hidden states in {name} are off by {error:.2g}" for name, error in errors.items()
             if not error < (CLOSE if name == "float32" else ROUGH)]
    for length in lengths:
        batch_of(length)
        seconds = timed(step_of, length, device)
        sums = step_of.sums.tolist()
        step_of.sums.zero_()
        text, answers = sums[0] / max(sums[1], 1), sums[2] / max(sums[3], 1)
        squares = sum(float(p.grad.double().square().sum()) for p in step_of.parameters)
        say(event="check", what="step", length=length, milliseconds=1e3 * seconds, rate=tokens / seconds, text=text,
            answer=answers, gradient=squares ** 0.5,
            memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
        if not 0 < squares < float("inf") or not text < 30:
            wrong.append(f"rows of {length}: loss {text:.3g}, squared gradients {squares:.3g}")
    say(event="check", ok=not wrong, wall=time.monotonic() - begun)
    if wrong:
        raise RuntimeError("the check before the run failed: " + "; ".join(wrong))
