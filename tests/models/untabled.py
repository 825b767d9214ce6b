"""Tiny models of architectures that have no row in the table of families, with their processors: (processor, model)."""

from __future__ import annotations

from typing import Any

import transformers as hf

from vlm_dist.testing.builders import gemma4
from vlm_dist.testing.parts import CLIP, small_text, small_tokenizer, template


def hunyuan_vl() -> tuple[Any, Any]:
    names = {"image_token": "<img>", "image_start_token": "<img_start>", "image_end_token": "<img_end>"}
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    images = hf.HunYuanVLImageProcessor(size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128})
    processor = hf.HunYuanVLProcessor(images, tokenizer, chat_template=template("<img_start><img><img_end>"))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    config = hf.HunYuanVLConfig(
        text_config=small_text(len(ids), head_dim=16, rope_parameters=rope, tie_word_embeddings=False),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "out_hidden_size": 64,
            "max_image_size": 128, "min_image_size": 64,
        },
        image_token_id=ids["<img>"], image_start_token_id=ids["<img_start>"], image_end_token_id=ids["<img_end>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return processor, hf.HunYuanVLForConditionalGeneration(config)


def granite4_vision() -> tuple[Any, Any]:
    tokenizer, ids = small_tokenizer("<image>")
    grids = [[64, 128], [128, 64], [128, 128]]
    images = hf.LlavaNextImageProcessor(size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=grids)
    processor = hf.Granite4VisionProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="full", chat_template=template("<image>"), downsample_rate="1/2"
    )
    text = small_text(len(ids), num_hidden_layers=3)
    vision = hf.SiglipVisionConfig(**{**CLIP, "image_size": 64})
    config = hf.Granite4VisionConfig(
        vision_config=vision, text_config=text, image_token_index=ids["<image>"], vision_feature_select_strategy="full",
        vision_feature_layer=-1, image_grid_pinpoints=grids, downsample_rate="1/2", deepstack_layer_map=[[0, 0], [-1, 1]],
        spatial_target_layers=[0, 0, 1, 1],
    )  # fmt: skip
    return processor, hf.Granite4VisionForConditionalGeneration(config)


def ernie4_5_vl_moe() -> tuple[Any, Any]:
    names = {
        "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>", "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
    }  # fmt: skip
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    images = hf.Ernie4_5_VLMoeImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    processor = hf.Ernie4_5_VLMoeProcessor(
        images,
        tokenizer,
        hf.Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False),
        chat_template=template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    text = small_text(
        len(ids), rope_parameters=rope, moe_intermediate_size=[64, 32], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
        num_hidden_layers=3,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4},
        image_token_id=ids[names["image_token"]], image_start_token_id=ids[names["image_start_token"]],
        image_end_token_id=ids[names["image_end_token"]], video_token_id=ids[names["video_token"]],
        video_start_token_id=ids[names["video_start_token"]], video_end_token_id=ids[names["video_end_token"]], tie_word_embeddings=False,
    )  # fmt: skip
    return processor, hf.Ernie4_5_VLMoeForConditionalGeneration(config)


def cohere2_vision() -> tuple[Any, Any]:
    """Tiles of 32 x 32; a layer with a sliding window and one without."""
    names = {
        "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }  # fmt: skip
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    images = hf.Cohere2VisionImageProcessor(size={"height": 32, "width": 32}, patch_size=2, max_patches=2)
    processor = hf.Cohere2VisionProcessor(images, tokenizer, chat_template=template("<|IMG_PATCH|>"))
    text = hf.Cohere2Config(**small_text(len(ids)), sliding_window=64, layer_types=["sliding_attention", "full_attention"], logit_scale=1.0)
    config = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**{**CLIP, "patch_size": 8}), text_config=text, image_token_id=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=128,
    )  # fmt: skip
    return processor, hf.Cohere2VisionForConditionalGeneration(config)


def lfm2_vl() -> tuple[Any, Any]:
    """Pictures of their own shape without tiles; a layer with a short convolution and one with attention."""
    names = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    images = hf.Lfm2VlImageProcessor(
        do_image_splitting=False, min_image_tokens=2, max_image_tokens=8, encoder_patch_size=16, tile_size=64, max_num_patches=64
    )
    processor = hf.Lfm2VlProcessor(images, tokenizer, chat_template=template("<image>"))
    vision = hf.Siglip2VisionConfig(**{**{k: v for k, v in CLIP.items() if k != "image_size"}, "num_patches": 64})
    text = hf.Lfm2Config(
        **small_text(len(ids)), layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, tie_word_embeddings=True
    )
    config = hf.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=ids["<image>"], projector_hidden_size=128)
    return processor, hf.Lfm2VlForConditionalGeneration(config)


def paddleocr_vl() -> tuple[Any, Any]:
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    tokenizer, ids = small_tokenizer("<|IMAGE_START|>", *names.values(), "<|IMAGE_END|>", "<|video_pad|>", extra_special_tokens=names)
    images = hf.PaddleOCRVLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    processor = hf.PaddleOCRVLProcessor(images, tokenizer, chat_template=template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
    config = hf.PaddleOCRVLConfig(
        text_config=small_text(len(ids), head_dim=16, rope_parameters=rope, tie_word_embeddings=False), vision_config=vision,
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|IMAGE_START|>"],
        vision_end_token_id=ids["<|IMAGE_END|>"], tie_word_embeddings=False,
    )  # fmt: skip
    return processor, hf.PaddleOCRVLForConditionalGeneration(config)


def gemma4_shared() -> tuple[Any, Any]:
    """Gemma 4 whose last two layers take keys and values of the first two, with inputs of each layer, as its smaller models have."""
    return gemma4(layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=16)


def fast_vlm() -> tuple[Any, Any]:
    tokenizer, ids = small_tokenizer("<image>")
    images = hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor = hf.LlavaProcessor(
        images, tokenizer, patch_size=32, vision_feature_select_strategy="full", chat_template=template("<image>")
    )  # fmt: skip
    vision = hf.TimmWrapperConfig(
        architecture="fastvit_t8", num_labels=0, hidden_size=768, model_args={"inference_mode": True, "layers": [1, 1, 1, 1]}
    )
    config = hf.FastVlmConfig(text_config=small_text(len(ids)), vision_config=vision, image_token_id=ids["<image>"])
    return processor, hf.FastVlmForConditionalGeneration(config)


def perception_lm() -> tuple[Any, Any]:
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    images = hf.PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=64, size={"height": 64, "width": 64})
    processor = hf.PerceptionLMProcessor(
        hf.PerceptionLMVideoProcessor(), images, tokenizer, patch_size=16, chat_template=template("<|image|>"), pooling_ratio=2
    )  # fmt: skip
    vision = hf.TimmWrapperConfig(
        architecture="vit_pe_core_tiny_patch16_384", num_labels=0,
        model_args={"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [64, 64], "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1, "ref_feat_shape": [4, 4]},
    )  # fmt: skip
    config = hf.PerceptionLMConfig(
        text_config=small_text(len(ids)), vision_config=vision, vision_use_cls_token=True, projector_pooling_ratio=2,
        image_token_id=ids["<|image|>"], video_token_id=ids["<|video|>"],
    )  # fmt: skip
    return processor, hf.PerceptionLMForConditionalGeneration(config)


def kimi_k25() -> tuple[Any, Any]:
    """A dense layer and two of experts, which are chosen in groups."""
    names = {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"}
    tokenizer, ids = small_tokenizer("<|media_begin|>", *names.values(), "<|media_end|>", extra_special_tokens=names)
    images = hf.Kimi_K25ImageProcessor(size={"max_height": 112, "max_width": 112})
    processor = hf.Kimi_K25Processor(
        images, tokenizer, hf.Kimi_K25VideoProcessor(), chat_template=template("<|media_begin|><|media_pad|><|media_end|>")
    )
    text = hf.DeepseekV3Config(
        **{**small_text(len(ids), num_hidden_layers=3), "num_key_value_heads": 4}, moe_intermediate_size=64, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=48,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_mtp_layers=0, tie_word_embeddings=False,
    )  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "pos_emb_height": 8,
              "pos_emb_width": 8}  # fmt: skip
    config = hf.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=64, image_token_id=ids["<|media_pad|>"],
        video_token_id=ids["<|kimi_k25_video_placeholder|>"], vision_start_token_id=ids["<|media_begin|>"],
        vision_end_token_id=ids["<|media_end|>"], tie_word_embeddings=False,
    )  # fmt: skip
    return processor, hf.Kimi_K25ForConditionalGeneration(config)


def minimax_m3_vl() -> tuple[Any, Any]:
    """A dense layer and two of experts; one layer attends to chosen blocks of keys."""
    names = ["]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
    tokenizer, ids = small_tokenizer(*names)
    images = hf.MiniMaxM3VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    processor = hf.MiniMaxM3VLProcessor(images, tokenizer, hf.MiniMaxM3VLVideoProcessor(), chat_template=template(names[0]))
    text = small_text(
        len(ids), num_hidden_layers=3, intermediate_size=64, shared_intermediate_size=64, dense_intermediate_size=128, head_dim=16,
        rotary_dim=8, num_local_experts=8, num_experts_per_tok=2, mlp_layer_types=["dense", "sparse", "sparse"], index_n_heads=2,
        index_head_dim=16, index_block_size=16, index_topk_blocks=2,
        layer_types=["full_attention", "full_attention", "minimax_m3_sparse"],
    )  # fmt: skip
    config = hf.MiniMaxM3VLConfig(
        text_config=text, vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        image_token_index=ids[names[0]], video_token_index=ids[names[1]], projector_hidden_size=64,
    )  # fmt: skip
    return processor, hf.MiniMaxM3SparseForConditionalGeneration(config)


def deepseek_ocr2() -> tuple[Any, Any]:
    """Pictures of 256 pixels in patches of 4: the model has 256 queries for a picture and 144 for a tile, whatever their size."""
    tokenizer, ids = small_tokenizer("<image>")
    images = hf.DeepseekOcr2ImageProcessor(size={"height": 256, "width": 256}, tile_size=192)
    processor = hf.DeepseekOcr2Processor(images, tokenizer, patch_size=4, chat_template=template("<image>"))
    text = small_text(
        len(ids), num_hidden_layers=3, moe_intermediate_size=64, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse", "sparse"],
    )  # fmt: skip
    sam = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 256, "patch_size": 4,
           "global_attn_indexes": [], "downsample_channels": [32, 64]}  # fmt: skip
    config = hf.DeepseekOcr2Config(
        text_config=text, vision_config={"sam_config": sam, "encoder_config": small_text(len(ids))}, image_token_id=ids["<image>"]
    )
    return processor, hf.DeepseekOcr2ForConditionalGeneration(config)


def lfm3_vl() -> tuple[Any, Any]:
    """Layers with short convolutions in the vision tower and in the language model."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
             "vision_end_token": "<|vision_end|>"}  # fmt: skip
    tokenizer, ids = small_tokenizer(*names.values(), extra_special_tokens=names)
    images = hf.Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128})
    processor = hf.Lfm3VlProcessor(
        images, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=template("<|vision_start|><|image_pad|><|vision_end|>")
    )
    text = hf.Lfm3Config(
        **small_text(len(ids), num_hidden_layers=3), head_dim=16, layer_types=["conv", "full_attention", "sliding_attention"]
    )
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "layer_types": ["conv", "full_attention"]}  # fmt: skip
    config = hf.Lfm3VlConfig(
        text_config=text, vision_config=vision, projector_hidden_size=128, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return processor, hf.Lfm3VlForConditionalGeneration(config)
