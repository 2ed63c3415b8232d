"""What a server is started with. Everything has a default: `pronk serve` needs no flag."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pronk.checkpoints.cache import cache_root


@dataclass(frozen=True, slots=True)
class ServerSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: Path = field(default_factory=lambda: cache_root() / "server")
    """Stored objects, files, batches."""
    database: str | None = None
    """SQLAlchemy URL; None: SQLite in `data_dir`."""
    api_key_file: Path | None = None
    control_token: str | None = None
    """Opens the control routes where there is no key file; None: they stay shut."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of models."""
    max_body_bytes: int = 16 << 20
    max_file_bytes: int = 512 << 20
    max_schema_bytes: int = 256 << 10
    max_queue: int = 256
    """Requests in flight, running or waiting; more are refused with 503."""
    request_timeout: float | None = None
    """Seconds until a request is ended, wherever it stands; None: never."""
    drain_seconds: float = 30.0
    """How long requests in flight may go on once the server is told to stop."""
    batch_concurrency: int = 32
    """Lines of batches that are in the engine at a time."""
    idle_unload: float | None = None
    """Seconds without a request after which a model is unloaded; None: when memory is short."""
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: str | None = None
    """Where OpenTelemetry traces go; None: nowhere."""
    share_prompts: bool = False
    """Whether keys share what was computed for prompts that begin alike."""
    allow_hosts: tuple[str, ...] = ()
    """Names by which a server without keys may be called, beside addresses and local names."""
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages elsewhere that may call this server (CORS)."""
