"""The flags of `text-generation-benchmark`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from text_generation_launcher.benchmark.client import ROUTES
from text_generation_launcher.benchmark.load import CONSTANT, POISSON
from text_generation_launcher.benchmark.request_sets import SETS


def build_parser() -> argparse.ArgumentParser:
    """All flags, with their help."""
    parser = argparse.ArgumentParser(
        prog="text-generation-benchmark",
        description="Puts load on a running server and reports latency and throughput. Ends with 1 when a request "
        "fails or brings fewer or more tokens than asked for.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_server(parser.add_argument_group("server"))
    _add_requests(parser.add_argument_group("requests"))
    _add_pace(parser.add_argument_group("pace (default: all requests at once)"))
    _add_results(parser.add_argument_group("results"))
    return parser


def _add_server(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--url", default="http://127.0.0.1:3000", help="where the server listens")
    group.add_argument("--route", choices=sorted(ROUTES), default="completions", help="HTTP dialect")
    group.add_argument("--model", default="tgi", help="model name to send")
    group.add_argument("--api-key", help="sent as `Authorization: Bearer KEY`")
    group.add_argument("--new-connections", action="store_true", help="a connection of its own for each request")


def _add_requests(group: "argparse._ArgumentGroup") -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--requests", type=Path, metavar="FILE", help='lines of {"prompt": text or token ids, "max_tokens": number}'
    )
    source.add_argument("--set", choices=SETS, default="chat", help="a request set made from the seed")
    group.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="folder with tokenizer.json, to measure prompts of --set; "
        "by default the embedded demo model's"
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=1, help="of the request set and of Poisson arrivals")
    group.add_argument(
        "-n", "--num-requests", type=_positive(int), metavar="N",
        help="only so many of the set; in a sweep, so many at each load, taken in turn",
    )  # fmt: skip
    group.add_argument("--write-requests", type=Path, metavar="FILE", help="write the requests and end")


def _add_pace(group: "argparse._ArgumentGroup") -> None:
    pace = group.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=_positive(int), metavar="N", help="so many requests open at any time")
    pace.add_argument("--rate", type=_positive(float), metavar="R", help="so many requests start in a second")
    pace.add_argument(
        "--sweep-concurrency", type=_list_of(int), metavar="N,N,...", help="one load after the other, and their knee"
    )
    pace.add_argument("--sweep-rate", type=_list_of(float), metavar="R,R,...", help="as --sweep-concurrency")
    group.add_argument("--arrivals", choices=(POISSON, CONSTANT), default=POISSON, help="gaps between starts at a rate")


def _add_results(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--name", help="what the load is called; by default its request set")
    group.add_argument("--slo-ttft-ms", type=_positive(float), metavar="MS", help="TTFT that goodput asks for")
    group.add_argument(
        "--slo-itl-ms", type=_positive(float), metavar="MS",
        help="what goodput asks of the 99th percentile of a request's own gaps",
    )  # fmt: skip
    group.add_argument("--json", type=Path, metavar="FILE", help="append the figures, one line for each load")
    group.add_argument("--records", type=Path, metavar="FILE", help="append one line for each request, with its times")
    group.add_argument("--plot", type=Path, metavar="FILE", help="a sweep's latency over load, .png or .html")
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return convert


def _list_of(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    def convert(text: str) -> list[float]:
        return [_positive(kind)(part) for part in text.split(",")]

    return convert
