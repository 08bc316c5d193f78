"""MediaWiki XML dumps (``<wiki>-<date>-pages-articles*.xml``) to pages.

In: a dump as plain XML, ``.bz2`` (single stream or multistream), ``.gz``, or any of these on standard input; what it is
shows in its first bytes. Out: :class:`berth.corpus.sources.Item`, one a page, with what became of it.

How the work is spread: plain XML and multistream ``.bz2`` are cut into byte ranges that begin with a ``<page>`` (a bz2 stream that
begins with one), which worker processes read and decompress themselves. Everything else is decompressed here, cut into
pages, and sent to the workers in batches. Cuts depend on the bytes alone. Nobody parses the dump as one XML document: a
page is found by its tags (dumps escape ``<`` in text), and only that is given to the XML parser of the standard library,
so memory is one batch, and no entity or external reference can be declared (a page cannot hold a DOCTYPE).

Rejected: ``iterparse`` over the whole file (one process), the index file of multistream dumps (a second download).
"""

from __future__ import annotations

import bz2
import dataclasses
import hashlib
import html
import itertools
import mmap
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree import ElementTree

from berth.corpus.parts import PART_BYTES, Span
from berth.corpus.sources import Item
from berth.corpus.wikitext import Wikitext
from berth.errors import DataError

COMPRESSED_PART_BYTES = 4 << 20  # of a .bz2 or .gz, about 16 MiB of XML
BATCH_BYTES = 8 << 20  # of XML sent to a worker; part of the output's identity
MAX_PAGE_BYTES = 16 << 20  # of one <page>; MediaWiki allows 2 MiB of text, only full histories are longer
_READ = 1 << 20
_STREAM_START = re.compile(rb"BZh[1-9]1AY&SY")
_WRONG_CUTS = 8  # bz2 streams that begin inside a page before the file counts as one to be read from its start
_NAMESPACE = re.compile(r"<namespace key=\"(-?\d+)\"[^<>]*?(?:/>|>([^<]*)</namespace>)")


class Site(NamedTuple):
    """What the head of a dump says: name of the database ("huwiki"; "" if not given), namespaces as (number, name)."""

    name: str
    namespaces: tuple[tuple[int, str], ...]


class Batch(NamedTuple):
    """Pages cut out of a stream: where it came from, and each page's offset in the XML and bytes (none: it is too long)."""

    file: Path
    pages: tuple[tuple[int, bytes], ...]

    def digest(self) -> str:
        """SHA-256 of the pages."""
        digest = hashlib.sha256()
        for _, page in self.pages:
            digest.update(b"%d\n" % len(page))
            digest.update(page)
        return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- decompression


def compression(head: bytes) -> str:
    """``bz2``, ``gzip`` or ``plain``, by the first bytes of a file."""
    if head.startswith(b"BZh"):
        return "bz2"
    return "gzip" if head.startswith(b"\x1f\x8b") else "plain"


def _cut_off(name: str, offset: int) -> DataError:
    return DataError(
        f"{name}: ends at byte {offset} in the middle of compressed data: it is cut off; fetch the rest, and run again (finished parts are kept)"
    )


def _bunzip2(blocks: Iterable[bytes], name: str, start: int) -> Iterator[bytes]:
    """The content of every bz2 stream of ``blocks``, which begin at byte ``start`` of the file ``name``."""
    decompressor, offset, begun = bz2.BZ2Decompressor(), start, False
    for block in blocks:
        data = block
        while data or not decompressor.needs_input:
            try:
                piece = decompressor.decompress(data, _READ)
            except (OSError, EOFError) as error:
                raise DataError(
                    f"{name}: bytes {offset} to {offset + len(block)} are no valid bz2 data ({error}); fetch the file again"
                ) from None
            begun = True
            if piece:
                yield piece
            data = b""
            if decompressor.eof:
                data = decompressor.unused_data
                decompressor, begun = bz2.BZ2Decompressor(), False
                if not data.strip(b"\0"):  # padding behind the last stream
                    data = b""
        offset += len(block)
    if begun:
        raise _cut_off(name, offset)


def _gunzip(blocks: Iterable[bytes], name: str, start: int) -> Iterator[bytes]:
    """As :func:`_bunzip2`, for gzip members."""
    decompressor, offset, begun = zlib.decompressobj(31), start, False
    for block in blocks:
        data = block
        while data:
            try:
                piece = decompressor.decompress(data, _READ)
            except zlib.error as error:
                raise DataError(
                    f"{name}: bytes {offset} to {offset + len(block)} are no valid gzip data ({error}); fetch the file again"
                ) from None
            begun = True
            if piece:
                yield piece
            data = decompressor.unconsumed_tail
            if decompressor.eof:
                data = decompressor.unused_data.lstrip(b"\0")
                decompressor, begun = zlib.decompressobj(31), False
        offset += len(block)
    if begun:
        raise _cut_off(name, offset)


def _read_blocks(handle: IO[bytes], size: int | None = None) -> Iterator[bytes]:
    while block := handle.read(_READ if size is None else min(_READ, size)):
        if size is not None:
            size -= len(block)
        yield block


def _decompressed(blocks: Iterator[bytes], name: str, start: int = 0) -> Iterator[bytes]:
    first = next(blocks, b"")
    while first and len(first) < 10 and (more := next(blocks, b"")):  # a pipe may give less than was asked for
        first += more
    rest = itertools.chain((first,), blocks)
    kind = compression(first)
    return _bunzip2(rest, name, start) if kind == "bz2" else _gunzip(rest, name, start) if kind == "gzip" else rest


def span_pieces(span: Span) -> Iterator[bytes]:
    """The XML of a byte range of a dump (decompressed). Raises :class:`DataError` naming file and byte of damaged data."""
    with open(span.file, "rb") as handle:
        handle.seek(span.start)
        yield from _decompressed(_read_blocks(handle, span.stop - span.start), str(span.file), span.start)


# --------------------------------------------------------------------------------------------------------------- pages


def raw_pages(pieces: Iterable[bytes], name: str, complete: bool) -> Iterator[tuple[int, bytes]]:
    """Offset in the XML and bytes of every ``<page>`` (tags included); no bytes for one longer than :data:`MAX_PAGE_BYTES`.

    Raises :class:`DataError` when the XML ends inside a page or, if ``complete``, without ``</mediawiki>``.
    """
    buffer, base, inside, skipping = b"", 0, False, False
    for piece in pieces:
        buffer += piece
        at = 0
        while True:
            if not inside:
                found = buffer.find(b"<page>", at)
                if found < 0:
                    at = max(at, len(buffer) - len(b"</mediawiki>\n") - 16)  # the beginning of a tag, and the end of the dump
                    break
                at, inside = found, True
            end = buffer.find(b"</page>", at)
            if end < 0:
                if len(buffer) - at > MAX_PAGE_BYTES:
                    if not skipping:
                        yield base + at, b""
                    at, skipping = len(buffer) - len(b"</page>"), True
                break
            end += len(b"</page>")
            if not skipping:
                yield base + at, buffer[at:end] if end - at <= MAX_PAGE_BYTES else b""
            at, inside, skipping = end, False, False
        buffer, base = buffer[at:], base + at
    if inside or (complete and b"</mediawiki>" not in buffer):
        where = "in the middle of a page" if inside else "without </mediawiki>"
        raise DataError(
            f"{name}: its XML ends at byte {base + len(buffer)} {where}: it is cut off; fetch it again, and run again (finished parts are kept)"
        )


def _head(pieces: Iterator[bytes], name: str) -> tuple[bytes, Site]:
    """The first bytes of a dump, up to its first page, and what they say."""
    head = b""
    for piece in pieces:
        head += piece
        if b"</siteinfo>" in head or b"<page>" in head or len(head) > 16 * _READ:
            break
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: is UTF-16; convert it first with 'iconv -f UTF-16 -t UTF-8', and change encoding= in its first line")
    if b"<mediawiki" not in head[:4096]:
        raise DataError(
            f"{name}: not a MediaWiki dump: it does not begin with <mediawiki>; give the pages-articles .xml, .xml.bz2 or .xml.gz"
        )
    text = head.partition(b"<page>")[0].decode("utf-8", "replace")
    database = re.search(r"<dbname>([^<]*)</dbname>", text)
    names = tuple((int(key), html.unescape(value)) for key, value in _NAMESPACE.findall(text))
    return head, Site(database[1].strip() if database else "", names)


def read_site(file: Path) -> Site:
    """The head of the dump in ``file``. Raises :class:`DataError` if it is no MediaWiki dump."""
    return _head(span_pieces(Span(file, 0, file.stat().st_size)), str(file))[1]


def open_stdin() -> tuple[Site, Iterator[Batch]]:
    """The dump on standard input: its head, and its pages in batches."""
    pieces = _decompressed(_read_blocks(sys.stdin.buffer), "standard input")
    head, site = _head(pieces, "standard input")
    return site, _batches(itertools.chain((head,), pieces), Path("-"), "standard input")


def _batches(pieces: Iterable[bytes], file: Path, name: str) -> Iterator[Batch]:
    batch, size = list[tuple[int, bytes]](), 0
    for page in raw_pages(pieces, name, complete=True):
        if batch and size + len(page[1]) > BATCH_BYTES:
            yield Batch(file, tuple(batch))
            batch, size = [], 0
        batch.append(page)
        size += len(page[1])
    if batch:
        yield Batch(file, tuple(batch))


def file_batches(file: Path) -> Iterator[Batch]:
    """The pages of a dump that cannot be cut, read here."""
    return _batches(span_pieces(Span(file, 0, file.stat().st_size)), file, str(file))


# ------------------------------------------------------------------------------------------------------------- cutting


def _begins_with_page(data: mmap.mmap, at: int) -> bool:
    """Whether the bz2 stream at ``at`` begins with a page (or with the end of the dump)."""
    decompressor, text = bz2.BZ2Decompressor(), b""
    while not text.strip() and at < len(data) and not decompressor.eof:
        try:
            text += decompressor.decompress(data[at : at + _READ], 4096)
        except OSError:
            return False
        at += _READ
    return text.lstrip().startswith((b"<page>", b"</mediawiki>"))


def _next_cut(data: mmap.mmap, at: int, kind: str, budget: list[int]) -> int:
    """The first place from ``at`` on where the file may be cut; its size if there is none."""
    if kind == "plain":
        found = data.find(b"<page>", at)
        return found if found >= 0 else len(data)
    while (match := _STREAM_START.search(data, at)) is not None and budget[0] > 0:
        if _begins_with_page(data, match.start()):
            return match.start()
        budget[0] -= 1
        at = match.end()
    return len(data)


def cut_dump(file: Path, part_bytes: int = PART_BYTES, compressed_part_bytes: int = COMPRESSED_PART_BYTES) -> list[Span] | None:
    """The byte ranges of a dump that workers can read each by itself; ``None`` when it must be read from its start.

    ``None`` is for a large ``.gz``, a large single-stream ``.bz2`` and one whose streams begin inside pages (pbzip2).
    Raises :class:`DataError` for an empty file.
    """
    size = file.stat().st_size
    if not size:
        raise DataError(f"{file}: the file is empty")
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        kind = compression(data[:10])
        wanted = part_bytes if kind == "plain" else compressed_part_bytes
        if size <= wanted:
            return [Span(file, 0, size)]
        if kind == "gzip":
            return None
        edges, budget = [0], [_WRONG_CUTS]
        while edges[-1] < size:
            target = edges[-1] + wanted
            edges.append(size if target >= size else _next_cut(data, target, kind, budget))
        if kind == "bz2" and (budget[0] <= 0 or len(edges) == 2):
            return None
    return [Span(file, start, stop) for start, stop in itertools.pairwise(edges)]


# ------------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class DumpReader:
    """Pages to items; an instance travels to worker processes.

    Args:
        site: head of the dump.
        wikitext: turns a page's text into paragraphs.
        namespaces: numbers of those that are read (0: articles).
    """

    site: Site
    wikitext: Wikitext
    namespaces: frozenset[int] = frozenset((0,))

    def items(self, payload: Batch | Span) -> Iterator[Item]:
        """The pages of a batch or byte range. Raises :class:`DataError` for damaged data and invalid UTF-8 (file, byte)."""
        pages: Iterable[tuple[int, bytes]]
        if isinstance(payload, Batch):
            pages = payload.pages
        else:
            last = payload.stop >= payload.file.stat().st_size
            pages = raw_pages(span_pieces(payload), str(payload.file), complete=last)
        base = payload.start if isinstance(payload, Span) else 0
        for offset, page in pages:
            yield self._item(page, f"{payload.file}: the page at byte {offset} of the XML" + (f" behind byte {base}" if base else ""))

    def _item(self, page: bytes, where: str) -> Item:
        if not page:
            return Item("", None, [], "too_long")
        try:
            text = page.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} has a byte 0x{page[error.start]:02x} at offset {error.start} that is not UTF-8; fetch the dump again"
            ) from None
        try:
            root = ElementTree.fromstring(text)  # noqa: S314  begins with <page>: no DOCTYPE, hence no entities
        except ElementTree.ParseError as error:
            raise DataError(f"{where} is damaged XML ({error}); fetch the dump again") from None
        title = (root.findtext("title") or "").strip()
        name = (root.findtext("id") or title).strip()
        revision = root.findall("revision")[-1:]
        source = (revision[0].findtext("text") or "") if revision else ""
        if self._namespace(root.findtext("ns"), title) not in self.namespaces:
            return Item(name, title, [], "namespace")
        if root.find("redirect") is not None or source[:64].lstrip()[:9].upper() == "#REDIRECT":
            return Item(name, title, [], "redirect")
        if revision and (revision[0].findtext("model") or "wikitext") != "wikitext":
            return Item(name, title, [], "no_wikitext")
        return Item(name, title, self.wikitext.paragraphs(source))

    def _namespace(self, given: str | None, title: str) -> int:
        """The number of a page's namespace; dumps before export version 0.6 have it in the title only."""
        if given is not None and given.strip().lstrip("-").isdigit():
            return int(given)
        prefix, colon, _ = title.partition(":")
        numbers = {name.lower(): key for key, name in self.site.namespaces if name}
        return numbers.get(prefix.strip().lower(), 0) if colon else 0
