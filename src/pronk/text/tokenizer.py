"""The tokenizers: one kind of object, made from each kind of source.

What a tokenizer can do is in vocabulary.py; how a source is read is in tokenizer_meta.py,
tokenizer_gguf.py and tokenizer_hf.py. Importing this loads neither `tiktoken` nor `tokenizers`.
"""

from pronk.text.tokenizer_gguf import tokenizer_from_gguf
from pronk.text.tokenizer_hf import tokenizer_from_hf
from pronk.text.tokenizer_meta import tokenizer_from_meta
from pronk.text.vocabulary import TextStream, Tokenizer

__all__ = [
    "TextStream",
    "Tokenizer",
    "tokenizer_from_gguf",
    "tokenizer_from_hf",
    "tokenizer_from_meta",
]
