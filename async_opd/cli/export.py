"""Make a Hugging Face directory of a run's student, with a model card.

Copies weights, config, generation config and tokenizer of the newest checkpoint, whose checksums
are verified first, and writes a card with the run's facts: method, teacher, data, steps, staleness,
accuracies, versions. The folder loads in transformers and vLLM. Name a license in the card before
you publish it.

Of a student that was trained by LoRA that is the adapter, which peft loads beside the model that it
was trained with; --merged writes one whole model.

  async-opd export runs/demo
  async-opd export runs/demo -o addition-student --checkpoint best
"""

import argparse

from async_opd.cli.options import path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", type=path, metavar="RUN", help="its directory, or one of its checkpoints"
    )
    parser.add_argument(
        "-o", "--output", type=path, metavar="DIR", help="a new folder; RUN/export where absent"
    )
    parser.add_argument(
        "--checkpoint", metavar="N|best", help="that of step N, or the one with the best score"
    )
    parser.add_argument(
        "--merged", action="store_true", help="one whole model, where an adapter was trained"
    )


def run(args: argparse.Namespace) -> int:
    from async_opd.tools.export.export import export

    checkpoint, output = export(args.run_dir, args.output, args.checkpoint, args.merged)
    print(f"{output}: the student after step {checkpoint.state.version}, from {checkpoint.folder}")
    return 0
