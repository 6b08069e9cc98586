"""text-generation-launcher: reads flags and environment, sets up the log, runs the server."""

import logging
import os
import sys

from text_generation_launcher.cli import parse
from text_generation_launcher.launch import Launch
from text_generation_launcher.logs import LogWriter, RecordHandler, level_name
from text_generation_launcher.runtime_report import runtime_report
from text_generation_launcher.timeline import Timeline


def main() -> None:
    """Run the server and exit with its code."""
    timeline = Timeline()
    environment = dict(os.environ)
    settings = parse(sys.argv[1:], environment)
    level = level_name(environment.get("LOG_LEVEL", ""))
    writer = LogWriter(level, settings.launcher.json_output)
    logging.basicConfig(level=logging.DEBUG, handlers=[RecordHandler(writer)])
    if settings.launcher.env:
        logging.getLogger("text_generation_launcher").info("%s", runtime_report())
    sys.exit(Launch(settings, environment, writer, timeline, level).run())


if __name__ == "__main__":
    main()
