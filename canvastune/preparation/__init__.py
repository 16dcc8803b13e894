"""From a user's rows to a tokenized data set."""

# Raise this whenever the same rows, tokenizer and settings would give other tokens: prepared data of an earlier version is then prepared
# again, and an unfinished run that was trained on it is refused. Nothing heavy may be imported here: the first step reads only this.
PREPARATION_VERSION = 1
