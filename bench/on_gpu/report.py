"""What `bench/gpu.py` found on a GPU as text: gpu.json, committed under bench/results/MACHINE/, for README and docs."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bars import bars

Report = dict[str, Any]
CHECKS = ("build", "parity", "parity others", "memcheck", "racecheck", "training")


def reports(results: Path) -> dict[str, Report]:
    """Machine -> its gpu.json, for those that have one."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/gpu.json"))}


def about(report: Report) -> str:
    """Device, versions, commit."""
    facts = report["machine"]
    versions = facts["versions"]
    return (f"{facts['device']}, driver {facts['driver'].partition(',')[0]}, torch {versions['torch']}, triton "
            f"{versions['triton']}; commit {facts['commit']}")


def short(report: Report) -> str:
    """The runs of `ctr-train`, and the bars that have a figure."""
    lines = _table([["`ctr-train --model ft`", "logloss", "AUC", "rows/s, compiling included", "s"], *_runs(report)], 1)
    figures = [bar for bar in bars(report) if bar["found"] is not None and not isinstance(bar["found"], str)]
    if figures:
        lines += ["", *_table([["", "bar", "found", ""], *_bars(figures)], 1)]
    return "\n".join(lines)


def full(report: Report) -> str:
    """All of it: checks, runs, bars, the kernels of a step, their counters."""
    text = ["### Checks\n", *_checks(report), "", "### Runs\n", short(report)]
    kernels = report["parts"].get("kernels", {}).get("found", {})
    if kernels.get("profile"):
        text += ["\n### Kernels of FT-Transformer's step, of attention and of the FFN\n", *_profile(kernels["profile"])]
    if kernels.get("counters"):
        names = ["time", "dram %", "tensor cores %", "IPC", "warps %", "registers"]
        rows = [[row["precision"], row["kernel"], row["grid"].strip("()").partition(",")[0],
                 *(f"{row[name]:,.4g}" for name in names), ", ".join(row["stalls"])]
                for row in kernels["counters"] if row["time"] >= 20]
        text += ["\n### Counters\n", *_table([["precision", "kernel", "programs", "us", *names[1:], "stalls"],
                                             *dict.fromkeys(map(tuple, rows))], 2)]
    return "\n".join(text) + "\n"


def _checks(report: Report) -> list[str]:
    rows = [["check", "", "what it says"]]
    for part in CHECKS:
        found = report["parts"].get(part, {}).get("found", {})
        for name, check in found.items() if part not in ("build",) else ():
            figures = {key: value for key, value in check.get("figures", {}).items() if not isinstance(value, list)}
            said = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            rows.append([f"{part.partition(' ')[0]}: {name}", check["status"], check.get("reason", said)])
    return _table(rows, 3)


def _runs(report: Report) -> Iterator[list[str]]:
    found = report["parts"].get("recipes", {}).get("found", [])
    for run in found:
        yield [f"{run['recipe']}, `--kernels {run['kernels']}`", f"{run['logloss']:.4f}", f"{run['auc']:.4f}",
               f"{run['rows_per_s']:,.0f}", f"{run['seconds']:.0f}"]


def _bars(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for bar in found:
        yield [bar["what"] + (f" ({bar['peer']})" if bar["peer"] else ""), bar["bar"], f"{bar['found']:.3g}",
               {True: "met", False: "missed", None: ""}[bar["met"]]]


def _profile(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel and piece of work, a column for each precision: the sum of its launches in a call."""
    times: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        name = row["kernel"].removeprefix("void ").partition("<")[0].rpartition("::")[2]
        times[row["work"], name][row["precision"]] += row["us"]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    lines = [[work, f"`{name}`", *(f"{each[p]:,.0f}" if p in each else "" for p in precisions)]
             for (work, name), each in times.items() if max(each.values()) >= 10]
    totals = {work: {p: sum(each[p] for (other, _), each in times.items() if other == work) for p in precisions}
              for work in dict.fromkeys(work for work, _ in times)}
    lines += [[work, "all", *(f"{total[p]:,.0f}" for p in precisions)] for work, total in totals.items()]
    return _table([["", "kernel", *(f"{p}, us" for p in precisions)], *lines], 2)


def _table(rows: list[Any], words: int) -> list[str]:
    """Markdown; the first `words` columns are words, the others numbers."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "|".join("---" if i < words else "--:" for i in range(len(rows[0]))) + "|", *body]
