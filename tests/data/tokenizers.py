"""A tiny tokenizer of every kind that model families use, trained on the spot on a few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The capital of France is Paris.",
    "Lake Ladoga is found in the north of Russia, near Saint Petersburg.",
    "People who live in Oslo, Norway, speak Norwegian; in Côte d'Ivoire they speak French.",
    "東京 is the capital of Japan. Москва is the capital of Russia.",
    "What is the name of the band that Oslo Davis and the Romans play in? 1999, 2001.",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _train(backend: Tokenizer, size: int, alphabet: list[str] | None = None) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet or [], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _with_bytes(backend: Tokenizer, decoder: decoders.Decoder) -> Tokenizer:
    """Add the 256 bytes to the trained tokens, for unknown letters (BPE needs them in its vocabulary)."""
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] == "BPE":
        learned = [token for token in model["vocab"] if token not in SPECIAL]
        # so few single letters that many texts need bytes
        kept = [token for token in learned if len(token) > 1 or token.isascii() or token == "▁"]
        merges = [merge for merge in model["merges"] if all(part in kept for part in (*merge, "".join(merge)))]
        model["vocab"] = {token: number for number, token in enumerate([*SPECIAL, *BYTES, *kept])}
        model |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, "merges": merges}
        content["added_tokens"] = [
            {**token, "id": SPECIAL.index(token["content"])} for token in content["added_tokens"]
        ]
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoder
    return backend


def byte_level() -> Tokenizer:
    """GPT-2: a space belongs to the word after it, one is put before the text, and offsets exclude it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return _train(backend, 420, pre_tokenizers.ByteLevel.alphabet())


def byte_level_split() -> Tokenizer:
    """Qwen, Llama 3, GPT-OSS: words by a regular expression, offsets with the space, composed letters."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _train(backend, 420, pre_tokenizers.ByteLevel.alphabet())


def byte_level_joined() -> Tokenizer:
    """No words: a token may contain the end of a word, the space and the beginning of the next word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _train(backend, 500, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece() -> Tokenizer:
    """Llama 2, Mixtral: the normaliser turns spaces into ▁ and puts one before the text; bytes for rare letters."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    backend = _train(backend, 200)
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _with_bytes(backend, decoders.Sequence(decoder))


def metaspace() -> Tokenizer:
    """Newer conversions of sentencepiece: Metaspace, which puts ▁ before the first word only if it has none."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend = _train(backend, 200)
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _with_bytes(backend, decoders.Sequence(decoder))


def unigram() -> Tokenizer:
    """Unigram with bytes, letters folded by NFKC (one may become several), as in many sentencepiece models."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=480, special_tokens=[*SPECIAL, *BYTES], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    content = json.loads(backend.to_str())
    content["model"]["byte_fallback"] = True
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(content))
    decoder = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    backend.decoder = decoders.Sequence(decoder)
    return backend


def lowercase() -> Tokenizer:
    """Letters in lower case and without their accents: the text becomes shorter or longer."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _train(backend, 420, pre_tokenizers.ByteLevel.alphabet())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, split": byte_level_split,
    "byte level, joined": byte_level_joined,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "unigram": unigram,
    "lower case": lowercase,
}


@cache
def tokenizer(kind: str, special: str = "$A") -> PreTrainedTokenizerFast:
    """Make a tokenizer of a kind; ``special`` is its template around a text, such as ``<s> $A </s>``."""
    backend = KINDS[kind]()
    if special != "$A":
        names = [(name, backend.token_to_id(name)) for name in special.split() if name != "$A"]
        around = processors.TemplateProcessing(single=special, special_tokens=names)
        own = [backend.post_processor] if backend.post_processor else []
        backend.post_processor = processors.Sequence([*own, around])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
