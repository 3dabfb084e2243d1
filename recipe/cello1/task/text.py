"""One form of names, and one rule of what counts as no value, for data, gold answers, responses and plugin alike."""

from __future__ import annotations

import math
import re
import unicodedata
from argparse import ArgumentParser
from collections.abc import Sequence
from decimal import Decimal

# How tables write that there is nothing; "<NA>" and "NaT" are how pandas prints it ("NAT" is normal adjacent tissue).
_NOTHING = re.compile(
    r"[-\u2012-\u2015\u2212?.*_/\\#~!'\"()\[\]<> ]*|<?#?n[/.]?a\.?>?|-?nan|none|null|missing|"
    r"unknown([ _-]cells?)?([ _-]types?)?|un(available|specified|defined|determined|identified)|"
    r"un(assigned|annotated|classified|labell?ed)([ _-]cells?)?|"
    r"not[ _-](available|applicable|reported|recorded|provided|collected|specified|determined|known|assigned)",
    re.IGNORECASE,
)
# What a terminal obeys or cannot show: control characters, line separators, marks of direction, halves of characters.
_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_ALIKE = str.maketrans({"\u00b5": "\u03bc", "\u2010": "-", "\u2011": "-"})  # micro sign, two more hyphens
_PARAMETER = re.compile(r"\A(\w+)(?=[ :])|(?<![^\s(])(\w+)=(?:'([^']*)'|([^\s,;:)]*))")
# What fonts do not show beside format characters (Cf): joiner, fillers, variation selectors.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
# A column of whole numbers with a gap is one of floats.
_WHOLE = re.compile(r"(-?\d+)\.0*")
_LARGE = re.compile(r"-?\d(\.\d+)?e\+\d+")


def normal_form(text: str) -> str:
    """Return text as it is kept and compared: NFC, without what nobody sees, with plain blanks, hyphens and mu."""
    if text.isascii():
        return text
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category != "Cf" and character not in _INVISIBLE:
            kept.append(" " if category == "Zs" else character)
    return unicodedata.normalize("NFC", "".join(kept).translate(_ALIKE))


def is_usable(value: object) -> bool:
    """Say whether a value of a table says anything: not None, NaN, or text like unknown, N/A, null, -."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    text = " ".join(normal_form(str(value)).split())
    return text != "NaT" and _NOTHING.fullmatch(text) is None


def clean_value(value: object) -> str:
    """Return a value as one line in normal form, every run of white space one blank; empty if it says nothing."""
    return " ".join(normal_form(str(value)).split()) if is_usable(value) else ""


def on_one_line(value: object) -> str:
    """Return a value on one line in normal form, with the blanks that it has; empty if it says nothing."""
    return re.sub(r"[^\S ]+", " ", normal_form(str(value))) if is_usable(value) else ""


def canonical_id(value: object) -> str:
    """Return the one form of an id: one line in NFKC, a whole number as one without a fraction; empty for no id."""
    text = clean_value(unicodedata.normalize("NFKC", value) if isinstance(value, str) else value)
    if _LARGE.fullmatch(text) and (large := Decimal(text)) == large.to_integral_value():
        return str(int(large))
    return number[1] if (number := _WHOLE.fullmatch(text)) else text


def visible(text: str) -> str:
    """Replace what a terminal would obey instead of showing it; line breaks and tabs stay."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text)


def in_options(text: str, parser: ArgumentParser) -> str:
    """Write the parameters that a message names, first of all or as ``name=``, as the options of a command."""
    options: dict[str, str] = {}
    for action in parser._actions:
        for name in action.option_strings:
            if name.startswith("--"):
                options.setdefault(action.dest, name)

    def option(found: re.Match[str]) -> str:
        name, value = found[1] or found[2], found[3] or found[4] or ""
        if name not in options or value == "False":
            return found[0]
        return f"{options[name]} {value}" if value not in ("", "True") else options[name]

    return _PARAMETER.sub(option, text)


def shown(value: object, limit: int = 80) -> str:
    """Return how a message shows a value: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def list_entries(text: str) -> list[str]:
    """Split a list with CELLxGENE's separator ``||``, each entry once; those that say nothing are left out."""
    entries = re.split(r"\s*\|\|\s*", text)
    if len(entries) > 1:
        entries = list(dict.fromkeys(entry.strip() for entry in entries))
    return [entry for entry in entries if is_usable(entry)]


def join_list(entries: Sequence[str]) -> str:
    """Write a list as a sentence has it."""
    return " and ".join([", ".join(entries[:-1]), entries[-1]] if len(entries) > 1 else entries)
