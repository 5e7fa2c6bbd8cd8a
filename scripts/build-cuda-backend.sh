#!/usr/bin/env bash
# Builds ggml's CUDA backend, libggml-cuda.so, from the source that this version of tierstream is
# built with, for the program to load. Needs nvcc, cmake and a C++ compiler; no Rust.
#
#   build-cuda-backend.sh SOURCE OUT [ARCHITECTURES]
#
# SOURCE is llama.cpp's `ggml` folder, OUT the folder for the library, ARCHITECTURES what
# CMAKE_CUDA_ARCHITECTURES takes; by default those of the GPUs of this machine.
set -euo pipefail
source=$(realpath "$1") out=$(realpath "$2") architectures=${3:-native}
work=$out/ggml-cuda-build
mkdir -p "$work"
# The folder is not complete enough to be configured on its own.
cat >"$work/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.18)
project(ggml-cuda-backend C CXX)
add_subdirectory("$source" ggml)
CMAKE
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
cmake -S "$work" -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$work/bin" -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON \
    -DGGML_NATIVE=OFF -DGGML_CPU=OFF -DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF \
    -DCMAKE_CUDA_ARCHITECTURES="$architectures" >"$work/log"
cmake --build "$work/build" --target ggml-cuda --parallel "$(nproc)" >>"$work/log" 2>&1 || {
    tail -40 "$work/log" >&2
    exit 1
}
install -s "$work/bin/libggml-cuda.so" "$out/libggml-cuda.so"
echo "$out/libggml-cuda.so"
