"""Pickles read as data: nothing that a pickle names is imported, called or changed.

A pickle is a small program. The one interpreter here knows only the instructions that build plain values, and resolves
names through a table of the caller's, whose entries make inert stand-ins. Names outside the table are refused. What it
accepts is bounded in memory: by the pickle's own length, and by the number of containers and objects that it makes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pickle import _Unpickler as PurePythonUnpickler

_MOST_CONTAINERS = 4_000_000
_SCALARS = (str, int, float, bool, bytes, type(None))


class RefusedPickle(ValueError):
    """A pickle that is broken, or that asks for more than its reader allows. The message is a part of a sentence."""


class Constructor:
    """What a name in a pickle stands for: ``make`` turns the arguments of a call into a value."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., object]):
        self.name, self.make = name, make


class Instance:
    """A stand-in for an object of class ``kind`` ("module.name"): constructor's arguments and state, as read."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, *args: object):
        self.kind, self.args, self.state = kind, args, None

    def field(self, name: str, default: object = None) -> object:
        """An attribute by name, where the state is a table of attributes."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class Table(dict):
    """An OrderedDict; the attributes that old checkpoints hang on it are dropped."""


def inert(*names: str) -> dict[tuple[str, str], Constructor]:
    """Rows of a table of names ("module.name") that become ``Instance``."""
    rows = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        rows[module, attribute] = Constructor(name, lambda *args, kind=name: Instance(kind, *args))
    return rows


# Rows that hold everywhere.
COMMON_NAMES = {
    ("collections", "OrderedDict"): Constructor("collections.OrderedDict", lambda pairs=(): Table(pairs)),
}


def load(
    data: bytes, names: Mapping[tuple[str, str], object], persistent: Callable[[object], object] | None = None
) -> object:
    """The value of a pickle. ``names``: (module, name) -> Constructor, or a plain value such as a dtype.

    ``persistent`` resolves references to what lies outside the pickle. RefusedPickle for anything not allowed.
    """
    try:
        return _Reader(data, names, persistent).load()
    except RefusedPickle:
        raise
    except Exception as error:  # a broken pickle raises what it likes: index, key, type, value, EOF, Unicode ...
        raise RefusedPickle(f"its pickle is broken ({type(error).__name__})") from None


_ALLOWED = (
    "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE"
    " BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2"
    " TUPLE3 MARK POP POP_MARK APPEND APPENDS SETITEM SETITEMS ADDITEMS FROZENSET BINGET LONG_BINGET BINPUT"
    " LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
)
_COUNTED = "EMPTY_LIST EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 MARK REDUCE NEWOBJ FROZENSET"


class _Reader(PurePythonUnpickler):
    """The instructions of protocols 2 to 5 that torch and Python use for plain data; all others are unknown here."""

    def __init__(self, data: bytes, names: Mapping, persistent: Callable | None):
        super().__init__(io.BytesIO(data))
        self._names, self._persistent = names, persistent
        self._length, self._containers = len(data), 0

    def find_class(self, module: str, name: str):
        try:
            return self._names[module, name]
        except (KeyError, TypeError):
            raise RefusedPickle(f"its pickle names {str(module)[:80]}.{str(name)[:80]}, which is not allowed") from None

    def persistent_load(self, pid):
        if self._persistent is None:
            raise RefusedPickle("its pickle refers to what lies outside it")
        return self._persistent(pid)

    def count_container(self) -> None:
        self._containers += 1
        if self._containers > _MOST_CONTAINERS:
            raise RefusedPickle(f"its pickle makes more than {_MOST_CONTAINERS} containers")

    def load_reduce(self):
        arguments = self.stack.pop()
        self.stack[-1] = _make(self.stack[-1], arguments)

    def load_build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Instance:
            target.state = state
        elif type(target) is not Table:
            raise RefusedPickle(f"its pickle sets the state of a {type(target).__name__}")

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        _table(self.stack[-1])[_key(key)] = value

    def load_setitems(self):
        items = self.pop_mark()
        table = _table(self.stack[-1])
        for i in range(0, len(items), 2):
            table[_key(items[i])] = items[i + 1]

    def load_append(self):
        value = self.stack.pop()
        _exactly(list, self.stack[-1]).append(value)

    def load_appends(self):
        items = self.pop_mark()
        _exactly(list, self.stack[-1]).extend(items)

    def load_additems(self):
        items = self.pop_mark()
        _exactly(set, self.stack[-1]).update(map(_key, items))

    def load_frozenset(self):
        items = self.pop_mark()
        self.append(frozenset(map(_key, items)))

    def load_long_binput(self):
        # Another reader of the same pickle keeps its memory as an array: it must not be made to reserve gigabytes.
        index = int.from_bytes(self.read(4), "little")
        if index > self._length:
            raise RefusedPickle("its pickle counts beyond its length")
        self.memo[index] = self.stack[-1]


def _instructions() -> dict[int, Callable]:
    """Code -> method, for the instructions that are known here."""
    own = {
        "REDUCE": _Reader.load_reduce,
        "NEWOBJ": _Reader.load_reduce,
        "BUILD": _Reader.load_build,
        "SETITEM": _Reader.load_setitem,
        "SETITEMS": _Reader.load_setitems,
        "APPEND": _Reader.load_append,
        "APPENDS": _Reader.load_appends,
        "ADDITEMS": _Reader.load_additems,
        "FROZENSET": _Reader.load_frozenset,
        "LONG_BINPUT": _Reader.load_long_binput,
    }
    known = {}
    for name in _ALLOWED.split():
        code = getattr(pickle, name)[0]
        method = own.get(name, PurePythonUnpickler.dispatch[code])
        known[code] = _counted(method) if name in _COUNTED.split() else method
    return known


def _counted(method: Callable) -> Callable:
    def load(self: _Reader) -> None:
        self.count_container()
        method(self)

    return load


_Reader.dispatch = _instructions()


def _make(constructor: object, arguments: object) -> object:
    if type(constructor) is not Constructor or type(arguments) is not tuple:
        raise RefusedPickle("its pickle calls what cannot be called")
    return constructor.make(*arguments)


def _table(value: object) -> dict:
    if type(value) not in (dict, Table):
        raise RefusedPickle(f"its pickle fills a {type(value).__name__} like a table")
    return value


def _exactly(kind: type, value: object):
    if type(value) is not kind:
        raise RefusedPickle(f"its pickle fills a {type(value).__name__} like a {kind.__name__}")
    return value


def _key(value: object) -> object:
    """``value`` where it may be a key. Tuples are hashed to their depth, so those of plain values only."""
    if isinstance(value, tuple) and not all(isinstance(part, _SCALARS) for part in value):
        raise RefusedPickle("its pickle uses a nested tuple as a key")
    return value
