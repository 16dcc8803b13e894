# TRL 1.16.0, chat_templates/diffusion_gemma.jinja, rendered by transformers 5.23.0.
# Expected: the content of a tool message may be an object: the template has a macro that writes one as
# response:NAME{key:value,...}, and uses it for the embedded key tool_responses.
# Seen: for a tool message, the test for a list of content parts comes first, and in Jinja an object is a sequence too. Its keys
# are taken for parts: 'str object' has no attribute 'get', without a word on which message.
# Our code gives the template the object as JSON text: canvastune/preparation/messages.py.
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

question = {"role": "user", "content": "Weather in Bonn?"}
call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
asks = {"role": "assistant", "tool_calls": [call]}
response = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
answer = {"role": "assistant", "content": "It rains."}

embedded = dict(asks, tool_responses=[{"name": "weather", "response": {"sky": "rain"}}])
text = render([question, embedded])
print("tool_responses:", text[text.index("<|tool_response>") :])
try:
    print("tool message:  ", render([question, asks, dict(response, content={"sky": "rain"})]))
except Exception as error:
    print("tool message:  ", type(error).__name__, error)
    sys.exit(0 if "has no attribute 'get'" in str(error) else 1)
sys.exit(1)
EOF
    echo "changed: a tool message with an object as content is rendered ($(tail -n 1 "$folder/log"))"
    exit 1
}
