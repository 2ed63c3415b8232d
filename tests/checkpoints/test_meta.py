"""Meta folders that are right, and the many ways in which they can be wrong."""

import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    CONFIG,
    assert_equal,
    dictionary,
    meta_tensors,
    params,
    pickle_of,
    read_all,
    refused,
    split,
    storage,
    tensor,
    text,
    weights,
    whole,
    wholes,
    write_meta,
    write_pth,
)

from pronk.checkpoints.meta import read_params
from pronk.checkpoints.open import open_checkpoint
from pronk.core.config import RopeScaling
from pronk.core.errors import CheckpointError

OURS = replace(CONFIG, context=8192)
"""What params.json tells of CONFIG: it does not know the context."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_meta(tmp_path / "model")


def config_of(**changes: Any) -> Any:
    return read_params(Path("params.json"), params(**changes), {})


def write_shards(folder: Path, shards: list[dict[str, Any]], **changes: Any) -> Path:
    (folder / "params.json").write_text(json.dumps(params(**changes)))
    for number, shard in enumerate(shards):
        write_pth(folder / f"consolidated.{number:02}.pth", shard)
    return folder


def test_everything_is_read(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "meta"
        assert checkpoint.config == OURS
        assert checkpoint.metadata["unknown_key"].startswith("ignored")
        assert checkpoint.kinds() == {"F32": 21}
        assert checkpoint.nbytes == sum(w.nbytes for w in weights().values())
        assert not checkpoint.get("layers.0.wq").data.flags.owndata
    assert_equal(read_all(folder), weights())


@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_merged(tmp_path: Path, count: int) -> None:
    folder = write_shards(tmp_path, split(meta_tensors(), count))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == OURS
        assert checkpoint.nbytes == sum(w.nbytes for w in weights().values())
    assert_equal(read_all(folder), weights())


def with_copied_heads() -> list[dict[str, Any]]:
    """Four shards of a model of two key/value heads: neighbours have the same head."""
    doubled = {}
    for name, w in meta_tensors().items():
        is_kv = name.endswith(("wk.weight", "wv.weight"))
        doubled[name] = w.reshape(2, 1, 8, 32).repeat(2, 1).reshape(32, 32) if is_kv else w
    return split(doubled, 4)


def test_copied_heads_are_read_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, with_copied_heads())
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == OURS
        assert checkpoint.get("layers.1.wk").shape == (16, 32)
        assert checkpoint.nbytes == sum(w.nbytes for w in weights().values())
    assert_equal(read_all(folder), weights())


def test_heads_that_are_no_copies(tmp_path: Path) -> None:
    shards = with_copied_heads()
    shards[3]["layers.1.attention.wv.weight"][5, 7] += 1
    with open_checkpoint(write_shards(tmp_path, shards)) as checkpoint:
        checkpoint.get("layers.0.wv")
        with refused("layers.1.attention.wv.weight has 4 heads which are not 2 heads in 2 equal"):
            checkpoint.get("layers.1.wv")


def test_405b_in_16_files_has_8_heads(tmp_path: Path) -> None:
    """params.json of that release counts 16. Layers are cut to one, and matrices are views of a
    few numbers, so that the files stay small."""
    names = [name for name in meta_tensors() if "layers.1." not in name]
    shapes = {
        "tok_embeddings.weight": (2, 16384),
        "output.weight": (2, 16384),
        "layers.0.attention.wq.weight": (1024, 16384),
        "layers.0.attention.wk.weight": (128, 16384),
        "layers.0.attention.wv.weight": (128, 16384),
        "layers.0.attention.wo.weight": (16384, 1024),
        "layers.0.feed_forward.w1.weight": (1, 16384),
        "layers.0.feed_forward.w3.weight": (1, 16384),
        "layers.0.feed_forward.w2.weight": (16384, 1),
    }
    zeros = np.zeros(16384 * 1024, np.uint16)
    entries = {
        name: tensor(storage("0", zeros.size, "torch\nBFloat16Storage"), shapes.get(name, (16384,)))
        for name in names
    }
    blank = tmp_path / "consolidated.00.pth"
    write_pth(blank, {"zeros": zeros}, dictionary(entries))
    for number in range(1, 16):
        (tmp_path / f"consolidated.{number:02}.pth").symlink_to(blank)
    changes: dict[str, Any] = {
        "dim": 16384, "n_layers": 1, "n_heads": 128, "n_kv_heads": 16, "vocab_size": 32,
        "ffn_dim_multiplier": 1e-4, "multiple_of": 16,
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params(**changes)))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.n_kv_heads == 8
        assert checkpoint.get("layers.0.wk").data.shape == (1024, 16384 * 2)


def test_rows_with_gaps(tmp_path: Path) -> None:
    """A tensor that was a slice of columns when it was saved."""
    tensors = meta_tensors()
    wide = np.pad(tensors["output.weight"], ((0, 0), (3, 5)))
    entries = {
        name: tensor(storage(str(key), w.size), w.shape)
        for key, (name, w) in enumerate(tensors.items())
    }
    key = list(tensors).index("output.weight")
    entries["output.weight"] = tensor(storage(str(key), wide.size), (20, 32), (40, 1), 3)
    write_meta(tmp_path)
    write_pth(
        tmp_path / "consolidated.00.pth", tensors | {"output.weight": wide}, dictionary(entries)
    )
    assert_equal(read_all(tmp_path), weights())


def test_parameters_and_attributes(folder: Path) -> None:
    """The forms of a saved torch.nn.Module.state_dict and of its parameters."""
    tensors = meta_tensors()
    hooks = b"ccollections\nOrderedDict\n)R"
    items = b"".join(
        text(name) + b"ctorch._utils\n_rebuild_parameter\n("
        + tensor(storage(str(key), w.size), w.shape) + b"\x88" + hooks + b"tR"
        for key, (name, w) in enumerate(tensors.items())
    )  # fmt: skip
    metadata = b"}(" + text("_metadata") + hooks + b"ub"
    code = b"\x80\x02" + hooks + b"(" + items + b"u" + metadata + b"."
    write_pth(folder / "consolidated.00.pth", tensors, code)
    assert_equal(read_all(folder), weights())


def test_output_that_is_the_embedding(folder: Path) -> None:
    """Two names of the same bytes: tied, whatever the names say."""
    tensors = meta_tensors()
    entries = {
        name: tensor(storage(str(key), w.size), w.shape)
        for key, (name, w) in enumerate(tensors.items())
    }
    entries["output.weight"] = entries["tok_embeddings.weight"]
    write_pth(folder / "consolidated.00.pth", tensors, dictionary(entries))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.tied_embeddings
        assert "output" not in checkpoint.names()


def test_vocabulary_size_from_the_embedding(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, split(meta_tensors(), 2), vocab_size=-1)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.vocab_size == 20


def test_defaults() -> None:
    changes = ("n_kv_heads", "norm_eps", "rope_theta", "multiple_of", "ffn_dim_multiplier")
    config = config_of(**dict.fromkeys(changes))
    assert (config.n_kv_heads, config.norm_eps, config.rope_theta) == (4, 1e-5, 5e5)
    assert config.ffn_dim == 256


@pytest.mark.parametrize(
    ("dim", "layers", "multiplier", "multiple", "ffn", "factor"),
    [
        (4096, 32, 1.3, 1024, 14336, 8),
        (8192, 80, 1.3, 4096, 28672, 8),
        (16384, 126, 1.2, 4096, 53248, 8),
        (2048, 16, 1.5, 256, 8192, 32),
        (3072, 28, 1.0, 256, 8192, 32),
    ],
)
def test_published_shapes(
    dim: int, layers: int, multiplier: float, multiple: int, ffn: int, factor: float
) -> None:
    config = config_of(
        dim=dim, n_layers=layers, n_heads=8, ffn_dim_multiplier=multiplier, multiple_of=multiple,
        use_scaled_rope=True,
    )  # fmt: skip
    assert config.ffn_dim == ffn
    assert config.rope_scaling == RopeScaling(factor=factor)
    assert config.context == 131_072


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dim": None}, "dim is missing"),
        ({"dim": 33}, "dim 33 is no multiple of n_heads 4"),
        ({"dim": 10**300}, "dim must be below 2"),
        ({"n_heads": 0}, "no multiple of n_heads 0"),
        ({"n_layers": "x"}, "n_layers must be a whole number, got 'x'"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier 1e.300 and multiple_of 16 must be"),
        ({"multiple_of": 0}, "multiple_of 0 must be above 0"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope must be true or false"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args is set; only unquantized"),
        ({"lora_args": {"rank": 8}}, "lora_args is set"),
    ],
)
def test_refused_params(changes: dict[str, Any], match: str) -> None:
    with refused(match):
        config_of(**changes)


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, split(meta_tensors(), 4))
    (folder / "consolidated.02.pth").unlink()
    with refused("consolidated.02.pth is missing"):
        open_checkpoint(folder)


def test_shards_that_differ(tmp_path: Path) -> None:
    shards = split(meta_tensors(), 2)
    extra = shards[1] | {"extra": np.zeros(2, np.float32)}
    with refused("tensor 'extra' is in only one of shards 00 and 01"):
        open_checkpoint(write_shards(tmp_path, [shards[0], extra]))
    other = shards[1] | {"output.weight": np.zeros((9, 32), np.float32)}
    with refused(r"'output.weight' is F32 \[9, 32\], in shard 00 F32 \[10, 32\]"):
        open_checkpoint(write_shards(tmp_path, [shards[0], other]))


def test_wrong_tensors(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    some = meta_tensors()
    norm = some.pop("norm.weight")
    write_pth(path, some)
    with refused("tensor 'norm.weight' is missing"):
        open_checkpoint(folder)
    write_pth(path, some | {"norm.weight": norm[:31]})
    with refused(r"'norm.weight' has shape \[31\], the configuration asks for \[32\]"):
        open_checkpoint(folder)
    write_pth(path, some | {"norm.weight": norm, "rope.freqs": norm})
    open_checkpoint(folder).close()
    write_pth(path, some | {"norm.weight": norm, "norm.bias": norm})
    with refused("'norm.bias' is no part of a Llama model"):
        open_checkpoint(folder)


# Hostile pickles. None may run anything, whatever Python's own unpickler would do with it.


class Evil:
    """Pickles itself as a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "payload",
    [
        Evil(os.system, "touch {}"),
        Evil(eval, "open({!r}, 'w')"),
        {"norm.weight": Evil(exec, "open({!r}, 'w')")},
        [Evil(getattr, Evil(__import__, "os"), "system")],
        Evil(os.mkdir, "{}"),
    ],
    ids=["system", "eval", "nested", "getattr", "mkdir"],
)
def test_code_is_not_run(folder: Path, tmp_path: Path, payload: Any, protocol: int) -> None:
    victim = tmp_path / "victim"
    code = pickle.dumps(payload, protocol).replace(b"{!r}", b"{}").replace(b"{}", b"victim")
    write_pth(folder / "consolidated.00.pth", meta_tensors(), code)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        with refused("data.pkl (asks for|has operation|is truncated|has a string)"):
            open_checkpoint(folder)
    finally:
        os.chdir(before)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("code", "match"),
    [
        (b"cos\nsystem\n(" + text("x") + b"tR.", "asks for 'os.system'; only tensors are read"),
        (b"\x8c\x02os\x8c\x06system\x93.", "asks for 'os.system'"),
        (b"ctorch._utils\n_rebuild_tensor_v2 \n.", "asks for 'torch._utils._rebuild_tensor_v2 '"),
        (b"ctorch\nDoubleStorage\n.", "asks for 'torch.DoubleStorage'"),
        (b"(ios\nsystem\n.", r"has operation b'i'"),
        (b"\x82\x01.", r"has operation b'\\x82' at 0"),
        (b"]\x93.", "takes more from its stack than there is"),
        (b"]]\x93.", "asks for a global by something that is no name"),
        (b"", "is truncated at 0"),
        (b"X\xff\xff\xff\xffabc", "is truncated at 8"),
        (b"\x8a\xff\x01", "is truncated at 3"),
        (b"X\x02\x00\x00\x00\xff\xff.", "has a string that is not valid UTF-8"),
        (b"cos", "is truncated in a name"),
        (b".", "takes more from its stack than there is"),
        (b"(.", "takes more from its stack than there is"),
        (b"t.", "closes a list that it did not open"),
        (b"h\x07.", "refers to value 7, which it did not store"),
        (b"]r\xff\xff\xff\xffj\xff\xff\xff\xff.", "holds no dictionary of tensors"),
        (b"K\x01.", "holds no dictionary of tensors"),
        (dictionary({"a": b"K\x01"}), "'a' is no tensor"),
        (b"}(K\x01K\x02u.", "has a key that is no string but int"),
        (b"}(" + text("a") + b"u.", "fills something that is no dictionary"),
        (b"](K\x01K\x02u.", "fills something that is no dictionary"),
        (b"}(K\x01e.", "fills something that is no list"),
        (b"]}b.", "sets attributes of something that is no dictionary"),
        (b"}" + (text("a") + b"]") * 2 + b"ss.", "takes more|fills something"),
        (b"}(" + (text("a") + b"K\x01") * 2 + b"u.", "gives 'a' twice"),
        (b"ccollections\nOrderedDict\n]R.", "calls a function without a tuple"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "OrderedDict' in an unknown way"),
        (b"ctorch\nFloatStorage\n)R.", "'torch FloatStorage' in an unknown way"),
        (b"])R.", "calls 'list' in an unknown way"),
        (b"ctorch._utils\n_rebuild_parameter\n(]tR.", "_rebuild_parameter' in an unknown way"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(]]]]]]tR.", "has a tensor of an unknown form"),
        (text("storage") + b"Q.", "has a storage of an unknown form"),
        (storage("99", 1) + b".", "refers to storage '99', which is not in the zip"),
        (storage("../data.pkl", 1) + b".", "which is not in the zip"),
        (storage("0", 1 << 70) + b".", "wants 1180591620717411303424 of F32 from 2560 bytes"),
        (storage("0", 641) + b".", "wants 641 of F32 from 2560 bytes of '0'"),
        (storage("0", -1) + b".", "wants -1 of F32"),
    ],
)
def test_hostile_pickle(folder: Path, code: bytes, match: str) -> None:
    write_pth(folder / "consolidated.00.pth", meta_tensors(), code)
    with refused(match):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "match"),
    [
        ((20, 32), (32, 1), 1, r"shape \[20, 32\] at 1 of 640 elements"),
        ((20, 32), (32, 1), 1 << 62, "of 640 elements"),
        ((20, 32), (33, 1), 0, "of 640 elements"),
        ((20, 32), (1, 20), 0, r"strides \[1, 20\]"),
        ((20, 32), (0, 1), 0, r"strides \[0, 1\]"),
        ((1 << 40, 1 << 40), (0, 0), 0, r"strides \[0, 0\]"),
        ((20, 32), (-32, 1), 0, "unknown form"),
        ((20, 32), (32,), 0, "unknown form"),
        ((20, 32), (32, 1), -1, "unknown form"),
        ((0, 32), (32, 1), 0, r"has a tensor of shape \[0, 32\]; Llama has none"),
        ((2, 10, 32), (320, 32, 1), 0, "Llama has none"),
        ((1 << 70,), (1,), 0, "unknown form"),
    ],
)
def test_tensors_stay_in_their_storage(
    folder: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, match: str
) -> None:
    code = dictionary({"output.weight": tensor(storage("0", 640), shape, stride, offset)})
    write_pth(folder / "consolidated.00.pth", meta_tensors(), code)
    with refused(match):
        open_checkpoint(folder)


def test_pickle_that_doubles_itself(folder: Path) -> None:
    """Tuples of tuples that would be 2^60 elements when written out, as value and as key."""
    doubled = b")" + b"q\x00h\x00\x86" * 60
    for code, match in (
        (doubled + b".", "holds no dictionary"),
        (b"}(" + doubled + b"K\x01u.", "has a key that is no string but tuple"),
        (doubled + b"Q.", "has a storage of an unknown form"),
    ):
        write_pth(folder / "consolidated.00.pth", meta_tensors(), code)
        with refused(match):
            open_checkpoint(folder)


# The zip around the pickle.


def test_compressed_members(folder: Path) -> None:
    bomb = {"zeros": np.zeros(1 << 22, np.float32)}
    write_pth(folder / "consolidated.00.pth", bomb, compression=zipfile.ZIP_DEFLATED)
    with refused("'archive/data.pkl' is compressed or encrypted"):
        open_checkpoint(folder)


def test_pickle_over_the_limit(folder: Path) -> None:
    write_pth(folder / "consolidated.00.pth", {}, bytes(1 << 20))
    path = folder / "consolidated.00.pth"
    with refused(r"data.pkl has operation b'\\x00' at 0"):
        open_checkpoint(folder)
    with zipfile.ZipFile(path, "w") as archive, archive.open("a/data.pkl", "w") as member:
        for _ in range(65):
            member.write(bytes(1 << 20))
    with refused("data.pkl has 68157440 bytes, at most 67108864"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a/data/0"], "0 data.pkl in the zip, expected one"),
        (["a/data.pkl", "b/data.pkl"], "2 data.pkl in the zip, expected one"),
        (["../../data.pkl"], "is truncated at 0"),
    ],
)
def test_members(folder: Path, names: list[str], match: str) -> None:
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with refused(match):
        open_checkpoint(folder)


def test_member_twice(folder: Path) -> None:
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(folder / "consolidated.00.pth", "a") as archive,
    ):
        archive.writestr("archive/data/3", b"other")
    with refused("'archive/data/3' is in the zip twice"):
        open_checkpoint(folder)


def test_big_endian(folder: Path) -> None:
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle_of({}))
        archive.writestr("a/byteorder", "big")
    with refused("byte order b'big'; only little is read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("blob", "match"),
    [
        (b"", "the file is empty"),
        (b"\x80\x02}q\x00.", "an old pickle that is no zip; load and save it again"),
        (b"GGUF1234", r"not a .pth of torch.save: it starts with b'GGUF'"),
        (b"PK\x03\x04", "truncated or damaged zip"),
    ],
)
def test_no_zip(folder: Path, blob: bytes, match: str) -> None:
    (folder / "consolidated.00.pth").write_bytes(blob)
    with refused(match):
        open_checkpoint(folder)


def test_truncated_anywhere(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    size = path.stat().st_size
    for cut in [*range(size - 1, size - 100, -1), *range(size - 100, 64, -511), *range(64, 0, -1)]:
        os.truncate(path, cut)
        with pytest.raises(CheckpointError, match=r"truncated or damaged zip|not a \.pth"):
            open_checkpoint(folder)


def test_integers_of_every_length() -> None:
    """The test's own pickles are what they claim to be."""
    for value in (0, -1, 1 << 31, -(1 << 40), 1 << 70):
        assert pickle.loads(whole(value) + b".") == value
    assert pickle.loads(wholes([1, 2]) + b".") == (1, 2)
