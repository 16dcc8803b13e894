# TRL 1.16.0, chat_templates/diffusion_gemma.jinja, rendered by transformers 5.23.0.
# Expected: with enable_thinking=True, the prompt of a turn is the same kind of text wherever the turn is: the model decides
# whether it opens a thought.
# Seen: for the first turn the prompt ends with <|turn>model, for a turn after a tool response with <|channel>thought: there, the
# template opens the thought, and an answer without a thought cannot be given. A finished conversation whose answer has no
# reasoning has no <|channel>, so what the model is trained on (with enable_thinking) is not what it is asked.
# Our code asks as it trains: canvastune/preparation/chat_template.py.
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

first = render([question], add_generation_prompt=True, enable_thinking=True)
second = render([question, asks, response], add_generation_prompt=True, enable_thinking=True)
whole = render([question, asks, response, answer], enable_thinking=True)
print("first turn asked:   ", repr(first[-30:]))
print("second turn asked:  ", repr(second[-45:]))
print("second turn trained:", repr(whole[-55:]))
sys.exit(0 if second.endswith("<|channel>thought\n") and "<|channel>" not in first + whole else 1)
EOF
    echo "changed: the prompt after a tool response does not open a thought ($(tail -n 1 "$folder/log"))"
    exit 1
}
