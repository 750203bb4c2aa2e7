import json

import numpy as np
import pytest
import torch
from test_hybrid import SMALL, small_hybrid

from lacuna_train import spike
from lacuna_train.calibrate import choose, measure, observe


def bits(value):
    return format(int(abs(value)), "b").zfill(9)


def test_counts_of_a_neuron():
    """round(x / V), V = mean|x| / k clamped, half to even, never clipped, signed; a row of zeros sends none."""
    x = torch.tensor([[1.0, -2.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0], [1e6, 1e6, 1e6, 1e6], [0.5, 1.5, 2.5, -3.5]])
    counts, threshold = spike.spikes(x, 2.0)
    assert threshold[:, 0].tolist() == [1.0, pytest.approx(1e-5), 1e4, 1.0]
    assert counts.tolist() == [[1, -2, 3, -2], [0, 0, 0, 0], [100, 100, 100, 100], [0, 2, 2, -4]]
    outlier = torch.full((1, 1000), 1e-3)
    outlier[0, 0] = 1e3
    assert spike.spikes(outlier, 3.0)[0].max() > 2900


def test_shares_against_written_out_bits():
    values = np.array([0, 0, 1, -1, 2, 5, 7, -7, 8, 9, 63, 64, -65, 300, 511, 2, 3, 56])
    tally = spike.Tally()
    tally.add(torch.tensor(values[:7], dtype=torch.float32))
    tally.add(torch.tensor(values[7:], dtype=torch.float32))
    shares = tally.shares()
    windows = [bits(v)[i:i + 3] for v in values for i in (0, 3, 6)]
    assert shares["silent_window_share"] == pytest.approx(np.mean([w == "000" for w in windows]))
    assert shares["mean_popcount"] == pytest.approx(np.mean([bits(v).count("1") for v in values]))
    assert shares["zero_count_share"] == pytest.approx(2 / 18) and shares["largest_count"] == 511
    assert shares["at_most_7_share"] == pytest.approx(np.mean(np.abs(values) <= 7))


def test_gaussian_inputs_give_the_papers_sparsity():
    """Spec section 3.5: silent windows for k = 2, 2.5, 3, 3.5, 4, and what one window holds at k = 3."""
    x = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    for k, share in ((2, .719), (2.5, .707), (3, .694), (3.5, .680), (4, .664)):
        assert float(spike.silent_windows(spike.spikes(x, k)[0])) == pytest.approx(share, abs=2e-3)


def test_gradients_pass_straight_through():
    x = torch.randn(3, 16, requires_grad=True)
    out = spike.sent(x, torch.tensor([3.0, 0.0, 3.0, 3.0]), spike.ATTN_IN, torch.float32)
    assert not torch.equal(out, x) and (out - x).abs().max() <= 0.51 * x.abs().mean(-1).max() / 3
    pull = torch.randn(3, 16)
    assert torch.equal(torch.autograd.grad((out * pull).sum(), x)[0], pull)
    assert torch.equal(spike.sent(x, torch.tensor([3.0, 0.0, 3.0, 3.0]), spike.O_IN, torch.float32), x)


def test_measured_errors_are_those_of_one_coded_site():
    model = small_hybrid()
    ids = torch.randint(0, 128, (4, 40))
    grid = [2.0, 4.0]
    error, silent, channels = measure(model, ids, grid)
    assert not model.coded and channels.tolist() == [48, 48, 48, 40]
    with torch.no_grad():
        positions = torch.arange(40).repeat(4)
        x = model.embed(ids.reshape(-1))
        for layer in model.layers:
            y = model.run_layer(layer, x, 4, positions)
            k = torch.zeros(4, 4)
            k[layer.index, 2] = 4.0
            model.code(k)
            coded = model.run_layer(layer, x, 4, positions)
            model.code(None)
            wanted = (coded - y).square().sum() / (y - x).square().sum()
            assert error[layer.index, 2, 1].item() == pytest.approx(wanted.item(), rel=1e-4)
            x = y
    assert (error[..., 0] > error[..., 1]).all() and (silent[..., 0] > silent[..., 1]).all()


def test_the_choice_reaches_the_level_at_the_least_error():
    """Against every combination."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.tensor([1.0, 2.0])
    error = torch.rand(2, 2, 3, generator=generator).double().sort(-1, descending=True).values
    silent = torch.rand(2, 2, 3, generator=generator).double().sort(-1, descending=True).values
    weight = channels / channels.sum() / 2
    combinations = np.array(np.meshgrid(*[range(3)] * 4)).reshape(4, -1).T
    total = lambda t, pick: float((t.gather(2, torch.as_tensor(pick).view(2, 2, 1))[..., 0]).sum())
    share = lambda pick: float((silent.gather(2, torch.as_tensor(pick).view(2, 2, 1))[..., 0] * weight).sum())
    for level in (0.2, 0.4, 0.5, 0.6, 0.7):
        pick = choose(error, silent, channels, level)
        best = min((total(error, c) for c in combinations if share(c) >= share(pick.flatten())), default=None)
        possible = any(share(c) >= level for c in combinations)
        assert (share(pick.flatten()) >= level) == possible
        assert total(error, pick.flatten()) == pytest.approx(best)  # none as sparse has less error


def test_tallies_of_the_coded_model_leave_out_what_is_not_coded():
    model = small_hybrid()
    ids = torch.randint(0, 128, (2, 40))
    k = torch.full((4, 4), 3.0)
    k[:, spike.DOWN_IN] = 0.0
    seen = observe(model, ids, k)
    assert "down_in" not in seen and set(seen) == {"all", "attn_in", "o_in", "mlp_in"}
    mean = np.mean([seen[s]["silent_window_share"] for s in ("attn_in", "o_in", "mlp_in")])
    assert seen["all"]["silent_window_share"] == pytest.approx(mean) and 0.5 < mean < 0.9


def lacuna(monkeypatch, capsys, *args):
    """A command in this process."""
    from lacuna_train.__main__ import main
    monkeypatch.setattr("sys.argv", ["lacuna_train", *map(str, args)])
    main()
    return capsys.readouterr().out


def test_the_commands_of_a_conversion(data, tmp_path, monkeypatch, capsys):
    """train --from, stop, resume, export, calibrate, evaluate with spikes."""
    from lacuna_train.export import write_checkpoint
    from lacuna_train.model import Decoder, ModelConfig
    parent = ModelConfig(vocab_size=8192, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    model = Decoder(parent, torch.float32)
    write_checkpoint(parent, {"model." + k: v for k, v in model.state_dict().items()}, tmp_path / "parent", int8=True)
    run = lambda *a: lacuna(monkeypatch, capsys, *a)
    train = ["train", "--data", data, "--out", tmp_path / "run", "--from", tmp_path / "parent", "--arch", "gla_swa",
             "--window", 64, "--gate-bias", "spread", "--norm-init", "match", "--distill", 1, "--spike-from", 0.5, "--tokens", 1024,
             "--longest", 1024, "--workers", 1, "--token-budget", 4096]
    run(*train, "--steps", 1)
    run(*train, "--check")
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [e["resumed_at"] for e in events if e.get("event") == "start"] == [0, 1]
    checks = [e for e in events if e.get("event") == "check"]
    assert [e["length"] for e in checks if e.get("what") == "step"] == [512, 1024] and checks[-1]["ok"]
    assert checks[0]["float32"] < 1e-5 and all(e["gradient"] > 0 for e in checks if e.get("what") == "step")
    assert events[-1]["finished"] and events[-1]["tokens"] == 4096  # the budget ends it, not the clock
    assert all(0 < e["divergence"] < 9 for e in events if "divergence" in e)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["config"]["window"] == 64 and (saved["model"]["layers.0.attn.gk_proj.1.bias"] > 1).any()

    run("export", "--source", tmp_path / "run" / "checkpoint.pt", "--tokenizer", data / "tokenizer", "--out", tmp_path / "int8")
    out = run("calibrate", "--model", tmp_path / "int8", "--data", data, "--out", tmp_path / "spiking", "--samples", 4,
              "--length", 64, "--grid", 2, 3, 4, "--bits-length", 256, "--bits-tokens", 1024)
    config = json.loads((tmp_path / "spiking" / "config.json").read_text())
    report = json.loads((tmp_path / "spiking" / "spike-calibration.json").read_text())
    coding = config["spike_coding"]
    assert coding["mode"] == "paper" and coding["k"] == 3.0 and np.shape(coding["k_by_layer"]) == (2, 4)
    assert np.isin(coding["k_by_layer"], [2, 3, 4]).all() and "bits per byte" in out
    assert report["reached"] == (report["calibrated"]["all"]["silent_window_share"] >= 0.69)
    assert (tmp_path / "spiking" / "tokenizer.json").exists() and config["model_type"] == "gla_swa"

    table = run("evaluate", "--model", tmp_path / "spiking", "--data", data, "--out", tmp_path / "r.json", "--count", 1,
                "--lengths", 512, "--tasks", "passkey", "--spikes", "off", "config", "3", "--workers", 1, "--bits-tokens", 1024)
    results = json.loads((tmp_path / "r.json").read_text())
    assert [c["spikes"] for c in results["cells"]] == ["off", "config", "3"] and "spikes config" in table
    bits_of = {name: value["512"] for name, value in results["bits_per_byte_by_spikes"].items()}
    assert bits_of["off"] != bits_of["config"] and results["bits_per_byte"]["512"] == bits_of["off"]
