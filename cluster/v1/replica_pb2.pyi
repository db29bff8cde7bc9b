from cluster.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GatewayFrame(_message.Message):
    __slots__ = ("hello", "submits", "cancels", "cancels_by_name")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_BY_NAME_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    cancels: _containers.RepeatedCompositeFieldContainer[Cancel]
    cancels_by_name: _containers.RepeatedCompositeFieldContainer[CancelByName]
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., cancels: _Optional[_Iterable[_Union[Cancel, _Mapping]]] = ..., cancels_by_name: _Optional[_Iterable[_Union[CancelByName, _Mapping]]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway_id", "protocol_version")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    protocol_version: int
    def __init__(self, gateway_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("id", "prompt_token_ids", "sampling", "priority", "deadline_ms", "generation_id", "cache_salt", "emitted")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    id: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.SamplingParams
    priority: _inference_pb2.Priority
    deadline_ms: int
    generation_id: str
    cache_salt: str
    emitted: _containers.RepeatedCompositeFieldContainer[EmittedTokens]
    def __init__(self, id: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[_Union[_inference_pb2.Priority, str]] = ..., deadline_ms: _Optional[int] = ..., generation_id: _Optional[str] = ..., cache_salt: _Optional[str] = ..., emitted: _Optional[_Iterable[_Union[EmittedTokens, _Mapping]]] = ...) -> None: ...

class EmittedTokens(_message.Message):
    __slots__ = ("candidate_index", "token_ids")
    CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    candidate_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, candidate_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("id", "candidate_index")
    ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    id: int
    candidate_index: int
    def __init__(self, id: _Optional[int] = ..., candidate_index: _Optional[int] = ...) -> None: ...

class CancelByName(_message.Message):
    __slots__ = ("id", "generation_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    generation_id: str
    def __init__(self, id: _Optional[int] = ..., generation_id: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("id", "found")
    ID_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    id: int
    found: bool
    def __init__(self, id: _Optional[int] = ..., found: _Optional[bool] = ...) -> None: ...

class ReplicaFrame(_message.Message):
    __slots__ = ("hello", "load", "deltas", "failures", "cancel_replies", "cached_blocks")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    CANCEL_REPLIES_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    hello: ReplicaHello
    load: ReplicaLoad
    deltas: _containers.RepeatedCompositeFieldContainer[TokenDelta]
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    cancel_replies: _containers.RepeatedCompositeFieldContainer[CancelReply]
    cached_blocks: CachedBlocks
    def __init__(self, hello: _Optional[_Union[ReplicaHello, _Mapping]] = ..., load: _Optional[_Union[ReplicaLoad, _Mapping]] = ..., deltas: _Optional[_Iterable[_Union[TokenDelta, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., cancel_replies: _Optional[_Iterable[_Union[CancelReply, _Mapping]]] = ..., cached_blocks: _Optional[_Union[CachedBlocks, _Mapping]] = ...) -> None: ...

class ReplicaHello(_message.Message):
    __slots__ = ("replica_id", "model", "architecture", "max_model_len", "vocab_size", "dtype", "device", "kv_capacity_tokens", "protocol_version", "batch_invariant", "fingerprint", "group", "block_size", "max_num_seqs", "max_num_batched_tokens", "advertises_blocks")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADVERTISES_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model: str
    architecture: str
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str
    kv_capacity_tokens: int
    protocol_version: int
    batch_invariant: bool
    fingerprint: Fingerprint
    group: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    advertises_blocks: bool
    def __init__(self, replica_id: _Optional[str] = ..., model: _Optional[str] = ..., architecture: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., kv_capacity_tokens: _Optional[int] = ..., protocol_version: _Optional[int] = ..., batch_invariant: _Optional[bool] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., group: _Optional[str] = ..., block_size: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., advertises_blocks: _Optional[bool] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("model_digest", "weight_format", "backend", "processor", "tp_size", "pp_size", "batch_invariant")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PROCESSOR_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    weight_format: str
    backend: str
    processor: str
    tp_size: int
    pp_size: int
    batch_invariant: bool
    def __init__(self, model_digest: _Optional[str] = ..., weight_format: _Optional[str] = ..., backend: _Optional[str] = ..., processor: _Optional[str] = ..., tp_size: _Optional[int] = ..., pp_size: _Optional[int] = ..., batch_invariant: _Optional[bool] = ...) -> None: ...

class CachedBlocks(_message.Message):
    __slots__ = ("reset", "added", "removed")
    RESET_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    reset: bool
    added: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reset: _Optional[bool] = ..., added: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("running", "waiting", "free_blocks", "num_blocks", "queued_tokens", "draining", "num_gateways", "step_s", "prompt_token_s", "tokens_per_s")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    queued_tokens: int
    draining: bool
    num_gateways: int
    step_s: float
    prompt_token_s: float
    tokens_per_s: float
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., draining: _Optional[bool] = ..., num_gateways: _Optional[int] = ..., step_s: _Optional[float] = ..., prompt_token_s: _Optional[float] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("id", "candidate_index", "token_ids", "logprobs", "finish_reason", "cached_tokens", "times")
    ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    id: int
    candidate_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.PositionLogprobs]
    finish_reason: _inference_pb2.FinishReason
    cached_tokens: int
    times: StayTimes
    def __init__(self, id: _Optional[int] = ..., candidate_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., cached_tokens: _Optional[int] = ..., times: _Optional[_Union[StayTimes, _Mapping]] = ...) -> None: ...

class StayTimes(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "decode_s", "preempted_s", "num_preemptions")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    decode_s: float
    preempted_s: float
    num_preemptions: int
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., preempted_s: _Optional[float] = ..., num_preemptions: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("id", "reason", "message", "field", "num_emitted_tokens")
    class NumEmittedTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    NUM_EMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: int
    reason: str
    message: str
    field: str
    num_emitted_tokens: _containers.ScalarMap[int, int]
    def __init__(self, id: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., num_emitted_tokens: _Optional[_Mapping[int, int]] = ...) -> None: ...
