"""Text as BERT sees it: strict UTF-8 lines, the vocabulary file, WordPiece training and tokenisation. No torch.

lines        text files -> lines, invalid bytes named by file and offset
vocabulary   vocab.txt -> :class:`Vocabulary` (ids of the specials, what may be drawn as a random replacement)
tokenizer    vocabulary -> a Rust tokenizer equal to BERT's BasicTokenizer + WordPiece
training     text files -> vocab.txt, the same bytes every time
"""
