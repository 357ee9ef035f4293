"""Files behind URLs are fetched once, completely, and only over http and https."""

import io
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor

from megatron_vlbridge.config import Config
from megatron_vlbridge.data import url_cache
from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.data.dataset import PackedConversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.lengths.fingerprint import fingerprint
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.media import Conversation, load_image, load_video
from megatron_vlbridge.data.report.summary import summarize
from megatron_vlbridge.data.url_cache import fetch, is_http
from tests.errors import rejects
from tests.unit.test_dataset import config, processor

__all__ = ["config", "processor"]  # fixtures


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Serves images, and paths on which something goes wrong; counts the requests of each path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        number, body = self.server.requests[self.path], png(int("0" + re.sub(r"\D.*", "", self.path[1:])))
        status = 200
        if self.path == "/404":
            status = 404
        elif self.path == "/damaged":
            Image.new("RGB", (4, 4)).save(file := io.BytesIO(), "AVIF")
            body = file.getvalue().replace(b"iloc", b"free")
        elif self.path == "/large":
            Image.new("1", (20_000, 20_000)).save(file := io.BytesIO(), "PNG")
            body = file.getvalue()
        elif self.path == "/page":
            body = b"<!DOCTYPE html>"
        elif self.path == "/503" and number < 3:
            status = 503
        self.send_response(302 if self.path in ("/300", "/301") else status)
        if self.path in ("/300", "/301"):
            self.send_header("Location", "/7.png" if self.path == "/300" else "ftp://127.0.0.1/etc/passwd")
            body = b""
        self.send_header("Content-Length", str(len(body) + (9 if self.path == "/5" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(url_cache, "WAIT_S", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    one = Server()
    thread = Thread(target=one.serve_forever, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    first = fetch(f"{server.url}/3.png?size=4", tmp_path / "a" / "b")
    assert fetch(f"{server.url}/3.png?size=4", tmp_path / "a" / "b") == first
    assert Path(first).read_bytes() == png(3)
    assert Path(first).suffix == ".png"
    assert server.requests == {"/3.png?size=4": 1}
    other = fetch(f"{server.url}/3.png?size=5", tmp_path / "a" / "b")
    assert other != first
    assert len(files(tmp_path / "a" / "b")) == 2


def test_of_four_processes_one_fetches(server: Server, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = pool.starmap(fetch, [(f"{server.url}/{n % 3}.png", tmp_path) for n in range(24)], chunksize=1)
    assert {Path(path).read_bytes() for path in paths} == {png(n) for n in range(3)}
    assert server.requests == {f"/{n}.png": 1 for n in range(3)}


def test_what_fails_leaves_nothing(server: Server, tmp_path: Path) -> None:
    for path, problem, requests in (
        ("/404", "HTTP Error 404", 1),
        ("/5", "bytes came, but the server said", 3),  # the connection breaks
        ("/301", "", None),  # a redirect to FTP
    ):
        with rejects("cannot be fetched: ", problem, start=f"{server.url}{path}: "):
            fetch(f"{server.url}{path}", tmp_path)
        assert files(tmp_path) == []
        assert requests is None or server.requests[path] == requests
    with rejects("cannot be fetched: ", start="http://127.0.0.1:1/a.png: "):
        fetch("http://127.0.0.1:1/a.png", tmp_path)
    (tmp_path / "file").write_text("")
    with rejects("cannot be written to"):
        fetch(f"{server.url}/1.png", tmp_path / "file")


def test_a_busy_server_is_asked_again_and_redirects_are_followed(server: Server, tmp_path: Path) -> None:
    assert Path(fetch(f"{server.url}/503", tmp_path)).read_bytes() == png(503)
    assert server.requests["/503"] == 3
    assert Path(fetch(f"{server.url}/300", tmp_path)).read_bytes() == png(7)


@pytest.mark.parametrize("kind", ["image", "frames", "video"])
def test_an_answer_that_is_no_image_or_video_is_not_kept(server: Server, tmp_path: Path, kind: str) -> None:
    """Such as a page that asks to log in: once the server is repaired, the file is fetched."""
    options = MediaOptions(url_cache=str(tmp_path))
    url = f"{server.url}/page"
    with rejects("expected an image or a video, found 15 bytes that begin with b'<!DOCTYPE html>'", start=f"{url}: "):
        if kind == "image":
            load_image({"type": "image", "image": url}, options)
        else:
            load_video({"type": "video", "video": [url] if kind == "frames" else url, "fps": 2}, options)
    assert files(tmp_path) == []
    assert server.requests["/page"] == 1


@pytest.mark.parametrize("path", ["/damaged", "/large"])
def test_an_image_that_cannot_be_read_is_kept_and_named(server: Server, tmp_path: Path, path: str) -> None:
    """It is one: what is wrong with it is said when it is read, and that by the error that others get."""
    options = MediaOptions(url_cache=str(tmp_path), max_image_pixels=100)
    with rejects("cannot be decoded as an image" if path == "/damaged" else "is too large"):
        load_image({"type": "image", "image": server.url + path}, options)
    assert len(files(tmp_path)) == 1


def test_without_pyav_the_extra_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with rejects("video files need PyAV"):
        load_video({"type": "video", "video": f"{server.url}/1.png"}, MediaOptions(url_cache=str(tmp_path)))


def test_urls_with_any_characters_are_fetched(server: Server, tmp_path: Path) -> None:
    for path in ("/1.png?a b", "/1.png?\u00e4", "/1.png?[x]", "/1.png?%20"):
        assert Path(fetch(server.url + path, tmp_path)).read_bytes() == png(1)
    assert set(server.requests) == {"/1.png?a%20b", "/1.png?%C3%A4", "/1.png?[x]", "/1.png?%20"}
    for url in ("http://[bad/x.png", "https://[::1"):
        with rejects("cannot be fetched", start=f"{url}: "):
            fetch(url, tmp_path)
    assert not is_http("//[draft]/x.png")


def test_a_file_that_is_too_large_is_rejected(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_cache, "LIMIT", 100)
    with rejects(start=f"{server.url}/1.png: more than 100 bytes"):
        fetch(f"{server.url}/1.png", tmp_path)
    assert files(tmp_path) == []


def test_images_and_frames_are_read_through_the_cache(server: Server, tmp_path: Path) -> None:
    options = MediaOptions(url_cache=str(tmp_path))
    expected = np.array(Image.open(io.BytesIO(png(2))))
    image = load_image({"type": "image", "image": f"{server.url}/2.png"}, options)
    assert np.array_equal(np.array(image), expected)
    video = load_video({"type": "video", "video": [f"{server.url}/2.png", f"{server.url}/4.png"], "fps": 2}, options)
    assert np.array_equal(video.frames[0].permute(1, 2, 0).numpy(), expected)
    for source in ("s3://a/b.png", "file:///etc/passwd", "ftp://127.0.0.1/a.png"):
        with rejects("is a URL"):
            load_image({"type": "image", "image": source}, options)
    with rejects("is a URL", "--url-cache DIR"):
        load_image({"type": "image", "image": f"{server.url}/2.png"})


def test_packs_are_those_of_the_files(
    server: Server, tmp_path: Path, processor: Qwen3VLProcessor, config: Config
) -> None:
    """The lengths, too; and the folder of the cache is not part of what a table of lengths was made with."""
    packs, prints = [], []
    (tmp_path / "1.png").write_bytes(png(1))
    for name, source, cache in (
        ("files", "1.png", None),
        ("urls", f"{server.url}/1.png", "x"),
        ("again", "1.png", "y"),
    ):
        question = [{"type": "image", "image": source}, {"type": "text", "text": "hello"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "seven"}]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        media = MediaOptions(url_cache=cache and str(tmp_path / cache))
        conversations = read_conversations(tmp_path / f"{name}.jsonl")
        packs.append(
            PackedConversations(conversations, processor, config, seq_length=96, num_samples=1, media=media)[0]
        )
        prints.append(fingerprint(conversations, Measure(processor, 32, media))["media"])
    for pack in packs[1:]:
        assert all(torch.equal(pack[key], value) for key, value in packs[0].items())
    assert prints[0] == prints[1] == prints[2]


def test_images_and_frames_at_urls_are_on_the_page(server: Server, tmp_path: Path, processor: Qwen3VLProcessor) -> None:
    frames = {"type": "video", "video": [f"{server.url}/2.png"] * 2, "fps": 2}
    question = [{"type": "image", "image": f"{server.url}/1.png"}, frames, {"type": "text", "text": "hello"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "seven"}]
    media = MediaOptions(url_cache=str(tmp_path / "cache"))

    def encode(conversation: Conversation) -> Sample:
        return encode_conversation(conversation, processor, media=media)

    found = summarize("train", [messages], encode, processor, show=1, media=media)
    assert found.failures == []
    assert [(len(one.images), one.hidden) for one in found.shown] == [(3, 0)]


def test_a_url_that_fails_names_line_and_message(
    server: Server, tmp_path: Path, processor: Qwen3VLProcessor, config: Config
) -> None:
    question = [{"type": "text", "text": "hello"}, {"type": "image", "image": f"{server.url}/404"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "seven"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    start = f"{tmp_path / 'a.jsonl'}, line 1: message 0 (user), part 1: {server.url}/404: "
    options = {"seq_length": 96, "num_samples": 1, "media": MediaOptions(url_cache=str(tmp_path / "cache"))}
    with rejects("HTTP Error 404", start=start):
        PackedConversations(read_conversations(tmp_path / "a.jsonl"), processor, config, **options)
