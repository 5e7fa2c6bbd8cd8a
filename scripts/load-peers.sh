#!/usr/bin/env bash
# A Python with the loaders that `tierstream bench load --against runai,fastsafetensors,safetensors`
# measures, in target/load-peers, where the program finds it. They bring PyTorch, whose usual build
# brings CUDA: 6 GB. Usage: load-peers.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CARGO_TARGET_DIR:-target}/load-peers
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet \
    torch numpy safetensors==0.8.0 runai-model-streamer==0.17.0 fastsafetensors==0.5.0
echo "$venv/bin/python"
