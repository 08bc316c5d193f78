#!/usr/bin/env python3
"""Convert weights between berth and Hugging Face ``transformers`` (NVIDIA, DeepSpeed and ONNX Runtime names are read too).

    python convert_checkpoint.py to_huggingface --checkpoint results/phase2 --vocab_file vocab.txt --output_dir my-bert
    python convert_checkpoint.py from_huggingface --input bert-large-uncased --output init.pt

``to_huggingface`` writes a folder that ``AutoTokenizer`` and ``BertForPreTraining``/``BertForMaskedLM.from_pretrained`` load
offline; the vocabulary is cut to its real size. ``from_huggingface`` writes a file for ``run_pretraining.py
--init_checkpoint``; the vocabulary is padded. Exit code 0, 1 (weights or vocabulary), 2 (options).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from berth.errors import run_main

PADDING = (1, 8, 16, 32, 64, 128)  # those that the export can tell from another vocabulary: layout.PADDING_MULTIPLES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{to_huggingface,from_huggingface}")

    to = commands.add_parser("to_huggingface", help="a checkpoint and its vocabulary to a folder for transformers")
    to.add_argument("--checkpoint", required=True, help="ckpt_<step>.pt, a weights file, or an output folder (its newest good)")
    to.add_argument("--vocab_file", required=True, help="vocab.txt the records were made with")
    to.add_argument("--output_dir", required=True, help="folder to write; an earlier export in it is replaced")
    case = to.add_mutually_exclusive_group()
    case.add_argument("--do_lower_case", action="store_const", const=True, dest="lowercase", help="an uncased model")
    case.add_argument("--cased", action="store_const", const=False, dest="lowercase", help="a cased model; without either, "
                      "what the checkpoint says, else a vocabulary with capital letters is cased")  # fmt: skip
    to.add_argument("--allow_other_vocabulary", action="store_true", help="export although the checkpoint was trained with "
                    "a vocabulary of other bytes")  # fmt: skip
    to.add_argument("--config_file", help="model configuration, for weights that come without one")

    back = commands.add_parser("from_huggingface", help="weights of transformers or NVIDIA to a berth weights file")
    back.add_argument("--input", required=True, help="folder of save_pretrained, model.safetensors, *.bin, *.pt")
    back.add_argument("--output", required=True, help="weights file to write, for run_pretraining.py --init_checkpoint")
    back.add_argument("--pad_vocab_to_multiple", type=int, default=8, choices=PADDING,
                      help="rows of the vocabulary (default: 8)")  # fmt: skip
    back.add_argument("--config_file", help="model configuration, for weights that come without one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from berth.export import huggingface  # torch only when there is something to do

    if args.command == "to_huggingface":
        print(huggingface.to_huggingface(
            args.checkpoint, args.vocab_file, args.output_dir, lowercase=args.lowercase, config_file=args.config_file,
            allow_other_vocabulary=args.allow_other_vocabulary,
        ))  # fmt: skip
    else:
        print(huggingface.from_huggingface(
            args.input, args.output, pad_vocab_to_multiple=args.pad_vocab_to_multiple, config_file=args.config_file
        ))  # fmt: skip
    return 0


if __name__ == "__main__":
    run_main(main)
