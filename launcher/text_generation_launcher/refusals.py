"""The one table of flags that are known but not available: each refused at start with what there is instead."""

from dataclasses import dataclass
from typing import Any

from text_generation_launcher.config import LauncherConfig


@dataclass(frozen=True)
class Refusal:
    """Values that may be given all the same, and what to tell who gives another."""

    instead: str
    allowed: tuple[Any, ...] = (None,)


_ROPE = "the rotary scaling of the model's own config.json is used; write other values there"
_NGROK = "this server opens no tunnels; run ngrok beside it"

REFUSED: dict[str, Refusal] = {
    "quantize": Refusal(
        "nothing is quantised at start; available are weights in float32, float16 or bfloat16 (see --dtype) and "
        ".gguf files as they are"
    ),
    "speculate": Refusal("there is no speculative decoding, one token is computed per step", (None, 0)),
    "kv_cache_dtype": Refusal("KV memory has the type of the activations (see --dtype)", (None, "auto")),
    "trust_remote_code": Refusal(
        "code from a model's repository is never run; the built-in architectures are listed in the README", (False,)
    ),
    "weights_cache_override": Refusal("give the folder that holds the weights and config.json as --model-id"),
    "rope_scaling": Refusal(_ROPE),
    "rope_factor": Refusal(_ROPE),
    "ngrok": Refusal(_NGROK, (False,)),
    "ngrok_authtoken": Refusal(_NGROK),
    "ngrok_edge": Refusal(_NGROK),
    "lora_adapters": Refusal("adapters are not loaded; serve a model into which the adapter was merged"),
}


def refusals_of(config: LauncherConfig) -> list[str]:
    """One message for each flag whose value this server cannot honour."""
    messages = []
    for name, refusal in REFUSED.items():
        value = getattr(config, name)
        if value not in refusal.allowed:
            shown = "" if value is True else f" {value}" if "token" not in name else " …"
            messages.append(f"--{name.replace('_', '-')}{shown} is not available: {refusal.instead}.")
    return messages
