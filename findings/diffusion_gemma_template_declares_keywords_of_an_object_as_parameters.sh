# TRL 1.16.0, chat_templates/diffusion_gemma.jinja, rendered by transformers 5.23.0.
# Expected: a parameter of type object without "properties" (any keys allowed: {"type": "object", "additionalProperties": {"type":
# "string"}}, as schema generators write for dict[str, str]) is declared as an object without listed properties.
# Seen: JSON Schema's keywords themselves are declared as properties of the object: the model reads of a parameter named
# additionalProperties (or title, or default).
# Our code renders the declarations with the template as released, in training as in inference:
# canvastune/preparation/chat_template.py.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'transformers==5.23.0' 'jinja2==3.1.6'
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/trl" 'trl==1.16.0' # the templates, without PyTorch
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder/trl/trl/chat_templates" <<'EOF' 2> "$folder/log" || {
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<bos>": 0}, unk_token="<bos>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>")


def render(messages, template="diffusion_gemma.jinja", **settings):
    text = open(f"{sys.argv[1]}/{template}").read()
    return tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **settings)

labels = {"type": "object", "description": "Labels", "title": {}, "additionalProperties": {"type": "string"}}
tool = {"name": "tag", "description": "d", "parameters": {"type": "object", "properties": {"labels": labels}}}
text = render([{"role": "user", "content": "x"}], tools=[{"type": "function", "function": tool}])
print(text[text.index("parameters:") : text.index("<tool|>")])
sys.exit(0 if "properties:{additionalProperties:{type:" in text else 1)
EOF
    echo "changed: the keywords of an object are no longer declared as its parameters ($(tail -n 1 "$folder/log"))"
    exit 1
}
