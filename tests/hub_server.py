"""A tiny Hugging Face hub for tests: as much of its API as fetching a model needs, on a port of this machine."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

SHA = "5" * 40


class Hub(http.server.ThreadingHTTPServer):
    """The files of one model, `an-owner/a_model`, whose main branch is SHA, and what was asked for.

    `errors` are the hub's words for what it does not give, by a pattern of the path.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.asked: list[str] = []
        self.errors: dict[str, tuple[int, str]] = {}
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def fetched(self) -> list[str]:
        """The files whose content was given."""
        return [
            path.rpartition(f"/{SHA}/")[2] for path in self.asked if path.startswith("GET /an-owner/a_model/resolve")
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version: ClassVar[str] = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        for pattern, (status, word) in self.server.errors.items():
            if re.search(pattern, path):
                return self._answer(status, b"{}", {"X-Error-Code": word})
        files = self.server.files
        if path in ("/api/models/an-owner/a_model", "/api/models/an-owner/a_model/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": "an-owner/a_model", "sha": SHA, "siblings": siblings, "private": False})
        if path == f"/api/models/an-owner/a_model/tree/{SHA}":
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
                for name, file in files.items()
            ]
            return self._json(tree)
        name = path.removeprefix(f"/an-owner/a_model/resolve/{SHA}/")
        if name in files:
            facts = {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": SHA}
            return self._answer(200, files[name].read_bytes(), facts)
        known = path.startswith("/api/models/an-owner/a_model/")
        return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    do_HEAD = do_GET

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
