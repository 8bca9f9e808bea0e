"""One thread's path through a kernel's machine code for NVIDIA GPUs, as `nvdisasm` prints it.

The number of iterations of a loop is computed, not assumed: values that follow from the launch's arguments alone are
tracked along the path (counters and bounds, also of loops that the compiler has unrolled), all others are unknown. If a
condition is unknown, a forward branch is not taken, so that masked code counts as executed, and a loop is repeated as
often as the caller says.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^\s*([.$\w]+):")
PREDICATE = re.compile(r"U?P\d")
REGISTER = re.compile(r"U?R(\d+|Z)")
MOST_EXECUTED = 1 << 20
"""Number of instructions after which a path is taken to be endless."""
WORD = (1 << 32) - 1

COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
FROM_PREDICATES, TO_PREDICATES = ("P2R", "UP2UR"), ("R2P", "UR2UP")
"""Moves between predicates and the bits of a register, for kernels that need more predicates than there are."""
COMBINE: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b,
    "OR": lambda a, b: a or b,
    "XOR": lambda a, b: a != b,
}


class Instruction(NamedTuple):
    guard: str
    """The predicate of the instruction, such as `!P0`, or nothing."""
    op: str
    operands: list[str]


class Code:
    """Instructions, and the positions of labels among them."""

    def __init__(self, assembly: str) -> None:
        self.lines: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in assembly.splitlines():
            if found := INSTRUCTION.match(line):
                operands = [part.strip() for part in found[3].split(",")] if found[3] else []
                self.lines.append(Instruction((found[1] or "").strip().removeprefix("@"), found[2], operands))
            elif found := LABEL.match(line):
                self.labels[found[1]] = len(self.lines)

    def target(self, at: int) -> int | None:
        """The position that an instruction may jump to."""
        name = re.search(r"`\((.+?)\)", ",".join(self.lines[at].operands))
        return self.labels[name[1]] if name else None

    def goes_round_a_call(self, at: int, end: int) -> bool:
        """Whether a branch from `at` to `end` jumps over a subroutine."""
        lines = self.lines[at + 1 : min(end, at + 12)]
        return any(line.op.startswith("CALL") and "$" in line.operands[-1] for line in lines)


def executed(
    assembly: str, trips: int, outer: int | None = None, words: Mapping[int, int] | None = None
) -> Counter[str]:
    """The instructions that one thread executes, by opcode.

    `words` are the launch's arguments by their place in the constant bank. A loop of unknown length is repeated `trips`
    times, one that contains other loops `outer` times, if that differs.
    """
    code, known = Code(assembly), Known(words or {})
    back = {at: code.target(at) for at, line in enumerate(code.lines) if line.op.startswith("BRA")}
    loops = {at: to for at, to in back.items() if to is not None and to < at}
    counts: Counter[str] = Counter()
    rounds: dict[int, int] = {}
    calls: list[int] = []
    at = passed = 0
    while at < len(code.lines):
        line = code.lines[at]
        counts[line.op] += 1
        passed += 1
        if passed > MOST_EXECUTED:
            raise RuntimeError("no end of a kernel found: its loops' numbers are read wrongly")
        taken = known.holds(line)
        to, at = code.target(at), at + 1
        if line.op.startswith("EXIT") and taken:
            break
        if line.op.startswith("RET") and calls:
            at = calls.pop()
        elif line.op.startswith("CALL") and to is not None and "$" in line.operands[-1]:
            calls.append(at)
            at = to
        elif line.op.startswith(("BRA", "CALL")) and to is not None:
            if to == at - 1:
                break
            # Before Hopper a loop may be left by a call that does not return, around a jump back.
            leaves = line.op.startswith("CALL")
            if to >= at and not leaves:
                taken = taken or (taken is None and code.goes_round_a_call(at - 1, to))
            elif taken is None:
                about_others = any(start > to and end < at - 1 for end, start in loops.items())
                often = outer if outer is not None and about_others else trips
                rounds[at] = rounds.get(at, 0) + 1
                taken = (rounds[at] < often) != leaves
                rounds[at] = 0 if rounds[at] >= often else rounds[at]
            at = to if taken else at
        else:
            known.note(line, taken)
    return counts


class Known:
    """The registers and predicates of a thread that follow from a launch's arguments."""

    def __init__(self, words: Mapping[int, int]) -> None:
        self.words = words
        self.values: dict[str, int] = {}
        self.predicates: dict[str, bool] = {}

    def holds(self, line: Instruction) -> bool | None:
        """Whether an instruction is executed, or a branch taken."""
        conditions = [line.guard] if line.guard else []
        if line.op.startswith("BRA"):
            conditions += [operand for operand in line.operands if re.fullmatch(r"!?U?P(\d|T)", operand)]
        found = [self.predicate(condition) for condition in conditions]
        return False if False in found else None if None in found else True

    def predicate(self, text: str) -> bool | None:
        name = text.lstrip("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None or not text.startswith("!") else not value

    def value(self, text: str, wide: bool = False) -> int | None:
        """An operand's 32 bits, or 64."""
        text = text.removesuffix(".reuse").removesuffix(".64")
        sign = text[0] if text and text[0] in "-~" and not text.startswith("-0x") else ""
        text = text[len(sign) :]
        if found := re.fullmatch(r"-?0x([0-9a-f]+)", text):
            value: int | None = int(found[1], 16) * (-1 if text.startswith("-") else 1)
            value = value & (WORD << 32 | WORD if wide else WORD) if value is not None else None
        elif found := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text):
            value = self._word(int(found[1], 16), wide)
        elif REGISTER.fullmatch(text):
            value = self._register(text, wide)
        else:
            value = None
        if value is None or not sign:
            return value
        # -x as ~x + 1, so that the carries are right.
        full = WORD << 32 | WORD if wide else WORD
        return (value ^ full) + (1 if sign == "-" else 0)

    def _word(self, at: int, wide: bool) -> int | None:
        low, high = self.words.get(at), self.words.get(at + 4)
        if wide:
            return None if low is None or high is None else high << 32 | low
        return low

    def _register(self, name: str, wide: bool) -> int | None:
        if name.endswith("Z"):
            return 0
        low = self.values.get(name)
        if not wide:
            return low
        high = self.values.get(_next(name))
        return None if low is None or high is None else high << 32 | low

    def note(self, line: Instruction, taken: bool | None) -> None:
        """Record the results of an instruction; those that are not computed here become unknown."""
        if taken is False or not line.operands:
            return
        base, *parts = line.op.split(".")
        place = next((i for i, operand in enumerate(line.operands[:3]) if REGISTER.fullmatch(operand)), 2)
        to = line.operands[place] if place < len(line.operands) and REGISTER.fullmatch(line.operands[place]) else None
        # Predicates before the first register are written, and carries right after it.
        written = [operand for operand in line.operands[:place] if PREDICATE.fullmatch(operand)]
        if to is not None and not base.endswith("SETP"):
            behind = line.operands[place + 1 : place + 3]
            written += itertools.takewhile(lambda operand: re.fullmatch(r"U?P(\d|T)", operand), behind)
        if base in TO_PREDICATES:
            to, written = None, list(_bits_of_predicates(line))
        found, flags = (None, {}) if taken is None else self._computed(line)
        for name in written:
            self.predicates.pop(name, None)
        self.predicates.update({name: value for name, value in flags.items() if value is not None})
        if to is None or to.endswith("Z") or base.startswith(("ST", "RED", "BAR")) or base.endswith("SETP"):
            return
        wide = "64" in parts or "WIDE" in parts or (base == "CS2R" and "32" not in parts) or base.startswith("D")
        count = 4 if "128" in parts else 2 if wide or "F64" in parts else 1
        name = to
        for i in range(count):
            self.values.pop(name, None)
            if found is not None and i < 2:
                self.values[name] = found >> 32 * i & WORD
            name = _next(name)

    def _computed(self, line: Instruction) -> tuple[int | None, dict[str, bool | None]]:
        """The result of an instruction, and the predicates that it sets."""
        base, *parts = line.op.split(".")
        operands, wide = line.operands, "64" in parts
        if base in TO_PREDICATES:
            value, bits = self.value(operands[1].split(".")[0]), _bits_of_predicates(line)
            return None, {name: None if value is None else bool(value >> i & 1) for name, i in bits.items()}
        if base in FROM_PREDICATES:
            return self._gathered(line), {}
        base = base.removeprefix("U")
        if base == "ISETP":
            return None, self._compared(operands, parts)
        if base == "PLOP3":
            # An unknown value may not matter.
            known = [self.predicate(operand) for operand in operands[2:5]]
            ways = itertools.product(*([False, True] if bit is None else [bit] for bit in known))
            found = {int(operands[5], 16) >> sum(4 >> i for i, bit in enumerate(way) if bit) & 1 for way in ways}
            return None, {operands[0]: bool(found.pop())} if len(found) == 1 else {}
        if base == "CS2R":
            return (0 if operands[1] == "SRZ" else None), {}
        if base in ("MOV", "LDC", "LDCU", "R2UR"):
            return self.value(operands[1], wide), {}
        carry: list[str] = []
        while len(carry) + 1 < len(operands) and re.fullmatch(r"U?P(\d|T)", operands[len(carry) + 1]):
            carry.append(operands[len(carry) + 1])
        given = operands[len(carry) + 1 :]
        if base in ("IADD3", "VIADD", "IADD"):
            flags = [operand for operand in given if re.fullmatch(r"!?U?P(\d|T)", operand)]
            terms = [self.value(operand, wide) for operand in given if operand not in flags]
            carried = [self.predicate(operand) for operand in flags] if "X" in parts else []
            if None in terms or None in carried:
                return None, {}
            total = sum(term for term in terms if term is not None) + sum(map(bool, carried))
            bits = 64 if wide else 32
            return total, {name: total >> bits > i for i, name in enumerate(carry) if PREDICATE.fullmatch(name)}
        if base == "IMAD" and "HI" not in parts and not carry:
            return self._multiplied(given, parts), {}
        if base == "SEL":
            which = self.predicate(operands[3])
            return (None if which is None else self.value(operands[1 if which else 2])), {}
        if base == "SHF":
            return self._shifted(operands, parts), {}
        if base == "LOP3":
            to_predicate = not REGISTER.fullmatch(operands[0])
            result = self._by_table(operands[1 + to_predicate :])
            if not to_predicate or result is None:
                return result, {}
            # Whether a bit is left.
            join = "AND" if "PAND" in parts else "OR"
            return result, {operands[0]: _joined(result != 0, self.predicate(operands[-1]), join)}
        return None, {}

    def _gathered(self, line: Instruction) -> int | None:
        """Predicates as bits of a register, inserted into those of another."""
        bits = _bits_of_predicates(line)
        found, known = self.value(line.operands[2]), {i: self.predicate(name) for name, i in bits.items()}
        if found is None or None in known.values():
            return None
        return found & ~sum(1 << i for i in known) | sum(1 << i for i, value in known.items() if value)

    def _by_table(self, operands: list[str]) -> int | None:
        a, b, c, table = (self.value(operand) for operand in operands[:4])
        return None if a is None or b is None or c is None or table is None else _of_table(a, b, c, table)

    def _compared(self, operands: list[str], parts: list[str]) -> dict[str, bool | None]:
        how = next((part for part in parts if part in COMPARE), None)
        join = next((part for part in parts if part in COMBINE), None)
        wide = bool({"U64", "S64"} & set(parts))
        a, b = self.value(operands[2], wide), self.value(operands[3], wide)
        other = self.predicate(operands[4])
        if how is None or join is None or a is None or b is None:
            return {}
        bits = 64 if wide else 32
        a, b = a & (1 << bits) - 1, b & (1 << bits) - 1
        if not {"U32", "U64"} & set(parts):
            a, b = a - (a >> bits - 1 << bits), b - (b >> bits - 1 << bits)
        found: bool | None = COMPARE[how](a, b)
        if "EX" in parts:
            # The high words, after the result of the low ones.
            low = self.predicate(operands[5])
            found = (found or low) if how == "NE" else low if a == b else found
        first = _joined(found, other, join)
        second = _joined(None if found is None else not found, other, join)
        pairs = zip(operands[:2], (first, second), strict=True)
        return {name: value for name, value in pairs if PREDICATE.fullmatch(name)}

    def _multiplied(self, given: list[str], parts: list[str]) -> int | None:
        wide = "WIDE" in parts
        a, b, c = self.value(given[0]), self.value(given[1]), self.value(given[2], wide)
        carried = self.predicate(given[3]) if "X" in parts else False
        if 0 in (a, b):
            a = b = 0
        if a is None or b is None or c is None or carried is None:
            return None
        a, b = a & WORD, b & WORD
        if wide and "U32" not in parts:
            a, b = a - (a >> 31 << 32), b - (b >> 31 << 32)
        return a * b + c + carried

    def _shifted(self, operands: list[str], parts: list[str]) -> int | None:
        low, by, high = (self.value(operand) for operand in operands[1:4])
        if low is None or by is None or high is None or by > 31:
            return None
        if "L" in parts:
            return (low << by) if "HI" not in parts else (high << 32 | low) << by >> 32
        if "S32" in parts:
            high -= high >> 31 << 32
        return high >> by if "HI" in parts else (high << 32 | low) >> by


def _next(name: str) -> str:
    """The next register."""
    letters = name.rstrip("0123456789")
    return f"{letters}{int(name[len(letters) :]) + 1}"


def _bits_of_predicates(line: Instruction) -> dict[str, int]:
    """The predicates that an instruction moves into a register or out of one, with the bit of each."""
    byte = re.search(r"\.B([0-3])", ".".join((line.op, *line.operands)))
    letters, mask = ("UP" if line.op.startswith("U") else "P"), int(line.operands[-1], 16)
    return {f"{letters}{i}": i + 8 * int(byte[1] if byte else 0) for i in range(7) if mask >> i & 1}


def _joined(found: bool | None, other: bool | None, join: str) -> bool | None:
    if join == "AND" and False in (found, other):
        return False
    if join == "OR" and True in (found, other):
        return True
    return None if found is None or other is None else COMBINE[join](found, other)


def _of_table(a: int, b: int, c: int, table: int) -> int:
    """LOP3: bit by bit, the table's entry for three bits."""
    found = 0
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found & WORD
