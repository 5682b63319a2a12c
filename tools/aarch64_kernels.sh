#!/usr/bin/env bash
# Builds the CPU kernels for aarch64, runs tests/cpu_kernels_check.cc under qemu and compares its
# digest with that of this machine's build: the portable path gives the same bits on both.
# Needs, on Debian and Ubuntu: apt-get install g++ g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/need.sh

CROSS="${CROSS:-aarch64-linux-gnu-g++}"
CXX="${CXX:-g++}"
PY="${PY:-.venv/bin/python}"
need "$CXX" g++
need "$CROSS" g++-aarch64-linux-gnu
need qemu-aarch64 qemu-user
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT

build() { # build COMPILER NAME: the check, static, with what setup.py compiles with
  "$1" -std=c++17 -O2 -ffp-contract=off -w -Ikernels/cpu -static -pthread -o "$out/$2" \
    tests/cpu_kernels_check.cc kernels/cpu/{cpu,threads,rope_write,path_portable,path_avx2,path_avx512}.cc
}

build "$CXX" here
build "$CROSS" aarch64
run() { # run NAME TITLE COMMAND...: runs a build, shows and keeps what it prints
  local name=$1 title=$2
  shift 2
  if "$@" >"$out/$name.txt"; then
    echo "$title: $(tr '\n' ' ' <"$out/$name.txt")"
  else
    echo "$title: failed, $(tr '\n' ' ' <"$out/$name.txt")" >&2
    exit 1
  fi
}

run here "$(uname -m)" "$out/here"
run aarch64 "aarch64 under qemu" qemu-aarch64 "$out/aarch64"
if ! cmp -s "$out/here.txt" "$out/aarch64.txt"; then
  echo "aarch64 computes other bits than $(uname -m)" >&2
  exit 1
fi

# What XLA calls, too, where jaxlib and with it XLA's headers are installed.
if headers="$("$PY" -c 'import jax.ffi; print(jax.ffi.include_dir())' 2>/dev/null)"; then
  "$CROSS" -std=c++17 -O0 -ffp-contract=off -w -Ikernels/cpu "-I$headers" -c kernels/cpu/ffi.cc \
    -o "$out/ffi.o"
  echo "ffi.cc compiles for aarch64"
else
  echo "ffi.cc was not compiled: $PY has no jaxlib with XLA's headers"
fi
