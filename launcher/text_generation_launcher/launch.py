"""The life of one server: resolve the model, start the shards, start the router, watch, stop."""

import contextlib
import http.client
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from text_generation_router.config import RouterConfig
from text_generation_shard.config import ShardConfig

from text_generation_launcher import defaults
from text_generation_launcher.cli import Settings
from text_generation_launcher.errors import ChildDied, LauncherError
from text_generation_launcher.gpus import choose_num_shards, count_gpus, num_cores, visible_gpus
from text_generation_launcher.logs import LogWriter
from text_generation_launcher.model import ResolvedModel, read_answer, tokenizer_folder
from text_generation_launcher.places import Places, private_places
from text_generation_launcher.processes import KILL_GRACE_S, Child, StopRequested, Supervisor
from text_generation_launcher.router_line import RouterLine
from text_generation_launcher.shard_group import ShardGroup
from text_generation_launcher.timeline import Timeline
from text_generation_launcher.watch import Watch

# HF_TOKEN and its older names.
_TOKEN_VARIABLES = ("HF_TOKEN", "HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_API_KEY_VARIABLE = "API_KEY"

log = logging.getLogger("text_generation_launcher")


@dataclass(frozen=True)
class Commands:
    """How each kind of child is started; tests put their own in."""

    model_files: tuple[str, ...] = (sys.executable, "-m", "text_generation_shard.model_files")
    shard: tuple[str, ...] = (sys.executable, "-m", "text_generation_shard", "serve")
    router: tuple[str, ...] = (sys.executable, "-m", "text_generation_router")


class Launch:
    """One run of the server, from settings to exit code."""

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        writer: LogWriter,
        timeline: Timeline,
        log_level: str = "info",
        commands: Commands | None = None,
    ) -> None:
        self._settings = settings
        self._config = settings.launcher
        self._environment = environment
        self._writer = writer
        self._timeline = timeline
        self._log_level = log_level
        self._commands = commands or Commands()

    def run(self) -> int:
        """Serve until asked to stop (0) or until something fails (1)."""
        try:
            router_config = defaults.check(self._settings, self._environment)
            num_gpus = len(visible_gpus(self._environment, count_gpus()))
            num_shards = choose_num_shards(self._config, num_gpus)
            with (
                private_places(self._config.shard_uds_path, num_shards) as places,
                Supervisor(self._writer, [places.run_folder, *places.sockets]) as supervisor,
            ):
                self._serve(supervisor, places, router_config, is_cpu=num_gpus == 0)
        except LauncherError as error:
            log.error("%s", error)
            return 1
        log.info("Stopped")
        return 0

    def _serve(self, supervisor: Supervisor, places: Places, router_config: RouterConfig, is_cpu: bool) -> None:
        """Start everything, then watch; returns once stopped as asked."""
        with contextlib.closing(RouterLine(supervisor.post)) as line:
            try:
                self._timeline.end_phase("settings")
                model = self._resolve_model(supervisor, places)
                defaults.check_model(router_config, model.config, len(places.sockets))
                router_config = defaults.fit_step_to_device(router_config, model.config, is_cpu)
                group = self._start_shards(supervisor, model, places, is_cpu)
                router = self._start_router(
                    supervisor, places, self._router_config(model, places, router_config, line), line
                )
                Watch(supervisor, group, router, line, self._config).run()
            except StopRequested:
                log.info("Stopping")
            except ChildDied as death:
                line.close()  # the router waits for no other shards
                supervisor.stop(supervisor.children, KILL_GRACE_S)
                if death.last_lines:
                    log.error("Its last lines:\n%s", "\n".join(death.last_lines))
                raise
        # Shards hold no request any more: a rank stuck in native code must not hold up the end.
        supervisor.stop(supervisor.children, KILL_GRACE_S)

    def _resolve_model(self, supervisor: Supervisor, places: Places) -> ResolvedModel:
        config = self._config
        arguments = ["--run-folder", str(places.run_folder)]
        if config.model_id is not None:
            arguments += ["--model-id", config.model_id]
        if config.revision is not None:
            arguments += ["--revision", config.revision]
        if self._settings.given.get("load_format") == "dummy":
            arguments.append("--without-weights")
        child = supervisor.spawn(
            "model-files", [*self._commands.model_files, *arguments], self._hub_environment(), answers=True
        )
        model = read_answer(child, supervisor.wait_for_answer(child))
        self._timeline.end_phase("resolve model")
        log.info("Model %s, revision %s, %d weight files", model.model_id, model.sha, len(model.weight_files))
        return model

    def _start_shards(self, supervisor: Supervisor, model: ResolvedModel, places: Places, is_cpu: bool) -> ShardGroup:
        config = self._shard_config(model, places, is_cpu)
        log.info(
            "Starting shards: %d on %s, sockets %s-*",
            config.world_size, "the CPU" if is_cpu else "GPUs", places.uds_path,
        )  # fmt: skip
        group = ShardGroup(
            supervisor, places, self._commands.shard, self._child_environment(), config, self._config.master_port
        )
        group.start()
        supervisor.wait_until(group.all_answer, lambda: log.info("Waiting for shard to be ready"))
        self._timeline.end_phase("start shards")
        return group

    def _shard_config(self, model: ResolvedModel, places: Places, is_cpu: bool) -> ShardConfig:
        """The config of rank 0; the others differ by their rank alone."""
        world_size = len(places.sockets)
        return ShardConfig(
            **self._settings.values_for(ShardConfig),
            model_folder=model.model_folder,
            weight_files=model.weight_files,
            uds_path=places.uds_path,
            run_folder=str(places.run_folder),
            world_size=world_size,
            master_addr=self._config.master_addr,
            device="cpu" if is_cpu else "cuda",
            num_threads=defaults.threads_per_shard(num_cores(), world_size, self._environment) if is_cpu else 0,
            json_output=True,
            log_level=self._log_level,
        )

    def _start_router(self, supervisor: Supervisor, places: Places, config: RouterConfig, line: RouterLine) -> Child:
        environment = self._child_environment()
        if config.api_key is not None:
            # Not on the command line, which every user of the machine can read.
            environment[_API_KEY_VARIABLE] = config.api_key
        command = [*self._commands.router, "--config-json", json.dumps(asdict(replace(config, api_key=None)))]
        router = supervisor.spawn("router", command, environment, pass_fds=(line.router_descriptor,))
        line.start()
        ports_file = places.run_folder / "router.json"
        supervisor.wait_until(lambda: _router_serves(ports_file, config.hostname))
        self._timeline.end_phase("start router")
        ports = json.loads(ports_file.read_text())
        log.info("Start-up took %.2f s: %s", self._timeline.total_s, self._timeline)
        log.info("Ready on %s port %d, metrics on port %d", config.hostname, ports["port"], ports["prometheus_port"])
        return router

    def _router_config(
        self, model: ResolvedModel, places: Places, config: RouterConfig, line: RouterLine
    ) -> RouterConfig:
        folder = Path(model.model_folder)
        if self._config.tokenizer_config_path is not None:
            folder = tokenizer_folder(folder, Path(self._config.tokenizer_config_path), places.run_folder)
        return replace(
            config,
            model_id=model.model_id,
            model_sha=model.sha,
            revision=model.revision,
            tokenizer_folder=str(folder),
            shard_uds_path=places.uds_path,
            world_size=len(places.sockets),
            run_folder=str(places.run_folder),
            launcher_fd=line.router_descriptor,
            graceful_termination_timeout_s=float(self._config.graceful_termination_timeout),
            json_output=True,
            log_level=self._log_level,
        )

    def _hub_environment(self) -> dict[str, str]:
        """The environment with the Hub's token under its present name and the cache folder of the flag."""
        environment = dict(self._environment)
        token = next((environment[name] for name in _TOKEN_VARIABLES if environment.get(name)), None)
        if token is not None:
            environment["HF_TOKEN"] = token
        if self._config.huggingface_hub_cache is not None:
            environment["HUGGINGFACE_HUB_CACHE"] = self._config.huggingface_hub_cache
            environment["HF_HUB_CACHE"] = self._config.huggingface_hub_cache
        return environment

    def _child_environment(self) -> dict[str, str]:
        """The environment without secrets."""
        secrets = (*_TOKEN_VARIABLES, _API_KEY_VARIABLE)
        return {name: value for name, value in self._environment.items() if name not in secrets}


def _router_serves(ports_file: Path, hostname: str) -> bool:
    """Whether the router has told its port and answers that it is healthy."""
    try:
        port = json.loads(ports_file.read_text())["port"]
    except (OSError, ValueError):
        return False
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(hostname, hostname)
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
