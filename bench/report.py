"""Turn the committed results into the tables and pictures of README.md and docs/results.md.

bench/results/MACHINE/NAME.json is what `bench/NAME.py --json` wrote there; NAME-batch.json and NAME-fields.json come
from its sweeps. The text between `<!-- results: WHAT -->` and `<!-- end of results -->` is replaced.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from common.records import Machine, Row, read_rows, tabulate
from on_gpu import report as on_gpu

from ctr_train.command import run_command
from ctr_train.files import atomic_path

ROOT = Path(__file__).parent.parent
RESULTS, PICTURES = ROOT / "bench" / "results", ROOT / "docs" / "pictures"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
# Lines of the summary: (label, file, kernel, mode, what the shape contains).
SUMMARY = (
    ("attention, forward", "attn", "field_attention", "forward", ""),
    ("attention, forward + backward", "attn", "field_attention", "forward+backward", ""),
    ("FFN, forward + backward", "ffn", "ffn", "forward+backward", ""),
    ("whole layer, forward (inference)", "layer", "layer", "forward", ""),
    ("whole layer, forward + backward", "layer", "layer", "forward+backward", ""),
    ("lookup + backward + SGD, uniform ids", "sparse_update", "sparse_update", "SGD", "uniform"),
    ("lookup + backward + SGD, skewed ids", "sparse_update", "sparse_update", "SGD", "skewed"),
    ("lookup + backward + Adagrad, skewed ids", "sparse_update", "sparse_update", "Adagrad", "skewed"),
    ("FT-Transformer, step of the default recipe, B=512", "step", "default step ft", "training step", "B=512"),
    ("AutoInt, step of the default recipe, B=512", "step", "default step autoint", "training step", "B=512"),
    ("DCNv2, step of the default recipe, B=512", "step", "default step dcnv2", "training step", "B=512"),
    ("FT-Transformer of its paper, training step, B=1024", "step", "paper step ft", "training step", "B=1024"),
    ("FT-Transformer, training step", "step", "step ft", "training step", ""),
    ("AutoInt, training step", "step", "step autoint", "training step", ""),
    ("DCNv2, training step", "step", "step dcnv2", "training step", ""),
)
PLAIN = ("eager", "Embedding dense + SGD", "Embedding dense + Adagrad")
Results = dict[str, tuple[Machine, list[Row]]]  # NAME -> what was measured


def load(machine: Path) -> Results:
    """All results of one machine; UserError for a file that is not JSON."""
    return {path.stem: read_rows(path) for path in sorted(machine.glob("*.json")) if not path.stem.startswith("gpu")}


def machines() -> dict[str, Results]:
    """Machine -> its results, for every folder of bench/results that has any of the CPU scripts."""
    folders = {path.name: load(path) for path in sorted(RESULTS.iterdir()) if path.is_dir()} if RESULTS.is_dir() else {}
    return {name: results for name, results in folders.items() if results}


def part(results: Results, file: str, kernel: str, mode: str, shape: str) -> list[Row]:
    """The rows of one measurement, ours first."""
    _, rows = results.get(file, (None, []))
    return [row for row in rows if (row.kernel, row.mode) == (kernel, mode) and shape in row.x]


def summary(everything: dict[str, Results]) -> str:
    """README: ours, the fastest rival and eager PyTorch, a line a measurement, for each machine."""
    return "\n".join(_summary_of(name, results) for name, results in everything.items()) or "None are committed yet.\n"


def _summary_of(name: str, results: Results) -> str:
    times, memory = [], []
    for label, *which in SUMMARY:
        ours, rivals = _split(part(results, *which))
        if ours is None or ours.p50 is None:
            continue
        rate = f" ({ours.rows_per_s:,.0f} rows/s)" if ours.rows_per_s else ""
        best = min(rivals, key=lambda row: row.ratio or float("inf"), default=None)
        plain = next((row for row in rivals if row.provider in PLAIN), None)
        times.append([label, f"{ours.p50:,.1f} ms{rate}", _ratio(best), best.provider if best else "", _ratio(plain)])
    for row in results.get("memory", (None, []))[1]:
        if row.mode == "step, in all":
            fits = next(other.rows or 0 for other in results["memory"][1] if (other.kernel, other.provider, other.mode)
                        == (row.kernel, row.provider, "largest batch in 24 GB"))
            memory.append([f"{row.kernel.removeprefix('memory ')}, {row.x}", row.provider, f"{row.memory_mb:,.0f} MB",
                           f"{fits:,}"])
    text = [f"`{name}`: {_machine(results)}.\n"]
    if times:
        text += [_markdown([False, True, True, False, True],
                           [["median", "ours", "fastest rival", "", "plain PyTorch"], *times])]
    else:
        text += ["No times are committed yet: they need a machine that does nothing else (`make bench`).\n"]
    if memory:
        text += [_markdown([False, False, True, True],
                           [["training step", "by", "memory", "largest batch in 24 GB"], *memory])]
    return "\n".join([*text, *(f"![{alt}](docs/pictures/{name}-{picture}.png)\n"
                               for picture, alt in shown(results)[:1])])


def shown(results: Results) -> list[tuple[str, str]]:
    """(name, what it shows) of each picture that the results allow, the one for the README first."""
    pictures = []
    if any(part(results, *which) for _, *which in SUMMARY):
        pictures.append(("times", "time of every rival, by operation"))
    if "memory" in results:
        pictures.append(("memory", "memory by model and optimizer"))
    return pictures


def _split(rows: list[Row]) -> tuple[Row | None, list[Row]]:
    """Ours, and the rivals that ran."""
    return (next((row for row in rows if row.provider.startswith("ours")), None),
            [row for row in rows if not row.provider.startswith("ours") and row.ratio])


def _ratio(row: Row | None) -> str:
    return f"{row.ratio:.1f}x" if row and row.ratio else ""


def _machine(results: Results) -> str:
    """Device, threads, torch and commit, as all the files have them."""
    parts = {(m.device, m.threads, m.torch) for m, _ in results.values()}
    commits = sorted({m.commit for m, _ in results.values()})
    loads = [m.load for m, _ in results.values()]
    return "; ".join(f"{device}, {threads} CPU threads, torch {torch}" for device, threads, torch in sorted(parts)) + (
        f"; commit {', '.join(commits)}; load before: {min(loads):.1f} to {max(loads):.1f}")


def full(everything: dict[str, Results]) -> str:
    """docs/results.md: every row of every machine, with its pictures."""
    text = []
    for name, results in everything.items():
        text += [f"## {name}\n", f"{_machine(results)}.\n"]
        text += [f"![{alt}](pictures/{name}-{picture}.png)\n" for picture, alt in shown(results)]
        for script, (machine, rows) in results.items():
            above, numeric, lines = tabulate(rows)
            text += [f"### {script}\n"]
            if "-" in script:
                text += [f"![{script}](pictures/{name}-{script}.png)\n"]
            text += [f"{above or 'All'}; {machine}.\n", _markdown(numeric, lines)]
    return "\n".join(text) or "None are committed yet.\n"


def _markdown(numeric: Sequence[bool], lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "|".join("--:" if right else "---" for right in numeric) + "|", *body]) + "\n"


def gpu_summary(_: dict[str, Results]) -> str:
    """README: what ran on GPUs."""
    found = on_gpu.reports(RESULTS)
    return "\n".join(f"`{name}`: {on_gpu.about(report)}.\n\n{on_gpu.short(report)}\n"
                     for name, reports in found.items() for report in reports) or "Nothing is committed yet.\n"


def gpu(_: dict[str, Results]) -> str:
    """docs/results.md: all that was found on GPUs."""
    return "\n".join(f"## {name}\n\n![loss](pictures/{name}-loss.png)\n\n" + "\n".join(map(on_gpu.full, reports))
                     for name, reports in on_gpu.reports(RESULTS).items())


WHAT: dict[str, Callable[[dict[str, Results]], str]] = {"summary": summary, "full": full, "gpu_summary": gpu_summary,
                                                        "gpu": gpu}


def fill(text: str, everything: dict[str, Results]) -> str:
    """The document with its results as they are now."""
    return BLOCK.sub(lambda found: f"{found[1]}{WHAT[found[2]](everything)}{found[3]}", text)


def draw(name: str, results: Results) -> None:
    """All pictures of one machine."""
    from common.plots import draw_bars, draw_stacks, draw_sweep

    measured = {label: part(results, *which) for label, *which in SUMMARY}
    about = _machine(results)
    if any(measured.values()):
        draw_bars({label: rows for label, rows in measured.items() if rows}, about, PICTURES / f"{name}-times.png")
    if "memory" in results:
        draw_stacks(_stacks(results["memory"][1]), about, PICTURES / f"{name}-memory.png")
    for script, (machine, rows) in results.items():
        if "-" in script:
            draw_sweep(rows, machine, PICTURES / f"{name}-{script}.png")


def draw_losses(reports: Sequence[on_gpu.Report], path: Path) -> None:
    """PNG: the losses of training with our kernels and with PyTorch's own operations, of the latest run with them."""
    from common.plots import draw_curves

    for report in reports:
        checks = report["parts"].get("training", {}).get("found", {})
        curves = {f"{name.split()[-1]}, {whose}": curve
                  for name, check in checks.items() for whose, curve in zip(
                      ("triton", "eager"), check.get("figures", {}).get("curves", ()), strict=False)}
        if curves:
            draw_curves(curves, on_gpu.about(report), path)
            return


def _stacks(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Panel -> provider -> part -> MB: what autograd keeps of an FT layer, then the training step of each model."""
    stacks: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.memory_mb is None or (row.kernel == "memory autoint layer"):
            continue
        layer = row.kernel.endswith("layer")
        model = row.kernel.removeprefix("memory ").removesuffix(" layer")
        panel = f"{model}, {'one layer: kept for backward' if layer else 'a training step'}, {row.x}"
        bar = stacks.setdefault(panel, {}).setdefault(row.provider, {})
        if row.mode == "step, in all":
            bar["gradients, activations, temporaries"] = row.memory_mb - sum(bar.values())
        elif row.mode in ("embedding table", "optimizer state") or (layer and row.mode != "layer, in all"):
            bar[row.mode] = row.memory_mb
    return stacks


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a document does not have the results.")
def main(check: bool) -> None:
    """Write the tables and pictures of README.md and docs/results.md from bench/results."""
    everything = machines()
    for path in DOCUMENTS:
        text = path.read_text()
        filled = fill(text, everything)
        if check and filled != text:
            raise click.ClickException(f"{path.name} has other figures than bench/results: run bench/report.py")
        if not check and filled != text:
            with atomic_path(path) as temporary:
                temporary.write_text(filled)
    if not check:
        for name, results in everything.items():
            draw(name, results)
        for name, reports in on_gpu.reports(RESULTS).items():
            draw_losses(reports, PICTURES / f"{name}-loss.png")


if __name__ == "__main__":
    run_command(main, "bench/report.py")
