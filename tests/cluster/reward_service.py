"""A reward service as a program: `python -m tests.cluster.reward_service ADDRESS PORT`. Its log says who asked."""

import json
import sys
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Scores as different as random texts are: from the checksum of each."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = body["completions"]
        print(f"asked by {self.client_address[0]} for {len(texts)}", flush=True)
        answer = json.dumps({"scores": [zlib.crc32(text.encode()) / 2**32 for text in texts]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None: ...


if __name__ == "__main__":
    server = ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), _Handler)
    print("serving", flush=True)
    server.serve_forever()
