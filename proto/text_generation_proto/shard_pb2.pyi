from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("dtype", "device_name", "rank", "world_size", "vocab_size", "max_position_embeddings", "block_size", "pid", "device_uuid", "num_layer_weights", "num_context_features")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITION_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYER_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    device_name: str
    rank: int
    world_size: int
    vocab_size: int
    max_position_embeddings: int
    block_size: int
    pid: int
    device_uuid: str
    num_layer_weights: int
    num_context_features: int
    def __init__(self, dtype: _Optional[str] = ..., device_name: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_position_embeddings: _Optional[int] = ..., block_size: _Optional[int] = ..., pid: _Optional[int] = ..., device_uuid: _Optional[str] = ..., num_layer_weights: _Optional[int] = ..., num_context_features: _Optional[int] = ...) -> None: ...

class WarmupRequest(_message.Message):
    __slots__ = ("max_step_tokens", "max_num_sequences", "max_sequence_length", "max_kv_tokens")
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_step_tokens: int
    max_num_sequences: int
    max_sequence_length: int
    max_kv_tokens: int
    def __init__(self, max_step_tokens: _Optional[int] = ..., max_num_sequences: _Optional[int] = ..., max_sequence_length: _Optional[int] = ..., max_kv_tokens: _Optional[int] = ...) -> None: ...

class WarmupReply(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...

class VocabularyRequest(_message.Message):
    __slots__ = ("token_lengths", "token_bytes", "eos_token_ids")
    TOKEN_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_lengths: bytes
    token_bytes: bytes
    eos_token_ids: bytes
    def __init__(self, token_lengths: _Optional[bytes] = ..., token_bytes: _Optional[bytes] = ..., eos_token_ids: _Optional[bytes] = ...) -> None: ...

class VocabularyReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GrammarRequest(_message.Message):
    __slots__ = ("grammar",)
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    grammar: str
    def __init__(self, grammar: _Optional[str] = ...) -> None: ...

class GrammarReply(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SamplingParameters(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "min_p", "typical_p", "changes", "top_n_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float
    typical_p: float
    changes: LogitsChanges
    top_n_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., min_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., changes: _Optional[_Union[LogitsChanges, _Mapping]] = ..., top_n_tokens: _Optional[int] = ...) -> None: ...

class LogitsChanges(_message.Message):
    __slots__ = ("bias_token_ids", "bias_values", "has_watermark", "repetition_penalty", "share_penalty", "frequency_penalty", "presence_penalty", "banned_token_ids", "min_tokens")
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    HAS_WATERMARK_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SHARE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BANNED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    bias_token_ids: bytes
    bias_values: bytes
    has_watermark: bool
    repetition_penalty: float
    share_penalty: float
    frequency_penalty: float
    presence_penalty: float
    banned_token_ids: bytes
    min_tokens: int
    def __init__(self, bias_token_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., has_watermark: _Optional[bool] = ..., repetition_penalty: _Optional[float] = ..., share_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., banned_token_ids: _Optional[bytes] = ..., min_tokens: _Optional[int] = ...) -> None: ...

class NewSequence(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "num_prompt_tokens", "num_computed_tokens", "block_ids", "sampling", "grammar", "scores_prompt", "prompt_top_n_tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    SCORES_PROMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: bytes
    sampling: SamplingParameters
    grammar: str
    scores_prompt: bool
    prompt_top_n_tokens: int
    def __init__(self, sequence_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., grammar: _Optional[str] = ..., scores_prompt: _Optional[bool] = ..., prompt_top_n_tokens: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step", "removed_sequence_ids", "new_sequences", "grown_sequence_ids", "grown_num_blocks", "grown_block_ids", "prefill_sequence_ids", "prefill_num_tokens", "is_last")
    STEP_FIELD_NUMBER: _ClassVar[int]
    REMOVED_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    NEW_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    GROWN_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    GROWN_NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GROWN_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    step: int
    removed_sequence_ids: bytes
    new_sequences: _containers.RepeatedCompositeFieldContainer[NewSequence]
    grown_sequence_ids: bytes
    grown_num_blocks: bytes
    grown_block_ids: bytes
    prefill_sequence_ids: bytes
    prefill_num_tokens: bytes
    is_last: bool
    def __init__(self, step: _Optional[int] = ..., removed_sequence_ids: _Optional[bytes] = ..., new_sequences: _Optional[_Iterable[_Union[NewSequence, _Mapping]]] = ..., grown_sequence_ids: _Optional[bytes] = ..., grown_num_blocks: _Optional[bytes] = ..., grown_block_ids: _Optional[bytes] = ..., prefill_sequence_ids: _Optional[bytes] = ..., prefill_num_tokens: _Optional[bytes] = ..., is_last: _Optional[bool] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "sequence_ids", "token_ids", "logprobs", "failed_sequence_ids", "failure_messages", "forward_ns", "sample_ns", "step_ns", "idle_ns", "mask_ns", "top_num_tokens", "top_token_ids", "top_logprobs", "scored_sequence_ids", "scored_first_positions", "scored_num_tokens", "scored_logprobs", "scored_top_n_tokens", "scored_top_token_ids", "scored_top_logprobs")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAILED_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_NS_FIELD_NUMBER: _ClassVar[int]
    STEP_NS_FIELD_NUMBER: _ClassVar[int]
    IDLE_NS_FIELD_NUMBER: _ClassVar[int]
    MASK_NS_FIELD_NUMBER: _ClassVar[int]
    TOP_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORED_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIRST_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SCORED_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORED_TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORED_TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORED_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    step: int
    sequence_ids: bytes
    token_ids: bytes
    logprobs: bytes
    failed_sequence_ids: bytes
    failure_messages: _containers.RepeatedScalarFieldContainer[str]
    forward_ns: int
    sample_ns: int
    step_ns: int
    idle_ns: int
    mask_ns: int
    top_num_tokens: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    scored_sequence_ids: bytes
    scored_first_positions: bytes
    scored_num_tokens: bytes
    scored_logprobs: bytes
    scored_top_n_tokens: int
    scored_top_token_ids: bytes
    scored_top_logprobs: bytes
    def __init__(self, step: _Optional[int] = ..., sequence_ids: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., failed_sequence_ids: _Optional[bytes] = ..., failure_messages: _Optional[_Iterable[str]] = ..., forward_ns: _Optional[int] = ..., sample_ns: _Optional[int] = ..., step_ns: _Optional[int] = ..., idle_ns: _Optional[int] = ..., mask_ns: _Optional[int] = ..., top_num_tokens: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., scored_sequence_ids: _Optional[bytes] = ..., scored_first_positions: _Optional[bytes] = ..., scored_num_tokens: _Optional[bytes] = ..., scored_logprobs: _Optional[bytes] = ..., scored_top_n_tokens: _Optional[int] = ..., scored_top_token_ids: _Optional[bytes] = ..., scored_top_logprobs: _Optional[bytes] = ...) -> None: ...
