#!/usr/bin/env bash
# Converts the base model to gla_swa on a GPU, calibrates spiking and evaluates parent, child and spiking child.
#   train/gpu_spike.sh DATA OUT SECONDS      DATA: what `prepare` wrote; everything is over within about SECONDS
# Variants, by environment variables (defaults in brackets):
#   WINDOW [512]  FULL_ATTENTION [none, e.g. 7]  DISTILL [0]  TOKENS [50e6]  GATE_BIAS [spread]  NORM_INIT [match]
#   SPIKE_FROM [1: never]  MODE [paper]  MUON_LR ADAM_LR [the recipe's]  SEED [1]
#   PARENT [models/base]  EVAL_SECONDS [45: kept for calibration and evaluation]  COUNT [16]
#   LENGTHS [512 1024 4096 8192 16384]  FAR_LENGTH [4096: of the look at needles inside and beyond the window]
#   BITS_TOKENS [262144: of bits per byte, a length]  SAMPLES [128: of calibration]
#   PYTHON [python3]  WORKERS [cores - 3]  EXTRA [none: further options of train]
# Starts with a check: numbers against the CPU, then speed, memory and loss of a step of every length.
set -euo pipefail
data=$(realpath "$1") && out=$(realpath -m "$2") && seconds=$3
cd "$(dirname "$0")"
begun=$SECONDS
left() { echo $((seconds - (SECONDS - begun))); }
lacuna() { "${PYTHON:-python3}" -m lacuna_train "$@"; }
parent=${PARENT:-../models/base} keep=${EVAL_SECONDS:-45}
run=$(mktemp -d)  # the checkpoint with the optimiser's state is 10 times the model: it stays here
trap 'rm -rf "$run"' EXIT
mkdir -p "$out"

options=(--window "${WINDOW:-512}" --gate-bias "${GATE_BIAS:-spread}" --norm-init "${NORM_INIT:-match}" --distill "${DISTILL:-0}"
  --spike-from "${SPIKE_FROM:-1}" --token-budget "${TOKENS:-50e6}" --seed "${SEED:-1}")
[ -z "${FULL_ATTENTION:-}" ] || options+=(--full-attention $FULL_ATTENTION)
[ -z "${MUON_LR:-}" ] || options+=(--muon-lr "$MUON_LR")
[ -z "${ADAM_LR:-}" ] || options+=(--adam-lr "$ADAM_LR")
[ -z "${WORKERS:-}" ] || options+=(--workers "$WORKERS")
[ -z "${EXTRA:-}" ] || options+=($EXTRA)
printf '%s\n' "${options[*]}" >"$out/options.txt"

lacuna train --data "$data" --out "$run" --arch gla_swa --from "$parent" "${options[@]}" --check --end-with-call \
  --seconds $(($(left) - keep)) --total-seconds 100000 --save-seconds 100000 --log-seconds 3 2>&1 | tee "$out/train.txt"
cp "$run/log.jsonl" "$out/training-log.jsonl"
lacuna export --source "$run/checkpoint.pt" --tokenizer "$data/tokenizer" --out "$out/model"

# The dense child and its parent side by side with the calibration; the spiking child after it.
measure() { lacuna evaluate --data "$data" --count "${COUNT:-16}" --lengths ${LENGTHS:-512 1024 4096 8192 16384} \
  --bits-tokens "${BITS_TOKENS:-262144}" --workers 3 --seconds "$(($(left) > 12 ? $(left) - 5 : 7))" "$@"; }
measure --model "$parent" --out "$out/parent.json" >"$out/parent.txt" 2>&1 & first=$!
measure --model "$out/model" --out "$out/child.json" >"$out/child.txt" 2>&1 & second=$!
lacuna calibrate --model "$out/model" --data "$data" --out "$out/model" --mode "${MODE:-paper}" \
  --samples "${SAMPLES:-128}" --bits-tokens "${BITS_TOKENS:-262144}" 2>&1 | tee "$out/calibrate.txt"
mv "$out/model/spike-calibration.json" "$out/"
measure --model "$out/model" --out "$out/spiking.json" --spikes config 3 >"$out/spiking.txt" 2>&1 & third=$!
# Needles inside the window and beyond it.
window=${WINDOW:-512} far=${FAR_LENGTH:-4096}
needles() { measure --model "$out/model" --lengths "$far" --no-bits --out "$out/$1.json" --distance "$2" "$3" >"$out/$1.txt" 2>&1; }
needles inside 0 $((window * 3 / 4)) & fourth=$!
needles beyond $((window * 5 / 4)) "$far" & fifth=$!
failed=0
for job in $first $second $third $fourth $fifth; do wait "$job" || failed=1; done
for name in parent child spiking inside beyond; do echo "== $name"; cat "$out/$name.txt"; done
echo "all over after $((SECONDS - begun)) s; $(du -sb "$out/model" | cut -f1) bytes of model"
exit $failed
