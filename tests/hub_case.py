"""A Hugging Face Hub on this machine, of the endpoints that its client calls."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

TOKEN = "hf_writer"


class Hub:
    """Repositories of one branch, `main`; each commit has all of their files.

    Attributes:
      commits: Repository id -> list of dicts path -> bytes.
      asked: "METHOD path" of each request.
      intrude: Called before a commit is judged: where somebody else commits meanwhile.
    """

    def __init__(self):
        self.commits, self.uploads, self.asked, self.private = {}, {}, [], {}
        self.intrude = lambda: None

    def add(self, repository, **files):
        """Commits files as somebody else."""
        history = self.commits.setdefault(repository, [{".gitattributes": b""}])
        history.append({**history[-1], **files})

    def files(self, repository):
        return self.commits[repository][-1]

    def sha(self, repository, number=-1):
        number = number % len(self.commits[repository])
        return hashlib.sha1(f"{repository} {number}".encode()).hexdigest()

    def at(self, repository, revision):
        history = self.commits[repository]
        return history[-1] if revision == "main" else next(
            each for i, each in enumerate(history) if self.sha(repository, i) == revision
        )  # fmt: skip

    @contextlib.contextmanager
    def serve(self):
        """Yields the address."""
        handler = type("Handler", (_Handler,), {"hub": self})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            self.address = f"http://127.0.0.1:{server.server_port}"
            try:
                yield self.address
            finally:
                server.shutdown()
                thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        path = self._path()
        if match := re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/revision/(\w+))?", path):
            repository, revision = match[1], match[2] or "main"
            if repository not in self.hub.commits:
                return self._send(404, {}, {"X-Error-Code": "RepoNotFound"})
            names = self.hub.at(repository, revision)
            siblings = [{"rfilename": name} for name in names]
            sha = self.hub.sha(repository) if revision == "main" else revision
            return self._send(200, {"id": repository, "sha": sha, "siblings": siblings})
        if match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/tree/(\w+)", path):
            found = self.hub.at(match[1], match[2])
            listed = [{"type": "file", "path": n, "oid": n, "size": len(c)} for n, c in found.items()]
            return self._send(200, listed)
        if match := re.fullmatch(r"/(\w+/[\w-]+)/resolve/(\w+)/(.+)", path):
            content = self.hub.at(match[1], match[2])[match[3]]
            headers = {"X-Repo-Commit": match[2], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self._send(200, content, headers)
        return self._send(404, {"error": f"no {path}"})

    do_HEAD = do_GET

    def do_POST(self):
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        token = self.headers["Authorization"] or ""
        if path == "/api/validate-yaml":
            return self._send(200, {"warnings": [], "errors": []})
        if token != f"Bearer {TOKEN}":
            return self._send(403, {"error": "Forbidden: this token may only read\nand more"})
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.hub.commits[name] = [{".gitattributes": b""}]
            self.hub.private[name] = given.get("visibility") == "private" or given.get("private", False)
            return self._send(200, {"url": f"{self.hub.address}/{name}"})
        if re.fullmatch(r"/api/models/\w+/[\w-]+/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".npz")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if re.fullmatch(r"/\w+/[\w-]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.address}/storage/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self._send(404, {"error": f"no {path}"})

    def do_PUT(self):
        path = self._path()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = path.rsplit("/", 1)[-1]
        assert hashlib.sha256(content).hexdigest() == name
        self.hub.uploads[name] = content
        return self._send(200, {})

    def _commit(self, repository, lines):
        self.hub.intrude()
        found = dict(self.hub.files(repository))
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header" and value["parentCommit"] != self.hub.sha(repository):
                return self._send(
                    412, {"error": "A commit has happened since. Please refresh and try again."}
                )
            if key == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                found[value["path"]] = self.hub.uploads[value["oid"]]
            elif key == "deletedFile":
                del found[value["path"]]
        self.hub.commits[repository].append(found)
        sha = self.hub.sha(repository)
        url = f"{self.hub.address}/{repository}/commit/{sha}"
        return self._send(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def _path(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _send(self, status, body, headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
