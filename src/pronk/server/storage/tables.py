"""The tables of the stored state, and how an older database becomes one of today.

Every table of objects has `seq`, which only grows: lists are ordered by it, so a page follows its
cursor even where many objects were made in one second. Texts that clients choose live in JSON
columns only (JSON is ASCII there): PostgreSQL's text holds no NUL and SQLite's no half of a
surrogate pair.

To change a table: raise VERSION, change the table here, and add to MIGRATIONS what turns a database
of the version before into this one. Steps are never edited once released.
"""

from collections.abc import Callable, Mapping

import sqlalchemy as sa

from pronk.core.errors import UserError

VERSION = 1
MIGRATIONS: Mapping[int, Callable[[sa.Connection], None]] = {}
"""By version: the step from it to the next one."""

TABLES = sa.MetaData()
_SEQ = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up INTEGER keys only
_JSON = sa.JSON(none_as_null=True)


def _seq() -> sa.Column[int]:
    return sa.Column("seq", _SEQ, primary_key=True, autoincrement=True)


def _id(name: str = "id") -> sa.Column[str]:
    return sa.Column(name, sa.String(80), nullable=False, unique=True)


def _text(name: str, length: int = 80, *, optional: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=optional)


def _time(name: str, *, optional: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=optional)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _json(name: str, *, optional: bool = False) -> sa.Column[object]:
    return sa.Column(name, _JSON, nullable=optional)


schema_version = sa.Table("schema_version", TABLES, sa.Column("version", sa.Integer))

instances = sa.Table(
    "instances",
    TABLES,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("seen_at", sa.Float, nullable=False),
)
"""Server processes that use this database, and when each last said that it lives."""

files = sa.Table(
    "files",
    TABLES,
    _seq(),
    _id(),
    _text("owner"),
    _time("created_at"),
    _time("expires_at", optional=True),
    _text("purpose", 40),
    _count("bytes"),
    _json("filename"),
    sa.Index("files_by_owner", "owner", "seq"),
    sa.Index("files_by_expiry", "expires_at"),
    sqlite_autoincrement=True,
)

batches = sa.Table(
    "batches",
    TABLES,
    _seq(),
    _id(),
    _text("owner"),
    _text("input_file_id"),
    _text("endpoint"),
    _text("completion_window"),
    _text("status", 20),
    _json("metadata", optional=True),
    _json("errors", optional=True),
    _json("model", optional=True),
    _time("output_expires_after", optional=True),
    _text("output_file_id", optional=True),
    _text("error_file_id", optional=True),
    *(_count(name) for name in ("total", "completed", "failed")),
    *(_count(name) for name in ("input_tokens", "cached_tokens", "output_tokens")),
    _time("created_at"),
    _time("expires_at"),
    *(
        _time(f"{state}_at", optional=True)
        for state in ("in_progress", "finalizing", "completed", "failed", "expired",
                      "cancelling", "cancelled")
    ),
    _text("runner", optional=True),
    sa.Index("batches_by_owner", "owner", "seq"),
    sa.Index("batches_by_status", "status"),
    sa.Index("batches_by_input", "input_file_id"),
    sqlite_autoincrement=True,
)  # fmt: skip
"""`runner`: the instance that runs the batch. The ids of output files are reserved here before the
files are there."""

batch_lines = sa.Table(
    "batch_lines",
    TABLES,
    sa.Column("batch_id", sa.String(80), sa.ForeignKey("batches.id", ondelete="CASCADE")),
    sa.Column("line", sa.Integer),
    sa.Column("ok", sa.Boolean, nullable=False),
    _json("output"),
    sa.PrimaryKeyConstraint("batch_id", "line"),
)
"""Finished lines of batches that still run: what will stand in the output or the error file."""

responses = sa.Table(
    "responses",
    TABLES,
    _seq(),
    _id(),
    _text("owner"),
    _time("created_at"),
    _json("model"),
    _text("status", 20),
    _text("previous_response_id", optional=True),
    _text("conversation_id", optional=True),
    _text("runner", optional=True),
    _json("body"),
    _json("input"),
    _json("state", optional=True),
    sa.Index("responses_by_owner", "owner", "seq"),
    sa.Index("responses_by_runner", "runner"),
    sqlite_autoincrement=True,
)
"""`runner`: the instance that still works on it. `state`: what the server wants to remember and no
client sees."""

conversations = sa.Table(
    "conversations",
    TABLES,
    _seq(),
    _id(),
    _text("owner"),
    _time("created_at"),
    _json("metadata"),
    sa.Index("conversations_by_owner", "owner", "seq"),
    sqlite_autoincrement=True,
)

conversation_items = sa.Table(
    "conversation_items",
    TABLES,
    _seq(),
    sa.Column(
        "conversation_id",
        sa.ForeignKey("conversations.id", ondelete="CASCADE"),
        nullable=False,
    ),
    _text("id"),
    _time("created_at"),
    _json("body"),
    sa.UniqueConstraint("conversation_id", "id"),
    sa.Index("items_by_conversation", "conversation_id", "seq"),
    sqlite_autoincrement=True,
)

chat_completions = sa.Table(
    "chat_completions",
    TABLES,
    _seq(),
    _id(),
    _text("owner"),
    _time("created_at"),
    _json("model"),
    _text("model_digest", 64),
    _json("metadata"),
    _json("body"),
    _json("messages"),
    sa.Index("chats_by_owner", "owner", "seq"),
    sqlite_autoincrement=True,
)

chat_metadata = sa.Table(
    "chat_metadata",
    TABLES,
    sa.Column("chat_id", sa.ForeignKey("chat_completions.id", ondelete="CASCADE")),
    sa.Column("digest", sa.String(64)),
    sa.PrimaryKeyConstraint("chat_id", "digest"),
    sa.Index("chats_by_metadata", "digest"),
)
"""A digest of every name and text of a chat's metadata, to find chats by them."""

usage = sa.Table(
    "usage",
    TABLES,
    sa.Column("owner", sa.String(80)),
    sa.Column("day", sa.String(10)),
    _count("requests"),
    _count("prompt_tokens"),
    _count("completion_tokens"),
    sa.PrimaryKeyConstraint("owner", "day"),
)
"""`day`: YYYY-MM-DD in UTC."""


def migrate(
    connection: sa.Connection,
    version: int = VERSION,
    steps: Mapping[int, Callable[[sa.Connection], None]] = MIGRATIONS,
) -> None:
    """Makes the tables, or brings those of an older version up to `version`, in the transaction of
    `connection`: all of it or nothing."""
    if not sa.inspect(connection).has_table(schema_version.name):
        TABLES.create_all(connection)
        connection.execute(schema_version.insert().values(version=version))
        return
    found = connection.execute(sa.select(schema_version.c.version)).scalar_one()
    if found > version:
        raise UserError(
            f"database: it has version {found}, made by a newer Pronk; this one knows {version}"
        )
    for step in range(found, version):
        steps[step](connection)
    connection.execute(schema_version.update().values(version=version))
