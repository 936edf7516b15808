"""Tokenizers of the kinds that models come with, some twenty to fifty tokens each."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
EURO = "€".encode()  # three bytes, and in these vocabularies three tokens


def _vocabulary(tokens: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    everything = ["<unk>", "<s>", "</s>", *tokens, *(left + right for left, right in merges)]
    return {token: number for number, token in enumerate(dict.fromkeys(everything))}


def llama2(*, legacy: bool = False, **settings) -> PreTrainedTokenizerBase:
    """Sentencepiece's kind: a space is put in front of a text, and dropped in front of what is decoded.

    `legacy`: it is put behind special tokens too.
    """
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "7"), (":", "7")]
    vocabulary = _vocabulary([*(f"<0x{byte:02X}>" for byte in (10, *EURO)), *"▁ab7:="], merges)
    if not legacy:
        return LlamaTokenizer(vocab=vocabulary, merges=merges, **(ENDS | settings))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(ENDS | settings))


def byte_level(*, prefix_space: bool = False, **settings) -> PreTrainedTokenizerBase:
    """GPT-2's kind: a token is some bytes, and a space belongs to the word that it stands before."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [symbol for text in "\n ab7:=€" for symbol in bytes_of.pre_tokenize_str(text)[0][0]]
    merges = [("Ġ", "a"), ("a", "b"), ("Ġ", "7"), ("Ċ", "Ċ"), ("=", "=")]
    backend = Tokenizer(models.BPE(vocab=_vocabulary(symbols, merges), merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(ENDS | settings))


def metaspace(**settings) -> PreTrainedTokenizerBase:
    """Unigram's kind, with a space in front of the first word alone."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(token, -len(vocabulary) / 3) for token in ("▁", "a", "b", "7", ":", "=", "\n", "▁a", "ab", "▁7")]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(ENDS | settings))


def framed(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer, now with special tokens around each text, as in "<s> $A </s>"."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>") if token in template]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


KINDS = {
    "llama2": llama2,
    "legacy llama2": lambda **settings: llama2(legacy=True, **settings),
    "byte level": byte_level,
    "byte level with a prefix": lambda **settings: byte_level(prefix_space=True, **settings),
    "metaspace": metaspace,
}
