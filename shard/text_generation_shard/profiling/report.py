"""A case's figures as lines of text."""

from typing import Any


def lines_of(figures: dict[str, Any], max_kernels: int) -> list[str]:
    """Its times, then the kernels that took longest."""
    untraced, traced = figures["untraced"], figures["traced"]
    lines = [f"{figures['name']}: {untraced['num_tokens']} tokens a step, times in us as p50 / p99 / max"]
    for name in ("interval_us", "device_us", "layers_us", "head_us", "host_launch_us"):
        lines.append(f"  {name.removesuffix('_us'):16} {_spread(untraced[name])}")
    if traced["steps"] is None:
        lines.append("  traced: the steps could not be told apart")
    else:
        lines += [f"  traced {name.removesuffix('_us'):16} {_spread(value)}" for name, value in traced["steps"].items()]
    if "span_us" in traced:
        per_step, share = traced["span_us"] / traced["num_steps"], traced["idle_us"] / traced["span_us"]
        lines.append(f"  traced: {per_step:.1f} us a step, of it idle {share:.1%}")
    lines.append(f"  {'us/step':>10} {'count':>7} {'mean us':>9}  kernel")
    for kernel in traced["kernels"][:max_kernels]:
        lines.append(f"  {kernel['us_per_step']:10.1f} {kernel['count']:7} {kernel['mean_us']:9.2f}  {kernel['name']}")
    return lines


def _spread(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['p50']:9.1f} {values['p99']:9.1f} {values['max']:9.1f}"
