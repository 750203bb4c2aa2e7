"""Every SpikingBrain case below $LACUNA_GOLDENS (default tests/goldens) against what the official code computed.

A case is a folder below one named `spikingbrain`: a checkpoint in the public layout with the outputs of
a prefill, a W8ASpike one with spike counts, or numbers only. A folder of another kind fails."""
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from lacuna_train import spike
from lacuna_train.export import load_model

GOLDENS = Path(os.environ.get("LACUNA_GOLDENS") or ROOT / "tests" / "goldens")


def cases():
    roots = [p for p in [GOLDENS, *sorted(GOLDENS.rglob("spikingbrain"))] if p.name == "spikingbrain" and p.is_dir()]
    return [case for root in dict.fromkeys(roots) for case in sorted(root.iterdir()) if case.is_dir()]


def close(actual, golden, name):
    """Tolerance from the cases' own README: 5e-5, or 1e-5 of the largest value; log decays to 1e-6."""
    allowed = 1e-6 if name.endswith(".g") else max(5e-5, 1e-5 * golden.abs().max().item())
    difference = (actual - golden).abs().max().item()
    assert actual.shape == golden.shape and difference <= allowed, f"{name}: {difference:g} > {allowed:g}"


@torch.no_grad()
def check_decoder(case, io):
    model = load_model(case, torch.float32, "cpu")
    window = model.config.window
    ids = io["ids"].long()
    positions = torch.arange(len(ids))
    for prefix, seen in (("w", window), ("wp1", window + 1)):  # keys of a window: the paper's, the flash path's
        model.config.window = seen
        known = {n.removeprefix(prefix + "."): t for n, t in io.items() if n.startswith(prefix + ".")}
        assert "logits" in known
        x = model.embed(ids)
        for layer in model.layers:
            parts = {}
            if layer.kind == "gla":
                parts |= zip("qkvg", model.gla_inputs(layer, x))

            def watch(_, __, *seen):
                parts.update({"state": seen[0][0]} if len(seen) == 1 else zip("qkv", seen))

            x = model.run_layer(layer, x, 1, positions, watch)
            parts["resid_out"] = x
            for name, tensor in parts.items():
                name = f"L{layer.index}.{name}"
                if name in known:
                    close(tensor, known.pop(name), f"{prefix}.{name}")
        close(model.logits(x), known.pop("logits"), prefix + ".logits")
        # What is left are values inside the fused bodies, which the layer's output depends on.
        inner = {"normed", "resid_mid", "o", "o_norm", "final_norm"}
        assert {n.rpartition(".")[2] for n in known} <= inner, sorted(known)


def check_counts(io):
    """The counts and thresholds of every coded input, from the stored activations."""
    checked = 0
    for name, x in io.items():
        stem = name.removesuffix(".x")
        if stem == name or stem + ".vth" not in io:
            continue
        counts, threshold = spike.spikes(x, spike.DEFAULT_K)
        assert torch.equal(counts.to(torch.int32), io[stem + ".spikes"].to(torch.int32)), stem
        assert torch.allclose(threshold[:, 0], io[stem + ".vth"], rtol=1e-6, atol=0), stem
        checked += 1
    assert checked


def check_rates(io):
    """Signed magnitude bits: the mean popcount a count is that code's firing rate times its number of steps."""
    checked = 0
    for name, x in io.items():
        for code in ("bidir", "bitwise"):
            key = name.replace("x.", code + ".", 1)
            if not name.startswith("x.") or key + ".rate" not in io or io[key + ".zero"].any():
                continue
            tally = spike.Tally()
            tally.add(x.float())
            wanted = io[key + ".rate"].item() * io[key + ".T"].item()
            assert tally.shares()["mean_popcount"] == pytest.approx(wanted, abs=1e-5), key
            checked += 1
    assert checked


def test_there_are_cases():
    assert any((c / "model.safetensors").exists() for c in cases()), f"no SpikingBrain checkpoint below {GOLDENS}"


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_golden(case):
    io = load_file(case / "io.safetensors")
    if not (case / "config.json").exists():
        check_rates(io)
        return
    config = json.loads((case / "config.json").read_text())
    assert config["model_type"] == "gla_swa"
    if "quant_weight_group_size" in config:  # W8ASpike: weights by groups of 128, which the trainer neither writes nor reads
        check_counts(io)
    else:
        check_decoder(case, io)
