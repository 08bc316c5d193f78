"""Downloads from a server of the test: resumed, verified, refused, and what is said without network."""

import hashlib
import http.server
import json
import re
import socket
import threading
from pathlib import Path

import pytest
import yaml

from berth.corpus.download import PARTIAL, Remote, Unreachable, describe, download, fetch, load_sources, remotes
from berth.errors import ConfigError, DataError
from tests.support import ROOT, run_script

DATA = bytes(range(256)) * 4000
SHA256, MD5 = hashlib.sha256(DATA).hexdigest(), hashlib.md5(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; cuts the connection after ``cut`` bytes of a body, ignores ranges, or answers ``status`` if told so."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/data.bin": DATA}
        self.cut: list[int] = []  # of the next answers
        self.ranges, self.status, self.tag = True, 200, '"v1"'
        self.requests: list[tuple[str, str | None, int]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        body, asked, start = self.server.files.get(self.path), self.headers.get("Range"), 0
        status = self.server.status if body is not None else 404
        if asked and self.server.ranges and self.headers.get("If-Range") in (None, self.server.tag) and status == 200:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status = 206 if start < len(body) else 416
        self.server.requests.append((self.path, asked, status))
        self.send_response(status)
        if status not in (200, 206):
            self.send_header("Content-Range", f"bytes */{len(body or b'')}")
            self.end_headers()
            return
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        self.end_headers()
        stop = start + self.server.cut.pop(0) if self.server.cut else len(body)
        self.wfile.write(body[start:stop])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server():
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def remote(server: Server, **changes: object) -> Remote:
    return Remote(
        **{"file": "data.bin", "url": f"{server.url}/data.bin", "kind": "sha256", "checksum": SHA256, "size": len(DATA), **changes}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_fetched_once_verified_and_never_again(server, tmp_path):
    assert fetch(remote(server), tmp_path) == "downloaded"
    assert (tmp_path / "data.bin").read_bytes() == DATA
    assert names(tmp_path) == ["data.bin", "data.bin.json"]
    record = json.loads((tmp_path / "data.bin.json").read_text(encoding="utf-8"))
    assert (record["size"], record["sha256"], record["url"]) == (len(DATA), SHA256, f"{server.url}/data.bin")
    assert fetch(remote(server), tmp_path) == "kept"
    (tmp_path / "data.bin").touch()
    assert fetch(remote(server), tmp_path) == "kept", "another time, the same bytes"
    assert len(server.requests) == 1


def test_a_file_changed_after_it_was_verified_is_noticed(server, tmp_path):
    fetch(remote(server), tmp_path)
    (tmp_path / "data.bin").write_bytes(DATA[:-1] + b"x")
    with pytest.raises(DataError, match="it is not the file of"):
        fetch(remote(server), tmp_path)


def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    server.cut = [300_000, 200_000]
    assert fetch(remote(server), tmp_path) == "downloaded"
    assert [(asked, status) for _, asked, status in server.requests] == [(None, 200), ("bytes=300000-", 206), ("bytes=500000-", 206)]
    assert (tmp_path / "data.bin").read_bytes() == DATA


def test_the_next_run_goes_on_too(server, tmp_path):
    server.cut = [300_000]
    with pytest.raises(Unreachable, match=rf"cut; 300000 bytes are in .*data\.bin{PARTIAL} and the next run goes on from there"):
        fetch(remote(server), tmp_path, retries=0)
    assert names(tmp_path) == ["data.bin" + PARTIAL, "data.bin" + PARTIAL + ".json"]
    assert fetch(remote(server), tmp_path) == "downloaded"
    assert server.requests[-1][1:] == ("bytes=300000-", 206)


@pytest.mark.parametrize("change", ["tag", "ranges", "no tag", "side file"])
def test_begins_anew_when_it_cannot_go_on(server, tmp_path, change):
    server.cut = [300_000]
    if change == "no tag":
        server.tag = ""
    with pytest.raises(Unreachable):
        fetch(remote(server), tmp_path, retries=0)
    if change == "tag":
        server.tag = '"v2"'
    elif change == "ranges":
        server.ranges = False
    elif change == "side file":
        (tmp_path / f"data.bin{PARTIAL}.json").write_text("{", encoding="utf-8")
    assert fetch(remote(server), tmp_path) == "downloaded"
    assert server.requests[-1][2] == 200
    assert (tmp_path / "data.bin").read_bytes() == DATA


def test_a_server_that_changes_its_mind_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(server, "tag", f'"{len(server.requests)}"'))
    server.cut = [300_000] * 100
    with pytest.raises(Unreachable):
        fetch(remote(server), tmp_path, retries=3)
    assert len(server.requests) < 10


def test_killed_after_the_last_byte(server, tmp_path):
    server.cut = [len(DATA) - 1]
    with pytest.raises(Unreachable):
        fetch(remote(server), tmp_path, retries=0)
    with open(tmp_path / f"data.bin{PARTIAL}", "ab") as handle:
        handle.write(DATA[-1:])
    assert fetch(remote(server), tmp_path) == "downloaded"
    assert server.requests[-1][2] == 416


def test_a_wrong_checksum_removes_what_was_fetched(server, tmp_path):
    server.files["/data.bin"] = DATA[:-1] + b"x"
    with pytest.raises(DataError, match=rf"the sha256 of the {len(DATA)} bytes fetched is [0-9a-f]+, not {SHA256}; they were removed"):
        fetch(remote(server), tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_size_is_refused_before_it_is_fetched(server, tmp_path):
    with pytest.raises(DataError, match=f"the server has {len(DATA)} bytes, the sources file says 5"):
        fetch(remote(server, size=5), tmp_path)
    assert names(tmp_path) == []


def test_other_kinds_of_checksum(server, tmp_path):
    assert fetch(remote(server, kind="md5", checksum=MD5), tmp_path) == "downloaded"


def test_a_published_list(server, tmp_path):
    listed = remote(server, kind="md5", checksum=None, checksums_url=f"{server.url}/x-md5sums.txt", size=None)
    server.files["/x-md5sums.txt"] = f"{'0' * 32}  other.bin\n".encode()
    with pytest.raises(DataError, match="does not list data.bin: the snapshot is not complete"):
        fetch(listed, tmp_path)
    server.files["/x-md5sums.txt"] += f"{MD5}  data.bin\n".encode()
    assert fetch(listed, tmp_path) == "downloaded"
    assert names(tmp_path) == ["data.bin", "data.bin.json", "x-md5sums.txt"]


def test_what_the_server_refuses(server, tmp_path):
    with pytest.raises(DataError, match=r"missing: the server answers 404 .*snapshots are removed") as caught:
        fetch(remote(server, url=f"{server.url}/missing"), tmp_path)
    assert not isinstance(caught.value, Unreachable), "no reason to try again"
    server.status = 503
    with pytest.raises(Unreachable, match="answers 503"):
        fetch(remote(server), tmp_path, retries=1)
    assert len(server.requests) == 3


def no_server() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_without_network_it_says_what_to_place_where(tmp_path):
    url = no_server()
    one = Remote("one.bin", f"{url}/one.bin", "sha256", SHA256)
    two = Remote("two.bin", f"{url}/two.bin", "md5", None, f"{url}/md5sums.txt")
    with pytest.raises(DataError) as caught:
        download([one, two], tmp_path, retries=0)
    message = str(caught.value)
    for part in (f"{url}/one.bin", str(tmp_path / "one.bin"), SHA256, f"{url}/two.bin", str(tmp_path / "two.bin"), f"{url}/md5sums.txt"):
        assert part in message
    (tmp_path / "one.bin").write_bytes(DATA)
    (tmp_path / "two.bin").write_bytes(DATA)
    (tmp_path / "md5sums.txt").write_text(f"{MD5} *two.bin\n", encoding="utf-8")
    assert download([one, two], tmp_path, retries=0) == {"one.bin": "placed", "two.bin": "placed"}
    assert download([one, two], tmp_path, retries=0) == {"one.bin": "kept", "two.bin": "kept"}


def test_a_placed_file_that_is_wrong_stays(tmp_path):
    (tmp_path / "one.bin").write_bytes(DATA[:1000])
    with pytest.raises(DataError, match=r"one\.bin: its sha256 is .* or not all of it .1000 bytes.; remove it"):
        download([Remote("one.bin", f"{no_server()}/one.bin", "sha256", SHA256)], tmp_path)
    assert (tmp_path / "one.bin").stat().st_size == 1000


# --------------------------------------------------------------------------------------------------------- sources.yaml


def test_our_sources():
    sources = load_sources(ROOT / "data" / "sources.yaml")
    (dump,) = remotes(sources, "wikipedia", "zh-min-nan", "20261101")
    assert dump.url == "https://dumps.wikimedia.org/zh_min_nanwiki/20261101/zh_min_nanwiki-20261101-pages-articles-multistream.xml.bz2"
    assert dump.checksums_url == "https://dumps.wikimedia.org/zh_min_nanwiki/20261101/zh_min_nanwiki-20261101-sha1sums.txt"
    assert {remote.file for remote in remotes(sources, "squad", None, None)} == {
        f"{part}-v{v}.json" for part in ("train", "dev") for v in ("1.1", "2.0")
    }
    assert len(remotes(sources, "glue", None, None)) == 12
    assert all(name in describe(sources) for name in sources)


@pytest.mark.parametrize(
    ("name", "language", "snapshot", "message"),
    [
        ("wikipedia", "hu", "latest", "--snapshot latest is not pinned"),
        ("wikipedia", "hu", "20261341", "--snapshot 20261341 is no date"),
        ("wikipedia", "hu", None, "needs --snapshot"),
        ("wikipedia", None, None, "needs --language and --snapshot"),
        ("wikipedia", "../x", "20261101", "is no language code"),
        ("wikipedja", None, None, "--source wikipedja is not one of wikipedia, squad"),
    ],
)
def test_wrong_names(name, language, snapshot, message):
    with pytest.raises(ConfigError, match=message):
        remotes(load_sources(ROOT / "data" / "sources.yaml"), name, language, snapshot)


GOOD = {"file": "a.bin", "url": "https://example.org/{file}", "sha256": SHA256}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"files": [{**GOOD, "url": "ftp://example.org/a"}]}, "must begin with http, https, file"),
        ({"files": [{**GOOD, "file": "../a"}]}, "must be a plain file name"),
        ({"files": [{**GOOD, "sha256": "abc"}]}, "sha256 must be 64 hexadecimal digits"),
        ({"files": [{"file": "a", "url": "https://example.org"}]}, "must be verified"),
        ({"files": [{**GOOD, "sha512": "x"}]}, "unknown key.s. sha512"),
        ({"files": [GOOD], "needs": ["colour"]}, "language and snapshot only"),
        ({"description": "nothing"}, "either files or includes"),
        ({"includes": ["nobody"]}, "includes must be a list of sources"),
        ("text", "must be a mapping"),
    ],
)
def test_wrong_sources_files(tmp_path, source, message):
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"mine": source}), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"sources\.yaml: source 'mine': .*{message}"):
        load_sources(path)


def test_the_script(server, tmp_path):
    path = tmp_path / "sources.yaml"
    entry = {"file": "{language}-{snapshot}.bin", "url": f"{server.url}/data.bin", "sha256": SHA256}
    path.write_text(yaml.safe_dump({"mine": {"needs": ["language", "snapshot"], "files": [entry]}}), encoding="utf-8")
    words = ["--sources", path, "--source", "mine", "--language", "hu", "--snapshot", "20261101", "--output_dir", tmp_path / "out"]
    done = run_script("data/download.py", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/out/hu-20261101.bin: {len(DATA)} bytes, downloaded, verified\n"
    assert run_script("data/download.py", "--list").stdout.startswith("wikipedia --language")
    refused = run_script("data/download.py", *[word if word != "20261101" else "latest" for word in words])
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    local = {"file": "copy.bin", "url": (tmp_path / "out" / "hu-20261101.bin").as_uri(), "md5": MD5}
    path.write_text(yaml.safe_dump({"mine": {"files": [local]}}), encoding="utf-8")
    assert ": 1024000 bytes, downloaded" in run_script("data/download.py", *words[:4], "--output_dir", tmp_path / "out").stdout
