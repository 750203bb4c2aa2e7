"""Every Cola case below $LACUNA_GOLDENS (default tests/goldens) that the trainer can compute, against the official code.

Reductions and tolerances: the cases' own README."""
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from lacuna_train.cola import losses as L
from lacuna_train.cola.attention import block_causal_mask, masked, packed
from lacuna_train.cola.dit import sinusoid
from lacuna_train.cola.export import load_cola
from lacuna_train.cola.sample import Memory, generate

GOLDENS = Path(os.environ.get("LACUNA_GOLDENS") or ROOT / "tests" / "goldens")


def cases():
    roots = [p for p in [GOLDENS, *sorted(GOLDENS.rglob("cola"))] if p.name == "cola" and p.is_dir()]
    return [case for root in dict.fromkeys(roots) for case in sorted(root.iterdir()) if (case / "io.safetensors").exists()]


def close(actual, golden, allowed, name):
    difference = (actual - golden).abs().max().item()
    assert actual.shape == golden.shape and difference <= allowed, f"{name}: {difference:g} > {allowed:g}"


def pieces(lens):
    """Slices of the samples along axis 0."""
    ends = torch.cumsum(lens, 0).tolist()
    return [slice(end - n, end) for end, n in zip(ends, lens.tolist())]


def trained(model):
    return model.requires_grad_(True).train()


def each(lens, run):
    """run(slice) of every sample, joined."""
    return [torch.cat(parts) for parts in zip(*(run(s) for s in pieces(lens)))]


# ---- the VAE's losses

def check_gradients(model, loss, io, prefix, norm):
    for p in model.parameters():
        p.grad = None
    loss.backward(retain_graph=True)
    named = dict(model.named_parameters())
    wanted = {n.removeprefix(prefix): t for n, t in io.items() if n.startswith(prefix)}
    assert wanted
    for name, golden in wanted.items():
        grad = named[name].grad if named[name].grad is not None else torch.zeros_like(golden)
        close(grad, golden, max(2e-4 * golden.abs().max().item(), 1e-12), prefix + name)
    total = torch.stack([p.grad.double().square().sum() for p in named.values() if p.grad is not None]).sum().sqrt()
    assert total.item() == pytest.approx(norm.item(), rel=1e-4)
    return named


def check_train_vae(case, io):
    vae = trained(load_cola(case)[0])
    lens, ids, ids_masked = io["lens"], io["ids"], io["ids_masked"]
    assert torch.equal(ids_masked, torch.where(io["masked"].bool(), vae.config.mask_id, ids))

    def run(at, tokens, eps):
        mean, logvar = vae.encode(tokens[None, at])
        z = L.sample(mean, logvar, eps[None, at])
        return [t[0] for t in (mean, logvar, z, vae.decode_states(z))]

    mean, logvar, z, states = each(lens, lambda at: run(at, ids, io["eps"]))
    mean_m, _, _, states_m = each(lens, lambda at: run(at, ids_masked, io["eps_masked"]))
    for name, tensor in (("mean", mean), ("logvar", logvar), ("z", z), ("logits", vae.logits(states)),
                         ("mean_masked", mean_m), ("logits_masked", vae.logits(states_m))):
        close(tensor, io[name], 5e-5, name)
    kl = L.kl_standard(mean, logvar)
    close(kl, io["kl_tok"], 5e-5, "kl_tok")
    hidden = io["masked"].bool()
    found = {"ce": vae.losses(states, ids).mean(), "kl": kl.mean(), "mask": vae.losses(states_m, ids)[hidden].mean()}
    for name, loss in found.items():
        assert loss.item() == pytest.approx(io[f"loss.{name}"].item(), rel=1e-5)
        check_gradients(vae, loss, io, f"grad.{name}.", io[f"gradnorm_all.{name}"])


# ---- flow matching on the packed sequence

def check_train_fm(case, io):
    dit = trained(load_cola(case)[1])
    for scenario in sorted({n.split(".")[0] for n in io}):
        of = {n.removeprefix(scenario + "."): t for n, t in io.items() if n.startswith(scenario + ".")}
        velocities, weighted, weight = [], 0.0, 0.0
        packed_x, packed_t = [], []
        for i, at in enumerate(pieces(of["lens"])):
            z0, z1, t = of["z0"][None, at], of["z1"][None, at], of["t"][i]
            length = z0.shape[1]
            # A clean prefix is where the DiT was given timestep 0 in the noisy half.
            given = of["timestep_2L"][2 * at.start:2 * at.stop][length:]
            prefix = (given == 0)[None]
            noisy, t_noisy = L.noisy_copy(z0, z1, t.expand(1, length), prefix)
            packed_x += [z0[0], noisy[0]]
            packed_t += [torch.zeros(length), t_noisy[0]]
            attend = packed(length, int(of["block_sizes"][i]), "cpu")
            velocity = L.packed_velocity(dit, z0, noisy, t_noisy, attend)
            carries = of["mask"][None, at]
            weighted = weighted + L.flow_loss(velocity, z0, z1, carries) * carries.sum()
            weight += carries.sum()
            velocities.append(velocity[0])
        close(torch.cat(packed_x), of["txt_2L"], 1e-6, "txt_2L")
        close(torch.cat(packed_t), of["timestep_2L"], 1e-4, "timestep_2L")
        close(torch.cat(velocities), of["pred"], 5e-5, f"{scenario}.pred")
        loss = weighted / weight
        assert loss.item() == pytest.approx(of["loss"].item(), rel=1e-5)
        named = check_gradients(dit, loss, of, "grad.", of["gradnorm_all"])
        for name, golden in of.items():
            if name.startswith("gradnorm."):
                assert named[name.removeprefix("gradnorm.")].grad.norm().item() == pytest.approx(golden.item(), rel=1e-4)


# ---- the modules

@torch.no_grad()
def check_vae(case, io):
    vae = load_cola(case)[0]
    patch = vae.config.patch_size

    def encode(prefix, exact):
        """Padded case: every sample to its padded length."""
        states = {}

        def one(at):
            def watch(i, x):
                states.setdefault(i, []).append(x[0])
            return [t[0] for t in vae.encode(io[prefix + ".ids"][None, at], watch)]

        mean, logvar = each(io[prefix + ".lens"], one)
        close(mean, io[prefix + ".mean"], exact, prefix + ".mean")
        close(logvar, io[prefix + ".logvar"], exact, prefix + ".logvar")
        for i, parts in states.items():
            if f"{prefix}.h{i}" in io:
                close(torch.cat(parts), io[f"{prefix}.h{i}"], exact, f"{prefix}.h{i}")

    encode("enc", 2e-5)
    encode("encpad", 2e-5)
    logits, = each(io["dec.lens"], lambda at: [vae.logits(vae.decode_states(io["dec.z"][None, at]))[0]])
    assert logits.shape[0] == io["dec.z"].shape[0] * patch
    close(logits, io["dec.logits"], 5e-5, "dec.logits")


@torch.no_grad()
def check_dit(case, io):
    dit = load_cola(case)[1]
    bs = dit.config.block_size
    t = io["t"]
    close(sinusoid(t), io["temb.sinusoid"], 1e-4, "sinusoid")
    close(dit.embed_time(t), io["temb.emb"], 5e-5, "emb")
    n = len(io["full.x"])
    see = masked(block_causal_mask(n, bs))
    x = io["full.x"].expand(len(t), -1, -1)
    v = dit.run(x, t[:, None].expand(-1, n), torch.arange(n), lambda _, *qkv: see(*qkv))
    close(v, io["full.v"], 5e-5, "full.v")
    v = dit.run(x, io["full.t_tok"].expand(len(t), -1), torch.arange(n), lambda _, *qkv: see(*qkv))
    close(v[0], io["full.v_tok"], 5e-5, "full.v_tok")
    rows = io["block.x"].expand(len(t), -1, -1)
    own = Memory(dit.config.num_layers).attend(keep=False)
    close(dit.run(rows, t[:, None].expand(-1, bs), torch.arange(bs), own), io["uncond.v"], 5e-5, "uncond.v")
    history = Memory(dit.config.num_layers)
    m = len(io["hist.x"])
    v = dit.run(io["hist.x"].expand(len(t), -1, -1), torch.zeros(len(t), m), torch.arange(m),
                history.prefill(block_causal_mask(m, bs)))
    close(v[0], io["hist.v"], 5e-5, "hist.v")
    hidden = {}
    v = dit.run(rows, t[:, None].expand(-1, bs), torch.arange(m, m + bs), history.attend(keep=False),
                lambda name, layer, y: hidden.update({layer + 1: y}))
    close(v, io["cached.v"], 5e-5, "cached.v")
    row = t.tolist().index(437.5)
    for i, y in hidden.items():
        close(y[row], io[f"dbg.h{i}"], 5e-5, f"dbg.h{i}")
    v = dit.run(rows, io["cached.t_pinned"].expand(len(t), -1), torch.arange(m, m + bs), history.attend(keep=False))
    close(v[0], io["cached.v_pinned"], 5e-5, "cached.v_pinned")
    dit.run(rows, torch.zeros(len(t), bs), torch.arange(m, m + bs), history.attend(keep=True))
    v = dit.run(io["commit.x3"].expand(len(t), -1, -1), t[:, None].expand(-1, bs), torch.arange(m + bs, m + 2 * bs),
                history.attend(keep=False))
    close(v, io["commit.v3"], 5e-5, "commit.v3")


def check_e2e(case, io):
    """Ids of whole generations, greedy, with and without the repetition penalty."""
    vae, dit = load_cola(case)
    tags = sorted({n.rpartition(".")[0] for n in io if ".ids_rp" in n})
    assert tags
    for tag in tags:
        prompt, steps, rounding = tag.split(".")
        ids, known = io[f"{prompt}.ids"][None], int(io[f"{prompt}.known"])
        for name, penalty in (("rp11", 1.1), ("rp10", 1.0)):
            wanted = io[f"{tag}.ids_{name}"][known:]
            found = generate(vae, dit, ids, len(wanted), int(steps[1:]), 7.0, penalty=penalty,
                             noise=io["noise"][int(prompt[1:])][:, None], bf16_time=rounding == "bf16t")
            assert torch.equal(found[0], wanted), f"{tag} {name}"


def check(case):
    io = load_file(case / "io.safetensors")
    if case.name.startswith("train_vae"):
        check_train_vae(case, io)
    elif case.name.startswith("train_fm"):
        check_train_fm(case, io)
    elif case.name.startswith("vae_"):
        check_vae(case, io)
    elif case.name == "dit" or case.name.startswith("dit_"):
        check_dit(case, io)
    elif case.name.startswith("e2e"):
        check_e2e(case, io)
    else:
        pytest.fail(f"{case}: a case of a kind that the trainer does not know")


def test_there_are_cases():
    assert {"train_vae", "train_fm"} <= {c.name for c in cases()}


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_golden(case):
    check(case)
