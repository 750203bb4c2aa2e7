#!/usr/bin/env bash
# Decode rate after prefixes of several lengths, linear attention beside a dense Transformer of the same shape. Every prefix
# is read once and saved; then the lengths take turns in decoding, so that a machine whose memory speeds up and slows down
# does so for all of them. Prints tokens/s, a column a round.
#   [CASES="gla_swa:1024 qwen2:1024"] bench/decode_over_length.sh [ROUNDS [TOKENS]]
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5} tokens=${2:-257}
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cat data/books/*.txt >"$dir/text"
shape=(--dtype bf16 --layers 4 --hidden 896 --ffn 4864 --heads 14 --kv-heads 2 --vocab 8192 --positions 1048576 --tokenizer models/base)
scripts/make_random_model.py "$dir/gla_swa" --arch gla_swa --window 4096 "${shape[@]}" >/dev/null
scripts/make_random_model.py "$dir/qwen2" "${shape[@]}" >/dev/null
declare -A rate
cases=()
for case in ${CASES:-gla_swa:1024 gla_swa:4096 gla_swa:16384 gla_swa:65536 gla_swa:262144 qwen2:1024 qwen2:4096 qwen2:16384 qwen2:32768}; do
  arch=${case%:*} n=${case#*:}
  head -c $((n * 39 / 10)) "$dir/text" | { iconv -c -f utf-8 -t utf-8 || true; } >"$dir/prompt"  # iconv fails on a character cut in two
  build/lacuna run -m "$dir/$arch" -f "$dir/prompt" -n 1 -q --save-state "$dir/$case.state" >/dev/null
  cases+=("$case")
done
for ((r = 0; r < rounds; r++)); do
  for case in "${cases[@]}"; do
    out=$(build/lacuna run -m "$dir/${case%:*}" -p "and" -n "$tokens" -q --json --load-state "$dir/$case.state")
    rate[$case]+=" $(python3 -c 'import json,sys; d=json.load(sys.stdin)["runs"][0]["decode"]; print(round(d["tokens"] / d["seconds"], 1))' <<<"$out")"
  done
done
for case in "${cases[@]}"; do
  echo "$case:$(python3 -c 'import sys, statistics; v = list(map(float, sys.argv[1:])); print(" median %.1f of" % statistics.median(v), *v)' ${rate[$case]})"
done
