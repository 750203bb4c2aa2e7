import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROMPTS, TRAIN

from lacuna_train.books import Books
from lacuna_train.feed import batch_rng, slot_arrays
from lacuna_train.mixture import ANSWER_CAP, LENGTHS, Mixture, draw_step, longest_length
from lacuna_train.model import Decoder, ModelConfig
from lacuna_train.optim import make_optimizers
from lacuna_train.tasks import ANSWER, TaskMaker
from lacuna_train.recipe import Clock, learning_rate_factor
from lacuna_train.trainer import Step, Update, plan_step

TOKENS = 2048


@pytest.fixture(scope="module")
def mixture(data):
    books = Books(data / "train")
    return Mixture(TaskMaker(PROMPTS, data / "tokenizer", books), books)


def batch(mixture, kind, length, step, tokens=TOKENS):
    out, _ = slot_arrays(tokens)
    mixture.fill(out, batch_rng(1, 0, step), kind, length, 0.6)
    return out


@pytest.mark.parametrize("kind, length", [("pack", 512), ("pack", 2048), ("evict", 1024)])
def test_batches(mixture, kind, length):
    out, again = batch(mixture, kind, length, 3), batch(mixture, kind, length, 3)
    assert all(np.array_equal(out[k], again[k]) for k in out)
    assert not np.array_equal(out["ids"], batch(mixture, kind, length, 4)["ids"])
    for step in range(25):
        out = batch(mixture, kind, length, step)
        assert out["weights"].sum() == pytest.approx(1.0, abs=1e-4)
        rows = out["ids"].reshape(-1, length), out["targets"].reshape(-1, length)
        assert np.array_equal(rows[0][:, 1:], rows[1][:, :-1])
        assert out["ids"].max() < 8192 and out["look_at"].max() < TOKENS
        # The end of a cue is a place of looks, and what it must foresee includes its own next tokens.
        for slot in np.flatnonzero(out["look_weights"].sum(1)):
            place = out["look_at"][slot]
            if out["classes"][place] == ANSWER and kind == "pack" and out["targets"][place] not in mixture.separators:
                assert out["targets"][place] in out["look_ids"][slot]
    if kind == "evict":  # the reply follows the prompt
        assert np.array_equal(out["targets"].reshape(-1, length)[:, -1], out["reply_ids"][:, 0])
        assert (out["reply_weights"].sum(1) >= 1).all()


def test_long_rows_of_every_length(mixture):
    for length in (4096, 8192):
        for step in range(6):
            for kind in ("pack", "evict"):
                out = batch(mixture, kind, length, step, tokens=length)
                assert np.isfinite(out["weights"]).all()
                answers = out["classes"] == ANSWER
                if answers.any():
                    others = 1 - out["weights"][answers].sum()
                    assert out["weights"][answers].max() <= ANSWER_CAP * max(others, 1e-6)


def test_schedule_depends_on_the_share_of_time_alone():
    assert [longest_length(p) for p in (0.0, 0.999)] == [LENGTHS[0], LENGTHS[-1]]
    assert longest_length(1.0) == LENGTHS[-1]
    assert learning_rate_factor(0.0) == 1.0 and learning_rate_factor(1.0) == 0.0
    plans = [plan_step(1, s, s / 100, 1, 16384) for s in range(100)]
    resumed = [plan_step(1, s, s / 100, 1, 16384) for s in range(60, 100)]
    assert plans[60:] == resumed
    assert max(draw_step(np.random.default_rng(s), 0.99, 4096)[1] for s in range(50)) == 4096
    clock = Clock(300.0, 400.0)
    assert clock.progress() == 0.75


def tiny():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16)
    model = Decoder(config, torch.float32)
    bridge = torch.nn.Parameter(torch.eye(32))
    update = Update(make_optimizers(model, [bridge], 0.01, 0.002), [*model.parameters(), bridge], 0.01, 0.002)
    return model, bridge, Step(model, bridge, torch.device("cpu"), TOKENS), update


def one_step(step, update, arrays, kind, length):
    step.load(arrays)
    step.scalars["look"].fill_(0.1)
    step.scalars["share"].fill_(0.1)
    step.scalars["temperature"].fill_(0.5)
    step(kind, length)
    update(1.0)


def test_a_resumed_run_takes_the_same_steps(mixture):
    plan = [("pack", 512), ("evict", 1024), ("pack", 512)]
    arrays = [batch(mixture, k, n, i) for i, (k, n) in enumerate(plan)]
    model, _, step, update = tiny()
    for (kind, length), a in zip(plan[:2], arrays):
        one_step(step, update, a, kind, length)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    bridge = step.bridge.detach().clone()
    state = update.state_dict()
    state = {"muon": {k: v.clone() for k, v in state["muon"].items()},
             "adam": [{k: v.clone() for k, v in s.items()} for s in state["adam"]]}
    one_step(step, update, arrays[2], *plan[2])

    other, other_bridge, other_step, other_update = tiny()
    other.load_state_dict(saved)
    other_bridge.data.copy_(bridge)
    other_update.load_state_dict(state)
    one_step(other_step, other_update, arrays[2], *plan[2])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_batch_with_bad_gradients_changes_nothing(mixture):
    model, bridge, step, update = tiny()
    one_step(step, update, batch(mixture, "pack", 512, 0), "pack", 512)
    before = [p.detach().clone() for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    model.layers[0].mlp["up_proj"].weight.grad[0, 0] = float("nan")
    update(1.0)
    after = [p.detach() for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert int(update.dropped) == 1


def test_the_commands(data, tmp_path):
    """train, stop, resume, export, evaluate, as a user runs them."""
    def lacuna(*args):
        done = subprocess.run([sys.executable, "-m", "lacuna_train", *map(str, args)], cwd=TRAIN, text=True,
                              capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run = tmp_path / "run"
    shape = ["--hidden", 64, "--intermediate", 32, "--layers", 1, "--heads", 1, "--kv-heads", 1]
    common = ["train", "--data", data, "--out", run, "--tokens", 1024, "--longest", 1024, "--workers", 1,
              "--total-seconds", 1000, *shape]
    lacuna(*common, "--steps", 1)
    lacuna(*common, "--steps", 2)
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["resumed_at"] for e in events if e.get("event") == "start"] == [0, 1]
    lacuna("export", "--source", run / "checkpoint.pt", "--tokenizer", data / "tokenizer", "--out", tmp_path / "int8")
    assert (tmp_path / "int8" / "model.safetensors").exists()
    table = lacuna("evaluate", "--model", tmp_path / "int8", "--data", data, "--out", tmp_path / "r.json", "--count", 1,
                   "--lengths", 512, "--tasks", "passkey", "--policy", "full", "laprox", "--workers", 1, "--no-bits")
    assert "passkey" in table and len(json.loads((tmp_path / "r.json").read_text())["cells"]) == 2
