"""hdf5 records -> checkpoints: options, ranks, precision, batches, the step, checkpoints, phases, evaluation."""
