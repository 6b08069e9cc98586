"""What both ends of a router-shard connection agree on: addresses and channel options."""

MAX_MESSAGE_BYTES = 256 * 1024 * 1024

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # The sockets are local: a peer that is gone shows at once, and a busy one must never be cut off.
    ("grpc.keepalive_time_ms", 2**31 - 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
]


def shard_socket_path(uds_path: str, rank: int) -> str:
    """Path of one rank's Unix socket: `<uds_path>-<rank>`."""
    return f"{uds_path}-{rank}"


def shard_address(uds_path: str, rank: int) -> str:
    """gRPC address of one rank."""
    return f"unix://{shard_socket_path(uds_path, rank)}"
