"""Raw text to shards: the first stages of data preparation. No torch.

documents   a .txt file or a folder of them -> documents (a name and its paragraphs)
sentences   documents -> sentences.txt: one sentence a line, a blank line between documents
shards      sentences.txt -> <prefix>_training_<i>.txt, <prefix>_test_<i>.txt of equal size
shardset    which files of a folder are shards, and whether the set is complete (<prefix>_shards.json)
"""
