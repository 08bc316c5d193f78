"""Wikitext of one page to paragraphs of plain prose.

In: the source of a page. Out: its paragraphs, single spaces between words. As in the BERT paper ("we extract only the text passages and
ignore lists, tables, and headers", Devlin et al. 2018, 3.1) headings and list items are left out unless asked for;
templates, tables, references, files, categories, comments, formulas and galleries always are.

Three steps, each linear in the page: (1) a scanner cuts out what is dropped as a whole (elements, templates, tables; unclosed
ones lose only their opening), (2) regular expressions show ordinary links and quotes, (3) lines that still hold markup go
through the parser library mwparserfromhell. The library alone takes 1.0 MB/s of source, this 17 MB/s (2026-11-21, one core, 206
pages of the English Wikipedia); of the library's words 99.7 % are here, the others are mostly attributes of tables.
Rejected: template expansion (needs all templates in memory and a wiki's worth of Lua), regular expressions alone (they fail on
nested or broken markup: 3 lines of these pages).

Some templates are text and would leave a hole in their sentence: units, quotations, words in other languages
(:data:`_SHOWN`); these show their argument.
"""

from __future__ import annotations

import bisect
import dataclasses
import html
import importlib.util
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_LONGEST_LINE = 5_000  # characters of one line given to the parser library: its time is not linear in broken markup

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_NOWIKI = re.compile(r"<nowiki\s*/>|<nowiki\s*>(.*?)(?:</nowiki\s*>|\Z)", re.DOTALL | re.IGNORECASE)
_DROPPED = (
    "ref|references|math|chem|ce|gallery|timeline|syntaxhighlight|source|score|imagemap|graph|chart|mapframe|maplink|templatedata|"
    "templatestyles|hiero|inputbox|categorytree|indicator|includeonly|table|pre|style|script|section|rss|listing"
)
_ELEMENT = re.compile(rf"<(/?)({_DROPPED})\b([^<>]*)>", re.IGNORECASE)
_BRACES = re.compile(r"\{\{|\}\}|^[ \t:*#;]*\{\||^[ \t]*\|\}(?!\})", re.MULTILINE)
_BLOCK_TAG = re.compile(r"</?(?:p|div|blockquote|center|poem|ul|ol|li|dl|dt|dd|hr|h[1-6]|tr|td|th)\b[^<>]*>", re.IGNORECASE)
_BREAK_TAG = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_INLINE_TAG = re.compile(
    r"</?(?:b|i|u|s|em|strong|small|big|sup|sub|span|font|tt|code|kbd|samp|var|cite|abbr|dfn|del|ins|strike|q|mark|bdi|bdo|time|data|"
    r"ruby|rb|rt|rp|wbr|nobr|noinclude|onlyinclude|translate|tvar|languages|noautonum|nowiki)\b[^<>]*>",
    re.IGNORECASE,
)
_EXTERNAL = re.compile(r"\[(?:(?:https?|ftp|ftps|irc|news|gopher|mailto|sftp):|//)[^\s\[\]]*(?:[ \t]([^\[\]\n]*))?\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[([^\[\]|\n]*)(?:\|([^\[\]]*))?\]\]")
_LANGUAGE = re.compile(r"(?:[a-z]{2,3}|simple)(?:-[a-z]+)*")
_FILE_SUFFIX = re.compile(r"\.(?:jpe?g|png|gif|svg|tiff?|webp|ogg|oga|ogv|webm|mp3|mp4|wav|flac|mid|pdf|djvu|xcf|stl)\s*$", re.IGNORECASE)
_MARKS = frozenset("*#:;|!=")  # a line that begins like this is no prose
_QUOTES = re.compile(r"'{2,}")
_SWITCH = re.compile(r"__[^\W\d_]{3,}__")
_LEFT_MARKUP = re.compile(r"\[\[|\]\]|\{\{|\}\}|</?[a-zA-Z]")
_VARIANT = re.compile(r"-\{([^{}\n]*)\}-")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HOLE = re.compile(r" ?[(\[（] ?[,;:/–-]?(?: ?[,;:/]){0,5} ?[)\]）]")
_HOLE_START = re.compile(r"([(（]) ?(?:[,;:] ?){1,5}")
_HOLE_END = re.compile(r"(?: ?[,;:]){1,5} ?([)）])")
_COMMAS = re.compile(r",(?: ?,)+(?=\s)")
_SPACE_BEFORE = re.compile(r"(?<=\w) (?=[,.](?: |$))")

# Name of a template (lower case) -> the positional argument that is the text, or a fixed text. Only what is unambiguous in every wiki.
_SHOWN: dict[str, int | str] = {
    **dict.fromkeys(("nowrap", "nobr", "nobreak", "abbr", "small", "smaller", "big", "em", "strong", "sic", "tooltip", "visible anchor"), 1),
    **dict.fromkeys(("quote", "blockquote", "cquote", "quotation", "centre", "center", "script", "smallcaps", "sc", "formatnum"), 1),
    **dict.fromkeys(("lang", "transl", "transliteration", "langue"), 2),
    **dict.fromkeys(("ndash", "endash", "–"), "–"),
    **dict.fromkeys(("mdash", "emdash", "—"), "—"),
    **dict.fromkeys(("spaced ndash", "snd", "spnd", "sndash", "spaced en dash"), " – "),
    **dict.fromkeys(("nbsp", "space", "spaces"), " "),
    "'": "'", "!": "", "=": "=", "·": "·", "•": "•",
}  # fmt: skip
_UNITS = frozenset(("convert", "cvt", "unit", "unité", "val"))
_LONGEST_SHOWN = 3000


@dataclasses.dataclass(frozen=True)
class Wikitext:
    """Turns wikitext into paragraphs; an instance travels to worker processes.

    Args:
        hidden: names, lower case, of the namespaces whose links show nothing (files, categories), in the wiki's language.
        keep_lists: list items become paragraphs of their own, without their marker.
        keep_headings: section titles become paragraphs of their own.
    """

    hidden: frozenset[str] = frozenset()
    keep_lists: bool = False
    keep_headings: bool = False

    def paragraphs(self, text: str) -> list[str]:
        """The paragraphs of a page, none of them empty. Never fails: markup that cannot be understood is dropped or shown."""
        text = _COMMENT.sub("", text)
        if "<" in text:
            text = _NOWIKI.sub(_protect, text)
            text = _without_elements(text)
        text = _without_braces(text)
        if "-{" in text:
            text = _VARIANT.sub(_variant, text)
        text = self._show_links(text)
        if "<" in text:
            text = _INLINE_TAG.sub("", _BREAK_TAG.sub(" ", _BLOCK_TAG.sub("\n", text)))
        return self._join(text.split("\n"))

    def _join(self, lines: list[str]) -> list[str]:
        """Lines that follow each other are one paragraph, as MediaWiki shows them; list items and headings stand alone."""
        found: list[list[str]] = []
        joins = False
        for line in lines:
            alone = line.lstrip()[:1] in _MARKS
            shown = self._line(line)
            if shown and joins and not alone:
                found[-1].append(shown)
            elif shown:
                found.append([shown])
            joins = bool(shown) and not alone
        return [" ".join(pieces) for pieces in found]

    def _show_links(self, text: str) -> str:
        if "[" not in text:
            return text
        text = _EXTERNAL.sub(lambda found: found[1] or "", text)
        for _ in range(6):  # links inside the captions of files: the innermost first
            text, changes = _LINK.subn(self._link, text)
            if not changes:
                break
        return text

    def _link(self, found: re.Match[str]) -> str:
        target, label = found[1].strip(), found[2]
        prefix, colon, rest = target.partition(":")
        if colon:
            if not prefix:
                target = rest
            else:
                name = prefix.strip().lower().replace("_", " ")
                if name in self.hidden or _FILE_SUFFIX.search(rest) or (prefix != "mw" and _LANGUAGE.fullmatch(prefix)):
                    return ""
        return label if label and not label.isspace() else target

    def _line(self, line: str) -> str:
        line = line.strip()
        if not line:
            return ""
        first = line[0]
        if first in "*#:;":
            if not self.keep_lists:
                return ""
            line = line.lstrip("*#:; ")
        elif first in "|!" or line.startswith(("{|", "----")):
            return ""
        elif first == "=" and line.endswith("="):
            if not self.keep_headings:
                return ""
            line = line.strip("=")
        if _LEFT_MARKUP.search(line):
            line = self._by_library(line)
        if "''" in line:
            line = _QUOTES.sub(_apostrophes, line)
        if "__" in line:
            line = _SWITCH.sub("", line)
        line = " ".join(line.split())
        if "(" in line or "[" in line or "（" in line:  # around what is left of a dropped pronunciation or reference
            line = _HOLE_START.sub(r"\1", _HOLE_END.sub(r"\1", _HOLE.sub("", line)))
        if any(pair in line for pair in ("[[", "]]", "{{", "}}")):
            line = _LEFT_BRACKETS.sub("", line)
        if "&" in line:  # last: what a nowiki element or a reference gives is text
            line = html.unescape(line)
        line = _SPACE_BEFORE.sub("", " ".join(line.split()))
        line = _COMMAS.sub(",", line).strip()
        return line if any(map(str.isalnum, line)) else ""  # what is left of a dropped line: dots, bars

    def _by_library(self, line: str) -> str:
        if len(line) <= _LONGEST_LINE:
            code = _parser().parse(line)
            for link in code.filter_wikilinks():
                name, colon, rest = str(link.title).partition(":")
                if colon and (name.strip().lower() in self.hidden or _FILE_SUFFIX.search(rest)):
                    try:
                        code.remove(link)
                    except ValueError:  # it went with another that held it
                        continue
            line = str(code.strip_code(normalize=False, collapse=False))
        return _TAG.sub("", line)


_LEFT_BRACKETS = re.compile(r"[\[\]{}]{2,}")


@lru_cache(maxsize=1)
def _parser() -> Any:
    import mwparserfromhell

    return mwparserfromhell


def parser_installed() -> bool:
    """Whether the parser library is there (``berth[mediawiki]``); asked before a run, since most lines do not need it."""
    return importlib.util.find_spec("mwparserfromhell") is not None


def _protect(found: re.Match[str]) -> str:
    """The content of a nowiki element with every mark of wikitext as a character reference, which is resolved last."""
    return "".join(f"&#{ord(mark)};" if mark in "[]{}|'=*#:;<>_!-" else mark for mark in found[1] or "")


def _apostrophes(found: re.Match[str]) -> str:
    return "'" * {4: 1}.get(len(found[0]), max(0, len(found[0]) - 5))


def _without_elements(text: str) -> str:
    """``text`` without the elements that show no prose; of an unclosed one only the tag goes."""
    tags = list(_ELEMENT.finditer(text))
    if not tags:
        return text
    closing: dict[str, list[int]] = {}
    opening: dict[str, list[int]] = {}
    for number, tag in enumerate(tags):
        if tag[1]:
            closing.setdefault(tag[2].lower(), []).append(number)
        elif not tag[3].endswith("/"):
            opening.setdefault(tag[2].lower(), []).append(number)
    pieces: list[str] = []
    at = number = 0
    while number < len(tags):
        tag = tags[number]
        pieces.append(text[at : tag.start()])
        end = number
        if not tag[1] and not tag[3].endswith("/"):
            name = tag[2].lower()
            ends = closing.get(name, [])
            where = bisect.bisect_right(ends, number)
            if where < len(ends):
                end = ends[where]
                if name == "ref":  # references do not nest: one that is never closed must not swallow text up to the next
                    following = bisect.bisect_right(opening[name], number)
                    if following < len(opening[name]) and opening[name][following] < end:
                        end = number
        at = tags[end].end()
        number = end + 1
    pieces.append(text[at:])
    return "".join(pieces)


def _shown(body: str) -> str:
    """What a template shows, those inside it resolved: mostly nothing (see :data:`_SHOWN`)."""
    arguments = [body] if "|" not in body else re.split(r"\|(?![^\[\]|]*(?:\|[^\[\]|]*)*\]\])", body)
    name = arguments[0].strip().lower().replace("_", " ")
    if name.startswith("formatnum:"):
        return name.removeprefix("formatnum:")
    rule = 1 if name.startswith("lang-") else _SHOWN.get(name)
    if rule is None and name not in _UNITS:
        return ""
    if isinstance(rule, str):
        return rule
    named: dict[str, str] = {}
    positional: list[str] = []
    for part in arguments[1:]:
        key, equals, value = part.partition("=")
        if equals and key.strip().replace("_", "").isalnum():
            named[key.strip()] = value.strip()
        else:
            positional.append(part.strip())
    if rule is None:
        return " ".join(positional[:2])
    if len(positional) >= rule:
        return positional[rule - 1]
    return named.get(str(rule)) or named.get("text") or ""


def _without_braces(text: str) -> str:
    """``text`` without templates and tables, nested to any depth; an unmatched brace pair stands as text."""
    spans: list[tuple[int, int, str]] = []  # closed and in order; an outer one replaces those inside it
    stack: list[tuple[int, bool, int]] = []  # start, whether a template, end of the opening
    templates = 0
    for found in _BRACES.finditer(text):
        mark = found[0]
        if mark == "{{":
            stack.append((found.start(), True, found.end()))
            templates += 1
            continue
        if mark.endswith("{|"):
            stack.append((found.start(), False, found.end()))
            continue
        template = mark == "}}"
        if not stack or (template and not templates) or (not template and stack[-1][1]):
            continue
        if template:
            while not stack[-1][1]:  # a table that is not closed inside its template
                stack.pop()
            templates -= 1
        start, _, inner = stack.pop()
        first = len(spans)
        while first and spans[first - 1][0] > start:
            first -= 1
        inside = spans[first:]
        del spans[first:]
        short = template and found.start() - inner <= _LONGEST_SHOWN
        spans.append((start, found.end(), _shown(_replaced(text, inner, found.start(), inside)) if short else ""))
    return _replaced(text, 0, len(text), spans)


def _replaced(text: str, start: int, stop: int, spans: Iterable[tuple[int, int, str]]) -> str:
    """``text[start:stop]`` with each span (start, end, what it shows; in order) replaced."""
    pieces, at = list[str](), start
    for begin, end, shown in spans:
        pieces += (text[at:begin], shown)
        at = end
    pieces.append(text[at:stop])
    return "".join(pieces)


def _variant(found: re.Match[str]) -> str:
    """What ``-{...}-`` shows, with which Chinese (and other) wikis mark words that differ by script: the first variant."""
    flags, bar, rest = found[1].rpartition("|")
    if bar and set(flags.replace(";", "").split()) & {"H", "T", "-"}:  # a rule for the page or its title, not text
        return ""
    first = rest.split(";")[0]
    name, colon, value = first.partition(":")
    return (value if colon and _LANGUAGE.fullmatch(name.strip()) else first).strip()


def hidden_names(namespaces: Iterable[tuple[int, str]]) -> frozenset[str]:
    """The names (lower case) whose links show nothing, from the namespaces of a dump: media, special, file, category, and English ones."""
    local = (name.lower() for key, name in namespaces if key in (-2, 6, 14) and name)
    return frozenset((*local, "file", "image", "media", "category"))
