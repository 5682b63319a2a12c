#!/usr/bin/env bash
# Builds the CPU kernels with sanitizers and runs tests/cpu_kernels_check.cc over them.
# Needs, on Debian and Ubuntu: apt-get install g++
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/need.sh

CXX="${CXX:-g++}"
need "$CXX" g++
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
sources=(tests/cpu_kernels_check.cc kernels/cpu/{cpu,threads,rope_write,path_portable,path_avx2,path_avx512}.cc)

check() { # check NAME FLAGS...: compiles with the flags and runs
  local name=$1 source
  shift
  mkdir "$out/$name"
  for source in "${sources[@]}"; do
    "$CXX" -std=c++17 -O1 -g -ffp-contract=off -w -Ikernels/cpu "$@" \
      -c "$source" -o "$out/$name/$(basename "$source").o"
  done
  "$CXX" "$@" "$out/$name"/*.o -pthread -o "$out/$name/check"
  echo -n "$name: "
  "$out/$name/check"
}

check address+undefined -fsanitize=address,undefined -fno-sanitize-recover=all
check thread -fsanitize=thread
