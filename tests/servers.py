"""Servers on this machine in place of other people's: how they answer, and one repository of the hub."""
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    "Answers with bytes or JSON, and prints nothing."
    protocol_version = "HTTP/1.1"

    def log_message(self, *words): ...

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def reply(self, status: int, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        usual = {"Content_Type": "application/json", "Content_Length": len(data)}
        for name, value in {**usual, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, address): ...  # clients are killed and lines are cut on purpose


@contextlib.contextmanager
def serving(handler, **facts):
    "A server at a free port, at work until the end; it holds its `url`, and these facts for its handler."
    server = Server(("127.0.0.1", 0), handler)
    vars(server).update(facts, url=f"http://127.0.0.1:{server.server_port}", lock=threading.Lock())
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Hub(Handler):
    "One repository, as far as a download asks; the server holds `repo`, `folder`, `commit` and `asked`."

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(self.path.partition("?")[0])
        hub.asked.append(f"{self.command} {path}")
        files = [self.known(file) for file in sorted(hub.folder.rglob("*")) if file.is_file()]
        if re.match(rf"/api/\w+/{hub.repo}/tree/", path):
            return self.reply(200, files)
        if re.match(rf"/api/\w+/{hub.repo}\b", path):
            siblings = [{"rfilename": file["path"]} for file in files]
            return self.reply(200, {"id": hub.repo, "sha": hub.commit, "siblings": siblings})
        file = hub.folder / path.partition(f"/{hub.repo}/resolve/")[2].partition("/")[2]
        if file.is_file():
            tag = f'"{self.known(file)["oid"]}"'
            return self.reply(200, file.read_bytes(), ETag=tag, X_Repo_Commit=hub.commit)
        missing = "EntryNotFound" if hub.repo in path else "RepoNotFound"
        self.reply(404, b"", X_Error_Code=missing, X_Repo_Commit=hub.commit)

    do_HEAD = do_GET

    def do_POST(self):
        "What is known of the paths that are asked for."
        names = urllib.parse.parse_qs(self.body().decode())["paths"]
        self.reply(200, [self.known(self.server.folder / name) for name in names])

    def known(self, path) -> dict:
        name = str(path.relative_to(self.server.folder))
        if not path.is_file():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        data = path.read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
