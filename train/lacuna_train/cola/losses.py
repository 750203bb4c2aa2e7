"""The losses of both stages (spec section 3); what the paper leaves open is in `Constants`.

Reductions: cross-entropies and the Gaussians' terms are means over tokens (the Gaussians' sums over latent dims),
L_mask over masked tokens only, L_FM over the positions that carry loss, a mean over dims.
"""
from dataclasses import asdict, dataclass, field

import torch

from .dit import T

LOG_2PI = 1.8378770664093453


@dataclass
class Constants:
    """Not published, but for loc. docs/decisions.md and models/cola/README.md say why each is what it is."""
    beta: float = 0.01            # weight of KL(q || N(0, I)) in stage 1, of E log q in stage 2
    fixed_logsnr: float = 0.0     # 0: logvar is learnt; else logvar = -fixed_logsnr everywhere
    mask_weight: float = 1.0      # lambda_mask
    mask_ratio: float = 0.3       # masked tokens in the masked copy
    mask_rows: float = 0.25       # share of the batch's rows that have a masked copy
    vae_weight: float = 1.0       # lambda_VAE
    flow_weight: float = 1.0      # lambda_fm
    ref_weight: float = 0.1       # lambda_ref
    freeze_vae: bool = False      # stage 2 trains the DiT alone
    detach_target: bool = True    # the flow's gradient reaches the encoder through the noisy copy only
    flow_on_mean: bool = False    # what is noised is the posterior's mean, not a sample; history stays a sample
    loc: float = 1.0              # logit-normal timesteps
    scale: float = 1.0
    t_per_block: bool = True      # else one t a sequence
    prefix_share: float = 0.1     # blocks whose first tokens are clean
    short_share: float = 0.25     # steps on short rows: more blocks without history
    short: int = 64
    # Shares of steps with other blocks than the DiT's block_size, e.g. {"4": 0.3}.
    block_shares: dict = field(default_factory=dict)

    def to_dict(self):
        return asdict(self)


def sample(mean, logvar, eps):
    return mean + (0.5 * logvar).exp() * eps


def kl_standard(mean, logvar):
    """KL(N(mean, exp logvar) || N(0, I)) summed over dims; [..., d] -> [...]."""
    return 0.5 * (logvar.exp() + mean.square() - 1 - logvar).sum(-1)


def expected_log_q(logvar):
    """E log q(z | x), summed over dims."""
    return -0.5 * (1 + LOG_2PI + logvar).sum(-1)


def kl_between(mean, logvar, mean_r, logvar_r):
    """KL(q || q_ref) of two diagonal Gaussians, summed over dims."""
    return 0.5 * ((logvar.exp() + (mean - mean_r).square()) * (-logvar_r).exp() - 1 - logvar + logvar_r).sum(-1)


def timesteps(normal, loc, scale):
    """Standard normals -> t in 0 … 1."""
    return torch.sigmoid(loc + scale * normal)


def prefix_mask(chance, split, block):
    """True at the clean first positions of a block. chance [B, n], in 0 … 1: below prefix_share a block has some;
    split [B, n] in 0 … 1: how many, 1 … block - 1."""
    def of(share):
        count = torch.where(chance < share, 1 + (split * (block - 1)).long().clamp_max(block - 2), 0)
        return (torch.arange(block, device=chance.device) < count[..., None]).flatten(-2)
    return of


def noisy_copy(z0, z1, t, prefix):
    """z0, z1 [B, L, C], t [B, L] in 0 … 1, prefix [B, L] -> noisy latents and their timesteps 0 … 1000.

    A block's clean prefix is history: it carries no gradient to the encoder, as the clean half does not."""
    noisy = torch.lerp(z0, z1, t[..., None])
    return torch.where(prefix[..., None], z0.detach(), noisy), torch.where(prefix, 0.0, t * T)


def packed_velocity(dit, clean, noisy, t_noisy, attend):
    """Velocities [B, L, C] of the noisy half of the packed sequence [clean | noisy]; no gradient through `clean`."""
    length = clean.shape[1]
    positions = torch.arange(length, device=clean.device).repeat(2)
    x = torch.cat([clean.detach(), noisy], 1)
    t = torch.cat([torch.zeros_like(t_noisy), t_noisy], 1)
    return dit.run(x, t, positions, lambda _, q, k, v: attend(q, k, v))[:, length:]


def flow_loss(velocity, z0, z1, carries, detach_target=True):
    """Mean squared error of the velocity over positions that carry loss; carries [B, L], 0 or 1."""
    target = z1 - (z0.detach() if detach_target else z0)
    error = (velocity - target).square().mean(-1)
    return (error * carries).sum() / carries.sum().clamp_min(1.0)
