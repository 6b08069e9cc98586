"""A launcher process over stand-in children: how it starts, ends, and what it leaves behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from text_generation_launcher.errors import ChildDied
from text_generation_launcher.logs import LogWriter
from text_generation_launcher.processes import Supervisor
from text_generation_launcher.shard_group import RestartBudget
from text_generation_launcher.watch import Watch

ROOT = Path(__file__).parents[2]
FAKE_SERVER = Path(__file__).with_name("fake_server.py")
DEADLINE_S = 30.0
SHARDS = ("shard-0", "shard-1", "shard-2")


def eventually(condition: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"never: {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Server:
    """One launcher process, its log and the events its children told."""

    def __init__(self, folder: Path, *flags: str, **variables: str) -> None:
        self._events = folder / "events"
        self._events.touch()
        self._log = folder / "log"
        environment = {
            **os.environ,
            "PYTHONPATH": ":".join(str(ROOT / part) for part in ("launcher", "router", "shard")),
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder),
            "FAKE_EVENTS": str(self._events),
            **variables,
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(FAKE_SERVER), "launcher", "--num-shard", "1", *flags],
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def events(self) -> list[str]:
        return [line.rsplit(" ", 1)[0] for line in self._events.read_text().splitlines()]

    def pids(self) -> dict[str, int]:
        lines = [line.split() for line in self._events.read_text().splitlines()]
        return {name: int(pid) for name, event, pid in lines if event == "start"}

    def run_folder(self) -> Path:
        return Path(next(line.removesuffix(" folder") for line in self.events if line.endswith(" folder")))

    def wait_ready(self) -> None:
        eventually(lambda: "Ready on" in self.log or self.process.poll() is not None, "ready")
        assert self.process.poll() is None, self.log

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def assert_nothing_left(self) -> None:
        for name, pid in self.pids().items():
            eventually(lambda pid=pid: not is_running(pid), f"{name} gone")
        eventually(lambda: not self.run_folder().exists(), "run folder gone")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start_server(*flags: str, **variables: str) -> Server:
        servers.append(Server(tmp_path, *flags, **variables))
        return servers[-1]

    yield start_server
    for server in servers:
        for pid in server.pids().values():
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_router_before_the_shards(start: Callable[..., Server], number: signal.Signals) -> None:
    server = start("--num-shard", "3", FAKE_DRAIN_S="0.3")
    server.wait_ready()
    server.process.send_signal(number)
    assert server.wait() == 0
    endings = [event for event in server.events if event.endswith((" sigterm", " exit"))]
    assert endings[:2] == ["router sigterm", "router exit"]
    assert sorted(endings[2:]) == sorted(f"shard-{rank} {event}" for rank in range(3) for event in ("sigterm", "exit"))
    server.assert_nothing_left()


def test_a_second_signal_ends_at_once(start: Callable[..., Server]) -> None:
    server = start(FAKE_DRAIN_S="3600")
    server.wait_ready()
    server.process.terminate()
    eventually(lambda: "router sigterm" in server.events, "the router is told")
    server.process.terminate()
    assert server.wait() == 0
    assert "router exit" not in server.events
    server.assert_nothing_left()


def test_a_router_that_ignores_sigterm_is_killed_after_the_timeout(start: Callable[..., Server]) -> None:
    server = start("--graceful-termination-timeout", "0", FAKE_ROUTER="stuck")
    server.wait_ready()
    server.process.terminate()
    assert server.wait() == 0
    assert server.events[-2:] == ["shard-0 sigterm", "shard-0 exit"]
    server.assert_nothing_left()


def test_a_signal_during_start_up_stops_what_runs(start: Callable[..., Server]) -> None:
    server = start(FAKE_SHARD="never-ready")
    eventually(lambda: "shard-0 start" in server.events, "the shard starts")
    server.process.terminate()
    assert server.wait() == 0
    server.assert_nothing_left()


@pytest.mark.parametrize("victim", ["shard-0", "shard-1", "router"])
def test_the_death_of_one_child_ends_all_with_code_1(start: Callable[..., Server], victim: str) -> None:
    server = start("--num-shard", "3", "--max-shard-restarts", "0")
    server.wait_ready()
    os.kill(server.pids()[victim], signal.SIGKILL)
    assert server.wait() == 1
    last = server.log.splitlines()[-1]
    assert "ERROR" in last
    assert f"{victim} was ended by signal SIGKILL" in last
    server.assert_nothing_left()


def test_an_unasked_exit_with_code_0_is_a_death_too(start: Callable[..., Server]) -> None:
    server = start("--max-shard-restarts", "0")
    server.wait_ready()
    os.kill(server.pids()["shard-0"], signal.SIGTERM)
    assert server.wait() == 1
    assert "shard-0 ended with exit code 0" in server.log.splitlines()[-1]
    server.assert_nothing_left()


def test_a_dead_shard_is_replaced_with_its_group(start: Callable[..., Server]) -> None:
    server = start("--num-shard", "3", "--max-shard-restarts", "2")
    server.wait_ready()
    for generation in (2, 3):
        before = server.pids()
        os.kill(before["shard-1"], signal.SIGKILL)
        eventually(lambda g=generation: f"router told:{g}" in server.events, "the router hears of the next group")
        after = server.pids()
        assert all(after[name] != before[name] and not is_running(before[name]) for name in SHARDS)
        assert all(is_running(pid) for pid in after.values())
        assert after["router"] == before["router"]
    assert "shard-1 was ended by signal SIGKILL" in server.log
    os.kill(server.pids()["shard-2"], signal.SIGKILL)
    assert server.wait() == 1
    assert "router line-closed" in server.events
    last = server.log.splitlines()[-1]
    assert "shard-2 was ended by signal SIGKILL" in last
    assert "restarted 2 times within 10 minutes" in last
    server.assert_nothing_left()


@pytest.mark.parametrize("is_stuck", [True, False])
def test_shards_that_the_router_gives_up_are_replaced(start: Callable[..., Server], is_stuck: bool) -> None:
    server = start("--num-shard", "3")
    server.wait_ready()
    before = server.pids()
    os.kill(before["shard-2"], signal.SIGSTOP)
    os.kill(before["router"], signal.SIGUSR1 if is_stuck else signal.SIGUSR2)  # it says that the shards are lost
    eventually(lambda: "router told:2" in server.events, "the router hears of the next group")
    assert all(not is_running(before[name]) for name in SHARDS)
    assert ("stack of shard-0" in server.log) == is_stuck
    assert ("shard-2:\nno answer: the process is T" in server.log) == is_stuck
    assert "a reason" in server.log
    server.process.terminate()
    assert server.wait() == 0
    server.assert_nothing_left()


def test_shards_are_replaced_while_the_router_drains(start: Callable[..., Server]) -> None:
    server = start("--num-shard", "3", FAKE_DRAIN_S="until told")
    server.wait_ready()
    server.process.terminate()
    eventually(lambda: "router sigterm" in server.events, "the router is told")
    os.kill(server.pids()["shard-0"], signal.SIGKILL)
    assert server.wait() == 0
    assert "router told:2" in server.events
    server.assert_nothing_left()


def test_a_router_that_drains_is_not_told_again_when_the_last_shards_die(start: Callable[..., Server]) -> None:
    server = start("--max-shard-restarts", "0", FAKE_DRAIN_S="until told")
    server.wait_ready()
    server.process.terminate()
    eventually(lambda: "router sigterm" in server.events, "the router is told")
    os.kill(server.pids()["shard-0"], signal.SIGKILL)
    assert server.wait() == 1
    assert "shard-0 was ended by signal SIGKILL" in server.log.splitlines()[-1]
    assert "router line-closed" in server.events
    assert server.events.count("router sigterm") == 1
    server.assert_nothing_left()


def test_shards_that_do_not_come_back_end_it(start: Callable[..., Server]) -> None:
    server = start("--max-shard-restarts", "2", FAKE_SHARD="start-once")
    server.wait_ready()
    os.kill(server.pids()["shard-0"], signal.SIGKILL)
    assert server.wait() == 1
    assert "shard-0 ended with exit code 7. The shards were restarted 2 times" in server.log.splitlines()[-1]
    assert "cannot load the weights" in server.log
    server.assert_nothing_left()


def test_shards_that_cannot_be_started_again_end_it_in_order(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start("--num-shard", "3", "--master-port", str(port))
    server.wait_ready()
    with socket.create_server(("127.0.0.1", port)):  # the shards have met, and left it
        os.kill(server.pids()["shard-1"], signal.SIGKILL)
        assert server.wait() == 1
    last = server.log.splitlines()[-1]
    assert "shard-1 was ended by signal SIGKILL" in last
    assert "The shards cannot be started again: The shards cannot meet" in last
    assert "router line-closed" in server.events
    assert "router exit" in server.events
    server.assert_nothing_left()


class EndedShard:
    """A shard that has ended, which is known from the so manyth look on."""

    last_lines = ("its last",)

    def __init__(self, name: str, ending: str, num_looks: int = 0) -> None:
        self.name, self.was_killed = name, "signal" in ending
        self._ending, self._num_looks = ending, num_looks

    @property
    def is_alive(self) -> bool:
        self._num_looks -= 1
        return self._num_looks >= 0

    def read_to_end(self) -> None:
        pass

    def ending(self) -> str:
        return self._ending


def death_of(shards: list[EndedShard]) -> ChildDied:
    """What a launcher says that hears of the first one's end, on a machine that starts no more processes."""

    def start() -> None:
        raise OSError(11, "Resource temporarily unavailable")

    supervisor = SimpleNamespace(next_event=lambda timeout_s: shards[0])
    group = SimpleNamespace(children=shards, start=start, end=lambda: None)
    config = SimpleNamespace(graceful_termination_timeout=1, max_shard_restarts=3)
    with pytest.raises(ChildDied) as death:
        Watch(supervisor, group, SimpleNamespace(is_alive=True), None, config).run()  # type: ignore[arg-type]
    return death.value


def test_a_machine_that_starts_no_more_processes_ends_it_in_order() -> None:
    death = death_of([EndedShard("shard-0", "ended")])
    assert re.match(r"^shard-0 ended\. The shards cannot be started again: .*unavailable\.$", str(death))
    assert death.last_lines == ["its last"]


def test_of_shards_that_end_together_the_killed_one_is_named() -> None:
    shards = [EndedShard("shard-0", "ended with exit code 1"), EndedShard("shard-1", "was ended by signal SIGKILL", 2)]
    assert str(death_of(shards)).startswith("shard-1 was ended by signal SIGKILL.")


def test_restarts_count_within_ten_minutes() -> None:
    budget = RestartBudget(2)
    assert [budget.take(now_s) for now_s in (0.0, 10.0, 599.0, 600.0, 601.0, 610.0)] == [
        True, True, False, True, False, True,
    ]  # fmt: skip
    assert not RestartBudget(0).take(0.0)


def test_a_shard_that_fails_at_start_shows_its_last_lines(start: Callable[..., Server]) -> None:
    server = start(FAKE_SHARD="die-at-start", LOG_LEVEL="error")
    assert server.wait() == 1
    assert "native line 9\n" not in server.log
    assert "native line 11\n" in server.log
    assert "cannot load the weights" in server.log
    assert "shard-0 ended with exit code 7" in server.log.splitlines()[-1]
    server.assert_nothing_left()


@pytest.mark.parametrize("behaviour", ["", "stuck", "never-ready"])
def test_a_killed_launcher_leaves_nothing(start: Callable[..., Server], tmp_path: Path, behaviour: str) -> None:
    uds_path = tmp_path / "sockets"
    server = start("--shard-uds-path", str(uds_path), FAKE_SHARD=behaviour, FAKE_DRAIN_S="3600")
    if behaviour == "never-ready":
        eventually(lambda: "shard-0 start" in server.events, "the shard starts")
    else:
        server.wait_ready()
        assert Path(f"{uds_path}-0").is_socket()
    assert ("descendant" in server.pids()) == (behaviour == "stuck")
    server.process.kill()
    server.wait()
    server.assert_nothing_left()
    eventually(lambda: not Path(f"{uds_path}-0").exists(), "socket gone")


@pytest.mark.parametrize(
    ("failure", "message"), [("error", "No such model: nowhere/nothing."), ("crash", "no library")]
)
def test_a_model_that_cannot_be_resolved_ends_the_start(
    start: Callable[..., Server], failure: str, message: str
) -> None:
    server = start(FAKE_MODEL=failure)
    assert server.wait() == 1
    assert message in server.log.splitlines()[-1]
    assert not server.pids()
    assert not server.run_folder().exists()


def test_heads_that_do_not_divide_are_refused_before_any_shard_starts(start: Callable[..., Server]) -> None:
    server = start("--num-shard", "2")
    assert server.wait() == 1
    assert "9 attention heads" in server.log
    assert "--num-shard may be 1, 3" in server.log
    assert not server.pids()


def test_a_refused_flag_ends_the_start_with_code_1(start: Callable[..., Server]) -> None:
    server = start("--quantize", "awq")
    assert server.wait() == 1
    assert "--quantize awq is not available" in server.log.splitlines()[-1]
    assert server.events == []


def test_children_get_what_was_asked_and_derived(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("--max-best-of", "7", "--max-input-length", "20")
    server.wait_ready()
    config = json.loads((tmp_path / "router-config.json").read_text())
    assert (config["max_best_of"], config["max_input_tokens"], config["max_total_tokens"]) == (7, 20, None)
    assert config["max_batch_prefill_tokens"] == 64  # the model's longest sequence, less than a CPU's 256
    assert (config["model_id"], config["model_sha"], config["world_size"]) == ("fake/model", "abc", 1)
    assert oct(server.run_folder().stat().st_mode & 0o777) == "0o700"


def test_the_first_shard_inherits_the_socket_at_which_all_meet(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("--num-shard", "3")
    server.wait_ready()
    configs = [json.loads((tmp_path / f"shard-{rank}-config.json").read_text()) for rank in range(3)]
    ports = {config["master_port"] for config in configs}
    assert [event for event in server.events if "listens" in event] == [f"shard-0 listens:{port}" for port in ports]
    assert f"meet at localhost:{ports.pop()}" in server.log
    assert [config["rank"] for config in configs] == [0, 1, 2]
    assert {config["device"] for config in configs} == {"cpu"}


def test_a_taken_port_to_meet_at_ends_the_start(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start("--num-shard", "3", "--master-port", str(port))
        assert server.wait() == 1
    assert f"--master-port {port}" in server.log.splitlines()[-1]
    assert not server.pids()


def test_only_the_router_gets_the_api_key_and_nobody_can_read_it(start: Callable[..., Server]) -> None:
    server = start("--api-key", "secret", API_KEY="another", HF_TOKEN="token")
    server.wait_ready()
    eventually(lambda: "router key:secret" in server.events, "the router has the key")
    assert "shard-0 key:None" in server.events
    for pid in server.pids().values():
        assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"HF_TOKEN" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert "secret" not in server.log


def test_plain_log_carries_prefix_and_level(start: Callable[..., Server]) -> None:
    server = start()
    server.wait_ready()
    assert "2030-01-02T03:04:05Z  INFO router: fake.child: Connected\n" in server.log
    assert "a detail" not in server.log


def test_json_log_is_one_object_a_line(start: Callable[..., Server]) -> None:
    server = start("--json-output", LOG_LEVEL="debug", FAKE_SHARD="die-at-start")
    assert server.wait() == 1
    records = [json.loads(line) for line in server.log.splitlines()]
    for record in records:
        assert {"timestamp", "level", "message", "fields", "target"} <= record.keys()
        assert record["fields"]["message"] == record["message"]
    assert [r["level"] for r in records if r["target"] == "shard-0: fake.child"] == ["ERROR"]
    assert [r["message"] for r in records if r["target"] == "shard-0"] == [f"native line {n}" for n in range(30)]
    assert records[-1]["level"] == "ERROR"


def test_the_timeline_adds_up(start: Callable[..., Server]) -> None:
    server = start()
    server.wait_ready()
    line = next(line for line in server.log.splitlines() if "Start-up took" in line)
    total, _, phases = line.partition("Start-up took ")[2].partition(" s: ")
    parts = [part.removesuffix(" s").rsplit(" ", 1) for part in phases.split(", ")]
    assert [name for name, _ in parts] == ["settings", "resolve model", "start shards", "start router"]
    assert abs(sum(float(seconds) for _, seconds in parts) - float(total)) <= 0.03  # rounding of five numbers


def test_waiting_is_reported_until_ready(tmp_path: Path) -> None:
    reports: list[int] = []
    with Supervisor(LogWriter("error"), [tmp_path / "none"]) as supervisor:
        supervisor.wait_until(lambda: len(reports) >= 2, lambda: reports.append(1), on_wait_every_s=0.01)
        supervisor.wait_until(lambda: True, lambda: reports.append(1), on_wait_every_s=0.0)
    assert len(reports) == 2


def test_output_without_a_line_end_and_bytes_that_are_no_text_are_kept(tmp_path: Path) -> None:
    program = "import os; os.write(2, b'\\xff broken'); os.close(2); os.write(1, b'answer'); os._exit(5)"
    with Supervisor(LogWriter("error"), [tmp_path / "none"]) as supervisor:
        child = supervisor.spawn("helper", [sys.executable, "-c", program], os.environ, answers=True)
        assert supervisor.wait_for_answer(child) == b"answer"
    assert list(child.last_lines) == ["\ufffd broken"]
    assert child.ending() == "ended with exit code 5"
