#!/usr/bin/env bash
# Decoding in a memory cgroup of half the model's size, in turns: stock llama.cpp with the file
# mapped, and tierstream with the cgroup's size as its --ram. Both start with a cold page cache.
# Needs root and cgroup v1 (memory). Usage: bench-small-memory.sh MODEL [TURNS] [TOKENS]
set -euo pipefail
model=$1 turns=${2:-3} tokens=${3:-24}
program=$(dirname "$0")/../target/release/tierstream
size=$(stat -Lc %s "$model")
limit=$((size / 2))
group=/sys/fs/cgroup/memory/tierstream-bench
mkdir -p "$group"
ids=$(mktemp)
trap 'rm -f "$ids"; rmdir "$group"' EXIT
echo "$limit" >"$group/memory.limit_in_bytes"
python3 -c "import random; random.seed(1); print([random.randrange(1000) for _ in range($tokens + 8)])" >"$ids"

turn() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    # The shell puts itself into the group, so that everything is counted from the start.
    bash -c "echo \$\$ >$group/cgroup.procs; exec \"\$@\"" _ \
        "$program" bench turn "$model" --token-file "$ids" --warmup 8 "$@" 2>/dev/null |
        python3 -c 'import json, sys; t = json.load(sys.stdin); print("%.3f" % t["tok_s"])'
}

for _ in $(seq "$turns"); do
    stock=$(turn --peer stock)
    ours=$(turn --ram $((limit - 32 * 1024 * 1024)))
    echo "stock-mmap $stock tok/s  tierstream $ours tok/s  ratio $(python3 -c "print(round($ours / $stock, 2))")"
done
