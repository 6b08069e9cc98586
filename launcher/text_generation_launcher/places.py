"""The run folder, the shards' sockets and the place where they meet."""

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from text_generation_launcher.errors import SettingsError

# The system's limit on a Unix socket's path is 108 bytes with the closing zero.
_MAX_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True)
class Places:
    """Where the processes of one server meet; rank R listens on `sockets[R]`, which is `<uds_path>-R`."""

    run_folder: Path
    uds_path: str
    sockets: tuple[Path, ...]


@contextlib.contextmanager
def private_places(uds_path: str | None, num_shards: int) -> Iterator[Places]:
    """A new run folder that only this user can enter, and the sockets, by default in it; removed at the end."""
    run_folder = _new_folder()
    sockets: tuple[Path, ...] = ()
    try:
        uds_path = uds_path or str(run_folder / "shard")
        sockets = _socket_paths(uds_path, num_shards)
        yield Places(run_folder, uds_path, sockets)
    finally:
        for path in sockets:
            path.unlink(missing_ok=True)
        shutil.rmtree(run_folder, ignore_errors=True)


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="text-generation-"))
    if len(bytes(folder)) + len("/shard-999") > _MAX_SOCKET_PATH_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="text-generation-", dir="/tmp"))
    return folder


def _socket_paths(uds_path: str, num_shards: int) -> tuple[Path, ...]:
    """The sockets of all ranks; refuses a path that is too long or on which another server answers."""
    paths = tuple(Path(f"{uds_path}-{rank}") for rank in range(num_shards))
    for path in paths:
        if len(bytes(path)) > _MAX_SOCKET_PATH_BYTES:
            raise SettingsError(f"--shard-uds-path: {path} is longer than a socket's {_MAX_SOCKET_PATH_BYTES} bytes.")
        if not path.parent.is_dir():
            raise SettingsError(f"--shard-uds-path: the folder {path.parent} does not exist.")
        if path.exists() and not path.is_socket():
            raise SettingsError(f"--shard-uds-path: {path} exists and is not a socket.")
        if answers(path):
            raise SettingsError(f"--shard-uds-path: another server answers on {path}.")
    for path in paths:
        path.unlink(missing_ok=True)  # left by a server that was killed
    return paths


def answers(path: Path) -> bool:
    """Whether a server accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True


def listen_for_shards(address: str, port: int | None) -> socket.socket:
    """The socket at which the shards will meet, for rank 0 to inherit: nobody else can take its port before."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port or 0))
        listener.listen()
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"The shards cannot meet at --master-addr {address}, --master-port {port or 'not given'}: {error}."
        ) from error
    return listener
