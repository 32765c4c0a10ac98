"""InstructBLIP (Dai et al., 2023, arXiv:2305.06500): the Q-Former reads the instruction, too.

Source: salesforce/LAVIS, models/blip2_models/blip2_vicuna_instruct.py.
"""

from torch import Tensor

from ..configuration.blip2 import VlpInstructBlipConfig
from .blip2_generation import VlpBlip2ForConditionalGeneration
from .med import Memory

# Shapes: B images, N tokens of an instruction, Q queries, D width


class VlpInstructBlipForConditionalGeneration(VlpBlip2ForConditionalGeneration):
    """BLIP-2 whose queries also attend to an instruction, so that they extract what it asks for.

    `forward` and `generate` need `qformer_input_ids`, the instruction as tokens of the Q-Former, which
    `VlpInstructBlipProcessor` returns.

    Example:
        >>> model = VlpInstructBlipForConditionalGeneration.from_pretrained("runs/instructblip")
        >>> model.generate(**processor(images=image, text="Question: what is red? Short answer:", return_tensors="pt"))
    """

    config_class = VlpInstructBlipConfig
    reads_instructions = True
    _keys_to_ignore_on_load_unexpected = [r"^(itm_head|lm_head|vision_proj|text_proj)\.", r"^temp$"]

    def freeze(self) -> None:
        """Freeze what BLIP-2 freezes, and the last feed-forward layer of the text, whose output nothing reads."""
        super().freeze()
        self.qformer.layers[-1].text_mlp.requires_grad_(False)

    def query_with(
        self, memory: Memory, qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None
    ) -> Tensor:
        """Run the Q-Former on the queries and the instructions.

        Args:
            memory: keys and values of B images.
            qformer_input_ids: (B, N) tokens of the Q-Former, padded on the right.
            qformer_attention_mask: (B, N), 0 for padding; if None, derived from the padding token.

        Returns:
            (B, Q, D), the outputs of the queries.

        Raises:
            ValueError: if there are no instructions, or not one for each image.
        """
        if qformer_input_ids is None:
            raise ValueError(
                f"{type(self).__name__} needs qformer_input_ids, the instructions as tokens of the Q-Former; "
                "VlpInstructBlipProcessor returns them."
            )
        if len(qformer_input_ids) != len(memory):
            raise ValueError(f"There are {len(qformer_input_ids)} instructions for {len(memory)} images.")
        mask = self.padding_mask(qformer_input_ids) if qformer_attention_mask is None else qformer_attention_mask
        queries = self.query_tokens.expand(len(memory), -1, -1)
        return self.qformer(queries, qformer_input_ids, mask, memory, pooled_only=True).last_hidden_state
