# datasets 5.2.0.
# Expected: load_dataset(..., revision=R) gives the rows of revision R or an error, also without the Hub (HF_HUB_OFFLINE=1).
# Seen: without the Hub it gives the rows of whatever revision was cached last, with a warning that names the cache and not the revision.
# Our code keeps a separate cache for each revision: canvastune/preparation/sources.py.
set -eu
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
server=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile 'datasets==5.2.0' 'huggingface_hub==2.4.0'
cat > "$folder/hub.py" <<'PYTHON'
import hashlib, http.server, json, pathlib, re, sys
OLD, NEW = "a" * 40, "b" * 40
FILES = {c: {"README.md": b"# Data\n", "train.jsonl": b'{"row": "%s"}\n' % w} for c, w in ((OLD, b"old"), (NEW, b"new"))}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self): self.answer(b"")
    def do_GET(self): self.answer(b"")
    def do_POST(self): self.answer(self.rfile.read(int(self.headers["Content-Length"])))
    def send(self, status, data, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(data)}.items(): self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(data)
    def answer(self, body):
        match = re.match(r"(?:/api)?/datasets/team/data(?:/(revision|tree|paths-info|resolve)/([^/?]+)/?([^?]*))?", self.path)
        if match is None: return self.send(404, b"{}")
        what, commit, path = match[1], match[2] or NEW, match[3] or ""
        files = FILES[NEW if commit == "main" else commit]
        entry = lambda n: {"type": "file", "path": n, "size": len(files[n]), "oid": hashlib.sha1(files[n]).hexdigest()}
        if what == "resolve":
            if path not in files: return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.send(200, files[path], ETag=f'"{hashlib.sha1(files[path]).hexdigest()}"', X_Repo_Commit=commit)
        if what == "tree": found = [entry(n) for n in files]
        elif what == "paths-info": found = [entry(n) for n in files if n in body.decode()]
        else: found = {"id": "team/data", "_id": "1", "sha": commit, "tags": [], "siblings": [{"rfilename": n} for n in files]}
        self.send(200, json.dumps(found).encode(), Content_Type="application/json")
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
pathlib.Path(sys.argv[1]).write_text(str(server.server_port))
server.serve_forever()
PYTHON
python3 "$folder/hub.py" "$folder/port" & server=$!
while [ ! -s "$folder/port" ]; do sleep 0.1; done
export HF_ENDPOINT="http://127.0.0.1:$(cat "$folder/port")" HF_HOME="$folder/home" HF_HUB_DISABLE_XET=1 NO_PROXY='*'
rows() { "$folder/venv/bin/python" -c 'import datasets, sys; print(datasets.load_dataset("team/data", split="train", revision=sys.argv[1])["row"][0])' "$1" 2>/dev/null; }
old=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa new=bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb
with=$(rows $old) && rows $new >/dev/null
without=$(HF_HUB_OFFLINE=1 rows $old)
echo "datasets 5.2.0: the older revision has the row '$with' with the Hub, and '$without' without it"
[ "$with" = old ] && [ "$without" = new ] || { echo "changed: sources.py may let datasets choose the cache"; exit 1; }
