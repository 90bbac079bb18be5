"""`docs/RESULTS.md`: all claims, made of what is stored of them."""

from collections.abc import Mapping

from benchmarks.claims.claim import Claim, Report, Table

INTRODUCTION = """\
# Results: what the papers claim, at a small scale

Made by `python -m benchmarks.claims`, from what it stored in `benchmarks/results/claims`: each claim beside its
baseline, at a size that two CPU cores train in minutes. These models are hundreds to thousands of times smaller than
those of the papers and see far less text, so that a claim that is not reproduced here is not refuted: it did not show
at this size with what was tried, and all that was tried is in the tables. Numbers with ± are means and standard
deviations over seeds.
"""


def document(claims: Mapping[str, Claim], reports: Mapping[str, Report]) -> str:
    """The page.

    Args:
      claims: by id.
      reports: what was measured, by id; claims without are left out.
    """
    measured = {name: claim for name, claim in claims.items() if name in reports}
    summary = Table(
        ("claim", "expected here", "reproduced", "found"),
        [
            (f"[{name}](#{name})", v.expected, _said(v.reproduced), v.found)
            for name, claim in measured.items()
            for v in claim.verdicts(reports[name])
        ],
    )
    parts = [INTRODUCTION, markdown(summary, "---")]
    parts += [section(name, claim, reports[name]) for name, claim in measured.items()]
    return "\n".join(parts)


def section(name: str, claim: Claim, report: Report) -> str:
    """The part of the page that one claim has."""
    link = f"[arXiv {claim.paper}](https://arxiv.org/abs/{claim.paper})"
    lines = [f"## {name}", "", f"{claim.title} ({link}).", "", report["setting"], ""]
    for verdict in claim.verdicts(report):
        said = "Reproduced" if verdict.reproduced else "**Not reproduced**"
        lines.append(f"- {said}: {verdict.expected}. {verdict.found}.")
    tables = [part for table in claim.tables(report) for part in ("", markdown(table).rstrip("\n"))]
    return "\n".join([*lines, *tables, "", f"![{name}](results/{name}.png)", ""])


def markdown(table: Table, alignment: str = "--:") -> str:
    """A table in Markdown; `alignment`: of all columns but the first."""
    rule = ["---"] + [alignment] * (len(table.header) - 1)
    rows = [table.header, rule, *table.rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _said(reproduced: bool) -> str:
    return "yes" if reproduced else "**no**"
