# transformers 5.23.0 with tokenizers, `AutoTokenizer.from_pretrained` of a folder whose tokenizer_class is GemmaTokenizer.
# Expected: the tokens of the folder's tokenizer.json, which is a whole tokenizer: normalizer, pre-tokenizer, model, decoder.
# Seen: only vocabulary, merges, added tokens and post-processor are taken from the file. Normalizer, pre-tokenizer, decoder and the model's
#   options are Gemma's own, without a word where the file has others: the tokens differ from those of `tokenizers`, which other tools
#   read the same file with. `tokenizer_class: TokenizersBackend` reads all of the file.
# canvastune/preparation/tokenizer.py reads a file by itself only where it holds what transformers puts there, and asks transformers otherwise.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'transformers==5.23.0' 'tokenizers==0.23.3'
cd "$folder"
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
import json

import tokenizers
import transformers
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer

special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz"]
model = BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
file = Tokenizer(model)
file.normalizer = normalizers.Lowercase()
file.add_special_tokens(special)
file.save("tokenizer.json")
tokens = {}
for name in ("GemmaTokenizer", "TokenizersBackend"):
    named = {f"{each[1:-1]}_token": each for each in special}
    with open("tokenizer_config.json", "w") as config:
        json.dump({"tokenizer_class": name, **named}, config)
    tokens[name] = AutoTokenizer.from_pretrained(".").tokenize("Cat")
read = Tokenizer.from_file("tokenizer.json").encode("Cat").tokens
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}: a tokenizer.json that lowercases, and the text 'Cat':")
print(f"  tokenizers {read}, TokenizersBackend {tokens['TokenizersBackend']}, GemmaTokenizer {tokens['GemmaTokenizer']}")
if not (read == tokens["TokenizersBackend"] == ["c", "a", "t"] and tokens["GemmaTokenizer"] == ["<0x43>", "a", "t"]):
    raise SystemExit("changed: canvastune/preparation/tokenizer.py may read the file as it is")
PYTHON
