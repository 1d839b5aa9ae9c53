#!/usr/bin/env bash
# Collects what bench/gpu.sh needs on a machine that has torch but no network, and lacks Ray, pydantic, simplejpeg and the
# libraries of COCO's metrics:
#
#     bash bench/gpu_wheels.sh            fills .wheels-gpu (37 MB, git-ignored); bench/gpu.sh unpacks it
#
# PYTHON=...   an interpreter with pip (default python3); it need not be of the target's version
# TARGET=3.12  Python of the machine with the GPU (Linux, x86-64)
set -euo pipefail
python=${PYTHON:-python3}
target=${TARGET:-3.12}
ray=2.60.0  # as pyproject.toml has it
out=$(cd "$(dirname "$0")/.." && pwd)/.wheels-gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() {  # fetch FOLDER PIP_ARGUMENTS...
    local folder=$1 platforms=() glibc
    shift
    for glibc in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version "$target" \
        --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --platform any --dest "$folder" "$@"
}

# Those that have to fit each other come with what they need, the others alone.
fetch "$work/wheels" "pydantic>=2.11" jsonschema
fetch "$work/wheels" --no-deps "faster-coco-eval>=1.6.5" "pycocotools>=2.0.8" "simplejpeg>=1.8.2"
rm -f "$work"/wheels/{attrs,typing_extensions}-*.whl  # the target has them

# Ray, without what training and its data never import: 79 MB become 33.
fetch "$work/ray" --no-deps "ray==$ray"
"$python" -m zipfile -e "$work"/ray/ray-*.whl "$work/tree"
cd "$work/tree/ray"
rm -rf jars rllib llm serve workflow dashboard/client _private/runtime_env/agent/thirdparty_files
rm -rf autoscaler/{azure,gcp,aliyun,vsphere,spark} tune/examples train/examples
find . \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
find . -type f \( -name '*.so' -o -name gcs_server -o -name raylet \) -exec strip --strip-unneeded {} +
chmod +x core/src/ray/gcs/gcs_server core/src/ray/raylet/raylet  # zipfile drops it
cd "$work/tree"
tar --sort=name --owner=0 --group=0 --mtime=2020-01-01 -cf - ray ray-*.dist-info | gzip -9 > "$work/wheels/ray-$ray.tar.gz"

rm -rf "$out"
mv "$work/wheels" "$out"
ls -l "$out"
echo "$out: $(du -sm "$out" | cut -f1) MB"
