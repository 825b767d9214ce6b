"""Vision towers: their patch embedding as one product, and windows of their attention (Qwen2-VL and its descendants), all of one length
at a time, or on a card all at once.

transformers hands whole sequences to flash-attention, and to every other implementation one window after another, in a loop in Python: of
a picture of 4,096 patches 64 calls a layer. Windows of equal length are one batch; those of several lengths go to torch's varlen_attn,
where it takes their numbers and agrees on this card with attention sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from vlm_dist.models.patches import Patches, bind, with_names
from vlm_dist.models.patching_lengths import cannot_on_card, computes_on_card, on_card
from vlm_dist.upstream.deepspeed import gathered
from vlm_dist.upstream.transformers import attention_of

NEEDED = ("is_flash_attention_requested", "ALL_ATTENTION_FUNCTIONS", "get_max_seqlen")


def patch_vision_windows(model: Any, patches: Patches) -> None:
    """Attention forwards that loop over windows get a copy of themselves that takes the way of flash-attention, to our function."""
    for module in model.modules():
        forward = type(module).forward
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if not all(name in names for name in NEEDED) or "cu_seqlens" not in forward.__code__.co_varnames:
            continue
        if "flash" in attention_of(module.config):
            patches.kept["vision_windows"] = "flash-attention takes them at once"
            continue
        patches.put("vision_windows", module, "forward", with_names(module, REPLACED))


def attend_in_windows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cu_seq_lens_q: torch.Tensor, scaling: float,
    dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention inside each window, without a mask.

    Args:
        query, key, value: [1, H, N, D]: N patches, H heads.
        cu_seq_lens_q: [W + 1]: where each of W windows begins, and N; on the CPU the device is not waited for.

    Returns:
        [1, N, H, D], and None for the weights.
    """
    states = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]  # [N, H, D]
    windows = _windows_of(cu_seq_lens_q, query.device)
    if len(windows.distinct) == 1:
        return _attend(states, windows.distinct[0], scaling, dropout)[None], None
    kind, (_, heads, width) = states[2].dtype, states[2].shape
    if computes_on_card(query) and not dropout and not cannot_on_card(kind, heads, heads, width):
        return on_card(*(one.to(kind) for one in states), *windows.starts, scaling)[None], None
    result = torch.empty_like(states[2], memory_format=torch.contiguous_format)
    for length, places in zip(windows.distinct, windows.places, strict=True):
        result = result.index_copy(0, places, _attend([tensor[places] for tensor in states], length, scaling, dropout))
    return result[None], None


class _Windows:
    """Those of a batch, worked out once for all layers."""

    def __init__(self, starts: torch.Tensor, device: torch.device):
        self.device, self.on_host = device, starts.cpu()
        self.lengths = self.on_host.diff()
        self.distinct: list[int] = [length for length in self.lengths.unique().tolist() if length]

    @cached_property
    def places(self) -> list[torch.Tensor]:
        """Of each length the patches in windows of it."""
        chosen = [self.on_host[:-1][self.lengths == length] for length in self.distinct]
        places = [(begin[:, None] + torch.arange(length)).flatten() for begin, length in zip(chosen, self.distinct, strict=True)]
        return [one.to(self.device, non_blocking=True) for one in places]

    @cached_property
    def starts(self) -> tuple[torch.Tensor, int]:
        """Where windows that are not empty begin, and N; how long the longest is."""
        return self.on_host.unique_consecutive().to(torch.int32).to(self.device, non_blocking=True), max(self.distinct)


def _windows_of(starts: torch.Tensor, device: torch.device) -> _Windows:
    if (known := getattr(starts, "windows", None)) is None:
        known = starts.windows = _Windows(starts, device)  # pyright: ignore[reportAttributeAccessIssue]
    return known


def _attend(states: list[torch.Tensor], length: int, scaling: float, dropout: float) -> torch.Tensor:
    """[N, H, D] in windows of `length` patches each -> [N, H, D]."""
    query, key, value = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in states)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)


class PicturePlaces:
    """Which tokens stand for pictures, told by their ids alone; that they are as many as the features is checked by their number, which
    the batch brings along."""

    def __init__(self, model: Any):
        self.model = model
        self.original = model.get_placeholder_mask
        self.tokens: int | None = None

    @contextmanager
    def counted(self, tokens: torch.Tensor | None) -> Iterator[None]:
        """Inside, a micro-batch has so many; None: it has to be counted."""
        self.tokens = None if tokens is None else int(tokens)
        try:
            yield
        finally:
            self.tokens = None

    def __call__(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, *features: Any, **named: Any) -> Any:
        of_pictures = features[0] if features else named.get("image_features")
        if self.tokens is None or input_ids is None or of_pictures is None or self.tokens * inputs_embeds.shape[-1] != of_pictures.numel():
            return self.original(input_ids, inputs_embeds, *features, **named)  # says what does not fit
        return self.places(input_ids)

    def places(self, input_ids: torch.Tensor) -> Any:
        """Masks [B, T, 1], as the original gives them."""
        pictures = (input_ids == self.model.config.image_token_id).unsqueeze(-1)
        video = getattr(self.model.config, "video_token_id", None)
        return pictures if video is None else (pictures, (input_ids == video).unsqueeze(-1))


def patch_picture_places(model: Any, patches: Patches) -> None:
    """transformers checks on the device that pictures' tokens and features are equally many, and waits for the answer three times."""
    owner = next((module for module in model.modules() if hasattr(module, "get_placeholder_mask")), None)
    if owner is None or getattr(owner.config, "image_token_id", None) is None:
        return
    places = PicturePlaces(owner)
    if not _same_places(places, owner.config):
        patches.kept["picture_places"] = "its pictures' tokens are found in another way"
        return
    patches.put("picture_places", owner, "get_placeholder_mask", places)
    patches.put("picture_places", model, "picture_places", places)
    patches.counts["picture_places"] = 1


def _same_places(places: PicturePlaces, config: Any) -> bool:
    token = config.image_token_id
    ids = torch.tensor([[token, token + 1, token], [token + 1, token, token - 1]], device="cpu")
    with torch.device("cpu"), torch.no_grad():
        try:
            expected = places.original(ids, torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return False
    found = places.places(ids)
    if not isinstance(found, tuple):
        return isinstance(expected, torch.Tensor) and torch.equal(expected, found)
    return isinstance(expected, tuple) and len(expected) == 2 and all(map(torch.equal, expected, found))


def patch_patch_embedding(model: Any, patches: Patches) -> None:
    """A convolution whose kernel covers its whole input is a product of two matrices: so it is of every patch of Qwen's vision towers.
    cuDNN takes 10 to 20 times as long for it as a convolution in three dimensions (pytorch#174051, transformers#45750)."""
    for module in model.modules():
        if type(module) is not torch.nn.Conv3d:
            continue
        if module.stride != module.kernel_size or module.groups != 1 or any(module.padding) or set(module.dilation) != {1}:
            patches.kept["patch_embedding"] = "a convolution whose patches overlap"
        elif not _is_product(module):
            patches.kept["patch_embedding"] = "a convolution that gives other numbers than the product"
        else:
            patches.put("patch_embedding", module, "forward", bind(module, _patches_forward, original=module.forward))


def _patches_forward(module: Any, input: torch.Tensor, *, original: Callable) -> torch.Tensor:
    """[N, C, T, H, W], where the kernel is [T, H, W], -> [N, D, 1, 1, 1]; any other input goes through the convolution."""
    if input.ndim != 5 or input.shape[2:] != module.kernel_size:
        return original(input)
    return torch.nn.functional.linear(input.flatten(1), module.weight.flatten(1), module.bias)[:, :, None, None, None]


def _is_product(module: Any) -> bool:
    with gathered(module.parameters()):
        if module.weight.is_meta:
            return True  # no numbers to compare
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((3, module.in_channels, *module.kernel_size), generator=generator, device="cpu").to(module.weight)
        with torch.no_grad():
            expected = module(x).float()
            difference = _patches_forward(module, x, original=module.forward).float() - expected
    return bool(difference.norm() <= 1e-2 * expected.norm())


REPLACED: dict[str, Any] = {
    "is_flash_attention_requested": lambda *_, **__: True,
    "ALL_ATTENTION_FUNCTIONS": SimpleNamespace(get_interface=lambda *_: attend_in_windows),
    "get_max_seqlen": lambda *_, **__: None,
}
