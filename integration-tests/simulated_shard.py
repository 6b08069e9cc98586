"""A shard without a model: speaks the shard protocol, takes as long for each step as a GPU would, answers random ids.

    python integration-tests/simulated_shard.py UDS_PATH RUN_FOLDER [--steps h100_steps.json]

It shows, on any machine, whether the router keeps a fast GPU busy. Steps run in virtual time: a step starts when the
one before it ends or when its plan arrives, whichever is later, and lasts as long as the model of `StepTimes` says;
how late this process wakes up does not add up. The start and end of every step (nanoseconds of the monotonic clock)
and the tokens it computed are appended to `<RUN_FOLDER>/steps.bin` as int64 triples, so that a load generator on the
same machine can tell how long the shard stood idle while requests were open.
"""

import argparse
import bisect
import ctypes
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
from text_generation_proto import columns, shard_pb2, shard_pb2_grpc
from text_generation_proto.channel import CHANNEL_OPTIONS, shard_address

PR_SET_TIMERSLACK = 29
DEVICE_NAME = "simulated H100"
MAX_POSITION_EMBEDDINGS = 131_072
VOCAB_SIZE = 49_000  # below the demo tokenizer's, so that every id has a text
BLOCK_SIZE = 16
WAKE_EARLY_NS = 60_000  # a sleep overshoots by about this much on the 2-core machine


class StepTimes:
    """How long a step takes on the GPU that the file describes."""

    def __init__(self, path: Path) -> None:
        values = json.loads(path.read_text())
        points = sorted((int(rows), ms / 1e3) for rows, ms in values["gemm_ms"].items())
        self.capacity_tokens: int = values["kv_capacity_tokens"]
        self._rows = [rows for rows, _ in points]
        self._seconds = [seconds for _, seconds in points]
        self._seconds_per_row = values["flops_per_token"] / (values["tflops"] * 1e12)
        self._seconds_per_cached_token = values["kv_bytes_per_token"] / values["hbm_bytes_per_s"]
        self._seconds_per_pair = values["attention_flops_per_query_per_cached_token"] / (
            values["attention_tflops"] * 1e12
        )
        self._fixed_seconds = values["fixed_ms"] / 1e3
        self.num_layer_weights = int(values["flops_per_token"]) // 2  # the head's with them
        self.num_context_features: int = values["attention_flops_per_query_per_cached_token"] // 4

    def _matrix_products(self, num_rows: int) -> float:
        rows, seconds = self._rows, self._seconds
        if num_rows >= rows[-1]:
            return max(seconds[-1], num_rows * self._seconds_per_row)
        index = max(bisect.bisect_right(rows, num_rows), 1)
        share = (num_rows - rows[index - 1]) / (rows[index] - rows[index - 1])
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])

    def step_ns(self, num_rows: int, num_cached_tokens: int, num_prefill_pairs: int) -> int:
        """`num_rows` tokens computed, `num_cached_tokens` read, `num_prefill_pairs` of query and key multiplied."""
        seconds = self._fixed_seconds + self._matrix_products(num_rows)
        seconds += num_cached_tokens * self._seconds_per_cached_token + num_prefill_pairs * self._seconds_per_pair
        return int(seconds * 1e9)


class Batch:
    """What the shard must remember of its sequences: how many tokens are known and computed."""

    def __init__(self, seed: int) -> None:
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}  # of prefilling sequences
        self._index: dict[int, int] = {}  # of decoding sequences, in _decoding
        self._decoding = np.zeros(4096, np.int32)
        self._lengths = np.zeros(4096, np.int64)
        self._num_decoding = 0
        self._random = np.random.default_rng(seed)

    def apply(self, plan: shard_pb2.StepPlan) -> None:
        for sequence_id in columns.unpack_int32(plan.removed_sequence_ids).tolist():
            del self._known[sequence_id]
            self._computed.pop(sequence_id, None)
            self._stop_decoding(sequence_id)
        for sequence in plan.new_sequences:
            self._known[sequence.sequence_id] = len(sequence.token_ids) // 4
            self._computed[sequence.sequence_id] = sequence.num_computed_tokens

    def _stop_decoding(self, sequence_id: int) -> None:
        index = self._index.pop(sequence_id, None)
        if index is not None:
            self._num_decoding -= 1
            last = self._num_decoding
            if index != last:
                moved = int(self._decoding[last])
                self._decoding[index], self._lengths[index] = moved, self._lengths[last]
                self._index[moved] = index

    def run(self, plan: shard_pb2.StepPlan, times: StepTimes) -> tuple[shard_pb2.StepResult, int, int]:
        """The step's result, how long it takes in nanoseconds, and the tokens it computes."""
        num_decoding = self._num_decoding
        self._lengths[:num_decoding] += 1
        num_cached = int(self._lengths[:num_decoding].sum())
        num_rows, num_pairs = num_decoding, 0
        ids = columns.unpack_int32(plan.prefill_sequence_ids).tolist()
        for sequence_id, count in zip(ids, columns.unpack_int32(plan.prefill_num_tokens).tolist(), strict=True):
            start = self._computed[sequence_id]
            end = start + count
            num_rows += count
            num_cached += end
            num_pairs += (start + end + 1) * count // 2
            self._computed[sequence_id] = end
            if end == self._known[sequence_id]:
                self._start_decoding(sequence_id, end)
        sampled = self._decoding[: self._num_decoding].copy()
        result = shard_pb2.StepResult(
            step=plan.step,
            sequence_ids=sampled.tobytes(),
            token_ids=self._random.integers(0, VOCAB_SIZE, len(sampled), np.int32).tobytes(),
            logprobs=np.full(len(sampled), -1.0, np.float32).tobytes(),
        )
        return result, times.step_ns(num_rows, num_cached, num_pairs) if num_rows else 0, num_rows

    def _start_decoding(self, sequence_id: int, length: int) -> None:
        del self._computed[sequence_id]
        self._index[sequence_id] = self._num_decoding
        self._decoding[self._num_decoding] = sequence_id
        self._lengths[self._num_decoding] = length
        self._num_decoding += 1


class SimulatedShard(shard_pb2_grpc.ShardServicer):
    """The service: plans are stamped when they arrive and executed in virtual time."""

    def __init__(self, times: StepTimes, run_folder: Path, seed: int) -> None:
        self._times = times
        self._seed = seed
        self._log = (run_folder / "steps.bin").open("ab", buffering=0)
        (run_folder / "progress-0").write_bytes(bytes(56))

    def Info(self, request: object, context: object) -> shard_pb2.InfoReply:
        return shard_pb2.InfoReply(
            dtype="bfloat16",
            device_name=DEVICE_NAME,
            rank=0,
            world_size=1,
            vocab_size=49_152,
            max_position_embeddings=MAX_POSITION_EMBEDDINGS,
            block_size=BLOCK_SIZE,
            pid=os.getpid(),
            num_layer_weights=self._times.num_layer_weights,
            num_context_features=self._times.num_context_features,
        )

    def Warmup(self, request: shard_pb2.WarmupRequest, context: object) -> shard_pb2.WarmupReply:
        tokens = min(self._times.capacity_tokens, request.max_kv_tokens or self._times.capacity_tokens)
        return shard_pb2.WarmupReply(num_blocks=tokens // BLOCK_SIZE)

    def Vocabulary(self, request: object, context: object) -> shard_pb2.VocabularyReply:
        return shard_pb2.VocabularyReply()

    def Grammar(self, request: object, context: object) -> shard_pb2.GrammarReply:
        return shard_pb2.GrammarReply(error="needs a real shard")

    def Health(self, request: object, context: object) -> shard_pb2.HealthReply:
        return shard_pb2.HealthReply()

    def Run(self, plans: Iterator[shard_pb2.StepPlan], context: object) -> Iterator[shard_pb2.StepResult]:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
        arrived: queue.SimpleQueue[tuple[int, shard_pb2.StepPlan] | None] = queue.SimpleQueue()
        threading.Thread(target=self._receive, args=(plans, arrived), daemon=True).start()
        batch, end_ns = Batch(self._seed), 0
        while (item := arrived.get()) is not None:
            arrived_ns, plan = item
            batch.apply(plan)
            result, duration_ns, num_tokens = batch.run(plan, self._times)
            if duration_ns:
                start_ns = max(end_ns, arrived_ns)
                result.idle_ns = start_ns - end_ns if end_ns else 0
                end_ns = start_ns + duration_ns
                self._log.write(np.array([start_ns, end_ns, num_tokens], np.int64).tobytes())
            result.forward_ns = result.step_ns = duration_ns
            if (left_ns := end_ns - time.monotonic_ns() - WAKE_EARLY_NS) > 0:
                time.sleep(left_ns / 1e9)
            yield result

    @staticmethod
    def _receive(plans: Iterator[shard_pb2.StepPlan], arrived: "queue.SimpleQueue[object]") -> None:
        try:
            for plan in plans:
                if plan.is_last:
                    break
                arrived.put((time.monotonic_ns(), plan))
        except grpc.RpcError:
            pass  # the router is gone
        arrived.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uds_path")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--steps", type=Path, default=Path(__file__).with_name("h100_steps.json"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    server = grpc.server(futures.ThreadPoolExecutor(4), options=CHANNEL_OPTIONS)
    shard = SimulatedShard(StepTimes(arguments.steps), arguments.run_folder, arguments.seed)
    shard_pb2_grpc.add_ShardServicer_to_server(shard, server)
    server.add_insecure_port(shard_address(arguments.uds_path, 0))
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
