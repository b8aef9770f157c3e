#!/usr/bin/env bash
# The scoreboard and the 7B timing table on the GPU machine, in calls of at most ten minutes that overlap with the work:
#   begin GPUS                what call 1 carried (.carry/1) is unpacked, the 7B timing starts in the background
#   go GPUS PER_GPU MINUTES   what call 2 carried (.carry/2) completes the model; the scoreboard follows the timing and
#                             ends so many minutes after `begin`
#   resume GPUS               saves, resumes and drills of a 7B shape on these two GPUs (2,3), beside a scoreboard on others
#   wait SECONDS              look after it for so long, or until it has ended; results go to $OUT
# benchmarks/scoreboard_pack.sh, run before on the other machine, makes both folders. A session of its own (setsid) lets
# the work go on between calls; it ends with the machine, so the last `wait` must come before that.
set -euo pipefail
work=$PWD/.bench/scoreboard; mkdir -p "$work"
case ${1:?begin, go, resume or wait} in
begin)
  gpus=$2; date +%s >"$work/began"
  nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader; nproc
  tar xJf .carry/1/site.tar.xz
  mkdir -p "$work/input"; tar xJf .carry/1/data.tar.xz -C "$work/input"; cp .carry/1/model.aa "$work/input/"
  # every call brings the checkout anew, while processes of the call before read theirs: they get a copy
  rm -rf "$work/tree"; mkdir "$work/tree"
  cp -r adapters launcher recipes slurm benchmarks pyproject.toml "$work/tree/"; ln -s "$PWD/.gpu-site" "$work/tree/.gpu-site"
  (. benchmarks/gpu_env.sh; python3 -m pytest -q -m gpu -p no:cacheprovider tests/test_columns.py) >"$work/tests.log" 2>&1 || true
  cd "$work/tree"
  . benchmarks/gpu_env.sh
  python3 -c 'import bitsandbytes, liger_kernel, torch, decompft.launcher.planner; print(torch.__version__, torch.cuda.device_count())'
  rm -f "$work/7b.done" "$work"/7b-*
  export OMP_NUM_THREADS=4
  setsid bash -c '
    for k in $(seq 0 $(('"$gpus"' - 1))); do
      CUDA_VISIBLE_DEVICES=$k timeout 420 python3 benchmarks/adapters_7b.py --part $k/'"$gpus"' --out "'"$work"'/7b-$k.jsonl" \
        >"'"$work"'/7b-$k.log" 2>&1 &
    done; wait; touch "'"$work"'/7b.done"' </dev/null >/dev/null 2>&1 &
  ;;
go)
  gpus=$2 per=$3 minutes=$4
  cat "$work/input/model.aa" .carry/2/model.a[b-z] >"$work/input/model.gguf"
  echo "$(cat .carry/2/model.sha256)  $work/input/model.gguf" | sha256sum -c
  cd "$work/tree"
  . benchmarks/gpu_env.sh
  export DECOMPFT_CACHE=$work/cache  # gpu_env.sh's is another in every call
  merge=""; [ -f benchmarks/results/scoreboard.json ] && merge="--merge benchmarks/results/scoreboard.json"
  rm -f "$work/done"
  setsid bash -c '
    python3 benchmarks/scoreboard.py --prepare --model "'"$work"'/input/model.gguf" --data "'"$work"'/input/commonsense" \
      --work "'"$work"'" --out "'"$work"'/all.json" >"'"$work"'/prepare.log" 2>&1
    while [ ! -e "'"$work"'/7b.done" ]; do sleep 0.5; done
    minutes=$(python3 -c "import time; print('"$minutes"' - (time.time() - $(cat "'"$work"'/began")) / 60)")
    python3 benchmarks/scoreboard.py --model "'"$work"'/input/model.gguf" --data "'"$work"'/input/commonsense" --work "'"$work"'" \
      --gpus '"$gpus"' --per-gpu '"$per"' --minutes $minutes '"$merge"' --out "'"$work"'/all.json" >"'"$work"'/driver.log" 2>&1
    touch "'"$work"'/done"' </dev/null >/dev/null 2>&1 &
  ;;
resume)
  gpus=$2
  cd "$work/tree"
  . benchmarks/gpu_env.sh
  rm -f "$work/resume.done"; touch "$work/resume.asked"
  setsid bash -c '
    while [ ! -e "'"$work"'/7b.done" ]; do sleep 0.5; done
    CUDA_VISIBLE_DEVICES='"$gpus"' python3 benchmarks/gpu_resume.py --gpus 2 --out "'"$work"'/resume.json" >"'"$work"'/resume.log" 2>&1
    touch "'"$work"'/resume.done"' </dev/null >/dev/null 2>&1 &
  ;;
wait)
  until=$(($(date +%s) + $2))
  is_over() { [ -e "$work/done" ] && { [ ! -e "$work/resume.asked" ] || [ -e "$work/resume.done" ]; }; }
  while [ "$(date +%s)" -lt "$until" ] && ! is_over; do sleep 1; done
  nvidia-smi --query-gpu=index,utilization.gpu,memory.used --format=csv,noheader
  uptime
  is_over && echo "ALL DONE" || echo "still running"
  [ -e "$work/resume.done" ] && echo "RESUME DONE"
  tail -n 4 "$work/tests.log" 2>/dev/null | cut -c1-200 || true
  tail -n 3 "$work/resume.log" 2>/dev/null | cut -c1-600 || true
  for k in "$work"/7b-*.log; do tail -n 2 "$k" | cut -c1-300; done
  tail -c 200 "$work/prepare.log" 2>/dev/null | tr "\r" "\n" | tail -n 1 || true
  tail -n 40 "$work/driver.log" 2>/dev/null | cut -c1-250 || true
  ;;
*) echo "begin, go, resume or wait" >&2; exit 2 ;;
esac
# what there is so far; eight files at most come back
cat "$work"/7b-*.jsonl >"$OUT/adapters_7b.jsonl" 2>/dev/null || true
cp "$work/all.json" "$OUT/scoreboard.json" 2>/dev/null || true
cp "$work/resume.json" "$OUT/resume.json" 2>/dev/null || true
cat "$work"/resume.log "$work"/tests.log >"$OUT/resume.log" 2>/dev/null || true
cp "$work/driver.log" "$OUT/driver.log" 2>/dev/null || true
cat "$work"/logs/*.log 2>/dev/null | tail -c 2000000 >"$OUT/workers.log" || true
cat "$work"/7b-*.log 2>/dev/null | tail -c 1000000 >"$OUT/7b.log" || true
