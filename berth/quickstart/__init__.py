"""``make pretrain``: raw text to a BERT on one machine, through the scripts a user types. See :mod:`berth.quickstart.__main__`."""
