"""The keys that records are read by, most telling first."""

from __future__ import annotations

from vlm_dist.data.layout_boxes import BOX_KEYS
from vlm_dist.data.layout_values import FILE_KEYS, PICTURE_KEYS

TURN_KEYS = (
    "messages",
    "conversations",
    "conversation",
    "chat",
    "dialog",
    "dialogue",
    "dialogs",
    "turns",
    "contents",
    "qa_pairs",
    "qas",
    "qa",
)
PAIR_KEYS = ("questions", "qa_list", "question_answers", "question_answer_pairs", "qna")  # turns where each item has question and answer
QUESTIONS = ("question", "query", "prompt", "instruction", "problem", "questions", "user", "input", "q", "prefix")
ANSWERS = (
    "multiple_choice_answer", "answer", "answers", "response", "completion", "output", "label", "labels", "solution", "target",
    "correct_choice_idx", "direct_answers", "assistant", "full_answer", "suffix", "ground_truth",
)  # fmt: skip
RIVALS = {
    "question": ("question", "query", "prompt", "instruction", "problem", "prefix"),
    "answer": ("answer", "response", "completion", "output", "assistant", "suffix"),
    "caption": ("text", "description", "alt_text", "raw", "txt", "comment"),
}
"""Keys that mean the same thing; where two of them say different things, the user decides."""
CAPTIONS = (
    "captions", "caption", "sentences", "texts", "text", "raw", "caption_str", "reference_strs", "alt_text", "description", "TEXT",
    "sentence", "txt", "comment", "suffix", "class_name", "class", "label", "category", "ground_truth",
)  # fmt: skip
EXPRESSIONS = (
    "expression", "expressions", "referring_expression", "ref_exp", "phrase", "phrases", "sentences", "captions", "caption", "sentence",
    "text", "description", "label", "labels", "category", "instruction", "answer", "answers",
)  # fmt: skip
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
KNOWN = frozenset(
    {
        *TURN_KEYS, *PAIR_KEYS, *(key for key in QUESTIONS if len(key) > 1), *ANSWERS, *CAPTIONS, *EXPRESSIONS, *BOX_KEYS, *SYSTEM,
        *PICTURE_KEYS, *FILE_KEYS, "image_id", "history", "tools", "options", "choices", "hint", "objects", "width", "height", "id",
    }
)  # fmt: skip
"""Names that records are read by; keys in other spellings get them."""
