"""What a pickle would do, read from its opcodes alone: nothing is built, called or imported.

An unpickler that refuses to import can still be made to run for ever, to fill the memory or to crash:

- by tuples inside tuples, which unfold to more values than there are atoms when they are hashed or printed, or which are
  nested so deep that the stack ends;
- by keys that all have the same hash;
- by a memo index of two billion.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from mmap import mmap
from typing import Any, NoReturn

from bentoml_detectron.errors import UnsafeFileError

MAX_OPCODES = 500_000
MAX_UNFOLDED = 1_000_000
"""Most values that one value may unfold to, counting shared parts as often as they are reached."""
MAX_DEPTH = 100
"""Most containers inside each other."""
_MAX_NUMBER = {"LONG1": 8, "LONG4": 8, "LONG": 22, "INT": 22}
"""Bytes of a whole number's argument, by opcode: 64 bits. Of larger ones many have the same hash."""

COMMON = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905 (one name a line would be forty lines)
)
"""Opcodes of plain containers, numbers and strings, and those that name a class, call it and set its state."""

_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


class _Opcode:
    """How long an opcode's argument is, and what it takes from and leaves on the stack; from pickletools' own table."""

    __slots__ = ("name", "size", "lines", "length_bytes", "takes", "to_mark", "leaves", "grows", "keys", "put", "get")  # noqa: RUF023

    def __init__(self, opcode: pickletools.OpcodeInfo) -> None:
        size = opcode.arg.n if opcode.arg else 0
        self.name = opcode.name
        self.size = max(size, 0)
        self.lines = {"INST": 2, "GLOBAL": 2}.get(opcode.name, 1) if size == pickletools.UP_TO_NEWLINE else 0
        self.length_bytes = _LENGTH_BYTES.get(size, 0)
        before = opcode.stack_before
        self.to_mark = pickletools.markobject in before
        self.takes = before.index(pickletools.markobject) if self.to_mark else len(before)
        self.leaves = len(opcode.stack_after)
        self.grows = opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "ADDITEMS")
        self.keys = opcode.name in ("SETITEM", "SETITEMS", "DICT")
        self.put = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        self.get = opcode.name in ("GET", "BINGET", "LONG_BINGET")


_TABLE = {ord(opcode.code): _Opcode(opcode) for opcode in pickletools.opcodes}


class Inert:
    """Stands for a function that a pickle names.

    It takes no state. A function would: a pickle could set its attributes, and so spoil it for the rest of the process.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise ValueError("a function has a state")


class _Value:
    """What is on the stack: how many values it unfolds to, how deep it is, and whether another has taken it in."""

    __slots__ = ("depth", "is_inside", "parts")

    def __init__(self) -> None:
        self.parts = 1
        self.depth = 0
        self.is_inside = False


def check(content: bytes | mmap, file: str, opcodes: frozenset[str], is_known: Callable[[str, str], bool]) -> None:
    """Reads a pickle's opcodes to the end.

    Args:
        content: The whole pickle.
        file: Its file's name, for the errors.
        opcodes: Names of the opcodes that it may have, after `pickletools`.
        is_known: Whether a module's name may be looked up (GLOBAL; STACK_GLOBAL is for the unpickler to judge).

    Raises:
        UnsafeFileError: It has another opcode or name, unfolds without end, is nested too deep, has keys or numbers that no
            model has, or goes on after its end.
        IndexError, KeyError, ValueError: It is no pickle.
    """

    def refuse(what: object) -> NoReturn:
        raise UnsafeFileError(f"{file} holds a pickle with {what}, which a saved model never has", file=file, value=what)

    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value | None] = {}
    position, count = 0, 0
    while True:  # one loop in one function: a model has thousands of opcodes, and loading waits for this
        opcode = _TABLE[content[position]]
        start = position + 1
        position = start + opcode.size
        if opcode.length_bytes:
            position = start + opcode.length_bytes
            position += int.from_bytes(content[start:position], "little")
        for _ in range(opcode.lines):
            position = content.find(b"\n", position) + 1  # what is mapped has no index()
            if not position:
                raise ValueError("an unterminated line")
        name = opcode.name
        count += 1
        if name not in opcodes:
            refuse(f"the opcode {name} (at byte {start - 1})")
        if count > MAX_OPCODES:
            refuse(f"more than {MAX_OPCODES:,} opcodes")
        if name == "STOP":
            break
        if name == "GLOBAL":
            module, attribute = content[start : position - 1].decode("ascii").split("\n")
            if not is_known(module, attribute):
                refuse(f"the name {module}.{attribute}")
        elif opcode.put or opcode.get:
            argument = content[start:position]
            index = int(argument) if opcode.lines else int.from_bytes(argument, "little")
            if opcode.get:
                stack.append(memo[index])
                continue
            if not 0 <= index <= count:  # the memo is an array of that length
                refuse(f"the memo entry {index}")
            memo[index] = stack[-1]
            continue
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
            continue
        elif name == "MARK":
            stack.append(None)
            continue
        elif name in _MAX_NUMBER and position - start - opcode.length_bytes > _MAX_NUMBER[name]:
            refuse("a number of more than 64 bits")
        taken: list[_Value] = []
        if opcode.to_mark:
            while (value := stack.pop()) is not None:
                taken.append(value)
        for _ in range(opcode.takes):
            if (value := stack.pop()) is None:
                raise ValueError("a mark where a value is expected")
            taken.append(value)
        # The last one taken is what grows; before it, from the end, each value has its key.
        if opcode.keys and any(key.parts > 1 for key in taken[1::2]):
            refuse("a key that is not a plain value")
        result = taken.pop() if opcode.grows else _Value()
        if opcode.grows and taken and result.is_inside:
            refuse("a container that is modified after it was put into another")
        for value in taken:
            value.is_inside = True
            result.parts += value.parts
            result.depth = max(result.depth, value.depth + 1)
        if result.parts > MAX_UNFOLDED:
            refuse("values that expand without limit")
        if result.depth > MAX_DEPTH:
            refuse(f"more than {MAX_DEPTH} levels of nested containers")
        if opcode.leaves:
            stack.append(result)
    if position != len(content):
        refuse(f"{len(content) - position} bytes after its end")
