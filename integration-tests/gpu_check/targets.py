"""What the suite's rows must reach on one H100 with a Llama of 8 billion parameters in bfloat16."""

# Row -> figure -> (the figure must be at most or at least it, the target).
TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "chat-c1": {"tpot_p50_ms": ("<=", 5.9), "ttft_p50_ms": ("<=", 11)},
    "chat-c4": {"tpot_p50_ms": ("<=", 6.0), "ttft_p50_ms": ("<=", 14)},
    "chat-c32": {
        "out_tok_s": (">=", 3900), "tpot_p50_ms": ("<=", 6.7), "ttft_p50_ms": ("<=", 20), "ttft_p99_ms": ("<=", 170),
    },
    "chat-rate8": {"tpot_p50_ms": ("<=", 6.2), "tpot_p99_ms": ("<=", 7.2), "ttft_p99_ms": ("<=", 55)},
    "chat-rate24": {
        "tpot_p50_ms": ("<=", 6.8), "tpot_p99_ms": ("<=", 8.5), "ttft_p50_ms": ("<=", 20), "ttft_p99_ms": ("<=", 70),
    },
    "chat-all": {"out_tok_s": (">=", 14000)},
    "uniform-all": {"out_tok_s": (">=", 8800)},
    "summarize-c16": {"out_tok_s": (">=", 840), "itl_p99_ms": ("<=", 60)},
    "sharedprefix-c32": {"out_tok_s": (">=", 3700), "ttft_p50_ms": ("<=", 28), "ttft_p99_ms": ("<=", 540)},
}  # fmt: skip
HEALTHY_S = 20.0


def verdict(value: float | None, rule: str, target: float) -> str:
    """How a figure stands to its target."""
    if value is None:
        return "-"
    return "met" if (value <= target if rule == "<=" else value >= target) else f"{value / target:.2f} x"
