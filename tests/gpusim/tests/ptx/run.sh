#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
#
# run.sh [SUBSTRING]: builds and runs the interpreter's tests, or those whose name contains SUBSTRING.
set -e
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=$("$root/bin/gpusim-run" --build-only)
library=$build/libgpusim_ptx.a
# Beside the simulator's own builds, which have one folder for each state of the sources.
T=$(dirname "$build")/tests-ptx
mkdir -p "$T"
for cu in "$here"/*.cu; do
  n=$(basename "$cu" .cu)
  case $n in *90) arch=sm_90a ;; *) arch=sm_80 ;; esac
  if [ ! -s "$T/$n.ptx" ] || [ -n "$(find "$here" -name '*.cu' -newer "$T/$n.ptx")" ]; then
    "${NVCC:-nvcc}" -ptx -std=c++17 -lineinfo -arch=$arch "$cu" -o "$T/$n.tmp"
    mv "$T/$n.tmp" "$T/$n.ptx"
  fi
done
objects=
for c in "$here"/*.cpp; do
  object=$T/$(basename "$c" .cpp).o
  objects="$objects $object"
  if [ -z "$(find "$object" -newer "$c" -newer "$here/harness.h" -newer "$root/include/gpusim/ptx.h" 2>/dev/null)" ]; then
    ${CXX:-g++} -std=c++20 -O1 -Wall -I"$root/include" -c "$c" -o "$object"
  fi
done
${CXX:-g++} $objects "$library" -lpthread -o "$T/run"
GPUSIM_TEST_PTX=$T exec "$T/run" "$@"
