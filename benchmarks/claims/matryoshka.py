"""Matryoshka embeddings beside embeddings trained for one dimension each, and what adaptive retrieval saves.

Kusupati et al., 2022, arXiv 2205.13147, sections 4.2 and 4.3: the first m coordinates are at least as accurate as
an embedding of m coordinates trained for itself, and a shortlist by a few coordinates, ordered anew by all, is as
accurate as a search by all of them at a fraction of its cost.
"""

import statistics
from pathlib import Path

from benchmarks.claims import plot
from benchmarks.claims.bench import Bench, Trained
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from benchmarks.claims.spread import cell, differences, is_no_higher, values
from configs import matryoshka

NAME = "matryoshka"
NESTED = "nested"
D_MODEL, DIMS, SEPARATE_DIMS = 64, (8, 16, 32, 64), (8, 64)
SEQ_LEN, BATCH_SIZE, NUM_STEPS = 48, 32, 160
K = 10
# Of the recall of the search by all coordinates, for a cheaper search to count as equal.
EQUAL = 0.99


def measure(bench: Bench) -> Report:
    """Trains one embedder for all dimensions and one for each of some, with every seed."""
    nested = _config(DIMS)
    named = {NESTED: nested} | {_separate(m): _config((m,)) for m in SEPARATE_DIMS}
    runs = bench.compare(NAME, named, _measured)
    return {
        "setting": f"{nested.model.num_layers} layers of width {nested.model.d_model} (short convolution, attention) "
        f"over the first {SEQ_LEN} bytes of docstrings and code of Python's standard library; {NUM_STEPS} steps of "
        f"{BATCH_SIZE} pairs with the settings of the shipped recipe; retrieval among {runs[0]['documents']} held-out "
        "pieces of code.",
        "runs": runs,
    }


def _separate(dim):
    return f"only {dim}"


def _config(dims):
    config = matryoshka.get_config()
    config.model.d_model = D_MODEL
    config.objective.matryoshka_dims = dims
    config.data.update(seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    config.training.num_steps = NUM_STEPS
    return config


def _measured(trained: Trained) -> dict:
    found = trained.report["retrieval"]
    return {"documents": found["documents"], "curve": [x for x in found["curve"] if x["k"] == K]}


def rows_of(report: Report) -> list[dict]:
    """A row a run and dimension: `model` says the dimension, and whether it was trained for itself."""
    rows = []
    for run in report["runs"]:
        for point in run["curve"]:
            if point["method"] == "full":
                (dim,) = point["dims"]
                is_nested = run["model"] == NESTED
                name = f"{NESTED}, first {dim}" if is_nested else run["model"]
                # A miss is what is to be low, as losses are.
                missed = 1 - point["recall"]
                rows.append({"model": name, "dim": dim, "seed": run["seed"], "missed": missed})
    return rows


def searches(report: Report) -> list[dict]:
    """Each way to search with the nested embeddings: its cost, and its recall with each seed."""
    found: dict = {}
    for run in report["runs"]:
        if run["model"] == NESTED:
            for point in run["curve"]:
                key = (point["method"], tuple(point["dims"]), tuple(point["sizes"]))
                cost = point["multiply_adds"]
                entry = found.setdefault(key, {"key": key, "multiply_adds": cost, "recall": []})
                entry["recall"].append(point["recall"])
    return list(found.values())


def verdicts(report: Report) -> list[Verdict]:
    """Of each dimension against an embedding of its own, and of the cost at equal recall."""
    rows = rows_of(report)
    pairs = {m: (f"{NESTED}, first {m}", _separate(m)) for m in SEPARATE_DIMS}
    gains = {m: [-x for x in differences(rows, *pair, "missed")] for m, pair in pairs.items()}
    full, best = cheapest(report)
    saved = full["multiply_adds"] / best["multiply_adds"]
    share = statistics.fmean(best["recall"]) / statistics.fmean(full["recall"])
    return [
        Verdict(
            f"recall@{K} of the first m coordinates at most one standard deviation below that of an embedding trained "
            "for m alone, for every m tried",
            all(is_no_higher(rows, *pair, "missed") for pair in pairs.values()),
            "; ".join(f"m = {m}: {cell(gain, '+.3f')}" for m, gain in gains.items()),
        ),
        Verdict(
            f"a search in stages with {EQUAL:.0%} of the recall@{K} of the search by all coordinates, at lower cost",
            saved > 1,
            f"{_said(best['key'])}: {saved:.1f} times fewer multiply-adds a query at {share:.1%} of the recall",
        ),
    ]


def cheapest(report: Report) -> tuple[dict, dict]:
    """The search by all coordinates, and the cheapest that recalls as much."""
    found = searches(report)
    full = max((x for x in found if x["key"][0] == "full"), key=lambda x: x["multiply_adds"])
    enough = EQUAL * statistics.fmean(full["recall"])
    equal = [x for x in found if statistics.fmean(x["recall"]) >= enough]
    return full, min(equal, key=lambda x: x["multiply_adds"])


def _said(key) -> str:
    method, dims, sizes = key
    stages = " -> ".join(f"{dim} coordinates" for dim in dims)
    return f"{method}, {stages}" + (f", shortlist {sizes[0]}" if len(dims) > 1 else "")


def tables(report: Report) -> list[Table]:
    """Recall by dimension, and the searches that are not dearer than that by all coordinates."""
    rows = rows_of(report)
    dims = sorted({row["dim"] for row in rows})
    known = {row["model"] for row in rows}
    by_dim = []
    for m in dims:
        cells = []
        for name in (f"{NESTED}, first {m}", _separate(m)):
            recalls = [1 - x for x in values(rows, name, "missed")] if name in known else []
            cells.append(cell(recalls) if recalls else "")
        by_dim.append((f"{m}", *cells))
    full, best = cheapest(report)
    ways = [(full, "all coordinates"), (best, "cheapest of equal recall")]
    costs = [
        (f"{said}: {_said(way['key'])}", f"{way['multiply_adds']:,}", cell(way["recall"]))
        for way, said in ways
    ]
    return [
        Table(("dimension m", f"recall@{K}, first m of nested", "trained for m alone"), by_dim),
        Table(("search", "multiply-adds a query", f"recall@{K}"), costs),
    ]


def draw(report: Report, path: Path) -> None:
    """Recall by dimension, and recall against the cost of a search."""
    figure, (left, right) = plot.panels(2)
    rows = rows_of(report)
    named = {NESTED: [], "trained for one dimension": []}
    for row in rows:
        name = NESTED if row["model"].startswith(NESTED) else "trained for one dimension"
        named[name].append((row["dim"], 1 - row["missed"]))
    plot.dots(left, named, "dimension", f"recall@{K}")
    left.set_xscale("log", base=2)
    ways: dict = {}
    for way in searches(report):
        point = (way["multiply_adds"], statistics.fmean(way["recall"]))
        ways.setdefault(way["key"][0], []).append(point)
    plot.dots(right, ways, "multiply-adds a query", f"recall@{K}, mean over seeds")
    right.set_xscale("log")
    plot.save(figure, path)


CLAIM = Claim(
    "Matryoshka: nested dimensions are as good as embeddings trained for one dimension, and make retrieval cheaper",
    "2205.13147",
    measure,
    verdicts,
    tables,
    draw,
)
