"""A small process that cleans up when the launcher is killed outright. Run as a script; the standard library only.

It leads the process group of all children. Its standard input is a pipe that the launcher holds and never writes
to: at end of file the launcher is gone. The children notice the same by their own pipes and end by themselves;
what is left after GRACE_S, a process stuck in native code or a descendant of one, is killed here.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

GRACE_S = 1.6


def main() -> None:
    """Wait for the launcher's end, then remove the files and folders named as arguments and kill the group."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    time.sleep(GRACE_S)
    try:
        for path in sys.argv[1:]:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)
    finally:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
