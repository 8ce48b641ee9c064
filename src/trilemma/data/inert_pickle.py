"""Reads the data of a pickle without executing any of it.

A pickle is a program, and unpickling runs it. This reader walks through its instructions with the standard library's
disassembler and builds nothing but None, numbers, text, bytes, lists, tuples, dicts and uint8 arrays. The few names
that an array needs are recognised and interpreted here; nothing is ever imported or called, and any other name or
instruction is an error.
"""

import pickletools
import warnings
from typing import Any, NamedTuple

import numpy as np


class _Name(NamedTuple):
    module: str
    name: str


class _Pending:
    """An array whose contents arrive by a later instruction."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None


_MARK = object()
_DTYPE = object()
_RECONSTRUCT = {_Name("numpy.core.multiarray", "_reconstruct"), _Name("numpy._core.multiarray", "_reconstruct")}
_NDARRAY, _UINT8, _ENCODE = _Name("numpy", "ndarray"), _Name("numpy", "dtype"), _Name("_codecs", "encode")
_KNOWN = _RECONSTRUCT | {_NDARRAY, _UINT8, _ENCODE}
_LITERAL = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    ]
)
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NO_EFFECT = ("PROTO", "FRAME", "STOP")


def read_inert(data: bytes) -> Any:
    """Returns the data of a pickle of protocol 0 to 5.

    Args:
        data: The pickle.

    Raises:
        ValueError: It holds anything but plain data and uint8 arrays, or is damaged.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # an escape that no writer of pickles makes
            for opcode, argument, _ in pickletools.genops(data):
                machine.step(opcode.name, argument)
        (result,) = machine.stack
    except _DAMAGE as error:
        raise ValueError(f"damaged: {type(error).__name__} {error}") from None
    return machine.finished(result)


_DAMAGE = (
    IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError, DeprecationWarning,
)  # fmt: skip


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        if name in _LITERAL:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _CONSTANT:
            self.stack.append(_CONSTANT[name])
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in _NO_EFFECT:
            self._combine(name, argument)

    def _combine(self, name: str, argument: Any) -> None:
        match name:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                number = int(name[-1])
                self.stack[-number:] = [tuple(self.stack[-number:])]
            case "TUPLE":
                self.stack.append(tuple(self._since_mark()))
            case "LIST":
                self.stack.append(self._since_mark())
            case "DICT":
                self.stack.append(_pairs(self._since_mark()))
            case "APPEND":
                self._extend([self.stack.pop()])
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._since_mark())
            case "GLOBAL":
                self.stack.append(_known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.stack.pop(), self.stack.pop()
                self.stack.append(_known(module, attribute))
            case "REDUCE":
                arguments, function = self.stack.pop(), self.stack.pop()
                self.stack.append(_interpreted(function, arguments))
            case "BUILD":
                state = self.stack.pop()
                _complete(self.stack[-1], state)
            case _:
                raise ValueError(f"instruction {name} is not plain data")

    def _since_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("damaged: no mark")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items are added to something that is not a list")
        self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("entries are added to something that is not a dict")
        self.stack[-1].update(_pairs(items))

    def finished(self, value: Any) -> Any:
        """Returns a value of the top two levels with its arrays in place."""
        if isinstance(value, _Pending):
            if value.array is None:
                raise ValueError("an array without contents")
            return value.array
        if isinstance(value, dict):
            return {key: item if isinstance(item, dict) else self.finished(item) for key, item in value.items()}
        return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2 or not all(isinstance(key, (str, bytes, int)) for key in items[::2]):
        raise ValueError("a dict whose keys are not text or numbers")
    return dict(zip(items[::2], items[1::2], strict=True))


def _known(module: Any, name: Any) -> _Name:
    found = _Name(str(module), str(name))
    if found not in _KNOWN:
        raise ValueError(f"it asks for {found.module}.{found.name}, which plain data never need; it may be malicious")
    return found


def _interpreted(function: Any, arguments: Any) -> Any:
    """Returns what a recognised constructor stands for; nothing is called."""
    if not isinstance(arguments, tuple):
        raise ValueError("damaged: arguments are not a tuple")
    if function in _RECONSTRUCT and arguments[:1] == (_NDARRAY,):
        return _Pending()
    if function == _UINT8 and arguments[:1] in (("u1",), (b"u1",)):
        return _DTYPE
    if function == _ENCODE and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")
    raise ValueError(f"a constructor other than that of a uint8 array: {function}")


def _complete(target: Any, state: Any) -> None:
    if target is _DTYPE:
        return  # byte order and alignment mean nothing to single bytes
    if not isinstance(target, _Pending) or not isinstance(state, tuple) or len(state) != 5 or state[2] is not _DTYPE:
        raise ValueError("a state other than that of a uint8 array")
    _, shape, _, fortran, data = state
    contents = data.encode("latin-1") if isinstance(data, str) else data
    if fortran or not isinstance(contents, bytes) or not isinstance(shape, tuple):
        raise ValueError("an array in an unusual layout")
    target.array = np.frombuffer(contents, np.uint8).reshape(shape)
