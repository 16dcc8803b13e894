# huggingface_hub 2.4.0.
# Expected: a download whose process was killed (as that of an evicted pod is) continues when it is run again, as in earlier versions,
# which took up HASH.incomplete.
# Seen: each process writes a part with a separate name. The file is downloaded from its first byte, and the part of the killed process stays
# in the cache for good.
# Our code removes such parts: canvastune/checkpoint/fetch.py.
set -eu
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
server=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'huggingface_hub==2.4.0'
cat > "$folder/hub.py" <<'PYTHON'
import hashlib, http.server, pathlib, sys, time
DATA = b"1" * 40_000_000
folder = pathlib.Path(sys.argv[1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        if "/resolve/" not in self.path: return self.send_error(404)
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(DATA).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(DATA) - first))
        if first: self.send_header("Content-Range", f"bytes {first}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        if self.command == "HEAD": return
        with (folder / "gets").open("a") as gets: gets.write(f"from byte {first}\n")
        self.wfile.write(DATA[first : len(DATA) // 2]); self.wfile.flush()
        if not (folder / "again").exists():
            (folder / "half").touch(); time.sleep(60); return
        self.wfile.write(DATA[max(first, len(DATA) // 2) :])
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
(folder / "port").write_text(str(server.server_port))
server.serve_forever()
PYTHON
python3 "$folder/hub.py" "$folder" & server=$!
while [ ! -s "$folder/port" ]; do sleep 0.1; done
export HF_ENDPOINT="http://127.0.0.1:$(cat "$folder/port")" HF_HOME="$folder/home" HF_HUB_DISABLE_XET=1 NO_PROXY='*'
get() { exec "$folder/venv/bin/python" -c 'import huggingface_hub as h; h.hf_hub_download("team/model", "model.safetensors")'; }
(get) 2>/dev/null & download=$!
while [ ! -e "$folder/half" ]; do sleep 0.1; done
sleep 1
kill -9 "$download"; wait "$download" 2>/dev/null || true
touch "$folder/again"
(get) 2>/dev/null
parts=$(find "$folder/home" -name '*.incomplete' -size +0 | wc -l)
seen=$(tail -n 1 "$folder/gets")
echo "huggingface_hub 2.4.0: killed at half of a file, the next download starts $seen; parts left in the cache: $parts"
[ "$seen" = "from byte 0" ] && [ "$parts" -ge 1 ] || { echo "changed: fetch.py may count parts as downloaded again"; exit 1; }
