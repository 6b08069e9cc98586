"""Regenerate the stubs of shard.proto: `python -m text_generation_proto.generate [OUTPUT_FOLDER]`."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def generate(output_folder: Path) -> None:
    """Run protoc on `text_generation_proto/shard.proto` into `output_folder`.

    Run from the folder above the package, the stubs import each other by full package name.
    """
    from grpc_tools import protoc

    arguments = [
        "protoc",
        f"--proto_path={PACKAGE.parent}",
        f"--python_out={output_folder}",
        f"--pyi_out={output_folder}",
        f"--grpc_python_out={output_folder}",
        f"{PACKAGE.name}/shard.proto",
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE.parent)
