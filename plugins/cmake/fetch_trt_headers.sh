#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# fetch_trt_headers.sh DIR: puts the headers of TensorRT 10.14 (NVIDIA, Apache-2.0) into DIR, without root and without touching the
# system or a Python environment. NVIDIA's own Python packages have none; the wheel of kernel-lens carries an unchanged copy.
set -eu
target=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The hash is part of the requirement: what arrives is what was looked at, or nothing.
echo 'kernel-lens==2.0.1 --hash=sha256:07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0' >"$work/requirements.txt"

# A build that pip isolates hides pip from the interpreters it starts, through PYTHONPATH.
unset PYTHONPATH
download() {
  "$@" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    -r "$work/requirements.txt" -d "$work" >&2
}
found=
for python in "${PYTHON:-}" python3 python /usr/bin/python3; do
  [ -n "$python" ] && command -v "$python" >/dev/null && "$python" -m pip --version >/dev/null 2>&1 || continue
  download "$python" -m pip && found=1 && break
done
[ -n "$found" ] || { command -v pip >/dev/null && python=python3 && download pip && found=1; } || {
  echo "TensorRT headers: pip could not download kernel-lens 2.0.1 (see above)" >&2
  exit 1
}
mkdir "$work/out"
"$python" -m zipfile -e "$work"/kernel_lens-*.whl "$work/out"
headers="$work/out/kernel_lens/include/tensorrt"
[ -f "$headers/NvInferRuntime.h" ] || { echo "NvInferRuntime.h is not among the fetched headers" >&2; exit 1; }
echo "TensorRT headers from the wheel of kernel-lens 2.0.1" >&2
# A rename, so that a build that is cut off leaves no half-filled folder.
mkdir -p "$(dirname "$target")"
part=$(mktemp -d "$target.XXXXXX")
cp -R "$headers"/. "$part/"
rm -rf "$target"
mv "$part" "$target"
