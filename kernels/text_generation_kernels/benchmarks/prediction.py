"""Predicts each kernel's time, and a step's, from bytes, operations and occupancy: `python -m …benchmarks.prediction`.

A model of one H100 with the shapes of Llama-3.1-8B in bfloat16, of a few constants, for measurements to contradict.
A launch takes its start, as many trips to memory as wait for each other, and then the longest of: its bytes at the copy
rate or at what the loads in flight reach; its products at the matrix rate, and the exponentials beside them. Where one
program fills a multiprocessor, exponentials wait for products and the two add up.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from text_generation_kernels.benchmarks.occupancy import MULTIPROCESSORS, RESERVED_SHARED_BYTES
from text_generation_kernels.launch_settings import Settings, settings_of_class
from text_generation_kernels.skinny_matmul import LEAST_ROWS, MAX_ROWS, settings_shape

COPY_BYTES_PER_S = 3.03e12
MATMUL_FLOPS_PER_S = 790e12
NUM_MULTIPROCESSORS = 132
CLOCK_HZ = 1.755e9
START_S = 1.0e-6  # of a kernel in a graph
MEMORY_TRIP_S = 0.7e-6
EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor
# What else a score takes: scaling, the maximum, the difference, the sum, rounding; of 128 lanes.
OTHERS_PER_CLOCK = 128 / 6

LAYERS, HIDDEN, INNER, VOCABULARY = 32, 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ITEM_BYTES = 2


@dataclass(frozen=True)
class Launch:
    """One kernel's work."""

    part: str  # of the step
    name: str
    num_bytes: float
    num_flops: float = 0.0
    num_scores: float = 0.0  # of attention: an exponential each
    num_trips: int = 1  # loads that wait for each other, and the store
    programs_per_multiprocessor: float = 1.0
    bytes_in_flight: float = 64 * 1024  # of one program
    count: int = LAYERS  # in a step


def predicted_s(launch: Launch) -> float:
    """Seconds of one launch."""
    in_flight = NUM_MULTIPROCESSORS * launch.programs_per_multiprocessor * launch.bytes_in_flight
    memory_s = launch.num_bytes / min(COPY_BYTES_PER_S, in_flight / MEMORY_TRIP_S)
    product_s = launch.num_flops / MATMUL_FLOPS_PER_S
    turns = 1 / EXPONENTIALS_PER_CLOCK + 1 / OTHERS_PER_CLOCK
    score_s = launch.num_scores * turns / (NUM_MULTIPROCESSORS * CLOCK_HZ)
    compute_s = product_s + score_s if launch.programs_per_multiprocessor < 2 else max(product_s, score_s)
    return START_S + launch.num_trips * MEMORY_TRIP_S + max(memory_s, compute_s)


def product(name: str, rows: int, width: int, depth: int, count: int = LAYERS) -> Launch:
    """A product with a weight of `width` rows; of few rows by our kernel, with the activation behind gate and up."""
    num_bytes = ITEM_BYTES * (width * depth + rows * (width + depth))
    if rows > MAX_ROWS:
        return Launch("products", name, num_bytes, 2.0 * rows * width * depth, count=count)
    is_gated = name == "gate_up"
    padded = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
    operation = "skinny_matmul_gated" if is_gated else "skinny_matmul"
    settings = settings_of_class(operation, "h100", settings_shape(padded, width // (1 + is_gated)))
    tile = (settings["BLOCK_N"] * (1 + is_gated) + padded) * settings["BLOCK_K"] * ITEM_BYTES
    stages = max(1, settings["num_stages"] - 1)
    fitting = MULTIPROCESSORS[90].shared_bytes // (tile * stages + RESERVED_SHARED_BYTES)
    num_programs = -(-width // (1 + is_gated) // settings["BLOCK_N"])
    resident = min(max(1, fitting), num_programs / NUM_MULTIPROCESSORS)
    return Launch(
        "products", name, num_bytes, 2.0 * rows * width * depth, programs_per_multiprocessor=resident,
        bytes_in_flight=tile * stages, count=count,
    )  # fmt: skip


def narrow_attention(num_keys: int) -> Launch:
    """Decoding sequences of so many tokens together; the pieces of a sequence are merged by the last."""
    settings = settings_of_class("attention_narrow", "h100", f"d{HEAD_DIM}")
    num_bytes = 2.0 * num_keys * KV_HEADS * HEAD_DIM * ITEM_BYTES
    tile = 2 * settings["KEYS"] * HEAD_DIM * ITEM_BYTES * (settings["num_stages"] // 2)
    # The list, the item, the block's number, the keys, the partial result, the counter and the others' results.
    return Launch(
        "attention", "attention, narrow", num_bytes, num_trips=7,
        programs_per_multiprocessor=settings["CTAS_PER_SM"], bytes_in_flight=tile,
    )  # fmt: skip


def prompt_attention(length: int, cached: int = 0, num_prompts: int = 1) -> Launch:
    """Prompts of so many new tokens behind so many cached ones; of a causal square half is computed."""
    num_pairs = float(num_prompts) * length * (cached + (length + 1) / 2)
    num_bytes = num_prompts * (2.0 * (cached + length) * KV_HEADS * HEAD_DIM * ITEM_BYTES + query_bytes(length))
    return wide_attention(num_pairs, num_bytes)


def query_bytes(rows: int) -> float:
    """Queries and outputs of attention."""
    return 2.0 * rows * HEADS * HEAD_DIM * ITEM_BYTES


def wide_attention(num_pairs: float, num_bytes: float) -> Launch:
    """Prompts with so many pairs of a token and one that it sees."""
    settings: Settings = settings_of_class("attention_hopper", "h100", f"d{HEAD_DIM}")
    return Launch(
        "attention", "attention, wide", num_bytes, 4 * HEADS * HEAD_DIM * num_pairs, HEADS * num_pairs, num_trips=6,
        programs_per_multiprocessor=settings["CTAS_PER_SM"],
    )  # fmt: skip


def row_kernel(name: str, rows: int, num_bytes: float, num_trips: int, count: int = LAYERS) -> Launch:
    """A kernel with a program for each row or part of one."""
    return Launch(
        "norms, rotation, activation", name, num_bytes, num_trips=num_trips, count=count,
        programs_per_multiprocessor=min(8.0, max(1.0, rows / NUM_MULTIPROCESSORS)), bytes_in_flight=16 * 1024,
    )  # fmt: skip


def step(num_decoding: int, context: int, prompt: int = 0) -> Iterator[Launch]:
    """A step of decoding sequences, and perhaps a prompt's tokens."""
    attention = [narrow_attention(num_decoding * context)] + ([prompt_attention(prompt)] if prompt else [])
    return step_with(attention, num_decoding + prompt, num_decoding + bool(prompt))


def step_with(attention: list[Launch], rows: int, samples: int) -> Iterator[Launch]:
    """A step of so many tokens, `samples` of which are sampled from, with this attention in each layer."""
    row_bytes, heads = HIDDEN * ITEM_BYTES, HEADS + 2 * KV_HEADS
    yield product("qkv", rows, heads * HEAD_DIM, HIDDEN)
    yield row_kernel("rotary_kv_write", rows, 2.0 * rows * heads * HEAD_DIM * ITEM_BYTES, 3)
    yield from attention
    yield product("o", rows, HIDDEN, HEADS * HEAD_DIM)
    yield row_kernel("add_rms_norm", rows, 4.0 * rows * row_bytes, 2, count=2 * LAYERS)
    yield product("gate_up", rows, 2 * INNER, HIDDEN)
    if rows > MAX_ROWS:
        yield row_kernel("gated_activation", rows, 3.0 * rows * INNER * ITEM_BYTES, 2)
    yield product("down", rows, HIDDEN, INNER)
    yield product("head", samples, VOCABULARY, HIDDEN, count=1)
    yield Launch("sampling", "statistics", samples * VOCABULARY * ITEM_BYTES, num_trips=2, count=1)
    yield Launch("sampling", "choice, tokens in and out", 0, num_trips=8, count=1)


PARTS = ("products", "attention", "norms, rotation, activation", "sampling")
STEPS = {"decode 1": (1, 1100), "decode 32": (32, 1100), "decode 256": (256, 1100),
         "32 + prompt of 512": (32, 1100, 512), "32 + prompt of 2 000": (32, 1100, 2000)}  # fmt: skip


def by_part(launches: Iterator[Launch]) -> dict[str, float]:
    """Microseconds of each part of a step."""
    times = dict.fromkeys(PARTS, 0.0)
    for launch in launches:
        times[launch.part] += predicted_s(launch) * launch.count * 1e6
    return times


def main() -> None:
    """Print the steps by part, and each kernel."""
    print(f"| us a step, predicted | {' | '.join(STEPS)} |\n|{'---|' * (len(STEPS) + 1)}")
    columns = [by_part(step(*sizes)) for sizes in STEPS.values()]
    for part in PARTS:
        print(f"| {part} | {' | '.join(f'{column[part]:,.0f}' for column in columns)} |")
    print(f"| whole step | {' | '.join(f'{sum(column.values()):,.0f}' for column in columns)} |")
    print("\n| kernel, us each | rows | predicted | floor |\n|---|---|---|---|")
    kernels = [(rows, launch) for rows in (16, 64, 256) for launch in step(rows, 570)]
    kernels += [(length, prompt_attention(length)) for length in (1024, 8192)]
    kernels += [(2048, prompt_attention(2048, 4096, 2)), (250, prompt_attention(250, 0, 8))]
    for rows, launch in kernels:
        floor_s = max(launch.num_bytes / COPY_BYTES_PER_S, launch.num_flops / MATMUL_FLOPS_PER_S)
        print(f"| {launch.name} | {rows} | {predicted_s(launch) * 1e6:.1f} | {floor_s * 1e6:.1f} |")


if __name__ == "__main__":
    main()
