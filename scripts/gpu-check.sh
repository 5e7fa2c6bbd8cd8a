#!/usr/bin/env bash
# What a GPU machine has to show, in one command: that streamed output equals the resident one, how
# fast tokens come with less and less of the experts in the GPU's memory, and with misses that are
# copied, computed by the CPU, or either (`--miss`), what is taken of the GPU's memory, and how near a
# load comes to the drive's own speed.
# Prints a table; all figures go to OUT/gpu-check.json.
#
#   gpu-check.sh PROGRAMS OUT [TRACE]
#
# PARTS in the environment says which parts, of `small` (a minute), `30b` (some minutes; 20 GB of TMPDIR,
# as much host memory) and `large` (40 GB of both, and of the GPU's memory); without it the first two.
# PROGRAMS is a folder with tierstream, tierstream-synth and ggml's libraries (target/release after
# `./x cuda` and `cargo build --release -p tierstream-synth`). TRACE is a `route_trace v1` CSV of a model
# with 48 layers of 128 experts, of which a token uses 6, to be replayed. Fails in the end if a step has.
set -euo pipefail
programs=$(realpath "$1") out=$(realpath "$2") trace=${3:+$(realpath "$3")}
export PATH=$programs:$PATH
work=$(mktemp -d)
trap 'kill %1 2>/dev/null || true; rm -rf "$work"' EXIT
echo '[]' >"$out/gpu-check.json"
failed=0
nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 200 >"$work/memory" &

# Runs a command that prints JSON, adds that under a name, with the most memory that the GPU had in
# use meanwhile (MiB, all programs), and prints the lines that say it: verify, decode, prompt, prefill or
# load.
step() {
    local name=$1 kind=$2 from
    shift 2
    from=$(wc -l <"$work/memory")
    timeout 300 "$@" >"$work/result" 2>"$work/err" || {
        echo "$name: exit status $?: $(tail -n 1 "$work/err")"
        failed=1
    }
    sleep 0.3 # until the memory in use is told once more
    tail -n "+$((from + 1))" "$work/memory" >"$work/part"
    python3 - "$out/gpu-check.json" "$name" "$work" "$kind" "$*" <<'PY'
import json, pathlib, sys

def verify(r):
    same = "identical" if r["identical"] else "DIFFERENT"
    yield (f"{same}: {r['identical_tokens']}/{r['tokens']} tokens, "
           f"{r['experts_percent']:.1f} % of the experts, {r['experts']['faults']} faults")

def decode(r):
    for x in r["rows"]:
        yield (f"{x['experts_percent'] or 0:5.1f} %: {x['tok_s_median']:7.1f} tok/s, "
               f"hits {100 * (x['hit_rate'] or 0):5.1f} %, {x['faults_per_token']:5.1f} faults "
               f"({x['computed_per_token']:.1f} of them computed on the CPU) and "
               f"{x['bytes_per_token'] / 1e6:5.1f} MB from the drive a token, "
               f"limit x {x['over_limit'] or 0:.2f}")
    for a in r["against"]:
        yield f"{a['name']}: {a['tok_s_median']:.1f} tok/s"

def prompt(r):
    yield f"{r['prompt_tokens']} tokens of prompt at {r['prompt_tok_s']:.0f} tok/s"

def prefill(r):
    for x in r["rows"]:
        yield (f"{x['prompt_tokens']} tokens, {x['batch']} at once, by {x['peer'] or 'tierstream'}: "
               f"{x['tok_s_median']:.0f} tok/s, {x['bytes_brought'] / 1e9:.1f} GB brought at "
               f"{x['bus_share'] or 0:.2f} of the bus")

def load(r):
    raw, ours = r["rows"][:2]
    start = [m["gpu_start_s"] for m in r["rounds"] if m["gpu_start_s"] is not None]
    yield (f"{ours['gbps_median']:.2f} GB/s, the drive {raw['gbps_median']:.2f}: ratio "
           f"{ours['ratio_to_raw_median']:.3f}, cache {ours['cache']}, without "
           f"{max(start, default=0):.2f} s for the GPU to start")

path, name, work, kind, command = sys.argv[1:]
work = pathlib.Path(work)
try:
    result = json.loads((work / "result").read_text())
except ValueError:
    result = None
peak = max((int(n) for n in (work / "part").read_text().split()), default=0)
results = json.loads(pathlib.Path(path).read_text())
results.append({"name": name, "command": command, "device_mib_peak": peak, "result": result})
pathlib.Path(path).write_text(json.dumps(results, indent=1))
if result is not None and "error" in result:
    print(f"{name}: {result['error']}", flush=True)
elif result is not None:
    for line in globals()[kind](result):
        print(f"{name:24} {line} ({peak} MiB on the GPU)", flush=True)
PY
}

gpu=(--gpu 0 --json)

small() {
    step "nothing but the GPU's start" prompt tierstream run demo Hello -n 2 "${gpu[@]}"
    local share model arch type
    for share in 100% 50% 25% 13%; do
        step "demo, $share" verify tierstream verify demo --experts "$share" --tokens 512 "${gpu[@]}"
    done
    for model in "qwen3moe q4_k_m" "gpt-oss mxfp4" "deepseek2 q8_0" "mixtral q4_0" "olmoe f16"; do
        read -r arch type <<<"$model"
        tierstream-synth "$arch" --type "$type" --size 300MiB --out "$work/small.gguf" >/dev/null
        step "$arch $type" verify tierstream verify "$work/small.gguf" --tokens 128 "${gpu[@]}"
        rm "$work/small.gguf"
    done
}

# The shape of Qwen3-30B-A3B, with as many experts used as the trace has.
middle() {
    local model=$work/q30.gguf routing=(${trace:+--routing "$trace"}) bench miss
    tierstream-synth qwen3moe --big --layers 48 --experts 128 --used 6 --embd 2048 --ff 768 \
        --vocab 32000 --type q4_k_m --out "$model" >/dev/null
    step "30B, load" load tierstream bench load "$model" --rounds 3 "${gpu[@]}"
    step "30B, 8 GiB" verify tierstream verify "$model" --vram 8GiB --experts 40% --tokens 512 \
        "${gpu[@]}"
    bench=(tierstream bench decode "$model" --repeats 1 -n 96 --warmup 128 "${routing[@]}" "${gpu[@]}")
    step "30B, rest in RAM" decode "${bench[@]}" --against stock,stock-cpu-moe \
        --experts 100%,90%,75%,50%,40%,25%,12.5%
    step "30B, 8 GiB, rest in RAM" decode "${bench[@]}" --experts 100% --vram 8GiB
    # The same again, with experts that the CPU computes in place of copies.
    for miss in compute auto; do
        step "30B, 8 GiB, --miss $miss" decode "${bench[@]}" --experts 100% --vram 8GiB --miss "$miss"
    done
    step "30B, 8 GiB, 4 GiB of RAM" decode "${bench[@]}" --experts 100% --vram 8GiB --ram 4GiB
    step "30B, 8 GiB, rest on drive" decode "${bench[@]}" --experts 100% --vram 8GiB --ram 0
    step "30B, 8 GiB, prompts" prefill tierstream bench prefill "$model" --vram 8GiB --repeats 3 \
        --tokens 512,4096 --against stock-cpu-moe "${gpu[@]}"
    rm "$model"
}

# A model of 70B's class, of which 8 GiB hold a fifth, and the shape of gpt-oss-20b.
large() {
    local model=$work/large.gguf shape
    tierstream-synth gpt-oss --layers 24 --experts 32 --used 4 --embd 2880 --ff 2880 --vocab 32000 \
        --type mxfp4 --out "$model" >/dev/null
    shape="gpt-oss-20b shape, 8 GiB"
    step "$shape" verify tierstream verify "$model" --vram 8GiB --experts 40% --tokens 128 "${gpu[@]}"
    step "$shape" decode tierstream bench decode "$model" --experts 100% --vram 8GiB --repeats 1 -n 64 \
        --warmup 64 "${gpu[@]}"
    rm "$model"
    tierstream-synth qwen3moe --big --layers 80 --experts 64 --used 4 --embd 4096 --ff 1024 \
        --vocab 32000 --type q4_k_m --out "$model" >/dev/null
    shape="40 GB, 80 layers, 8 GiB"
    step "$shape" verify tierstream verify "$model" --vram 8GiB --experts 10% --tokens 64 "${gpu[@]}"
    step "$shape" decode tierstream bench decode "$model" --experts 100% --vram 8GiB --repeats 1 -n 64 \
        --warmup 64 --against stock-cpu-moe "${gpu[@]}"
    rm "$model"
}

parts=${PARTS:-small 30b}
case " $parts " in *" small "*) small ;; esac
case " $parts " in *" 30b "*) middle ;; esac
case " $parts " in *" large "*) large ;; esac
exit "$failed"
