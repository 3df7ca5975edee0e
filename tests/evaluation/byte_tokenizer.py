"""A tokenizer of bytes, after the ids of padding, BOS and EOS."""

from dmc_jax.data.tokenizer import Tokenizer


class ByteTokenizer(Tokenizer):
    vocab_size, pad_id, bos_id, eos_id = 259, 0, 1, 2
    add_bos = False

    def encode(self, text):
        return [3 + byte for byte in text.encode()]

    def encode_special(self, text):
        return self.encode(text)

    def decode(self, ids):
        return bytes(token - 3 for token in ids if token > 2).decode(errors="replace")
