# TRL 1.16.0, chat_templates/diffusion_gemma.jinja, rendered by transformers 5.23.0.
# Expected: with two calls in one turn and two tool messages that have names and no tool_call_id (the ids are optional in many
# data sets), each response has its own name; or an error says that ids are needed.
# Seen: both responses have the name of the last call: an absent id equals an absent id, and that overrides the name in the tool
# message. The model learns that the rain came from the news.
# Our code gives calls without ids one each, and tool messages the id of their call: canvastune/preparation/messages.py.
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

calls = [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}},
    {"type": "function", "function": {"name": "news", "arguments": {"topic": "flood"}}},
]
text = render(
    [
        {"role": "user", "content": "Weather and news?"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "name": "weather", "content": "rain"},
        {"role": "tool", "name": "news", "content": "none"},
    ]
)
print(text[text.index("<|tool_response>") :])
sys.exit(0 if text.count("response:news{") == 2 and "response:weather{" not in text else 1)
EOF
    echo "changed: responses without ids have their own names ($(tail -n 1 "$folder/log"))"
    exit 1
}
