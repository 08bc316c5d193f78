"""Shards to training records: sentence pairs, masking, hdf5. numpy; no torch.

schema     names, types and attributes of a records file; the folder name
options    what decides the content of a records file
draws      random numbers as a hash of what they are for
tokens     shard + vocabulary -> one flat array of token ids with sentence and document edges
pairs      token arrays -> (A, B, next or random) instances, all documents and copies in lockstep
masking    instances -> rows with 80/10/10 masks
writer     rows -> hdf5, complete or absent
create     the stage: one file, or one a shard in several processes
validate   check a records file row by row
reader     hdf5 -> samples for training
"""

from berth.records.schema import records_folder_name

__all__ = ["records_folder_name"]
