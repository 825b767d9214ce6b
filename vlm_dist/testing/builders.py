"""One builder a family: (processor, model), tiny. Sizes are the smallest that keep every mechanism of the architecture at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_dist.testing.glm import glm4v, glm4v_moe
from vlm_dist.testing.parts import CLIP, small_text, small_tokenizer, template
from vlm_dist.testing.qwen import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl, qwen3_vl_moe
from vlm_dist.testing.sparse import qwen3_5_moe


def _clip_images() -> Any:
    import transformers as hf

    return hf.CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})


def llava() -> tuple[Any, Any]:
    import transformers as hf

    tokenizer, ids = small_tokenizer("<image>")
    processor = hf.LlavaProcessor(
        _clip_images(), tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**small_text(len(ids))), image_token_index=ids["<image>"],
        vision_feature_select_strategy="default", vision_feature_layer=-2,
    )  # fmt: skip
    return processor, hf.LlavaForConditionalGeneration(config)


def llava_next() -> tuple[Any, Any]:
    import transformers as hf

    tokenizer, ids = small_tokenizer("<image>")
    grids = [[32, 64], [64, 32], [64, 64]]
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grids)
    processor = hf.LlavaNextProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**small_text(len(ids))), image_token_index=ids["<image>"],
        vision_feature_select_strategy="default", vision_feature_layer=-2, image_grid_pinpoints=grids,
    )  # fmt: skip
    return processor, hf.LlavaNextForConditionalGeneration(config)


def llava_next_video() -> tuple[Any, Any]:
    import transformers as hf

    tokenizer, ids = small_tokenizer("<image>", "<video>")
    grids, crop = [[32, 64], [64, 32], [64, 64]], {"height": 32, "width": 32}
    processor = hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(size={"shortest_edge": 32}, crop_size=crop),
        hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=crop, image_grid_pinpoints=grids), tokenizer, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>", "<video>"),
    )  # fmt: skip
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**small_text(len(ids))), image_token_index=ids["<image>"],
        video_token_index=ids["<video>"], vision_feature_select_strategy="default", vision_feature_layer=-2, image_grid_pinpoints=grids,
    )  # fmt: skip
    return processor, hf.LlavaNextVideoForConditionalGeneration(config)


def llava_onevision() -> tuple[Any, Any]:
    import transformers as hf

    tokenizer, ids = small_tokenizer("<image>", "<video>")
    grids = [[32, 32], [32, 64], [64, 32]]
    images = hf.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=grids)
    processor = hf.LlavaOnevisionProcessor(
        images, tokenizer, hf.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}), num_image_tokens=4,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4", chat_template=template("<image>", "<video>"),
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**CLIP), text_config=hf.Qwen2Config(**small_text(len(ids))), image_token_index=ids["<image>"],
        video_token_index=ids["<video>"], image_grid_pinpoints=grids, vision_aspect_ratio="anyres_max_4",
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    return processor, hf.LlavaOnevisionForConditionalGeneration(config)


def _pixtral_parts(spatial_merge_size: int = 1) -> tuple[Any, dict[str, int], dict[str, Any], dict[str, Any]]:
    import transformers as hf

    tokenizer, ids = small_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    processor = hf.PixtralProcessor(
        images, tokenizer, patch_size=16, spatial_merge_size=spatial_merge_size, chat_template=template("[IMG]")
    )
    vision = hf.PixtralVisionConfig(**{**CLIP, "image_size": 64})
    return processor, ids, {"vision_config": vision}, {"text_config": hf.MistralConfig(**small_text(len(ids)), head_dim=16)}


def pixtral() -> tuple[Any, Any]:
    """Pixtral in LLaVA's format: model_type llava, with Pixtral's vision tower and processor."""
    import transformers as hf

    processor, ids, vision, text = _pixtral_parts()
    config = hf.LlavaConfig(
        **vision, **text, image_token_index=ids["[IMG]"], vision_feature_select_strategy="full", vision_feature_layer=-1
    )
    return processor, hf.LlavaForConditionalGeneration(config)


def mistral3() -> tuple[Any, Any]:
    import transformers as hf

    processor, ids, vision, text = _pixtral_parts(spatial_merge_size=2)
    config = hf.Mistral3Config(
        **vision, **text, image_token_index=ids["[IMG]"], spatial_merge_size=2, vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return processor, hf.Mistral3ForConditionalGeneration(config)


def gemma3() -> tuple[Any, Any]:
    import transformers as hf

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**CLIP),
        text_config=hf.Gemma3TextConfig(**small_text(len(ids)), head_dim=16, sliding_window=64),
        mm_tokens_per_image=4, boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )  # fmt: skip
    return processor, hf.Gemma3ForConditionalGeneration(config)


def gemma4(layers: int = 2, **changes: Any) -> tuple[Any, Any]:
    """Pictures of up to 70 tokens, sliding-window and full attention in turns, per-layer inputs off; no audio."""
    import transformers as hf

    names = {
        "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
    }  # fmt: skip
    tokenizer, ids = small_tokenizer(*names.values(), "<|video|>", extra_special_tokens=names)
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer,
        hf.Gemma4VideoProcessor(max_soft_tokens=70),
        image_seq_length=70,
        chat_template=template("<|image|>", "<|video|>"),
    )
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 16, "position_embedding_size": 256,
    }  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    text = hf.Gemma4TextConfig(
        **small_text(len(ids), num_hidden_layers=layers), head_dim=16, sliding_window=64, layer_types=kinds,
        vocab_size_per_layer_input=len(ids), **{"hidden_size_per_layer_input": 0, **changes},
    )  # fmt: skip
    config = hf.Gemma4Config(
        text_config=text, vision_config=vision, boi_token_id=ids["<|image>"], eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"], video_token_id=ids["<|video|>"], audio_token_id=ids["<|audio|>"],
    )  # fmt: skip
    return processor, hf.Gemma4ForConditionalGeneration(config)


def gemma4_moe() -> tuple[Any, Any]:
    """The same with four experts beside each MLP, as Gemma 4 26B-A4B: model_type gemma4."""
    return gemma4(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64)


def mllama() -> tuple[Any, Any]:
    import transformers as hf
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    tokenizer, ids = small_tokenizer("<|image|>")
    images = hf.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=2)
    processor = hf.MllamaProcessor(images, tokenizer, chat_template=template("<|image|>"))
    vision = MllamaVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_global_layers=1, attention_heads=4, image_size=32, patch_size=16,
        max_num_tiles=2, intermediate_layers_indices=[0, 1], vision_output_dim=192, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = MllamaTextConfig(
        **small_text(len(ids), num_hidden_layers=3),
        cross_attention_layers=[1],
        rope_parameters=rope,
    )
    return processor, hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=ids["<|image|>"])
    )


IDEFICS_NAMES = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>", "image_boundary_token": "<fake_token_around_image>",
}  # fmt: skip


def _idefics(name: str, **settings: Any) -> tuple[Any, Any]:
    import transformers as hf

    tokenizer, ids = small_tokenizer(*dict.fromkeys(IDEFICS_NAMES.values()), "<row_1_col_1>", extra_special_tokens=IDEFICS_NAMES)
    images = getattr(hf, f"{name}ImageProcessor")(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)
    processor = getattr(hf, f"{name}Processor")(
        images, tokenizer, image_seq_len=1, chat_template=template("<image>", "<video>" if settings else ""), **settings
    )
    text = hf.LlamaConfig(**small_text(len(ids)))
    config = getattr(hf, f"{name}Config")(vision_config=CLIP, text_config=text, image_token_id=ids["<image>"], scale_factor=2)
    return processor, getattr(hf, f"{name}ForConditionalGeneration")(config)


def idefics3() -> tuple[Any, Any]:
    return _idefics("Idefics3")


def smolvlm() -> tuple[Any, Any]:
    import transformers as hf

    return _idefics("SmolVLM", video_processor=hf.SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}))


def internvl() -> tuple[Any, Any]:
    import transformers as hf

    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    images = hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, max_patches=1)
    processor = hf.InternVLProcessor(
        images,
        tokenizer,
        hf.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=1,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )
    vision = {**CLIP, "image_size": [32, 32], "patch_size": [16, 16]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**small_text(len(ids))), image_token_id=ids["<IMG_CONTEXT>"], image_seq_length=1,
        downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return processor, hf.InternVLForConditionalGeneration(config)


def mini_vlm() -> tuple[Any, Any]:
    """ViT, a projector and Llama; the prompt is continued, as in captioning."""
    import transformers as hf

    from vlm_dist.models.mini_vlm import CAPTION_TEMPLATE, MiniVLM, MiniVLMConfig, MiniVLMProcessor

    tokenizer, ids = small_tokenizer("<image>")
    config = MiniVLMConfig(
        vision_config=hf.ViTConfig(**CLIP), text_config=hf.LlamaConfig(**small_text(len(ids))), image_token_id=ids["<image>"]
    )
    images = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    return MiniVLMProcessor(images, tokenizer, num_image_tokens=5, chat_template=CAPTION_TEMPLATE), MiniVLM(config)


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    builder.__name__: builder
    for builder in (
        gemma3, gemma4, gemma4_moe, glm4v, glm4v_moe, idefics3, internvl, llava, llava_next, llava_next_video,
        llava_onevision, mini_vlm, mistral3, mllama, pixtral, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe, smolvlm,
    )
}  # fmt: skip
