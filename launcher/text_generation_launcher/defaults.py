"""Turns what the user gave and the model's config.json into the configs of the router and the shards.

Checks here are those that need no shard; limits that depend on memory are derived by the router after warm-up.
"""

import ipaddress
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from text_generation_router.config import RouterConfig
from text_generation_shard.config import ShardConfig, graph_sizes

from text_generation_launcher.cli import Settings
from text_generation_launcher.errors import SettingsError
from text_generation_launcher.refusals import refusals_of

# A step of 256 tokens keeps running streams alive on a CPU, where 4096 would take tens of seconds.
CPU_MAX_BATCH_PREFILL_TOKENS = 256
# Without effect when given: the variable selects TGI's attention backend, and there is one here.
_IDLE_VARIABLES = ("ATTENTION",)
_IDLE_FLAGS = ("waiting_served_ratio", "max_waiting_tokens")

log = logging.getLogger("text_generation_launcher")


def check(settings: Settings, environment: Mapping[str, str]) -> RouterConfig:
    """Refuse what contradicts itself or is not available; return the router's config as far as it is known."""
    refused = refusals_of(settings.launcher)
    if refused:
        raise SettingsError(" ".join(refused))
    given = settings.values_for(RouterConfig)
    older = settings.launcher.max_input_length
    if older is not None:
        if given.get("max_input_tokens") is not None:
            raise SettingsError("--max-input-length is the older name of --max-input-tokens; give one of them.")
        given["max_input_tokens"] = older
    if "hostname" in given:
        given["hostname"] = _address(given["hostname"], "hostname" in settings.from_environment)
    if given.get("api_key") == "":
        raise SettingsError("--api-key is empty.")
    keys_file = given.get("api_keys_file")
    if keys_file is not None and not os.access(keys_file, os.R_OK):
        raise SettingsError(f"--api-keys-file {keys_file} cannot be read.")
    config = RouterConfig(**given)
    _check_limits(config)
    _check_collector(config.otlp_endpoint)
    _check_shard(ShardConfig(**settings.values_for(ShardConfig)))
    _report_idle(settings, environment)
    return config


def check_model(config: RouterConfig, model: Mapping[str, Any], num_shards: int) -> None:
    """Refuse limits and a number of shards that the model cannot have."""
    longest = model.get("max_position_embeddings")
    limit = config.max_total_tokens or longest
    if config.max_input_tokens and limit and config.max_input_tokens >= limit:
        raise SettingsError(
            f"--max-input-tokens {config.max_input_tokens} leaves no token to generate: the model's longest "
            f"sequence is {limit} tokens."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = model.get(name)
        if isinstance(heads, int) and heads % num_shards:
            fitting = [str(count) for count in range(1, heads + 1) if _divides(count, model)]
            raise SettingsError(
                f"The model has {heads} {name.removeprefix('num_').replace('_', ' ')}, which {num_shards} shards "
                f"cannot share evenly; --num-shard may be {', '.join(fitting)}."
            )


def fit_step_to_device(config: RouterConfig, model: Mapping[str, Any], is_cpu: bool) -> RouterConfig:
    """The router's config with a step size that suits a CPU, unless one was given; a GPU's is the router's choice."""
    if config.max_batch_prefill_tokens is not None or not is_cpu:
        return config
    bounds = (CPU_MAX_BATCH_PREFILL_TOKENS, config.max_batch_total_tokens, model.get("max_position_embeddings"))
    tokens = min(bound for bound in bounds if isinstance(bound, int) and bound > 0)
    return replace(config, max_batch_prefill_tokens=tokens)


def threads_per_shard(cores: int, num_shards: int, environment: Mapping[str, str]) -> int:
    """CPU threads of one rank: what OMP_NUM_THREADS says, else its share of the cores."""
    given = environment.get("OMP_NUM_THREADS", "")
    # OpenMP takes a list too, one number for each level of nesting; there is one level here.
    outermost = given.split(",")[0].strip()
    if not given:
        return max(1, cores // num_shards)
    if not outermost.isdecimal() or int(outermost) < 1:
        raise SettingsError(f"OMP_NUM_THREADS is {given!r}, not a number of threads.")
    return int(outermost)


def _check_limits(config: RouterConfig) -> None:
    """The order of limits: input < total <= batch total, and prefill <= batch total."""
    pairs = (
        ("max_input_tokens", "max_total_tokens", "must be smaller than"),
        ("max_total_tokens", "max_batch_total_tokens", "must be at most"),
        ("max_input_tokens", "max_batch_total_tokens", "must be smaller than"),
        ("max_batch_prefill_tokens", "max_batch_total_tokens", "must be at most"),
    )
    for small, large, rule in pairs:
        low, high = getattr(config, small), getattr(config, large)
        if low is None or high is None:
            continue
        if low > high or (low == high and "smaller" in rule):
            raise SettingsError(f"{_option(small)} {low} {rule} {_option(large)} {high}.")


def _check_collector(endpoint: str | None) -> None:
    if endpoint is None:
        return
    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise SettingsError(
            f"--otlp-endpoint {endpoint} is not the address of a collector that takes OTLP over gRPC: give "
            "http://HOST:PORT or https://HOST:PORT, without a path."
        )


def _check_shard(config: ShardConfig) -> None:
    if not 0 < config.cuda_memory_fraction <= 1:
        raise SettingsError(f"--cuda-memory-fraction {config.cuda_memory_fraction} must be above 0 and at most 1.")
    if config.watermark_gamma is not None and not 0 < config.watermark_gamma < 1:
        raise SettingsError(f"--watermark-gamma {config.watermark_gamma} must be above 0 and below 1.")
    try:
        graph_sizes(config.cuda_graphs)
    except ValueError as error:
        raise SettingsError(f"{error}.") from error


def _divides(count: int, model: Mapping[str, Any]) -> bool:
    heads = [model.get("num_attention_heads"), model.get("num_key_value_heads")]
    return all(number % count == 0 for number in heads if isinstance(number, int))


def _address(hostname: str, is_variable: bool) -> str:
    """The IP address to listen on; container runtimes set HOSTNAME to a name, which is then not meant for us."""
    try:
        return str(ipaddress.ip_address(hostname.strip("[]")))
    except ValueError:
        pass
    if is_variable:
        log.warning("HOSTNAME=%s is not an IP address: listening on 0.0.0.0", hostname)
        return "0.0.0.0"
    if hostname == "localhost":
        return "127.0.0.1"
    raise SettingsError(f"--hostname {hostname} is not an IP address.")


def _report_idle(settings: Settings, environment: Mapping[str, str]) -> None:
    for name in _IDLE_FLAGS:
        if name in settings.given:
            log.info("%s has no effect: waiting requests join the running batch at every step", _option(name))
    for variable in _IDLE_VARIABLES:
        if environment.get(variable):
            log.warning("%s has no effect: there is one attention backend", variable)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
