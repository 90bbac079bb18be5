"""Measures claims, prints what came of them, and writes JSON, pictures and `docs/RESULTS.md`."""

import json
from collections.abc import Mapping
from pathlib import Path

from absl import app, flags
from rich.console import Console

from benchmarks.claims.bench import Bench
from benchmarks.claims.catalogue import CLAIMS
from benchmarks.claims.claim import Report
from benchmarks.claims.page import document

_ONLY = flags.DEFINE_multi_enum("only", list(CLAIMS), list(CLAIMS), "Claims; default: all.")
_DATA = flags.DEFINE_list(
    "data", [], "Files of text, and globs, for language models; default: Python's standard library."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each model.", lower_bound=1)
_RUNS = flags.DEFINE_string("runs", "runs/claims", "Folder of the runs.")
_RESULTS = flags.DEFINE_string("results", "benchmarks/results/claims", "Folder of the JSON.")
_DOCUMENT = flags.DEFINE_string("document", "docs/RESULTS.md", "The page; pictures: beside it.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    bench = Bench(Path(_RUNS.value).absolute(), _DATA.value, range(_SEEDS.value))
    results, page, console = Path(_RESULTS.value), Path(_DOCUMENT.value), Console()
    for name in _ONLY.value:
        claim = CLAIMS[name]
        report = claim.measure(bench)
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        claim.draw(report, page.parent / "results" / f"{name}.png")
        page.write_text(document(CLAIMS, read(results)))
        for verdict in claim.verdicts(report):
            said = "reproduced" if verdict.reproduced else "not reproduced"
            console.print(f"{name}: {said}: {verdict.expected}. {verdict.found}.", markup=False)


def read(folder: Path) -> Mapping[str, Report]:
    """What is stored of each claim."""
    paths = {name: folder / f"{name}.json" for name in CLAIMS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


if __name__ == "__main__":
    app.run(main)
