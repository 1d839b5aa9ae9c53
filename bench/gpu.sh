#!/usr/bin/env bash
# Everything that a GPU can tell about this project, in at most 8 minutes, on a machine with torch, torchvision and timm:
#
#     bash bench/gpu.sh                          on the GPU; results in $OUT, by default runs/gpu
#     bash bench/gpu.sh --device cpu --tiny      the rehearsal
#     bash bench/gpu.sh --parts evidence         parts by name; bash bench/gpu.sh --help says which there are
#
# What bash bench/gpu_wheels.sh has put into .wheels-gpu (Ray, pydantic, simplejpeg ...) is unpacked and used. Afterwards
# python bench/gpu_report.py RESULTS_FOLDER writes the tables of docs/performance.md.
#
# PYTHON=...           the interpreter (default python3)
# HEADKD_REVISION=...  the commit that this is, where there is no git
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -d .wheels-gpu ]; then
    for wheel in .wheels-gpu/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
    for archive in .wheels-gpu/*.tar.gz; do tar -xzf "$archive" -C "$site"; done
fi
mkdir -p "$out"
export PYTHONPATH=$PWD:$site PYTHONUNBUFFERED=1
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=180  # a busy machine is slow to start it
"$python" bench/gpu_run.py --out "$out" "$@" 2>&1 | tee "$out/log.txt"
