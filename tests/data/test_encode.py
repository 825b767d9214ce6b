"""Tokens and labels: the assistant's words and end-of-turn, nothing else; picture tokens are never cut."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from vlm_dist.data.collate import collate
from vlm_dist.data.control_tokens import WORD_JOINER
from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.encoded import count_labels
from vlm_dist.data.labels import is_per_token, span_of
from vlm_dist.data.pictures import decode_pixels
from vlm_dist.data.samples import Sample
from vlm_dist.errors import BadSample, ConfigError

USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the triangle?"}]}
MORE = {"role": "user", "content": [{"type": "text", "text": "Where is the cross?"}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def sample(*messages, images=1, size=(40, 30)) -> Sample:
    return Sample("k", "s.tar", list(messages), [Image.new("RGB", size, "red") for _ in range(images)])


@pytest.mark.parametrize("size", [(300, 200), (33, 77), (1000, 800), (64, 3), (56, 56), (3, 64)])
def test_pictures_as_tensors_are_encoded_alike(encoder, size):
    picture = Image.effect_noise(size, 90).convert("RGB")
    picture.putpixel((0, 0), (255, 0, 0))
    assert encoder.takes_pixels
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    pixels = decode_pixels(buffer.getvalue(), "png", 10**7)
    ours, theirs = (encoder.encode(Sample("k", "s.tar", [USER, assistant("red")], [image])) for image in (pixels, picture))
    assert ours.inputs.keys() == theirs.inputs.keys()
    assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)


class Foreign:
    """A processor of pictures as those that come with a checkpoint's own code may be: of none of transformers' classes."""

    model_input_names = ("pixel_values",)

    def __init__(self, call):
        self.call, self.fetch_images = call, call.fetch_images

    def __call__(self, images, **options):
        return self.call(images, **options)


@pytest.mark.parametrize("wrap", [lambda own: own, Foreign], ids=["pillow", "foreign"])
def test_processors_of_pictures_that_take_no_tensors(llava, wrap):
    from transformers import AutoImageProcessor, AutoProcessor

    processor = AutoProcessor.from_pretrained(llava)
    tokens = Encoder(processor, 512).encode(sample(USER, assistant("red"))).length
    processor.image_processor = wrap(AutoImageProcessor.from_pretrained(llava, backend="pil"))
    encoder = Encoder(processor, 512)
    assert not encoder.takes_pixels and encoder.encode(sample(USER, assistant("red"))).length == tokens


@pytest.fixture
def encoder(any_checkpoint):
    from transformers import AutoProcessor

    return Encoder(AutoProcessor.from_pretrained(any_checkpoint), 512)


def supervised(encoder, encoded) -> str:
    return encoder.processor.tokenizer.decode(encoded.labels[0][encoded.labels[0] != IGNORED])


def end(encoder) -> str:
    return encoder.processor.tokenizer.eos_token


def test_only_the_assistant_is_supervised(encoder):
    encoded = encoder.encode(sample(USER, assistant("red")))
    assert supervised(encoder, encoded).strip() == f"red{end(encoder)}"
    assert encoded.key == "k" and encoded.picture.any()
    kept = encoded.labels != IGNORED
    assert torch.equal(encoded.labels[kept], encoded.inputs["input_ids"][kept])


def test_every_turn_of_many(encoder):
    encoded = encoder.encode(sample(USER, assistant("red"), MORE, assistant("top left")))
    turns = [turn.strip() for turn in supervised(encoder, encoded).split(end(encoder))]
    assert turns == ["red", "top left", ""]


def test_labels_token_by_token(encoder):
    """The slow twin: tokens up to each prompt are the prefix that is not supervised."""
    messages = [USER, assistant("red")]
    encoded = encoder.encode(sample(*messages))
    prompt = encoder.encode_prompt(messages[:1], sample().images)
    start = prompt.length
    assert torch.equal(encoded.inputs["input_ids"][:, :start], prompt.inputs["input_ids"])
    assert (encoded.labels[0, :start] == IGNORED).all()
    eos = encoder.processor.tokenizer.eos_token_id
    last = start + (encoded.inputs["input_ids"][0, start:] == eos).nonzero()[0, 0]
    assert (encoded.labels[0, start : last + 1] != IGNORED).all()
    assert (encoded.labels[0, last + 1 :] == IGNORED).all()


def test_who_speaks_last_may_be_the_user(encoder):
    encoded = encoder.encode(sample(USER, assistant("red"), MORE))
    assert supervised(encoder, encoded).strip() == f"red{end(encoder)}"


def test_a_prompt_has_no_labels_and_the_pictures_of_the_conversation(encoder):
    prompt, encoded = encoder.encode_prompt([USER], sample().images), encoder.encode(sample(USER, assistant("red")))
    assert prompt.key == "" and encoder.encode_prompt([USER], sample().images, "p").key == "p"
    assert prompt.labels.shape == prompt.inputs["input_ids"].shape and (prompt.labels == IGNORED).all()
    assert torch.equal(prompt.picture, encoded.picture[: prompt.length])


def test_the_processor_is_asked_for_what_the_model_takes(encoder):
    """Types of tokens where the model knows them; one begin-of-text at most, whoever writes it."""
    encoded = encoder.encode(sample(USER, assistant("red")))
    assert ("mm_token_type_ids" in encoded.inputs) == ("mm_token_type_ids" in encoder.processor.model_input_names)
    bos = encoder.processor.tokenizer.bos_token_id
    if bos is not None and bos != encoder.processor.tokenizer.eos_token_id:
        assert (encoded.inputs["input_ids"] == bos).sum() <= 1


def test_text_is_counted_as_it_is_encoded(encoder):
    messages = [MORE, assistant("top left <|im_end|>")]
    assert encoder.count_text(messages) == encoder.encode(sample(*messages, images=0)).length
    prompt = encoder.count_text(messages[:1], add_generation_prompt=True)
    assert prompt == encoder.encode_prompt(messages[:1], []).length


def test_a_template_that_rewrites_earlier_turns_is_refused(encoder):
    said = "{{ m.content[-1].text | upper if m.role == 'assistant' else m.content[-1].text }}"
    encoder.processor.chat_template = "{% for m in messages %}{{ loop.length }} {{ m.role }} " + said + "{% endfor %}"
    with pytest.raises(BadSample, match="writes in other words what the assistant says in turn 1: 'red'"):
        encoder.encode(sample(MORE, assistant("red"), images=0))


def test_every_turn_token_by_token(encoder):
    """Pictures in several turns: what is supervised is what each prefix of the conversation adds, up to its end-of-turn."""
    tiles_by_number = encoder.processor.__class__.__name__ == "LlavaOnevisionProcessor"  # a prefix has other picture tokens there
    later = [] if tiles_by_number else [{"type": "image"}]
    another = {"role": "user", "content": [{"type": "text", "text": "And here?"}, *later]}
    messages = [USER, assistant("red"), MORE, assistant("top left"), another, assistant("a blue square")]
    pictures = sample(images=1 + len(later)).images
    encoded = encoder.encode(sample(*messages, images=len(pictures)))
    ids, eos = encoded.inputs["input_ids"][0], encoder.processor.tokenizer.eos_token_id
    expected = torch.zeros(encoded.length, dtype=torch.bool)
    for number in (1, 3, 5):
        prompt = encoder.encode_prompt(messages[:number], pictures[: 1 if number < 5 else None])
        assert torch.equal(ids[: prompt.length], prompt.inputs["input_ids"][0])
        end_of_turn = prompt.length + int((ids[prompt.length :] == eos).nonzero()[0, 0])
        expected[prompt.length : end_of_turn + 1] = True
    assert torch.equal(encoded.labels[0] != IGNORED, expected)


def test_no_picture_and_two_pictures(encoder):
    none = encoder.encode(sample(MORE, assistant("top left"), images=0))
    assert "pixel_values" not in none.inputs and not none.picture.any()
    two = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]}
    encoded = encoder.encode(sample(two, assistant("red"), images=2))
    one = encoder.encode(sample(USER, assistant("red")))
    if encoder.processor.__class__.__name__ != "LlavaOnevisionProcessor":  # cuts several pictures into fewer tiles than one
        assert encoded.picture.sum() == 2 * one.picture.sum()
    assert encoded.picture.any()
    assert supervised(encoder, encoded).strip() == f"red{end(encoder)}"


def test_too_long_is_refused_with_numbers(encoder):
    encoder.max_seq_length = 40
    with pytest.raises(BadSample, match="too long: 41 tokens, more than"):
        encoder.check_length(41)
    encoder.check_length(40)
    with pytest.raises(BadSample, match=r"too long: \d+ tokens \(\d+ of them picture\), more than data.max_seq_length=40"):
        encoder.encode(sample(USER, assistant("red " * 50)))


def test_truncation_cuts_text_at_the_end_only(encoder):
    full = encoder.encode(sample(USER, assistant("red " * 50)))
    encoder.max_seq_length = full.length
    assert encoder.encode(sample(USER, assistant("red " * 50))).length == full.length  # just fits
    encoder.max_seq_length, encoder.on_too_long = full.length - 20, "truncate"
    encoder.check_length(full.length)
    cut = encoder.encode(sample(USER, assistant("red " * 50)))
    assert cut.length == full.length - 20
    assert torch.equal(cut.inputs["input_ids"], full.inputs["input_ids"][:, : cut.length])
    assert cut.picture.sum() == full.picture.sum() and cut.key == full.key
    whole = {name for name, tensor in full.inputs.items() if not is_per_token(tensor, full.length)}
    assert "pixel_values" in whole and all(torch.equal(cut.inputs[name], full.inputs[name]) for name in whole)


def test_truncation_never_cuts_pictures(encoder):
    encoder.max_seq_length, encoder.on_too_long = 4, "truncate"
    with pytest.raises(BadSample, match=r"picture tokens|no supervised token"):
        encoder.encode(sample(USER, assistant("red")))
    late = {"role": "user", "content": [{"type": "text", "text": "Look. " * 20}, {"type": "image"}]}
    encoder.max_seq_length = 60
    with pytest.raises(BadSample, match="cutting would lose picture tokens"):
        encoder.encode(sample(late, assistant("red")))


def test_all_labels_masked(encoder):
    full = encoder.encode(sample(USER, assistant("red")))
    encoder.max_seq_length = int((full.labels[0] != IGNORED).nonzero()[0, 0])
    encoder.on_too_long = "truncate"
    with pytest.raises(BadSample, match="no supervised token"):
        encoder.encode(sample(USER, assistant("red")))


def test_control_tokens_in_text_stay_text(encoder):
    tokens = encoder.processor.tokenizer.all_special_tokens
    attack = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "say " + " ".join(tokens)}]}
    innocent = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "say "}]}
    special = torch.tensor(encoder.processor.tokenizer.all_special_ids)

    def count(message):
        return torch.isin(encoder.encode(sample(message, assistant("red"))).inputs["input_ids"], special).sum()

    assert count(attack) == count(innocent)
    ((message,), notes) = encoder._plain_text([attack])
    assert {kind for kind, _ in notes} == {"split"}
    assert message["content"][0] == attack["content"][0]
    assert message["content"][1]["text"].replace(WORD_JOINER, "") == attack["content"][1]["text"]


def test_batches_pad_and_keep_pictures(encoder):
    rows = [encoder.encode(sample(USER, assistant("red"))), encoder.encode(sample(USER, assistant("red"), MORE, assistant("top left")))]
    batch = collate(rows, pad_token_id=0)
    lengths = [row.length for row in rows]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"][0, lengths[0] :] == IGNORED).all()
    assert len(batch["pixel_values"]) == sum(len(row.inputs["pixel_values"]) for row in rows)
    left = collate(rows, pad_token_id=0, side="left")
    assert left["attention_mask"][0, 0] == 0 and left["attention_mask"][0, -1] == 1


def test_pictures_of_unequal_size_are_padded():
    from vlm_dist.data.collate import _concatenate

    joined = _concatenate([torch.ones(1, 3, 4, 6), torch.ones(2, 3, 5, 2)])
    assert joined.shape == (3, 3, 5, 6)
    assert joined[0, :, :4].sum() == 3 * 4 * 6 and joined[0, :, 4:].sum() == 0


def test_spans_move_past_the_pictures_before_them():
    """Rendered "<i>ab<i>c": each placeholder becomes 5 characters, of one token each; "ab" and "c" are spoken."""
    offsets = torch.tensor([[n, n + 1] for n in range(13)])
    replacements = [{"span": (0, 3), "new_span": (0, 5)}, {"span": (5, 8), "new_span": (7, 12)}]
    assert (span_of(offsets, replacements, [(3, 5), (8, 9)]) >= 0).nonzero().flatten().tolist() == [5, 6, 12]
    assert (span_of(offsets, [], [(3, 5)]) >= 0).nonzero().flatten().tolist() == [3, 4]


def test_what_has_values_a_token():
    good = [(1, 7), (1, 7, 2, 4)]
    assert all(is_per_token(torch.zeros(shape, dtype=torch.long), 7) for shape in good)
    assert not any(is_per_token(torch.zeros(shape), 7) for shape in good)
    for shape in [(7,), (2, 7), (1, 6), (1, 7, 2), (1, 7, 2, 4, 3), (1, 6, 2, 4)]:
        assert not is_per_token(torch.zeros(shape, dtype=torch.long), 7), shape


def turn(text, **more):
    return {**assistant(text), **more}


def test_turns_count_by_their_weight(encoder):
    """0: not at all; else in labels and in weights."""
    plain = encoder.encode(sample(USER, assistant("red"), MORE, assistant("top left")))
    off = encoder.encode(sample(USER, turn("red", weight=0.0), MORE, assistant("top left")))
    assert torch.equal(off.inputs["input_ids"], plain.inputs["input_ids"]) and "weights" not in off.inputs
    assert supervised(encoder, off).strip() == f"top left{end(encoder)}" and ("turn", "weight 0") in off.notes
    half = encoder.encode(sample(USER, turn("red", weight=0.25), MORE, assistant("top left")))
    assert torch.equal(half.labels, plain.labels)
    counted = int((plain.labels[:, 1:] != IGNORED).sum())
    second = int((off.labels[:, 1:] != IGNORED).sum())
    assert count_labels(plain) == counted and count_labels(half) == pytest.approx(second + 0.25 * (counted - second))
    with pytest.raises(BadSample, match="no supervised token"):
        encoder.encode(sample(USER, turn("red", weight=0.0)))


def test_the_last_turn_only(encoder):
    encoder.train_on = "last"
    encoded = encoder.encode(sample(USER, assistant("red"), MORE, assistant("top left")))
    assert supervised(encoder, encoded).strip() == f"top left{end(encoder)}"
    assert ("turn", "all but the last (data.train_on: last)") in encoded.notes


def test_a_picture_in_an_answer_is_never_a_label(encoder):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Zoom: "}, {"type": "image"}, {"type": "text", "text": " red"}]}
    try:
        encoded = encoder.encode(sample(USER, answer, images=2))
    except BadSample as reason:
        assert "the chat template leaves out" in str(reason)
        return
    assert not (encoded.labels[0, encoded.picture] != IGNORED).any()
    said = supervised(encoder, encoded)
    assert "Zoom:" in said and "red" in said and not any(token in said for token in encoder._tokens.pictures)


def test_special_tokens_that_are_data_are_kept(checkpoint):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint("qwen2_vl"))
    tokens = ["<|object_ref_start|>", "<|box_start|>", "<loc12>", "<tool_call>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    text = "<|object_ref_start|>box<|box_start|>(1,2)<loc12> <tool_call> <|im_end|> <|image_pad|>"
    encoder = Encoder(processor, 512)
    encoded = encoder.encode(sample(USER, assistant(text)))
    kept = encoded.labels[0].tolist()
    assert all(kept.count(processor.tokenizer.convert_tokens_to_ids(token)) == 1 for token in tokens)
    assert kept.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # the turn's own
    notes = {("kept", "<|object_ref_start|>"), ("kept", "<loc#>"), ("split", "<|im_end|>"), ("split", "<|image_pad|>")}
    assert notes <= encoded.notes
    split = Encoder(processor, 512, split_tokens=["<|box_start|>"]).encode(sample(USER, assistant(text)))
    assert processor.tokenizer.convert_tokens_to_ids("<|box_start|>") not in split.labels[0]
    loose = Encoder(processor, 512, keep_tokens=["<|im_end|>"]).encode(sample(USER, assistant(text)))
    assert loose.labels[0].tolist().count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    with pytest.raises(ConfigError, match=r"data\.keep_tokens: '<nothing>' is no special token of this model"):
        Encoder(processor, 512, keep_tokens=["<nothing>"])


@pytest.mark.parametrize("fault", ["template", "processor"])
def test_whatever_is_raised_is_a_bad_sample(encoder, fault, monkeypatch):
    if fault == "template":
        encoder.processor.chat_template = "{{ messages[7].role }}{{ raise_exception('Only odd things') }}"
        with pytest.raises(BadSample, match="chat template: "):
            encoder.encode(sample(USER, assistant("red")))
    else:
        with pytest.raises(BadSample, match="processor: "):
            encoder.encode(sample(USER, assistant("red"), images=0))


def test_runs_of_picture_tokens_are_tokenised_as_one_by_one(encoder):
    """The same tensors, offsets and places as the processor gives by itself, for pictures of several sizes in several turns."""
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((40, 30), (300, 200), (64, 64))]
    several = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " and  "}, {"type": "image"}]}
    for messages, images in (([USER, assistant("red"), several], pictures), ([MORE], []), ([USER], pictures[1:2])):
        text = encoder._render(messages)
        quick = encoder._process(text, images, [], messages)
        encoder._quick = encoder.processor
        plain = encoder._process(text, images, [], messages)
        encoder._quick = Encoder(encoder.processor, 512)._quick
        assert quick[0].keys() == plain[0].keys() and quick[3] == plain[3]
        assert all(torch.equal(quick[0][name], plain[0][name]) and quick[0][name].dtype == plain[0][name].dtype for name in plain[0])
        assert torch.equal(quick[1], plain[1]) and torch.equal(quick[2], plain[2])
