"""nginx in front of the server: its cache keeps what may be kept, asks whether a copy is still good, and keeps nothing else."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.tools import tool
from tests.server_process import ServerProcess, free_port
from tests.waiting import wait_until

PINNED = "/v1/digits?model=mlp&version=1&seed=5&count=6&format=png"


@contextmanager
def nginx(folder: Path, upstream: str) -> Iterator[str]:
    """Its address. Below ``/short`` a copy has to be asked after once it is a second old."""
    port = free_port()
    places = "\n".join(f"  {kind}_temp_path {folder}/{kind};" for kind in ("client_body", "fastcgi", "scgi", "uwsgi", "proxy"))
    (folder / "nginx.conf").write_text(f"""
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr error;
events {{}}
http {{
  access_log off;
{places}
  proxy_cache_path {folder}/cache keys_zone=digits:1m;
  proxy_cache digits;
  proxy_cache_key $request_uri;
  proxy_cache_revalidate on;
  add_header Cache-Status $upstream_cache_status always;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://{upstream}; }}
    location /short/ {{
      proxy_pass http://{upstream}/;
      proxy_ignore_headers Cache-Control;
      proxy_cache_valid 200 1s;
    }}
  }}
}}
""")
    process = subprocess.Popen([tool("nginx"), "-p", str(folder), "-c", "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (folder / "nginx.pid").exists() and answers(port))
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
            return True
    except OSError:
        return False


def ask(address: str, path: str, **headers: str) -> tuple[int, str, bytes]:
    """The status, what the cache says of it, and the body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", headers=headers), timeout=20) as answer:
            return answer.status, answer.headers["Cache-Status"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Cache-Status"], error.read()


def images(server: ServerProcess) -> float:
    total: float = json.loads(ask(server.http, "/v1/status")[2])["images_total"]
    return total


def test_a_cache_keeps_what_never_changes_and_nothing_else(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start_server()
    with nginx(tmp_path, server.http) as address:
        first = ask(address, PINNED)
        before = images(server)
        assert (first[:2], ask(address, PINNED)) == ((200, "MISS"), (200, "HIT", first[2]))
        assert images(server) == before, "the second came from the cache"
        for path in ("/v1/digits?model=mlp&seed=5", "/v1/digits?model=mlp&version=1", "/v1/digits?model=mlp&version=1&seed=x"):
            assert [ask(address, path)[1] for _ in range(2)] == ["MISS", "MISS"], path

        short = f"/short{PINNED}"
        assert ask(address, short)[1] == "MISS"
        before, begun = images(server), time.monotonic()
        wait_until(lambda: ask(address, short)[1] == "REVALIDATED")
        assert time.monotonic() - begun < 20
        assert ask(address, short)[2] == first[2]
        assert images(server) == before, "the server said that the copy is still good, and computed nothing"


def test_a_cache_that_all_share_keeps_nothing_of_callers_with_tokens(
    start_server: Callable[..., ServerProcess], tmp_path: Path, add_token: Callable[..., str]
) -> None:
    tokens, token = tmp_path / "tokens.json", add_token("reader")
    server = start_server(f"--tokens-file={tokens}")
    with nginx(tmp_path, server.http) as address:
        for _ in range(2):
            assert ask(address, PINNED, Authorization=f"Bearer {token}")[:2] == (200, "MISS")
        assert ask(address, PINNED)[:2] == (401, "MISS")
