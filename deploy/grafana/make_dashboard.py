"""Writes dashboards/text-generation.json: `make dashboard`. What is on the board is the table PANELS below."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "text-generation.json"
# What every query selects; the variables are the board's.
SELECTED = 'job=~"$job", instance=~"$instance"'
WINDOW = "$__rate_interval"
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
STAT_HEIGHT, GRAPH_HEIGHT = 4, 8
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
GPU_ROW = "GPUs"
PREFILL, DECODE = 'kind="prefill"', 'kind="decode"'
SERVER_FAILED = 'err=~"generation|incomplete"'
CLIENT_FAILED_NOT = 'err!~"validation|template|dropped"'


def selector(labels: str) -> str:
    """What a query selects."""
    return f"{SELECTED}, {labels}" if labels else SELECTED


def rate(counter: str, labels: str = "") -> str:
    """Events a second of one series."""
    return f"rate({counter}{{{selector(labels)}}}[{WINDOW}])"


def gauge(name: str) -> str:
    """Values of one gauge."""
    return f"{name}{{{SELECTED}}}"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """A quantile over all servers, for each value of the label `by`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) ({rate(histogram + '_bucket')}))"


def mean(histogram: str, labels: str = "") -> str:
    """The mean over all servers."""
    return f"sum({rate(histogram + '_sum', labels)}) / sum({rate(histogram + '_count', labels)})"


def quantiles(histogram: str) -> dict[str, str]:
    """Three quantiles, by legend."""
    return {name: quantile(share, histogram) for name, share in QUANTILES.items()}


@dataclass(frozen=True)
class Panel:
    """One panel: `queries` by legend, where a legend may name a label as {{label}}."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""
    is_stat: bool = False
    is_stacked: bool = False
    limits: tuple[float, float] | None = None  # from where on a number is yellow, and red
    maximum: float | None = None

    def body(self, number: int, place: dict[str, int]) -> dict[str, Any]:
        """As Grafana reads it."""
        targets = [
            {"refId": chr(65 + index), "datasource": DATA_SOURCE, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(self.queries.items())
        ]
        return {
            "id": number,
            "type": "stat" if self.is_stat else "timeseries",
            "title": self.title,
            "description": self.text,
            "gridPos": place,
            "datasource": DATA_SOURCE,
            "targets": targets,
            "fieldConfig": {"defaults": self._field(), "overrides": []},
            "options": self._options(),
        }

    def _field(self) -> dict[str, Any]:
        field: dict[str, Any] = {"unit": self.unit, "min": 0}
        if self.maximum is not None:
            field["max"] = self.maximum
        if self.limits is not None:
            colors = [("green", None), ("yellow", self.limits[0]), ("red", self.limits[1])]
            steps = [{"color": color, "value": value} for color, value in colors]
            field |= {"thresholds": {"mode": "absolute", "steps": steps}, "color": {"mode": "thresholds"}}
        if not self.is_stat:
            stacking = {"mode": "normal" if self.is_stacked else "none", "group": "A"}
            field["color"] = {"mode": "palette-classic"}
            field["custom"] = {
                "fillOpacity": 35 if self.is_stacked else 8,
                "lineWidth": 1,
                "showPoints": "never",
                "stacking": stacking,
            }
        return field

    def _options(self) -> dict[str, Any]:
        if self.is_stat:
            return {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "value"}
        return {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max", "lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


def stat(title: str, unit: str, query: str, text: str, limits: tuple[float, float] | None = None) -> Panel:
    """A panel of one number."""
    return Panel(title, unit, {"": query}, text, is_stat=True, limits=limits)


PANELS: dict[str, list[Panel]] = {
    "At a glance": [
        stat("Requests", "reqps", f"sum({rate('tgi_request_count')})", "Received a second, refused ones included."),
        stat(
            "Served",
            "percentunit",
            f"sum({rate('tgi_request_success')})"
            f" / (sum({rate('tgi_request_success')}) + sum({rate('tgi_request_failure', CLIENT_FAILED_NOT)}))",
            "Requests that ended well, of those that were in order and whose client stayed.",
        ),
        stat("Generated", "short", f"sum({rate('tgi_tokens_streamed')})", "Tokens handed to clients, a second."),
        stat(
            "First token, p99",
            "s",
            quantile(0.99, "tgi_request_time_to_first_token_duration"),
            "From the arrival of a request to its first token sent.",
            (1, 3),
        ),
        stat(
            "Next token, p99",
            "s",
            quantile(0.99, "tgi_request_inter_token_duration"),
            "Between two tokens of one request.",
            (0.1, 0.3),
        ),
        stat("Running", "short", f"sum({gauge('tgi_batch_current_size')})", "Sequences in the batch."),
        stat("Waiting", "short", f"sum({gauge('tgi_queue_size')})", "Sequences that are not in it yet.", (8, 32)),
        stat(
            "KV memory",
            "percentunit",
            f"sum({gauge('tgi_kv_blocks_used')}) / sum({gauge('tgi_kv_blocks_capacity')})",
            "Share that running sequences own; above 95 % sequences are preempted.",
            (0.85, 0.95),
        ),
    ],
    "Traffic": [
        Panel(
            "Requests by outcome",
            "reqps",
            {
                "success": f"sum({rate('tgi_request_success')})",
                "{{err}}": f"sum by (err) ({rate('tgi_request_failure')})",
            },
            "`dropped`: the client left. `overloaded`: told to come back later.",
            is_stacked=True,
        ),
        Panel(
            "Refused, by reason",
            "reqps",
            {"{{reason}}": f"sum by (reason) ({rate('tgi_request_rejected')})"},
            "What each reason means is in docs/operations.md.",
            is_stacked=True,
        ),
        Panel(
            "Tokens",
            "short",
            {
                "prompt, computed": f"sum({rate('tgi_step_scheduled_tokens_sum', PREFILL)})",
                "prompt, found in the cache": f"sum({rate('tgi_prefix_cache_hit_tokens')})",
                "generated": f"sum({rate('tgi_tokens_sampled')})",
            },
            "A second.",
        ),
        Panel("Prompt length", "short", quantiles("tgi_request_input_length"), "Tokens."),
        Panel(
            "Generated length",
            "short",
            quantiles("tgi_request_generated_tokens"),
            "Tokens of requests that ended well.",
        ),
        Panel("Allowed length", "short", quantiles("tgi_request_max_new_tokens"), "Most tokens that a request allows."),
    ],
    "Latency": [
        Panel("Time to first token", "s", quantiles("tgi_request_time_to_first_token_duration"), "Queue included."),
        Panel(
            "Between tokens", "s", quantiles("tgi_request_inter_token_duration"), "Of one request: what a reader sees."
        ),
        Panel(
            "Whole request",
            "s",
            quantiles("tgi_request_duration"),
            "Arrival to last token, of requests that ended well.",
        ),
        Panel(
            "Where a request's time goes",
            "s",
            {
                "validation": mean("tgi_request_validation_duration"),
                "queue": mean("tgi_request_queue_duration"),
                "inference": mean("tgi_request_inference_duration"),
            },
            "Means of requests that ended well.",
            is_stacked=True,
        ),
        Panel(
            "Time per token",
            "s",
            quantiles("tgi_request_mean_time_per_token_duration"),
            "Inference over tokens, by request.",
        ),
        Panel(
            "Validation", "s", quantiles("tgi_request_validation_duration"), "Reading, rendering, tokenising, grammars."
        ),
    ],
    "Queue and batch": [
        Panel(
            "Sequences",
            "short",
            {
                "running": f"sum({gauge('tgi_batch_current_size')})",
                "waiting": f"sum({gauge('tgi_queue_size')})",
            },
            "A queue that does not empty means more load than the server can take.",
            is_stacked=True,
        ),
        Panel("Time in the queue", "s", quantiles("tgi_request_queue_duration"), "Queued to first scheduled."),
        Panel(
            "Tokens a step",
            "short",
            {
                "prompt": mean("tgi_step_scheduled_tokens", PREFILL),
                "decode": mean("tgi_step_scheduled_tokens", DECODE),
            },
            "Means of the steps that have any.",
        ),
        Panel(
            "Duration of a step, p99",
            "s",
            {"{{kind}}": quantile(0.99, "tgi_step_duration", by="kind")},
            "On the device, by what the step computes.",
        ),
        Panel(
            "Steps",
            "ops",
            {"{{method}}": f"sum by (method) ({rate('tgi_batch_inference_success')})"},
            "A second.",
            is_stacked=True,
        ),
        Panel(
            "Where a step's time goes",
            "s",
            {
                "forward pass": mean("tgi_batch_forward_duration"),
                "text and stop strings": mean("tgi_batch_decode_duration"),
                "handing out": mean("tgi_batch_filter_duration"),
            },
            "Means. The last two happen while the device computes the next step.",
        ),
    ],
    "KV memory": [
        Panel(
            "Blocks",
            "short",
            {
                "owned by sequences": f"sum({gauge('tgi_kv_blocks_used')})",
                "kept for later prompts": f"sum({gauge('tgi_kv_blocks_cached')})",
                "free": f"sum({gauge('tgi_kv_blocks_capacity')} - {gauge('tgi_kv_blocks_used')}"
                f" - {gauge('tgi_kv_blocks_cached')})",
            },
            "Kept ones are given away whenever a sequence needs them.",
            is_stacked=True,
        ),
        Panel(
            "Prompt tokens found in the prefix cache",
            "percentunit",
            {"share": f"sum({rate('tgi_prefix_cache_hit_tokens')}) / sum({rate('tgi_prefix_cache_query_tokens')})"},
            "Each one found is one less to compute.",
            maximum=1,
        ),
        Panel(
            "Preemptions",
            "short",
            {
                "sequences": f"sum({rate('tgi_preemptions')})",
                "tokens computed again": f"sum({rate('tgi_recomputed_tokens')})",
            },
            "A second. Memory ran out, and the youngest sequences gave way.",
        ),
    ],
    "Errors and books": [
        Panel(
            "Requests that failed through us",
            "reqps",
            {"{{err}}": f"sum by (err) ({rate('tgi_request_failure', SERVER_FAILED)})"},
            "Nothing here is a client's fault.",
        ),
        Panel(
            "Failed steps",
            "ops",
            {"{{method}}": f"sum by (method) ({rate('tgi_batch_inference_failure')})"},
            "A second.",
        ),
        Panel(
            "Tokens computed for nobody",
            "short",
            {"{{reason}}": f"sum by (reason) ({rate('tgi_tokens_dropped')})"},
            "A second: of clients that left, and of steps under way when their sequence ended.",
        ),
        Panel(
            "Books",
            "short",
            {
                "requests": f"sum({gauge('tgi_request_residual')})",
                "tokens": f"sum({gauge('tgi_tokens_residual')})",
                "sequences without a reader": f"sum({gauge('tgi_sequences_without_reader')})",
            },
            "What came in and is neither finished nor running. Anything but 0 that stays is a bug.",
        ),
        Panel(
            "Memory of the processes",
            "bytes",
            {"{{instance}} {{process}}": gauge("tgi_process_resident_memory_bytes")},
            "Resident.",
        ),
        Panel(
            "What runs",
            "short",
            {
                "{{instance}} {{model_id}} {{dtype}} on {{num_shards}} x {{device}}": gauge("tgi_model_info"),
                "{{instance}} version {{version}}": gauge("tgi_build_info"),
            },
            "Changes show when a version or model was replaced.",
        ),
    ],
    GPU_ROW: [
        Panel(
            "Utilisation", "percentunit", {"{{instance}} {{rank}}": gauge("tgi_gpu_utilization_ratio")}, "", maximum=1
        ),
        Panel(
            "Memory",
            "bytes",
            {
                "{{instance}} {{rank}}": gauge("tgi_gpu_memory_used_bytes"),
                "{{instance}} {{rank}}, all": gauge("tgi_gpu_memory_total_bytes"),
            },
        ),
        Panel("Power", "watt", {"{{instance}} {{rank}}": gauge("tgi_gpu_power_watts")}),
    ],
}


def variable(name: str, query: str) -> dict[str, Any]:
    """A choice of label values, all by default."""
    return {
        "name": name,
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def place_all() -> list[dict[str, Any]]:
    """Rows and panels from top to bottom: numbers in one line, graphs three in a line."""
    bodies: list[dict[str, Any]] = []
    y = 0
    for title, panels in PANELS.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        bodies.append({"id": len(bodies) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place})
        y += 1
        num_columns = len(panels) if panels[0].is_stat else 3
        height = STAT_HEIGHT if panels[0].is_stat else GRAPH_HEIGHT
        width = WIDTH // num_columns
        for index, panel in enumerate(panels):
            line, column = divmod(index, num_columns)
            place = {"x": column * width, "y": y + line * height, "w": width, "h": height}
            bodies.append(panel.body(len(bodies) + 1, place))
        y += height * -(-len(panels) // num_columns)
    return bodies


def dashboard() -> dict[str, Any]:
    """The whole board."""
    return {
        "uid": "text-generation",
        "title": "Text generation",
        "tags": ["inference"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                variable("job", "label_values(tgi_build_info, job)"),
                variable("instance", 'label_values(tgi_build_info{job=~"$job"}, instance)'),
            ]
        },
        "annotations": {"list": []},
        "panels": place_all(),
    }


def main() -> None:
    """Write the file."""
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
