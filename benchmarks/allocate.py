"""The allocator on synthetic sensitivities of CIFAR ResNets, beside general solvers.

python benchmarks/allocate.py [--seeds 5] [--long-runs 10 --long-seconds 60] [--peers --peer-seconds 60]

The instances: layers and weights of ResNet-20, -56 and -110 at width 16; bytes = weights * weight bits / 8; the budget lies at `tightness`
between all layers at their fewest bits and all at their most. A layer's own term at b bits is 4^-b, times a lognormal factor (sigma 1) of
the layer, times (weights / mean)^0.25, times a lognormal factor (sigma 0.2) of the choice; with activation bits theirs is added, half as
large. Cross terms are low-rank: half of each own term's square lies along a vector in 8 dimensions, one direction per layer (one for
weights and one for activations) and noise per choice, so correlations have both signs and are 0.5 at most. "indefinite": two dimensions in
five count negatively. "noisy": positive semidefinite, and each cross term has noise of 0.05 of the geometric mean of its two own terms, as
pairs measured one by one have.

Times are of one thread: processor time, and beside it what a clock on the wall said. `gap`: (objective - lower bound) / |objective|.
The long runs are of indefinite instances that were not proven: the same search on layers in another order each, which is another search.
Peers (pip install pyscipopt highspy) get one instance of each size: SCIP minimises t >= x' M x, which is convex; HiGHS the linearised
products with sum_k y[lk, mj] = x[mj]. One thread each.
"""

import argparse
import statistics
import time

import torch
from results import merged, write

import quantize

WIDTH, RANK, SHARE = 16, 8, 0.5
SIZES = {"20x3": (20, 3), "56x3": (56, 3), "110x3": (110, 3), "56x9": (56, 9)}
LIMITS = {"20x3": 5.0, "56x3": 5.0, "110x3": 15.0, "56x9": 4.0}


def resnet_weights(depth: int) -> torch.Tensor:
    """Weights of each layer: stem, three stages of two-convolution blocks, classifier."""
    counts, channels = [3 * WIDTH * 9], WIDTH
    for width in (WIDTH, 2 * WIDTH, 4 * WIDTH):
        for _ in range((depth - 2) // 6):
            counts += [channels * width * 9, width * width * 9]
            channels = width
    return torch.tensor([*counts, 10 * channels], dtype=torch.float64)


def instance(depth: int, choices: int, tightness: float, seed: int, kind: str = "positive") -> tuple[quantize.Sensitivity, float]:
    """A sensitivity and a budget in bytes; see above."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = resnet_weights(depth)
    layers = len(weights)
    pairs = [(w, a) for w in (2, 4, 8) for a in ((2, 4, 8) if choices == 9 else (None,))]
    sides = [normal(layers).exp() * (weights / weights.mean()) ** 0.25, 0.5 * normal(layers).exp()]
    directions = [normal(layers, RANK), normal(layers, RANK)]
    own, vectors = torch.zeros(layers, choices, dtype=torch.float64), torch.zeros(layers, choices, RANK, dtype=torch.float64)
    for k, pair in enumerate(pairs):
        for side, direction, bits in zip(sides, directions, pair, strict=True):
            if bits is not None:
                value = side * 4.0**-bits * (0.2 * normal(layers)).exp()
                own[:, k] += value
                vectors[:, k] += direction * value.sqrt()[:, None]
        unit = torch.nn.functional.normalize(vectors[:, k], dim=1) + 0.5 * normal(layers, RANK) / RANK**0.5
        vectors[:, k] = torch.nn.functional.normalize(unit, dim=1) * (SHARE * own[:, k]).sqrt()[:, None]
    own, vectors = own.flatten(), vectors.flatten(0, 1)
    sign = torch.tensor([-1.0 if kind == "indefinite" and r % 5 < 2 else 1.0 for r in range(RANK)], dtype=torch.float64)
    matrix = (vectors * sign) @ vectors.T
    if kind == "noisy":
        noise = 0.05 * normal(*matrix.shape) * (own[:, None] * own).sqrt()
        matrix += (noise + noise.T) / 2**0.5
    matrix[torch.arange(len(own)), torch.arange(len(own))] = own
    bytes = torch.stack([weights * w / 8 for w, _ in pairs], 1)
    low, high = bytes.amin(1).sum().item(), bytes.amax(1).sum().item()
    names = [f"layer{i:03}" for i in range(layers)]
    return quantize.Sensitivity(names, pairs, matrix, bytes, bytes * 100), low + tightness * (high - low)


def solve(sensitivity, budget: float, seconds: float) -> dict:
    begin, processor = time.perf_counter(), time.process_time()
    found = quantize.allocate(sensitivity, max_bytes=budget, time_limit=seconds)
    wall, processor = time.perf_counter() - begin, time.process_time() - processor
    gap = (found.objective - found.lower_bound) / abs(found.objective)
    return {"objective": found.objective, "gap": gap, "proven": found.proven, "cpu_s": processor, "wall_s": wall}


def shuffled(s, order: list[int]):
    """The same problem with its layers in another order."""
    each = len(s.choices)
    at = torch.tensor([layer * each + k for layer in order for k in range(each)])
    return quantize.Sensitivity([s.layers[i] for i in order], s.choices, s.matrix[at][:, at], s.bytes[order], s.bit_ops[order])


def summarise(runs: list[dict]) -> dict:
    times = [run["cpu_s"] for run in runs]
    return {
        "proven": sum(run["proven"] for run in runs),
        "of": len(runs),
        "median_cpu_s": statistics.median(times),
        "worst_cpu_s": max(times),
        "worst_wall_s": max(run["wall_s"] for run in runs),
        "worst_gap": max(run["gap"] for run in runs),
        "runs": runs,
    }


def report(name: str, s: dict):
    times = f"median {s['median_cpu_s']:.2f} s, worst {s['worst_cpu_s']:.2f} s (wall {s['worst_wall_s']:.2f} s)"
    print(f"{name:28} proven {s['proven']} of {s['of']}: {times}; worst gap {100 * s['worst_gap']:.4f} %", flush=True)


def scip(s, budget: float, seconds: float) -> dict:
    import pyscipopt

    model, n, each = pyscipopt.Model(), s.matrix.shape[0], len(s.choices)
    model.hideOutput()
    x = [model.addVar(vtype="B") for _ in range(n)]
    t = model.addVar(lb=None)
    for layer in range(len(s.layers)):
        model.addCons(pyscipopt.quicksum(x[layer * each : (layer + 1) * each]) == 1)
    model.addCons(pyscipopt.quicksum(b * v for b, v in zip(s.bytes.flatten().tolist(), x, strict=True)) <= budget)
    m = (s.matrix / s.matrix.abs().max()).tolist()
    model.addCons(pyscipopt.quicksum((1 if v == w else 2) * m[v][w] * x[v] * x[w] for v in range(n) for w in range(v + 1)) <= t)
    model.setObjective(t)
    model.setParam("limits/time", seconds)
    model.setParam("limits/gap", 1e-5)
    model.setParam("parallel/maxnthreads", 1)
    begin = time.perf_counter()
    model.optimize()
    scale = s.matrix.abs().max().item()
    best = model.getObjVal() * scale if model.getNSols() else None
    return {"objective": best, "lower_bound": model.getDualbound() * scale, "wall_s": time.perf_counter() - begin}


def highs(s, budget: float, seconds: float) -> dict:
    import highspy
    import numpy as np

    each, layers = len(s.choices), len(s.layers)
    n, scale = layers * each, s.matrix.abs().max().item()
    matrix, solver = (s.matrix / scale).numpy(), highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", seconds)
    solver.setOptionValue("mip_rel_gap", 1e-5)
    solver.setOptionValue("threads", 1)
    pairs = [(v, w) for v in range(n) for w in range(v + 1, n) if v // each != w // each]
    place = {pair: n + i for i, pair in enumerate(pairs)}
    cost = np.concatenate([matrix.diagonal(), [2 * matrix[v, w] for v, w in pairs]])
    count = len(cost)
    for _ in range(count):
        solver.addVar(0, 1)
    solver.changeColsCost(count, np.arange(count, dtype=np.int32), cost)
    solver.changeColsIntegrality(n, np.arange(n, dtype=np.int32), np.full(n, highspy.HighsVarType.kInteger))
    for layer in range(layers):
        solver.addRow(1, 1, each, np.arange(layer * each, (layer + 1) * each, dtype=np.int32), np.ones(each))
    solver.addRow(-highspy.kHighsInf, budget, n, np.arange(n, dtype=np.int32), s.bytes.double().flatten().numpy())
    for v in range(n):
        for other in range(layers):
            if other != v // each:
                index = [place[min(v, w), max(v, w)] for w in range(other * each, (other + 1) * each)]
                solver.addRow(0, 0, each + 1, np.array([v, *index], dtype=np.int32), np.array([-1.0] + [1.0] * each))
    begin = time.perf_counter()
    solver.run()
    info = solver.getInfo()
    found = info.primal_solution_status == 2
    bound = info.mip_dual_bound * scale
    return {
        "objective": info.objective_function_value * scale if found else None,
        "lower_bound": bound,
        "wall_s": time.perf_counter() - begin,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--long-runs", type=int, default=0)
    parser.add_argument("--long-seconds", type=float, default=60.0)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-seconds", type=float, default=60.0)
    parser.add_argument("--name", default="allocate", help="results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"width": WIDTH, "rank": RANK, "share": SHARE, "positive": {}, "indefinite": {}, "peers": {}}
    for name, (depth, choices) in SIZES.items():
        for tightness in (0.1, 0.25, 0.5):
            runs = [solve(*instance(depth, choices, tightness, seed), LIMITS[name]) for seed in range(args.seeds)]
            if choices == 9:  # the best known: a minute's
                for seed, run in enumerate(runs):
                    known = run if run["proven"] else solve(*instance(depth, choices, tightness, seed), args.long_seconds)
                    run["best_known"], run["best_known_proven"] = min(known["objective"], run["objective"]), known["proven"]
            figures["positive"][f"{name} at {tightness}"] = summarise(runs)
            report(f"{name} at {tightness}", figures["positive"][f"{name} at {tightness}"])
    for kind in ("indefinite", "noisy"):
        runs = []
        for seed in range(args.seeds):
            problem, budget = instance(56, 3, 0.25, seed, kind)
            run = solve(problem, budget, 10.0)
            orders = [
                torch.randperm(56, generator=torch.Generator().manual_seed(i)).tolist() for i in range(args.long_runs * (not run["proven"]))
            ]
            run["long"] = [solve(shuffled(problem, order), budget, args.long_seconds) for order in orders]
            best = min(one["objective"] for one in [run, *run["long"]])
            run["above_best"] = (run["objective"] - best) / abs(best)
            runs.append(run)
        figures["indefinite"][kind] = summarise(runs)
        report(f"56x3 at 0.25, {kind}", figures["indefinite"][kind])
        print(
            f"{'':28} above the best of {args.long_runs} long runs, where not proven: {100 * max(run['above_best'] for run in runs):.4f} %"
        )
    if args.peers:
        for name in ("20x3", "56x3", "110x3"):
            problem, budget = instance(*SIZES[name], 0.25, 0)
            best = figures["positive"][f"{name} at 0.25"]["runs"][0]["objective"]
            for peer in (scip, highs):
                try:
                    found = peer(problem, budget, args.peer_seconds)
                except ImportError as missing:
                    print(f"{peer.__name__}: {missing}")
                    continue
                found["above"] = found["objective"] and (found["objective"] - best) / best
                found["bound_below"] = (best - found["lower_bound"]) / best
                figures["peers"].setdefault(name, {})[peer.__name__] = found
                above = "found nothing" if found["objective"] is None else f"{100 * found['above']:.3f} % above"
                print(
                    f"{name} {peer.__name__:6} {found['wall_s']:.1f} s: {above}, bound {100 * found['bound_below']:.1f} % below", flush=True
                )
    settings = {name: figures[name] for name in ("width", "rank", "share")}
    figures["peers"] = merged(args.name, "peers", figures["peers"], **settings)
    write(args.name, figures)


if __name__ == "__main__":
    main()
