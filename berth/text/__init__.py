"""Text as BERT sees it: strict UTF-8 lines, the vocabulary file, WordPiece training and tokenisation. No torch.

lines        text files -> lines, invalid bytes named by file and offset
vocabulary   vocab.txt -> :class:`Vocabulary` (ids of the specials, what may be drawn as a random replacement)
tokenizer    vocabulary -> a Rust tokenizer equal to BERT's BasicTokenizer + WordPiece
counting     text files -> distinct words with counts, in flat memory, by several processes
training     counted words -> vocab.txt, the same bytes every time
sentencepiece_bpe, bytelevel, report, vocabulary_stage: the other two methods, figures of a vocabulary, the stage ``data/vocab.py`` runs
"""
