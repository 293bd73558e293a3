"""What a GPU run has to reach, next to what it reached, from the report that `bench/gpu.py` gathers."""

from collections.abc import Callable, Iterator
from typing import Any

Rows = list[dict[str, Any]]
TABLE_MB, EXTRA_MB = 512.0, 300.0


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """[{"what", "bar", "found", "met"}]: met is None where there is no figure, as always in a rehearsal."""
    return [] if report["rehearsal"] else [*_speed(report), *_training(report)]


def _speed(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for dtype in ("bf16", "fp32"):
        rows, copy = _rows(report, f"speed attention {dtype}")
        for mode, share in (("forward", 80), ("forward+backward", 70)):
            group = [row for row in rows if row["mode"] == mode]
            ours = _ours(group)
            yield _bar(f"attention {mode} {dtype}, % of copy bandwidth", share,
                       100 * ours["gbps"] / copy if ours and copy else None)
            yield _bar(f"attention {mode} {dtype}, x the best peer", 3, *_best(group, _rival))
    for dtype in ("fp32", "bf16"):
        group = [row for row in _rows(report, f"speed ffn {dtype}")[0] if row["mode"] == "forward+backward"]
        yield _bar(f"FFN forward+backward {dtype}, x the best peer", 2, *_best(group, _rival))
    rows, copy = _rows(report, "speed sparse_update")
    for kind in ("uniform", "skewed"):
        group = [row for row in rows if row["mode"] == "SGD" and row["x"].endswith(kind)]
        ours = _ours(group)
        yield _bar(f"row update, {kind} ids, % of copy bandwidth", 40,
                   100 * ours["gbps"] / copy if ours and copy else None)
        yield _bar(f"row update, {kind} ids, x dense-gradient SGD", 20, *_best(group, lambda name: "dense" in name))
    steps = {dtype: _rows(report, f"speed step {dtype}")[0] for dtype in ("fp32", "tf32", "bf16")}
    eager = next((row["p50"] for row in steps["fp32"] if row["provider"] == "eager" and "p50" in row), None)
    times = {dtype: ours["p50"] for dtype, rows in steps.items() if (ours := _ours(rows))}
    for dtype, rows in steps.items():
        yield _bar(f"FT step {dtype}, x eager fp32", 8, eager / times[dtype] if eager and dtype in times else None)
        yield _bar(f"FT step {dtype}, x torch.compile in {dtype}", 3,
                   *_best(rows, lambda name: name.startswith("compile")))
    yield _bar("FT step bf16, x our tf32 step", 1.5,
               times["tf32"] / times["bf16"] if {"tf32", "bf16"} <= times.keys() else None)


def _training(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found = report["parts"].get("training", {}).get("found", {})
    memory = found.get("peak memory", {}).get("figures", {})
    for name in ("fp32 graph", "bf16 graph"):
        peak = memory.get(name)
        yield {"what": f"peak memory of FT training, {name}, MB", "bar": f"at most {TABLE_MB + EXTRA_MB:g}",
               "found": peak, "peer": "", "met": None if peak is None else peak <= TABLE_MB + EXTRA_MB}
    for name, check in found.items():
        if name != "peak memory":
            yield {"what": name, "bar": "passes", "found": check["status"], "peer": "",
                   "met": None if check["status"] == "not done" else check["status"] == "passed"}


def _rows(report: dict[str, Any], part: str) -> tuple[Rows, float]:
    """The rows of a part, and the copy bandwidth in GB/s that was measured in it."""
    found = report["parts"].get(part, {}).get("found")
    if not found:
        return [], 0.0
    late = report["parts"][part]["status"] != "done"  # some peers were never timed, perhaps the strongest
    return [{**row, "late": late} for row in found["rows"]], found["machine"]["copy_gbps"]


def _ours(group: Rows) -> dict[str, Any] | None:
    return next((row for row in group if row["provider"] in ("ours", "ours SGD") and "p50" in row), None)


def _rival(name: str) -> bool:
    return not name.startswith("ours")


def _best(group: Rows, chosen: Callable[[str], bool]) -> tuple[float | None, str, bool]:
    """How many times longer the fastest of the chosen providers takes than ours; its name, and those that have no
    figure; whether the part ended before it had timed all of them."""
    peers = [row for row in group if chosen(row["provider"])]
    timed = [(row["ratio"], row["provider"]) for row in peers if "ratio" in row]
    if not timed:
        return None, "", False
    ratio, name = min(timed)
    without = [row["provider"] for row in peers if "ratio" not in row]
    return ratio, name + (f"; without {', '.join(without)}" if without else ""), any(row["late"] for row in group)


def _bar(what: str, bar: float, found: float | None, peer: str = "", late: bool = False) -> dict[str, Any]:
    """late: some peers were not timed, so that a bar that seems to be met is not known to be."""
    return {"what": what, "bar": f"at least {bar:g}", "found": found, "peer": peer + ("; not all timed" * late),
            "met": None if found is None or (late and found >= bar) else found >= bar}


def markdown(report: dict[str, Any]) -> str:
    """The report as short tables; a rehearsal shows no figures."""
    facts = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"{facts.get('device', 'no GPU')}, {versions}, commit {facts['commit']}"]
    if report["rehearsal"]:
        lines.append("REHEARSAL: it shows that everything runs; no figure of it is a result.")
    lines += ["", "| part | how it ended | s |", "|---|---|---|"]
    lines += [f"| {name} | {part['status']} | {part.get('seconds', '')} |" for name, part in report["parts"].items()]
    for part in ("parity", "parity others", "training"):
        checks = report["parts"].get(part, {}).get("found", {})
        lines += [f"- {part}, {name}: {check['status']}: {check['reason']}" for name, check in checks.items()
                  if check["status"] != "passed"]
    if report["bars"]:
        lines += ["", "| | bar | found | |", "|---|---|---|---|"]
        for bar in report["bars"]:
            value = bar["found"]
            text = "-" if value is None else value if isinstance(value, str) else f"{value:.3g}"
            peer = f" ({bar['peer']})" if bar["peer"] else ""
            met = {True: "met", False: "MISSED", None: "no figure"}[bar["met"]]
            lines.append(f"| {bar['what']} | {bar['bar']} | {text}{peer} | {met} |")
    return "\n".join(lines) + "\n"
