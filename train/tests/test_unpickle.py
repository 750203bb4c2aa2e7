"""Real files of torch.save, and files made to do harm."""
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import TRAIN  # noqa: F401
from safetensors.torch import load_file

from lacuna_train.unpickle import Reader, Refused, Shard, convert


def weights(seed=0):
    torch.manual_seed(seed)
    shared = torch.randn(10, 6)
    return OrderedDict([
        ("model.a.weight", torch.randn(7, 5).to(torch.bfloat16)), ("model.a.bias", torch.randn(7).half()),
        ("model.b.weight", torch.randn(3, 4, 2)), ("scalar", torch.tensor(3.5)), ("nothing", torch.zeros(0, 4)),
        ("turned", torch.randn(4, 6).T), ("part", shared[3:7, 1:4]), ("whole", shared), ("tied", shared),
        ("codes", torch.arange(-4, 4, dtype=torch.int8)), ("ids", torch.arange(5)), ("mask", torch.tensor([True, False]))])


def save(folder, parts):
    folder.mkdir(exist_ok=True)
    names = ["pytorch_model.bin"] if len(parts) == 1 else [
        f"pytorch_model-{i + 1:05d}-of-{len(parts):05d}.bin" for i in range(len(parts))]
    for name, part in zip(names, parts):
        torch.save(part, folder / name)
    (folder / "config.json").write_text('{"model_type": "gla_swa"}')
    (folder / "merges.txt").write_text("a b\n")
    return names


def equal(tensors, path_or_tensors):
    assert set(tensors) == set(path_or_tensors)
    for name, tensor in tensors.items():
        assert path_or_tensors[name].dtype == tensor.dtype and torch.equal(path_or_tensors[name], tensor), name


def test_one_file_of_every_kind_of_tensor(tmp_path):
    save(tmp_path / "in", [weights()])
    convert(tmp_path / "in", tmp_path / "out")
    equal(weights(), load_file(tmp_path / "out" / "model.safetensors"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "merges.txt", "model.safetensors"]


def test_shards_with_an_index(tmp_path):
    first = {"a": torch.randn(5, 5).bfloat16(), "b": torch.randn(3)}
    second = {"state_dict": {"c": torch.randn(300, 200).half()}}
    names = save(tmp_path / "in", [first, second])
    index = tmp_path / "in" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[0], "c": names[1]}}))
    assert convert(tmp_path / "in", tmp_path / "out") == (3, 50 + 12 + 120000)
    table = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert table["metadata"]["total_size"] == 120062 and len(set(table["weight_map"].values())) == 2
    merged = {}
    for name in set(table["weight_map"].values()):
        merged |= load_file(tmp_path / "out" / name)
    equal(first | second["state_dict"], merged)
    for damage in ({"a": names[0], "b": names[0]}, {"a": names[0], "b": names[0], "c": "../other.bin"}):
        index.write_text(json.dumps({"weight_map": damage}))
        with pytest.raises(Refused, match="index"):
            convert(tmp_path / "in", tmp_path / "worse")
        assert not list((tmp_path / "worse").glob("*"))


def archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED, names=("archive/data.pkl",)):
    with zipfile.ZipFile(path, "w", compression) as out:
        for name in names:
            out.writestr(name, pickled)
        for key, raw in storages:
            out.writestr(f"archive/data/{key}", raw)
    return path


class Runs:
    """Unpickling this by Python would run a command."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function, name", [(os.system, "system"), (eval, "eval"), (__import__, "__import__"),
                                            (exec, "exec"), (getattr, "getattr")])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_hostile_pickle_is_refused_without_running(tmp_path, function, name, protocol):
    trace = tmp_path / "it_ran"
    code = {"system": f"touch {trace}", "eval": f"open({str(trace)!r}, 'w')", "exec": f"open({str(trace)!r}, 'w')"}
    arguments = (code[name],) if name in code else ((os, "system") if name == "getattr" else ("os",))
    if name == "getattr":
        arguments = ("os", "system")
    raw = pickle.dumps({"weight": Runs(function, *arguments)}, protocol=protocol)
    path = archive(tmp_path / "pytorch_model.bin", raw)
    with pytest.raises(Refused, match=r"asks for|the pickle uses"):
        Shard(path)
    assert not trace.exists()
    if name == "system" and protocol == 2:  # the same bytes do run where nobody looks
        pickle.loads(raw)
        assert trace.exists()


def persistent(kind, key, count):
    """BINPERSID of a storage, as torch.save writes it."""
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)
    return b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"


def tensor_pickle(kind="FloatStorage", key="0", count=6, offset=0, shape=(2, 3), stride=(3, 1)):
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)
    numbers = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"
    return (b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(" + persistent(kind, key, count) + number(offset)
            + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtRs.")


def test_the_handmade_pickle_is_a_good_one(tmp_path):
    data = np.arange(6, dtype="<f4")
    path = archive(tmp_path / "pytorch_model.bin", tensor_pickle(), [("0", data.tobytes())])
    convert(tmp_path, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == data.reshape(2, 3).tolist()
    assert Shard(path).tensors["w"].contiguous()


@pytest.mark.parametrize("change, message", [
    ({"count": 5}, "reaches element 5"), ({"offset": 1}, "reaches element 6"), ({"offset": -1}, "offset"),
    ({"shape": (2, -3)}, "size or stride"), ({"stride": (1 << 40, 1)}, "reaches element"),
    ({"stride": (3, -1)}, "size or stride"), ({"shape": (2, 3, 4)}, "dimensions"),
    ({"shape": (1 << 50, 3), "stride": (0, 0)}, "elements over a storage"), ({"key": "1"}, "does not have"),
    ({"key": "../0"}, "key"), ({"count": 7}, "need 28"), ({"kind": "HalfStorage"}, "need 12"),
    ({"kind": "QInt8Storage"}, "asks for torch.QInt8Storage"), ({"shape": (1,) * 20, "stride": (1,) * 20}, "dimensions")])
def test_wrong_sizes_and_offsets(tmp_path, change, message):
    path = archive(tmp_path / "pytorch_model.bin", tensor_pickle(**change), [("0", bytes(24))])
    with pytest.raises(Refused, match=message):
        Shard(path)


def test_zip_bombs_and_damaged_zips(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    refused = lambda message: pytest.raises(Refused, match=message)
    with refused("compressed"):
        Shard(archive(path, tensor_pickle(), [("0", bytes(24))], zipfile.ZIP_DEFLATED))
    with refused("0 entries named data.pkl"):
        Shard(archive(path, tensor_pickle(), names=("data.pkl",)))
    with refused("2 entries named data.pkl"):
        Shard(archive(path, tensor_pickle(), names=("a/data.pkl", "b/data.pkl")))
    with pytest.warns(UserWarning), refused("twice"):
        Shard(archive(path, tensor_pickle(), [("0", bytes(24)), ("0", bytes(24))]))
    good = archive(path, tensor_pickle(), [("0", bytes(24))]).read_bytes()
    for cut in range(0, len(good) - 1, 7):
        path.write_bytes(good[:cut])
        with refused("no zip"):
            Shard(path)
    # Sizes in the central directory that claim more than the file holds.
    at = good.rindex(b"archive/data/0") - 46
    path.write_bytes(good[:at + 20] + struct.pack("<II", 1 << 30, 1 << 30) + good[at + 28:])
    with refused("bytes at 0 in a file|of 1073741824 bytes"):
        Shard(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with refused("before 1.6"):
        Shard(path)


def test_any_byte_changed_is_refused_or_harmless(tmp_path):
    """Every position, several values: a typed error, or a file of as many bytes at most."""
    path = tmp_path / "pytorch_model.bin"
    good = archive(path, tensor_pickle(), [("0", bytes(range(24)))]).read_bytes()
    outcomes = set()
    for at in range(len(good)):
        for value in (255, good[at] ^ 1):
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1:])
            try:
                convert(tmp_path, tmp_path / "out")
                outcomes.add("read")
                assert (tmp_path / "out" / "model.safetensors").stat().st_size < 400
            except Refused:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_many_names_for_one_storage(tmp_path):
    """A small file must not become a large one."""
    big = torch.zeros(1000)
    save(tmp_path / "in", [{f"t{i}": big for i in range(100)}])
    with pytest.raises(Refused, match="share"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("raw, message", [
    (b"", "damaged"), (b".", "does not end"), (b"\x80\x02}", "damaged"), (b"\x80\x02s.", "empty stack"), (b"\x80\x02t.", "no mark"),
    (b"\x80\x02h\x05.", "never stored"), (b"\x80\x02]\x8a\x01\x05K\x01s.", "dict"), (b"\x80\x02}}K\x01s.", "key that is"),
    (b"\x80\x02}(K\x01K\x02K\x01K\x03u.", "twice"), (b"\x80\x02}K\x01u.", "no mark"), (b"\x80\x02K\x01Q.", "persistent id"),
    (b"\x80\x02K\x01K\x02R.", "a call of 1"), (b"\x80\x02}X\xff\xff\xff\x7fab.", "damaged")])
def test_pickles_that_are_none(raw, message):
    with pytest.raises(Refused, match=message):
        Reader().read(raw)
