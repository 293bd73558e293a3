"""What `bench/gpu.py` found on a GPU as text: its gpu.json, and those of earlier runs (gpu-*.json) of what the latest
does not have, committed under bench/results/MACHINE/, for README and docs."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bars import bars

Report = dict[str, Any]
CHECKS = ("build", "parity", "parity others", "memcheck", "racecheck", "training")


def reports(results: Path) -> dict[str, list[Report]]:
    """Machine -> its gpu.json and then gpu-*.json, for those that have them."""
    found: dict[str, list[Report]] = defaultdict(list)
    for path in sorted(results.glob("*/gpu*.json"), key=lambda path: (path.parent, path.stem)):
        found[path.parent.name].append(json.loads(path.read_text()))
    return found


def about(report: Report) -> str:
    """Device, versions, commit."""
    facts = report["machine"]
    versions = facts["versions"]
    return (f"{facts['device']}, driver {facts['driver'].partition(',')[0]}, torch {versions['torch']}, triton "
            f"{versions['triton']}; commit {facts['commit']}")


def short(report: Report) -> str:
    """Ours beside the fastest rival and eager PyTorch, and the runs of `ctr-train`."""
    speed, runs = list(_speed(report)), list(_runs(report))
    tables = []
    if speed:
        tables.append(_table([["median", "ours", "fastest rival that was timed", "plain PyTorch"], *speed], 1))
    if runs:
        head = ["run", "logloss", "AUC", "rows/s, compiling included", "s"]
        tables.append(_table([head, *runs], 1))
    return "\n\n".join("\n".join(table) for table in tables)


def full(report: Report) -> str:
    """All of it: checks, runs, bars, every timing, the kernels of a step, their counters."""
    text = [f"### Commit {report['machine']['commit']}\n", f"{about(report)}.\n", *_checks(report), "", short(report)]
    figures = [bar for bar in bars(report) if bar["found"] is not None and not isinstance(bar["found"], str)]
    if figures:
        text += ["", *_table([["", "wanted", "found", ""], *_bars(figures)], 1)]
    for part, rows in _timings(report).items():
        head = ["", "provider", "p20", "p50 ms", "p80", "x ours", "GB/s", ""]
        text += [f"\n#### {part}\n", *_table([head, *rows], 2)]
    kernels = report["parts"].get("kernels", {}).get("found", {})
    if kernels.get("profile"):
        text += ["\n#### Kernels of a step, of attention and of the FFN\n", *_profile(kernels["profile"])]
    if kernels.get("counters"):
        names = ["time", "dram %", "tensor cores %", "IPC", "warps %", "registers"]
        rows = [[row["precision"], row["kernel"], row["grid"].strip("()").partition(",")[0],
                 *(f"{row[name]:,.4g}" for name in names), ", ".join(row["stalls"])]
                for row in kernels["counters"] if row["time"] >= 20]
        text += ["\n#### Counters\n", *_table([["precision", "kernel", "programs", "us", *names[1:], "stalls"],
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
        yield [f"`--model ft`, {run['recipe']}, `--kernels {run['kernels']}`", f"{run['logloss']:.4f}",
               f"{run['auc']:.4f}", f"{run['rows_per_s']:,.0f}", f"{run['seconds']:.0f}"]


def _speed(report: Report) -> Iterator[list[str]]:
    """A line for each measurement: whose modes and sizes differ within a part."""
    for part, content in report["parts"].items():
        rows = content.get("found", {}).get("rows", []) if part.startswith("speed") else []
        for mode, x in dict.fromkeys((row["mode"], row["x"]) for row in rows):
            group = [row for row in rows if (row["mode"], row["x"]) == (mode, x) and row.get("p50")]
            ours = next((row for row in group if row["provider"].startswith("ours")), None)
            rivals = [row for row in group if not row["provider"].startswith("ours") and row.get("ratio")]
            if ours is None or not rivals:
                continue
            best = min(rivals, key=lambda row: row["ratio"])
            plain = next((row for row in rivals if row["provider"] in ("eager", "Embedding dense + SGD")), None)
            late = "" if content["status"] == "done" else ", not all timed"
            rate = 1e3 * int(x.partition("B=")[2].split()[0]) / ours["p50"]
            per_second = f" ({rate:,.0f} rows/s)" if mode == "training step" else ""
            yield [f"{ours['kernel'].replace('_', ' ')}, {mode}, {x}", f"{ours['p50']:.3f} ms{per_second}",
                   f"{best['ratio']:.1f}x ({best['provider']}{late})", f"{plain['ratio']:.1f}x" if plain else ""]


def _timings(report: Report) -> dict[str, list[list[str]]]:
    """Part -> a line for each provider, mode and size."""
    found: dict[str, list[list[str]]] = {}
    for part, content in report["parts"].items():
        for row in content.get("found", {}).get("rows", []) if part.startswith("speed") else []:
            numbers = [f"{row[name]:.4f}" if row.get(name) else "" for name in ("p20", "p50", "p80")]
            ratio, rate = (row.get("ratio"), row.get("gbps"))
            found.setdefault(f"{part.removeprefix('speed ')} ({content['status']})", []).append(
                [f"{row['mode']}, {row['x']}", row["provider"], *numbers, f"{ratio:.2f}" if ratio else "",
                 f"{rate:,.0f}" if rate else "", row.get("note") or ""])
    return found


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
