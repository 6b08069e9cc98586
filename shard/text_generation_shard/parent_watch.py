"""Ends this process when the launcher that started it is gone.

The launcher holds the write end of this process's standard input and never writes to it, so end of file means
that the launcher no longer exists. Shard and router each have this file: packages do not import one another.
"""

import os
import shutil
import signal
import threading
import time

LAUNCHER_PID_VARIABLE = "TEXT_GENERATION_LAUNCHER_PID"
GRACE_S = 1.5


def watch_parent(run_folder: str) -> None:
    """Watch standard input from a daemon thread; without effect in a process that no launcher started."""
    if not os.environ.get(LAUNCHER_PID_VARIABLE):
        return
    threading.Thread(target=_end_with_parent, args=(run_folder,), name="parent-watch", daemon=True).start()


def _end_with_parent(run_folder: str) -> None:
    # Not sys.stdin: a daemon thread that holds its lock at exit would be an error of the interpreter.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    if run_folder:
        shutil.rmtree(run_folder, ignore_errors=True)
    os._exit(1)
