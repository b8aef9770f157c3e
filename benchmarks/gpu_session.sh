#!/usr/bin/env bash
# A session on the GPU machine, in calls of at most ten minutes that overlap with the work:
#   begin GPUS MINUTES PART...   what call 1 carried (.carry/1) is unpacked; the parts start in the background, and what
#                                of them can end early does so, so many minutes after this
#   go                           what a further call carried (.carry/2 and so on); scoreboard, parity and attention wait for it
#   wait SECONDS                 look after them for so long, or until all have ended; results go to $OUT
# Parts, run in the order given; each has the GPUs to itself but drills and scoreboard, which share them:
#   drills       kill, preempt and resume of a 7B shape over two GPUs, with kernels that add in a fixed order
#   scoreboard   its missing cells, SHARE of them at once on each GPU (default 14), BOARD_MINUTES long (default: to the end)
#   methods      each method's step beside LoRA's at 7B, recorded and not: METHODS, names with commas between them, default all
#   tests        pytest -m gpu of TESTS (default: all files that have some), for TESTS_S seconds at most (default 300), on the
#                first GPU, and beside it on the last of two or more: kernels
#   kernels      products and kernels by themselves: KERNELS, names of scripts, default all; then profiles
#   parity       200 steps of a real model in fp8 and in bfloat16, beside tests where the model was carried (not timed)
#   gaps         where the GPU waits in a run's steps: GAPS, each a method and overrides, with commas between them
#   attention    torch's attention kernels and FlashAttention 4, once `go` had it (FA4=yes in gpu_pack.sh)
#   packed       short documents packed and padded, 8 layers of 7B's shape; the table goes into logs.tar.xz
#   profiles     a step's kernels by class, of PROFILES (default: see below)
#   rows         the table of speed on one GPU, a part of it on each, the peers beside it; ROWS: names, default all
#   pair         that on two; PAIR: names
#   sweeps       tokens/s over sequence length, rank and depth (one GPU), and ranks (two)
# benchmarks/gpu_pack.sh, run before on the other machine, makes the folders. Give all calls at once: the machine is taken
# back half a minute after the last. A session of its own (setsid) lets the work go on between calls.
# E.g. after kernels have changed: begin 2 25 tests rows pair methods, and the next time: begin 2 25 sweeps
set -euo pipefail
work=$PWD/.bench/session; mkdir -p "$work"
after() { until [ -e "$work/$1.done" ]; do sleep 0.5; [ "$(left)" -gt 1 ] || exit 1; done; }
left() { # seconds, one at least
  local seconds=$(($(cat "$work/deadline") - $(date +%s)))
  echo $((seconds > 1 ? seconds : 1))
}
minutes() { python3 -c "print($(left) / 60)"; }

drills() { # at once: each loads the model half a dozen times
  local kind
  for kind in kill preempt resume; do
    (own "$kind" && timeout "$(left)" python3 benchmarks/gpu_resume.py --gpus 2 \
      --strategies --drills $kind --override train.recompute=full train.deterministic=true --out "$work/drill-$kind.json") &
  done
  wait
}
scoreboard() {
  after model.gguf
  local cells=(--model "$work/input/model.gguf" --data "$work/input/commonsense" --work "$work" --out "$work/all.json")
  python3 benchmarks/scoreboard.py --prepare "${cells[@]}"
  python3 benchmarks/scoreboard.py "${cells[@]}" --gpus "$gpus" --per-gpu "${SHARE:-14}" --minutes "${BOARD_MINUTES:-$(minutes)}" \
    --merge benchmarks/results/scoreboard.json
}
methods() { # METHODS: names of cases with commas between them
  local k cases
  IFS=, read -ra cases <<<"${METHODS:-}"
  for k in $(seq 0 $((gpus - 1))); do
    CUDA_VISIBLE_DEVICES=$k timeout "$(left)" python3 benchmarks/adapters_7b.py --part "$k/$gpus" --micro 4 --steps 3 --recorded \
      ${cases:+--cases "${cases[@]}"} --out "$work/7b-$k.jsonl" &
  done
  wait
}
tests() { # only files with such tests: others want packages that are not there
  [ "$gpus" = 1 ] || (CUDA_VISIBLE_DEVICES=$((gpus - 1)) part kernels) &
  [ ! -e "$work/input/model.gguf.sha256" ] || part parity &
  # shellcheck disable=SC2046 # several words
  CUDA_VISIBLE_DEVICES=0 timeout -s INT -k 15 "${TESTS_S:-300}" python3 -m pytest -v --tb=short -m gpu -p no:cacheprovider \
    ${TESTS:-tests/test_kernels_proved.py $(grep -l "mark.gpu" tests/test_*.py)}
  wait
}
kernels() {
  local which
  own kernels
  for which in ${KERNELS:-products combine_speed fp8_kernels_time visit_speed cross_entropy_speed rms_norm_speed swiglu_speed}; do timeout 60 python3 "benchmarks/$which.py" || true; done
  profiles
}
gaps() {
  local which
  own gaps
  for which in ${GAPS:-lora map lora,quantization.compute=fp8}; do
    # shellcheck disable=SC2086 # several words
    timeout 90 python3 benchmarks/step_gaps.py train.cuda_graph=true adapter.method=${which//,/ } || true
  done
}
attention() {
  after fa4
  mkdir -p "$work/fa4"; tar xJf "$work/input/fa4" -C "$work/fa4"
  local packages=$work/fa4/nvidia_cutlass_dsl
  PYTHONPATH=$PYTHONPATH:$work/fa4:$packages/dsl_packages timeout 200 python3 benchmarks/attention_speed.py
}
parity() {
  local method
  after model.gguf
  mkdir -p "$work/logs"
  for method in lora map; do
    (own "parity-$method" && timeout "$(left)" python3 benchmarks/fp8_parity.py --model "$work/input/model.gguf" \
      --data "$work/input/commonsense" --methods $method --out "$work/logs/fp8_parity-$method.json") &
  done
  wait
}
packed() {
  mkdir -p "$work/logs"
  timeout 120 python3 benchmarks/packed_attention.py --length 4096 --mean 400 --rows 4 --layers 8 --steps 3 --out "$work/logs/packed.json"
}
profiles() {
  local which
  own profiles
  for which in ${PROFILES:-lora,bfloat16 map,bfloat16 lora,fp8 map,fp8 dora,bfloat16}; do
    timeout 90 python3 benchmarks/profile_step.py "adapter.method=${which%,*}" "quantization.compute=${which#*,}" \
      parallel.gpus_per_node=1 --out "$work/profile.txt" || true
  done
}
own() { # a folder of its own for runs and data, which the recipes reach under the same names
  mkdir -p "$work/$1"; cp -r benchmarks "$work/$1/"; cd "$work/$1"
}
rows() {
  local k peers=()
  [ ! -e .gpu-site/bench/peers.py ] || peers=(--peers "$PWD/.gpu-site/bench")
  for k in $(seq 0 $((gpus - 1))); do
    # shellcheck disable=SC2086 # several words
    (own "rows-$k" && CUDA_VISIBLE_DEVICES=$k timeout "$(left)" python3 benchmarks/gpu_7b.py --part "$k/$gpus" \
      ${ROWS:+--only $ROWS} --together 2 --ahead "${peers[@]}" --out "$work/rows-$k.json") &
  done
  wait
}
sweeps() {
  local k
  for k in $(seq 0 $((gpus - 1))); do
    (own "sweeps-$k" && CUDA_VISIBLE_DEVICES=$k timeout "$(left)" python3 benchmarks/scaling.py --device cuda \
      --ahead --only length adapter depth --part "$k/$gpus" --out "$work/sweep-$k.json") &
  done
  wait
  (own sweeps-ranks && timeout "$(left)" python3 benchmarks/scaling.py --device cuda --only ranks --out "$work/sweep-ranks.json")
}
pair() { timeout "$(left)" python3 benchmarks/gpu_7b.py --gpus 2 ${PAIR:+--only $PAIR} --out "$work/pair.json"; }

# a machine that was idle for half a minute is given back, and the next call has a bare one: that is not waited on
[ "${1:?begin, go or wait}" = begin ] || [ -e "$work/deadline" ] || { echo "nothing was begun on this machine" >&2; exit 3; }
case $1 in
begin)
  gpus=$2; echo $(($(date +%s) + 60 * $3)) >"$work/deadline"; shift 3
  nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader; nproc
  tar xJf .carry/1/site.tar.xz
  mkdir -p "$work/input"; tar xJf .carry/1/data.tar.xz -C "$work/input"
  find .carry/1 -name '*.aa' -o -name '*.sha256' | xargs -r cp -t "$work/input"
  # every call brings the checkout anew, while processes of the call before read theirs: they get a copy
  rm -rf "$work/tree" "$work"/*.done "$work"/*.log; mkdir "$work/tree"
  cp -r adapters launcher recipes slurm benchmarks tests pyproject.toml "$work/tree/"; ln -s "$PWD/.gpu-site" "$work/tree/.gpu-site"
  cd "$work/tree"
  . benchmarks/gpu_env.sh
  export DECOMPFT_CACHE=$work/cache OMP_NUM_THREADS=4 gpus work
  python3 -c 'import bitsandbytes, liger_kernel, torch, decompft.launcher.planner; print(torch.__version__, torch.cuda.device_count())'
  part() { ("$1") >"$work/$1.log" 2>&1 || echo "exit code $?" >>"$work/$1.log"; touch "$work/$1.done"; }
  export -f after left minutes own drills scoreboard methods tests kernels gaps attention parity packed profiles sweeps rows pair part
  setsid bash -c '
    for name in "$@"; do
      case $name in drills | scoreboard) part "$name" & ;; *) wait; part "$name" ;; esac
    done
    wait; touch "$work/all.done"' session "$@" </dev/null >"$work/session.log" 2>&1 &
  ;;
go)
  find .carry -name '*.a[a-z]' | xargs -r cp -t "$work/input"
  for sum in "$work"/input/*.sha256; do
    whole=${sum%.sha256}
    cat "$whole".a? >"$whole" 2>/dev/null || continue # none of it yet
    ! echo "$(cat "$sum")  $whole" | sha256sum --status -c || touch "$work/$(basename "$whole").done"
  done
  ;;
wait)
  until=$(($(date +%s) + $2))
  while [ "$(date +%s)" -lt "$until" ] && [ ! -e "$work/all.done" ]; do sleep 1; done
  nvidia-smi --query-gpu=index,utilization.gpu,memory.used --format=csv,noheader; uptime
  [ -e "$work/all.done" ] && echo "ALL DONE" || echo "still running"
  for log in "$work"/*.log; do
    echo "--- ${log##*/}"; tr '\r' '\n' <"$log" | tail -n 12 | cut -c1-400
  done
  ;;
*) echo "begin, go or wait" >&2; exit 2 ;;
esac
# what there is so far; eight files at most come back
cat "$work"/7b-*.jsonl >"$OUT/adapters_7b.jsonl" 2>/dev/null || true
for name in all pair; do cp "$work/$name.json" "$OUT/" 2>/dev/null || true; done
cp "$work/profile.txt" "$OUT/" 2>/dev/null || true
for kind in rows drill sweep; do # lists
  python3 -c 'import json, sys; print(json.dumps([r for p in sys.argv[1:] for r in json.load(open(p))], indent=1))' \
    $(ls "$work/$kind"-*.json 2>/dev/null) >"$OUT/$kind.json" || true
done
# and what runs wrote, should a script not have come to its end
tar cJf "$OUT/logs.tar.xz" -C "$work" $(cd "$work" && ls -d ./*.log logs tree/.bench/*.json \
  */.bench/runs/*/{metrics.jsonl,events.jsonl,plan.json} 2>/dev/null) 2>/dev/null || true
