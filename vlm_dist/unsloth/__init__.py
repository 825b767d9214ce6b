"""The workflow of Unsloth's vision notebooks, by its names: model, collator, TRL's trainer."""
