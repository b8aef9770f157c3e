# Source this on a GPU machine without pip: the checkout as the package decompft, and the packages carried in .gpu-site.
ns=$(mktemp -d); mkdir "$ns/decompft"
for part in adapters launcher recipes slurm; do ln -s "$PWD/$part" "$ns/decompft/$part"; done
export PYTHONPATH="$ns:$PWD/.gpu-site" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 DECOMPFT_CACHE="$ns/cache"
