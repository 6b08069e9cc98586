"""The tokenizer files that a GGUF file's metadata stands for: tokenizer.json and tokenizer_config.json, as objects.

Two kinds are known: byte-level BPE ("gpt2") and sentencepiece BPE with scores ("llama"). How a byte-level tokenizer
splits text before merging is not in the file, only a name for it (`tokenizer.ggml.pre`); a name that is not in the
table here is refused, since a wrong split gives wrong tokens without any error.
"""

from collections.abc import Iterator
from typing import Any

from text_generation_shard.model_config import UnsupportedModel

_CONTROL, _USER_DEFINED = 3, 4
_SPACE_MARK = "▁"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_NUMBERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + _WORDS_AND_NUMBERS % "{1,3}"
_QWEN2_SPLIT = _CONTRACTIONS + _WORDS_AND_NUMBERS % ""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Values of tokenizer.ggml.pre, by how they split text.
_WHOLE_WORDS = ("default", "gpt-2", "olmo", "mpt", "phi-2", "jais")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_REGEX_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3_SPLIT),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2_SPLIT),
    "tekken": _TEKKEN_SPLIT,
}
# Words that are tokens are taken whole before any merging, and BOS is added unless the file says otherwise.
_WHOLE_TOKENS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
_NORMALIZED = ("qwen2", "deepseek-r1-qwen")


def tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json; raises UnsupportedModel for a kind that is not known."""
    tokens = _tokens(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level(metadata, tokens)
    elif kind == "llama":
        parts = _sentencepiece(metadata, tokens)
    else:
        raise UnsupportedModel(f"GGUF tokenizer {kind!r} is not supported; supported: gpt2, llama")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(metadata, tokens)),
        "post_processor": _post_processor(metadata, tokens),
        **parts,
    }


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    tokens = _tokens(metadata)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := _named_token(metadata, tokens, key)) is not None:
            config[f"{name}_token"] = token
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _tokens(metadata: dict[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UnsupportedModel("GGUF file without a tokenizer: tokenizer.ggml.tokens is missing")
    if any("\ud800" <= character <= "\udfff" for character in "".join(tokens)):
        raise UnsupportedModel("GGUF file with tokens that are not UTF-8")
    return list(tokens)


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether texts begin with BOS: as the file says, else as its kind of tokenizer has it."""
    is_default = metadata.get("tokenizer.ggml.model") == "llama" or (
        metadata.get("tokenizer.ggml.pre") in _WHOLE_TOKENS_FIRST
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", is_default))


def _token_types(metadata: dict[str, Any], tokens: list[str]) -> list[int]:
    """What kind each token is; files without the field have normal ones alone."""
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise UnsupportedModel(f"GGUF file with {len(tokens)} tokens but {len(kinds)} token types")
    return list(kinds)


def _named_token(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    """The token that a field such as tokenizer.ggml.bos_token_id names."""
    token_id: int | None = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise UnsupportedModel(f"GGUF file whose {name}_token_id {token_id} is not one of its {len(tokens)} tokens")
    return tokens[token_id]


def _added_tokens(metadata: dict[str, Any], tokens: list[str]) -> Iterator[dict[str, Any]]:
    """Control tokens are special; user-defined ones are matched whole in text too, but visible."""
    for token_id, (token, kind) in enumerate(zip(tokens, _token_types(metadata, tokens), strict=True)):
        if kind in (_CONTROL, _USER_DEFINED) and token:
            yield {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == _CONTROL,
            }


def _post_processor(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    bos = _named_token(metadata, tokens, "bos")
    if not _adds_bos(metadata) or bos is None:
        return None
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text[0]],
        "pair": [special, *text],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    defaults = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE", **defaults, **options, "vocab": vocabulary, "merges": merges}


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise UnsupportedModel("GGUF file without usable tokenizer.ggml.merges")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pre in _WHOLE_WORDS:
        split = [byte_level | {"use_regex": True}]
    elif pre in _SINGLE_DIGITS:
        split = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    elif pre in _REGEX_SPLITS:
        pattern = {"Regex": _REGEX_SPLITS[pre]}
        split = [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
            byte_level | {"use_regex": False},
        ]
    else:
        known = ", ".join(sorted((*_WHOLE_WORDS, *_SINGLE_DIGITS, *_REGEX_SPLITS)))
        raise UnsupportedModel(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {known}")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    return {
        "normalizer": {"type": "NFC"} if pre in _NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=pre in _WHOLE_TOKENS_FIRST),
    }


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise UnsupportedModel("GGUF file without a score for each token (tokenizer.ggml.scores)")
    normal = [kind == 1 for kind in _token_types(metadata, tokens)]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers: list[dict[str, Any]] = [spaces]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE_MARK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            {token: token_id for token_id, token in enumerate(tokens)},
            _merges_from_scores(tokens, scores, normal),
            unk_token=_named_token(metadata, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _merges_from_scores(tokens: list[str], scores: list[float], normal: list[bool]) -> list[list[str]]:
    """The merges that give what sentencepiece does: of all pairs that form a token, the best-scored token first."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens) if normal[token_id]}
    merges = []
    for token, token_id in vocabulary.items():
        for end in range(1, len(token)):
            left, right = vocabulary.get(token[:end]), vocabulary.get(token[end:])
            if left is not None and right is not None:
                merges.append((-scores[token_id], token_id, left, right))
    merges.sort()
    return [[tokens[left], tokens[right]] for _, _, left, right in merges]
