"""Names of requests, for answers and logs."""

import random

# Nothing rests on nobody guessing a name, and the system's own random numbers take 40 us each.
_names = random.Random()


def new_request_id() -> str:
    """32 hexadecimal digits that no other request has."""
    return f"{_names.getrandbits(128):032x}"
