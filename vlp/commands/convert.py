"""`vlp-convert SOURCE TARGET`: checkpoints of other libraries into folders of vlp, and back.

vlp-convert ViT-B-32.pt runs/clip                       # OpenAI's, read without running its code
vlp-convert open_clip_folder runs/clip                  # open_clip, transformers, salesforce/BLIP
vlp-convert model.pt runs/clip --hidden_act gelu        # a bare file does not tell its activation
vlp-convert blip2_pretrained.pth runs/blip2 --image_tower eva_vit_g.pth      # LAVIS
vlp-convert runs/clip exported --to transformers        # also open_clip, openai, salesforce, lavis
"""

import argparse
import sys

from ..conversion import TARGETS, convert
from ..errors import ArgumentError
from ..modeling_vlp.exchange.places import ExchangeError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlp-convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", help="a file of weights, or a folder")
    parser.add_argument("target", help="a folder; for openai, salesforce and lavis a file")
    parser.add_argument("--to", choices=TARGETS, default="vlp", help="the format to write (default: vlp)")
    parser.add_argument("--hidden_act", choices=("gelu", "quick_gelu"), help="activation, where a file does not tell")
    parser.add_argument("--vision_heads", type=int, help="attention heads of the image tower, where not 64 wide")
    parser.add_argument("--text_heads", type=int, help="attention heads of the text tower, where not 64 wide")
    parser.add_argument("--tokenizer", help="hub name or folder of the tokenizer, or bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--image_tower", help="LAVIS' BLIP-2: the file of the frozen tower (eva_vit_g.pth)")
    parser.add_argument("--language_model", help="LAVIS' BLIP-2 of stage 2: hub name or folder of its language model")
    parser.add_argument("--image_size", type=int, help="side of the images, in pixels; positions are resampled")
    parser.add_argument("--max_length", type=int, help="most tokens in a text of CLIP; positions are resampled")
    return parser


def main() -> None:
    options = vars(build_parser().parse_args())
    try:
        notes = convert(**options)
    except (ArgumentError, ExchangeError, OSError) as error:
        sys.exit(f"error: {error}")
    for note in notes:
        print(note)
    print(f"Written: {options['target']}")


if __name__ == "__main__":
    main()
