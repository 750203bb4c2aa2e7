"""PyTorch's pickled checkpoints (pytorch_model*.bin) to safetensors, without running anything that they say.

Such a file is a zip of stored, not compressed, entries: NAME/data.pkl, a pickle of protocol 2 that
describes tensors, and NAME/data/KEY, the bytes of a storage each. A pickle is a program; here it is read
operation by operation, by an interpreter that knows the operations a state dict consists of, and of
functions three by name: OrderedDict, torch._utils._rebuild_tensor_v2 and the storage types, which it
stands for itself. Nothing is imported, called or looked up. Everything else is refused by name.
Storages go from file to file in pieces, so memory does not grow with the model.
"""
import json
import math
import pickletools
import shutil
import struct
import tempfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Storage type: its name in safetensors, bytes of an element.
STORAGES = {"BFloat16Storage": ("BF16", 2), "HalfStorage": ("F16", 2), "FloatStorage": ("F32", 4),
            "DoubleStorage": ("F64", 8), "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2),
            "CharStorage": ("I8", 1), "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1)}
PICKLE_LIMIT = 64 << 20  # bytes of data.pkl; that of a 70B model is below 1 MB
MOST_OPERATIONS = 10_000_000
MOST_DIMENSIONS = 16
MOST_SHARING = 4  # tied weights stand twice in safetensors; more than that is no model
PIECE = 16 << 20
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # config and tokenizer beside the weights


class Refused(ValueError):
    """The file is damaged, or holds what a checkpoint does not need."""


@dataclass(frozen=True)
class Name:
    """A global that the pickle names; stands for nothing but itself."""
    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    dtype: str
    width: int
    key: str
    count: int  # elements


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int  # elements, as are strides
    shape: tuple
    stride: tuple

    def size(self):
        return math.prod(self.shape)

    def contiguous(self):
        expected = 1
        for n, step in zip(reversed(self.shape), reversed(self.stride)):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True


ORDERED_DICT = Name("collections", "OrderedDict")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
KNOWN = {ORDERED_DICT, REBUILD} | {Name("torch", s) for s in STORAGES}
MARK = object()


def whole(value, what):
    if type(value) is not int or value < 0:
        raise Refused(f"{what} is {value!r}, not a number from 0 up")
    return value


def storage_of(saved):
    if type(saved) is not tuple or len(saved) != 5 or saved[0] != "storage":
        raise Refused(f"a persistent id that is no storage: {str(saved)[:80]}")
    _, kind, key, _, count = saved
    if not isinstance(kind, Name) or kind.module != "torch" or kind.name not in STORAGES:
        raise Refused(f"a storage of an unknown type {str(kind)[:80]}")
    if type(key) is not str or not key.isalnum():
        raise Refused(f"a storage with the key {str(key)[:80]!r}")
    return Storage(*STORAGES[kind.name], key, whole(count, f"the size of storage {key}"))


def tensor_of(arguments):
    if type(arguments) is not tuple or not 6 <= len(arguments) <= 7:
        raise Refused("a tensor needs storage, offset, shape, stride, requires_grad and hooks")
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple:
        raise Refused("a tensor without storage, shape or stride")
    if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
        raise Refused(f"a tensor of {len(shape)} dimensions with {len(stride)} strides")
    whole(offset, "a tensor's offset")
    for n in (*shape, *stride):
        whole(n, "a size or stride of a tensor")
    tensor = Tensor(storage, offset, shape, stride)
    if tensor.size():
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
        if last >= storage.count:
            raise Refused(f"a tensor of shape {list(shape)} at {offset} reaches element {last} of storage {storage.key}, "
                          f"which has {storage.count}")
    if tensor.size() > storage.count:  # strides of 0 would make a small file a large one
        raise Refused(f"a tensor of {tensor.size()} elements over a storage of {storage.count}")
    return tensor


def call(function, arguments):
    if function == ORDERED_DICT:
        if arguments != ():
            raise Refused("OrderedDict with arguments")
        return OrderedDict()
    if function == REBUILD:
        return tensor_of(arguments)
    raise Refused(f"a call of {str(function)[:120]}")


CONSTANTS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "NONE": lambda: None, "NEWTRUE": lambda: True,
             "NEWFALSE": lambda: False, "MARK": lambda: MARK}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Reader:
    """Interprets a pickle's operations into dicts, tuples and Tensors."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def pop(self):
        if not self.stack or self.stack[-1] is MARK:
            raise Refused("the pickle takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self):
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is MARK:
                items = self.stack[at + 1:]
                del self.stack[at:]
                return items
        raise Refused("the pickle has no mark where it needs one")

    def top(self, kind):
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise Refused(f"the pickle needs a {kind.__name__} where it has none")
        return self.stack[-1]

    def set_items(self, pairs):
        if len(pairs) % 2:
            raise Refused("the pickle sets a key without a value")
        target = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2]):
            if type(key) not in (str, int):
                raise Refused(f"a key that is a {type(key).__name__}")
            if key in target:
                raise Refused(f"the key {str(key)[:80]!r} twice")
            target[key] = value

    def remembered(self, key):
        if key not in self.memo:
            raise Refused(f"the pickle recalls {key}, which it never stored")
        return self.memo[key]

    def step(self, name, argument):
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in TUPLES:
            items = [self.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top(object)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top(object)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.remembered(argument))
        elif name == "GLOBAL":
            found = Name(*argument.split(" ", 1))
            if found not in KNOWN:
                raise Refused(f"the pickle asks for {found.module}.{found.name}; a checkpoint of tensors does not need it")
            stack.append(found)
        elif name == "BINPERSID":
            stack.append(storage_of(self.pop()))
        elif name == "REDUCE":
            arguments = self.pop()
            stack.append(call(self.pop(), arguments))
        elif name == "SETITEM":
            value = self.pop()
            self.set_items([self.pop(), value])
        elif name == "SETITEMS":
            self.set_items(self.pop_to_mark())
        elif name == "APPEND":
            value = self.pop()
            self.top(list).append(value)
        elif name == "APPENDS":
            items = self.pop_to_mark()
            self.top(list).extend(items)
        elif name == "BUILD":  # attributes of an OrderedDict (a state dict's _metadata): not needed
            self.pop()
            self.top(OrderedDict)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"the pickle uses {name}; a checkpoint of tensors does not need it")

    def read(self, raw):
        try:
            for count, (code, argument, _) in enumerate(pickletools.genops(raw)):
                if count > MOST_OPERATIONS:
                    raise Refused(f"the pickle has more than {MOST_OPERATIONS} operations")
                self.step(code.name, argument)
        except Refused:
            raise
        except (ValueError, KeyError, IndexError, TypeError, struct.error, UnicodeError) as error:
            raise Refused(f"the pickle is damaged: {error}") from None
        if len(self.stack) != 1 or not isinstance(self.stack[0], dict):
            raise Refused("the pickle does not end with a dict of tensors")
        return self.stack[0]


# What zipfile raises for a damaged, encrypted or unknown entry, and for offsets outside the file.
DAMAGE = zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError, struct.error


class Shard:
    """One file: its tensors by name, and the bytes of each."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.zip = zipfile.ZipFile(self.path)
            self.entries = self.checked_entries()
            pickles = [n for n in self.entries if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickles) != 1:
                raise Refused(f"{len(pickles)} entries named data.pkl, not 1")
            self.root = pickles[0].removesuffix("data.pkl")
            if self.entries[pickles[0]].file_size > PICKLE_LIMIT:
                raise Refused(f"data.pkl has {self.entries[pickles[0]].file_size} bytes, more than {PICKLE_LIMIT}")
            order = self.root + "byteorder"
            if order in self.entries and self.zip.read(self.entries[order])[:16] != b"little":
                raise Refused("the tensors are not little-endian")
            self.tensors = self.checked_tensors(Reader().read(self.zip.read(self.entries[pickles[0]])))
        except Refused as error:
            raise Refused(f"{self.path.name}: {error}") from None
        except DAMAGE as error:
            with open(self.path, "rb") as file:
                old = file.read(2) == b"\x80\x02"
            hint = "; it is a pickle of PyTorch before 1.6, which has no zip around it" if old else ""
            raise Refused(f"{self.path.name}: no zip of PyTorch's ({error}){hint}") from None

    def checked_entries(self):
        total, entries, size = 0, {}, self.path.stat().st_size
        for info in self.zip.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise Refused(f"the entry {info.filename[:80]!r} is compressed; PyTorch stores entries as they are")
            if info.filename in entries:
                raise Refused(f"the entry {info.filename[:80]!r} twice")
            if not 0 <= info.header_offset <= size - info.file_size:
                raise Refused(f"the entry {info.filename[:80]!r} of {info.file_size} bytes at {info.header_offset} in a file "
                              f"of {size}")
            entries[info.filename] = info
            total += info.file_size
        if total > size:  # entries that overlap would make a small file a large one
            raise Refused(f"entries of {total} bytes in a file of {size}")
        return entries

    def checked_tensors(self, found):
        if "state_dict" in found and isinstance(found["state_dict"], dict):
            found = found["state_dict"]
        for name, tensor in found.items():
            if type(name) is not str or not isinstance(tensor, Tensor):
                raise Refused(f"{str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor")
            storage = tensor.storage
            info = self.entries.get(f"{self.root}data/{storage.key}")
            if info is None:
                raise Refused(f"{name[:80]!r} is in storage {storage.key}, which the file does not have")
            if info.file_size != storage.count * storage.width:
                raise Refused(f"storage {storage.key} of {name[:80]!r} has {info.file_size} bytes, but {storage.count} "
                              f"elements of {storage.dtype} need {storage.count * storage.width}")
        total, size = sum(t.size() * t.storage.width for t in found.values()), self.path.stat().st_size
        if total > MOST_SHARING * size:
            raise Refused(f"tensors of {total} bytes over a file of {size}: too many share their storage")
        return found

    def close(self):
        self.zip.close()

    def write(self, name, out):
        """The tensor's bytes, row-major, onto `out`."""
        tensor = self.tensors[name]
        storage = tensor.storage
        try:
            with self.zip.open(f"{self.root}data/{storage.key}") as source:
                if not tensor.contiguous():
                    raw = np.frombuffer(source.read(), f"V{storage.width}")[tensor.offset:]
                    strides = [s * storage.width for s in tensor.stride]
                    out.write(np.lib.stride_tricks.as_strided(raw, tensor.shape, strides, writeable=False).tobytes())
                    return
                source.seek(tensor.offset * storage.width)
                left = tensor.size() * storage.width
                while left:
                    piece = source.read(min(left, PIECE))
                    if not piece:
                        raise Refused(f"{self.path.name}: storage {storage.key} ends early")
                    out.write(piece)
                    left -= len(piece)
        except Refused:
            raise
        except DAMAGE as error:
            raise Refused(f"{self.path.name}: storage {storage.key} of {name[:80]!r}: {error}") from None


def write_safetensors(shard, path):
    """Header (8 bytes of length, JSON, padded to 8) and the tensors one after the other; returns their bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shard.tensors):
        tensor = shard.tensors[name]
        end = offset + tensor.size() * tensor.storage.width
        header[name] = {"dtype": tensor.storage.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(shard.tensors):
            shard.write(name, out)
    return offset


def expected_shards(source, paths):
    """Tensor names by file from pytorch_model.bin.index.json, or None where there is none."""
    index = source / "pytorch_model.bin.index.json"
    if not index.exists():
        return None
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{index.name}: no weight_map ({error})") from None
    names = {p.name: set() for p in paths}
    for name, shard in table.items():
        if shard not in names:
            raise Refused(f"{index.name} has {name[:80]!r} in {str(shard)[:80]!r}, which is not there")
        names[shard].add(name)
    return names


def convert(source, out):
    """All shards of `source` to `out`, with an index if they are several; returns (tensors, bytes)."""
    source, out = Path(source), Path(out)
    paths = sorted(source.glob("pytorch_model*.bin"))
    if not paths:
        raise Refused(f"{source} has no pytorch_model*.bin")
    expected = expected_shards(source, paths)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".part") as part:
        part, where, total = Path(part), {}, 0
        for number, path in enumerate(paths, 1):
            shard = Shard(path)
            if expected is not None and set(shard.tensors) != expected[path.name]:
                odd = sorted(set(shard.tensors) ^ expected[path.name])
                raise Refused(f"{path.name} and the index differ in {len(odd)} tensors, among them {odd[0][:80]!r}")
            name = "model.safetensors" if len(paths) == 1 else f"model-{number:05d}-of-{len(paths):05d}.safetensors"
            again = sorted(set(shard.tensors) & set(where))
            if again:
                raise Refused(f"{path.name}: {again[0][:80]!r} is in {where[again[0]]} already")
            total += write_safetensors(shard, part / name)
            shard.close()
            where |= dict.fromkeys(shard.tensors, name)
            print(f"{path.name}: {len(shard.tensors)} tensors -> {name}")
        if len(paths) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for pattern in COPIED:
            for path in source.glob(pattern):
                if path.is_file() and not path.name.startswith("pytorch_model"):
                    shutil.copyfile(path, part / path.name)
        for path in sorted(part.iterdir()):
            path.replace(out / path.name)
    return len(where), total


def unpickle(args):
    tensors, size = convert(getattr(args, "in"), args.out)
    print(f"{args.out}: {tensors} tensors, {size} bytes")
