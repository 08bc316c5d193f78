"""berth: BERT pretraining on HPC clusters. One package a stage; see docs/architecture.md."""

__version__ = "0.1.0"
