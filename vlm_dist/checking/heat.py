"""How strongly the vision tower answers to each patch of a picture: the norms of its features, drawn over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_dist.cards import device_here
from vlm_dist.data.encode import Encoded
from vlm_dist.data.view import feature_maps
from vlm_dist.inputs.opened import Inputs
from vlm_dist.models.adapters import put_on
from vlm_dist.models.load import load_weights
from vlm_dist.planning.flow import tensor_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

STRENGTH = 0.6  # how much of the colours covers the picture
COLOURS = "viridis"


class Heat:
    """A model's vision tower, listened to.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(self, inputs: Inputs):
        device = device_here(inputs.config.engine.device)
        config, self.processor = inputs.config, inputs.processor
        self.model = load_weights(config.model, inputs.source, inputs.family, device, lora=config.lora)
        self._tower = self.model.get_submodule(inputs.family.vision)
        if inputs.adapter is not None:
            self.model = put_on(self.model, inputs.adapter)
        self.model.eval()

    def maps(self, encoded: Encoded) -> list[torch.Tensor]:
        """The norms of one sample's pictures, [rows, columns] of patches each; see `feature_maps`."""
        import torch

        heard: list[torch.Tensor] = []

        def hear(_: Any, __: Any, output: Any) -> None:
            if (features := tensor_of(output)) is not None:
                heard.append(features.cpu())

        hook = self._tower.register_forward_hook(hear)
        try:
            with torch.inference_mode():
                self.model(**{name: tensor.to(self.model.device) for name, tensor in encoded.inputs.items()}, use_cache=False)
        finally:
            hook.remove()
        return feature_maps(heard[0], encoded, self.processor) if len(heard) == 1 else []


def drawn_over(picture: Image, norms: torch.Tensor) -> Image:
    """The picture under its patches' norms, the least of them dark, the greatest bright."""
    import matplotlib
    import numpy as np
    from PIL import Image as Images

    low, high = float(norms.min()), float(norms.max())
    scaled = ((norms - low) / max(high - low, 1e-9)).numpy()
    colours = (matplotlib.colormaps[COLOURS](scaled)[..., :3] * 255).astype(np.uint8)
    over = Images.fromarray(colours).resize(picture.size, Images.Resampling.NEAREST)
    return Images.blend(picture.convert("RGB"), over, STRENGTH)
