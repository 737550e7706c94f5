"""Damage to files: what disks and lines do, and what somebody could write who means harm."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import torch

from modeconn.tools.files import digest_of
from modeconn.tools.json_files import DIGEST, to_json

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**63), 1e308, float("nan"), float("inf"), 0.5, "", "x", "0",
    "a" * 5000, "../../x", "os.system", "\u0000", [], {}, [[]], [None], {"a": 1}, [1e9] * 3, [[0, 1], [2]],
]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file as it may be after an accident; never the same bytes."""
    for _ in range(100):
        changed = rng.choice(_ACCIDENTS)(content, rng)
        if changed != content:
            return changed
    return content + b"\0"


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, 1, 8, rng.randrange(len(content)), len(content) - rng.randint(1, 16)])]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _replace(content: bytes, rng: random.Random) -> bytes:
    begin, length = _place(content, rng), rng.choice([1, 2, 4, 8, 64, 512])
    new = rng.choice([b"\0" * length, b"\xff" * length, rng.randbytes(length), b"9" * length, b"[" * length])
    return content[:begin] + new + content[begin + length :]


def _put_in(content: bytes, rng: random.Random) -> bytes:
    begin = _place(content, rng)
    return content[:begin] + rng.choice([rng.randbytes(rng.randint(1, 40)), b"}", b'"', b",", b"0"]) + content[begin:]


def _leave_out(content: bytes, rng: random.Random) -> bytes:
    begin = _place(content, rng)
    return content[:begin] + content[begin + rng.choice([1, 2, 8, 100, 4096]) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    begin = _place(content, rng)
    return content[: begin + rng.choice([1, 8, 64, 1000])] + content[begin:]


def _junk(content: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        [rng.randbytes(rng.randrange(200)), b"{" * rng.randrange(9), b"PK\3\4" + content[4:], b"\x80\2}."]
    )


def _place(content: bytes, rng: random.Random) -> int:
    """Return a place in a file, more often one near its start, where formats are told."""
    return rng.randrange(min(len(content), rng.choice([16, 128, 2048, len(content)])))


_ACCIDENTS: list[Callable[[bytes, random.Random], bytes]] = [
    _cut, _flip, _flip, _flip, _replace, _put_in, _leave_out, _repeat, _junk,
]  # fmt: skip


def hostile(content: bytes, rng: random.Random) -> bytes:
    """Return a file of modeconn with another description or other tensors, and a digest that fits."""
    if content[8:9] == b"{":
        return _hostile_tensors(content, rng)
    if content.lstrip().startswith(b'{"'):  # lines of finished measurements
        return _hostile_lines(content, rng)
    record = json.loads(content)
    record.pop(DIGEST, None)
    _change(record, rng)
    try:
        return to_json(record).encode()
    except (TypeError, ValueError):
        return json.dumps(record).encode()


def _hostile_lines(content: bytes, rng: random.Random) -> bytes:
    lines = []
    for line in content.split(b"\n"):
        if not line:
            continue
        record = json.loads(line)
        record.pop("crc32", None)
        _change(record, rng)
        text = json.dumps(record)
        lines.append(f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}')
    return ("\n" + "\n".join(lines)).encode()


def _hostile_tensors(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, payload = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = json.loads(header["__metadata__"]["modeconn"])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if rng.random() < 0.75:
            _change(about, rng)
        else:
            _change_tensor(header, rng)
    tensors = {}
    parts = []
    begin = 0
    for name, entry in list(header.items()):
        if name == "__metadata__":
            continue
        count, kind = entry.pop("count", None), getattr(torch, entry.pop("kind"), None) if "kind" in entry else None
        first, last = entry["data_offsets"]
        raw = payload[first:last]
        tensor = torch.frombuffer(bytearray(raw), dtype=_DTYPES[entry["dtype"]]) if raw else torch.empty(0)
        tensor = (
            tensor.to(_DTYPES[entry["dtype"]]).reshape(entry["shape"]) if count is None else _resized(tensor, count)
        )
        tensor = tensor if kind is None else tensor.to(kind)
        tensor = _spoiled(tensor, rng) if entry.pop("spoil", False) else tensor
        tensors[name] = tensor.contiguous()
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        entry |= {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + len(data)],
        }
        begin += len(data)
        parts.append(data)
    text = json.dumps(about)
    header["__metadata__"] = {"modeconn": text, "modeconn.sha256": digest_of(tensors, text)}
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + b"".join(parts)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _change_tensor(header: dict[str, Any], rng: random.Random) -> None:
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return
    name = rng.choice(names)
    how = rng.randrange(6)
    if how == 0:
        del header[name]
    elif how == 1:
        header[rng.choice(["x", name + "x", "", "a.b.c"])] = header.pop(name)
    elif how == 2:
        header[name]["count"] = rng.choice([[0], [1], [3, 5], [2, 2, 2], []])
    elif how == 3:
        header[name]["kind"] = rng.choice(["float64", "int64", "bool", "uint8", "bfloat16", "int8"])
    elif how == 4:
        header[name]["spoil"] = True
    else:
        header["another"] = dict(header[name])


def _resized(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    count = int(torch.Size(shape).numel())
    values = tensor.reshape(-1)
    while len(values) < count:
        values = torch.cat([values, values]) if len(values) else tensor.new_zeros(count)
    return values[:count].reshape(shape)


def _spoiled(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    tensor = tensor.clone()
    if tensor.numel():
        flat = tensor.reshape(-1)
        place = rng.randrange(len(flat))
        if tensor.is_floating_point():
            flat[place] = rng.choice([float("nan"), float("inf"), 1e30, -1.0])
        elif tensor.dtype == torch.bool:
            flat[place] = ~flat[place]
        else:
            flat[place] = rng.choice([-1, 0, 100, torch.iinfo(tensor.dtype).max, torch.iinfo(tensor.dtype).min])
    return tensor


def _change(record: Any, rng: random.Random) -> None:
    """Replace, remove, rename or add something anywhere in a record; also in JSON that is kept as text in it."""
    places = list(_places(record))
    if not places:
        return
    holder, key = rng.choice(places)
    value = holder[key]
    if isinstance(value, str) and value.startswith("{"):
        inner = json.loads(value)
        _change(inner, rng)
        holder[key] = json.dumps(inner)
        return
    how = rng.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif how == 2 and isinstance(value, list) and value:
        value.append(value[0])
    elif how == 3 and isinstance(value, list) and value:
        del value[rng.randrange(len(value))]
    elif how == 4 and type(value) in (int, float):
        holder[key] = rng.choice([value + 1, -value, value * 1000, value + 0.5, 10**12])
    elif how == 5 and isinstance(value, str) and value:
        place = rng.randrange(len(value))
        holder[key] = value[:place] + rng.choice("a0_.:é ") + value[place + 1 :]
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


def fingerprint(*parts: Any) -> str:
    """Return a digest of what was read, to compare with."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(digest_of({"": part.detach().cpu()}).encode())
        elif isinstance(part, dict):
            digest.update(
                digest_of({k: v.detach().cpu() for k, v in part.items() if isinstance(v, torch.Tensor)}).encode()
            )
        else:
            digest.update(str(part).encode())
    return digest.hexdigest()[:16]
