# TRL 1.16.0, chat_templates/diffusion_gemma.jinja, rendered by transformers 5.23.0.
# Expected: "parameters" without "type" (valid JSON Schema: "properties" imply an object) are declared like the same with "type":
# "object", or without a type.
# Seen: the closing brace is written together with the type, so the declaration has one brace too few and ends with "},}": all
# that follows in the system turn is inside it.
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

def declare(parameters):
    tool = {"name": "f", "description": "d", "parameters": parameters}
    text = render([{"role": "user", "content": "x"}], tools=[{"type": "function", "function": tool}])
    return text[text.index("<|tool>") : text.index("<tool|>")]


typed = declare({"type": "object", "properties": {"a": {"type": "string"}}})
bare = declare({"properties": {"a": {"type": "string"}}})
for text in (typed, bare):
    print(text, "  braces opened and closed:", text.count("{"), text.count("}"))
sys.exit(0 if typed.count("{") == typed.count("}") and bare.count("{") > bare.count("}") else 1)
EOF
    echo "changed: the declaration without a type is closed ($(tail -n 1 "$folder/log"))"
    exit 1
}
