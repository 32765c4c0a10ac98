"""transformers' zero-shot image classification pipeline, with pictures read as training reads them.

`pipeline("zero-shot-image-classification", model=...)` makes this class once vlp is imported. For models of other
libraries it does what its base class does.
"""

from PIL import Image
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from .pictures import read_picture

BLANK = Image.new("RGB", (1, 1))


class VlpZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """The base class converts pictures to RGB before the image processor sees them, which drops transparency and clips
    16-bit values; for models of vlp, the image processor gets what `read_picture` reads.
    """

    def preprocess(self, image, *args, **kwargs):
        """Args and returns as the base class; URLs and base64 strings are left to it."""
        is_link = isinstance(image, str) and image.startswith(("http://", "https://", "data:image/"))
        if is_link or not self.model.config.model_type.startswith("vlp_"):
            return super().preprocess(image, *args, **kwargs)
        inputs = super().preprocess(BLANK, *args, **kwargs)
        pixels = self.image_processor(images=[read_picture(image)], return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(inputs["pixel_values"].dtype)
        return inputs
