#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# fetch_ort_headers.sh DIR: puts the headers of ONNX Runtime into DIR, without root and without touching the system.
# First Debian's package (through apt's own signature checks, with lists of its own), then the official release archive.
set -eu
target=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

from_debian() {
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
  mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial" "$work/out"
  : >"$work/status"
  if [ -r /etc/apt/sources.list.d/debian.sources ]; then
    # The machine's own mirror and keyring; trixie is the first release that has the package, and stable.
    sed 's/^Suites:.*/Suites: trixie/' /etc/apt/sources.list.d/debian.sources |
      awk 'BEGIN { RS = "" } NR == 1' >"$work/sources/trixie.sources"
  elif [ -r /usr/share/keyrings/debian-archive-keyring.gpg ]; then
    printf '%s\n' 'Types: deb' 'URIs: http://deb.debian.org/debian' 'Suites: trixie' 'Components: main' \
      'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' >"$work/sources/trixie.sources"
  else
    return 1
  fi
  set -- -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" -o Dir::State="$work" \
    -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
    -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=2
  apt-get "$@" -qq update || return 1
  (cd "$work" && apt-get "$@" -qq download libonnxruntime-dev) || return 1
  dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/out" || return 1
  headers="$work/out/usr/include/onnxruntime"
}

from_release() {
  version=1.20.1
  archive="onnxruntime-linux-x64-$version"  # the headers are the same for every machine
  url="https://github.com/microsoft/onnxruntime/releases/download/v$version/$archive.tgz"
  if command -v curl >/dev/null; then
    curl -fsSL --retry 2 -o "$work/release.tgz" "$url" || return 1
  elif command -v wget >/dev/null; then
    wget -q -O "$work/release.tgz" "$url" || return 1
  else
    return 1
  fi
  tar -xzf "$work/release.tgz" -C "$work" "$archive/include" || return 1
  headers="$work/$archive/include"
}

if from_debian; then
  echo "ONNX Runtime headers from Debian's libonnxruntime-dev" >&2
elif from_release; then
  echo "ONNX Runtime headers from the official release" >&2
else
  echo "ONNX Runtime headers: neither Debian's package nor the official release could be reached" >&2
  exit 1
fi
[ -f "$headers/onnxruntime_cxx_api.h" ] || { echo "onnxruntime_cxx_api.h is not among the fetched headers" >&2; exit 1; }
# A rename, so that a build that is cut off leaves no half-filled folder.
mkdir -p "$(dirname "$target")"
part=$(mktemp -d "$target.XXXXXX")
cp -R "$headers"/. "$part/"
rm -rf "$target"
mv "$part" "$target"
