"""transformers' zero-shot image classification pipeline, which reads pictures as training does.

Once vlp is imported, `pipeline("zero-shot-image-classification", model=...)` creates this class. For other models, it
behaves like its base class.
"""

from PIL import Image
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from .pictures import read_picture

BLANK = Image.new("RGB", (1, 1))


class VlpZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """Zero-shot image classification that passes the result of `read_picture` to the image processors of vlp.

    The base class converts pictures to RGB before preprocessing, which drops transparency and clips 16-bit values.
    """

    def preprocess(self, image, *args, **kwargs):
        """As the base class, which still handles URLs and base64 strings."""
        is_link = isinstance(image, str) and image.startswith(("http://", "https://", "data:image/"))
        if is_link or not self.model.config.model_type.startswith("vlp_"):
            return super().preprocess(image, *args, **kwargs)
        inputs = super().preprocess(BLANK, *args, **kwargs)
        inputs.update(self.image_processor(images=[read_picture(image)], return_tensors="pt").to(self.dtype))
        return inputs

    def postprocess(self, model_outputs):
        """As the base class, but with the sigmoid loss each score is a probability of its own, as for SigLIP."""
        if not self.model.config.model_type.startswith("vlp_") or getattr(self.model, "logit_bias", None) is None:
            return super().postprocess(model_outputs)
        scores = model_outputs["logits"][0].sigmoid().tolist()
        found = zip(scores, model_outputs["candidate_labels"], strict=True)
        return [{"score": score, "label": label} for score, label in sorted(found, key=lambda pair: -pair[0])]
