"""The models of a server: their names, and loading and unloading them as they are asked for.

A model is loaded by the first request that names it and stays until memory is short (or it was
unused for as long as the settings say); one that is in use is never unloaded. Names are those of
the catalog, the path's or the hub's, all aliases that users know, and the names of LoRA adapters.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pronk import __version__
from pronk.checkpoints.catalog import CatalogEntry, ModelRef, resolve_model
from pronk.core.errors import MemoryLimitError, UserError
from pronk.engine.llm import LLM
from pronk.server.errors import ApiError
from pronk.server.metrics import Metrics
from pronk.server.worker import Worker

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5
_LATEST = ":latest"
"""What some clients add to every name."""


@dataclass(slots=True)
class Loaded:
    """A model in memory."""

    llm: LLM
    worker: Worker
    fingerprint: str
    """Changes when the same seed may give another answer."""


@dataclass(slots=True)
class Entry:
    """A model that may be asked for."""

    name: str
    ref: ModelRef
    aliases: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `LLM`."""
    adapters: dict[str, Path] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    loaded: Loaded | None = None
    was_loaded: bool = False
    users: int = 0
    last_used: float = 0.0
    keep_alive: float | None = None
    """Seconds without use after which it is unloaded, if somebody has asked for it (infinity: not
    at all); forgotten when it was unloaded. None: what the settings say."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is loaded or unloaded."""
    loading: asyncio.Task[None] | None = None
    """All who want it while it is being loaded wait for this."""

    @property
    def catalog(self) -> CatalogEntry | None:
        return self.ref.entry


class Lease:
    """A loaded model in use; it stays in memory until `release`, which may be called again."""

    def __init__(self, entry: Entry, loaded: Loaded, name: str, adapter: str | None) -> None:
        self._entry: Entry | None = entry
        entry.users += 1
        self.llm = loaded.llm
        self.worker = loaded.worker
        self.fingerprint = loaded.fingerprint
        self.name = name
        """As it is shown: the model's, or the adapter's."""
        self.model = entry.name
        self.adapter = adapter

    def release(self) -> None:
        if self._entry is not None:
            self._entry.users -= 1
            self._entry.last_used = time.monotonic()
            self._entry = None


class Models:
    """`sources`: what `LLM` takes, the first of which is the default; `options`: arguments of `LLM`
    for all of them; `aliases`: further names; `adapters` and `draft`: of the first model."""

    def __init__(
        self,
        sources: Sequence[str],
        options: Mapping[str, Any],
        metrics: Metrics,
        *,
        aliases: Mapping[str, str] | None = None,
        adapters: Mapping[str, Path] | None = None,
        draft: str | None = None,
    ) -> None:
        self._metrics = metrics
        self._entries: dict[str, Entry] = {}
        for source in sources:
            entry = _entry(source, options)
            if entry.name in self._entries:
                raise UserError(f"MODEL: {entry.name!r} is given twice")
            self._entries[entry.name] = entry
        if draft is not None:
            self.default.options = {**options, "draft": draft}
        self._names = self._all_names()
        for alias, name in (aliases or {}).items():
            self._names[alias.casefold()] = self.find(name)[0].name
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        for name, path in (adapters or {}).items():
            self._check_new(name)
            self.default.adapters[name] = path

    @property
    def default(self) -> Entry:
        return next(iter(self._entries.values()))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, name: str) -> tuple[Entry, str | None]:
        """The model, and the adapter if that was named; ApiError 404 for an unknown name."""
        for entry in self._entries.values():
            if name in entry.adapters:
                return entry, name
        plain = name.casefold()
        found = self._names.get(plain) or self._names.get(plain.removesuffix(_LATEST))
        if found is None:
            known = [*self._entries, *(a for e in self for a in e.adapters)]
            raise ApiError(
                404, f"model: {name!r:.200} is not served here; served are {', '.join(known)}",
                param="model", code="model_not_found",
            )  # fmt: skip
        return self._entries[found], None

    async def acquire(self, name: str) -> Lease:
        """A model by any of its names, loaded if it was not. ApiError 404 for an unknown one, 503
        where there is no room for it now."""
        entry, adapter = self.find(name)
        entry.users += 1  # so that nobody unloads it before there is a lease
        try:
            while entry.loaded is None:
                if entry.loading is None:
                    entry.loading = self._begin(self._load(entry))
                await asyncio.shield(entry.loading)
            return Lease(entry, entry.loaded, adapter or entry.name, adapter)
        finally:
            entry.users -= 1

    async def unload(self, name: str) -> bool:
        """Frees a model's memory; False if it was not loaded. ApiError 409 while it is in use."""
        entry, _ = self.find(name)
        async with entry.lock:
            if entry.loaded is None:
                return False
            if entry.users:
                raise ApiError(
                    409, f"model: {entry.name} is in use by {entry.users} requests", param="model",
                    code="model_in_use",
                )  # fmt: skip
            await self._free(entry)
            return True

    async def unload_idle(self, seconds: float | None) -> None:
        """Unloads what nobody has used for so long (None: only where somebody asked for it)."""
        for entry in self:
            if entry.loaded and _is_idle(entry, seconds):
                async with entry.lock:
                    if entry.loaded and _is_idle(entry, seconds):
                        await self._free(entry)

    def stop(self) -> None:
        """Ends all answers that are on their way, with an error that says so."""
        error = ApiError(
            503, "the server is stopping", code="overloaded",
            headers={"Retry-After": str(_RETRY_SECONDS)},
        )  # fmt: skip
        for entry in self:
            if entry.loaded:
                entry.loaded.worker.stop(error)

    async def close(self) -> None:
        """Ends all requests and frees all models."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self:
            if entry.loaded:
                await self._free(entry)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Does what must not end in the middle when whoever asked for it is cancelled: the thread
        behind it goes on in any case."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, entry: Entry) -> None:
        try:
            async with entry.lock:
                entry.loaded = await self._made(entry)
                entry.was_loaded = True
        finally:
            entry.loading = None

    async def _made(self, entry: Entry) -> Loaded:
        async with self._loading:  # one at a time: each looks at the memory that is free
            log.info("loading", extra={"fields": {"model": entry.name}})
            started = time.monotonic()
            while True:
                try:
                    llm = await asyncio.to_thread(_make, entry, self._promised())
                    break
                except MemoryLimitError as error:
                    if not await self._make_room():
                        raise self._no_room(error) from error
            loaded = Loaded(llm, Worker(llm.engine, entry.name), _fingerprint(entry, llm))
            self._metrics.watch(
                entry.name, llm.engine.stats, disk=lambda: llm.disk_stats,
                adapters=lambda: len(entry.adapters),
            )  # fmt: skip
            seconds = round(time.monotonic() - started, 2)
            fields = {"model": entry.name, "seconds": seconds, "context": llm.context}
            log.info("loaded", extra={"fields": fields})
            return loaded

    def _promised(self) -> int:
        """Bytes of KV caches that loaded models were promised and have not touched yet."""
        return sum(entry.loaded.llm.untouched_bytes for entry in self if entry.loaded)

    def _no_room(self, error: MemoryLimitError) -> Exception:
        if any(entry.loaded for entry in self):
            return ApiError(
                503, f"{error}; other models are in use", code="model_capacity",
                headers={"Retry-After": str(_RETRY_SECONDS)},
            )  # fmt: skip
        return error

    async def _make_room(self) -> bool:
        """Unloads the model that was unused for longest; False if all are in use."""
        idle = [entry for entry in self if entry.loaded and not entry.users]
        if not idle:
            return False
        await self._free(min(idle, key=lambda entry: entry.last_used))
        return True

    async def _free(self, entry: Entry) -> None:
        loaded, entry.loaded = entry.loaded, None
        assert loaded is not None
        entry.keep_alive = None
        self._metrics.unwatch(entry.name)
        await asyncio.shield(self._begin(_close(loaded)))
        log.info("unloaded", extra={"fields": {"model": entry.name}})

    # Adapters.

    async def load_adapter(self, name: str, path: Path, base: str | None = None) -> Entry:
        """Makes a PEFT folder usable under `name` as a model."""
        self._check_new(name)
        entry = self.default if base is None else self.find(base)[0]
        lease = await self.acquire(entry.name)
        try:
            await asyncio.shield(self._begin(self._add_adapter(entry, lease.llm, name, path)))
        finally:
            lease.release()
        return entry

    async def _add_adapter(self, entry: Entry, llm: LLM, name: str, path: Path) -> None:
        async with self._loading:  # models look at the memory that is free, too
            self._check_new(name)  # once more: somebody else may have been faster
            others = self._promised() - llm.untouched_bytes
            await asyncio.to_thread(llm.load_adapter, name, path, keep_free=others)
            entry.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        entry, adapter = self.find(name)
        if adapter is None:
            raise ApiError(404, f"lora_name: {name!r:.100} is no adapter", param="lora_name")
        await asyncio.shield(self._begin(self._drop_adapter(entry, name)))

    async def _drop_adapter(self, entry: Entry, name: str) -> None:
        async with entry.lock:  # a model that is being loaded will have it
            if entry.loaded and name in entry.loaded.llm.adapters:
                try:
                    await asyncio.to_thread(entry.loaded.llm.unload_adapter, name)
                except UserError as error:
                    raise ApiError(
                        409, str(error), param="lora_name", code="adapter_in_use"
                    ) from None
            entry.adapters.pop(name, None)

    def _check_new(self, name: str) -> None:
        taken = name.casefold() in self._names or any(name in entry.adapters for entry in self)
        if taken or not name.strip():
            raise ApiError(400, f"lora_name: {name!r:.100} is taken or empty", param="lora_name")

    def _all_names(self) -> dict[str, str]:
        """Every name in small letters; where two models would share one, nobody has it."""
        names: dict[str, str] = {}
        shared: set[str] = set()
        for entry in self:
            for name in {alias.casefold() for alias in (entry.name, *entry.aliases)}:
                if names.setdefault(name, entry.name) != entry.name:
                    shared.add(name)
        return {n: owner for n, owner in names.items() if n not in shared or n == owner.casefold()}


async def _close(loaded: Loaded) -> None:
    await asyncio.to_thread(loaded.worker.close)
    await asyncio.to_thread(loaded.llm.close)


def _make(entry: Entry, keep_free: int) -> LLM:
    source = entry.ref.path or entry.ref.text
    adapters = dict(entry.adapters)
    gone = [name for name, path in adapters.items() if entry.was_loaded and not path.is_dir()]
    for name in gone:  # the base model is of use without it
        del adapters[name]
        log.error("the folder of an adapter is gone", extra={"fields": {"adapter": name}})
    return LLM(source, keep_free=keep_free, adapters=adapters, progress=_noted, **entry.options)


def _noted(done: int, total: int, what: str) -> None:
    """Progress that knows no total is a notice, such as that the disk takes no more blocks."""
    if total == 0:
        log.warning("%s", what)


def _is_idle(entry: Entry, seconds: float | None) -> bool:
    limit = seconds if entry.keep_alive is None else entry.keep_alive
    if limit is None or entry.users:
        return False
    return time.monotonic() - entry.last_used >= limit


def _entry(source: str, options: Mapping[str, Any]) -> Entry:
    ref = resolve_model(source)
    aliases = [ref.path.name if ref.path else source]  # where it lies is nobody's business
    if ref.entry:
        aliases += [*ref.entry.aliases, ref.entry.title]
    if ref.repo:
        aliases.append(ref.repo)
    return Entry(ref.name, ref, tuple(dict.fromkeys(aliases)), options)


def _fingerprint(entry: Entry, llm: LLM) -> str:
    parts = f"{__version__} {entry.name} {llm.backend_name} {llm.kv_dtype} {llm.identity}"
    return "pronk_" + hashlib.blake2b(parts.encode(), digest_size=6).hexdigest()


@asynccontextmanager
async def leased(models: Models, name: str) -> AsyncIterator[Lease]:
    """A lease that ends with the block."""
    lease = await models.acquire(name)
    try:
        yield lease
    finally:
        lease.release()
