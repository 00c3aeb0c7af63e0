"""Reads the PTX of one kernel: its parameters, registers, labels and instructions."""

import re
from typing import NamedTuple

from ptx.faults import Unsupported

WORD = re.compile(r"(?:::|[\w$.%])+|\S")
SOURCE = re.compile(r"//\s*(\S+?:\d+)")


class Register(NamedTuple):
    """%r7, or a special register such as %tid.x."""

    name: str


class Number(NamedTuple):
    """A constant. kind: "int", or "f32" and "f64" where `value` holds the bits of a float."""

    value: int
    kind: str


class Symbol(NamedTuple):
    """A name: of a parameter, a label or a variable."""

    name: str


class Address(NamedTuple):
    """[base + offset]."""

    base: Register | Symbol
    offset: int


class Vector(NamedTuple):
    """{a, b, ...}."""

    items: tuple


class Instruction(NamedTuple):
    """One instruction. parts: of its name; guard: (register, whether it is negated) or None; source: of Triton."""

    parts: tuple
    guard: tuple | None
    operands: tuple
    line: int
    text: str
    source: str


class Kernel(NamedTuple):
    """A kernel. params: [(name, type)]; registers: {family: type}; labels: {name: index of an instruction}."""

    name: str
    params: list
    registers: dict
    labels: dict
    instructions: list
    threads: int

    def kind_of(self, register):
        """The type that a register was declared with."""
        return self.registers[register.rstrip("0123456789")]


def parse(text):
    """The only kernel of a PTX module. PTX that is not understood raises Unsupported."""
    return _Parser(text).kernel()


class _Parser:
    def __init__(self, text):
        self.lines = text.splitlines()
        self.words, self.sources = [], {}
        source = "?"
        for number, line in enumerate(self.lines, 1):
            code, _, _ = line.partition("//")
            if code.lstrip().startswith(".loc"):
                found = SOURCE.search(line)
                source = found[1] if found else source
            elif not code.lstrip().startswith((".file", ".section")):
                self.sources[number] = source
                self.words += [(word, number) for word in WORD.findall(code)]
        self.at = 0

    def peek(self):
        return self.words[self.at][0]

    def take(self, expected=None):
        word, line = self.words[self.at]
        if expected is not None and word != expected:
            raise Unsupported(f"PTX line {line}: expected {expected!r}, got {word!r} in {self.lines[line - 1]!r}")
        self.at += 1
        return word

    def skip_past(self, end):
        found = []
        while (word := self.take()) != end:
            found.append(word)
        return found

    def kernel(self):
        while self.peek() != ".entry":
            self.take()
        self.take()
        name, params = self.take(), []
        self.take("(")
        while self.peek() != ")":
            words = []
            while self.peek() not in ",)":
                words.append(self.take())
            params.append((words[-1], words[1].lstrip(".")))
            if self.peek() == ",":
                self.take()
        self.take(")")
        threads = 0
        while (word := self.take()) != "{":
            if word == ".reqntid":
                threads = int(self.take())
                while self.peek() == ",":
                    self.take()
                    threads *= int(self.take())
        registers, labels, instructions = {}, {}, []
        while (word := self.peek()) != "}":
            if word == ".reg":
                _, kind, family, *_ = self.skip_past(";")
                registers[family] = kind.lstrip(".")
            elif word == ".pragma":
                self.skip_past(";")
            elif word.startswith(".") or word == "{":
                line = self.words[self.at][1]
                raise Unsupported(f"PTX line {line}: {self.lines[line - 1]!r}")
            elif self.words[self.at + 1][0] == ":":
                labels[self.take()] = len(instructions)
                self.take(":")
            else:
                instructions.append(self.instruction())
        return Kernel(name, params, registers, labels, instructions, threads)

    def instruction(self):
        line, guard = self.words[self.at][1], None
        if self.peek() == "@":
            self.take()
            negated = self.peek() == "!"
            if negated:
                self.take()
            guard = (self.take(), negated)
        parts, operands = tuple(self.take().split(".")), []
        while self.peek() != ";":
            operands.append(self.operand())
            if self.peek() != ";":
                self.take(",")
        self.take(";")
        return Instruction(parts, guard, tuple(operands), line, self.lines[line - 1].strip(), self.sources[line])

    def operand(self):
        if self.peek() == "{":
            self.take()
            items = []
            while self.peek() != "}":
                items.append(self.operand())
                if self.peek() == ",":
                    self.take()
            self.take()
            return Vector(tuple(items))
        if self.peek() == "[":
            self.take()
            base, offset = self.operand(), 0
            while self.peek() != "]":
                sign = self.take()
                sign = sign if sign in "+-" else self.take(sign)
                offset += self.number(negative=sign == "-").value
            self.take()
            return Address(base, offset)
        if self.peek() == "-":
            self.take()
            return self.number(negative=True)
        word = self.peek()
        if word[0].isdigit():
            return self.number()
        self.take()
        if self.peek() == "+" and word[0] != "%":
            raise Unsupported(f"a sum as an operand: {word}")
        return Register(word) if word[0] == "%" else Symbol(word)

    def number(self, negative=False):
        if self.peek() == "-":  # [%r1 + -16]
            self.take()
            negative = not negative
        word = self.take()
        if word[:2] in ("0f", "0F", "0d", "0D"):
            return Number(int(word[2:], 16), "f32" if word[1] in "fF" else "f64")
        value = int(word.rstrip("U"), 0)
        return Number(-value if negative else value, "int")
