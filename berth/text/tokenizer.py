"""WordPiece tokenisation through the Rust ``tokenizers`` library, equal to BERT's BasicTokenizer and WordpieceTokenizer.

Lower-casing and accent stripping go together, as in BERT: an uncased model reads "arvizturo", a cased one keeps
"Árvíztűrő" as it is. Nothing here talks to the network.

White space: BERT deletes control characters (form feed, U+0085, ...) where ``str.split`` would split at them;
:func:`drop_controls` removes them first, so that splitting by ``str.split`` and tokenising word by word gives the same
pieces as tokenising the line.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from berth.text.vocabulary import CONTINUATION, SPECIAL_TOKENS, Vocabulary

MAX_WORD_CHARACTERS = 100  # a longer word becomes [UNK], as in BERT
_CONTROLS_THAT_SPLIT = re.compile("[\x0b\x0c\x1c-\x1f\x85]")


def bert_normalizer(lowercase: bool) -> normalizers.Normalizer:
    """BERT's text cleaning: control characters out, CJK apart; lower case and accents off together, or neither."""
    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase)


def load_tokenizer(vocabulary: Vocabulary, lowercase: bool, special_tokens: bool = True) -> Tokenizer:
    """Build the tokenizer of ``vocabulary``.

    Args:
        vocabulary: checked pieces.
        lowercase: True for an uncased model (lower case, accents stripped), False keeps both.
        special_tokens: True: ``[MASK]`` and the like in the text are recognised and ``encode`` adds ``[CLS]``/``[SEP]``
            (fine-tuning, inference). False: the text is only text; a literal "[SEP]" is tokenised like any other
            characters and can never become a special id (making records).
    """
    model = models.WordPiece(
        vocabulary.ids,
        unk_token="[UNK]",  # noqa: S106 - a vocabulary piece
        max_input_chars_per_word=MAX_WORD_CHARACTERS,
        continuing_subword_prefix=CONTINUATION,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = bert_normalizer(lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    if special_tokens:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary.sep_id), ("[CLS]", vocabulary.cls_id))
    return tokenizer


def drop_controls(text: str) -> str:
    """``text`` without the control characters at which ``str.split`` splits and BERT does not."""
    return _CONTROLS_THAT_SPLIT.sub("", text) if _CONTROLS_THAT_SPLIT.search(text) else text
