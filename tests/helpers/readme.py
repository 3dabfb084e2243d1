"""What the READMEs hold, cut into pieces: fenced blocks, the commands in them, and code within a line."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "recipe/cello1/README.md", "scverse_plugin/README.md")
PROGRAMS = ("accelerate", "bash", "cello1", "git", "hf", "pip", "python", "ray", "scanpy", "sphinx-build", "uv", "vllm")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"``(.+?)``|`([^`\n]+)`")
_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    readme: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.readme}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell: the variables before it, and its words."""

    text: str
    variables: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def program(self) -> str:
        return self.words[0] if self.words else ""


def read(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def blocks(readme: str) -> list[Block]:
    text = read(readme)
    return [Block(readme, text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in _FENCE.finditer(text)]


def codes(readme: str) -> list[str]:
    """Code within a line, each once."""
    return list(dict.fromkeys(m[1] or m[2] for m in _CODE.finditer(_FENCE.sub("", read(readme)))))


def parse(line: str) -> Command:
    words = shlex.split(line, comments=True)
    variables = {}
    while words and (found := _VARIABLE.fullmatch(words[0])):
        variables[found[1]] = found[2]
        words = words[1:]
    return Command(line.strip(), variables, tuple(words))


def commands(text: str) -> list[Command]:
    """The commands of a shell block; a comment is none."""
    found = [parse(line) for line in text.replace("\\\n", " ").splitlines()]
    return [command for command in found if command.words or command.variables]


def inline_commands(readme: str) -> list[Command]:
    """Code within a line that begins like a command, after its variables if it has any."""
    found = []
    for code in codes(readme):
        first = next((word for word in code.split() if not _VARIABLE.fullmatch(word)), "")
        if first in PROGRAMS or (first.startswith("./") and len(code.split()) > 1):
            found.append(parse(code))
    return found
