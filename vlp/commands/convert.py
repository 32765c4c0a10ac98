"""`vlp convert SOURCE TARGET`: convert checkpoints of other libraries to vlp, and back.

vlp convert ViT-B-32.pt runs/clip                       # OpenAI's, read without running its code
vlp convert open_clip_folder runs/clip                  # open_clip, transformers, salesforce/BLIP
vlp convert model.pt runs/clip --hidden_act gelu        # a file of weights does not record its activation
vlp convert blip2_pretrained.pth runs/blip2 --image_tower eva_vit_g.pth      # LAVIS
vlp convert runs/clip exported --to transformers        # also open_clip, openai, salesforce, lavis
"""

import argparse

from ..conversion import TARGETS, convert
from ..errors import CommandParser, printable, reported_errors
from ..modeling_vlp.exchange.places import ExchangeError


def build_parser() -> argparse.ArgumentParser:
    """The parser of `vlp convert`."""
    parser = CommandParser(prog="vlp convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", help="a file of weights, or a folder")
    parser.add_argument("target", help="folder to write; for openai, salesforce and lavis a file")
    parser.add_argument("--to", choices=TARGETS, default="vlp", help="the format to write (default: vlp)")
    parser.add_argument(
        "--hidden_act", choices=("gelu", "quick_gelu"), help="activation, if the source does not record it"
    )
    parser.add_argument("--vision_heads", type=int, help="attention heads of the image tower, if not of width 64")
    parser.add_argument("--text_heads", type=int, help="attention heads of the text tower, if not of width 64")
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="read a pre-trained model of vlp as this class, such as "
        "VlpBlipForConditionalGeneration, for formats that have no pre-trained BLIP",
    )
    parser.add_argument("--tokenizer", help="hub name or folder of the tokenizer, or bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--image_tower", help="for LAVIS' BLIP-2: file of the frozen image tower (eva_vit_g.pth)")
    parser.add_argument("--language_model", help="for LAVIS' BLIP-2, stage 2: hub name or folder of the language model")
    parser.add_argument("--image_size", type=int, help="new image size in pixels; position embeddings are resampled")
    parser.add_argument(
        "--max_length", type=int, help="new maximum number of tokens (CLIP only); position embeddings are resampled"
    )
    return parser


def main() -> None:
    options = vars(build_parser().parse_args())
    with reported_errors(ExchangeError):
        for note in convert(**options):
            print(printable(note))
        print(f"Wrote {printable(options['target'])}")


if __name__ == "__main__":
    main()
