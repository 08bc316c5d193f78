"""Operations of a training step that torch has no kernel for: one custom op each, with a CPU implementation that every other one is compared with."""
