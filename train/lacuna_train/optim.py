"""Muon for the layers' matrices, AdamW for everything else, the low-rank gates of linear attention among it."""
import torch

# Quintic iteration towards the polar factor, five times (K. Jordan's Muon). It takes
# singular values to 0.7 … 1.2 and, unlike faster schedules, stays bounded when
# bfloat16 rounding lifts one above 1.
POLAR_STEPS = 5
POLAR_A, POLAR_B, POLAR_C = 3.4445, -4.7750, 2.0315


def polar_factor(batch):
    """The nearest orthogonal matrices of a batch [n, rows, columns], in bfloat16 (on a CPU, which is slow at it, float32)."""
    x = (batch / (batch.abs().amax(dim=(1, 2), keepdim=True) + 1e-20)).to(torch.bfloat16 if batch.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-12).to(x.dtype)
    for _ in range(POLAR_STEPS):
        gram = x @ x.mT
        x = POLAR_A * x + (POLAR_B * gram + POLAR_C * gram @ gram) @ x
    return x.mT if tall else x


# Decay per step and unit of rate. Without it queries and keys grow all through the
# run until attention logits reach the thousands, each step turns attention by more,
# and after a few thousand steps the loss rises again; so those two decay faster.
DECAY, DECAY_QUERY_KEY = 0.03, 0.1


class Muon:
    """Momentum, then the polar factor of the result as the step. Matrices of one shape go together."""

    def __init__(self, named, lr, momentum=0.95, device=None):
        """device: where there may be no matrices at all."""
        self.momentum = momentum
        self.groups = {}
        decays = {True: [], False: []}
        for name, p in named:
            self.groups.setdefault(tuple(p.shape), []).append(p)
            decays["q_proj" in name or "k_proj" in name].append(p)
        self.decays = [(DECAY_QUERY_KEY, decays[True]), (DECAY, decays[False])]
        device = device or next(iter(self.groups.values()))[0].device
        self.lr = torch.tensor(float(lr), device=device)
        # 0 for a batch whose gradients are not finite: the polar factor has no scale, so that a zero
        # gradient would still take a full step along the old momentum.
        self.valid = torch.ones((), device=device)
        self.buffers = {s: torch.zeros(len(ps), *s, device=device) for s, ps in self.groups.items()}

    @torch.no_grad()
    def step(self):
        rate = self.lr * self.valid
        for decay, parameters in self.decays:
            if parameters:
                torch._foreach_mul_(parameters, 1 - rate * decay)
        for shape, parameters in self.groups.items():
            gradient = torch.stack([p.grad for p in parameters])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, (1 - self.momentum) * self.valid)
            update = polar_factor(gradient.lerp(buffer, self.momentum)).float()
            # A wide matrix and a tall one should change their outputs alike.
            update *= -rate * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_(parameters, list(update.unbind()))

    def state_dict(self):
        return {"x".join(map(str, s)): b for s, b in self.buffers.items()}

    def load_state_dict(self, state):
        for s, b in self.buffers.items():
            b.copy_(state["x".join(map(str, s))])


@torch.no_grad()
def drop_bad_gradients(parameters):
    """Sets every gradient to 0 if any is not finite; returns 1 if all were finite, else 0."""
    finite = torch.stack(torch._foreach_norm([p.grad for p in parameters])).sum().isfinite()
    zero = torch.zeros((), device=finite.device)
    for p in parameters:
        torch.where(finite, p.grad, zero, out=p.grad)
    return finite.float()


def make_optimizers(model, extra, muon_lr, adam_lr):
    """`extra` are parameters that do not ship (the look-ahead matrix); AdamW steps them too."""
    matrices = [(n, p) for n, p in model.layers.named_parameters() if p.ndim == 2 and "gk_proj" not in n]
    chosen = {id(p) for _, p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen] + list(extra)
    return Muon(matrices, muon_lr), make_adam(rest, adam_lr)


def make_adam(parameters, lr, weight_decay=0.0):
    """Its rate is a tensor on a GPU, where the step is captured."""
    cuda = parameters[0].is_cuda
    rate = torch.tensor(float(lr), device=parameters[0].device) if cuda else lr
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=cuda, capturable=cuda)
