# TRL 1.16.0, chat_templates/diffusion_gemma.jinja, rendered by transformers 5.23.0.
# Expected: an assistant message with text and a call (as OpenAI and others return it, text first) is rendered in that order, or
# an error says that it cannot be.
# Seen: the text comes after the call; once the tool has responded, it comes after the response, as if the model had said "Let me
# look that up." when it already had the result. The tokens of the same message depend on whether a response follows it, and the
# prompt for the answer ends with the text and <turn|>: no model turn is open.
# Our code learns the text where the template writes it, and the answer after that prompt:
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

question = {"role": "user", "content": "Weather in Bonn?"}
call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
asks = {"role": "assistant", "tool_calls": [call]}
response = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
answer = {"role": "assistant", "content": "It rains."}

asks["content"] = "Let me look."
before = render([question, asks])
after = render([question, asks, response, answer])
print("no response yet: ", repr(before[before.index("<|tool_call>") :]))
print("with a response: ", repr(after[after.index("<|tool_call>") :]))
prompt = render([question, asks, response], add_generation_prompt=True)
print("prompt for the answer ends:", repr(prompt[-20:]))
last = after.index("<tool_response|>")
moved = before.index("Let me look.") > before.index("<tool_call|>") and after.index("Let me look.") > last
sys.exit(0 if moved and prompt.endswith("Let me look.<turn|>\n") else 1)
EOF
    echo "changed: text with a call is rendered before the response ($(tail -n 1 "$folder/log"))"
    exit 1
}
