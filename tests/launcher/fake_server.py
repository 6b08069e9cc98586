"""A launcher over stand-in children, run by path: `fake_server.py launcher [FLAGS]`.

The children answer as real ones do, and tell what happens to them in the file FAKE_EVENTS, one `name event pid`
a line. FAKE_SHARD and FAKE_ROUTER name how they misbehave.
"""

import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path


def tell(name: str, event: str) -> None:
    with open(os.environ["FAKE_EVENTS"], "a") as events:
        events.write(f"{name} {event} {os.getpid()}\n")


def say(level: str, message: str) -> None:
    record = {"timestamp": "2030-01-02T03:04:05Z", "level": level, "message": message, "target": "fake.child"}
    print(json.dumps({**record, "fields": {"message": message}}), file=sys.stderr, flush=True)


def config_argument() -> dict:
    return json.loads(sys.argv[sys.argv.index("--config-json") + 1])


def on_terminate(name: str, drain_s: float, ignore: bool) -> None:
    def handler(number: int, frame: object) -> None:
        tell(name, "sigterm")
        if not ignore:
            time.sleep(drain_s)
            tell(name, "exit")
            os._exit(0)

    signal.signal(signal.SIGTERM, handler)


def wait_forever() -> None:
    while True:
        signal.pause()


def model_files() -> None:
    run_folder = Path(sys.argv[sys.argv.index("--run-folder") + 1])
    tell(str(run_folder), "folder")
    if os.environ.get("FAKE_MODEL") == "error":
        print(json.dumps({"error": "No such model: nowhere/nothing."}))
        sys.exit(1)
    if os.environ.get("FAKE_MODEL") == "crash":
        print("Traceback: no library", file=sys.stderr)
        sys.exit(3)
    model = {"model_id": "fake/model", "revision": None, "sha": "abc", "model_folder": str(run_folder)}
    config = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 64}
    print(json.dumps({**model, "weight_files": ["w.safetensors"], "config": config}))


def shard() -> None:
    config = config_argument()
    name = f"shard-{config['rank']}"
    behaviour = os.environ.get("FAKE_SHARD", "")
    stuck = behaviour == "stuck"
    on_terminate(name, 0.0, ignore=stuck)
    signal.signal(signal.SIGUSR1, lambda *_: print(f"stack of {name}", flush=True))
    if not stuck:
        from text_generation_shard.parent_watch import watch_parent

        watch_parent(config["run_folder"])
    tell(name, "start")
    tell(name, f"key:{os.environ.get('API_KEY')}")
    Path(os.environ["FAKE_EVENTS"]).with_name(f"{name}-config.json").write_text(json.dumps(config))
    if config["master_listen_fd"] is not None:
        with socket.socket(fileno=config["master_listen_fd"]) as meeting:
            tell(name, f"listens:{meeting.getsockname()[1]}")
    has_run = Path(f"{config['uds_path']}-{config['rank']}.run")
    if behaviour == "die-at-start" or (behaviour == "start-once" and has_run.exists()):
        for number in range(30):
            print(f"native line {number}", flush=True)
        say("ERROR", "cannot load the weights")
        sys.exit(7)
    if stuck:
        child = os.fork()
        if child == 0:
            tell("descendant", "start")
            time.sleep(3600)
    if behaviour == "never-ready":
        wait_forever()
    has_run.touch()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{config['uds_path']}-{config['rank']}")
    listener.listen()
    wait_forever()


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def read_line(line: socket.socket, ends_when_told: bool) -> None:
    for message in line.makefile("rb"):
        tell("router", f"told:{json.loads(message)['generation']}")
        if ends_when_told:
            os._exit(0)
    tell("router", "line-closed")
    if ends_when_told:
        time.sleep(0.2)  # for whatever else it is told
        os._exit(0)


def router() -> None:
    config = config_argument()
    behaviour = os.environ.get("FAKE_ROUTER", "")
    drain = os.environ.get("FAKE_DRAIN_S", "0")
    waits = drain == "until told"
    on_terminate("router", 3600.0 if waits else float(drain), ignore=behaviour == "stuck")
    line = socket.socket(fileno=config["launcher_fd"])
    threading.Thread(target=read_line, args=(line, waits), daemon=True).start()
    for number, is_stuck in ((signal.SIGUSR1, True), (signal.SIGUSR2, False)):
        lost = json.dumps({"lost": 1, "reason": "a reason", "is_stuck": is_stuck}).encode() + b"\n"
        signal.signal(number, lambda *_, lost=lost: line.sendall(lost))
    from text_generation_router.parent_watch import watch_parent

    watch_parent(config["run_folder"])
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = Path(config["run_folder"], "router.json")
    ports.with_suffix(".new").write_text(json.dumps({"port": server.server_port, "prometheus_port": 1}))
    ports.with_suffix(".new").rename(ports)
    Path(os.environ["FAKE_EVENTS"]).with_name("router-config.json").write_text(json.dumps(config))
    tell("router", "start")
    tell("router", f"key:{os.environ.get('API_KEY')}")
    say("INFO", "Connected")
    say("DEBUG", "a detail")
    wait_forever()


def launcher() -> None:
    import logging

    from text_generation_launcher.cli import parse
    from text_generation_launcher.launch import Commands, Launch
    from text_generation_launcher.logs import LogWriter, RecordHandler, level_name
    from text_generation_launcher.timeline import Timeline

    settings = parse(sys.argv[1:], {})
    level = level_name(os.environ.get("LOG_LEVEL", ""))
    writer = LogWriter(level, settings.launcher.json_output)
    logging.basicConfig(level=logging.DEBUG, handlers=[RecordHandler(writer)])
    this = (sys.executable, __file__)
    commands = Commands((*this, "model-files"), (*this, "shard"), (*this, "router"))
    sys.exit(Launch(settings, dict(os.environ), writer, Timeline(), level, commands).run())


if __name__ == "__main__":
    {"launcher": launcher, "model-files": model_files, "shard": shard, "router": router}[sys.argv.pop(1)]()
