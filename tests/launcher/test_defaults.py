"""Checks and derived values that need no shard."""

import logging

import pytest
from text_generation_launcher import defaults
from text_generation_launcher.cli import parse
from text_generation_launcher.errors import SettingsError
from text_generation_router.config import RouterConfig

MODEL = {"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048}


def check(*arguments: str, **environment: str) -> RouterConfig:
    return defaults.check(parse(arguments, environment), environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-input-tokens 10 --max-total-tokens 10", "--max-input-tokens 10 must be smaller than"),
        ("--max-input-tokens 11 --max-total-tokens 10", "--max-input-tokens 11 must be smaller than"),
        ("--max-input-length 10 --max-total-tokens 10", "--max-input-tokens 10 must be smaller than"),
        ("--max-total-tokens 11 --max-batch-total-tokens 10", "--max-total-tokens 11 must be at most"),
        ("--max-batch-prefill-tokens 11 --max-batch-total-tokens 10", "--max-batch-prefill-tokens 11 must be at most"),
        ("--max-input-tokens 5 --max-input-length 5", "give one of them"),
        ("--hostname example.org", "is not an IP address"),
        ("--otlp-endpoint http://collector:4318/v1/traces", "without a path"),
        ("--otlp-endpoint unix:///run/collector", "http://HOST:PORT"),
        ("--otlp-endpoint http://", "http://HOST:PORT"),
        ("--watermark-gamma 1", "--watermark-gamma 1.0 must be above 0 and below 1"),
        ("--quantize awq --ngrok", "--quantize awq is not available"),
        ("--quantize awq --ngrok", "--ngrok is not available"),
    ],
)
def test_contradictions_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check(*arguments.split())


def test_a_collector_is_named_by_host_and_port_with_or_without_a_scheme() -> None:
    for endpoint in ("collector:4317", "http://collector:4317", "https://collector:4317/"):
        assert check(OTLP_ENDPOINT=endpoint).otlp_endpoint == endpoint
    assert check(OTLP_SERVICE_NAME="llm").otlp_service_name == "llm"


def test_an_empty_api_key_is_refused_as_flag_and_unset_as_variable() -> None:
    with pytest.raises(SettingsError, match="--api-key is empty"):
        check("--api-key", "")
    with pytest.raises(SettingsError, match="--api-keys-file /no/such/file cannot be read"):
        check("--api-keys-file", "/no/such/file")
    assert check(API_KEY="").api_key is None


@pytest.mark.parametrize(
    "arguments",
    [
        "--max-input-tokens 9 --max-total-tokens 10 --max-batch-total-tokens 10 --max-batch-prefill-tokens 10",
        "--max-batch-prefill-tokens 5 --max-input-tokens 9",  # a long prompt is computed in chunks
    ],
)
def test_limits_that_fit_are_accepted(arguments: str) -> None:
    assert check(*arguments.split()).max_input_tokens == 9


def test_variables_count_as_flags() -> None:
    with pytest.raises(SettingsError, match="must be smaller than"):
        check("--max-total-tokens", "10", MAX_INPUT_TOKENS="10")


@pytest.mark.parametrize("name", ["a1b2c3", "localhost", "my.host", "300.1.1.1"])
def test_a_host_name_in_the_environment_falls_back_with_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert check(HOSTNAME=name).hostname == "0.0.0.0"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    ("hostname", "address"), [("127.0.0.1", "127.0.0.1"), ("::", "::"), ("[::1]", "::1"), ("localhost", "127.0.0.1")]
)
def test_addresses(hostname: str, address: str, caplog: pytest.LogCaptureFixture) -> None:
    assert check("--hostname", hostname, HOSTNAME="ignored").hostname == address
    assert not caplog.records


def test_flags_without_effect_are_named_when_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    check()
    assert not caplog.records
    check("--max-waiting-tokens", "20", WAITING_SERVED_RATIO="1.2", ATTENTION="flashinfer")
    messages = " ".join(record.getMessage() for record in caplog.records)
    for name in ("--max-waiting-tokens", "--waiting-served-ratio", "ATTENTION"):
        assert f"{name} has no effect" in messages


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_that_share_all_heads_are_accepted(num_shards: int) -> None:
    defaults.check_model(RouterConfig(), MODEL, num_shards)


@pytest.mark.parametrize(("num_shards", "kind"), [(5, "attention heads"), (3, "key value heads"), (6, "key value")])
def test_heads_that_do_not_divide_are_refused_with_what_fits(num_shards: int, kind: str) -> None:
    with pytest.raises(SettingsError, match=rf"{kind}.*--num-shard may be 1, 2, 4\."):
        defaults.check_model(RouterConfig(), MODEL, num_shards)


def test_a_prompt_as_long_as_the_model_allows_is_refused() -> None:
    defaults.check_model(RouterConfig(max_input_tokens=2047), MODEL, 1)
    with pytest.raises(SettingsError, match="leaves no token"):
        defaults.check_model(RouterConfig(max_input_tokens=2048), MODEL, 1)


@pytest.mark.parametrize(
    ("given", "is_cpu", "tokens"),
    [
        ({}, True, 256),
        ({}, False, None),
        ({"max_batch_prefill_tokens": 1000}, True, 1000),
        ({"max_batch_total_tokens": 100}, True, 100),
    ],
)
def test_step_size(given: dict[str, int], is_cpu: bool, tokens: int | None) -> None:
    config = defaults.fit_step_to_device(RouterConfig(**given), MODEL, is_cpu)
    assert config.max_batch_prefill_tokens == tokens


@pytest.mark.parametrize(("cores", "num_shards", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_threads(cores: int, num_shards: int, threads: int) -> None:
    assert defaults.threads_per_shard(cores, num_shards, {}) == threads
    assert defaults.threads_per_shard(cores, num_shards, {"OMP_NUM_THREADS": ""}) == threads
    assert defaults.threads_per_shard(cores, num_shards, {"OMP_NUM_THREADS": "3"}) == 3
    assert defaults.threads_per_shard(cores, num_shards, {"OMP_NUM_THREADS": "5,1"}) == 5


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ",2"])
def test_threads_that_are_no_number(value: str) -> None:
    with pytest.raises(SettingsError, match="OMP_NUM_THREADS"):
        defaults.threads_per_shard(8, 1, {"OMP_NUM_THREADS": value})
