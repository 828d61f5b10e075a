from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_UINT8: _ClassVar[ImageFormat]
    IMAGE_FORMAT_FLOAT32: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG_GRID: _ClassVar[ImageFormat]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BULK: _ClassVar[Priority]

class VersionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERSION_STATE_UNSPECIFIED: _ClassVar[VersionState]
    VERSION_STATE_UNLOADED: _ClassVar[VersionState]
    VERSION_STATE_LOADING: _ClassVar[VersionState]
    VERSION_STATE_READY: _ClassVar[VersionState]
    VERSION_STATE_UNREADY: _ClassVar[VersionState]
    VERSION_STATE_DRAINING: _ClassVar[VersionState]
    VERSION_STATE_FAILED: _ClassVar[VersionState]
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_UINT8: ImageFormat
IMAGE_FORMAT_FLOAT32: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_PNG_GRID: ImageFormat
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BULK: Priority
VERSION_STATE_UNSPECIFIED: VersionState
VERSION_STATE_UNLOADED: VersionState
VERSION_STATE_LOADING: VersionState
VERSION_STATE_READY: VersionState
VERSION_STATE_UNREADY: VersionState
VERSION_STATE_DRAINING: VersionState
VERSION_STATE_FAILED: VersionState

class GenerateRequest(_message.Message):
    __slots__ = ("model", "version", "count", "seed", "start", "latents", "format", "priority", "labels", "truncation", "latent_size")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    LATENT_SIZE_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    count: int
    seed: int
    start: int
    latents: bytes
    format: ImageFormat
    priority: Priority
    labels: _containers.RepeatedScalarFieldContainer[int]
    truncation: float
    latent_size: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., count: _Optional[int] = ..., seed: _Optional[int] = ..., start: _Optional[int] = ..., latents: _Optional[bytes] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., labels: _Optional[_Iterable[int]] = ..., truncation: _Optional[float] = ..., latent_size: _Optional[int] = ...) -> None: ...

class GenerateStreamRequest(_message.Message):
    __slots__ = ("model", "version", "count", "seed", "start", "chunk", "format", "priority", "labels", "truncation")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    count: int
    seed: int
    start: int
    chunk: int
    format: ImageFormat
    priority: Priority
    labels: _containers.RepeatedScalarFieldContainer[int]
    truncation: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., count: _Optional[int] = ..., seed: _Optional[int] = ..., start: _Optional[int] = ..., chunk: _Optional[int] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., labels: _Optional[_Iterable[int]] = ..., truncation: _Optional[float] = ...) -> None: ...

class Address(_message.Message):
    __slots__ = ("seed", "index")
    SEED_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    seed: int
    index: int
    def __init__(self, seed: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class InterpolateRequest(_message.Message):
    __slots__ = ("model", "version", "begin", "end", "steps", "labels", "truncation", "format", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    begin: Address
    end: Address
    steps: int
    labels: _containers.RepeatedScalarFieldContainer[int]
    truncation: float
    format: ImageFormat
    priority: Priority
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., begin: _Optional[_Union[Address, _Mapping]] = ..., end: _Optional[_Union[Address, _Mapping]] = ..., steps: _Optional[int] = ..., labels: _Optional[_Iterable[int]] = ..., truncation: _Optional[float] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("images", "model", "version", "seed", "start", "count", "height", "width", "format", "timing", "labels", "digest")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    model: str
    version: int
    seed: int
    start: int
    count: int
    height: int
    width: int
    format: ImageFormat
    timing: Timing
    labels: _containers.RepeatedScalarFieldContainer[int]
    digest: str
    def __init__(self, images: _Optional[_Iterable[bytes]] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., seed: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., labels: _Optional[_Iterable[int]] = ..., digest: _Optional[str] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_seconds", "compute_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    compute_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "default_model")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODEL_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelSummary]
    default_model: str
    def __init__(self, models: _Optional[_Iterable[_Union[ModelSummary, _Mapping]]] = ..., default_model: _Optional[str] = ...) -> None: ...

class ModelSummary(_message.Message):
    __slots__ = ("name", "version", "ready", "default_version", "traffic_share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    ready: bool
    default_version: bool
    traffic_share: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., ready: bool = ..., default_version: bool = ..., traffic_share: _Optional[float] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("summary", "architecture", "latent_size", "latent_distribution", "height", "width", "provider", "digest", "limits", "training_json", "parity_json", "precision", "labels", "quality_json", "batch_invariant", "tolerance")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    LATENT_SIZE_FIELD_NUMBER: _ClassVar[int]
    LATENT_DISTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_JSON_FIELD_NUMBER: _ClassVar[int]
    PARITY_JSON_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_JSON_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    summary: ModelSummary
    architecture: str
    latent_size: int
    latent_distribution: str
    height: int
    width: int
    provider: str
    digest: str
    limits: Limits
    training_json: str
    parity_json: str
    precision: str
    labels: int
    quality_json: str
    batch_invariant: bool
    tolerance: Tolerance
    def __init__(self, summary: _Optional[_Union[ModelSummary, _Mapping]] = ..., architecture: _Optional[str] = ..., latent_size: _Optional[int] = ..., latent_distribution: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., provider: _Optional[str] = ..., digest: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., training_json: _Optional[str] = ..., parity_json: _Optional[str] = ..., precision: _Optional[str] = ..., labels: _Optional[int] = ..., quality_json: _Optional[str] = ..., batch_invariant: bool = ..., tolerance: _Optional[_Union[Tolerance, _Mapping]] = ...) -> None: ...

class Tolerance(_message.Message):
    __slots__ = ("images", "pixel_levels", "pixel_identical_share")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PIXEL_LEVELS_FIELD_NUMBER: _ClassVar[int]
    PIXEL_IDENTICAL_SHARE_FIELD_NUMBER: _ClassVar[int]
    images: float
    pixel_levels: int
    pixel_identical_share: float
    def __init__(self, images: _Optional[float] = ..., pixel_levels: _Optional[int] = ..., pixel_identical_share: _Optional[float] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_count", "max_count_float32", "max_batch_size", "max_queue_images")
    MAX_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_COUNT_FLOAT32_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_IMAGES_FIELD_NUMBER: _ClassVar[int]
    max_count: int
    max_count_float32: int
    max_batch_size: int
    max_queue_images: int
    def __init__(self, max_count: _Optional[int] = ..., max_count_float32: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., max_queue_images: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionStatus]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionStatus, _Mapping]]] = ...) -> None: ...

class VersionStatus(_message.Message):
    __slots__ = ("model", "version", "state", "reason", "digest", "traffic_share", "calls", "queued_images")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_SHARE_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_IMAGES_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    state: VersionState
    reason: str
    digest: str
    traffic_share: float
    calls: int
    queued_images: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., state: _Optional[_Union[VersionState, str]] = ..., reason: _Optional[str] = ..., digest: _Optional[str] = ..., traffic_share: _Optional[float] = ..., calls: _Optional[int] = ..., queued_images: _Optional[int] = ...) -> None: ...
