"""Plans the recipes for large machines, one process each, and writes `docs/PLANS.md`, a picture and JSON.

`--only` plans some of them anew and keeps what is known of the others. A plan takes minutes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from benchmarks.plans.cases import CASES, Case
from benchmarks.plans.page import document, draw

ROOT = Path(__file__).parents[2]
_ONLY = flags.DEFINE_multi_enum("only", list(CASES), list(CASES), "Plans to make; default: all.")
_OUT = flags.DEFINE_string("out", "benchmarks/results/plans.json", "Where the plans go.")
_DOCUMENT = flags.DEFINE_string("document", "docs/PLANS.md", "Where the page goes.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    out, page = Path(_OUT.value), Path(_DOCUMENT.value)
    plans = json.loads(out.read_text()) if out.is_file() else {}
    for name in _ONLY.value:
        plans[name] = planned(CASES[name]) | {"jax": jax.__version__}
        print(f"{name}: {plans[name]['verdict']}", flush=True)
        plans = {name: plans[name] for name in CASES if name in plans}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(plans, indent=1) + "\n")
        page.write_text(document(plans))
        draw(plans, page.parent / "results" / "plans.png")
    print(f"wrote {out} and {page}")


def planned(case: Case) -> dict[str, Any]:
    """The plan of a case, as `Plan.to_json` gives it.

    Raises:
      subprocess.CalledProcessError: if it cannot be made; why has been printed.
    """
    file, _, size = case.recipe.partition(":")
    with tempfile.TemporaryDirectory(prefix="effjax-plan-") as workdir:
        command = [sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/{file}.py:{size}"]
        command += [f"--plan.topology={case.topology}", f"--workdir={workdir}", *case.flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (plan,) = Path(workdir).glob("plan-*.json")
        return json.loads(plan.read_text())


if __name__ == "__main__":
    app.run(main)
