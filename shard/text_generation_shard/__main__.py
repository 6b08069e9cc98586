"""`text-generation-server`: serves one rank, or downloads a model's weights. Loads torch only to serve."""

import argparse
import dataclasses
import faulthandler
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from text_generation_shard.config import ShardConfig
from text_generation_shard.hub_download import HubSettings
from text_generation_shard.kernel_compilation import start_compilation
from text_generation_shard.logs import Timeline, set_up_logging
from text_generation_shard.model_files import resolve_model
from text_generation_shard.parent_death import end_with_parent
from text_generation_shard.parent_watch import LAUNCHER_PID_VARIABLE, watch_parent

logger = logging.getLogger(__name__)

# Options of TGI's command that ask for what this shard does not do.
REFUSED_OPTIONS = {
    "quantize": "quantised checkpoints are not supported, GGUF files are (dequantised)",
    "speculate": "speculation is not supported",
    "kv_cache_dtype": "KV memory has the model's own type",
    "otlp_endpoint": "the router alone sends traces",
    "otlp_service_name": "the router alone sends traces",
    "max_input_tokens": "the router checks the limits of requests",
}


class RefusedOption(ValueError):
    """An option that asks for something this shard does not do."""


def build_parser() -> argparse.ArgumentParser:
    """The command line, with TGI's sub-commands and options."""
    parser = argparse.ArgumentParser(prog="text-generation-server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="Serve one rank of a model on a Unix socket.")
    serve.add_argument("model_id", nargs="?", help="Local folder, .gguf file or model on the Hub. Default: the demo.")
    serve.add_argument("--config-json", help="The whole configuration, as the launcher hands it down.")
    serve.add_argument("--revision", help="Branch, tag or commit of a model on the Hub.")
    serve.add_argument("--sharded", action="store_true", help="Be one rank of several: RANK, WORLD_SIZE, MASTER_*.")
    serve.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="Type of weights and activations.")
    serve.add_argument("--uds-path", default="/tmp/text-generation-server", help="Socket: <path>-<rank>.")
    serve.add_argument("--logger-level", default="info", help="debug, info, warn or error.")
    serve.add_argument("--json-output", action="store_true", help="Log JSON lines.")
    serve.add_argument("--trust-remote-code", action="store_true", help="Refused: no code of a checkpoint is run.")
    for name in REFUSED_OPTIONS:
        serve.add_argument("--" + name.replace("_", "-"), help="Not supported.")

    download = commands.add_parser("download-weights", help="Download a model of the Hub into the cache.")
    download.add_argument("model_id")
    download.add_argument("--revision")
    download.add_argument("--extension", default=".safetensors", choices=(".safetensors",))
    download.add_argument(
        "--auto-convert", action="store_true", help="Without effect: other weights than safetensors are refused."
    )

    quantize = commands.add_parser("quantize", help="Not supported.")
    quantize.add_argument("arguments", nargs="*")
    return parser


def config_from_options(options: argparse.Namespace) -> ShardConfig:
    """What `serve` was asked for; raises RefusedOption, or ValueError when the model cannot be resolved."""
    if options.config_json is not None:
        return config_from_json(options.config_json)
    for name, reason in REFUSED_OPTIONS.items():
        if getattr(options, name) is not None:
            raise RefusedOption(f"--{name.replace('_', '-')}: {reason}")
    if options.trust_remote_code:
        raise RefusedOption("--trust-remote-code: code that comes with a checkpoint is never run")
    group = _group_of_environment() if options.sharded else {}
    run_folder = Path(tempfile.mkdtemp(prefix="text-generation-"))
    try:
        model = resolve_model(options.model_id, options.revision, run_folder, HubSettings.from_environment())
    except BaseException:
        shutil.rmtree(run_folder, ignore_errors=True)
        raise
    config = ShardConfig(
        dtype=options.dtype,
        model_folder=model.model_folder,
        weight_files=tuple(model.weight_files),
        uds_path=options.uds_path,
        run_folder=str(run_folder),
        json_output=options.json_output,
        log_level=options.logger_level,
    )
    return dataclasses.replace(config, **group)


def config_from_json(text: str) -> ShardConfig:
    """The configuration that another process handed down; raises ValueError when it is none."""
    values: dict[str, Any] = json.loads(text)
    values["weight_files"] = tuple(values.get("weight_files", ()))
    if unknown := values.keys() - {field.name for field in dataclasses.fields(ShardConfig)}:
        raise ValueError(f"--config-json has unknown fields: {', '.join(sorted(unknown))}")
    return ShardConfig(**values)


def _group_of_environment() -> dict[str, Any]:
    """Place in the group, as `torchrun` and TGI hand it down; raises RefusedOption when a variable is missing."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise RefusedOption(f"--sharded needs the variables {', '.join(names)}; missing: {', '.join(missing)}")
    return {
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
        "master_addr": os.environ["MASTER_ADDR"],
        "master_port": int(os.environ["MASTER_PORT"]),
    }


def process_started_ns() -> int:
    """When this process was started, on the monotonic clock: what came before the first line of Python counts too."""
    # Field 22 of stat; the name before it may hold spaces, but no further parenthesis follows it.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - int(age_s * 1e9)


def set_up_process(run_folder: str) -> None:
    """See to it that this process ends with its launcher, ends well on SIGTERM, and can be asked where it is stuck."""
    os.umask(0o077)
    # Python-level handlers wait for C code to return; this one shows where a stuck rank is stuck.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    watch_parent(run_folder)
    launcher_pid = os.environ.get(LAUNCHER_PID_VARIABLE)
    if not launcher_pid:
        return
    # A rank that hangs in C code cannot see its input's end, so the kernel is asked as well.
    end_with_parent()
    if os.getppid() != int(launcher_pid):
        sys.exit("ERROR text_generation_shard: the launcher has gone")


def run_serve(options: argparse.Namespace, timeline: Timeline) -> int:
    """Serve until told to stop; 1 for whatever else ends it."""
    try:
        config = config_from_options(options)
    except (ValueError, OSError) as error:
        print(f"ERROR text_generation_shard: {error}", file=sys.stderr)
        return 1
    set_up_logging(config.log_level, config.json_output)
    set_up_process(config.run_folder)
    # The other ranks launch what the first one does.
    compilation = start_compilation(config) if config.device == "cuda" and config.rank == 0 else None
    timeline.phase_ends("config")
    try:
        from text_generation_shard.serve import serve

        timeline.phase_ends("import")
        serve(config, timeline, compilation)
    except Exception as error:
        logger.exception("The shard ends: %s", error)
        return 1
    finally:
        if compilation is not None:
            compilation.stop()
        if options.config_json is None:
            shutil.rmtree(config.run_folder, ignore_errors=True)
    return 0


def run_download(options: argparse.Namespace) -> int:
    """Download a model's weights; 1 with the reason when that fails."""
    set_up_logging("info", json_output=False)
    try:
        model = resolve_model(options.model_id, options.revision, None, HubSettings.from_environment())
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    logger.info("%d weight files are in place", len(model.weight_files))
    return 0


def main() -> None:
    """Entry point of the command."""
    timeline = Timeline(process_started_ns())
    options = build_parser().parse_args()
    if options.command == "serve":
        code = run_serve(options, timeline)
        # Threads of gRPC and NCCL may wait for ever; all that needs closing is closed.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    if options.command == "download-weights":
        sys.exit(run_download(options))
    sys.exit("ERROR text-generation-server: quantize is not supported; GGUF files can be served as they are")


if __name__ == "__main__":
    main()
