#!/usr/bin/env bash
# Row-scaled and elementwise methods again, on the GPUs of one machine: tests of the kernels, then the 7B timing of the
# named cases. usage: benchmarks/gpu_rows.sh GPUS [CASE ...]
set -uo pipefail
gpus=$1; shift
[ -d .gpu-site ] || tar xJf .carry/1/site.tar.xz
. benchmarks/gpu_env.sh
export OMP_NUM_THREADS=4
python3 -m pytest -q -m gpu tests/test_columns.py -p no:cacheprovider >"$OUT/tests.log" 2>&1 &
for k in $(seq 0 $((gpus - 1))); do
  CUDA_VISIBLE_DEVICES=$k timeout 300 python3 benchmarks/adapters_7b.py --part "$k/$gpus" --cases "$@" \
    --out "$OUT/rows-$k.jsonl" >"$OUT/rows-$k.log" 2>&1 &
done
wait
tail -n 15 "$OUT/tests.log"
cat "$OUT"/rows-*.jsonl >"$OUT/rows.jsonl"; rm "$OUT"/rows-*.jsonl
cat "$OUT"/rows-*.log >"$OUT/rows.log"; rm "$OUT"/rows-*.log
python3 benchmarks/adapters_7b.py --join "$OUT/rows.jsonl" --out "$OUT/joined.json"
python3 - <<'P'
import json, os
for r in json.load(open(os.environ["OUT"] + "/joined.json"))["rows"]:
    if "error" in r: print(r["case"], r["error"][:300]); continue
    print(r["micro_batch"], r["case"], r["step_s"], r["step_over_lora"], r["peak_over_lora"], r["gpu_busy_s"], r["launches"])
P
