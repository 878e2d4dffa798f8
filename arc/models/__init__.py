"""Models: vocabulary, loading, the collator, LoRA, rows without padding, attention."""
