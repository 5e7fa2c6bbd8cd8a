#!/usr/bin/env python3
"""Compares what `tierstream plan` predicts with what `tierstream bench decode` measures, by turns.

    scripts/plan_check.py target/release/tierstream MODEL --trace T [--routing] [--out FILE]

In each round, the plan and a run of each pool. With --routing, the runs replay the trace instead of
asking the model's routers: for models of random weights.
"""

import argparse
import json
import statistics
import subprocess
import sys


def ask(*args):
    return json.loads(subprocess.run(args, stdout=subprocess.PIPE, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--routing", action="store_true")
    parser.add_argument("--experts", default="100%,75%,50%,25%,12.5%")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=192)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out")
    args = parser.parse_args()
    # The largest first, as the predictions are sorted.
    sizes = sorted(args.experts.split(","), key=lambda size: -float(size.rstrip("%")))
    args.experts = ",".join(sizes)
    threads = ["--threads", str(args.threads)] if args.threads else []
    plan = [args.program, "plan", args.model, "--trace", args.trace, "--experts", args.experts, "--json"]
    bench = [args.program, "bench", "decode", args.model, "--experts", args.experts, "--json"]
    bench += ["--repeats", "1", "-n", str(args.n), "--warmup", str(args.warmup)]
    bench += ["--routing", args.trace] if args.routing else []
    rounds = []
    for number in range(args.rounds):
        predicted = ask(*plan, *threads)
        predicted["predictions"].sort(key=lambda p: -p["pool_bytes"])
        assert len(predicted["predictions"]) == len(sizes), "a size that plan leaves out: name others"
        rounds.append({"plan": predicted, "bench": ask(*bench, *threads)})
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"command": sys.argv[1:], "rounds": rounds}, file, indent=1)
    print("| pool | predicted tok/s | measured | predicted / measured | hits, predicted | measured | |")
    print("|---|---|---|---|---|---|---|")
    for index, size in enumerate(sizes):
        def middle(of):
            return statistics.median(of(r["plan"]["predictions"][index], r["bench"]["rows"][index]) for r in rounds)

        ratio = middle(lambda p, m: p["tok_s"] / m["tok_s_median"])
        measured = middle(lambda p, m: m["tok_s_median"])
        low, high = middle(lambda p, m: p["tok_s_low"]), middle(lambda p, m: p["tok_s_high"])
        told = "within 20 %" if 0.8 <= ratio <= 1.2 else "in the bar" if low <= measured <= high else "missed"
        print(
            f"| {size} | {middle(lambda p, m: p['tok_s']):.3g} ({low:.3g}-{high:.3g}) | {measured:.3g} "
            f"| {ratio:.2f} | {100 * middle(lambda p, m: p['hit_rate']):.1f} % "
            f"| {100 * middle(lambda p, m: m['hit_rate']):.1f} % | {told} |"
        )


if __name__ == "__main__":
    main()
