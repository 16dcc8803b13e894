# TRL 1.16.0, chat_templates/diffusion_gemma.jinja, rendered by transformers 5.23.0.
# Expected: a parameter that may be null (JSON Schema's "type": ["string", "null"], which OpenAI's strict mode requires; or
# "anyOf", which Pydantic writes for Optional[str]) is declared with both types, or an error says that it cannot be.
# Seen: the list is written as Python prints it, in capitals, inside the template's string quotes: <|"|>['STRING', 'NULL']<|"|>;
# and with "anyOf" the type is empty: <|"|><|"|>. In "items" of an array, the same template writes the same list as a list.
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

def declare(schema):
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": schema}}}
    text = render([{"role": "user", "content": "x"}], tools=[{"type": "function", "function": tool}])
    return text[text.index("properties:") : text.index("<tool|>")]


union = {"type": ["string", "null"]}
for schema in (union, {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": "array", "items": union}):
    print(schema, "->", declare(schema))
sys.exit(0 if "['STRING', 'NULL']" in declare(union) else 1)
EOF
    echo "changed: a list of types is no longer written as Python prints it ($(tail -n 1 "$folder/log"))"
    exit 1
}
