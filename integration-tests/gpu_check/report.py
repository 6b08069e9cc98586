"""The Markdown report: what failed first, then each part's figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpu_check.targets import HEALTHY_S, TARGETS, verdict

Figures = Mapping[str, Any]
MAX_KERNELS = 25
SUITE_COLUMNS = (
    "out_tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p50_ms", "itl_p99_ms", "wall_s",
)  # fmt: skip


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = ["# GPU check" + (" (a rehearsal: its times mean nothing)" if report["is_rehearsal"] else ""), ""]
    rows = [
        (name, outcome["failure"] or "good", f"{outcome['wall_s']:.1f}") for name, outcome in report["parts"].items()
    ]
    lines += table(("part", "outcome", "s"), rows)
    for name, outcome in report["parts"].items():
        lines += ["", f"## {name}", ""]
        if outcome["failure"] is not None:
            lines += [f"Failed: {outcome['failure']}. The end of its log:", "", "```", *outcome.get("last_lines", [])]
            lines += ["```", ""]
        if outcome["figures"] is not None:
            lines += SECTIONS[name](outcome["figures"])
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return [f"| {line} |" for line in lines]


def tests_section(figures: Figures) -> list[str]:
    """Tests by file, and the failures."""
    rows = [
        (row["name"], row["tests"], row["skipped"], len(row["failures"]), row["wall_s"]) for row in figures["files"]
    ]
    lines = table(("file", "tests", "skipped", "failed", "s"), rows)
    for row in figures["files"]:
        lines += [f"- skipped in {row['name']}: {reason}" for reason in row.get("skip_reasons", [])]
        for failure in row["failures"]:
            lines += ["", f"{row['name']}, {failure['name']}:", "", "```", failure["text"], "```"]
    return lines


def benchmarks_section(figures: Figures) -> list[str]:
    """The GPU's own limits, then each case's share of them."""
    lines = []
    for roof in figures["roofs"]:
        copy, product = roof["copy_bytes_per_s"] / 1e12, roof["matmul_flops_per_s"] / 1e12
        lines.append(f"- {roof['operation']}, {roof['device']}: copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s")
    lines += [f"- failed: {name}" for name in figures["failed"]]
    rows = [
        (row["operation"], row["name"], f"{row['time_us']:.1f}", f"{row['gb_per_s']:.0f}", f"{row['tflops_per_s']:.1f}",
         f"{row['share_of_roof']:.0%}")
        for row in figures["rows"]
    ]  # fmt: skip
    return [*lines, "", *table(("operation", "case", "us", "GB/s", "TFLOP/s", "share of the limit"), rows)]


def trace_section(figures: Figures) -> list[str]:
    """Each case: times of steps, idle times, and the kernels that took longest."""
    lines = [f"{figures['device']}; warm-up {figures['warm_up_s']:.2f} s, {figures['num_blocks']} KV blocks.", ""]
    for case in figures["cases"]:
        untraced, traced = case["untraced"], case["traced"]
        lines += [f"### {case['name']}: {untraced['num_tokens']} tokens a step", ""]
        spreads = {name: value for name, value in untraced.items() if name.endswith("_us")}
        spreads |= {f"traced {name}": value for name, value in (traced["steps"] or {}).items()}
        rows = [
            (name, *(f"{value[key]:.1f}" for key in ("p50", "p99", "max"))) for name, value in spreads.items() if value
        ]
        lines += table(("us", "p50", "p99", "max"), rows)
        if traced["steps"] is None:
            lines += ["", "The trace's steps could not be told apart."]
        if "span_us" in traced:
            lines += ["", f"Idle {traced['idle_us'] / traced['num_steps']:.1f} us a step, "
                      f"{traced['idle_us'] / traced['span_us']:.1%} of the trace.", ""]  # fmt: skip
        kernels = [
            (f"`{kernel['name']}`", f"{kernel['us_per_step']:.1f}", f"{kernel['count'] / traced['num_steps']:.1f}",
             f"{kernel['mean_us']:.2f}")
            for kernel in traced["kernels"][:MAX_KERNELS]
        ]  # fmt: skip
        lines += [*table(("kernel", "us a step", "launches a step", "mean us"), kernels), ""]
    return lines


def startup_section(figures: Figures) -> list[str]:
    """Phases of each start in seconds, and the memory's parts."""
    lines = [f"{figures['weights_gb']} GB of weights, read once at {figures['page_cache_gb_s']} GB/s.", ""]
    for start in figures["starts"]:
        mark = verdict(start["healthy_s"], "<=", HEALTHY_S)
        lines += [f"{start['kind']}: healthy after {start['healthy_s']} s (target {HEALTHY_S:.0f}: {mark})", ""]
        for name in ("launcher_s", "shard_s"):
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in start[name].items())
            lines.append(f"- {name.removesuffix('_s')}: {phases}")
        lines += [*(f"- {text}" for text in start["memory"]), ""]
    return lines


def suite_section(figures: Figures) -> list[str]:
    """The rows' figures, and how they stand to their targets."""
    rows = [(row["name"], *(_rounded(row.get(name)) for name in SUITE_COLUMNS)) for row in figures["rows"]]
    lines = [*table(("row", *SUITE_COLUMNS), rows), ""]
    judged = [
        (row["name"], name, _rounded(row.get(name)), f"{rule} {target:g}", verdict(row.get(name), rule, target))
        for row in figures["rows"]
        for name, (rule, target) in TARGETS.get(row["name"], {}).items()
    ]
    lines += table(("row", "figure", "ours", "target", ""), judged)
    return [*lines, *(f"- failed: {text}" for text in figures["failed"])]


def memory_section(figures: Figures) -> list[str]:
    """What was held after so many requests."""
    columns = list(figures["looks"][0])
    return table(columns, [[line.get(name, "-") for name in columns] for line in figures["looks"]])


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


SECTIONS: dict[str, Callable[[Figures], list[str]]] = {
    "kernels": tests_section,
    "parity": tests_section,
    "benchmarks": benchmarks_section,
    "trace": trace_section,
    "startup": startup_section,
    "suite": suite_section,
    "memory": memory_section,
}
