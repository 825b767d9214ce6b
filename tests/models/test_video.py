"""Videos in every family that takes them: as transformers encodes them, measured before decoding, packed as alone, no label on any."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.models.test_packing import per_sample, token_losses
from tests.videos import clip, picture
from vlm_dist.config_model import VideoConfig
from vlm_dist.data.collate import collate, collate_packed, with_blank
from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.encoded import count_patches
from vlm_dist.data.lengths import Ruler
from vlm_dist.data.samples import Sample
from vlm_dist.data.video import open_clip
from vlm_dist.data.view import strip, videos_as_seen
from vlm_dist.errors import BadSample
from vlm_dist.families import FAMILIES
from vlm_dist.models.introspect import family_of
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.models.positions import position_rule

CONFIG = VideoConfig(fps=2, max_frames=4, min_frames=2)
MP4, GIF = clip(frames=25, size=(60, 40)), clip("gif", frames=15)
OWN = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "llava_onevision", "llava_next_video", "internvl",
    "gemma4",
)  # fmt: skip
PICTURES = ("gemma3", "idefics3", "smolvlm", "glm4v", "glm4v_moe")
WITHOUT = ("llava", "mllama", "mistral3")


def talk(content: str, answer: str = "to the left", key: str = "k") -> Sample:
    """`content`: v and g for two videos, i for a picture, t for a text."""
    parts = {"v": {"type": "video"}, "g": {"type": "video"}, "i": {"type": "image"}, "t": {"type": "text", "text": "Where does it go?"}}
    turns = [
        {"role": "user", "content": [parts[one] for one in content]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    images = [Image.fromarray(picture(number, (70, 50))) for number in range(content.count("i"))]
    clips = [open_clip({"v": MP4, "g": GIF}[one], one, 10**6) for one in content if one in "vg"]
    return Sample(key, "s.tar", turns, images, videos=clips)


TALKS = [talk("vt", "up"), talk("t", "a red circle"), talk("ivtg", "left then right", "many"), talk("it", "green")]


@pytest.fixture(params=[*OWN, *PICTURES])
def loaded(request, checkpoint):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = checkpoint(request.param)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    return model, Encoder(AutoProcessor.from_pretrained(path), 4096, video=CONFIG)


@pytest.mark.parametrize("family", OWN)
def test_as_transformers_encodes_it(checkpoint, family):
    """ids, pixels, grids, seconds of a grid and kinds of tokens: what the processor's own chat template makes of the same frames."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint(family))
    encoder, sample = Encoder(processor, 4096, video=CONFIG), talk("ivtg")
    shown = [one.shown(encoder.videos.config) for one in sample.videos]
    told = [{"fps": 10.0, "total_num_frames": frames, "duration": frames / 10, "frames_indices": [round(10 * t, 6) for t in one.times]}
            for one, frames in zip(shown, (25, 15), strict=True)]  # fmt: skip
    coming, picture = iter(shown), iter(sample.images)
    filled = {"video": lambda: {"video": next(coming).frames.numpy()}, "image": lambda: {"image": next(picture)}, "text": dict}
    messages = [{**turn, "content": [part | filled[part["type"]]() for part in turn["content"]]} for turn in sample.messages]
    options = {
        "video_metadata": told,
        "do_sample_frames": False,
        "return_mm_token_type_ids": "mm_token_type_ids" in processor.model_input_names,
    }
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options)
    ours = encoder.encode(sample).inputs
    start = ours["input_ids"].shape[1] - theirs["input_ids"].shape[1]
    assert start in (0, -1)  # some write the BOS twice when asked so
    for name in ours:
        expected = theirs[name][:, -start:] if name in ("input_ids", "mm_token_type_ids") else theirs[name]
        torch.testing.assert_close({name: torch.as_tensor(ours[name])}, {name: torch.as_tensor(expected)}, rtol=1e-6, atol=1e-6)
    assert ("pixel_values_videos" in ours) == (family != "internvl")


def test_frames_as_pictures_have_their_times(checkpoint):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint("gemma3"))
    encoded = Encoder(processor, 4096, video=CONFIG).encode(talk("ivt"))
    text = processor.tokenizer.decode(encoded.inputs["input_ids"][0])
    assert [text.count(f"Frame {time}s: ") for time in ("0.0", "0.6", "1.2", "1.9")] == [1, 1, 1, 1]  # of 2.5 s, at most four
    assert encoded.inputs["pixel_values"].shape[0] == 5 and encoded.inputs["pixel_values"][0].std() > 0


def test_the_answer_alone_is_learnt(loaded):
    _, encoder = loaded
    tokenizer = encoder.processor.tokenizer
    for sample in TALKS:
        encoded = encoder.encode(sample)
        said = tokenizer.decode(encoded.labels[0][encoded.labels[0] != IGNORED]).strip()
        assert said == f"{sample.messages[1]['content'][0]['text']}{tokenizer.eos_token}"
        assert encoded.picture.any() == (encoded.key == "many" or bool(sample.images or sample.videos))


def test_lengths_before_decoding(loaded):
    model, encoder = loaded
    ruler = Ruler(encoder)
    for sample in TALKS:
        encoded = encoder.encode(sample)
        found = ruler.measure(sample.messages, sample.sizes, None, sample.videos)
        assert found.tokens == encoded.length
        assert found.patches == pytest.approx(count_patches(encoded.inputs), abs=len(sample.sizes) + 4 * len(sample.videos))
    by_trying = not encoder.videos.is_own or family_of(model).model_type == "gemma4"
    assert by_trying or ruler._videos._rule_is_right  # by the processor's own words, no frame processed


def test_packed_is_as_alone(loaded):
    model, encoder = loaded
    if not family_of(model).packs:
        pytest.skip(f"{model.config.model_type} does not pack: its row of the table says so")
    pad, samples = model.generation_config.pad_token_id, [encoder.encode(sample) for sample in TALKS]
    rows = [samples[:2], samples[2:]]
    with torch.no_grad():
        alone = [float(token_losses(model, collate([sample], pad)).sum()) for sample in samples]
        batch = collate_packed(rows, pad, position_rule(model))
        packed = [loss for losses, row in zip(token_losses(model, batch), rows, strict=True) for loss in per_sample(losses, row)]
    assert min(alone) > 0.1
    assert packed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("content", ["vt", "it", "t"])
def test_what_joins_a_batch_changes_no_loss_and_no_gradient(loaded, content):
    model, encoder = loaded
    pad, sample = model.generation_config.pad_token_id, encoder.encode(talk(content))
    blank = encoder.lacking([sample])
    (joined,) = with_blank([[sample]], blank, False, True)
    names = {"pixel_values", "pixel_values_videos"} if "pixel_values_videos" in encoder.blank(encoder._kinds).inputs else {"pixel_values"}
    assert names <= joined[0].inputs.keys()

    def gradients(one) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = summed_loss(model, collate([one], pad))
        loss.backward()
        return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    expected, found = gradients(sample), gradients(joined[0])
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}")


def test_patched_as_it_was(loaded):
    """The kernels' places, the windows of Qwen2.5-VL's vision tower among them, on videos."""
    model, encoder = loaded
    batch = collate([encoder.encode(talk("ivtg"))], model.generation_config.pad_token_id)
    with torch.no_grad():
        expected = summed_loss(model, batch)
        patch_model(model, "all")
        torch.testing.assert_close(summed_loss(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_the_order_of_frames_counts(loaded):
    """What is learnt of a video is no bag of pictures: the same frames backwards give other logits."""
    model, encoder = loaded
    sample, pad = talk("vt"), model.generation_config.pad_token_id
    shown = sample.videos[0].shown(encoder.videos.config)
    turned = shown._replace(frames=shown.frames.flip(0))

    def logits(way) -> torch.Tensor:
        batch = collate([encoder.encode_prompt(sample.messages[:1], [], videos=[way])], pad)
        with torch.no_grad():
            return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits

    one, other = logits(shown), logits(turned)
    assert one.shape == other.shape and float((one - other).abs().max()) > 1e-4


@pytest.mark.parametrize("family", WITHOUT)
def test_a_family_without_video_says_so(checkpoint, family):
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(checkpoint(family)), 4096, video=CONFIG)
    with pytest.raises(BadSample, match=rf"v: a video, and {family} takes none; docs/models.md names the models that do"):
        encoder.encode(talk("vt"))
    assert FAMILIES[family].video == ""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_frames_as_the_vision_tower_is_shown_them(checkpoint, family):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint(family))
    encoder, sample = Encoder(processor, 4096, video=CONFIG), talk("ivtg")
    seen = videos_as_seen(encoder.encode(sample), processor)
    for frames, video in zip(seen, sample.videos, strict=True):
        shown = video.shown(encoder.videos.config)
        assert len(frames) - len(shown.frames) in (0, 1)  # Qwen's steps are of two frames
        for frame, before in zip(frames, shown.frames, strict=False):
            middle = frame.crop((frame.width // 3, 0, frame.width * 2 // 3, frame.height)).resize((1, 1)).getpixel((0, 0))
            assert middle[0] == pytest.approx(float(before[:, :, 20:40].float().mean()), abs=6)
    picture = strip(seen[0] * 3, [0.0, 0.5, 1.0, 1.5] * 3, 20)
    assert picture.height == 2 * (20 + 14) and picture.width == 8 * (round(seen[0][0].width * 20 / seen[0][0].height) + 2)
