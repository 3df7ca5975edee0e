"""Pickles read as plain data, by an interpreter of the few instructions that torch.save writes.

A pickle is a program: Python's unpickler calls whatever functions the file names. Held to harmless
names it can still be made to fill the memory (a memo index of two billion) or to overflow the C
stack (the hash of a tuple in a tuple in a tuple ...), which no exception handler survives. Here
nothing is imported or called, whatever the file says: a name is a label, and what would have been
made by calling it is a `Record` of its arguments.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dmc_jax.errors import UserError

# A tensor takes some 250 bytes and 30 instructions, the random state that a training run saves of
# each data-parallel rank some 8 KB and 700: enough for a thousand ranks.
MAX_BYTES = 32 * 2**20
_MAX_INSTRUCTIONS = 2_000_000
_MAX_INTEGER_BITS = 128  # seeds have 64


@dataclasses.dataclass(frozen=True)
class Name:
    """A global that the pickle names, such as "torch FloatStorage"; it stands for nothing."""

    name: str  # module, a space, name in the module


@dataclasses.dataclass(eq=False, slots=True)
class Record:
    """What calling a global would have made.

    Attributes:
        name: of the global.
        arguments: of the call.
        state: set on the object afterwards; a dictionary of its attributes for most classes.
    """

    name: str
    arguments: tuple
    state: Any = None


def read_pickle(
    data: bytes,
    where: str,
    *,
    allowed: Collection[str],
    builders: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """Interpret a pickle of protocol 2, the one that torch.save writes.

    Args:
        data: the pickle.
        where: it comes from, for messages.
        allowed: globals that it may name, besides those of `builders`.
        builders: functions of ours that take the place of globals.
        persistent: gives what a persistent id (torch: a storage) stands for.

    Returns:
        Dictionaries, lists, tuples, strings, numbers, booleans and None, with `Record` and `Name`
        for the rest. It may be nested to any depth, and even contain itself.

    Raises:
        UserError: a global that is not allowed, an instruction that torch does not write, a pickle
            that is damaged or too large.
    """
    if len(data) > MAX_BYTES:
        raise UserError(
            f"{where}: the pickle has more than {MAX_BYTES} bytes, the most that is read; "
            "checkpoints keep their tensors outside of it"
        )
    machine = _Machine(where, frozenset(allowed) | set(builders), builders, persistent)
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if count == _MAX_INSTRUCTIONS:
                raise UserError(f"{where}: the pickle has more than {count} instructions")
            machine.do(instruction.name, argument)
        return machine.stack.pop()
    except UserError:
        raise
    except Exception as error:  # any way in which the bytes can make no sense
        raise UserError(
            f"{where}: the pickle is damaged ({type(error).__name__}): copy or download it again"
        ) from None


class _Machine:
    """The stack, the marks on it and the memo of an unpickler."""

    def __init__(
        self,
        where: str,
        allowed: Collection[str],
        builders: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any],
    ):
        self.where, self.allowed, self.builders = where, allowed, builders
        self.persistent = persistent
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def do(self, instruction: str, argument: Any) -> None:
        """Carry out one instruction, named as in `pickletools`."""
        stack = self.stack
        match instruction:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction == "NEWTRUE")
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "BINFLOAT":
                stack.append(argument)
            case "LONG1":
                if argument.bit_length() > _MAX_INTEGER_BITS:
                    raise UserError(f"{self.where}: an integer of {argument.bit_length()} bits")
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(instruction[-1]))))
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.pop_to_mark())
            case "SETITEM":
                self.set_items(self.pop(2))
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "GLOBAL":
                stack.append(self.named(argument))
            case "REDUCE" | "NEWOBJ":
                stack.append(self.made(*self.pop(2)))
            case "BUILD":
                self.set_state(stack.pop())
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case _:
                raise UserError(
                    f"{self.where}: the pickle has the instruction {instruction}, which torch.save "
                    "does not write: load and save it with a current torch, protocol 2"
                )

    def pop(self, count: int) -> list:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError("the stack is empty")
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("append to something other than a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError("set items of something other than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing whose hash could take long, go deep or be made to collide.
            if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
                raise UserError(
                    f"{self.where}: a key of type {type(key).__name__} in a dictionary; expected "
                    "strings or small integers"
                )
            if key in target:
                raise UserError(f"{self.where}: the pickle sets the key {key!r:.80} twice")
            target[key] = value

    def named(self, name: str) -> Name:
        if name not in self.allowed:
            raise UserError(
                f"{self.where}: the pickle names {name.replace(' ', '.')!r:.120}, which a model's "
                "checkpoint does not need: it was refused and nothing was run; do not load this "
                "file with anything else unless you trust where it comes from"
            )
        return Name(name)

    def made(self, callee: Any, arguments: Any) -> Any:
        if type(callee) is not Name or type(arguments) is not tuple:
            raise TypeError("a call of something that is no global")
        if callee.name in self.builders:
            return self.builders[callee.name](*arguments)
        return Record(callee.name, arguments)

    def set_state(self, state: Any) -> None:
        target = self.stack[-1]
        if type(target) is Record and target.state is None:
            target.state = state
        elif type(target) is not dict:  # a dictionary's attributes: torch keeps versions there
            raise TypeError("state set on something that has none")
